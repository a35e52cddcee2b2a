"""RDS and RDS+: cosine of a target's and a row's representation in the model itself.

    rds    the last hidden state (after the final norm, before the output head) of the last token
    rds+   the mean of the last hidden states of all tokens, prompt, completion and special tokens alike, weighted by
           position: token i of t, from 1, weighs i / (1 + ... + t); in a causal model later states have seen more

A target's score is the mean of its queries' cosines, got in one product: the mean of unit vectors, times the row's.

What is taken from the sources, and what is not: pooling, weights, layer and cosine are theirs. They read the base model
in bfloat16; here it is the model of the last checkpoint, in the precision that it is loaded in. The released code of
RDS+ weighs padding like tokens, which does nothing only as long as rows come one a batch; here padding never counts.
RDS's last token is, of a row that is closed, the end-of-sequence token, as theirs. LESS takes the best target of a row,
RDS+ goes round-robin over queries: that is selection, not scoring.

The targets' representations are kept [s d], the rows' are not. Cost: a forward pass over every row.

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
from whence.gradients.forward_passes import Weights, by_position, embeddings, last
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
        return _cosines(view, targets, last)


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
        return _cosines(view, targets, by_position)


def _cosines(view: View, targets: Sequence[Target], weights: Weights) -> Float32[Tensor, "s n"]:
    model = view.model()
    asked = _target_vectors(model, targets, view.tokens_per_batch, weights)
    scores = torch.full((len(targets), view.rows), -math.inf)
    for numbers, vectors in embeddings(model, view.encoded(), view.tokens_per_batch, weights):
        cosine = asked @ F.normalize(vectors, dim=1).T
        scores[:, numbers] = torch.where(torch.isfinite(cosine), cosine, -math.inf)
    return scores


def _target_vectors(
    model: LoadedModel, targets: Sequence[Target], tokens_per_batch: int, weights: Weights
) -> Float32[Tensor, "s d"]:
    """Mean over each target's queries of their representations of norm 1; a query that has none does not count."""
    queries = [query.encoded for target in targets for query in target.queries]
    owners = [number for number, target in enumerate(targets) for _ in target.queries]
    found: list[list[Tensor]] = [[] for _ in targets]
    for numbers, vectors in embeddings(model, queries, tokens_per_batch, weights):
        for number, vector in zip(numbers, F.normalize(vectors, dim=1), strict=True):
            if torch.isfinite(vector).all():
                found[owners[number]].append(vector)
    for target, vectors in zip(targets, found, strict=True):
        if not vectors:
            first = target.queries[0]
            reason = "the model's states for it are not finite" if first.encoded.ids else "it has no token"
            raise ModelError(
                f"no row can be compared with target {target.name!r}, query {first.prompt[:60]!r}: {reason}"
            )
        if missing := len(target.queries) - len(vectors):
            logger.warning("target %r: %d of %d queries have no finite states and do not count",
                           target.name, missing, len(target.queries))  # fmt: skip
    return torch.stack([torch.stack(vectors).mean(0) for vectors in found])
