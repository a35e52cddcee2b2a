"""Exact norms of examples' gradients over the traced layers, without forming a gradient where that costs more."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.corpus.tokens import Batch
from whence.gradients.capture import Captured, TokenLosses, backward, squared_norms
from whence.models.loading import LoadedModel


@dataclass
class Norms:
    """Consumes a whole backward pass into every example's exact squared gradient norm."""

    squared: Float32[Tensor, " b"]

    def __call__(self, captured: Captured) -> None:
        """Add one layer's squared norms."""
        rows = torch.arange(len(self.squared)) if captured.rows is None else captured.rows.cpu()
        squares = squared_norms(captured.a, captured.g).clamp(min=0)  # a sum of Gram products can round below zero
        self.squared.index_add_(0, rows.to(self.squared.device), squares.to(self.squared))


def gradient_norms(
    model: LoadedModel, layers: Mapping[str, nn.Module], batch: Batch, *, reduction: str = "mean"
) -> tuple[Float32[Tensor, " b"], TokenLosses]:
    """Exact norm of each example's gradient over the traced layers, and the losses."""
    norms = Norms(torch.zeros(len(batch), device=model.device))
    losses = backward(model, layers, batch, norms, reduction=reduction, whole=True)
    return norms.squared.sqrt(), losses
