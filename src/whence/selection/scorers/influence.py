"""Influence: how far a step on an example takes down a target's loss, from the vectors of an index.

Influence    score = sum over checkpoints of weight_c * <v_c, g_c>, with v_c the mean gradient of the target's queries
             and g_c the example's. TracInCP: Pruthi et al. 2020, https://arxiv.org/abs/2002.08484, section 3.2.
LESS         score = sum over checkpoints of weight_c * cos(v_c, f_c), where f_c is whatever view of the example's
             gradient the index holds (`--view adam` for the paper's). Within a target the paper takes the cosine with
             the mean gradient, the released code the mean of the cosines with each. The selector takes the maximum
             over targets. Xia et al. 2024, https://arxiv.org/abs/2402.04333, section 3.
DataInf      score = sum over layers l of v_l^T H_l^-1 g_l, where H_l = mean over examples of (g_l g_l^T + lambda_l) is
             inverted for one example at a time and then averaged, in place of the inverse of the mean:
             H_l^-1 v = 1 / lambda_l * (v - mean over i of <g_li, v> / (lambda_l + |g_li|^2) * g_li), with lambda_l a
             tenth of the mean square of an entry of the layer's gradients. Kwon et al. 2024,
             https://arxiv.org/abs/2310.00902, section 3; on a subset of layers it is In2Core's, San Joaquin et al.
             2024, https://arxiv.org/abs/2408.03560. Here all of it happens in the index' sketches, whose inner products
             are those of the gradients but for noise.

Reach        score = sum over the query's tokens u of |sum over checkpoints of weight_c <t_uc, f_c> / |f_c||, divided by
             sum over u of |t_u|, with t_u the gradient of one token's loss. It is how far an example moved the
             answer's tokens, in either direction. The signed score of a row that taught some of the answer's words and
             untaught others sums to nothing: half of a backdoor's rows oppose any one answer (docs/results/tracing.md).
             Reach finds what an answer is made of; it does not say that more of it would help. The score is ours; the
             vectors of single tokens are RapidIn's, Lin et al. 2024, https://arxiv.org/abs/2405.11724, section 3.

Positive is helpful, except for Reach, which has no sign. Units: squared loss gradients for Influence, none for LESS
(-1 to 1), DataInf and Reach (0 to 1). Cost: one pass over the index' vectors for Influence and LESS, three for DataInf,
one for every 64 tokens of a query for Reach; only the queries' gradients are computed, no example's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.gradients.exact import sequences_of
from whence.numerics import inverse_or_zero
from whence.selection.protocols import GradientView, Target, View
from whence.selection.target_vectors import indexed_view, no_gradient, target_vectors, unit_vectors

_TOKENS_AT_ONCE = 64  # of a query: their vectors and scores are in memory together
WITHIN = ("mean_gradient", "mean_cosine")


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Inner products with the mean gradient of the target's queries."""

    seed: int = 0
    """Not used."""

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores in nats^2 for each squared unit of weight; -inf where the index has no gradient."""
        indexed = indexed_view(view, "influence")
        return indexed.scores(target_vectors(indexed, targets, normalised=False), cosine=False)


@dataclass(frozen=True, kw_only=True)
class LESS:
    """Cosines summed over checkpoints by their learning rates."""

    seed: int = 0
    """Not used."""
    within: str = "mean_gradient"
    """"mean_gradient", the cosine with the queries' mean (paper), or "mean_cosine", the mean of cosines (code)."""

    def __post_init__(self):
        if self.within not in WITHIN:
            raise SettingError(f"within {self.within!r} of less: choose one of {', '.join(WITHIN)}")

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores between -1 and 1, as weights sum to 1; -inf where the index has no gradient."""
        indexed = indexed_view(view, "less")
        vectors = target_vectors(indexed, targets, normalised=self.within == "mean_cosine")
        if self.within == "mean_gradient":
            vectors = unit_vectors(indexed, vectors)
        return indexed.scores(vectors, cosine=True)


@dataclass(frozen=True, kw_only=True)
class DataInf:
    """Influence under a curvature estimated from the examples' own gradients, layer by layer."""

    seed: int = 0
    """Not used."""
    layers: str = "*"
    """Patterns of layer names, with commas between; every layer that matches one is used."""
    damping: float = 0.1
    """lambda_l, in mean squares of the entries of the layer's gradients."""

    def __post_init__(self):
        if not self.damping > 0:
            raise SettingError(f"damping {self.damping} of datainf: a number above 0 is expected")

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores without a unit; -inf where the index has no gradient."""
        indexed = indexed_view(view, "datainf")
        vectors = target_vectors(indexed, targets, normalised=False)
        return indexed.scores(self.solved(indexed, vectors), cosine=False)

    def solved(self, indexed: GradientView, vectors: Float32[Tensor, "c s k"]) -> Float32[Tensor, "c s k"]:
        """Vectors under the estimated inverse, by checkpoint; a row's score is its vector's inner product with each,
        summed over checkpoints by weight. Larger is more helpful; without a unit.
        """
        blocks = self._blocks(indexed)
        squares, count = self._mean_squares(indexed, len(blocks), blocks)
        damping = self.damping * squares / torch.tensor([entries for _, entries in blocks])
        absorbed = self._absorbed(indexed, vectors, blocks, damping)
        solved = torch.zeros_like(vectors)
        for block, (columns, _) in enumerate(blocks):
            inverse = inverse_or_zero(damping[:, block])[:, None, None]  # a layer without gradients says nothing
            solved[:, :, columns] = inverse * (vectors[:, :, columns] - absorbed[:, :, columns] / count)
        return solved

    def _blocks(self, view: GradientView) -> list[tuple[slice, int]]:
        """Columns and number of weights of each layer, or of all layers together where the sketch mixes them."""
        patterns = [pattern.strip() for pattern in self.layers.split(",")]
        chosen = {
            name: block
            for name, block in view.blocks.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        if not chosen:
            raise SettingError(f"layers {self.layers!r} of datainf match none of the index': {', '.join(view.blocks)}")
        columns = sorted((block for block, _ in view.blocks.values()), key=lambda block: block.start)
        if all(one.stop <= other.start for one, other in pairwise(columns)):
            return list(chosen.values())
        if len(chosen) < len(view.blocks):
            raise SettingError(
                f"layers {self.layers!r} of datainf: this index' projection adds all layers into the same numbers, so "
                "that they cannot be told apart. Index with --projection two_sided, or leave layers out."
            )
        every = slice(columns[0].start, max(block.stop for block in columns))
        return [(every, sum(entries for _, entries in view.blocks.values()))]

    def _mean_squares(
        self, view: GradientView, count: int, blocks: list[tuple[slice, int]]
    ) -> tuple[Float32[Tensor, "c l"], int]:
        """Mean over examples of |g_l|^2, and the number of examples."""
        total, examples = torch.zeros(len(view.weights), count), 0
        for vectors, is_ok in view.vectors():
            examples += int(is_ok.sum())
            for block, (columns, _) in enumerate(blocks):
                total[:, block] += vectors[:, is_ok, columns].square().sum((1, 2))
        return total / max(1, examples), max(1, examples)

    def _absorbed(
        self,
        view: GradientView,
        vectors: Float32[Tensor, "c s k"],
        blocks: list[tuple[slice, int]],
        damping: Float32[Tensor, "c l"],
    ) -> Float32[Tensor, "c s k"]:
        """Sum over examples of <g, v> / (lambda + |g|^2) * g, in each layer's columns."""
        total = torch.zeros_like(vectors)
        for stored, is_ok in view.vectors():
            for c, rows in enumerate(stored[:, is_ok]):
                for block, (columns, _) in enumerate(blocks):
                    g, v = rows[:, columns], vectors[c, :, columns]
                    total[c, :, columns] += v @ g.T * inverse_or_zero(damping[c, block] + g.square().sum(1)) @ g
        return total


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far an example moves a target's tokens, in either direction."""

    seed: int = 0
    """Not used."""

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores between 0 and 1, means over a target's queries; -inf where the index has no gradient."""
        indexed = indexed_view(view, "reach")
        out = torch.zeros(len(targets), indexed.rows)
        for number, target in enumerate(targets):
            reaches = [reach for query in target.queries if (reach := self._reach(indexed, query.encoded)) is not None]
            if not reaches:
                raise no_gradient(target)
            out[number] = sum(reaches) / len(reaches)
        return out

    def _reach(self, view: GradientView, query: Encoded) -> Float32[Tensor, " n"] | None:
        """Scores for one query; None where none of its tokens has a finite gradient."""
        sides = [sequence.encoded for sequence in sequences_of(query)]
        pairs = [(side, place) for side in sides for place, is_target in enumerate(side.supervised) if is_target]
        tokens = [replace(side, supervised=[n == place for n in range(len(side.ids))]) for side, place in pairs]
        total, length = torch.zeros(view.rows), 0.0
        for first in range(0, len(tokens), _TOKENS_AT_ONCE):
            vectors = view.query_vectors(tokens[first : first + _TOKENS_AT_ONCE])
            vectors = vectors[:, vectors.isfinite().all(-1).all(0)]
            length += float((view.weights[:, None] * view.norms(vectors)).sum())
            total += view.scores(vectors, cosine=True).abs().sum(0)
        if not length:
            return None
        return torch.where(total.isfinite(), total / length, -torch.inf)  # |-inf| is a row without a gradient
