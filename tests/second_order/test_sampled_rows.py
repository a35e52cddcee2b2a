"""Which rows curvature is measured over: tokens for each input of the widest layer, by hand."""

import pytest
import torch
from small_views import each, query

from conftest import corpus_rows
from whence.indexing.build import index as build_index
from whence.indexing.opening import open_index
from whence.second_order import sampled_rows as module
from whence.second_order.dry_run import plan_curvature
from whence.second_order.pipeline import curvature
from whence.second_order.sampled_rows import rows_needed, sampled_rows
from whence.selection.scorers.ekfac import EKFAC
from whence.selection.views import IndexView

LAYERS = {"narrow": torch.nn.Linear(2, 50), "wide": torch.nn.Linear(5, 3)}
"""120 tokens: 24 for each of 5 inputs."""


@pytest.mark.parametrize(("tokens", "expected"), [([60, 59, 1, 9], 3), ([120, 1], 1), ([10, 10], 3), ([0, 119, 2], 3)])
def test_rows_are_counted_until_they_have_the_tokens(tokens, expected):
    assert rows_needed(torch.tensor(tokens), LAYERS) == expected


def test_so_many_are_drawn_without_bias():
    tokens = torch.full((100,), 10)
    draws = [sampled_rows(tokens, LAYERS, seed=seed) for seed in range(400)]
    assert {len(draw) for draw in draws} == {12}
    assert all(bool((draw.diff() > 0).all()) for draw in draws), "ascending"
    times = torch.cat(draws).bincount(minlength=100)
    assert 48 - 5 * 6.5 < int(times.min()) <= int(times.max()) < 48 + 5 * 6.5, "each with probability .12"
    assert torch.equal(sampled_rows(tokens, LAYERS, seed=3), draws[3])


def test_a_number_of_rows_is_taken_as_told():
    tokens = torch.full((100,), 10)
    assert len(sampled_rows(tokens, LAYERS, seed=0, rows=30)) == 30
    assert sampled_rows(tokens, LAYERS, seed=0, rows=200).tolist() == [*range(100)]


@pytest.fixture(scope="module")
def indexed(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("sampled") / "index"
    build_index(tiny_llama, corpus_rows(40), path, projection="identity", codec="float32", progress=False)
    return path


def test_all_who_measure_read_the_same_rows(indexed, tmp_path, monkeypatch):
    """The verb, its plan, and the method where it measures for a call of its own."""
    monkeypatch.setattr(module, "TOKENS_AN_INPUT", 2)
    opened = open_index(indexed)
    tokens = opened.store.supervised_tokens()
    assert tokens.tolist() == [row.supervised_count for row in IndexView(opened).encoded()]
    store = curvature(indexed, tmp_path / "out", progress=False)
    expected = sampled_rows(tokens, opened.layers(opened.model()), seed=0)
    assert (store.measured.rows, store.measured.of_rows) == (len(expected), 40)
    assert 1 < len(expected) < 40
    assert f"of {len(expected)} rows" in plan_curvature(indexed, tmp_path / "planned").about
    view = IndexView(opened)
    asked = each([query(corpus_rows(40)[3], view.model())])
    by_call, by_store = EKFAC()(view, asked), EKFAC(curvature=str(tmp_path / "out"))(view, asked)
    torch.testing.assert_close(by_call, by_store, rtol=1e-3, atol=1e-3 * float(by_store.abs().max()))
