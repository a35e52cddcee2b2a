"""Is a score signal, or chance? The scores of the same examples for other queries tell.

The null of a training example is its scores for control queries: rows of the corpus drawn at random, whose gradients
are in the index already, or the user's queries. Its z is how many standard deviations this query's score lies above
their mean; its percentile is the share of control queries with a lower score. A control that is the example itself is
left out. Controls are scaled to the query's norm, so that z does not change with the size of a query's gradient.

The best of n examples has a high z by chance, and scores have heavy tails: normal scores would reach 4.7 in one query
of twenty, and a quarter of meaningless queries did (docs/results/tracing.md). So the level is measured, in
`tracing.levels`, for queries of the same length.

A generic example scores high for any query: its mean over the controls is among the top hundredth of a random sample of
the corpus, and its scores are positive for nine controls of ten. Such examples have large or common gradients (a short,
formulaic answer; the closing token) and say little about the query. The correction subtracts the mean over the controls
from each example's score, which gives the score of the query minus the mean control query. (For the few rows that are
controls themselves the correction includes a share of their own norm, 1/128 of a cosine of 1.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from whence.indexing.opening import Index
from whence.indexing.scan import unit
from whence.numerics import generator, inverse_or_zero
from whence.tracing.results import Null

CONTROLS = 128
BYTES = 2**28
"""Most bytes of the controls' vectors, and of the rows' vectors that are scored with them at a time."""
SAMPLE = 1024
"""Rows whose mean scores set the usual level."""
LEAST = 16
"""Fewest controls that make a null."""
USUAL = 0.99
MOSTLY = 0.9


@dataclass(frozen=True)
class Controls:
    """Control queries in an index' space, divided by their norms before they were stored."""

    vectors: Float32[Tensor, "c m k"]
    rows: Int64[Tensor, " m"] | None
    """Their numbers in the index; None for controls that are not rows of it."""
    usual: float
    """The mean score over the controls that 99 of 100 examples stay below."""
    products: dict[tuple[int, bool], Float32[Tensor, "c m"]] = field(default_factory=dict)
    """Weighted products of rows that were scored, by row and whether they are divided by the row's norm."""

    def mean(self, norms: Float32[Tensor, "c q"]) -> Float32[Tensor, "c q k"]:
        """The mean control query, scaled to queries' norms."""
        return self.vectors.mean(1)[:, None] * norms[:, :, None]


def control_rows(index: Index, *, seed: int = 0) -> Int64[Tensor, " m"] | None:
    """Rows of the index, drawn as control queries; None where it has too few."""
    rankable = index.store.rankable()
    if len(rankable) < 2 * LEAST:
        return None
    order = torch.randperm(len(rankable), generator=generator(seed, "nulls", "controls"))
    affordable = max(LEAST, BYTES // (4 * index.store.manifest.width * len(index.weights)))
    return rankable[order[: min(CONTROLS, len(rankable) // 2, affordable)]]


def row_controls(
    index: Index, *, cosine: bool, seed: int = 0, vectors: Float32[Tensor, "c m k"] | None = None
) -> Controls | None:
    """The rows of `control_rows` as controls; None where there are too few.

    Args:
        index: The index of the rows.
        cosine: Whether the method is the cosine.
        seed: Seed of `control_rows`.
        vectors: Their gradients as queries; None where the index holds these.
    """
    rows = control_rows(index, seed=seed)
    if rows is None:
        return None
    if vectors is not None:
        return _controls(index, unit(vectors), rows, cosine, seed)
    stored, norms = index.store.vectors(rows.tolist())
    return _controls(index, stored * inverse_or_zero(norms)[:, :, None], rows, cosine, seed)


def query_controls(index: Index, vectors: Float32[Tensor, "c m k"], *, cosine: bool, seed: int = 0) -> Controls | None:
    """The user's queries as controls; None where there are too few."""
    return None if vectors.shape[1] < LEAST else _controls(index, unit(vectors), None, cosine, seed)


def _controls(index: Index, vectors: Tensor, rows: Tensor | None, cosine: bool, seed: int) -> Controls:
    rankable = index.store.rankable()
    sample = rankable[torch.randperm(len(rankable), generator=generator(seed, "nulls", "sample"))[:SAMPLE]]
    mean = Controls(vectors.mean(1, keepdim=True), None, 0.0)
    means = control_scores(index, mean, sample.tolist(), cosine=cosine)
    return Controls(vectors, rows, float(means[:, 0].quantile(USUAL)))


def control_scores(
    index: Index, controls: Controls, rows: Sequence[int], *, cosine: bool, norms: Float32[Tensor, " c"] | None = None
) -> Float32[Tensor, "h m"]:
    """Scores of rows of the index for every control query; the controls have the norms `norms`, or 1."""
    products = controls.products
    new = [row for row in dict.fromkeys(rows) if (row, cosine) not in products]
    weights = torch.tensor(index.weights)
    step = max(1, BYTES // (16 * controls.vectors.shape[2] * len(weights)))
    for first in range(0, len(new), step):
        batch = new[first : first + step]
        vectors, lengths = index.store.vectors(batch)
        by_row = torch.einsum("chk,cmk,c->hcm", vectors, controls.vectors, weights)
        if cosine:
            by_row = by_row * inverse_or_zero(lengths).T[:, :, None]
        products |= {(row, cosine): own for row, own in zip(batch, by_row, strict=True)}
    if not len(rows):
        return torch.zeros(0, controls.vectors.shape[1])
    stacked = torch.stack([products[row, cosine] for row in rows])
    return (stacked if norms is None else stacked * norms[:, None]).sum(1)


@dataclass(frozen=True)
class _Places:
    """Places of rows' scores for a query among their scores for the controls."""

    scores: Float32[Tensor, "h m"]
    is_other: Bool[Tensor, "h m"]
    """Whether a control is another row."""
    mean: Float64[Tensor, " h"]
    z: Float64[Tensor, " h"]

    def share(self, holds: Bool[Tensor, "h m"]) -> Float64[Tensor, " h"]:
        """Share of the other rows among the controls for which something holds."""
        return (holds & self.is_other).sum(1).double() / self.is_other.sum(1)


def _places(controls: Controls, rows: Sequence[int], scores: Sequence[float], for_controls: Tensor) -> _Places:
    is_other = torch.ones(for_controls.shape, dtype=torch.bool)
    if controls.rows is not None:
        is_other = torch.tensor(rows)[:, None] != controls.rows
    count, values = is_other.sum(1), for_controls.double()
    mean = (values * is_other).sum(1) / count
    deviation = (((values - mean[:, None]) * is_other).square().sum(1) / (count - 1)).sqrt()
    z = (torch.tensor(scores, dtype=torch.float64) - mean) * inverse_or_zero(deviation)
    return _Places(for_controls, is_other, mean, z)


def best_z(
    index: Index,
    controls: Controls,
    rows: Sequence[int],
    scores: Sequence[float],
    *,
    cosine: bool,
    norms: Float32[Tensor, " c"] | None = None,
) -> float:
    """The highest z of some rows, as `nulls` has it; 0 without rows."""
    for_controls = control_scores(index, controls, rows, cosine=cosine, norms=norms)
    return float(_places(controls, rows, scores, for_controls).z.max()) if len(rows) else 0.0


def nulls(
    index: Index,
    controls: Controls,
    rows: Sequence[int],
    scores: Sequence[float],
    *,
    cosine: bool,
    norms: Float32[Tensor, " c"] | None = None,
) -> list[Null]:
    """Where each row's score stands among its scores for the controls.

    Args:
        index: The index of the rows.
        controls: Control queries in its space.
        rows: Numbers within the index.
        scores: The rows' scores for this query, not corrected.
        cosine: Whether the method is the cosine.
        norms: This query's norm under each checkpoint; None for the cosine, which is 1.
    """
    scaled = control_scores(index, controls, rows, cosine=cosine, norms=norms)
    unscaled = scaled if norms is None else control_scores(index, controls, rows, cosine=cosine)
    if not len(rows):
        return []
    places = _places(controls, rows, scores, scaled)
    usual = (unscaled.double() * places.is_other).sum(1) / places.is_other.sum(1)
    generic = (usual > controls.usual) & (places.share(scaled > 0) >= MOSTLY)
    percentile = 100 * places.share(scaled < torch.tensor(scores)[:, None])
    columns = (places.mean, places.z, percentile, generic, torch.tensor(scores))
    return [
        Null(own[is_other].tolist(), *values)
        for own, is_other, *values in zip(
            scaled, places.is_other, *(column.tolist() for column in columns), strict=True
        )
    ]
