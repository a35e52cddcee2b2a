"""A matching problem: a signal and the atoms to make it of, by their inner products or by the vectors themselves.

The two kinds of problem have the same methods, so that a solver of `pursuit` runs on either: `GramProblem` is exact,
for a short list; `VectorProblem` is read in blocks of rows, for as many as a disk holds. Products are in fp32, or in
float64 if the vectors are; sums over blocks, and the terms of a residual, are in float64.

`without` projects atoms and signal off nuisance directions, such as the mean gradient of a corpus, which any text of
the kind would give.

Letters: `r` nuisance directions or weighted sums; otherwise those of docs/reference/numbers.md.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

_ROWS, _COLUMNS = 1024, 8192  # of a block of vectors, 32 MB in fp32
ROUNDING_SHARE = 1e-6
"""Share of a squared norm: a projection that leaves less of it leaves rounding only."""


@dataclass(frozen=True)
class NuisanceProducts:
    """Inner products of nuisance directions with the atoms, the signal and each other."""

    atoms: Float64[Tensor, "r n"]
    signal: Float64[Tensor, " r"]
    gram: Float64[Tensor, "r r"]


@dataclass(frozen=True)
class GramProblem:
    """A problem given by all inner products."""

    gram: Float[Tensor, "n n"]
    """Inner products of the atoms with each other, fp32 or float64."""
    linear: Float64[Tensor, " n"]
    """Inner products of the atoms with the signal."""
    square: float
    """Squared norm of the signal."""

    @cached_property
    def squares(self) -> Float64[Tensor, " n"]:
        """Squared norms of the atoms."""
        return self.gram.diagonal().double()

    @cached_property
    def usable(self) -> Bool[Tensor, " n"]:
        """Whether an atom is finite and not zero, projected as it is. No other is ever chosen."""
        return self.linear.isfinite() & self.squares.isfinite() & (self.squares > 0)

    def column(self, row: int) -> Float64[Tensor, " n"]:
        """Inner products of all atoms with one of them."""
        return self.gram[row].double()

    def remaining(self, weights: Float64[Tensor, " n"]) -> tuple[Float64[Tensor, " n"], float]:
        """Inner products of the atoms with the residual that the weights leave of the signal; its squared norm."""
        correlations = self.linear - _sums(self.gram, weights[None], self.usable)[0]
        support = weights.nonzero()[:, 0]
        explained = weights[support] @ (self.linear + correlations)[support]
        return correlations, max(0.0, self.square - float(explained))

    def restricted(self, rows: Int64[Tensor, " m"]) -> "GramProblem":
        """The problem with some of the atoms."""
        return GramProblem(self.gram[rows][:, rows], self.linear[rows], self.square)

    def combined(self, weights: Float64[Tensor, "r n"]) -> "GramProblem":
        """The same signal with weighted sums of atoms in place of the atoms."""
        sums = self._directions(weights)
        return GramProblem(sums.gram, sums.signal, self.square)

    def mean(self) -> NuisanceProducts:
        """The atoms' mean, as `without` takes it."""
        usable = self.usable.double()[None]
        mean = self._directions(usable / usable.sum())
        squares = self.squares[self.usable]
        is_there = mean.gram > squares.mean() / (100 * len(squares))  # else rounding: independent atoms leave 1 / n
        return NuisanceProducts(mean.atoms * is_there, mean.signal * is_there[0], mean.gram * is_there)

    def without(self, nuisance: NuisanceProducts) -> "GramProblem":
        """The problem with atoms and signal projected off some directions, which may depend on each other."""
        basis = orthonormal(nuisance.gram)
        atoms, signal = basis @ nuisance.atoms, basis @ nuisance.signal
        gram = self.gram.clone()
        for rows in torch.arange(len(gram), device=gram.device).split(_ROWS):
            gram[rows] -= (atoms[:, rows].T @ atoms).to(gram.dtype)
        gram.diagonal().mul_(gram.diagonal() > ROUNDING_SHARE * self.gram.diagonal())
        square = _above_rounding(self.square - float(signal @ signal), self.square)
        return GramProblem(gram, self.linear - signal @ atoms, square)

    def _directions(self, weights: Float64[Tensor, "r n"]) -> NuisanceProducts:
        usable = self.usable
        atoms = _sums(self.gram, weights, self.usable).where(usable, 0.0)  # a NaN atom has no weight and adds nothing
        return NuisanceProducts(atoms, weights @ self.linear.where(usable, 0.0), atoms @ weights.T)


@dataclass(frozen=True)
class VectorProblem:
    """A problem given by the vectors themselves."""

    atoms: Float[Tensor, "n k"]
    """Vectors of any dtype; may be a memory map."""
    signal: Float[Tensor, " k"]
    removed: Float64[Tensor, "r k"] | None = field(default=None, repr=False)
    """Orthonormal directions that `without` took off the signal; they are taken off atoms when these are read."""

    @cached_property
    def linear(self) -> Float64[Tensor, " n"]:
        """Inner products of the atoms with the signal."""
        return self._products(self.signal)

    @cached_property
    def squares(self) -> Float64[Tensor, " n"]:
        """Squared norms of the atoms."""
        return torch.cat([self._squares(block) for block in self.atoms.split(_ROWS)])

    @cached_property
    def square(self) -> float:
        """Squared norm of the signal."""
        return float(self.signal.double().square().sum())

    @cached_property
    def usable(self) -> Bool[Tensor, " n"]:
        """Whether an atom is finite and not zero, projected as it is. No other is ever chosen."""
        return self.linear.isfinite() & self.squares.isfinite() & (self.squares > 0)

    def column(self, row: int) -> Float64[Tensor, " n"]:
        """Inner products of all atoms with one of them."""
        return self._products(self._off(self.atoms[row].double()))

    def remaining(self, weights: Float64[Tensor, " n"]) -> tuple[Float64[Tensor, " n"], float]:
        """Inner products of the atoms with the residual that the weights leave of the signal; its squared norm."""
        residual = self._off(self.signal.double() - _sums(self.atoms, weights[None], self.usable)[0])
        return self._products(residual), float(residual.square().sum())

    def restricted(self, rows: Int64[Tensor, " m"]) -> "VectorProblem":
        """The problem with some of the atoms, in memory."""
        return VectorProblem(self.atoms[rows], self.signal, self.removed)

    def combined(self, weights: Float64[Tensor, "r n"]) -> GramProblem:
        """The same signal with weighted sums of atoms in place of the atoms."""
        sums = self._off(_sums(self.atoms, weights, self.usable))
        return GramProblem(sums @ sums.T, sums @ self.signal.double(), self.square)

    def mean(self) -> Float64[Tensor, "1 k"]:
        """The atoms' mean, as `without` takes it."""
        usable = self.usable.double()[None]
        return _sums(self.atoms, usable / usable.sum(), self.usable)

    def without(self, nuisance: Float[Tensor, "r k"]) -> "VectorProblem":
        """The problem with atoms and signal projected off some directions, which may depend on each other."""
        directions = nuisance.double()
        if self.removed is not None:
            directions = torch.cat([self.removed, directions])
        bare = VectorProblem(self.atoms, self.signal, orthonormal(directions @ directions.T) @ directions)
        signal = bare._off(self.signal.double())
        square = _above_rounding(float(signal.square().sum()), self.square)
        return VectorProblem(self.atoms, signal * (square > 0), bare.removed)

    def _off(self, vectors: Float64[Tensor, "*r k"]) -> Float64[Tensor, "*r k"]:
        return vectors if self.removed is None else vectors - vectors @ self.removed.T @ self.removed

    def _products(self, vector: Float[Tensor, " k"]) -> Float64[Tensor, " n"]:
        """Inner products of the atoms with a vector orthogonal to the removed directions: atoms need no projection."""
        blocks = (_wide(block) for block in self.atoms.split(_ROWS))
        return torch.cat([(block @ vector.to(block.dtype)).double() for block in blocks])

    def _squares(self, block: Float[Tensor, "b k"]) -> Float64[Tensor, " b"]:
        """Squared norms of one block; 0 where a projection left only rounding."""
        whole = block.double()
        squares = self._off(whole).square().sum(1)
        return squares * (squares > ROUNDING_SHARE * whole.square().sum(1)) if self.removed is not None else squares


def gram_problem(atoms: Float[Tensor, "n k"], signal: Float[Tensor, " k"]) -> GramProblem:
    """The problem given by all inner products: products in fp32, sums over 8192 columns added in float64.

    >>> gram_problem(torch.eye(2), torch.tensor([3.0, 4.0])).linear.tolist()
    [3.0, 4.0]
    """
    out = _wide(atoms[:0]).new_empty(len(atoms), len(atoms))
    for i in range(0, len(atoms), _ROWS):
        for j in range(0, i + 1, _ROWS):
            rows, columns = slice(i, i + _ROWS), slice(j, j + _ROWS)
            tile = torch.zeros_like(out[rows, columns], dtype=torch.float64)
            for left, right in zip(atoms[rows].split(_COLUMNS, 1), atoms[columns].split(_COLUMNS, 1), strict=True):
                tile += _wide(left) @ _wide(right).T
            out[rows, columns], out[columns, rows] = tile, tile.T
    vectors = VectorProblem(atoms, signal)
    return GramProblem(out, vectors.linear, vectors.square)


Problem = GramProblem | VectorProblem


def orthonormal(gram: Float64[Tensor, "r r"]) -> Float64[Tensor, "_ r"]:
    """Coefficients that make vectors of these inner products orthonormal; dependent directions are left out."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    values, vectors = torch.linalg.eigh(gram * inverse * inverse[:, None])
    independent = values > ROUNDING_SHARE * values.max()
    return (vectors[:, independent] / values[independent].sqrt()).T * inverse


def _above_rounding(square: float, before: float) -> float:
    """A squared norm after a projection; 0 if only rounding is left of it."""
    return square if square > ROUNDING_SHARE * before else 0.0


def _sums(
    matrix: Float[Tensor, "n k"], weights: Float64[Tensor, "r n"], usable: Bool[Tensor, " n"]
) -> Float64[Tensor, "r k"]:
    """The product weights @ matrix. Rows that are not usable have no weight, and are not read: they may be NaN."""
    total, has_weight = weights.new_zeros(len(weights), matrix.shape[1]), weights.any(0)
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, start + _ROWS)
        support = has_weight[rows].nonzero()[:, 0]
        if len(support):
            block, factors = matrix[rows], weights[:, rows]
            if 4 * len(support) < len(block) or not usable[rows].all():  # copying most rows takes longer than zeros do
                block, factors = block[support], factors[:, support]
            block = _wide(block)
            total += factors.to(block.dtype) @ block
    return total


def _wide(block: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The block in fp32, or in float64 if it is that already."""
    return block.to(torch.promote_types(block.dtype, torch.float32))


def nonnegative(gram: Float64[Tensor, "s s"], linear: Float64[Tensor, " s"]) -> Float64[Tensor, " s"]:
    """The v >= 0 that minimises v^T gram v / 2 - <linear, v>, exactly, for a few atoms."""
    from scipy.optimize import nnls

    lengths = gram.diagonal().sqrt().clamp(min=1e-300)
    basis = orthonormal(gram)
    solution, _ = nnls((basis @ gram / lengths).cpu().numpy(), (basis @ linear).cpu().numpy())
    return torch.from_numpy(solution).to(linear) / lengths
