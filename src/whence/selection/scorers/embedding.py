"""RDS and RDS+: cosine of a target's and a row's representation in the model itself.

    rds    the last hidden state (after the final norm, before the output head) of the last token
    rds+   the mean of the last hidden states of all tokens, prompt, completion and special tokens alike, weighted by
           position: token i of t, from 1, weighs i / (1 + ... + t); in a causal model later states have seen more

A target's score is the mean of its queries' cosines, computed as one product: the mean of unit vectors, times the
row's.

Pooling, weights, layer and cosine are those of the sources. They read the base model in bfloat16; here it is the model
of the last checkpoint, in the precision that it is loaded in. The released code of RDS+ weighs padding like tokens,
which is harmless only as long as a batch is one row; here padding never counts. The last token of a closed row is the
end-of-sequence token, as in the source of RDS. LESS takes the best target of a row, RDS+ goes round-robin over queries:
that is selection, not scoring.

The targets' representations stay in memory [s d], the rows' do not. Cost: a forward pass over every row.

Source: Ivison et al. 2025, Large-Scale Data Selection for Instruction Tuning, https://arxiv.org/abs/2503.01807, whose
weights are SGPT's, Muennighoff 2022, https://arxiv.org/abs/2202.08904; RDS as in LESS, Xia et al. 2024,
https://arxiv.org/abs/2402.04333.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float32
from torch import Tensor

from whence.errors import ModelError
from whence.gradients.forward_passes import PoolingWeights, embeddings, last_token_weights, position_weights
from whence.models.loading import LoadedModel
from whence.selection.protocols import Target, View

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RDS:
    """Cosines, from -1 to 1 but for rounding; -inf for a row without tokens or with states that are not finite."""

    seed: int = 0
    """Not used."""

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Cosines of last tokens' states.

        Raises:
            ModelError: No query of a target has a representation, so that no row could be ranked for it.
        """
        return _cosines(view, targets, last_token_weights)


@dataclass(frozen=True, kw_only=True)
class RDSPlus:
    """Cosines, from -1 to 1 but for rounding; -inf for a row without tokens or with states that are not finite."""

    seed: int = 0
    """Not used."""

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Cosines of position-weighted mean states.

        Raises:
            ModelError: No query of a target has a representation, so that no row could be ranked for it.
        """
        return _cosines(view, targets, position_weights)


def _cosines(view: View, targets: Sequence[Target], weights: PoolingWeights) -> Float32[Tensor, "s n"]:
    model = view.model()
    target_vectors = _target_vectors(model, targets, view.tokens_per_batch, weights)
    scores = torch.full((len(targets), view.rows), -math.inf)
    for numbers, vectors in embeddings(model, view.encoded(), view.tokens_per_batch, weights, view.rows):
        cosine = target_vectors @ F.normalize(vectors, dim=1).T
        scores[:, numbers] = torch.where(torch.isfinite(cosine), cosine, -math.inf)
    return scores


def _target_vectors(
    model: LoadedModel, targets: Sequence[Target], tokens_per_batch: int, weights: PoolingWeights
) -> Float32[Tensor, "s d"]:
    """Mean of each target's queries' representations of norm 1; a query without one does not count."""
    queries = [query.encoded for target in targets for query in target.queries]
    owners = [number for number, target in enumerate(targets) for _ in target.queries]
    unit_vectors: list[list[Tensor]] = [[] for _ in targets]
    for numbers, vectors in embeddings(model, queries, tokens_per_batch, weights):
        for number, vector in zip(numbers, F.normalize(vectors, dim=1), strict=True):
            if torch.isfinite(vector).all():
                unit_vectors[owners[number]].append(vector)
    for target, vectors in zip(targets, unit_vectors, strict=True):
        if not vectors:
            first = target.queries[0]
            reason = "the model's states for it are not finite" if first.encoded.ids else "it has no token"
            raise ModelError(
                f"no row can be compared with target {target.name!r}, query {first.prompt[:60]!r}: {reason}"
            )
        if missing := len(target.queries) - len(vectors):
            logger.warning("target %r: %d of %d queries have no finite states and do not count",
                           target.name, missing, len(target.queries))  # fmt: skip
    return torch.stack([torch.stack(vectors).mean(0) for vectors in unit_vectors])
