"""Which rows curvature is measured over: enough of them, at random.

A layer's covariances are averages over supervised tokens, of as many dimensions as it has inputs. What they need is
therefore tokens for each input, not rows, and no more of a large corpus than of a small one.
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from whence.models.loading import layer_shape
from whence.numerics import generator

TOKENS_AN_INPUT = 24
"""Supervised tokens for each input of the widest layer, where nobody says how many rows. Of base-6m 12 an input, 200
rows, served as well as 123, all 2,000 (docs/results/evaluation.md, bank 1)."""


def sampled_rows(
    tokens: Int64[Tensor, " n"], layers: Mapping[str, nn.Module], *, seed: int, rows: int | None = None
) -> Int64[Tensor, " m"]:
    """Places of the rows to measure, ascending.

    Args:
        tokens: Supervised tokens of each row.
        layers: The layers that are measured.
        seed: Of the draw.
        rows: How many, if there are as many; None: the fewest that have `TOKENS_AN_INPUT`.
    """
    order = torch.randperm(len(tokens), generator=generator(seed, "curvature"))
    count = rows_needed(tokens[order], layers) if rows is None else rows
    return order[:count].sort().values


def rows_needed(tokens: Int64[Tensor, " n"], layers: Mapping[str, nn.Module]) -> int:
    """How many of the rows, in this order, have `TOKENS_AN_INPUT`; one more than there are if all have fewer."""
    return int((tokens.cumsum(0) < tokens_needed(layers.values())).sum()) + 1


def tokens_needed(layers: Iterable[nn.Module]) -> int:
    """Supervised tokens that the widest layer's inputs ask for."""
    return TOKENS_AN_INPUT * max(inputs for _, inputs in map(layer_shape, layers))
