"""Replay of linear models that are trained until they stand still, against closed forms of leaving one row out."""

from dataclasses import dataclass

import pytest
import torch

from whence.corpus.tokens import Encoded
from whence.gradients.exact import sequences_of
from whence.models.loading import LoadedModel
from whence.storage import Place
from whence.training.replay import replay
from whence.training.step_derivatives import RowLosses
from whence.training.step_log import Optimizer, StepLog
from whence.training.step_log import Step as OneStep
from whence.training.update_rules import State

N, D, DECAY, STEPS = 12, 3, 0.2, 400


def number_of(point):
    """The target of a point."""
    return [sequences_of(Encoded([point], [True]))]


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator, dtype=torch.float64), torch.randn(
        N, generator=generator, dtype=torch.float64
    )


class Linear(torch.nn.Module):
    """A linear model's weights."""

    def __init__(self, shape):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))


@dataclass(frozen=True)
class Ridge(RowLosses):
    """Squared errors, halved; a target is the prediction at a point."""

    x: torch.Tensor
    y: torch.Tensor
    points: list[torch.Tensor]

    def point(self, target):
        """A target is the number of a point, as a token."""
        return self.points[target[0][0].encoded.ids[0]]

    def sums(self, numbers):
        """Of rows."""
        return ((self.x[list(numbers)] @ self.weights["theta"]) - self.y[list(numbers)]).square() / 2

    def target_gradient(self, target):
        """Of a prediction."""
        point = self.point(target)
        return {"theta": point}, float(point @ self.weights["theta"].detach())


@dataclass(frozen=True)
class Softmax(Ridge):
    """Cross entropies of three classes; a target is the logit of class 0 at a point."""

    def sums(self, numbers):
        """Of rows."""
        logits = self.x[list(numbers)] @ self.weights["theta"]
        return torch.nn.functional.cross_entropy(logits, self.y[list(numbers)], reduction="none")

    def target_gradient(self, target):
        """Of a logit."""
        slope = torch.zeros(D, 3, dtype=torch.float64)
        slope[:, 0] = self.point(target)
        return {"theta": slope}, float((slope * self.weights["theta"].detach()).sum())


class Log(StepLog):
    """In memory."""

    def state(self, after, device="cpu"):
        """After so many steps."""
        return State({"theta": self.states[after].clone()}, {}, {})


def trained(kind, shape, x, y, points):
    """Full-batch gradient descent with decay, until it stands still; the losses' holder and the log of it."""
    net = Linear(shape)
    one = Encoded([0, 1], [False, True])  # as if each row had one supervised token
    losses = kind(LoadedModel(net, None, "linear"), {"theta": net.theta}, [one] * N, x, y, points)
    states, rate = [net.theta.detach().clone()], 0.3
    for _ in range(STEPS):
        slope = torch.autograd.grad(losses.sums(range(N)).sum() / N, net.theta)[0]
        with torch.no_grad():
            net.theta.sub_(rate * (slope + DECAY * net.theta))
        states.append(net.theta.detach().clone())
    assert (states[-1] - states[-2]).norm() < 1e-12
    log = Log(Place.at("."), Optimizer(name="sgd", decays={"theta": DECAY}),
              tuple(OneStep(rate, (tuple(range(N)),)) for _ in range(STEPS)), tuple(range(STEPS + 1)))  # fmt: skip
    object.__setattr__(log, "states", states)
    return losses, log


def minimum(x, y, kept):
    """Ridge's minimum with some rows, over the number of all."""
    a = x[kept].T @ x[kept] / N + DECAY * torch.eye(D, dtype=torch.float64)
    return torch.linalg.solve(a, x[kept].T @ y[kept] / N)


@pytest.mark.parametrize(("differences", "error"), [(False, 1e-8), (True, 1e-6)])
def test_ridge_regression_equals_leave_one_out(differences, error):
    """A prediction without row i is higher by score / (1 - leverage of i), exactly."""
    x, y = data()
    points = [x[0], torch.ones(D, dtype=torch.float64)]
    losses, log = trained(Ridge, (D,), x, y, points)
    found = replay(losses, log, [number_of(0), number_of(1)], differences=differences, progress=False)
    hat = x @ torch.linalg.inv(x.T @ x / N + DECAY * torch.eye(D, dtype=torch.float64)) @ x.T / N
    for q, point in enumerate(points):
        for row in range(N):
            without = minimum(x, y, [other for other in range(N) if other != row])
            change = point @ (without - minimum(x, y, list(range(N))))
            assert float(found.scores[q, row] / (1 - hat[row, row])) == pytest.approx(
                float(change), rel=error, abs=1e-10
            )


@pytest.mark.parametrize(("differences", "error"), [(False, 1e-7), (True, 1e-6)])
def test_softmax_regression_equals_the_closed_form_of_its_influence(differences, error):
    """-d f / d w_i = slope of f . H^-1 . slope of row i / n at the minimum, H with the decay."""
    x, _ = data(1)
    y = torch.arange(N) % 3
    point = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    losses, log = trained(Softmax, (D, 3), x, y, [point])
    found = replay(losses, log, [number_of(0)], differences=differences, progress=False)
    p = (x @ losses.weights["theta"].detach()).softmax(1)
    hessian = torch.zeros(3 * D, 3 * D, dtype=torch.float64)
    for row in range(N):
        within = torch.diag(p[row]) - torch.outer(p[row], p[row])
        hessian += torch.kron(torch.outer(x[row], x[row]), within) / N
    hessian += DECAY * torch.eye(3 * D, dtype=torch.float64)
    slope = losses.target_gradient(number_of(0))[0]["theta"].flatten()
    for row in range(N):
        errors = p[row] - torch.nn.functional.one_hot(y[row], 3)
        expected = slope @ torch.linalg.solve(hessian, torch.outer(x[row], errors).flatten()) / N
        assert float(found.scores[0, row]) == pytest.approx(float(expected), rel=error, abs=1e-10)
