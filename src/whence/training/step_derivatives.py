"""The gradient of a training step's loss, recorded so that it can be differentiated again.

The loss of a step is the sum, over its rows, of w_i times the losses of row i's supervised tokens, over the number of
supervised tokens of *all* its rows: w_i = 1 is the training as it was, and w_i = 0 leaves row i out with everything
else as it was. Let g be the gradient of that loss by the trained weights theta at w = 1, and mu a direction. One
derivative of <g, mu> gives both

    by theta    H mu, H the Hessian of the step's loss
    by w_i      <gradient of row i's share of the loss, mu>

A step of one pass is recorded once. One of several passes (accumulation) is recorded pass by pass, after a first sweep
that only adds up g: mu depends on the whole step's.

The model is in evaluation mode; where it is differentiated twice, attention runs in torch's plain kernel, which can be.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.corpus.tokens import Encoded, collate
from whence.gradients.exact import SignedSequence
from whence.gradients.hessian import evaluating, gradient
from whence.models.loading import LoadedModel
from whence.training.update_rules import Tensors, put

Target = Sequence[Sequence[SignedSequence]]
"""Queries, each with its sequences: the completion and, with a minus, one that it is compared with. A target's loss is
the mean over queries of the signed sum of each sequence's mean loss over its supervised tokens."""


@dataclass(frozen=True)
class RowLosses:
    """Losses of the rows of a training under a model's current weights."""

    model: LoadedModel
    weights: Mapping[str, Tensor]
    """The trained weights by name; they require gradients within `thawed` alone."""
    rows: Sequence[Encoded]
    """All rows of the training, each with a supervised token."""

    @property
    def device(self) -> torch.device:
        """Device of the weights: they are on one."""
        return next(iter(self.weights.values())).device

    def sums(self, numbers: Sequence[int]) -> Float64[Tensor, " b"]:
        """Sum of the losses of each row's supervised tokens, in nats; the only tokens for which logits are made."""
        batch = collate([self.rows[number] for number in numbers]).to(self.model.device)
        states, head = self.model.decode(batch.ids, batch.mask)
        owners, positions = batch.supervised[:, 1:].nonzero(as_tuple=True)  # position t predicts token t + 1
        logits = head(states[owners.to(states.device), positions.to(states.device)])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits, batch.ids[owners, positions + 1].to(logits.device), reduction="none")
        sums = losses.new_zeros(len(numbers), dtype=torch.float64)  # of which differences are taken
        return sums.index_add(0, owners.to(losses.device), losses.double())

    def tokens(self, numbers: Sequence[int]) -> int:
        """Supervised tokens of some rows."""
        return sum(self.rows[number].supervised_count for number in numbers)

    def slope(self, passes: Sequence[Sequence[int]], row_weights: Tensor | None = None) -> "StepSlope":
        """Gradient of a step's loss, and each row's share of that loss.

        Args:
            passes: Row numbers of each pass.
            row_weights: w [n] of all rows of the training; None: 1.
        """
        count, total, shares = sum(map(self.tokens, passes)), None, []
        for numbers in passes:
            with evaluating(self.model.model):
                sums = self.sums(numbers)
                if row_weights is not None:
                    sums = sums * row_weights[list(numbers)].to(sums)
                slopes = gradient(sums.sum() / count, list(self.weights.values()))
            shares.append(sums.detach().double().cpu() / count)
            total = slopes if total is None else [a + b for a, b in zip(total, slopes, strict=True)]
        assert total is not None, "a step has a pass"
        return StepSlope(dict(zip(self.weights, total, strict=True)), torch.cat(shares))

    def gradient(self, passes: Sequence[Sequence[int]], row_weights: Tensor | None = None) -> Tensors:
        """Gradient of a step's loss: see `slope`."""
        return self.slope(passes, row_weights).gradient

    def target_gradient(self, target: Target) -> tuple[Tensors, float]:
        """Gradient of a target's loss, and that loss in nats a token: see `Target`."""
        total, loss = None, 0.0
        for query in target:
            for sequence in query:
                tokens = sequence.encoded.supervised_count
                with evaluating(self.model.model):
                    sums = RowLosses(self.model, self.weights, [sequence.encoded]).sums([0])
                    mean = sequence.sign * sums.sum() / (tokens * len(target))
                    slopes = gradient(mean, list(self.weights.values()))
                total = slopes if total is None else [a + b for a, b in zip(total, slopes, strict=True)]
                loss += float(mean.detach())
        assert total is not None, "a target has a query, and that a sequence"
        return dict(zip(self.weights, total, strict=True)), loss

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Let the trained weights require gradients, and afterwards have the values of before."""
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        required = {name: weight.requires_grad for name, weight in self.weights.items()}
        try:
            for weight in self.weights.values():
                weight.requires_grad_(True)
            yield
        finally:
            for name, weight in self.weights.items():
                weight.requires_grad_(required[name])
            put(before, dict(self.weights))


class StepSlope(NamedTuple):
    """What one pass over a step's rows gives."""

    gradient: Tensors
    """Of the step's loss, not clipped."""
    shares: Float64[Tensor, " b"]
    """Each row's part of that loss, in nats; rows in the order of the passes."""


@dataclass
class RecordedStep:
    """A step's gradient, which can be differentiated again."""

    losses: RowLosses
    passes: Sequence[Sequence[int]]
    gradient: Tensors = field(init=False)
    """Of the step's loss, not clipped."""

    def __post_init__(self):
        self._tokens = sum(map(self.losses.tokens, self.passes))
        self._recorded = None
        if len(self.passes) == 1:
            with _differentiable(self.losses):
                self._recorded = self._record(self.passes[0])
            slopes = dict(zip(self.losses.weights, self._recorded[0], strict=True))
            self.gradient = {name: slope.detach() for name, slope in slopes.items()}
        else:
            self.gradient = self.losses.gradient(self.passes)

    def derivatives(self, along: Tensors, *, hessian: bool = True) -> tuple[Tensors, Tensor]:
        """Derivatives of <gradient, mu> for each of q directions mu. Call it once: the record is given up.

        Args:
            along: The directions [q ...].
            hessian: Whether to make those by the weights.

        Returns:
            By the weights [q ...], zeros without `hessian`; and by the rows' w [q b], rows in the order of the passes.
        """
        q = len(next(iter(along.values())))
        by_weights = {name: torch.zeros_like(along[name]) for name in self.losses.weights}
        by_rows: list[Tensor] = []
        for numbers in self.passes:
            with _differentiable(self.losses):
                slopes, w = self._recorded or self._record(numbers)
                by_rows.append(w.new_zeros(q, len(numbers)))
                for k in range(q):
                    self._add(slopes, w, {name: mu[k] for name, mu in along.items()},
                              {name: each[k] for name, each in by_weights.items()} if hessian else None,
                              by_rows[-1][k], is_last=k == q - 1)  # fmt: skip
            self._recorded = None
        return by_weights, torch.cat(by_rows, 1)

    def _record(self, numbers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """The gradient of a pass, with its graph, and the rows' w in it."""
        sums = self.losses.sums(numbers)
        w = torch.ones_like(sums, requires_grad=True)
        return gradient((w * sums).sum() / self._tokens, list(self.losses.weights.values()), twice=True), w

    def _add(
        self, slopes: list[Tensor], w: Tensor, along: Tensors, by_weights: Tensors | None, by_rows: Tensor, *,
        is_last: bool
    ) -> None:  # fmt: skip
        reached = [(slope, along[name]) for name, slope in zip(self.losses.weights, slopes, strict=True)
                   if slope.requires_grad]  # fmt: skip
        outputs, directions = zip(*reached, strict=True)
        inputs = [w, *([] if by_weights is None else self.losses.weights.values())]
        found = torch.autograd.grad(outputs, inputs, directions, retain_graph=not is_last, materialize_grads=True)
        by_rows.copy_(found[0])
        if by_weights is not None:
            for total, term in zip(by_weights.values(), found[1:], strict=True):
                total.add_(term)


@contextmanager
def _differentiable(losses: RowLosses) -> Iterator[None]:
    """For passes that are differentiated twice."""
    with evaluating(losses.model.model), sdpa_kernel(SDPBackend.MATH):
        yield
