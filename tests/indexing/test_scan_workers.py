"""A scan cut into stretches and merged is the scan of all rows, here and by workers."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import corpus_rows
from whence.indexing.build import index
from whence.indexing.scan import Ranking
from whence.indexing.scan_workers import MOST_JOBS, ScanWork, digest_of, merged, stretches
from whence.runner import Engine, workers_kept
from whence.selection.pipeline import select
from whence.tracing.pipeline import trace

BUILT = {"projection": "two_sided", "width": 8, "codec": "float32", "progress": False}


@pytest.fixture(scope="module")
def built(tiny_run, tmp_path_factory):
    """An index of five parts under two checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whence.indexing.ingest.ROWS_PER_SHARD", 16)
        return index(tiny_run, corpus_rows(75), tmp_path_factory.mktemp("scan") / "index", checkpoints="all", **BUILT)


@given(st.lists(st.integers(1, 9), max_size=300))
def test_stretches_cover_every_part_once(sizes):
    found = stretches(sizes)
    assert [number for each in found for number in range(each.first, each.end)] == [*range(len(sizes))]
    assert sum(each.rows for each in found) == sum(sizes) and len(found) <= MOST_JOBS


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 5), st.booleans())
def test_merged_rankings_are_those_of_all_rows(values, m, pieces, is_highest):
    sign, scores = 1 if is_highest else -1, torch.tensor(values, dtype=torch.float32)
    order = sorted(range(len(values)), key=lambda row: (-sign * values[row], row))[:m]
    parts = []
    for rows in torch.arange(len(values)).chunk(pieces):
        best = sorted(rows.tolist(), key=lambda row: (-sign * values[row], row))[:m]
        parts.append(Ranking(scores[best][None], torch.tensor(best)[None]))
    found = merged(parts[::-1], m, sign)
    assert found.rows.tolist() == [order] and torch.equal(found.scores[0], scores[order])


def test_unfilled_places_are_last():
    some = Ranking(torch.tensor([[5.0, -torch.inf], [1.0, 0.5]]), torch.tensor([[3, -1], [4, 2]]))
    more = Ranking(torch.tensor([[7.0], [-torch.inf]]), torch.tensor([[9], [-1]]))
    assert merged([some, more], 2, 1).rows.tolist() == [[9, 3], [4, 2]]
    assert merged([], 2, 1).rows.shape == (0, 0)


@pytest.mark.parametrize("cosine", [True, False])
def test_the_work_of_all_stretches_is_the_scan(built, cosine):
    store, weights = built.store, torch.tensor([0.3, 0.7])
    queries = torch.randn(2, 3, store.manifest.width, generator=torch.Generator().manual_seed(0))
    here = store.top_k(queries, weights, m=7, cosine=cosine)
    asked = store._scan_query(queries, weights, cosine)
    jobs = stretches([part.rows for part in store.manifest.parts])
    work = pickle.loads(pickle.dumps(ScanWork(store.place.root, digest_of(store), asked.queries, weights, cosine, 7)))
    found = [work(job, lambda *_: None) for job in jobs]
    for end, sign in ((0, 1), (1, -1)):
        there = merged([pair[end] for pair in found], 7, sign)
        assert torch.equal(there.rows, here[end].rows)
        torch.testing.assert_close(there.scores, here[end].scores)
    scores = ScanWork(store.place.root, digest_of(store), asked.queries, weights, cosine, None)
    blocks = [block for job in jobs for block in scores(job, lambda *_: None)]
    for (first, block), (other, expected) in zip(blocks, store.scores(queries, weights, cosine=cosine), strict=True):
        assert first == other
        torch.testing.assert_close(block, expected)


@pytest.mark.timeout(240)
def test_workers_of_ray_give_the_same_answers(built):
    pytest.importorskip("whence.runner.ray_engine", exc_type=ImportError)
    place, two = built.store.place.root, Engine("ray", workers=2)
    with workers_kept(two):
        traced = [trace(place, "5 and 3?", " yes, 12", top=3, engine=engine) for engine in ("local", two)]
        chosen = [select(place, corpus_rows(2, first=100), count=5, engine=engine) for engine in ("local", two)]
    hits, others = (each.hits for each in traced)
    assert [hit.id for hit in hits] == [hit.id for hit in others]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in others], abs=1e-6)
    assert traced[0].verdicts == traced[1].verdicts
    assert [row["id"] for row in chosen[0].rows] == [row["id"] for row in chosen[1].rows]


def test_workers_where_nothing_is_scanned_are_refused(tiny_corpus, command):
    words = ["select", tiny_corpus, "--method", "random", "--count", 2, "--engine", "ray"]
    code, _, complaint = command(*words)
    assert code == 2 and "--engine ray: workers scan an index, and there is none here" in complaint
