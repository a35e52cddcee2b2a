"""Curvature against slow sums over tokens and rows by autograd, closed forms, and explicit inverses."""

import itertools

import pytest
import torch

from conftest import random_examples, tiny_model
from whence.corpus.tokens import collate
from whence.gradients.capture import gradients
from whence.models.loading import layer_shape
from whence.second_order.eigen import LayerCurvature, ekfac, ekfac_sums, kfac
from whence.second_order.factors import kfac_factors, positions_with_slope
from whence.second_order.fisher import DrawnLabels, uniforms_of

ARCHITECTURES = ["llama", "gpt2", "lora"]


def opened(architecture):
    model = tiny_model(architecture)
    return model, model.layers(None), random_examples(5, seed=3)


def drawn(model, rows, seed=0):
    """Rows whose supervised tokens are predicted as drawn: label by token, by a loop."""
    labels = []
    for row in rows:
        logits = model.model(input_ids=torch.tensor([row.ids])).logits[0].double().softmax(1)
        uniforms, found = iter(uniforms_of([row], seed).tolist()), {}
        for t in range(1, len(row.ids)):
            if row.supervised[t]:
                u, sums = next(uniforms), itertools.accumulate(logits[t - 1].tolist())
                found[t] = next((token for token, reached in enumerate(sums) if reached > u), 0)
        labels.append(found)
    return labels


def by_token(model, layers, rows, labels):
    """(a_t, g_t) of every position of every row and layer, by autograd with hooks of the test's own."""
    out = []
    for row, chosen in zip(rows, labels, strict=True):
        held, hooks = {}, []
        for name, layer in layers.items():

            def hook(module, args, result, name=name, held=held):
                result.requires_grad_()
                result.retain_grad()
                held[name] = args[0].detach()[0], result

            hooks.append(layer.register_forward_hook(hook))
        with torch.enable_grad():
            logits = model.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(1)
            (-sum(logits[t - 1, token] for t, token in chosen.items())).backward()
        for hook in hooks:
            hook.remove()
        out.append({name: (a, result.grad[0]) for name, (a, result) in held.items()})
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("is_empirical", [False, True])
def test_factors_and_eigenvalues_are_those_of_a_loop(architecture, is_empirical):
    model, layers, rows = opened(architecture)
    labels = drawn(model, rows)
    if is_empirical:
        labels = [{t: row.ids[t] for t in range(1, len(row.ids)) if row.supervised[t]} for row in rows]
    pairs = by_token(model, layers, rows, labels)
    factors = kfac_factors(model, layers, rows, is_empirical=is_empirical)
    curvature = kfac(factors)
    sums = ekfac_sums(model, layers, curvature, rows, is_empirical=is_empirical)
    for name in layers:
        a, g = (torch.cat([of_row[name][side] for of_row in pairs]) for side in (0, 1))
        has_slope = torch.cat([positions_with_slope(of_row[name][1][None])[0] for of_row in pairs])
        a, g = a[has_slope], g[has_slope]
        assert factors[name].positions == len(a) and factors[name].rows == 5
        torch.testing.assert_close(factors[name].inputs, a.T @ a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(factors[name].slopes, g.T @ g, rtol=1e-3, atol=1e-7)
        layer = curvature[name]
        squares = sum(
            (layer.slopes.T @ (of_row[name][1].T @ of_row[name][0]) @ layer.inputs).square() for of_row in pairs
        )
        torch.testing.assert_close(sums[name], squares, rtol=1e-3, atol=float(squares.max()) * 1e-5)


def test_of_a_tied_head_both_uses_count():
    """Its weight embeds, too: EK-FAC's sums are of the whole derivative by it."""
    model, rows = tiny_model("gpt2"), random_examples(5, seed=3)
    name, head = list(model.layers("*").items())[-1]
    assert head.weight is model.model.get_input_embeddings().weight
    curvature = kfac(kfac_factors(model, {name: head}, rows))
    expected, layer = 0.0, curvature[name]
    for row, labels in zip(rows, drawn(model, rows), strict=True):
        with torch.enable_grad():
            weight = head.weight.requires_grad_()
            logits = model.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(1)
            (slope,) = torch.autograd.grad(-sum(logits[t - 1, token] for t, token in labels.items()), weight)
        expected = expected + (layer.slopes.T @ slope @ layer.inputs).square()
    found = ekfac_sums(model, {name: head}, curvature, rows)[name]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=float(expected.max()) * 1e-5)


def test_neither_batches_nor_parts_change_the_factors():
    model, layers, rows = opened("llama")
    whole = kfac_factors(model, layers, rows)
    single = kfac_factors(model, layers, rows, tokens_per_batch=1)
    first, rest = (kfac_factors(model, layers, part) for part in (rows[:2], rows[2:]))
    for name, expected in whole.items():
        for found in (single[name], first[name] + rest[name]):
            torch.testing.assert_close(found.inputs, expected.inputs, rtol=1e-4, atol=1e-5)
            largest = float(expected.slopes.abs().max())
            torch.testing.assert_close(found.slopes, expected.slopes, rtol=1e-4, atol=1e-5 * largest)
            assert (found.positions, found.rows) == (expected.positions, expected.rows)


def test_draws_have_the_models_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, 4)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, slopes = DrawnLabels(uniforms)(logits, torch.zeros(20_000, dtype=torch.long), torch.ones(20_000))
    p = logits[0].softmax(0)
    labels = (slopes < 0).nonzero()[:, 1]
    torch.testing.assert_close(torch.bincount(labels, minlength=4) / 20_000, p, atol=0.01, rtol=0)
    fisher = (slopes.T @ slopes) / 20_000  # closed form: E[(p - onehot)(p - onehot)^T] = diag(p) - p p^T
    torch.testing.assert_close(fisher, p.diag() - torch.outer(p, p), atol=0.01, rtol=0)


def test_powers_are_those_of_the_explicit_matrix():
    model, layers, rows = opened("llama")
    curvature = kfac(kfac_factors(model, layers, rows))
    found = ekfac(curvature, ekfac_sums(model, layers, curvature, rows), len(rows))
    for kind in (curvature, found):
        name, layer = next(iter(kind.items()))
        o, i = layer_shape(layers[name])
        basis = torch.kron(layer.slopes, layer.inputs).double()  # of row-major vec
        formed = basis @ layer.eigenvalues.double().flatten().diag() @ basis.T
        damped = formed + 0.1 * layer.eigenvalues.double().mean() * torch.eye(o * i, dtype=torch.float64)
        query = torch.randn(2, o, i, generator=torch.Generator().manual_seed(2))
        expected = torch.linalg.solve(damped, query.double().flatten(1).T).T.view(2, o, i)
        torch.testing.assert_close(
            layer.power(query, -1.0).double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )
        twice = layer.power(layer.power(query, -0.5), -0.5)
        torch.testing.assert_close(twice, layer.power(query, -1.0), rtol=1e-3, atol=1e-3 * float(twice.abs().max()))
        torch.testing.assert_close(layer.power(layer.power(query, 1.0), -1.0), query, rtol=1e-3, atol=1e-3)


def test_a_layer_without_curvature_gives_nothing():
    layer = LayerCurvature(torch.eye(3), torch.eye(2), torch.zeros(2, 3))
    matrices = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    for exponent in (-1.0, -0.5, 1.0):
        assert torch.equal(layer.power(matrices, exponent), torch.zeros(2, 2, 3))


def test_ekfac_is_the_fisher_where_rows_gradients_are_orthogonal_in_its_basis():
    """Rows of one position with axis-aligned inputs and slopes: K-FAC's independence fails, EK-FAC is exact."""
    inputs = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]])
    slopes = torch.tensor([[1.0, 0], [0, 2], [3, 0]])
    per_row = torch.stack([torch.outer(g, a) for g, a in zip(slopes, inputs, strict=True)])
    fisher = torch.einsum("nx,ny->xy", per_row.flatten(1), per_row.flatten(1)) / 3
    layer = LayerCurvature(torch.eye(3), torch.eye(2), per_row.square().mean(0))
    query = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.power(query, 1.0, damping=0.0).flatten(), fisher @ query.flatten())


def test_the_gradient_under_drawn_labels_is_the_scores_one():
    model, layers, rows = opened("llama")
    batch = collate(rows[:1])
    own, _ = gradients(model, layers, batch, reduction="sum")
    assert all(gradient.isfinite().all() for gradient in own.values())
    assert torch.equal(uniforms_of(rows[3:4], 0), uniforms_of([rows[1], rows[3]], 0)[-sum(rows[3].supervised[1:]) :])
    assert not torch.equal(uniforms_of(rows[3:4], 0), uniforms_of(rows[3:4], 1))
