"""Measures of a ranking against slow and obvious computations."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whence.numerics import auroc, average_precision, bootstrap_interval, generator, mixed_seed, spearman

FEW = [-math.inf, -1.0, 0.0, 0.5, 2.0]
"""Few values, so that ties are the rule."""
RANKED = st.lists(st.tuples(st.sampled_from(FEW), st.booleans()), min_size=1, max_size=6)


def split(rows):
    return torch.tensor([score for score, _ in rows]), torch.tensor([relevant for _, relevant in rows])


@given(RANKED)
@settings(max_examples=200, deadline=None)
def test_auroc_counts_pairs(rows):
    scores, relevant = split(rows)
    pairs = [(x, y) for x, hit in rows for y, other in rows if hit and not other]
    if not pairs:
        with pytest.raises(ValueError, match="auroc of"):
            auroc(scores, relevant)
    else:
        expected = sum((x > y) + 0.5 * (x == y) for x, y in pairs) / len(pairs)
        assert auroc(scores, relevant) == pytest.approx(expected)


@given(RANKED)
@settings(max_examples=200, deadline=None)
def test_average_precision_is_the_mean_over_every_order_of_ties(rows):
    scores, relevant = split(rows)
    if not relevant.any():
        with pytest.raises(ValueError, match="none is relevant"):
            average_precision(scores, relevant)
        return
    orders = [
        order for order in itertools.permutations(rows) if all(x[0] >= y[0] for x, y in itertools.pairwise(order))
    ]
    expected = statistics.mean(precision_down_to_each([hit for _, hit in order]) for order in orders)
    assert average_precision(scores, relevant) == pytest.approx(expected)


def precision_down_to_each(hits):
    return statistics.mean(sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit)


@given(st.lists(st.tuples(st.sampled_from(FEW), st.sampled_from(FEW)), min_size=2, max_size=8))
@settings(max_examples=200, deadline=None)
def test_spearman_is_pearson_of_mean_ranks(pairs):
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        with pytest.raises(ValueError, match="all equal"):
            spearman(torch.tensor(x), torch.tensor(y))
    else:
        expected = statistics.correlation(*([mean_rank(value, values) for value in values] for values in (x, y)))
        assert spearman(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)


def mean_rank(value, values):
    return sum(other < value for other in values) + (values.count(value) + 1) / 2


@given(RANKED, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_measures_do_not_depend_on_the_order_of_rows_nor_on_scale(rows, random):
    shuffled = random.sample(rows, len(rows))
    for measure in (auroc, average_precision):
        (scores, relevant), (others, again) = split(rows), split(shuffled)
        if relevant.any() and not relevant.all():
            assert measure(3 * others + 1, again) == pytest.approx(measure(scores, relevant))


def test_measures_worked_by_hand():
    """Ranks 1 and 4 of 5 are relevant: pairs won 3 of 3 and 1 of 3; precisions 1/1 and 2/4."""
    scores, relevant = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), torch.tensor([True, False, False, True, False])
    assert auroc(scores, relevant) == pytest.approx(4 / 6)
    assert average_precision(scores, relevant) == pytest.approx((1 + 1 / 2) / 2)
    assert spearman(scores, -scores) == pytest.approx(-1)
    assert spearman(scores, scores.exp()) == pytest.approx(1)


def test_equal_scores_are_chance():
    """Of 40 rows in any order, 4 relevant: expected precision at the k-th place is (1 + 3 (k - 1) / 39) / k."""
    scores, relevant = torch.zeros(40), torch.arange(40) < 4
    assert auroc(scores, relevant) == 0.5
    expected = statistics.mean((1 + 3 * (place - 1) / 39) / place for place in range(1, 41))
    assert average_precision(scores, relevant) == pytest.approx(expected)


def test_measures_keep_their_digits_over_a_million_rows():
    scores = torch.rand(1_000_000, generator=generator(0, "test"))
    relevant = torch.arange(1_000_000) % 10 == 0
    assert auroc(scores, relevant) == pytest.approx(0.5, abs=0.003)
    assert average_precision(scores, relevant) == pytest.approx(0.1, abs=0.003)
    assert auroc(relevant.float(), relevant) == average_precision(relevant.float(), relevant) == 1


def test_nan_is_refused():
    values, relevant = torch.tensor([1.0, math.nan]), torch.tensor([True, False])
    for call in (lambda: auroc(values, relevant), lambda: average_precision(values, relevant)):
        with pytest.raises(ValueError, match="NaN"):
            call()
    for pair in ((values, torch.ones(2)), (torch.tensor([1.0, 2.0]), values)):
        with pytest.raises(ValueError, match="NaN"):
            spearman(*pair)


def test_bootstrap_of_a_mean_is_its_normal_interval():
    values = torch.randn(400, generator=generator(0, "test"))
    low, high = bootstrap_interval(values, seed=0)
    margin = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - margin, abs=0.1 * margin)
    assert high == pytest.approx(values.mean().item() + margin, abs=0.1 * margin)


def test_bootstrap_repeats_for_a_seed_and_widens_with_its_level():
    values = torch.randn(20, generator=generator(0, "test"))
    first = bootstrap_interval(values, seed=1, resamples=500)
    assert bootstrap_interval(values, seed=1, resamples=500) == first
    assert bootstrap_interval(values, seed=2, resamples=500) != first
    wide = bootstrap_interval(values, seed=1, resamples=500, level=0.99)
    assert wide[0] < first[0] < first[1] < wide[1]


def test_bootstrap_draws_whole_rows():
    """Of pairs (x, x + 1), every resample's mean difference is 1."""
    x = torch.arange(7.0)
    pairs = torch.stack([x, x + 1], 1)
    ends = bootstrap_interval(pairs, seed=0, resamples=50, statistic=lambda rows: (rows[..., 1] - rows[..., 0]).mean(1))
    assert ends == (1, 1)


@pytest.mark.parametrize(
    "values, options",
    [
        (torch.ones(1), {}),
        (torch.ones(3), {"level": 1.0}),
        (torch.ones(3), {"resamples": 0}),
        (torch.tensor([1.0, math.nan]), {}),
        (torch.ones(3), {"statistic": lambda rows: torch.full((len(rows),), math.inf)}),
    ],
)
def test_bootstrap_refuses_what_has_no_interval(values, options):
    with pytest.raises(ValueError, match="bootstrap"):
        bootstrap_interval(values, seed=0, **{"resamples": 20} | options)


def test_seeds_differ_in_their_high_bits_and_scopes():
    seeds = {mixed_seed(seed, *scope) for seed in (5, 5 + (1 << 32)) for scope in ((), ("a",), ("a", "b"))}
    assert len(seeds) == 6
