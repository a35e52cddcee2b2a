"""Forward passes over a corpus, for scorers that read a model: pooled hidden states and losses of every row.

Rows come in windows of `ROWS_PER_WINDOW`, batches of like length within each, so that a corpus of any length streams;
what a row becomes does not depend, but for rounding, on the rows that it shares a batch with. Rows without tokens are
left out. States are the last ones, after the final norm and before the output head, pooled in fp32 whatever the model's
dtype, by weights over a row's tokens, prompt, completion and special tokens alike.

Cost: one forward pass over every row; nothing is held but a window's token ids.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from whence.corpus.tokens import Batch, Encoded, bucketed, collate
from whence.gradients.capture import token_losses
from whence.models.loading import LoadedModel

ROWS_PER_WINDOW = 4096
"""Rows held in memory as token ids at a time."""

Weights = Callable[[Bool[Tensor, "b t"]], Float32[Tensor, "b t"]]
"""From real tokens to what each weighs; the weights of a row sum to 1, and padding's are 0."""


def batches(rows: Iterable[Encoded], tokens_per_batch: int) -> Iterator[tuple[list[int], Batch]]:
    """Numbers of some rows, and those rows as a batch; rows without tokens never come."""
    stream, first = iter(rows), 0
    while window := list(itertools.islice(stream, ROWS_PER_WINDOW)):
        present = [number for number, row in enumerate(window) if row.ids]
        for places in bucketed([len(window[number].ids) for number in present], tokens_per_batch):
            numbers = [present[place] for place in places]
            yield [first + number for number in numbers], collate([window[number] for number in numbers])
        first += len(window)


def embeddings(
    model: LoadedModel, rows: Iterable[Encoded], tokens_per_batch: int, weights: Weights
) -> Iterator[tuple[list[int], Float32[Tensor, "b d"]]]:
    """Numbers of some rows and their pooled states, on the CPU, a batch at a time.

    Where a row's states are not finite, neither are its pooled ones.
    """
    for numbers, batch in batches(rows, tokens_per_batch):
        yield numbers, _states(model, batch, weights)


@torch.no_grad()  # not on the generator: torch would not know it for one under the shape checks
def _states(model: LoadedModel, batch: Batch, weights: Weights) -> Float32[Tensor, "b d"]:
    batch = batch.to(model.device)
    states, _ = model.decode(batch.ids, batch.mask)
    return pooled(states, batch.mask.to(states.device), weights).cpu()


def pooled(states: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"], weights: Weights) -> Float32[Tensor, "b d"]:
    """Weighted mean over real tokens; whatever stands at padding, NaN included, does not count.

    >>> pooled(torch.tensor([[[3.0], [6.0], [9.0]]]), torch.tensor([[True, True, False]]), by_position)
    tensor([[5.]])
    """
    real = states.float().masked_fill(~mask[..., None], 0.0)  # 0 * NaN is NaN
    return torch.einsum("bt,btd->bd", weights(mask), real)


def by_position(mask: Bool[Tensor, "b t"]) -> Float32[Tensor, "b t"]:
    """Token i of t, from 1, weighs i / (1 + ... + t)."""
    place = mask.cumsum(1) * mask
    return place / place.sum(1, keepdim=True)


def evenly(mask: Bool[Tensor, "b t"]) -> Float32[Tensor, "b t"]:
    """Every token weighs the same."""
    return mask / mask.sum(1, keepdim=True)


def last(mask: Bool[Tensor, "b t"]) -> Float32[Tensor, "b t"]:
    """The last real token alone."""
    return (mask.cumsum(1) * mask == mask.sum(1, keepdim=True)).float()


def losses(
    model: LoadedModel, rows: Iterable[Encoded], tokens_per_batch: int
) -> Iterator[tuple[list[int], Float32[Tensor, " b"]]]:
    """Numbers of some rows and their losses, on the CPU: the mean over a row's supervised tokens, in nats.

    NaN for a row that supervises nothing.
    """
    for numbers, batch in batches(rows, tokens_per_batch):
        found = _losses(model, batch)
        yield numbers, torch.where(batch.supervised.any(1), found, torch.nan)


@torch.no_grad()
def _losses(model: LoadedModel, batch: Batch) -> Float32[Tensor, " b"]:
    return token_losses(model, batch).loss.cpu()
