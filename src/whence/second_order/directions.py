"""Scores of rows against directions in weight space that are full matrices, by layer.

A preconditioned query is no sum of few outer products, so that rows' gradients are formed, layer by layer and a few
rows at a time, and compared with all directions in one product.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.corpus.tokens import Encoded, collate
from whence.gradients.capture import Captured, backward, example_gradients
from whence.gradients.exact import FORMED_AT_ONCE, SignedSequence, batches
from whence.models.loading import LoadedModel, layer_shape
from whence.second_order.factors import device_of

Directions = Mapping[str, Float32[Tensor, "s o i"]]
"""Of s targets, by layer."""


def mean_gradients(
    model: LoadedModel, layers: Mapping[str, nn.Module], targets: Sequence[Sequence[SignedSequence]]
) -> dict[str, Float32[Tensor, "s o i"]]:
    """Gradients of targets' losses, each the signed sum of its sequences' mean losses over tokens, by layer."""
    out = {name: torch.zeros(len(targets), *layer_shape(layer), device=device_of(layer))
           for name, layer in layers.items()}  # fmt: skip
    for number, sequences in enumerate(targets):
        for sequence in sequences:

            def add(captured: Captured, number: int = number, sign: float = sequence.sign) -> None:
                formed = example_gradients(captured.a, captured.g).sum(0)
                out[captured.layer][number] += sign * formed.to(out[captured.layer])

            backward(model, layers, collate([sequence.encoded]), add, whole=True)
    return out


@dataclass
class _Products:
    """Consumes a backward pass into inner products with directions."""

    directions: Directions
    sums: Tensor

    def __call__(self, captured: Captured) -> None:
        direction = self.directions[captured.layer].to(captured.a.device)
        step = max(1, FORMED_AT_ONCE // direction[0].numel())
        parts = [example_gradients(a, g).flatten(1) @ direction.flatten(1).T
                 for a, g in zip(captured.a.split(step), captured.g.split(step), strict=True)]  # fmt: skip
        products = torch.cat(parts).to(self.sums)
        rows = torch.arange(len(self.sums)) if captured.rows is None else captured.rows
        self.sums.index_add_(0, rows.to(self.sums.device), products)


def direction_scores(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    directions: Directions,
    rows: Sequence[Encoded],
    *,
    tokens_per_batch: int,
    tick: Callable[[int, int], None] | None = None,
) -> Float32[Tensor, "s n"]:
    """Inner products of rows' gradients with directions.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name.
        directions: Directions by layer.
        rows: Rows; one without a supervised token has the score 0.
        tokens_per_batch: The most tokens of a pass, padding included.
        tick: Called with the rows and tokens of each pass when it is done.

    Returns:
        Of the gradient of each row's loss, the sum over its supervised tokens, as it counts in a training whose loss is
        the mean over a batch's tokens.
    """
    targets = len(next(iter(directions.values())))
    out = torch.zeros(targets, len(rows))
    for numbers, batch in batches(rows, tokens_per_batch):
        products = _Products(directions, torch.zeros(len(numbers), targets, device=model.device))
        backward(model, layers, batch, products, reduction="sum", whole=True)
        out[:, numbers] = products.sums.T.cpu()
        if tick is not None:
            tick(len(numbers), int(batch.mask.sum()))
    return out
