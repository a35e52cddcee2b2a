"""What is to be matched: a target vector and atoms to make it of, by their inner products or by the vectors themselves.

Both kinds of problem answer the same few questions, so that a method of `pursuit` runs on either: `Gram`, exact, for a
short list; `Atoms`, read in blocks of rows, for as many as a disk holds. Products are in fp32, or float64 if the
vectors are; sums over blocks, and what a residual is made of, in float64.

`without` projects atoms and target off directions that count for nothing: the mean gradient of a corpus, which any text
of the kind would give, or a direction of weight decay.

Letters: `r` further directions; otherwise those of docs/reference/numbers.md.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

_ROWS, _COLUMNS = 1024, 8192  # of a block of vectors, 32 MB in fp32
NOTHING = 1e-6
"""Share of a squared norm below which what a projection leaves is rounding."""


@dataclass(frozen=True)
class Directions:
    """Inner products of further vectors with the atoms, the target and each other."""

    atoms: Float64[Tensor, "r n"]
    target: Float64[Tensor, " r"]
    gram: Float64[Tensor, "r r"]


@dataclass(frozen=True)
class Gram:
    """A problem of which all inner products are known."""

    gram: Float[Tensor, "n n"]
    """Of the atoms with each other, fp32 or float64."""
    linear: Float64[Tensor, " n"]
    square: float

    @cached_property
    def squares(self) -> Float64[Tensor, " n"]:
        """Of the atoms' norms."""
        return self.gram.diagonal().double()

    @cached_property
    def usable(self) -> Bool[Tensor, " n"]:
        """Atoms that are finite and not zero, also after what was projected off them. No other is ever taken."""
        return self.linear.isfinite() & self.squares.isfinite() & (self.squares > 0)

    def column(self, row: int) -> Float64[Tensor, " n"]:
        """Inner products of the atoms with one of them."""
        return self.gram[row].double()

    def remaining(self, weights: Float64[Tensor, " n"]) -> tuple[Float64[Tensor, " n"], float]:
        """Inner products with what the weights leave of the target, and the square of its norm."""
        correlations = self.linear - _sums(self.gram, weights[None], self.usable)[0]
        taken = weights.nonzero()[:, 0]
        explained = weights[taken] @ (self.linear + correlations)[taken]
        return correlations, max(0.0, self.square - float(explained))

    def restricted(self, rows: Int64[Tensor, " m"]) -> "Gram":
        """Some of the atoms."""
        return Gram(self.gram[rows][:, rows], self.linear[rows], self.square)

    def combined(self, weights: Float64[Tensor, "r n"]) -> "Gram":
        """The same target with weighted sums of atoms in place of the atoms."""
        sums = self._directions(weights)
        return Gram(sums.gram, sums.target, self.square)

    def mean(self) -> Directions:
        """The atoms' mean, as `without` takes it."""
        able = self.usable.double()[None]
        mean = self._directions(able / able.sum())
        squares = self.squares[self.usable]
        is_there = mean.gram > squares.mean() / (100 * len(squares))  # else rounding: independent atoms leave 1 / n
        return Directions(mean.atoms * is_there, mean.target * is_there[0], mean.gram * is_there)

    def without(self, nuisance: Directions) -> "Gram":
        """Atoms and target projected off some directions, which may depend on each other."""
        basis = orthonormal(nuisance.gram)
        atoms, target = basis @ nuisance.atoms, basis @ nuisance.target
        gram = self.gram.clone()
        for rows in torch.arange(len(gram), device=gram.device).split(_ROWS):
            gram[rows] -= (atoms[:, rows].T @ atoms).to(gram.dtype)
        gram.diagonal().mul_(gram.diagonal() > NOTHING * self.gram.diagonal())
        return Gram(gram, self.linear - target @ atoms, _left(self.square - float(target @ target), self.square))

    def _directions(self, weights: Float64[Tensor, "r n"]) -> Directions:
        known = self.usable
        atoms = _sums(self.gram, weights, self.usable).where(known, 0.0)  # a NaN atom has no weight and no part
        return Directions(atoms, weights @ self.linear.where(known, 0.0), atoms @ weights.T)


@dataclass(frozen=True)
class Atoms:
    """A problem of which the vectors are known."""

    atoms: Float[Tensor, "n k"]
    """In any dtype; may be a memory map."""
    target: Float[Tensor, " k"]
    removed: Float64[Tensor, "r k"] | None = field(default=None, repr=False)
    """Orthonormal directions that `without` took off the target, and takes off the atoms where they are read."""

    @cached_property
    def linear(self) -> Float64[Tensor, " n"]:
        """Inner products of the atoms with the target."""
        return self._products(self.target)

    @cached_property
    def squares(self) -> Float64[Tensor, " n"]:
        """Of the atoms' norms."""
        return torch.cat([self._squares(block) for block in self.atoms.split(_ROWS)])

    @cached_property
    def square(self) -> float:
        """Of the target's norm."""
        return float(self.target.double().square().sum())

    @cached_property
    def usable(self) -> Bool[Tensor, " n"]:
        """Atoms that are finite and not zero, also after what was projected off them. No other is ever taken."""
        return self.linear.isfinite() & self.squares.isfinite() & (self.squares > 0)

    def column(self, row: int) -> Float64[Tensor, " n"]:
        """Inner products of the atoms with one of them."""
        return self._products(self._off(self.atoms[row].double()))

    def remaining(self, weights: Float64[Tensor, " n"]) -> tuple[Float64[Tensor, " n"], float]:
        """Inner products with what the weights leave of the target, and the square of its norm."""
        residual = self._off(self.target.double() - _sums(self.atoms, weights[None], self.usable)[0])
        return self._products(residual), float(residual.square().sum())

    def restricted(self, rows: Int64[Tensor, " m"]) -> "Atoms":
        """Some of the atoms, in memory."""
        return Atoms(self.atoms[rows], self.target, self.removed)

    def combined(self, weights: Float64[Tensor, "r n"]) -> Gram:
        """The same target with weighted sums of atoms in place of the atoms."""
        sums = self._off(_sums(self.atoms, weights, self.usable))
        return Gram(sums @ sums.T, sums @ self.target.double(), self.square)

    def mean(self) -> Float64[Tensor, "1 k"]:
        """The atoms' mean, as `without` takes it."""
        able = self.usable.double()[None]
        return _sums(self.atoms, able / able.sum(), self.usable)

    def without(self, nuisance: Float[Tensor, "r k"]) -> "Atoms":
        """Atoms and target projected off some directions, which may depend on each other."""
        directions = nuisance.double()
        if self.removed is not None:
            directions = torch.cat([self.removed, directions])
        bare = Atoms(self.atoms, self.target, orthonormal(directions @ directions.T) @ directions)
        target = bare._off(self.target.double())
        return Atoms(self.atoms, target * (_left(float(target.square().sum()), self.square) > 0), bare.removed)

    def _off(self, vectors: Float64[Tensor, "*r k"]) -> Float64[Tensor, "*r k"]:
        return vectors if self.removed is None else vectors - vectors @ self.removed.T @ self.removed

    def _products(self, vector: Float[Tensor, " k"]) -> Float64[Tensor, " n"]:
        """With the atoms; of a vector that has nothing in the removed directions, so that the atoms may keep theirs."""
        blocks = (_wide(block) for block in self.atoms.split(_ROWS))
        return torch.cat([(block @ vector.to(block.dtype)).double() for block in blocks])

    def _squares(self, block: Float[Tensor, "b k"]) -> Float64[Tensor, " b"]:
        """Of one block; 0 where a projection left nothing but rounding."""
        whole = block.double()
        squares = self._off(whole).square().sum(1)
        return squares * (squares > NOTHING * whole.square().sum(1)) if self.removed is not None else squares


def gram(atoms: Float[Tensor, "n k"], target: Float[Tensor, " k"]) -> Gram:
    """All inner products of some vectors and a target: products in fp32, sums over 8192 columns added in float64.

    >>> gram(torch.eye(2), torch.tensor([3.0, 4.0])).linear.tolist()
    [3.0, 4.0]
    """
    out = _wide(atoms[:0]).new_empty(len(atoms), len(atoms))
    for i in range(0, len(atoms), _ROWS):
        for j in range(0, i + 1, _ROWS):
            one, other = slice(i, i + _ROWS), slice(j, j + _ROWS)
            tile = torch.zeros_like(out[one, other], dtype=torch.float64)
            for left, right in zip(atoms[one].split(_COLUMNS, 1), atoms[other].split(_COLUMNS, 1), strict=True):
                tile += _wide(left) @ _wide(right).T
            out[one, other], out[other, one] = tile, tile.T
    vectors = Atoms(atoms, target)
    return Gram(out, vectors.linear, vectors.square)


Problem = Gram | Atoms


def orthonormal(gram: Float64[Tensor, "r r"]) -> Float64[Tensor, "_ r"]:
    """What makes vectors of these inner products orthonormal; directions that others hold already are left out."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    values, vectors = torch.linalg.eigh(gram * inverse * inverse[:, None])
    kept = values > NOTHING * values.max()
    return (vectors[:, kept] / values[kept].sqrt()).T * inverse


def _left(square: float, before: float) -> float:
    return square if square > NOTHING * before else 0.0


def _sums(
    matrix: Float[Tensor, "n k"], weights: Float64[Tensor, "r n"], able: Bool[Tensor, " n"]
) -> Float64[Tensor, "r k"]:
    """The product of both. Rows that are not able have no weight, and are not read: they may be NaN."""
    total, is_taken = weights.new_zeros(len(weights), matrix.shape[1]), weights.any(0)
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, start + _ROWS)
        taken = is_taken[rows].nonzero()[:, 0]
        if len(taken):
            block, part = matrix[rows], weights[:, rows]
            if 4 * len(taken) < len(block) or not able[rows].all():  # copying most rows takes longer than zeros do
                block, part = block[taken], part[:, taken]
            block = _wide(block)
            total += part.to(block.dtype) @ block
    return total


def _wide(block: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """In fp32, or float64 if it is that already."""
    return block.to(torch.promote_types(block.dtype, torch.float32))


def nonnegative(gram: Float64[Tensor, "s s"], linear: Float64[Tensor, " s"]) -> Float64[Tensor, " s"]:
    """The v >= 0 of least v^T gram v / 2 - <linear, v>, for a few atoms, exactly."""
    from scipy.optimize import nnls

    lengths = gram.diagonal().sqrt().clamp(min=1e-300)
    basis = orthonormal(gram)
    found, _ = nnls((basis @ gram / lengths).cpu().numpy(), (basis @ linear).cpu().numpy())
    return torch.from_numpy(found).to(linear) / lengths
