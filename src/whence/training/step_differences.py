"""Derivatives of a training step's gradient along a direction, by differences: one more gradient, a short way along it.

With g the gradient of a step's loss L = sum_i w_i L_i at the weights theta (`step_derivatives`), and e small,

    H mu                                       = (g(theta + e mu) - g(theta)) / e + O(e)
    <gradient of row i's share of L, mu>       = (L_i(theta + e mu) - L_i(theta)) / e + O(e)

What the first order leaves out has one sign whatever the sign of mu (half of e times mu' H_i mu, for a row's share), so
that sums over steps, and means over questions, would gather it: steps of the training take e above and below 0 in turn.

The gradient at theta is known where the training was gone through again, so that a direction takes one gradient, as any
model computes it: no second derivative, and none of its memory. A double backward pass takes over twice that.

How long a step: rounding makes the gradient of fp32 uncertain by some 1.7e-6 of its length (base-6m and the demo's
model), which is divided by e; what the first order leaves out grows with e. Where a step changes the gradient by
`CHANGE` of its length, both are about a thousandth of H mu, on steps of both models whose own best lengths were .0003
and .03 of unit directions. So the length is kept from step to step, and mended as the last change says. (Changes from a
tenth of it to three times as much were tried: docs/results/evaluation.md.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from whence.training.step_derivatives import RecordedStep, RowLosses, StepSlope
from whence.training.update_rules import Tensors, put

CHANGE = 2.0
"""What a step along a direction should change of the gradient's length, in roots of the rounding unit: .0007 in fp32.
"""
FARTHEST = 3.0
"""A step that changes the gradient by so many times more or less than that is taken again, with another length."""
MOST_AT_ONCE = 100.0
"""By which factor a length is mended at most."""
TRIES = 4
SHORT, LONG = 1e-5, 1e-2
"""Lengths of the first step, and of the longest, in lengths of the weights."""
LARGEST_ERROR = 0.05
"""How far differences may be from second derivatives, in the length of those, to be taken in place of them."""
ROWS_LOOKED_AT = 2
"""Rows of a step for which that is looked at."""


@dataclass
class DifferencedStep:
    """A step whose gradient is known, to be differentiated along directions."""

    losses: RowLosses
    """The model, with the weights before the step."""
    passes: Sequence[Sequence[int]]
    slope: StepSlope
    """The step's gradient, and its rows' losses."""
    lengths: list[float]
    """How long a step along each direction is, 0 where it is not known yet; mended in place."""
    is_back: bool = False
    """Whether e is below 0."""

    def derivatives(self, along: Tensors) -> tuple[Tensors, Tensor]:
        """Derivatives of <gradient, mu> for each of q directions mu.

        Args:
            along: The directions [q ...].

        Returns:
            By the weights [q ...]; and by the rows' w [q b], rows in the order of the passes.
        """
        by_weights = {name: torch.empty_like(each) for name, each in along.items()}
        by_rows = torch.zeros(len(self.lengths), len(self.slope.shares), dtype=torch.float64)
        here = {name: weight.detach().clone() for name, weight in self.losses.weights.items()}
        try:
            for k in range(len(self.lengths)):
                found = self._along(k, {name: mu[k] for name, mu in along.items()}, here)
                for name, total in by_weights.items():
                    total[k] = found.gradient[name]
                by_rows[k] = found.shares
        finally:
            put(here, self.losses.weights)
        return by_weights, by_rows

    def _along(self, k: int, direction: Tensors, here: Tensors) -> StepSlope:
        """How gradient and shares change along a direction."""
        g, norm, whole = self.slope.gradient, _length(direction), _length(here)
        steepness, whole = _length(g), whole or 1.0
        if not norm or not math.isfinite(norm):
            nothing = 0 * norm  # or no number
            return StepSlope({name: torch.full_like(each, nothing) for name, each in g.items()},
                             torch.full_like(self.slope.shares, nothing))  # fmt: skip
        aim = CHANGE * torch.finfo(next(iter(g.values())).dtype).eps ** 0.5
        length, tries = self.lengths[k] or SHORT * whole, 1
        while True:
            by = 2.0 ** round(math.log2(length / norm))  # a norm's last bit, which is memory's, changes no step
            length, by = by * norm, -by if self.is_back else by
            self._move(here, direction, by)
            there = self.losses.slope(self.passes)
            change = {name: there.gradient[name] - each for name, each in g.items()}
            factor = _factor(_length(change) / steepness, aim) if steepness else 1.0
            is_fit = 1 / FARTHEST <= factor <= FARTHEST or (factor > 1 and length >= LONG * whole / 2)
            if is_fit or tries == TRIES:
                break
            length, tries = min(length * factor, LONG * whole), tries + 1
        self.lengths[k] = min(length * factor, LONG * whole)
        return StepSlope(
            {name: each.mul_(1 / by) for name, each in change.items()}, (there.shares - self.slope.shares) / by
        )

    @torch.no_grad()
    def _move(self, here: Tensors, direction: Tensors, by: float) -> None:
        for name, weight in self.losses.weights.items():
            torch.add(here[name], direction[name], alpha=by, out=weight.data)


def error_of_differences(losses: RowLosses, rows: Sequence[int], along: Tensors, length: float = 0.0) -> float:
    """How far differences are from second derivatives, for a few rows and the first of some directions.

    The step along it has a length that fits these rows, which may be another than that of the whole step.

    Args:
        losses: The model.
        rows: Rows of a step, of which `ROWS_LOOKED_AT` are taken.
        along: The directions [q ...].
        length: How long a step along the first is; 0 where it is not known yet.

    Returns:
        Length of the difference between both Hessian's products, in the length of that by second derivatives, or the
        same of the rows' shares, whichever is larger; 1 where it is more, or no number.
    """
    passes, first = [rows[:ROWS_LOOKED_AT]], {name: mu[:1] for name, mu in along.items()}
    exact, exact_shares = RecordedStep(losses, passes).derivatives(first)
    found, shares = DifferencedStep(losses, passes, losses.slope(passes), [length]).derivatives(first)
    pairs = [({name: found[name] - each for name, each in exact.items()}, exact),
             ({"": shares - exact_shares.double().cpu()}, {"": exact_shares})]  # fmt: skip
    errors = [_length(apart) / (_length(whole) or 1.0) for apart, whole in pairs]
    return max(errors) if all(error < 1 for error in errors) else 1.0


def _factor(change: float, aim: float) -> float:
    """By what to mend a length whose change of the gradient was so large; it may be no number, as far away."""
    if not change <= aim * MOST_AT_ONCE:
        return 1 / MOST_AT_ONCE
    return min(aim / change, MOST_AT_ONCE) if change else MOST_AT_ONCE


def _length(tensors: Tensors) -> float:
    return float(get_total_norm(list(tensors.values())))
