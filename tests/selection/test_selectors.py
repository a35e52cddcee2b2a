"""Orders over rows, the contract of each in the catalogue, and what filters and budgets make of them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_views import Rows, asking

from conftest import corpus_rows
from whence import catalogue
from whence.errors import SettingError, UnknownNameError
from whence.models.loading import load_model
from whence.selection.budget import Budget, Limits
from whence.selection.choice import Candidates, choose
from whence.selection.protocols import Selector
from whence.selection.selectors.ranked import Best, Mean
from whence.selection.selectors.round_robin import RoundRobin

NAMES = list(catalogue.SELECTORS)
NAN, INF = math.nan, math.inf


def taken(selector, scores, refuse=()):
    """All picks of an order, of which some rows are refused."""
    order, out = selector(torch.tensor(scores, dtype=torch.float32)), []
    try:
        pick = next(order)
        while True:
            out.append(pick)
            pick = order.send(pick.row not in refuse)
    except StopIteration:
        return out


def rows_of(selector, scores, refuse=()):
    return [pick.row for pick in taken(selector, scores, refuse)]


def pool(scores, tokens=None, sources=None, texts=None, refused=None):
    """Candidates of as many rows as there are scores."""
    scores = torch.tensor(scores, dtype=torch.float32)
    count = scores.shape[1]
    return Candidates(
        scores,
        [f"t{number}" for number in range(len(scores))],
        torch.tensor(tokens or [10] * count),
        sources or [None] * count,
        texts or [f"text {number}" for number in range(count)],
        refused or {},
    )


@pytest.mark.parametrize("name", NAMES)
def test_catalogue_entry_is_a_selector(name):
    assert isinstance(catalogue.selector(name)(temperature=0.5, seed=3), Selector)
    with pytest.raises(SettingError, match="--temperature -1"):
        catalogue.selector(name)(temperature=-1.0)
    with pytest.raises(SettingError, match="--temperature nan"):
        catalogue.selector(name)(temperature=NAN)


def test_unknown_selector_is_told_the_names():
    with pytest.raises(UnknownNameError, match=r"--selector robin: no such method.*max, mean, round_robin"):
        catalogue.selector("robin")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_finite_score_never_come_and_the_others_once(name, temperature):
    scores = [[1.0, NAN, -INF, 0.5, NAN, 2.0, INF], [0.0, NAN, -INF, NAN, 3.0, -INF, NAN]]
    found = taken(catalogue.selector(name)(temperature=temperature), scores)
    assert sorted(pick.row for pick in found) == [0, 3, 4, 5]
    assert all(math.isfinite(pick.score) for pick in found)
    assert taken(catalogue.selector(name)(), [[NAN, NAN]]) == []


@pytest.mark.parametrize("name", NAMES)
def test_equal_scores_go_by_the_lower_row(name):
    assert rows_of(catalogue.selector(name)(), [[0.5] * 40, [0.5] * 40]) == list(range(40))


@pytest.mark.parametrize("name", NAMES)
def test_with_one_target_the_order_is_that_of_the_scores(name):
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    assert rows_of(catalogue.selector(name)(), scores.tolist()) == scores[0].argsort(descending=True).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_target_of_nan_changes_nothing(name):
    """LESS's released code would rank NaN rows first, and let one NaN example make every maximum NaN."""
    scores = torch.randn(2, 20, generator=torch.Generator().manual_seed(1)).tolist()
    assert rows_of(catalogue.selector(name)(), [*scores, [NAN] * 20]) == rows_of(catalogue.selector(name)(), scores)


@pytest.mark.parametrize("name", NAMES)
def test_temperature_draws_by_seed_and_reports_scores_without_noise(name):
    scores = torch.randn(2, 30, generator=torch.Generator().manual_seed(1)).tolist()
    make = catalogue.selector(name)
    first = taken(make(temperature=1.0, seed=5), scores)
    assert first == taken(make(temperature=1.0, seed=5), scores)
    assert [pick.row for pick in first] != rows_of(make(temperature=1.0, seed=6), scores)
    exact = {pick.row: pick.score for pick in taken(make(), scores)}
    if name != "round_robin":  # there a row's score is that for the target that happens to take it
        assert {pick.row: pick.score for pick in first} == exact
    assert rows_of(make(temperature=1e-6, seed=5), scores) == rows_of(make(), scores)


@pytest.mark.parametrize("name", NAMES)
def test_first_draw_has_the_probabilities_of_the_softmax(name):
    """Over 4,000 seeds, within four standard errors of softmax(score / temperature)."""
    scores, temperature, seeds = [0.0, 1.0, 2.0, -INF], 1.5, 4000
    counts = [0] * 4
    for seed in range(seeds):
        order = catalogue.selector(name)(temperature=temperature, seed=seed)(torch.tensor([scores]))
        counts[next(order).row] += 1
    for count, p in zip(counts, (torch.tensor(scores) / temperature).softmax(0).tolist(), strict=True):
        assert abs(count / seeds - p) <= 4 * (p * (1 - p) / seeds) ** 0.5


def test_draws_go_on_without_replacement():
    """Of weights 1, 2, 3: p(second is row 0 | first is row 2) = 1 / (1 + 2)."""
    scores, seconds = torch.tensor([[0.0, math.log(2), math.log(3)]]), []
    for seed in range(3000):
        first, second = itertools.islice(Best(temperature=1.0, seed=seed)(scores), 2)
        if first.row == 2:
            seconds.append(second.row == 0)
    assert sum(seconds) / len(seconds) == pytest.approx(1 / 3, abs=4 * (2 / 9 / len(seconds)) ** 0.5)


def test_max_takes_the_best_over_targets():
    found = taken(Best(), [[0.1, 0.9, 0.5, 0.5], [0.8, 0.2, 0.5, NAN]])
    assert [(pick.row, pick.target) for pick in found] == [(1, 0), (0, 1), (2, 0), (3, 0)]
    assert [pick.score for pick in found] == pytest.approx([0.9, 0.8, 0.5, 0.5])


def test_mean_is_over_the_targets_that_have_a_score():
    found = taken(Mean(), [[0.1, 0.9, 0.6], [0.7, 0.2, NAN]])
    assert [pick.row for pick in found] == [2, 1, 0]
    assert [pick.score for pick in found] == pytest.approx([0.6, 0.55, 0.4])
    assert {pick.target for pick in found} == {None}


def test_round_robin_worked_by_hand():
    """Orders: A 0 1 2 3 4, B 0 2 4 1 3, C 4 only. A takes 0, B its second 2, C 4, A 1, then B 3."""
    scores = [[5.0, 4.0, 3.0, 2.0, 1.0], [50.0, 20.0, 40.0, 10.0, 30.0], [NAN, NAN, NAN, NAN, 0.1]]
    found = taken(RoundRobin(), scores)
    assert [(pick.row, pick.target) for pick in found] == [(0, 0), (2, 1), (4, 2), (1, 0), (3, 1)]
    assert [pick.score for pick in found] == pytest.approx([5.0, 40.0, 0.1, 4.0, 10.0])


def test_round_robin_lets_a_refused_target_go_on_to_its_next():
    """A's rows 0 and 1 are refused, so A takes 2 in its first turn; B's best was 1, which is gone for it too."""
    scores = [[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 5.0, 2.0, 4.0, 3.0]]
    found = taken(RoundRobin(), scores, refuse=(0, 1))
    assert [(pick.row, pick.target) for pick in found] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 0)]


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_round_robin_gives_targets_even_shares(targets, rows, data):
    """Where every target has a score for every row, no target has two picks more than another."""
    scores = data.draw(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=rows, max_size=rows),
                                min_size=targets, max_size=targets))  # fmt: skip
    found = taken(RoundRobin(), scores)
    assert sorted(pick.row for pick in found) == list(range(rows))
    shares = [sum(pick.target == target for pick in found) for target in range(targets)]
    assert max(shares) - min(shares) <= 1


# -- filters and budgets

SCORES = [[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]
SOURCES = ["a", "a", "a", "a", "b", "a", "b", "c", "c", "c"]


def chosen(budget, **options):
    """Rows chosen of ten, whose order is their number."""
    limits = {name: options.pop(name) for name in ("caps", "floors") if name in options}
    duplicates = options.pop("duplicates", None)
    candidates = pool(SCORES, **({"sources": SOURCES} | options))
    return choose(candidates, Best(), budget, limits=Limits(**limits), duplicates=duplicates)


def test_selection_says_what_was_taken_for_what_and_why_the_rest_was_not():
    candidates = pool(
        [[0.1, 0.9, NAN, 0.5, 0.7, 0.3], [0.8, 0.2, -INF, NAN, 0.6, 0.2]],
        tokens=[7, 5, 3, 2, 9, 4], texts=["x", "y", "z", "X ", "", "w"], refused={4: "empty"},
    )  # fmt: skip
    found = choose(candidates, Best(), Budget(count=3), duplicates=1.0)
    assert found.rows == [1, 0, 5]
    assert found.scores == pytest.approx([0.9, 0.8, 0.3])
    assert found.targets == ["t0", "t1", "t0"]
    assert found.tokens == 16
    assert found.reasons == [None, None, "no finite score", "duplicate of row 0", "empty", None]
    assert found.tally() == {"no finite score": 1, "duplicate": 1, "empty": 1}
    assert found.notes == []
    assert choose(candidates, Mean(), Budget(count=1)).targets == [None]
    assert choose(candidates, Best(), Budget(count=1)).reasons[3] == "below the budget"


@pytest.mark.parametrize("fraction, rows", [(0.05, 1), (0.25, 2), (0.26, 3), (0.29, 3), (1.0, 10)])
def test_fraction_is_of_the_rows_that_can_be_ranked(fraction, rows):
    """Rounded to whole rows, at least one. Rows that never could be chosen do not make it larger."""
    assert len(chosen(Budget(fraction=fraction)).rows) == rows
    holes = [[*SCORES[0], *[NAN] * 90]]
    assert len(choose(pool(holes), Best(), Budget(fraction=fraction)).rows) == rows


def test_budget_above_the_pool_takes_all_and_says_so():
    found = chosen(Budget(count=1000))
    assert found.rows == list(range(10))
    assert found.notes == ["--count 1,000: 10 of 1,000 rows are chosen, for no more rows may be."]
    found = chosen(Budget(tokens=1000))
    assert found.notes == ["--tokens-budget 1,000: 100 of 1,000 tokens are chosen, for no more rows may be."]


def test_token_budget_stops_at_the_first_row_that_would_exceed_it():
    """10 + 20 are taken; 25 would be 55 of 50; the 5 after it would fit, and is not looked at."""
    tokens = [10, 20, 25, 5, 5, 5, 5, 5, 5, 5]
    found = chosen(Budget(tokens=50), tokens=tokens)
    assert found.rows == [0, 1]
    assert found.tokens == 30
    assert found.notes == []
    assert found.reasons[3] == "below the budget"
    assert chosen(Budget(tokens=55), tokens=tokens).rows == [0, 1, 2]
    with pytest.raises(SettingError, match=r"--tokens-budget 4: nothing can be chosen.*has 5 tokens"):
        chosen(Budget(tokens=4), tokens=tokens)


@pytest.mark.parametrize("given, told", [
    ({}, "none"), ({"count": 3, "fraction": 0.5}, "fraction, count"), ({"fraction": 0.0}, "--fraction 0.0"),
    ({"fraction": 1.5}, "--fraction 1.5"), ({"count": 0}, "--count 0"), ({"tokens": -1}, "--tokens-budget -1"),
])  # fmt: skip
def test_budget_is_one_of_three(given, told):
    with pytest.raises(SettingError, match=told):
        Budget(**given)


def test_caps_in_rows_and_in_shares():
    found = chosen(Budget(count=6), caps={"a": 2})
    assert found.rows == [0, 1, 4, 6, 7, 8]
    assert found.reasons[2] == "source at its cap"
    assert chosen(Budget(count=6), caps={"a": 0.5}).rows == [0, 1, 2, 4, 6, 7]
    assert chosen(Budget(count=6), caps={"*": 0.34}).rows == [0, 1, 4, 6, 7, 8]
    assert chosen(Budget(count=6), caps={"*": 1, "a": 3}).rows == [0, 1, 2, 4, 7]
    assert chosen(Budget(count=10), caps={"a": 0.3}).rows == [0, 1, 2, 4, 6, 7, 8, 9]  # 0.3 * 10 is not 2.9999


def test_caps_of_a_token_budget_are_in_tokens_or_in_rows():
    tokens = [10, 20, 30, 10, 10, 10, 10, 10, 10, 10]
    assert chosen(Budget(tokens=80), caps={"a": 0.5}, tokens=tokens).rows == [0, 1, 3, 4, 6, 7, 8]
    assert chosen(Budget(tokens=80), caps={"a": 1}, tokens=tokens).rows == [0, 4, 6, 7, 8, 9]


def test_a_cap_for_all_holds_rows_without_a_source_together():
    candidates = pool(SCORES)
    assert choose(candidates, Best(), Budget(count=5), limits=Limits(caps={"*": 2})).rows == [0, 1]


def test_floors_reserve_room():
    """Four rows: two are owed to c, so that only two of the better ones are taken; rank order is kept."""
    found = chosen(Budget(count=4), floors={"c": 2})
    assert found.rows == [0, 1, 7, 8]
    assert found.reasons[2] == "below the budget"
    assert chosen(Budget(count=4), floors={"b": 1, "c": 0.25}).rows == [0, 1, 4, 7]
    assert chosen(Budget(count=4), floors={"a": 2}).rows == [0, 1, 2, 3]
    assert chosen(Budget(count=4), floors={"c": 1}, caps={"a": 1}).rows == [0, 4, 6, 7]
    assert chosen(Budget(count=3), floors={"*": 1}).rows == [0, 4, 7]
    assert chosen(Budget(count=7), floors={"*": 1 / 3}).rows == [0, 1, 2, 4, 6, 7, 8]  # two of each: shares round down


def test_floors_of_a_token_budget_are_shares():
    assert chosen(Budget(tokens=50), floors={"c": 0.4}).rows == [0, 1, 2, 7, 8]
    tokens = [10, 10, 10, 10, 10, 10, 10, 15, 60, 60]
    found = chosen(Budget(tokens=50), floors={"c": 0.4}, tokens=tokens)  # 15 of 20; the next would take it over all
    assert found.rows == [0, 1, 2, 7]
    assert found.notes == ["--floor c: 5 tokens of it could not be filled."]
    with pytest.raises(SettingError, match="--floor c=2 in rows, --tokens-budget 50: give the floor as a share"):
        chosen(Budget(tokens=50), floors={"c": 2})


def test_floor_that_cannot_be_filled_goes_to_the_others():
    found = chosen(Budget(count=5), floors={"b": 4})
    assert found.rows == [0, 1, 2, 4, 6]
    assert found.notes == ["--floor b: the pool has 2 of 4 rows."]
    texts = ["x0", "x1", "x2", "x3", "same", "x5", "Same", "x7", "x8", "x9"]
    found = chosen(Budget(count=5), floors={"b": 2}, texts=texts, duplicates=1.0)
    assert found.rows == [0, 1, 2, 3, 4]
    assert found.notes == ["--floor b: 1 row of it could not be filled."]
    assert found.reasons[6] == "duplicate of row 4"


@pytest.mark.parametrize("limits, told", [
    ({"caps": {"d": 1}}, "--cap d: no row has this source. There are a, b, c."),
    ({"floors": {"a": 3, "b": 3}}, "the floors add up to 6, which is above the budget, 5"),
    ({"floors": {"a": 3}, "caps": {"a": 2}}, "--floor a=3: the cap of this source is below it"),
    ({"caps": {"a": 1.5}}, "--cap a=1.5: a number of rows, or a share"),
    ({"floors": {"a": -1}}, "--floor a=-1"),
    ({"caps": {"*": 0}}, "--count 5: nothing can be chosen. 10 source at its cap. Raise the caps."),
])  # fmt: skip
def test_limits_that_cannot_be_kept_are_refused(limits, told):
    with pytest.raises(SettingError, match=told.replace("*", "\\*")):
        chosen(Budget(count=5), **limits)


def test_limit_of_a_source_in_a_corpus_without_sources():
    with pytest.raises(SettingError, match="There are none: the corpus has no column `source`"):
        choose(pool(SCORES), Best(), Budget(count=1), limits=Limits(caps={"a": 1}))


def test_pool_without_a_rankable_row_is_refused():
    with pytest.raises(SettingError, match="none of 3 rows can be chosen: 2 no finite score, 1 empty"):
        choose(pool([[NAN, 1.0, -INF]], refused={1: "empty"}), Best(), Budget(count=1))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_limits_hold_whatever_the_scores(data):
    """Caps and floors that the pool can fill are kept, budgets never exceeded, and every row has one fate."""
    count = data.draw(st.integers(3, 25))
    sources = data.draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    tokens = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    scores = data.draw(st.lists(st.lists(st.sampled_from([NAN, 0.0, 0.5, 1.0]), min_size=count, max_size=count),
                                min_size=2, max_size=2))  # fmt: skip
    wanted = data.draw(st.integers(4, 12))
    budget = Budget(count=wanted) if data.draw(st.booleans()) else Budget(tokens=10 * wanted)
    cap, floor = data.draw(st.integers(3, 6)), data.draw(st.sampled_from([0.0, 0.1, 0.25]))
    limits = Limits(caps={"*": cap}, floors={"*": floor})
    selector = data.draw(st.sampled_from([Best(), Mean(), RoundRobin(), RoundRobin(temperature=1.0)]))
    candidates = pool(scores, tokens=tokens, sources=sources)
    able = candidates.rankable()
    if not able.any():
        return
    found = choose(candidates, selector, budget, limits=limits)
    assert len(set(found.rows)) == len(found.rows)
    assert all(able[row] for row in found.rows)
    assert [found.reasons[row] for row in found.rows] == [None] * len(found.rows)
    assert found.reasons.count(None) == len(found.rows)
    assert found.tokens == sum(tokens[row] for row in found.rows)
    assert found.tokens <= budget.tokens if budget.tokens else len(found.rows) <= wanted
    for source in set(sources):
        of_it = [row for row in found.rows if sources[row] == source]
        assert len(of_it) <= cap
        there = sum(bool(able[row]) and sources[row] == source for row in range(count))
        if budget.count:
            assert len(of_it) >= min(int(floor * wanted + 1e-6), there)
    if budget.count and len(found.rows) < wanted:
        assert set(found.tally()) <= {"no finite score", "source at its cap"}


def test_candidates_of_a_view_know_what_cannot_be_chosen(tiny_llama):
    model = load_model(tiny_llama, device="cpu")
    listed = [
        *corpus_rows(3),
        {"prompt": None, "completion": None},
        {"prompt": "", "completion": " "},
        {"messages": [{"role": "user", "content": "Why?"}]},
    ]
    view, targets = Rows(listed, model), asking("x", "y")
    found = Candidates.of(view, targets, torch.zeros(2, 6))
    assert found.targets == ["query 0", "query 1"]
    assert found.refused == {3: "empty", 4: "empty", 5: "no supervised token"}
    assert found.sources == ["s0", "s1", "s0", None, None, None]
    assert found.tokens.tolist() == [len(encoded.ids) for encoded in view.encoded()]
    assert found.texts[1] == "37 and 1?  yes, 1!"
    assert choose(found, Best(), Budget(count=6)).rows == [0, 1, 2]
    read = Candidates.of_texts(view.examples(), targets, torch.zeros(2, 6))
    assert read.refused == {3: "empty", 4: "empty"}
    assert (read.texts, read.sources) == (found.texts, found.sources)
    assert read.tokens.tolist() == [0] * 6
