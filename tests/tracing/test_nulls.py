"""A null says how far a score stands above what the same example scores for other queries."""

import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conftest import corpus_rows, write_jsonl
from whence.corpus.tokens import encode_query
from whence.errors import SettingError
from whence.gradients.exact import SignedSequence
from whence.indexing.build import index
from whence.indexing.opening import Index, open_index
from whence.tracing import levels, own_answers, retrieval
from whence.tracing.nulls import LEAST, best_z, control_scores, nulls, query_controls, row_controls
from whence.tracing.pipeline import trace
from whence.tracing.queries import query_vectors

WEIGHTS = (0.75, 0.25)


class Synthetic(Index):
    """An index of given vectors [c n k], as far as a null reads one."""

    weights = WEIGHTS

    def __init__(self, vectors):
        self.held, self.store, self.manifest = vectors, self, SimpleNamespace(width=vectors.shape[2])

    def rankable(self):
        """All."""
        return torch.arange(self.held.shape[1])

    def vectors(self, numbers):
        """With their norms."""
        return self.held[:, numbers], self.held[:, numbers].norm(dim=2)


def score(query, example, cosine):
    """By definition, over checkpoints."""
    total = 0.0
    for weight, x, y in zip(WEIGHTS, query, example, strict=True):
        product = sum(float(a) * float(b) for a, b in zip(x, y, strict=True))
        norms = (sum(float(side) ** 2 for side in sides) ** 0.5 for sides in (x, y))
        total += weight * product / (next(norms) * next(norms) if cosine else 1)
    return total


def vectors(count, seed=0, width=8):
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))


def scaled(controls, query):
    """Controls of the query's length."""
    return controls / controls.norm(dim=2, keepdim=True) * query.norm(dim=1)[:, None, None]


@pytest.mark.parametrize("cosine", [False, True])
def test_z_mean_and_percentile_are_those_of_the_examples_scores_for_the_controls(cosine):
    synthetic, controls, query = Synthetic(vectors(20)), vectors(LEAST, seed=1), vectors(1, seed=2)[:, 0]
    made, norms = query_controls(synthetic, controls, cosine=cosine), None if cosine else query.norm(dim=1)
    scores = [score(query, synthetic.held[:, row], cosine) for row in (3, 7)]
    found = nulls(synthetic, made, [3, 7], scores, cosine=cosine, norms=norms)
    for row, own, null in zip((3, 7), scores, found, strict=True):
        alike = scaled(controls, query)
        others = [score(alike[:, m], synthetic.held[:, row], cosine) for m in range(LEAST)]
        mean = statistics.fmean(others)
        assert null.scores == pytest.approx(others, rel=1e-4, abs=1e-5)
        assert null.mean == pytest.approx(mean, rel=1e-4, abs=1e-5)
        assert null.z == pytest.approx((own - mean) / statistics.stdev(others), rel=1e-4)
        assert null.percentile == pytest.approx(100 * sum(other < own for other in others) / LEAST)


def test_a_longer_query_is_no_more_of_a_signal():
    synthetic, query = Synthetic(vectors(64)), vectors(1, seed=2)[:, 0]
    controls = row_controls(synthetic, cosine=False)
    short, long = (
        nulls(synthetic, controls, [3], [score(q, synthetic.held[:, 3], False)], cosine=False, norms=q.norm(dim=1))[0]
        for q in (query, 10 * query)
    )
    assert long.z == pytest.approx(short.z, rel=1e-4)
    assert long.mean == pytest.approx(10 * short.mean, rel=1e-4)
    assert long.generic == short.generic


def test_the_best_z_is_the_highest_and_a_row_is_read_once_whatever_is_asked(monkeypatch):
    synthetic, read, real = Synthetic(vectors(64)), [], Synthetic.vectors
    controls, rows = row_controls(synthetic, cosine=False), [int(n) for n in range(40)]
    monkeypatch.setattr(Synthetic, "vectors", lambda self, numbers: read.extend(numbers) or real(self, numbers))
    for seed in range(3):
        query = vectors(1, seed=seed)[:, 0]
        scores = [score(query, synthetic.held[:, row], False) for row in rows]
        how = {"cosine": False, "norms": query.norm(dim=1)}
        expected = max(null.z for null in nulls(synthetic, controls, rows, scores, **how))
        assert best_z(synthetic, controls, rows, scores, **how) == pytest.approx(expected)
    assert sorted(read) == rows
    assert best_z(synthetic, controls, [], [], cosine=False) == 0


def test_an_example_is_left_out_of_its_own_null():
    synthetic = Synthetic(vectors(64))
    controls = row_controls(synthetic, cosine=True)
    row = int(controls.rows[5])
    stranger = next(number for number in range(64) if number not in controls.rows.tolist())
    own, other = nulls(synthetic, controls, [row, stranger], [0.5, 0.5], cosine=True)
    assert (len(own.scores), len(other.scores)) == (31, 32)
    assert max(own.scores) < 0.999
    assert control_scores(synthetic, controls, [row], cosine=True).max() == pytest.approx(1, abs=1e-5)


def test_controls_are_half_the_rows_at_most_all_different_and_by_seed():
    synthetic = Synthetic(vectors(50))
    rows = row_controls(synthetic, cosine=False).rows.tolist()
    assert len(set(rows)) == len(rows) == 25
    assert row_controls(synthetic, cosine=False).rows.tolist() == rows
    assert row_controls(synthetic, cosine=False, seed=1).rows.tolist() != rows
    assert len(row_controls(Synthetic(vectors(300)), cosine=False).rows) == 128


def test_too_few_rows_or_controls_give_no_null():
    assert row_controls(Synthetic(vectors(2 * LEAST - 1)), cosine=True) is None
    assert row_controls(Synthetic(vectors(2 * LEAST)), cosine=True) is not None
    assert query_controls(Synthetic(vectors(5)), vectors(LEAST - 1), cosine=True) is None


@pytest.mark.parametrize("cosine", [False, True])
def test_generic_is_what_scores_high_whatever_is_asked(cosine):
    """All gradients share a direction, and one row is nothing else."""
    held = vectors(300)
    held[..., 0] += 3
    held[:, 7] = 0
    held[:, 7, 0] = 10
    synthetic = Synthetic(held)
    controls = row_controls(synthetic, cosine=cosine)
    found = nulls(synthetic, controls, list(range(300)), [0.0] * 300, cosine=cosine)
    assert found[7].generic
    assert sum(null.generic for null in found) <= 4, "a hundredth"


def test_what_scores_high_for_some_queries_alone_is_not_generic():
    held = vectors(300)
    rows = row_controls(Synthetic(held), cosine=False).rows.tolist()
    row = next(number for number in range(300) if number not in rows)
    held[:, rows[::2], 0] += 3  # half of the controls
    held[:, row] = 0
    held[:, row, 0] = 10
    synthetic = Synthetic(held)
    controls = row_controls(synthetic, cosine=False)
    (null,) = nulls(synthetic, controls, [row], [0.0], cosine=False)
    assert null.mean > controls.usual
    assert not null.generic


def test_what_never_varies_has_no_z():
    held = vectors(40)
    held[:, 3] = 0
    synthetic = Synthetic(held)
    (null,) = nulls(synthetic, row_controls(synthetic, cosine=True), [3], [0.0], cosine=True)
    assert (null.mean, null.z, null.percentile, null.generic) == (0, 0, 0, False)


# -- in a trace


@pytest.fixture(scope="module")
def built(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("nulls") / "index"
    return index(
        tiny_run,
        corpus_rows(40),
        out,
        checkpoints="all",
        projection="two_sided",
        width=4,
        codec="float32",
        progress=False,
    )


@pytest.fixture(scope="module")
def controls(tmp_path_factory):
    """A file of controls, none of which is a row."""
    return write_jsonl(tmp_path_factory.mktemp("nulls") / "controls.jsonl", corpus_rows(LEAST, first=50))


ASKED = ("5 and 3?", " yes, 12")


def by_id(hits):
    return {hit.id: hit.score for hit in hits}


def test_a_null_is_what_control_queries_score(built, controls):
    theirs = trace(built, queries=controls, controls=controls, top=40, null=False, exact=False)
    others = [by_id(theirs.of(number)) for number in range(LEAST)]
    for exact in (False, True):
        for hit in trace(built, *ASKED, controls=controls, top=40, exact=exact).of(0):
            expected = [scores[hit.id] for scores in others]
            assert hit.null.scores == pytest.approx(expected, rel=1e-3, abs=1e-4 * max(map(abs, expected)))
            own = hit.exact if exact else hit.score
            z = (own - statistics.fmean(expected)) / statistics.stdev(expected)
            assert hit.null.z == pytest.approx(z, rel=1e-2, abs=1e-3)


def test_a_specific_inner_product_is_less_the_mean_over_controls_of_the_querys_length(built):
    plain, found = (trace(built, *ASKED, method="dot", top=40, specific=specific) for specific in (False, True))
    model = built.model()
    sequence = SignedSequence(encode_query(*ASKED, model.tokenizer, kind="prompt"))
    norms = query_vectors(built, [[sequence]])[:, 0].norm(dim=1)
    scores = control_scores(built, row_controls(built, cosine=False), range(40), cosine=False, norms=norms)
    raw = by_id(plain.of(0))
    expected = {name: value - float(scores[int(name[4:])].mean()) for name, value in raw.items()}
    assert by_id(found.of(0)) == pytest.approx(expected, rel=1e-3, abs=1e-4 * max(map(abs, raw.values())))


@pytest.mark.parametrize("given", [False, True])
def test_a_specific_score_is_the_score_less_the_mean_over_the_controls(built, controls, given):
    chosen = {"top": 40, "controls": controls if given else None, "exact": False}
    plain, found = trace(built, *ASKED, **chosen), trace(built, *ASKED, specific=True, **chosen)
    if given:
        others = trace(built, queries=controls, **chosen, null=False)
        numbers = range(LEAST)
    else:  # the controls are rows, which a file of rows asks for
        others = trace(built, queries=corpus_rows(40), **chosen, null=False)
        numbers = row_controls(built, cosine=True).rows.tolist()
    scores = [by_id(others.of(number)) for number in numbers]
    raw = by_id(plain.of(0))
    expected = {name: raw[name] - statistics.fmean(each[name] for each in scores) for name in raw}
    for hits in (found.of(0), found.of(0, opposing=True)):
        assert by_id(hits) == pytest.approx(expected, rel=1e-3, abs=1e-4 * max(map(abs, raw.values())))
    assert [hit.id for hit in found.of(0)] == sorted(expected, key=expected.__getitem__, reverse=True)
    assert {hit.id: hit.null.z for hit in found.of(0)} == pytest.approx(
        {hit.id: hit.null.z for hit in plain.of(0)}, rel=1e-2, abs=1e-3
    )


def test_what_is_looked_at_closer_is_not_corrected(built):
    plain, found = (trace(built, *ASKED, tokens=True, specific=specific, top=3) for specific in (False, True))
    own = {hit.id: hit for hit in plain.hits}
    both = [hit for hit in found.hits if hit.id in own]
    assert both
    for hit in both:
        assert sum(hit.by_token) == pytest.approx(own[hit.id].score, rel=1e-3, abs=1e-4)
        assert hit.exact == pytest.approx(own[hit.id].exact, rel=1e-3, abs=1e-4)


def test_without_a_null_there_is_no_verdict(tiny_index):
    found = trace(tiny_index, *ASKED, top=2)
    assert found.settings["control queries"] == "none, for there are fewer than 32 rows"
    assert (found.verdicts, found.needed_z, [hit.null for hit in found.hits]) == ([], None, [None] * 4)
    assert found.notes == [f"no z and no verdict: {tiny_index} has fewer than 32 rows to draw control queries from. "
                           "Give some with --controls."]  # fmt: skip
    assert trace(tiny_index, *ASKED, top=2, null=False).notes == []
    with pytest.raises(SettingError, match=f"--specific needs at least {LEAST} control queries.*--controls"):
        trace(tiny_index, *ASKED, specific=True)


def test_a_file_gives_a_null_where_the_rows_are_too_few(tiny_index, controls):
    found = trace(tiny_index, *ASKED, top=2, controls=controls)
    assert len(found.verdicts) == 1
    assert all(len(hit.null.scores) == LEAST for hit in found.hits)


def test_too_few_controls_are_refused(built):
    with pytest.raises(SettingError, match=f"--controls: 3 queries; to say what chance reaches takes {LEAST} or more"):
        trace(built, *ASKED, controls=corpus_rows(3))


def test_open_prompts_of_controls_are_completed_as_the_query_is(built, monkeypatch):
    asked, real = [], own_answers.generate
    monkeypatch.setattr(
        own_answers,
        "generate",
        lambda *given, **how: asked.append((given[2], how["temperature"])) or real(*given, **how),
    )
    given = [{"prompt": row["prompt"]} for row in corpus_rows(LEAST)]
    trace(built, "5 and 3?", controls=given, top=1, max_new_tokens=3, temperature=0.5)
    assert asked == [(3, 0.5)] * 2, "once the query, once the controls"
    trace(built, "5 and 3?", controls=given, top=1, max_new_tokens=3, null=False)
    assert len(asked) == 3, "without a null nobody asks for them"


def test_controls_from_an_optimizers_view_are_asked_as_queries_are(built, monkeypatch):
    """This index' rows are plain gradients, so a trace that takes them for another view's must come to the same."""
    sizes, real = [], retrieval.query_vectors
    monkeypatch.setattr(
        retrieval,
        "query_vectors",
        lambda index, texts, **how: sizes.append(len(texts)) or real(index, texts, **how),
    )
    other = open_index(built.store.place.root)
    other.__dict__["space"] = replace(built.space, view="adam")
    found = trace(other, *ASKED, top=2)
    expected = trace(open_index(built.store.place.root), *ASKED, top=2, exact=False)
    drawn = levels.MEANINGLESS
    assert sizes == [1 + 20 + drawn, 1 + drawn], "the query, half of the rows, what is meaningless"
    assert found.needed_z == pytest.approx(expected.needed_z, rel=1e-3)
    for one, same in zip(found.hits, expected.hits, strict=True):
        assert (one.id, one.null.z) == (same.id, pytest.approx(same.null.z, rel=1e-3, abs=1e-3))


@pytest.mark.parametrize("closer", ["exact", "tokens"])
def test_an_optimizers_view_is_not_looked_at_closer(built, closer):
    other = open_index(built.store.place.root)
    other.__dict__["space"] = replace(built.space, view="adam")
    with pytest.raises(SettingError, match=rf"--{closer} takes gradients as they are.*\(--view adam\)\. Leave"):
        trace(other, *ASKED, **{closer: True})
