"""The optimizer's step, and the way back through it: from derivatives by the state that it makes to those by its input.

A step of AdamW takes weights w, moments m and v, and a gradient g (clipped) to

    m' = b1 m + (1 - b1) g        v' = b2 v + (1 - b2) g^2
    w' = (1 - r d) w - r n        n = (m' / c1) / (s + eps)     s = sqrt(v' / c2)     c1 = 1 - b1^t, c2 = 1 - b2^t

at the t-th step, counted from 1, with learning rate r and decay d. Everything is elementwise.

Let (a, b, c) be the derivatives of some number by (w', m', v'). With

    M = b - a r / (c1 (s + eps))        V = c + a r (m' / c1) / (s + eps)^2 / (2 c2 s)

those by (w, m, v) at a fixed g are ((1 - r d) a, b1 M, b2 V), and that by g is (1 - b1) M + 2 (1 - b2) g V. Where v' is
0 there was no gradient yet: torch adds eps outside the root, whose derivative does not exist there. The weight's
entry has not moved, and its derivative by g is taken for 0.

*Clipping* to the norm C takes a raw gradient g to k g, k = C / (|g| + 1e-6), where that is below 1; a derivative mu by
the clipped one is k mu - k / ((|g| + 1e-6) |g|) <g, mu> g by the raw one.

SGD without momentum: w' = w - r (g + d w).

Sources: Loshchilov and Hutter 2019 (AdamW), as torch 2.13 computes it; Ilyas and Engstrom 2025, MAGIC (metagradients by
replay); Maclaurin et al. 2015 (a training run backward).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

Tensors = dict[str, Tensor]
"""One tensor for each trained weight, by its name, of its shape; derivatives of q numbers have q in front."""
CLIP_EPSILON = 1e-6
"""As torch adds it to a norm."""


class State(NamedTuple):
    """Weights and moments between two steps, or derivatives by them; plain SGD's moments are empty."""

    weights: Tensors
    first: Tensors
    second: Tensors


@torch.no_grad()
def put(values: Tensors, weights: Mapping[str, Tensor]) -> None:
    """Overwrite weights by values of the same names."""
    for name, weight in weights.items():
        weight.copy_(values[name])


class Moment(NamedTuple):
    """When a step was made."""

    number: int
    """From 1."""
    rate: float
    """Its learning rate."""


@runtime_checkable
class UpdateRule(Protocol):
    """How an optimizer steps. States are changed in place, to save memory."""

    def step(self, state: State, gradient: Tensors, moment: Moment) -> None:
        """Take a state to that after the step of a clipped gradient."""

    def pull_back(self, adjoint: State, after: State, gradient: Tensors, moment: Moment) -> Tensors:
        """Take derivatives by the state after a step to those by the state before it, at a fixed gradient.

        Args:
            adjoint: Derivatives of q numbers [q ...].
            after: Moments after the step (the weights are not read).
            gradient: The clipped gradient.
            moment: When.

        Returns:
            Derivatives by the clipped gradient [q ...].
        """
        ...


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """torch's AdamW, without amsgrad."""

    beta1: float
    beta2: float
    eps: float
    decays: Mapping[str, float] = field(default_factory=dict)
    """Weight decay by the weight's name; 0 for others."""

    @torch.no_grad()
    def step(self, state: State, gradient: Tensors, moment: Moment) -> None:
        """See `UpdateRule`."""
        c1, c2 = self._corrections(moment)
        for name, weight in state.weights.items():
            m, v, g = state.first[name], state.second[name], gradient[name]
            weight.mul_(1 - moment.rate * self.decays.get(name, 0.0))
            m.lerp_(g, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            weight.addcdiv_(m, (v.sqrt() / c2**0.5).add_(self.eps), value=-moment.rate / c1)

    @torch.no_grad()
    def pull_back(self, adjoint: State, after: State, gradient: Tensors, moment: Moment) -> Tensors:
        """See `UpdateRule`."""
        c1, c2 = self._corrections(moment)
        by_gradient = {}
        for name, a in adjoint.weights.items():
            m, v, g = after.first[name], after.second[name], gradient[name]
            by_m, by_v = adjoint.first[name], adjoint.second[name]
            root, has_none = v.sqrt() / c2**0.5, v == 0
            inverse = (root + self.eps).reciprocal_().masked_fill_(has_none, 0.0)
            by_m.addcmul_(a, inverse, value=-moment.rate / c1)
            slope = (m * inverse.square()).div_(root.masked_fill_(has_none, 1.0))
            by_v.addcmul_(a, slope, value=moment.rate / (2 * c1 * c2))
            by_gradient[name] = ((1 - self.beta1) * by_m).addcmul_(g, by_v, value=2 * (1 - self.beta2))
            by_m.mul_(self.beta1)
            by_v.mul_(self.beta2)
            a.mul_(1 - moment.rate * self.decays.get(name, 0.0))
        return by_gradient

    def _corrections(self, moment: Moment) -> tuple[float, float]:
        return 1 - self.beta1**moment.number, 1 - self.beta2**moment.number


@dataclass(frozen=True, kw_only=True)
class SGD:
    """torch's SGD without momentum, whose decay is a part of the gradient."""

    decays: Mapping[str, float] = field(default_factory=dict)
    """Weight decay by the weight's name; 0 for others."""

    @torch.no_grad()
    def step(self, state: State, gradient: Tensors, moment: Moment) -> None:
        """See `UpdateRule`."""
        for name, weight in state.weights.items():
            weight.sub_(gradient[name].add(weight, alpha=self.decays.get(name, 0.0)), alpha=moment.rate)

    @torch.no_grad()
    def pull_back(self, adjoint: State, after: State, gradient: Tensors, moment: Moment) -> Tensors:
        """See `UpdateRule`."""
        by_gradient = {}
        for name, a in adjoint.weights.items():
            by_gradient[name] = -moment.rate * a
            a.mul_(1 - moment.rate * self.decays.get(name, 0.0))
        return by_gradient


def clip(gradient: Tensors, most: float | None) -> tuple[Tensors, float]:
    """A gradient no longer than `most`, and its factor k."""
    length = float(get_total_norm(list(gradient.values())))
    factor = 1.0 if not most else min(1.0, most / (length + CLIP_EPSILON))
    return gradient if factor == 1 else {name: factor * g for name, g in gradient.items()}, factor


def pull_back_clip(by_clipped: Tensors, gradient: Tensors, factor: float) -> None:
    """Take derivatives [q ...] by the clipped gradient to those by the raw one, in place.

    Args:
        by_clipped: The derivatives.
        gradient: The raw gradient.
        factor: What `clip` gave for it.
    """
    if factor == 1:
        return
    length = float(get_total_norm(list(gradient.values())))
    along = torch.stack([(by_clipped[name] * g).flatten(1).sum(1) for name, g in gradient.items()]).sum(0)
    share = along * (factor / ((length + CLIP_EPSILON) * length))
    for name, g in gradient.items():
        by_clipped[name].mul_(factor).sub_(share.view(-1, *[1] * g.dim()) * g)
