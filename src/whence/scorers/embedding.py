"""RDS+: cosine of the query's and the row's representation in the model itself.

A representation is the mean of the last hidden states (after the final norm, before the output head) of all tokens,
prompt, completion and special tokens alike, weighted by position: token i of t, from 1, weighs i / (1 + ... + t). In a
causal model later states have seen more of the text.

What is taken from the source, and what is not: pooling, weights, layer and cosine are theirs. They read the base model,
in bfloat16; here it is the model of the last checkpoint, in the precision that the index loads it in. Their released
code weighs padding like tokens, which does nothing only as long as rows come one a batch; here padding never counts.
They go on to pick rows round-robin over queries; that is selection, not scoring.

States are pooled in fp32 whatever the model's dtype. The queries' representations are kept [q d], the rows' are not:
rows come in windows of `ROWS_PER_WINDOW`, batches of like length within each. Cost: a forward pass over every row.

Source: Ivison et al. 2025, Large-Scale Data Selection for Instruction Tuning, https://arxiv.org/abs/2503.01807; the
weights are SGPT's, Muennighoff 2022, https://arxiv.org/abs/2202.08904.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from whence.errors import ModelError
from whence.interfaces import QueryText, View
from whence.model import LoadedModel
from whence.tokens import Batch, Encoded, bucketed, collate

ROWS_PER_WINDOW = 4096
"""Rows held in memory as token ids at a time."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Cosines, from -1 to 1 but for rounding; -inf for a row without tokens or with states that are not finite."""

    seed: int = 0
    """Not used."""

    def __call__(self, view: View, queries: Sequence[QueryText]) -> Float32[Tensor, "q n"]:
        """Cosines.

        Raises:
            ModelError: A query has no representation, so that no row could be ranked for it.
        """
        model = view.model()
        asked = _query_vectors(model, queries, view.tokens_per_batch)
        scores = torch.full((len(queries), view.rows), -math.inf)
        rows, first = view.encoded(), 0
        while window := list(itertools.islice(rows, ROWS_PER_WINDOW)):
            for numbers, vectors in embeddings(model, window, view.tokens_per_batch):
                cosine = asked @ F.normalize(vectors, dim=1).T
                known = torch.where(torch.isfinite(cosine), cosine, -math.inf)
                scores[:, [first + number for number in numbers]] = known
            first += len(window)
        return scores


def _query_vectors(model: LoadedModel, queries: Sequence[QueryText], tokens_per_batch: int) -> Float32[Tensor, "q d"]:
    """Representations of norm 1."""
    found: dict[int, Tensor] = {}
    for numbers, vectors in embeddings(model, [query.encoded for query in queries], tokens_per_batch):
        found |= dict(zip(numbers, F.normalize(vectors, dim=1), strict=True))
    for number, query in enumerate(queries):
        if number not in found or not torch.isfinite(found[number]).all():
            reason = "the model's states for it are not finite" if number in found else "it has no token"
            raise ModelError(f"no row can be compared with the query {query.prompt[:60]!r}: {reason}")
    return torch.stack([found[number] for number in range(len(queries))])


def embeddings(
    model: LoadedModel, examples: Sequence[Encoded], tokens_per_batch: int
) -> Iterator[tuple[list[int], Float32[Tensor, "b d"]]]:
    """Numbers of some examples and their representations, on the CPU, a batch at a time.

    Examples without tokens are left out. Where an example's states are not finite, neither is its representation.
    """
    present = [number for number, example in enumerate(examples) if example.ids]
    for batch in bucketed([len(examples[number].ids) for number in present], tokens_per_batch):
        numbers = [present[position] for position in batch]
        yield numbers, _batch_vectors(model, collate([examples[number] for number in numbers]))


@torch.no_grad()  # not on the generator: torch would not know it for one under the shape checks
def _batch_vectors(model: LoadedModel, batch: Batch) -> Float32[Tensor, "b d"]:
    batch = batch.to(model.device)
    states, _ = model.decode(batch.ids, batch.mask)
    return pooled(states, batch.mask.to(states.device)).cpu()


def pooled(states: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]) -> Float32[Tensor, "b d"]:
    """Mean over real tokens, weighted by position; whatever stands at padding, NaN included, does not count.

    >>> pooled(torch.tensor([[[3.0], [6.0], [9.0]]]), torch.tensor([[True, True, False]]))
    tensor([[5.]])
    """
    position = mask.cumsum(1) * mask
    weights = position / position.sum(1, keepdim=True)
    real = states.float().masked_fill(~mask[..., None], 0.0)  # 0 * NaN is NaN
    return torch.einsum("bt,btd->bd", weights, real)
