"""Products with the Gauss-Newton matrix against explicit derivatives; conjugate gradients against a solved system."""

import pytest
import torch

from conftest import random_examples, tiny_model
from whence.models.loading import layer_shape
from whence.second_order.eigen import LayerCurvature, ekfac, ekfac_sums, kfac
from whence.second_order.factors import kfac_factors
from whence.second_order.gauss_newton import damped_solution, gauss_newton_product


def opened(architecture):
    model, rows = tiny_model("gpt2" if architecture == "tied" else architecture), random_examples(4, seed=3)
    layers = list(model.layers("*").items())
    return model, dict(layers[-1:] if architecture == "tied" else layers[:2]), rows


def explicit(model, layers, rows):
    """The matrix itself, from each logit's derivative by autograd [all weights, all weights]."""
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    total = 0.0
    with torch.enable_grad():
        for row in rows:
            logits = model.model(input_ids=torch.tensor([row.ids])).logits[0]
            for t in range(1, len(row.ids)):
                if row.supervised[t]:
                    p = logits[t - 1].detach().softmax(0).double()
                    jacobian = torch.stack(
                        [torch.cat([g.flatten() for g in torch.autograd.grad(z, weights, retain_graph=True)])
                         for z in logits[t - 1]]
                    ).double()  # fmt: skip
                    total = total + jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
    for weight in weights:
        weight.requires_grad_(False)
    return total / len(rows)


def as_stored(layer, matrix):
    return matrix if isinstance(layer, torch.nn.Linear) else matrix.T


def flat(direction):
    return torch.cat([matrix.flatten() for matrix in direction.values()]).double()


@pytest.mark.parametrize("architecture", ["llama", "lora", "gpt2", "tied"])  # a head whose weight embeds, too
def test_products_are_those_of_the_explicit_matrix(architecture):
    model, layers, rows = opened(architecture)
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(*layer_shape(layer), generator=generator) for name, layer in layers.items()}
    in_place = {name: as_stored(layers[name], matrix) for name, matrix in x.items()}
    expected = explicit(model, layers, rows) @ flat(in_place)
    for tokens in (1, 4096):
        product = gauss_newton_product(model, layers, rows, x, tokens_per_batch=tokens)
        found = flat({name: as_stored(layers[name], matrix) for name, matrix in product.items()})
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_drawn_labels_have_it_for_their_mean():
    """The diagonal of the Fisher matrix over many draws, which EK-FAC's sums are in the standard basis."""
    model, layers, rows = opened("llama")
    name, layer = next(iter(layers.items()))
    o, i = layer_shape(layer)
    plain = {name: LayerCurvature(torch.eye(i), torch.eye(o), torch.zeros(o, i))}
    draws = [ekfac_sums(model, {name: layer}, plain, rows, seed=seed)[name] / len(rows) for seed in range(400)]
    expected = explicit(model, {name: layer}, rows).diagonal().view(o, i)
    mean, error = torch.stack(draws).double().mean(0), torch.stack(draws).double().std(0) / 20
    assert ((mean - expected).abs() < 5 * error + 1e-9).double().mean() > 0.99


def test_conjugate_gradients_converge_to_the_damped_inverse():
    model, layers, rows = opened("llama")
    factors = kfac(kfac_factors(model, layers, rows))
    curvature = ekfac(factors, ekfac_sums(model, layers, factors, rows), len(rows))
    generator = torch.Generator().manual_seed(1)
    x = {name: torch.randn(*layer_shape(layer), generator=generator) for name, layer in layers.items()}

    def product(direction):
        return gauss_newton_product(model, layers, rows, direction, tokens_per_batch=4096)

    values = torch.cat([layer.eigenvalues.flatten() for layer in curvature.values()]).double()
    matrix = explicit(model, layers, rows)
    expected = torch.linalg.solve(matrix + values.mean() * torch.eye(len(matrix), dtype=torch.float64), flat(x))
    solutions = [flat(damped_solution(product, curvature, x, steps=steps, damping=1.0)) for steps in (0, 5, 60)]
    errors = [float((solution - expected).norm() / expected.norm()) for solution in solutions]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-2, errors
