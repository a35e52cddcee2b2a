"""How deep to re-rank: so many rows of an index' ranking hold the exact first m with a probability of 95%.

The score of a row from an index differs from the exact one by what the sketch and the codec add. For a flat sketch of k
numbers (`gradients.flat_width.FLAT`), that has the mean 0 and, for a query q and a row x under one checkpoint, about

    variance = |q|^2 |x|^2 / k  [the sketch: JL]  +  |q|^2 noise^2  [the codec: `Codec.noise`]

both divided by |q|^2 |x|^2 for the cosine. In one bit the sum is 1.6 to 1.7 |q|^2 |x|^2 / k: on base-6m 0.0062 for the
cosine, where 0.0064 is measured (docs/results/indexing.md). Errors under several checkpoints are taken as if they were
one, which they are at most.

Exact scores of the candidates are drawn from normal distributions around the index' scores, `DRAWS` times. Of each draw
the deepest of its first m is noted; the depth is what 95 of 100 draws do not exceed. The scores themselves were drawn
once by the sketch, so that the best of them are too high, and draws around them alone would hold the first m in 91 to
94 of 100 simulated cases where they say 95; `MARGIN` widens them, and then it is 98. Of 50 queries of each of three
corpora over 2,000 rows of base-6m, 98, 100 and 100 of 100 had all of the exact first ten by cosine, and 96, 98 and 100
by inner product; of the last ten 96, 100 and 100, and by inner product 82, 98 and 90, where `DEEPEST` cuts lists short
(docs/LOG.md).

Other projections do not say their error: `DEEPEST` rows of each side are re-ranked.

Source: the bound of RaBitQ, Gao and Long 2024, https://arxiv.org/abs/2405.12497, section 4, which re-ranks what a bound
of each row's error leaves; here what all errors together leave.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.gradients.flat_width import FLAT
from whence.indexing.codecs import Codec
from whence.indexing.opening import Index
from whence.numerics import generator, inverse_or_zero

DEEPEST = 100
"""Rows of a side that are re-ranked at most."""
CANDIDATES = 400
"""Rows of a side whose scores are compared, at least."""
CANDIDATES_A_PLACE = 4
"""The same, for each place that is shown."""
SURE = 0.95
"""Probability that the exact first m are among the rows, where `DEEPEST` allows as many."""
DRAWS = 400
"""Draws of the exact scores: a probability of 95% is known to a percent."""
MARGIN = 1.15
"""Standard deviations of the draws for each of a score's own."""


@dataclass(frozen=True)
class Depth:
    """How far a ranking is re-ranked."""

    rows: int
    sure: float | None
    """Probability that the exact first m are among these rows; None: the projection does not say."""


def candidates(m: int, rows: int | None) -> int:
    """Rows of a side whose scores are compared, to find the first m among `rows` (None: as many as the noise asks)."""
    return max(CANDIDATES, CANDIDATES_A_PLACE * m, 2 * (rows or 0))


def depth(scores: Float32[Tensor, " n"], noise: Float32[Tensor, " n"] | None, m: int, rows: int | None = None) -> Depth:
    """How many of a ranking's first rows to re-rank, so that the exact first m are among them.

    Args:
        scores: Of the index, best first, and larger is better: of `candidates` rows, or of all there are.
        noise: Standard deviation of each; None where it is not known.
        m: Rows that are wanted.
        rows: Rows that are re-ranked whatever the noise, but for 2 m at least; None: as the noise asks for.
    """
    least = min(len(scores), 2 * m)
    deepest = min(len(scores), max(DEEPEST if rows is None else rows, least))
    if noise is None or not len(scores):
        return Depth(deepest, None)
    draws = torch.empty(DRAWS, len(scores))
    draws.normal_(generator=generator(0, "depth")).mul_(MARGIN * noise).add_(scores)
    needed = draws.topk(min(m, len(scores)), dim=1).indices.amax(1) + 1
    if rows is None:
        deepest = min(deepest, max(least, int(needed.sort().values[int(SURE * DRAWS)])))
    return Depth(deepest, float((needed <= deepest).float().mean()))


@dataclass(frozen=True)
class Noise:
    """Standard deviations of rows' scores around the exact ones, for queries of norm 1."""

    places: dict[int, int]
    """Row of `deviations`, by number within the index."""
    deviations: Float32[Tensor, "n c"]
    """Under each checkpoint, times its weight."""

    @staticmethod
    def of(index: Index, rows: Iterable[int], *, cosine: bool) -> "Noise | None":
        """Of rows of an index, by number; None where the projection does not say its error.

        Each file is opened once, however many queries ask for its rows.
        """
        if index.space.sketch not in FLAT:
            return None
        numbers, store = sorted({*rows}), index.store
        out = torch.zeros(len(numbers), len(index.weights))
        for part, places, within in store.manifest.located(numbers):
            for checkpoint, weight in enumerate(index.weights):
                shard = store.shard(checkpoint, part)
                norm = shard.norm[within]
                deviation = row_noise(norm, shard.scale[within], store.codec, store.manifest.width)
                out[places, checkpoint] = abs(weight) * deviation * (inverse_or_zero(norm) if cosine else 1.0)
        return Noise({number: place for place, number in enumerate(numbers)}, out)

    def for_query(self, rows: Sequence[int], lengths: Float32[Tensor, " c"]) -> Float32[Tensor, " n"]:
        """Of rows' scores for a query.

        Args:
            rows: Numbers within the index.
            lengths: Norm of the query under each checkpoint; 1 for the cosine.
        """
        return self.deviations[[self.places[row] for row in rows]] @ lengths.float()


def row_noise(norm: Float32[Tensor, " n"], scale: Float32[Tensor, " n"], codec: Codec, k: int) -> Float32[Tensor, " n"]:
    """Standard deviation of rows' inner products with a query of norm 1 that has little in common with them.

    Args:
        norm: Of the rows' sketches.
        scale: Of the rows' codes, for unbiased products.
        codec: How they are stored.
        k: Numbers in a sketch.
    """
    return (norm.square() / k + codec.noise(scale, norm, k).square()).sqrt()
