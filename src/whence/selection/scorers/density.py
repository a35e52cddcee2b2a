"""Density: how rare a row is in the corpus, whatever the target.

Each of R hash functions puts a row's embedding x in one of B buckets: h_r(x) = floor((w_r . x + b_r) / width) mod B,
with w_r standard normal and b_r uniform in [0, width]. Near rows share many buckets: two at distance c share one with

    k(c) = integral from 0 to width of f(t / c) / c (1 - t / width) dt,   f the half-normal density,

so that density(x) = mean over r of (rows in h_r(x)) / n estimates the mean of k over the corpus, the row included, from
1 / n for a row that is alone to 1. score = -log density: a rarer row scores higher, from 0 to log n nats. That is
inverse propensity: a selector at temperature 1 samples without replacement with probabilities as 1 / density, which
covers the corpus evenly; at temperature 0 it takes the outliers, noise and all.

Embeddings are the means of the model's last hidden states over a row's tokens (the source has a sentence encoder's);
they are not divided by their norms. The width decides everything: by default it is half the median distance between
pairs of 1,000 rows. Targets are not read: each gets the same scores.

Cost: one forward pass over every row, another over 1,000 rows for the width, and n R d multiplications. Memory: 4 R B
bytes of counts (80 MB), and 2 R bytes of buckets for each row, up to `STORED_BYTES` in all; a larger corpus takes a
second forward pass instead, and memory no longer grows with it.

Source: Sachdeva et al. 2024, How to Train Data-Efficient LLMs, https://arxiv.org/abs/2402.09668; the hash is that of
Datar et al. 2004, https://doi.org/10.1145/997817.997857.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Shaped
from torch import Tensor

from whence.errors import SettingError
from whence.gradients.forward_passes import embeddings, even_weights
from whence.numerics import generator
from whence.selection.protocols import Target, View

STORED_BYTES = 2**31
"""Most bytes of all rows' buckets in memory; a larger corpus is read twice."""
SAMPLED = 1000
"""Rows whose distances set the width."""


@dataclass(frozen=True, kw_only=True)
class Density:
    """Minus the log of the estimated density; -inf for a row without tokens or with states that are not finite."""

    seed: int = 0
    """Seed of the hash functions, and of the rows whose distances set the width."""
    functions: int = 1000
    """R, the number of hash functions."""
    buckets: int = 20_000
    """B, the number of buckets of each function."""
    width: float | None = None
    """Width of a bucket, in the embedding's unit; None: half the median distance of pairs."""

    def __post_init__(self):
        if self.functions < 1 or self.buckets < 2:
            raise SettingError(
                f"density by {self.functions} functions of {self.buckets} buckets: at least 1 and 2 are expected"
            )
        if self.width is not None and not 0 < self.width < math.inf:
            raise SettingError(f"width {self.width} of density's buckets: a number above 0 is expected")

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores in nats, the same for every target."""
        sketch = self._sketch(view)
        stored = []
        is_stored = view.rows * self.functions * sketch.dtype.itemsize <= STORED_BYTES
        for numbers, codes in self._codes(view, sketch):
            sketch.add(codes)
            if is_stored:
                stored.append((numbers, codes))
        scores = torch.full((view.rows,), -math.inf)
        for numbers, codes in stored if is_stored else self._codes(view, sketch):
            scores[numbers] = -sketch.density(codes).log().float()
        return scores.expand(len(targets), -1).clone()

    def _sketch(self, view: View) -> "Sketch":
        sample = _sample(view, self.seed)
        width = self.width if self.width is not None else default_width(sample)
        rng = generator(self.seed, "density", "functions")
        normals = torch.randn(sample.shape[1], self.functions, generator=rng)
        return Sketch(normals, torch.rand(self.functions, generator=rng), width, self.buckets)

    def _codes(self, view: View, sketch: "Sketch") -> Iterator[tuple[list[int], Shaped[Tensor, "b r"]]]:
        """Buckets of the rows that have an embedding."""
        for numbers, vectors in embeddings(
            view.model(), view.encoded(), view.tokens_per_batch, even_weights, view.rows
        ):
            finite = torch.isfinite(vectors).all(1)
            embedded = [number for number, is_finite in zip(numbers, finite.tolist(), strict=True) if is_finite]
            yield embedded, sketch.codes(vectors[finite])


class Sketch:
    """Counts of rows by hash function and bucket.

    Args:
        normals: w, a column for each function.
        offsets: b / width.
        width: Width of a bucket.
        buckets: B.
    """

    def __init__(self, normals: Float32[Tensor, "d r"], offsets: Float32[Tensor, " r"], width: float, buckets: int):
        self.normals = normals
        self.offsets = offsets
        self.width = width
        self.buckets = buckets
        self.dtype = torch.int16 if buckets <= 2**15 else torch.int32
        self.counts = torch.zeros(normals.shape[1], buckets, dtype=torch.int32)
        self.rows = 0

    def codes(self, vectors: Float32[Tensor, "b d"]) -> Shaped[Tensor, "b r"]:
        """Bucket of each row by each function."""
        positions = (vectors @ self.normals).double() / self.width + self.offsets
        return positions.floor().remainder(self.buckets).to(self.dtype)

    def add(self, codes: Shaped[Tensor, "b r"]) -> None:
        """Count these rows."""
        ones = torch.ones(codes.shape[::-1], dtype=torch.int32)
        self.counts.scatter_add_(1, codes.T.long(), ones)
        self.rows += len(codes)

    def density(self, codes: Shaped[Tensor, "b r"]) -> Float64[Tensor, " b"]:
        """Share of the counted rows that are in the same bucket as each of these rows, mean over functions."""
        return self.counts.gather(1, codes.T.long()).double().mean(0) / self.rows


def _sample(view: View, seed: int) -> Float32[Tensor, "m d"]:
    """Finite embeddings of at most `SAMPLED` rows."""
    drawn = set(torch.randperm(view.rows, generator=generator(seed, "density", "sample"))[:SAMPLED].tolist())
    rows = (row for number, row in enumerate(view.encoded()) if number in drawn)
    batches = [
        vectors for _, vectors in embeddings(view.model(), rows, view.tokens_per_batch, even_weights, len(drawn))
    ]
    if not batches:
        return torch.zeros(0, 1)
    vectors = torch.cat(batches)
    return vectors[torch.isfinite(vectors).all(1)]


def default_width(sample: Float[Tensor, "m d"]) -> float:
    """Half the median distance between two different rows; 1 where no two differ, as any width will do then.

    >>> default_width(torch.tensor([[0.0], [0.0], [3.0]]))
    1.5
    """
    distances = torch.pdist(sample)
    different = distances[distances > 0]
    return 0.5 * different.median().item() if len(different) else 1.0
