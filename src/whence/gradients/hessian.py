"""Gradient of rows' mean loss, and its Hessian's product with a direction, beside a training that goes on.

Of the weights that are trained, by name, in fp32. The model is put into evaluation mode meanwhile: no dropout, and none
of the training's random numbers are used up; gradients that the training holds are not touched.

The Hessian's product is a double backward pass, exact to rounding. (Forward over reverse takes a tenth less time and
agrees to 4e-7, but wants the model as a function of its weights; central differences take a seventh less and are good
to 2e-4 at best.) Attention then runs in torch's plain kernel, for the fused ones have no second derivative.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from whence.corpus.tokens import Encoded, collate
from whence.errors import ModelError
from whence.models.loading import LoadedModel

Gradient = dict[str, Tensor]
"""By parameter, of its shape, fp32."""
AGREEMENT, SMALL = 0.2, 1e-5
"""Of a second derivative with a finite difference over so small a part of the weights' length, in fp32."""


class Measured(NamedTuple):
    """Of some rows."""

    slope: Gradient
    """Of their mean loss."""
    product: Gradient | None
    """Of the Hessian with a direction, where one was given."""
    loss: float
    """Nats, mean over their supervised tokens."""


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Without dropout, and with gradients."""
    was_training = net.training
    net.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        net.train(was_training)


def norm(tensors: Sequence[Tensor]) -> float:
    """Of all of them together."""
    return float(get_total_norm(tensors)) if tensors else 0.0


def gradient(loss: Tensor, weights: Sequence[Tensor], *, twice: bool = False) -> list[Tensor]:
    """Of a loss; zeros where it does not reach. `twice`: it can be differentiated again."""
    return list(torch.autograd.grad(loss, weights, create_graph=twice, materialize_grads=True))


@dataclass(frozen=True)
class Slopes:
    """Measures rows' mean loss to first or second order about a model's weights as they stand."""

    model: LoadedModel
    weights: Mapping[str, Tensor]
    """Those that are trained."""
    rows_of_pass: int

    def measured(self, rows: Sequence[Encoded], along: Gradient | None = None) -> Measured:
        """Rows' mean loss over their supervised tokens, its gradient, and its Hessian's product with `along`."""
        weights = list(self.weights.values())
        slope = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        product, total, tokens = [part.clone() for part in slope], 0.0, sum(row.targets for row in rows)
        for start in range(0, len(rows), self.rows_of_pass):
            part = rows[start : start + self.rows_of_pass]
            with evaluating(self.model.model), nullcontext() if along is None else sdpa_kernel(SDPBackend.MATH):
                loss = self._loss(part) / tokens
                found = gradient(loss, weights, twice=along is not None)
                if along is not None:
                    _add(product, _products(found, weights, [along[name] for name in self.weights]))
            _add(slope, found)
            total += float(loss.detach())
        named = dict(zip(self.weights, slope, strict=True))
        return Measured(named, None if along is None else dict(zip(self.weights, product, strict=True)), total)

    def check_second_order(self, rows: Sequence[Encoded], along: Gradient) -> None:
        """See whether the Hessian's product with a direction is that of a finite difference.

        A function whose backward pass cannot be differentiated is left out of a second one without a word.

        Raises:
            ModelError: It is not, or some part of the model says itself that it has no second derivative.
        """
        try:
            product = self.measured(rows, along).product or {}
        except RuntimeError as error:
            if "derivative" not in str(error) and "differentiable" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise ModelError(f"{self.model.path} has no second derivative ({reason}). Use --in-run-order 1.") from None
        if any(weight.dtype != torch.float32 for weight in self.model.model.parameters()):
            return  # what 16 bits round is larger than such a difference
        expected = self.difference(rows, along)
        error = norm([product[name] - part for name, part in expected.items()]) / (norm([*expected.values()]) or 1.0)
        if not error <= AGREEMENT:
            raise ModelError(
                f"{self.model.path}: second derivatives are {error:.0%} off a finite difference, so some part of the "
                "model cannot be differentiated twice. Use --in-run-order 1."
            )

    @torch.no_grad()
    def difference(self, rows: Sequence[Encoded], along: Gradient) -> Gradient:
        """The Hessian's product with `along`, nearly: how the gradient changes on a short way. Weights are put back."""
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        h = SMALL * norm(list(before.values())) / (norm(list(along.values())) or 1.0)
        ends = []
        try:
            for sign in (1, -1):
                for name, weight in self.weights.items():
                    weight.copy_(before[name] + (sign * h) * along[name])
                ends.append(self.measured(rows).slope)
        finally:
            for name, weight in self.weights.items():
                weight.copy_(before[name])
        return {name: (ends[0][name] - ends[1][name]) / (2 * h) for name in along}

    def _loss(self, rows: Sequence[Encoded]) -> Tensor:
        """Sum over rows' supervised tokens. Logits are made for these alone."""
        batch = collate(rows).to(self.model.device)
        states, head = self.model.decode(batch.ids, batch.mask)
        owners, positions = batch.supervised[:, 1:].nonzero(as_tuple=True)  # position t predicts token t + 1
        logits = head(states[owners.to(states.device), positions.to(states.device)])
        targets = batch.ids[owners, positions + 1].to(logits.device)
        return F.cross_entropy(logits.float(), targets, reduction="sum")


def _products(found: Sequence[Tensor], weights: Sequence[Tensor], along: Sequence[Tensor]) -> list[Tensor]:
    """The Hessian's product with `along`, from a gradient that can be differentiated again."""
    pairs = [(part, other.to(part)) for part, other in zip(found, along, strict=True) if part.requires_grad]
    parts, others = zip(*pairs, strict=True)
    return list(torch.autograd.grad(parts, weights, others, materialize_grads=True))


def _add(into: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    for part, other in zip(into, found, strict=True):
        part.add_(other.detach())
