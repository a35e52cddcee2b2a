"""Exact scores and token matrices equal those of gradients taken one at a time by plain autograd."""

import pytest
import torch

from conftest import random_examples, tiny_model
from whence import exact
from whence.exact import Part
from whence.gradients import gradients
from whence.interfaces import GradientSpace
from whence.tokens import Encoded, collate

BUDGET = 40  # tokens of a pass: several batches
LAYERS = [None, "*"]


def whole(loaded, layers, example, *, reduction="mean", objective="loss"):
    """One example's gradient by layer."""
    return gradients(loaded, layers, collate([example]), reduction=reduction, objective=objective)[0]


def of_query(loaded, layers, parts, **options):
    return {
        name: sum(part.sign * whole(loaded, layers, part.encoded, **options)[name] for part in parts) for name in layers
    }


def score(query, example, *, normalise="none", cosine=False):
    """By definition, in double precision, layer by layer."""
    pairs = [(query[name].double(), example[name].double()) for name in query]
    if normalise == "layer":
        unit = lambda x: x / x.norm() if x.norm() > 0 else x  # noqa: E731
        pairs = [(unit(x), unit(y)) for x, y in pairs]
    total = sum(float((x * y).sum()) for x, y in pairs)
    norms = [sum(float(side.square().sum()) for side in sides) ** 0.5 for sides in zip(*pairs, strict=True)]
    return total / (norms[0] * norms[1]) if cosine else total


def alone(example, place):
    """An example of which one token is supervised."""
    return Encoded(example.ids, [number == place for number in range(len(example.ids))])


@pytest.fixture(scope="module", params=["llama", "gpt2", "lora"])  # linear, Conv1D with tied head, adapters
def loaded(request):
    return tiny_model(request.param)


def query_parts(contrast):
    parts = [Part(example) for example in random_examples(2, seed=5)]
    return [parts[0], Part(parts[1].encoded, sign=-1.0)] if contrast else parts[:1]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("normalise", ["none", "layer"])
@pytest.mark.parametrize("cosine", [False, True])
def test_scores_are_inner_products_of_whole_gradients(loaded, layers, contrast, normalise, cosine):
    if loaded.has_adapter and layers:
        pytest.skip("an adapter has no output head of its own")
    traced, parts, rows = loaded.layers(layers), query_parts(contrast), random_examples(7, seed=6)
    query = of_query(loaded, traced, parts)
    held = exact.held_whole(loaded, traced, parts, GradientSpace(), "loss")
    inner = exact.inner(loaded, traced, held, rows, reduction="mean", tokens_per_batch=BUDGET)
    found = inner.scores(normalise=normalise, cosine=cosine)
    true = [score(query, whole(loaded, traced, row), normalise=normalise, cosine=cosine) for row in rows]
    assert found.tolist() == pytest.approx(true, rel=1e-3, abs=1e-4 * max(map(abs, true)))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("objective", ["loss", "margin"])
@pytest.mark.parametrize("normalise", ["none", "layer"])
def test_scores_of_a_corpus_are_the_same(loaded, layers, reduction, objective, normalise):
    if loaded.has_adapter and layers:
        pytest.skip("an adapter has no output head of its own")
    traced, rows = loaded.layers(layers), [*random_examples(5, seed=7), Encoded([1, 2], [False, False])]
    queries = [query_parts(False), query_parts(True)]
    space = GradientSpace(reduction=reduction, normalise=normalise)
    for cosine in (False, True):
        found = exact.corpus_scores(
            loaded, traced, queries, rows, space, cosine=cosine, objective=objective, tokens_per_batch=BUDGET
        )
        assert (found[:, -1] == -torch.inf).all(), "a row that supervises nothing has no score"
        for number, parts in enumerate(queries):
            query = of_query(loaded, traced, parts, reduction=reduction, objective=objective)
            true = [
                score(query, whole(loaded, traced, row, reduction=reduction), normalise=normalise, cosine=cosine)
                for row in rows[:-1]
            ]
            assert found[number, :-1].tolist() == pytest.approx(true, rel=1e-3, abs=1e-4 * max(map(abs, true)))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("basis", exact.BASES)
def test_token_matrices_are_inner_products_of_single_tokens(loaded, layers, contrast, basis, monkeypatch):
    """Rows by their own gradients; columns of `loss` by theirs; and everything sums to the exact score."""
    if loaded.has_adapter and layers:
        pytest.skip("an adapter has no output head of its own")
    monkeypatch.setattr(exact, "PRODUCT_ENTRIES", 64)  # several pieces
    traced, parts, rows = loaded.layers(layers), query_parts(contrast), random_examples(4, seed=8)
    tokens = exact.tokens_of(parts, "mean")
    held = exact.held_whole(loaded, traced, parts, GradientSpace(), "loss")
    inner = exact.inner(loaded, traced, held, rows, reduction="mean", tokens_per_batch=BUDGET)
    factors = inner.factors(normalise="none", cosine=False)
    matrices = [torch.zeros(len(tokens), len(row.ids) if basis == "position" else row.targets) for row in rows]
    for group in exact.each_group_of_tokens(parts, tokens, traced):
        some = [tokens[number] for number in group]
        examples, weights = exact.token_rows(parts, some), [token.weight for token in some]
        pairs = exact.held_tokens(loaded, traced, examples, weights, objective="loss", tokens_per_batch=BUDGET)
        found = exact.token_products(
            loaded, traced, pairs, len(some), rows, factors, basis=basis, reduction="mean", tokens_per_batch=BUDGET
        )
        for matrix, part in zip(matrices, found, strict=True):
            matrix[group] += part
    scores = inner.scores(normalise="none", cosine=False)
    size = float(scores.abs().max())
    for row, matrix, total in zip(rows, matrices, scores, strict=True):
        assert float(matrix.sum()) == pytest.approx(float(total), rel=1e-3, abs=1e-4 * size)
        example = whole(loaded, traced, row)
        for number, token in enumerate(tokens):
            one = whole(loaded, traced, alone(parts[token.part].encoded, token.place), reduction="sum")
            query = {name: token.weight * gradient for name, gradient in one.items()}
            assert float(matrix[number].sum()) == pytest.approx(score(query, example), rel=1e-3, abs=1e-4 * size)
            if basis == "loss":
                places = [place for place, is_target in enumerate(row.supervised) if is_target]
                own = [whole(loaded, traced, alone(row, place), reduction="sum") for place in places]
                true = [score(query, gradient) / row.targets for gradient in own]
                assert matrix[number].tolist() == pytest.approx(true, rel=1e-3, abs=1e-4 * size)


def test_positions_are_told_apart_by_hand(loaded):
    """Basis `position`: the example's gradient, restricted to one position's pairs at a time."""
    if loaded.has_adapter:
        pytest.skip("the same for an adapter's layers")
    traced, (row,), parts = loaded.layers(), random_examples(1, seed=9), query_parts(False)
    held = exact.held_whole(loaded, traced, parts, GradientSpace(), "loss")
    factors = torch.ones(len(traced), 1)
    matrix = exact.token_products(
        loaded, traced, held, 1, [row], factors, basis="position", reduction="mean", tokens_per_batch=BUDGET
    )[0]
    query, captured = of_query(loaded, traced, parts), {}
    exact.backward(loaded, traced, collate([row]), lambda seen: captured.update({seen.layer: seen}))
    for place in range(len(row.ids)):
        true = sum(
            float(torch.einsum("o,oi,i->", seen.g[0, place], query[layer][0], seen.a[0, place]))
            for layer, seen in captured.items()
        )
        assert float(matrix[0, place]) == pytest.approx(true, rel=1e-3, abs=1e-5 * float(matrix.abs().max()) + 1e-9)


def test_groups_of_tokens_stay_within_the_budget_and_never_mix_parts(loaded, monkeypatch):
    traced, parts = loaded.layers(), query_parts(True)
    tokens = exact.tokens_of(parts, "sum")
    monkeypatch.setattr(exact, "HELD_BYTES", 1)
    assert list(exact.each_group_of_tokens(parts, tokens, traced)) == [[number] for number in range(len(tokens))]
    monkeypatch.setattr(exact, "HELD_BYTES", 2**31)
    groups = list(exact.each_group_of_tokens(parts, tokens, traced))
    assert [{tokens[number].part for number in group} for group in groups] == [{0}, {1}]
    assert sum(groups, []) == list(range(len(tokens)))


def test_the_margin_is_the_log_odds_and_does_not_vanish_where_the_model_is_sure(loaded):
    traced, (example,) = loaded.layers(), random_examples(1, seed=3)
    found, losses = gradients(loaded, traced, collate([example]), objective="margin", reduction="sum")
    places = [place for place, is_target in enumerate(example.supervised) if is_target]
    weights = [layer.weight.requires_grad_() for layer in traced.values()]
    with torch.enable_grad():
        logits = loaded.model(input_ids=torch.tensor([example.ids])).logits[0].double()
        odds = sum(
            logits[t - 1].log_softmax(0)[example.ids[t]] - torch.log1p(-logits[t - 1].softmax(0)[example.ids[t]])
            for t in places
        )
        true = torch.autograd.grad(-odds, weights, allow_unused=True)
    for weight in weights:
        weight.requires_grad_(False)
    largest = max(float(gradient.abs().max()) for gradient in true if gradient is not None)
    for name, gradient in zip(traced, true, strict=True):
        shaped = found[name][0] if gradient.shape == found[name][0].shape else found[name][0].T
        assert torch.allclose(shaped, gradient, rtol=1e-3, atol=1e-5 * largest)
    assert losses.nll[0, places].tolist() == pytest.approx(
        [-float(logits[t - 1].detach().log_softmax(0)[example.ids[t]]) for t in places], rel=1e-4
    )
