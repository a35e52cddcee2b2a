"""How deep a trace is re-ranked: the error of an index' scores, and the rows that it leaves in question."""

import json

import pytest
import torch

from conftest import corpus_rows
from whence import catalogue
from whence.gradients.flat_width import FLAT
from whence.indexing.build import index
from whence.indexing.codecs import codec
from whence.tracing import retrieval
from whence.tracing.depth import DEEPEST, SURE, Noise, depth, row_noise
from whence.tracing.pipeline import trace

ROWS, TOKENS = 40, 5
SHAPES = {"wide": (48, 64), "tall": (96, 32), "other": (48, 64), "last": (64, 64)}


def sequences(seed):
    """Inputs and slopes [rows tokens features] of layers, in which rows have some directions in common."""
    rng = torch.Generator().manual_seed(seed)

    def drawn(features):
        shared = torch.randn(1, TOKENS, features, generator=rng)
        return torch.randn(ROWS, TOKENS, features, generator=rng) + 0.5 * shared

    return {layer: (drawn(i), drawn(o)) for layer, (o, i) in SHAPES.items()}


@pytest.mark.parametrize("stored", ["onebit", "int8"])
@pytest.mark.parametrize("projection", FLAT)
def test_scores_of_a_flat_sketch_miss_the_exact_ones_by_the_noise(projection, stored):
    """Over pairs of rows and ten seeds: no bias, and a mean square that is what the noise says, to a fifth."""
    layers, k, errors = sequences(1), 4096, []
    whole = torch.cat([torch.einsum("bto,bti->boi", g, a).flatten(1) for a, g in layers.values()], 1)
    exact = whole @ whole.T
    assert 0.05 < float((exact / whole.norm(dim=1) / whole.norm(dim=1)[:, None]).mean()) < 0.3
    for seed in range(10):
        made = catalogue.projection(projection)(SHAPES, width=k, seed=seed)
        sketch = torch.zeros(ROWS, k)
        for layer, (a, g) in layers.items():
            sketch[:, made.columns(layer)] += made(a, g, layer=layer)
        encoded, scale = codec(stored).encode(sketch)
        norm = sketch.norm(dim=1)
        scale = codec(stored).unbiased(scale, norm, k)
        scores = sketch @ codec(stored).decode(encoded, scale, k).T
        spread = row_noise(norm, scale, codec(stored), k) * norm[:, None]
        errors.append(((scores - exact) / spread)[~torch.eye(ROWS, dtype=torch.bool)])
    standardised = torch.cat(errors)
    assert float(standardised.mean()) == pytest.approx(0, abs=0.15)
    assert 0.8 < float(standardised.square().mean().sqrt()) < 1.2


def test_other_sketches_do_not_say_their_noise(tiny_llama, tmp_path):
    opened = index(tiny_llama, corpus_rows(40), tmp_path / "i", projection="two_sided", width=4, progress=False)
    assert Noise.of(opened, [0, 1], cosine=True) is None
    found = trace(opened, "5 and 3?", " yes", top=3)
    (reranking,) = found.rerankings
    assert (reranking.helpful, reranking.opposing, reranking.sure) == (40, 40, None)


def test_the_exact_first_lie_within_the_depth_as_often_as_it_says():
    rng = torch.Generator().manual_seed(0)
    held = []
    for _ in range(200):
        true = torch.randn(300, generator=rng) * 0.05
        true[:5] += 0.2  # a few stand out, as the causes of an answer do
        deviation = 0.02
        scores = true + deviation * torch.randn(300, generator=rng)
        order = scores.argsort(descending=True)
        found = depth(scores[order], torch.full((300,), deviation), 10)
        place = {int(row): number for number, row in enumerate(order)}
        held.append(all(place[int(row)] < found.rows for row in true.topk(10).indices))
        assert found.rows <= DEEPEST and found.sure is not None
    assert sum(held) / len(held) >= SURE


def test_a_depth_is_no_larger_than_it_must_be():
    far = torch.tensor([0.9, 0.8, 0.7] + [0.1] * 97)
    assert depth(far, torch.full((100,), 0.01), 3).rows == 6, "twice as many as are shown"
    assert depth(far, torch.full((100,), 0.01), 3).sure == 1
    near = torch.linspace(0.31, 0.30, 300)
    found = depth(near, torch.full((300,), 0.1), 10)
    assert (found.rows, found.sure < 0.1) == (DEEPEST, True), "no more than can be afforded, and it says so"
    assert depth(near, torch.full((300,), 0.1), 10, rows=300).sure == 1
    assert depth(near, None, 80).rows == 160
    assert depth(far[:4], torch.full((4,), 0.1), 3).rows == 4
    assert depth(far[:0], torch.zeros(0), 3).rows == 0


def test_a_trace_is_reranked_unless_told_not_to(tiny_llama, tmp_path):
    opened = index(tiny_llama, corpus_rows(50), tmp_path / "index", progress=False)
    whole = index(tiny_llama, corpus_rows(50), tmp_path / "whole", projection="identity", codec="float32",
                  progress=False)  # fmt: skip
    asked = ("5 and 3?", " yes, 12")
    found, true = trace(opened, *asked, top=5), trace(whole, *asked, top=5)
    assert [hit.id for hit in found.hits] == [hit.id for hit in true.hits]
    assert [hit.exact for hit in found.hits] == pytest.approx([hit.score for hit in true.hits], rel=1e-3, abs=1e-5)
    assert (len(found.rerankings), true.rerankings) == (1, []), "whole gradients have nothing to be re-ranked by"
    coarse = trace(opened, *asked, top=5, exact=False)
    assert (coarse.rerankings, coarse.overlaps, coarse.hits[0].exact) == ([], [], None)


def test_noise_adds_up_over_checkpoints_and_follows_the_querys_length(tiny_run, tmp_path):
    opened = index(tiny_run, corpus_rows(6), tmp_path / "index", checkpoints="all", progress=False)
    shards = [opened.store.shard(checkpoint, 0) for checkpoint in range(2)]
    codec_of, k = opened.store.codec, opened.store.manifest.width
    lengths = torch.tensor([2.0, 3.0])
    for cosine in (True, False):
        expected = torch.zeros(6)
        for shard, weight, length in zip(shards, opened.weights, lengths.tolist(), strict=True):
            deviation = row_noise(shard.norm, shard.scale, codec_of, k)
            expected += weight * length * (deviation / shard.norm if cosine else deviation)
        found = Noise.of(opened, [4, 1, 5], cosine=cosine).for_query([5, 1, 4, 1], lengths)
        assert found.tolist() == pytest.approx(expected[[5, 1, 4, 1]].tolist())
    assert trace(opened, "5 and 3?", " yes", top=2).rerankings


def test_a_short_list_that_was_asked_for_says_how_sure_it_is(tiny_llama, tmp_path):
    """The rows below it are compared too, though they are not re-ranked."""
    opened = index(tiny_llama, corpus_rows(60), tmp_path / "index", width=64, progress=False)
    (short,) = trace(opened, "5 and 3?", " yes, 12", top=5, shortlist=10, null=False).rerankings
    (whole,) = trace(opened, "5 and 3?", " yes, 12", top=5, shortlist=60, null=False).rerankings
    assert (short.helpful, whole.helpful, whole.sure) == (10, 60, 1)
    assert short.sure < 0.9


def test_short_lists_of_many_queries_are_ranked_exactly_on_request(tiny_llama, tmp_path, monkeypatch):
    opened = index(tiny_llama, corpus_rows(20), tmp_path / "index", progress=False)
    monkeypatch.setattr(retrieval, "MOST_QUERIES", 2)
    asked = [{"prompt": f"{number}?", "completion": " yes"} for number in range(3)]
    assert len(trace(opened, queries=asked[:2], null=False).rerankings) == 2
    found = trace(opened, queries=asked, null=False)
    assert found.rerankings == [] and found.notes[0].startswith(
        "3 queries: their examples are ranked by the index alone"
    )
    exactly = trace(opened, queries=asked, null=False, exact=True)
    assert len(exactly.rerankings) == 3 and not exactly.notes


def test_the_answer_says_how_deep_and_how_sure(tiny_llama, tmp_path, printed):
    index(tiny_llama, corpus_rows(50), tmp_path / "index", progress=False)
    asked = ("trace", tmp_path / "index", "--prompt", "5 and 3?", "--completion", " yes", "--top", 3)
    code, out, _ = printed(*asked)
    text = " ".join(out.split())
    assert (
        code == 0
        and "Exact gradients ordered the index' first" in text
        and "these hold the exact first 3 with a probability of" in text
    )
    assert "ranked by exact scores" in text
    code, out, _ = printed(*asked, "--no-exact")
    assert code == 0 and "Exact gradients" not in out
    code, out, _ = printed(*asked, "--json")
    (reranking,) = json.loads(out)["rerankings"]
    assert reranking["helpful"] >= 6 and 0 <= reranking["sure"] <= 1
