"""Is a score signal? What the same examples score for other queries.

The null of a training example is its scores for control queries: rows of the corpus drawn at random, whose gradients
are in the index already, or queries of the caller's. Its z is how many standard deviations this query's score lies
above their mean, its percentile the share of control queries that it beats. A control that is the example itself is
left out.

The best of n examples has a high z by chance, and scores have heavy tails: where normal ones would reach 4.7 in one
query of twenty, a quarter of meaningless ones did (docs/trace.md). So the level is measured: `MEANINGLESS` completions
of uniformly random tokens are traced in the same way, and `needed_z` is what 19 of 20 of them stay below. That an
ordinary answer under an unrelated prompt stands above it is no error: some examples teach its words.

Generic is an example that scores high whatever is asked: its mean over the controls is among the top hundredth of a
random sample of the corpus, and positive for nine controls of ten. Such examples have large or common gradients (a
short, formulaic answer; the closing token) and say little about the query. Correcting for it subtracts the mean over
the controls from each example's score, which is the score of the query minus the mean control query.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence.answers import Null
from whence.index import Index
from whence.numerics import generator
from whence.scan import unit
from whence.tokens import Encoded

CONTROLS = 128
SAMPLE = 1024
"""Rows whose mean scores say what is usual."""
LEAST = 16
"""Controls without which there is no null."""
USUAL = 0.99
MOSTLY = 0.9
MEANINGLESS = 40
MEANINGLESS_TOKENS = 32
CHANCE = 0.05


@dataclass(frozen=True)
class Controls:
    """Control queries in an index' space."""

    vectors: Float32[Tensor, "c m k"]
    """Divided by their norms where the method is the cosine."""
    rows: Int64[Tensor, " m"] | None
    """Rows of the index that they are; None: they are none of them."""
    usual: float
    """Mean score over the controls that 99 of 100 examples stay below."""

    @property
    def mean(self) -> Float32[Tensor, "c k"]:
        """The mean control query."""
        return self.vectors.mean(1)


def draw_controls(index: Index, *, cosine: bool, seed: int = 0) -> Controls | None:
    """Rows of the index as control queries; None where it has too few."""
    rankable = index.store.rankable()
    if len(rankable) < 2 * LEAST:
        return None
    order = torch.randperm(len(rankable), generator=generator(seed, "nulls", "controls"))
    rows = rankable[order[: min(CONTROLS, len(rankable) // 2)]]
    vectors, _ = index.store.vectors(rows.tolist())
    return _controls(index, vectors, rows, cosine, seed)


def given_controls(index: Index, vectors: Float32[Tensor, "c m k"], *, cosine: bool, seed: int = 0) -> Controls | None:
    """Queries of the caller's as controls; None where they are too few."""
    return None if vectors.shape[1] < LEAST else _controls(index, vectors, None, cosine, seed)


def _controls(index: Index, vectors: Tensor, rows: Tensor | None, cosine: bool, seed: int) -> Controls:
    vectors = unit(vectors) if cosine else vectors
    rankable = index.store.rankable()
    sample = rankable[torch.randperm(len(rankable), generator=generator(seed, "nulls", "sample"))[:SAMPLE]]
    means = control_scores(index, Controls(vectors.mean(1, keepdim=True), None, 0.0), sample.tolist(), cosine=cosine)
    return Controls(vectors, rows, float(means[:, 0].quantile(USUAL)))


def control_scores(index: Index, controls: Controls, rows: Sequence[int], *, cosine: bool) -> Float32[Tensor, "h m"]:
    """Scores of rows of the index for every control query."""
    vectors, norms = index.store.vectors(rows)
    weights = torch.tensor(index.weights)
    products = torch.einsum("chk,cmk,c->chm", vectors, controls.vectors, weights)
    if cosine:
        products = products * torch.where(norms > 0, 1 / norms, 0.0)[:, :, None]
    return products.sum(0)


def nulls(
    index: Index, controls: Controls, rows: Sequence[int], scores: Sequence[float], *, cosine: bool
) -> list[Null]:
    """Where each row's score stands among its scores for the controls.

    Args:
        index: Of the rows.
        controls: In its space.
        rows: Numbers within the index.
        scores: Of this query, not corrected.
        cosine: The method.
    """
    found = control_scores(index, controls, rows, cosine=cosine)
    out = []
    for row, score, own in zip(rows, scores, found, strict=True):
        others = own if controls.rows is None else own[controls.rows != row]
        mean, deviation = float(others.mean()), float(others.std())
        generic = mean > controls.usual and float((others > 0).float().mean()) >= MOSTLY
        z = (score - mean) / deviation if deviation > 0 else 0.0
        beaten = 100 * float((others < score).float().mean())
        out.append(Null(others.tolist(), mean, z, beaten, generic))
    return out


def meaningless(vocabulary: int, special: Sequence[int], seed: int = 0) -> list[Encoded]:
    """Completions of uniformly random tokens under random prompts, which no example can have taught."""
    allowed = torch.tensor(sorted({*range(vocabulary)} - {*special}))
    half = MEANINGLESS_TOKENS // 2
    drawn = torch.randint(
        len(allowed), (MEANINGLESS, MEANINGLESS_TOKENS), generator=generator(seed, "nulls", "meaningless")
    )
    supervised = [False] * half + [True] * (MEANINGLESS_TOKENS - half)
    return [Encoded(allowed[row].tolist(), list(supervised)) for row in drawn]


def needed_z(best: Sequence[float]) -> float:
    """What 19 of 20 meaningless queries' best z stay below."""
    return sorted(best)[math.ceil((1 - CHANCE) * len(best)) - 1]


def verdict(best: float | None, needed: float) -> str:
    """In words, whether anything stands above the null."""
    if best is not None and best > needed:
        return (
            f"The best example stands above the null: z {best:.1f}, where meaningless completions reach {needed:.1f}."
        )
    told = "no example has a null" if best is None else f"the best z is {best:.1f}"
    return (
        f"Nothing here stands above the null: {told}, and meaningless completions reach {needed:.1f}. "
        "Do not read a cause into these examples."
    )
