"""The view frozen-v: Adam's features of the rows of a plain index, worked out on the query's side.

With Adam's second moment held at the checkpoint's own, an example's features are f = a + D * g: a and D are arrays of
the moments (`adam.Frozen`), the same for every example. So an index of plain gradients serves, whatever its projection:

    <q, f>   = <q, a> + <D * q, g>
    |f|^2    = |a|^2 + 2 <D * a, g> + |D * g|^2

Vectors of D * q and D * a are taken as any gradient's are. Of |D * g|, which a plain index does not hold, it is |g|
times the median of |D * g| / |g| in a sample of rows. For inner products the offset <q, a> moves no rank; in a cosine
it matters more than anything else, for a is about as long as D * g, and shares most of its direction with the query.

What is lost is each example's own share in its second moment, and that is no trifle early in a training, where one
example's g^2 is thousands of times the moment (a batch averages, and the moment begins at 0). Measured against the view
adam on a LoRA of r = 8 after 10 and 40 steps, over 500 rows without a projection (`benchmarks/adam.py`): the cosine's
rank correlation is 0.98 with `less` and 0.96 to 0.97 with `torch`, the best 5% overlap by 78 to 89%; plain gradients
have 0.76 to 0.78 and 71 to 74%. Inner products agree less, 0.72 to 0.85, hardly better than plain gradients' 0.68 to
0.81: use the cosine.

Cost: two backward passes a query and one over the sample, a checkpoint; every row is read once.
Source: none; LESS' features are those of `adam`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.adam import Frozen
from whence.errors import SettingError
from whence.gradients import Captured, backward, example_gradients, inverse
from whence.index import Index
from whence.interfaces import Projection
from whence.moments import read_moments
from whence.numerics import generator
from whence.tokens import Encoded, bucketed, collate, encode
from whence.vectors import example_vectors

SAMPLE = 64
"""Rows whose gradients are formed to see how far D stretches them."""


@dataclass(frozen=True)
class _Side:
    """All that does not depend on the row, under one checkpoint."""

    queries: Float32[Tensor, "q k"]
    """D * q."""
    constants: Float32[Tensor, " q"]
    """<q, a>."""
    norms: Float32[Tensor, " q"]
    offset_norm: float
    """|a|."""
    pull: Float32[Tensor, " k"]
    """D * a."""
    stretch: float
    """|D * g| / |g|."""

    def scores(self, rows: Float32[Tensor, "n k"], norms: Float32[Tensor, " n"], cosine: bool) -> Tensor:
        """[q n], from rows' vectors and their norms before these were stored."""
        products = self.queries @ rows.T + self.constants[:, None]
        if not cosine:
            return products
        stretched = self.stretch * norms
        squares = self.offset_norm**2 + 2 * rows @ self.pull + stretched**2
        least = (self.offset_norm - stretched).square()  # by Cauchy and Schwarz; the vectors are estimates
        return products * inverse(squares.maximum(least).sqrt()) * inverse(self.norms)[:, None]


def frozen_scores(
    index: Index, queries: Sequence[Encoded], *, adam_mode: str = "torch", cosine: bool = True, seed: int = 0
) -> Float32[Tensor, "q n"]:
    """Scores of every row for every query, as by `--view adam` to first order, from an index of plain gradients.

    Args:
        index: Of `--view sgd`, of a run whose checkpoints have their optimizer files.
        queries: Each with a supervised token.
        adam_mode: "torch" or "less"; see `adam`.
        cosine: Both sides are divided by their norms.
        seed: Of the sample of rows.

    Returns:
        Summed over checkpoints by their weights; larger is more helpful. -inf where a row cannot be ranked.

    Raises:
        SettingError: The index is of another view, or its layers are divided by their norms.
        ModelError: A checkpoint has no moments.
    """
    if (index.space.view, index.space.normalise) != ("sgd", "none"):
        raise SettingError(
            f"{index.store.place.root} has --view {index.space.view} --normalise {index.space.normalise}; the view "
            "frozen-v is a query's, on an index of --view sgd --normalise none."
        )
    out = torch.zeros(len(queries), index.store.rows)
    for checkpoint in reversed(range(len(index.weights))):  # the last one is loaded already
        side = _side(index, checkpoint, queries, adam_mode, seed)
        for part, entry in enumerate(index.store.manifest.parts):
            shard, place = index.store.shard(checkpoint, part), slice(entry.first_row, entry.first_row + entry.rows)
            rows = shard.decoded(index.store.codec, index.store.manifest.width)
            scores = index.weights[checkpoint] * side.scores(rows, shard.norm, cosine)
            out[:, place] += torch.where(shard.status == 0, scores, -torch.inf)
    return out


def _side(index: Index, checkpoint: int, queries: Sequence[Encoded], mode: str, seed: int) -> _Side:
    model = index.model(checkpoint)
    layers, projection = index.layers(model), index.projection(model)
    frozen = Frozen(read_moments(model, layers), mode=mode)
    plain, scaled = (
        example_vectors(model, layers, projection, list(queries), settings=index.settings, transform=transform).vectors
        for transform in (None, frozen)
    )
    offset = _sketched(frozen.offsets, projection)
    pulled = {layer: frozen.factors[layer].cpu() * found for layer, found in frozen.offsets.items()}
    return _Side(
        queries=scaled,
        constants=plain @ offset,
        norms=plain.norm(dim=1),
        offset_norm=float(torch.stack([found.norm() for found in frozen.offsets.values()]).norm()),
        pull=_sketched(pulled, projection),
        stretch=_stretch(index, checkpoint, frozen, seed),
    )


def _sketched(arrays: dict[str, Tensor], projection: Projection) -> Float32[Tensor, " k"]:
    row = torch.zeros(projection.width)
    for layer, array in arrays.items():
        row[projection.columns(layer)] += projection.flat(array[None], layer=layer)[0]
    return row


def _stretch(index: Index, checkpoint: int, frozen: Frozen, seed: int) -> float:
    """Median of |D * g| / |g| over a sample of rows."""
    model, rankable = index.model(checkpoint), index.store.rankable()
    order = torch.randperm(len(rankable), generator=generator(seed, "frozen", "sample"))
    drawn = rankable[order[:SAMPLE]].sort().values
    longest, found = index.store.manifest.settings["max_tokens"], []
    kept = index.store.read_rows(drawn.tolist())
    rows = [encode(json.loads(row["row"]), model.tokenizer, longest) for row in kept]
    for numbers in bucketed([len(row.ids) for row in rows], index.settings.tokens_per_batch):
        squares = torch.zeros(2, len(numbers))

        def add(seen: Captured, squares: Tensor = squares) -> None:
            held = torch.arange(squares.shape[1]) if seen.rows is None else seen.rows.cpu()
            for place, (a, g) in enumerate(zip(seen.a.split(1), seen.g.split(1), strict=True)):
                formed = example_gradients(a, g)
                for kind, array in enumerate((formed, frozen(formed, seen.layer))):
                    squares[kind, held[place]] += array.square().sum().cpu()

        batch = collate([rows[number] for number in numbers])
        backward(model, index.layers(model), batch, add, reduction=index.space.reduction, whole=True)
        found.append((squares[1] * inverse(squares[0])).sqrt())
    return float(torch.cat(found).median()) if found else 0.0
