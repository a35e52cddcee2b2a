"""An example of two answers is the difference of the two, wherever its gradient goes."""

from dataclasses import replace

import pytest
import torch

from conftest import random_examples, tiny_model
from whence.corpus.tokens import Encoded, collate
from whence.gradients import exact
from whence.gradients.capture import gradients, sketch
from whence.gradients.exact import SignedSequence, layer_products, query_gradient, sequences_of
from whence.gradients.space import GradientSpace
from whence.gradients.tokenwise import factors_of, token_gradients, token_products, token_rows, tokens_of
from whence.indexing.vectors import IndexSettings, projection_for

SIDES = random_examples(6, 3)
ROWS = [replace(SIDES[0], rejected=SIDES[1]), SIDES[2], replace(SIDES[3], rejected=SIDES[4]), SIDES[5]]


def by_autograd(model, side, reduction):
    """Gradients of one sequence's loss by autograd alone, by the name of the parameter."""
    model.model.requires_grad_(True)
    logits = model.model(input_ids=torch.tensor([side.ids])).logits[0, :-1].log_softmax(-1)
    places = [t for t, on in enumerate(side.supervised) if on]
    losses = -torch.stack([logits[t - 1, side.ids[t]] for t in places])
    model.model.zero_grad()
    (losses.mean() if reduction == "mean" else losses.sum()).backward()
    out = {name: weight.grad.clone() for name, weight in model.model.named_parameters() if weight.grad is not None}
    model.model.requires_grad_(False).zero_grad()
    return out


def flat_difference(model, row, reduction):
    chosen, rejected = (by_autograd(model, side, reduction) for side in (row, row.rejected))
    return {name: chosen[f"{name}.weight"] - rejected[f"{name}.weight"] for name in model.layers(None)}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_contrast_is_the_difference_of_two_gradients_by_autograd(reduction):
    model = tiny_model("llama")
    by_layer, losses = gradients(model, model.layers(None), collate(ROWS), reduction=reduction)
    alone, of_sides = gradients(model, model.layers(None), collate(SIDES), reduction=reduction)
    expected = {number: flat_difference(model, ROWS[number], reduction) for number in (0, 2)}
    for name, blocks in by_layer.items():
        for number, by_name in expected.items():
            torch.testing.assert_close(blocks[number], by_name[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(blocks[[1, 3]], alone[name][[2, 5]], rtol=1e-4, atol=1e-5)
    loss = of_sides.loss
    torch.testing.assert_close(losses.loss, torch.stack([loss[0] - loss[1], loss[2], loss[3] - loss[4], loss[5]]))


def test_by_hand():
    """Two answers of one token: of the slopes p - e(token) of their losses only e(rejected) - e(chosen) is left."""
    model = tiny_model("llama")
    row = Encoded([1, 7], [False, True], rejected=Encoded([1, 9], [False, True]))
    head = model.layers("lm_head")
    states, _ = model.decode(torch.tensor([[1]]), torch.tensor([[True]]))
    expected = torch.zeros(61, 16)
    expected[7], expected[9] = -states[0, 0], states[0, 0]
    (gradient,) = gradients(model, head, collate([row]))[0].values()
    torch.testing.assert_close(gradient[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("architecture", "normalise"), [("lora", "none"), ("gemma", "layer")])  # a tied head
def test_sketches_norms_and_products_are_of_the_difference(architecture, normalise):
    model, pattern = tiny_model(architecture), "*" if architecture == "gemma" else None
    layers, space = (
        model.layers(pattern),
        GradientSpace(layers=pattern, normalise=normalise, projection="two_sided", width=4),
    )
    projection = projection_for(model, IndexSettings(space=space))
    rows, _ = sketch(model, layers, collate(ROWS), projection, normalise=normalise)
    blocks, _ = gradients(model, layers, collate(ROWS))
    units = {name: x / (x.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None] if normalise == "layer" else 1)
             for name, x in blocks.items()}  # fmt: skip
    expected = torch.zeros_like(rows)
    for name, x in units.items():
        expected[:, projection.columns(name)] += projection.flat(x, layer=name)
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-4)
    query = query_gradient(model, layers, sequences_of(ROWS[0]), space, "loss")
    torch.testing.assert_close(exact.query_sketch(query, projection, normalise), rows[0], rtol=1e-3, atol=1e-4)
    products = layer_products(model, layers, query, ROWS, reduction="mean", tokens_per_batch=64)
    squares = torch.stack([x.flatten(1).square().sum(1) for x in blocks.values()])
    torch.testing.assert_close(products.squares, squares, rtol=1e-3, atol=1e-4)
    flat = torch.cat([x.flatten(1) for x in units.values()], 1)
    scores = products.scores(normalise=normalise, cosine=False)
    torch.testing.assert_close(scores, flat @ flat[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("basis", ["position", "loss"])
def test_token_matrices_add_up_to_the_score(basis):
    model, question = tiny_model("gemma"), [SignedSequence(SIDES[5])]
    layers, space = model.layers(None), GradientSpace()
    whole, tokens = query_gradient(model, layers, question, space, "loss"), tokens_of(question, "mean")
    pairs = token_gradients(model, layers, token_rows(question, tokens), [token.weight for token in tokens],
                            objective="loss", tokens_per_batch=64)  # fmt: skip
    factors = factors_of(whole, normalise="none", cosine=True)
    options = {"basis": basis, "reduction": "mean", "tokens_per_batch": 64}
    matrices = token_products(model, layers, pairs, len(tokens), ROWS, factors, **options)
    products = layer_products(model, layers, whole, ROWS, reduction="mean", tokens_per_batch=64)
    scores = products.scores(normalise="none", cosine=True)
    torch.testing.assert_close(torch.stack([x.sum() for x in matrices]), scores, rtol=1e-3, atol=1e-5)
    for row, matrix in zip(ROWS, matrices, strict=True):
        sides = [sequence.encoded for sequence in sequences_of(row)]
        count = len if basis == "position" else sum
        assert matrix.shape[1] == sum(count(side.ids if count is len else side.supervised) for side in sides)
