"""Forward passes over a corpus: pooled hidden states and losses of every row, for scorers that run a model.

Rows are read in windows of `ROWS_PER_WINDOW` and batched by similar length within each, so that a corpus of any length
streams. But for rounding, a row's result does not depend on the rows that share its batch. Rows without tokens are left
out. States are the last ones, after the final norm and before the output head. They are pooled in fp32 whatever the
model's dtype, by weights over all tokens of a row: prompt, completion and special tokens alike.

Cost: one forward pass over every row; only a window's token ids are held.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from whence.corpus.tokens import Batch, Encoded, bucketed, collate
from whence.gradients.capture import token_losses
from whence.models.loading import LoadedModel
from whence.runner import counting
from whence.turns import one_at_a_time

ROWS_PER_WINDOW = 4096
"""Rows held in memory as token ids at a time."""

PoolingWeights = Callable[[Bool[Tensor, "b t"]], Float32[Tensor, "b t"]]
"""From a mask of tokens to their weights; the weights of a row sum to 1, and padding has 0."""


def batches(
    rows: Iterable[Encoded], tokens_per_batch: int, total: int | None = None
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of rows with the rows' numbers; rows without tokens are left out.

    Args:
        rows: Rows of a corpus.
        tokens_per_batch: The most tokens of a batch, padding included.
        total: Number of the rows, to show how far a pass over them is, where one waits for it (`runner.counting`).
    """
    stream, first = iter(rows), 0
    with nullcontext(_uncounted) if total is None else counting("Reading the corpus", total) as tick:
        while window := list(itertools.islice(stream, ROWS_PER_WINDOW)):
            present = [number for number, row in enumerate(window) if row.ids]
            tick(len(window) - len(present), 0)
            for places in bucketed([len(window[number].ids) for number in present], tokens_per_batch):
                numbers = [present[place] for place in places]
                yield [first + number for number in numbers], collate([window[number] for number in numbers])
                tick(len(numbers), 0)
            first += len(window)


def _uncounted(examples: int, tokens: int) -> None:
    """Count nothing."""


def embeddings(
    model: LoadedModel,
    rows: Iterable[Encoded],
    tokens_per_batch: int,
    weights: PoolingWeights,
    total: int | None = None,
) -> Iterator[tuple[list[int], Float32[Tensor, "b d"]]]:
    """Numbers of rows and their pooled states, on the CPU, one batch at a time.

    If a row's states are not finite, neither is its pooled state. For `total` see `batches`.
    """
    for numbers, batch in batches(rows, tokens_per_batch, total):
        yield numbers, _states(model, batch, weights)


@one_at_a_time
@torch.no_grad()  # not on the generator: under the shape checks torch would not recognise it as one
def _states(model: LoadedModel, batch: Batch, weights: PoolingWeights) -> Float32[Tensor, "b d"]:
    batch = batch.to(model.device)
    states, _ = model.decode(batch.ids, batch.mask)
    return pooled(states, batch.mask.to(states.device), weights).cpu()


def pooled(
    states: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"], weights: PoolingWeights
) -> Float32[Tensor, "b d"]:
    """Weighted mean of states over tokens; states at padding do not count, not even NaN.

    >>> pooled(torch.tensor([[[3.0], [6.0], [9.0]]]), torch.tensor([[True, True, False]]), position_weights)
    tensor([[5.]])
    """
    real = states.float().masked_fill(~mask[..., None], 0.0)  # 0 * NaN is NaN
    return torch.einsum("bt,btd->bd", weights(mask), real)


def position_weights(mask: Bool[Tensor, "b t"]) -> Float32[Tensor, "b t"]:
    """Weight i / (1 + ... + t) for token i of t, counted from 1."""
    place = mask.cumsum(1) * mask
    return place / place.sum(1, keepdim=True)


def even_weights(mask: Bool[Tensor, "b t"]) -> Float32[Tensor, "b t"]:
    """The same weight for every token."""
    return mask / mask.sum(1, keepdim=True)


def last_token_weights(mask: Bool[Tensor, "b t"]) -> Float32[Tensor, "b t"]:
    """Weight 1 for a row's last token, 0 for all others."""
    return (mask.cumsum(1) * mask == mask.sum(1, keepdim=True)).float()


def losses(
    model: LoadedModel, rows: Iterable[Encoded], tokens_per_batch: int, total: int | None = None
) -> Iterator[tuple[list[int], Float32[Tensor, " b"]]]:
    """Numbers of rows and their losses, on the CPU: the mean over a row's supervised tokens, in nats.

    The loss is NaN for a row without a supervised token. For `total` see `batches`.
    """
    for numbers, batch in batches(rows, tokens_per_batch, total):
        batch_losses = _losses(model, batch)
        yield numbers, torch.where(batch.supervised.any(1), batch_losses, torch.nan)


@torch.no_grad()
def _losses(model: LoadedModel, batch: Batch) -> Float32[Tensor, " b"]:
    return token_losses(model, batch).loss.cpu()
