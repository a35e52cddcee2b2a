"""Gradient of a mean loss, and its Hessian's product with a direction, in the middle of a training.

Both are taken for the trained weights, by name, in fp32. The model is in evaluation mode meanwhile: there is no
dropout, none of the training's random numbers are used up, and gradients that the training holds are not touched.

The Hessian's product is a double backward pass, exact to rounding. (Forward over reverse takes a tenth less time and
agrees to 4e-7, but needs the model as a function of its weights; central differences take a seventh less time and are
accurate to 2e-4 at best.) Attention then runs in torch's plain kernel, because the fused kernels have no second
derivative.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from whence.corpus.tokens import Encoded, collate
from whence.errors import ModelError
from whence.gradients.objectives import sure_losses
from whence.gradients.slope_scale import scale_for, scales_of
from whence.models.loading import LoadedModel

Gradient = dict[str, Tensor]
"""One tensor per trained parameter, by name, of the parameter's shape, in fp32."""
TOLERANCE = 0.2
"""Largest relative difference between the Hessian's product and a finite difference, in fp32."""
RELATIVE_STEP = 1e-5
"""Step of that finite difference, relative to the length of the weights."""


class Derivatives(NamedTuple):
    """Loss of some rows and its derivatives."""

    gradient: Gradient
    """Gradient of the rows' mean loss."""
    hessian_product: Gradient | None
    """The Hessian's product with a direction, if one was given."""
    loss: float
    """Nats, mean over the rows' supervised tokens."""


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, without dropout, with gradients enabled."""
    was_training = net.training
    net.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        net.train(was_training)


def norm(tensors: Sequence[Tensor]) -> float:
    """Norm of all tensors together."""
    return float(get_total_norm(tensors)) if tensors else 0.0


def gradient(loss: Tensor, weights: Sequence[Tensor], *, twice: bool = False) -> list[Tensor]:
    """Gradient of a loss, with zeros where the loss does not reach. With `twice` it can be differentiated again."""
    return list(torch.autograd.grad(loss, weights, create_graph=twice, materialize_grads=True))


@dataclass(frozen=True)
class LossDerivatives:
    """Derivatives of rows' mean loss to first or second order at a model's current weights."""

    model: LoadedModel
    weights: Mapping[str, Tensor]
    """The trained weights by name."""
    rows_per_pass: int

    def derivatives(self, rows: Sequence[Encoded], along: Gradient | None = None) -> Derivatives:
        """Rows' mean loss over their supervised tokens, its gradient, and its Hessian's product with `along`."""
        weights = list(self.weights.values())
        total_gradient = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        product, total = [zeros.clone() for zeros in total_gradient], 0.0
        tokens = sum(row.supervised_count for row in rows)
        for start in range(0, len(rows), self.rows_per_pass):
            pass_rows = rows[start : start + self.rows_per_pass]
            with evaluating(self.model.model), nullcontext() if along is None else sdpa_kernel(SDPBackend.MATH):
                loss = self._loss(pass_rows) / tokens
                factor = self._factor(loss)
                gradients = gradient(loss * factor, weights, twice=along is not None)
                if along is not None:
                    _add(product, _products(gradients, weights, [along[name] for name in self.weights]), 1 / factor)
            _add(total_gradient, gradients, 1 / factor)
            total += float(loss.detach())
        named = dict(zip(self.weights, total_gradient, strict=True))
        return Derivatives(named, None if along is None else dict(zip(self.weights, product, strict=True)), total)

    def check_second_order(self, rows: Sequence[Encoded], along: Gradient) -> None:
        """Compare the Hessian's product with a direction to a finite difference.

        Autograd silently leaves out of a second derivative any function whose backward pass it cannot differentiate.

        Raises:
            ModelError: They disagree, or a module of the model reports that it has no second derivative.
        """
        try:
            product = self.derivatives(rows, along).hessian_product or {}
        except RuntimeError as error:
            if "derivative" not in str(error) and "differentiable" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise ModelError(f"{self.model.path} has no second derivative ({reason}). Use --in-run-order 1.") from None
        if any(weight.dtype != torch.float32 for weight in self.model.model.parameters()):
            return  # rounding to 16 bits is larger than such a difference
        expected = self.finite_difference(rows, along)
        error = norm([product[name] - value for name, value in expected.items()]) / (norm([*expected.values()]) or 1.0)
        if not error <= TOLERANCE:
            raise ModelError(
                f"{self.model.path}: second derivatives are {error:.0%} off a finite difference, so some part of the "
                "model cannot be differentiated twice. Use --in-run-order 1."
            )

    @torch.no_grad()
    def finite_difference(self, rows: Sequence[Encoded], along: Gradient) -> Gradient:
        """Approximation of the Hessian's product with `along`: the gradient's change over a short step."""
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        h = RELATIVE_STEP * norm(list(before.values())) / (norm(list(along.values())) or 1.0)
        ends = []
        try:
            for sign in (1, -1):
                for name, weight in self.weights.items():
                    weight.copy_(before[name] + (sign * h) * along[name])
                ends.append(self.derivatives(rows).gradient)
        finally:
            for name, weight in self.weights.items():
                weight.copy_(before[name])
        return {name: (ends[0][name] - ends[1][name]) / (2 * h) for name in along}

    def _factor(self, loss: Tensor) -> float:
        """A power of two that brings the loss near 1 for a pass that has float16 in it, else 1; see `slope_scale`."""
        return float(scales_of(loss.detach()[None, None])) if scale_for(self.model).is_needed else 1.0

    def _loss(self, rows: Sequence[Encoded]) -> Tensor:
        """Sum of the losses of rows' supervised tokens, the only ones for which logits are computed."""
        batch = collate(rows).to(self.model.device)
        states, head = self.model.decode(batch.ids, batch.mask)
        owners, positions = batch.supervised[:, 1:].nonzero(as_tuple=True)  # position t predicts token t + 1
        logits = head(states[owners.to(states.device), positions.to(states.device)])
        labels = batch.ids[owners, positions + 1].to(logits.device)
        return sure_losses(logits, labels).sum()


def _products(gradients: Sequence[Tensor], weights: Sequence[Tensor], along: Sequence[Tensor]) -> list[Tensor]:
    """The Hessian's product with `along`, from a gradient that can be differentiated again."""
    pairs = [(slope, other.to(slope)) for slope, other in zip(gradients, along, strict=True) if slope.requires_grad]
    slopes, others = zip(*pairs, strict=True)
    return list(torch.autograd.grad(slopes, weights, others, materialize_grads=True))


def _add(totals: Sequence[Tensor], terms: Sequence[Tensor], factor: float) -> None:
    for total, term in zip(totals, terms, strict=True):
        total.add_(term.detach().to(total), alpha=factor)
