"""The way back through an optimizer's step, against torch's own optimizers and autograd."""

import pytest
import torch

from whence.training.update_rules import SGD, AdamW, Moment, State, clip, pull_back_clip

DECAYS = {"matrix": 0.1}
RATE, NUMBER = 0.03, 4


def tensors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {"matrix": torch.randn(3, 4, generator=generator, dtype=dtype),
            "vector": torch.randn(5, generator=generator, dtype=dtype)}  # fmt: skip


def by_hand(state, gradient, rule):
    """The step as its formulas stand, for autograd."""
    out = State({}, {}, {})
    for name, w in state.weights.items():
        decay = rule.decays.get(name, 0.0)
        if isinstance(rule, SGD):
            out.weights[name] = w - RATE * (gradient[name] + decay * w)
            continue
        m = rule.beta1 * state.first[name] + (1 - rule.beta1) * gradient[name]
        v = rule.beta2 * state.second[name] + (1 - rule.beta2) * gradient[name] ** 2
        root = (v / (1 - rule.beta2**NUMBER)).sqrt()
        out.weights[name] = (1 - RATE * decay) * w - RATE * m / (1 - rule.beta1**NUMBER) / (root + rule.eps)
        out.first[name], out.second[name] = m, v
    return out


RULES = {
    "adamw": AdamW(beta1=0.9, beta2=0.99, eps=1e-3, decays=DECAYS),
    "adamw without a first moment": AdamW(beta1=0.0, beta2=0.9, eps=1e-8),
    "sgd": SGD(decays=DECAYS),
}


def state_for(rule):
    if isinstance(rule, SGD):
        return State(tensors(0), {}, {})
    return State(tensors(0), tensors(1), {name: each.square() for name, each in tensors(2).items()})


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_are_those_of_torch(name):
    rule, state = RULES[name], State(tensors(0), {}, {})
    if name == "adamw":
        state = State(tensors(0), *({key: torch.zeros_like(w) for key, w in tensors(0).items()} for _ in range(2)))
    weights = {key: w.clone().requires_grad_(True) for key, w in tensors(0).items()}
    groups = [{"params": [w], "weight_decay": DECAYS.get(key, 0.0)} for key, w in weights.items()]
    optimizer = (
        torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), eps=1e-3)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=RATE)
    )
    for number in range(1, 6):
        gradient = tensors(10 + number)
        for key, w in weights.items():
            w.grad = gradient[key].clone()
        optimizer.step()
        rule.step(state, gradient, Moment(number, RATE))
    for key, w in weights.items():
        torch.testing.assert_close(state.weights[key], w.detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_derivatives_before_a_step_equal_autograd(name):
    rule, state, gradient = RULES[name], state_for(RULES[name]), tensors(7)
    leaves = [{key: each.clone().requires_grad_(True) for key, each in part.items()} for part in state]
    g = {key: each.clone().requires_grad_(True) for key, each in gradient.items()}
    after = by_hand(State(*leaves), g, rule)
    adjoint = State(
        *({key: torch.randn(2, *w.shape, dtype=torch.float64) for key, w in part.items()} for part in state)
    )
    inputs = [each for part in (*leaves, g) for each in part.values()]
    expected = []
    for k in range(2):
        number = sum((adjoint[p][key][k] * each).sum() for p, part in enumerate(after) for key, each in part.items())
        expected.append(torch.autograd.grad(number, inputs, retain_graph=True))
    kept = State(*({key: each.detach() for key, each in part.items()} for part in after))
    by_gradient = rule.pull_back(adjoint, kept, gradient, Moment(NUMBER, RATE))
    found = [each for part in (*adjoint, by_gradient) for each in part.values()]
    for place, each in enumerate(found):
        torch.testing.assert_close(each, torch.stack([row[place] for row in expected]), rtol=1e-11, atol=1e-13)


def test_an_entry_that_never_had_a_gradient_has_no_derivative():
    """Torch adds eps outside the root: at 0 the step has no derivative by the gradient."""
    rule, zeros = RULES["adamw"], {"matrix": torch.zeros(2, 2)}
    adjoint = State({"matrix": torch.ones(1, 2, 2)}, *({"matrix": torch.zeros(1, 2, 2)} for _ in range(2)))
    by_gradient = rule.pull_back(adjoint, State(zeros, zeros, zeros), zeros, Moment(1, RATE))
    assert by_gradient["matrix"].eq(0).all()
    assert adjoint.weights["matrix"].allclose(torch.tensor(1 - RATE * 0.1))


@pytest.mark.parametrize("most", [None, 0.5, 100.0])
def test_clipping_is_that_of_torch_and_its_derivative_that_of_autograd(most):
    gradient = tensors(3)
    weights = [torch.zeros_like(each).requires_grad_(True) for each in gradient.values()]
    for weight, each in zip(weights, gradient.values(), strict=True):
        weight.grad = each.clone()
    if most:
        torch.nn.utils.clip_grad_norm_(weights, most)
    clipped, factor = clip(gradient, most)
    for weight, each in zip(weights, clipped.values(), strict=True):
        torch.testing.assert_close(each, weight.grad)
    leaves = {key: each.clone().requires_grad_(True) for key, each in gradient.items()}
    length = torch.cat([each.flatten() for each in leaves.values()]).norm()
    k = 1.0 if not most else torch.clamp(most / (length + 1e-6), max=1.0)
    mu = {key: each[None].clone() for key, each in tensors(4).items()}
    number = sum((mu[key][0] * k * each).sum() for key, each in leaves.items())
    expected = torch.autograd.grad(number, list(leaves.values()))
    pull_back_clip(mu, gradient, factor)
    for each, other in zip(mu.values(), expected, strict=True):
        torch.testing.assert_close(each[0], other)
