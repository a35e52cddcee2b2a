"""Backward passes for the Fisher matrix: a row's slopes where each answer's tokens are drawn by the model itself.

Let l_n be a row's loss, the sum of -log p over its supervised tokens in nats, and G_n its gradient with labels y drawn
from p. Then E_y[vec(G_n) vec(G_n)^T] is the Gauss-Newton matrix of l_n, the part of its Hessian that is never negative.
With the corpus' own labels ("empirical Fisher") it is another matrix, which is 0 where the model is sure and right.

A token's draw depends on the seed, the row's tokens and its place among them alone: neither batches nor workers nor the
order of rows change it, but for the rounding of the model's own probabilities.

Source: Martens 2020, https://arxiv.org/abs/1412.1193, sections 5 and 9; Kunstner et al. 2019,
https://arxiv.org/abs/1905.12558 (why the empirical one is another).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from whence.corpus.tokens import Batch, Encoded
from whence.gradients.capture import Consume, backward
from whence.gradients.exact import batches
from whence.gradients.objectives import cross_entropy
from whence.models.loading import LoadedModel
from whence.numerics import generator

TOKENS_PER_BATCH = 2048


class Drawing(TypedDict):
    """How labels are drawn and passes are made: arguments of `fisher_passes`."""

    seed: int
    is_empirical: bool
    tokens_per_batch: int


class DrawnLabels:
    """The loss of labels that the model draws, as an objective of `backward`, which asks for positions in their order.

    Args:
        uniforms: One number in [0, 1) for each supervised position of the batch, row by row [s].
    """

    def __init__(self, uniforms: Tensor):
        self._uniforms, self._next = uniforms, 0

    @torch.no_grad()
    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of drawn labels and their slopes; see `objectives.SlopeOf`."""
        some = self._uniforms[self._next : self._next + len(labels)].to(logits.device)
        self._next += len(labels)
        reached = logits.double().softmax(1).cumsum(1)
        drawn = torch.searchsorted(reached, (some * reached[:, -1])[:, None], right=True)[:, 0]
        return cross_entropy(logits, drawn.clamp_(max=logits.shape[1] - 1).to(labels), weights)


def uniforms_of(rows: Sequence[Encoded], seed: int) -> Tensor:
    """A number in [0, 1) for each supervised position of some rows, one row after another, in double precision [s]."""
    return torch.cat([torch.rand(sum(row.supervised[1:]), generator=generator(seed, "fisher", *map(str, row.ids)),
                                 dtype=torch.float64) for row in rows])  # fmt: skip


def fisher_passes(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    rows: Sequence[Encoded],
    consume: Consume,
    *,
    seed: int = 0,
    is_empirical: bool = False,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[Batch]:
    """Hand every row's inputs and slopes to `consume`, a layer at a time; yield each batch when it is done.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name.
        rows: Rows, each with a supervised token.
        consume: See `capture.backward`; it gets whole layers.
        seed: Seed of what the model draws.
        is_empirical: Take the rows' own labels.
        tokens_per_batch: The most tokens of a pass, padding included.
    """
    for numbers, batch in batches(rows, tokens_per_batch):
        objective = cross_entropy if is_empirical else DrawnLabels(uniforms_of([rows[n] for n in numbers], seed))
        backward(model, layers, batch, consume, reduction="sum", objective=objective, whole=True)
        yield batch
