"""Influence under the second moment of the rows' own vectors: TRAK's and TrackStar's inverse, in an index' sketches.

With Z the vectors of m rows of the index, each divided by sqrt(m), as lines [m k], and d = `damping` times the mean of
|z|^2 over these lines,

    R = Z^T Z + d,      R^-1 v = (v - Z^T (Z Z^T + d)^-1 Z v) / d                      (Woodbury: no k x k matrix)

TRAK         score = sum over checkpoints of weight_c * v_c^T R_c^-1 g_c, with v_c the mean gradient of the target's
             queries and g_c the row's. TRAK's own features are gradients of the log-odds; these are of the loss, which
             are those times 1 - p. Park et al. 2023, https://arxiv.org/abs/2303.14186, section 3.
TrackStar    score = sum over checkpoints of weight_c * the cosine of R_c^-1/2 v_c and R_c^-1/2 g_c, where a share
             `mixing` of R is of the queries' vectors in place of the rows': what all questions have in common then
             counts less. Its gradients are divided by an optimizer's second moment: an index of --view adam has that.
             Chang et al. 2025, https://arxiv.org/abs/2410.17413, section 3.

Larger is more helpful. TRAK has no unit but for damping, TrackStar is from -1 to 1. Cost: one pass over the vectors for
the Gram matrix of m rows (m^2 k), one for scores; TrackStar's norms take n m k more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from whence.errors import SettingError
from whence.numerics import generator, inverse_or_zero
from whence.selection.protocols import GradientView, Target, View
from whence.selection.target_vectors import indexed_view, target_vectors

MOST_ROWS = 4096
"""Rows by which the second moment is estimated, at most."""
DAMPING = 0.1
COLUMNS = 4096
"""Columns that are multiplied in double precision at a time."""


@dataclass(frozen=True)
class SecondMoment:
    """The damped second moment of some vectors."""

    lines: Float32[Tensor, "m k"]
    """Z."""
    damping: float
    """d."""
    solver: Float64[Tensor, "m m"]
    """Cholesky factor of Z Z^T + d."""

    @staticmethod
    def of(lines: Float32[Tensor, "m k"], damping: float) -> "SecondMoment":
        """Of lines whose squares add up, under `damping` in means of their squared norms.

        Products are taken in double precision: what is left of a vector may be a small part of it.
        """
        gram = _product(lines, lines)
        d = damping * float(gram.diagonal().mean()) or 1.0  # where all vectors are 0 nothing is divided
        gram.diagonal().add_(d)
        return SecondMoment(lines, d, torch.linalg.cholesky(gram))

    def solved(self, vectors: Float32[Tensor, "s k"]) -> Float32[Tensor, "s k"]:
        """R^-1 v of each."""
        shares = torch.cholesky_solve(_product(self.lines, vectors), self.solver)
        parts = zip(vectors.split(COLUMNS, 1), self.lines.split(COLUMNS, 1), strict=True)
        rest = [some.double() - shares.T @ lines.double() for some, lines in parts]
        return (torch.cat(rest, 1) / self.damping).float()

    def squared_norms(self, vectors: Float32[Tensor, "n k"]) -> Float32[Tensor, " n"]:
        """v^T R^-1 v of each."""
        products = _product(vectors, self.lines)
        absorbed = (products * torch.cholesky_solve(products.T, self.solver).T).sum(1)
        return ((vectors.double().square().sum(1) - absorbed) / self.damping).clamp_(min=0).float()


def _product(one: Float32[Tensor, "a k"], other: Float32[Tensor, "b k"]) -> Float64[Tensor, "a b"]:
    """Inner products in double precision, some columns at a time."""
    pairs = zip(one.split(COLUMNS, 1), other.split(COLUMNS, 1), strict=True)
    return sum((a.double() @ b.double().T for a, b in pairs), torch.zeros(len(one), len(other), dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class TRAK:
    """Inner products under the inverse of the rows' second moment."""

    seed: int = 0
    """Of the rows by which it is estimated, where these are not all."""
    damping: float = DAMPING
    sample: int = MOST_ROWS

    def __post_init__(self):
        _check("trak", self.damping, self.sample)

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores; -inf where the index has no gradient."""
        indexed = indexed_view(view, "trak")
        vectors = target_vectors(indexed, targets, normalised=False)
        return indexed.scores(self.solved(indexed, vectors), cosine=False)

    def solved(self, indexed: GradientView, vectors: Float32[Tensor, "c s k"]) -> Float32[Tensor, "c s k"]:
        """R_c^-1 v under each checkpoint; a row's score is its vector's inner product with each, summed by weight.

        Larger is more helpful; without a unit.
        """
        sampled = _sampled(indexed, self.sample, self.seed)
        return torch.stack([SecondMoment.of(rows / len(rows) ** 0.5, self.damping).solved(asked)
                            for rows, asked in zip(sampled, vectors, strict=True)])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackStar:
    """Cosines under the inverse of the second moment of rows and queries."""

    seed: int = 0
    """Of the rows by which it is estimated, where these are not all."""
    damping: float = DAMPING
    sample: int = MOST_ROWS
    mixing: float = 0.5
    """Share of the queries' second moment, from 0 to 1."""

    def __post_init__(self):
        _check("trackstar", self.damping, self.sample)
        if not 0 <= self.mixing <= 1:
            raise SettingError(f"mixing {self.mixing} of trackstar: a share from 0 to 1 is expected")

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores from -1 to 1; -inf where the index has no gradient."""
        indexed = indexed_view(view, "trackstar")
        vectors = target_vectors(indexed, targets, normalised=False)
        moments = [SecondMoment.of(self._mixed(rows, asked), self.damping)
                   for rows, asked in zip(_sampled(indexed, self.sample, self.seed), vectors, strict=True)]  # fmt: skip
        solved = torch.stack([moment.solved(asked) for moment, asked in zip(moments, vectors, strict=True)])
        lengths = (solved * vectors).sum(2).clamp(min=0).sqrt()
        solved = solved * inverse_or_zero(lengths)[:, :, None] * indexed.weights[:, None, None]
        out = torch.full((len(targets), indexed.rows), -torch.inf)
        first = 0
        for stored, is_ok in indexed.vectors():
            block = torch.zeros(len(targets), len(is_ok))
            for moment, rows, asked in zip(moments, stored, solved, strict=True):
                block += asked @ rows.T * inverse_or_zero(moment.squared_norms(rows).sqrt())
            out[:, first : first + len(is_ok)] = block.masked_fill(~is_ok, -torch.inf)
            first += len(is_ok)
        return out

    def _mixed(self, rows: Float32[Tensor, "m k"], queries: Float32[Tensor, "s k"]) -> Float32[Tensor, "l k"]:
        """Lines of both, brought to one size, so that the share is of what they weigh."""
        sides = []
        for lines, share in ((rows, 1 - self.mixing), (queries, self.mixing)):
            mean = lines.square().sum(1).mean()
            if share and mean:
                sides.append(lines * (share / (mean * len(lines))).sqrt())
        return torch.cat(sides) if sides else rows


def _check(name: str, damping: float, sample: int) -> None:
    if not damping > 0:
        raise SettingError(f"damping {damping} of {name}: a number above 0 is expected")
    if sample < 1:
        raise SettingError(f"sample {sample} of {name}: at least 1 is expected")


def _sampled(view: GradientView, most: int, seed: int) -> list[Float32[Tensor, "m k"]]:
    """Vectors of some rows that can be ranked, under each checkpoint."""
    drawn = torch.zeros(view.rows, dtype=torch.bool)
    drawn[torch.randperm(view.rows, generator=generator(seed, "second moment"))[:most]] = True
    some, first = [], 0
    for stored, is_ok in view.vectors():
        some.append(stored[:, is_ok & drawn[first : first + len(is_ok)]])
        first += len(is_ok)
    return list(torch.cat(some, 1))
