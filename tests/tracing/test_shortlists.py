"""EK-FAC's order of what TRAK lists: as it would be of all rows, and with the z of the listing."""

import pytest
import torch
from small_views import each, query

from conftest import corpus_rows
from whence.indexing.build import index as build_index
from whence.indexing.opening import open_index
from whence.reports.trace_tables import stands_out, trace_answer
from whence.selection.scorers.ekfac import EKFAC
from whence.selection.views import IndexView
from whence.tracing.baselines import all_scores
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query, Sampling, encode_queries
from whence.tracing.retrieval import TraceSettings
from whence.tracing.shortlists import LISTED, list_length

ASKED = {"prompt": "5 and 3?", "completion": " yes, 12"}


@pytest.fixture(scope="module")
def indexed(tiny_llama, tmp_path_factory):
    rows = [row | {"id": f"row-{number}"} for number, row in enumerate(corpus_rows(60))]
    rows[7] = {"id": "nothing", "prompt": "a", "completion": "b", "label": False}
    return build_index(tiny_llama, rows, tmp_path_factory.mktemp("lists") / "index", progress=False).store.place.root


def scores_of(indexed, method):
    """All rows' scores for the question."""
    opened = open_index(indexed)
    encoded = encode_queries([Query(**ASKED)], opened.model(), kind=opened.layout, sampling=Sampling())
    return opened, all_scores(opened, encoded, method=method, objective="loss", seed=0)[0]


def ids_of(opened, numbers):
    return [row["id"] for row in opened.store.read_rows(numbers)]


def test_scores_of_lists_are_those_of_all_rows(indexed):
    view = IndexView(open_index(indexed))
    asked = each([query(corpus_rows(60)[place], view.model()) for place in (3, 11)])
    lists = [[4, 2, 30], [9]]
    expected = EKFAC(refine=1, sample=8)(view, asked)
    found = EKFAC(refine=1, sample=8).of_lists(view, asked, lists)
    for line, own, rows in zip(expected, found, lists, strict=True):
        torch.testing.assert_close(own, line[rows], rtol=1e-4, atol=1e-6 * float(line[line.isfinite()].abs().max()))


def test_a_list_of_all_rows_is_in_the_order_of_all_rows(indexed):
    opened, scores = scores_of(indexed, "ekfac")
    traced = trace(indexed, **ASKED, method="ekfac", top=5)
    order = scores.argsort(descending=True)[:59]  # one cannot be ranked
    assert [hit.id for hit in traced.of(0)] == ids_of(opened, order[:5].tolist())
    assert [hit.id for hit in traced.of(0, opposing=True)] == ids_of(opened, order.flip(0)[:5].tolist())
    assert [hit.score for hit in traced.of(0)] == pytest.approx(scores[order[:5]].tolist(), rel=1e-4)
    assert traced.settings["scored"] == "all 59 rows"
    assert all(hit.exact is None for hit in traced.hits)


def test_a_short_list_is_what_trak_has_first_and_last(indexed):
    opened, scores = scores_of(indexed, "ekfac")
    _, listing = scores_of(indexed, "trak")
    rankable = opened.store.rankable()
    order = rankable[listing[rankable].argsort(descending=True)].tolist()
    listed = {*order[:6], *order[-6:]}
    best = sorted(listed, key=lambda row: -float(scores[row]))
    traced = trace(indexed, **ASKED, method="ekfac", top=4, shortlist=6)
    assert [hit.id for hit in traced.of(0)] == ids_of(opened, best[:4])
    assert [hit.id for hit in traced.of(0, opposing=True)] == ids_of(opened, best[::-1][:4])
    assert traced.settings["scored"] == "the first 6 and the last 6 rows as trak ranks them by the index"


def test_z_and_verdict_are_those_of_the_listing(indexed):
    by_trak = trace(indexed, **ASKED, method="trak", top=59)
    traced = trace(indexed, **ASKED, method="ekfac", top=4, shortlist=6)
    z = {hit.id: hit.null.z for hit in by_trak.hits}
    own = {hit.id: hit.score for hit in by_trak.hits}
    for hit in traced.hits:
        assert hit.null.z == pytest.approx(z[hit.id], rel=1e-4)
        assert hit.null.score == pytest.approx(own[hit.id], rel=1e-4), "the histogram's mark is of its scores"
    same_top = trace(indexed, **ASKED, method="trak", top=4)
    assert traced.verdicts == same_top.verdicts
    assert traced.levels == same_top.levels
    assert not any("no z" in note for note in traced.notes)
    assert trace(indexed, **ASKED, method="ekfac", top=4, null=False).verdicts == []


def test_by_sketches_nothing_is_listed(indexed):
    traced = trace(indexed, **ASKED, method="ekfac", top=3, options={"sketched": "true"})
    assert "scored" not in traced.settings and not traced.verdicts
    assert any("no z and no verdict" in note for note in traced.notes)


def test_a_contrast_is_left_out_of_the_list_too(indexed):
    plain = trace(indexed, **ASKED, method="ekfac", top=4, shortlist=6)
    contrasted = trace(indexed, **ASKED, contrast=" no, 7", method="ekfac", top=4, shortlist=6)
    assert [(hit.id, hit.score, hit.null.z) for hit in contrasted.hits] == [
        (hit.id, pytest.approx(hit.score), pytest.approx(hit.null.z)) for hit in plain.hits
    ]
    assert contrasted.levels == plain.levels
    assert contrasted.answers[0].contrast == " no, 7"
    assert any("the contrast is left out" in note for note in contrasted.notes)


def test_the_last_sentence_and_the_verdict_are_of_one_z(indexed):
    """Whichever rows EK-FAC shows."""
    for number in range(6):
        traced = trace(indexed, prompt=f"{number} and 3?", completion=" yes, 12", method="ekfac", top=2, shortlist=6)
        is_above = traced.best_z[0] > traced.levels[0]
        assert stands_out(traced, 0) == is_above == (not traced.verdicts[0].startswith("Nothing"))
        assert f"{traced.best_z[0]:.1f}" in traced.verdicts[0]
        assert trace_answer(traced).startswith("Nothing") == (not is_above)


@pytest.mark.parametrize(
    ("rows", "queries", "shortlist", "passes", "expected"),
    [(10_000, 1, None, 1, LISTED), (400, 1, None, 1, 400), (401, 1, None, 1, LISTED), (10_000, 25, None, 1, 10_000),
     (10_000, 25, None, 25, LISTED), (300, 100, None, 2, 300), (10_000, 1, 50, 1, 50), (10_000, 1, 2, 1, 10),
     (5, 1, None, 1, 5), (10**6, 5_000, None, 1, LISTED)],
)  # fmt: skip
def test_all_rows_are_scored_where_the_lists_take_as_many_gradients(rows, queries, shortlist, passes, expected):
    assert list_length(TraceSettings(method="ekfac", shortlist=shortlist), rows, queries, passes) == expected
