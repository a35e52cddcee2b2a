"""Where a model is very sure, slopes of 16 bits are those of fp32, and those of fp32 have their digits."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import VOCABULARY, random_examples, tiny_model
from whence.corpus.tokens import Encoded, collate
from whence.gradients.capture import gradients, token_losses
from whence.gradients.exact import SignedSequence, query_gradient
from whence.gradients.ghost import head_scores, per_example_dot
from whence.gradients.hessian import LossDerivatives
from whence.gradients.objectives import cross_entropy, sure_losses
from whence.gradients.slope_scale import SlopeScale, scale_for
from whence.gradients.space import GradientSpace


def test_the_slope_of_a_sure_token_has_its_digits():
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40)
    logits[labels, labels] = torch.linspace(0, 60, 40)  # losses down to 1e-24
    expected = logits.double().softmax(1)
    is_label = F.one_hot(labels, 50).bool()
    expected[is_label] = -expected.masked_fill(is_label, 0.0).sum(1)
    _, slopes = cross_entropy(logits, labels, torch.full((40,), 0.5))
    torch.testing.assert_close(slopes.double() * 2, expected, rtol=1e-4, atol=0)
    by_autograd = logits.clone().requires_grad_()
    losses = sure_losses(by_autograd, labels)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=2e-7)
    (found,) = torch.autograd.grad(losses.sum(), by_autograd)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def sure():
    """A model in float16 and one in fp32 of the same weights, and examples: two that both are sure of, and two not."""
    half = tiny_model("llama")
    head = half.base.get_output_embeddings()
    with torch.no_grad():
        head.weight *= 60
    half.model.half()
    full = replace(half, model=copy.deepcopy(half.model).float())
    ids = torch.arange(VOCABULARY)[:, None]
    for _ in range(6):
        ids = torch.cat([ids, full.model(input_ids=ids).logits[:, -1:].argmax(2)], 1)
    rows = [Encoded(row, [False] * 6 + [True]) for row in ids.tolist()]
    surest = token_losses(full, collate(rows)).loss.argsort()[:2].tolist()
    examples = [rows[number] for number in surest]
    return half, full, examples + random_examples(2, seed=4)


def cosines(found, expected):
    return F.cosine_similarity(found.flatten(1), expected.flatten(1), eps=1e-30)


@pytest.mark.parametrize("objective", ["loss", "margin"])
def test_gradients_of_float16_are_those_of_fp32(sure, objective):
    half, full, examples = sure
    batch = collate(examples)
    found, losses = gradients(half, half.layers("*"), batch, objective=objective)
    expected, _ = gradients(full, full.layers("*"), batch, objective=objective)
    assert losses.loss[:2].max() < 1e-6
    for name in expected:
        of_values = (
            "v_proj" in name or "mlp" in name or "head" in name
        )  # of few tokens, queries and keys have next to none
        assert not of_values or cosines(found[name], expected[name]).min() > 0.98, name
        assert not of_values or torch.allclose(found[name].norm(dim=(1, 2)), expected[name].norm(dim=(1, 2)), rtol=0.1)


def test_a_query_of_float16_is_that_of_fp32(sure):
    half, full, examples = sure
    space = GradientSpace()
    pairs = [
        query_gradient(model, model.layers(), [SignedSequence(examples[0])], space, "loss")[
            "model.layers.1.mlp.up_proj"
        ]
        for model in (half, full)
    ]
    first, second = (some[0].g.flatten()[None] for some in pairs)
    assert second.abs().max() < 6e-8 and cosines(first, second).item() > 0.98


def test_a_weight_differences_products_are_those_of_fp32(sure):
    half, full, examples = sure
    rng = torch.Generator().manual_seed(1)
    names = ("embed_tokens", "layers.0.input_layernorm", "model.norm", "up_proj", "lm_head")
    direction = {
        name: torch.randn(weight.shape, generator=rng)
        for name, weight in full.model.named_parameters()
        if any(word in name for word in names)
    }
    found, expected = (per_example_dot(model, collate(examples), direction) for model in (half, full))
    for name, mine, right in zip(expected.parameters, found.dots, expected.dots, strict=True):
        assert torch.allclose(mine, right, rtol=0.2, atol=0.0), name


def test_scores_of_a_head_are_those_of_fp32(sure):
    half, full, examples = sure
    direction = torch.randn(full.base.get_output_embeddings().weight.shape, generator=torch.Generator().manual_seed(1))
    expected = head_scores(full, collate(examples), direction)[0]
    assert expected[:2].abs().max() < 1e-4
    torch.testing.assert_close(head_scores(half, collate(examples), direction)[0], expected, rtol=0.1, atol=0)


def test_derivatives_in_a_training_are_those_of_fp32(sure):
    half, full, examples = sure
    name, found = "model.layers.1.mlp.up_proj.weight", []
    for model in (half, full):
        weights = {name: model.model.get_parameter(name).requires_grad_()}
        along = {name: torch.ones(weights[name].shape)}
        found.append(LossDerivatives(model, weights, 2).derivatives(examples[:2], along))
        weights[name].requires_grad_(False)
    slopes, products = zip(*((each.gradient[name], each.hessian_product[name]) for each in found), strict=True)
    for mine, right in (slopes, products):
        assert right.abs().max() < 1e-4 and cosines(mine.flatten()[None], right.flatten()[None]).item() > 0.98


def test_only_float16_is_scaled(sure):
    half, full, _ = sure
    assert scale_for(half).is_needed and not scale_for(full).is_needed
    slopes = torch.ones(2, 3)
    scale = SlopeScale()
    assert scale.in_head(slopes) is slopes and scale.undone_in_head(slopes) is slopes and scale.undone(slopes) is slopes


def test_what_is_scaled_is_undone_by_example_whatever_its_shape():
    scale = SlopeScale(is_needed=True)
    slopes = torch.tensor([1e-9, 3.0])[:, None, None] * torch.ones(2, 3, 4)
    scaled = scale.in_decoder(slopes)
    assert torch.equal(scale.undone(scaled), slopes) and torch.equal(
        scale.undone(scaled.flatten(0, 1)), slopes.flatten(0, 1)
    )
    assert (scaled.abs().amax((1, 2)) >= 0.5).all() and (scaled.abs() < 1).all()
