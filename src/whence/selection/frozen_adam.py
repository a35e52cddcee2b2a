"""The view frozen-v: Adam's features of the rows of a plain index, computed on the query's side.

With Adam's second moment held at the checkpoint's own, an example's features are f = a + D * g: a and D are arrays of
the moments (`gradients.adam.FrozenGamma`), the same for every example. So an index of plain gradients serves, whatever
its projection:

    <q, f>   = <q, a> + <D * q, g>
    |f|^2    = |a|^2 + 2 <D * a, g> + |D * g|^2

`FrozenView` shows this to the scorers: a query's vector holds D * q and q side by side. Vectors of D * q and D * a are
made as any gradient's are. |D * g|, which a plain index does not hold, is estimated as |g| times the median of
|D * g| / |g| in a sample of rows. For inner products the offset <q, a> moves no rank; in a cosine it matters more than
anything else, because a is about as long as D * g, and shares most of its direction with the query.

The approximation leaves out each example's own share in its second moment. That share is large early in a training,
where one example's g^2 is thousands of times the moment (a batch averages, and the moment begins at 0). Measured
against the view adam on a LoRA of r = 8 after 10 and 40 steps, over 500 rows without a projection
(`benchmarks/gradients/adam.py`): the cosine's rank correlation is 0.98 with `less` and 0.96 to 0.97 with `torch`, the
best 5% overlap by 78 to 89%; plain gradients have 0.76 to 0.78 and 71 to 74%. Inner products agree less, 0.72 to 0.85,
hardly better than plain gradients' 0.68 to 0.81: use the cosine.

Cost, for each checkpoint: two backward passes a query and one over the sample; every row is read once.
Source: none; LESS' own features are those of `gradients.adam`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from whence.corpus.tokens import Encoded, bucketed, collate, encode
from whence.errors import SettingError
from whence.gradients.adam import FrozenGamma
from whence.gradients.capture import Captured, backward, example_gradients
from whence.gradients.protocols import Projection
from whence.indexing.opening import Index
from whence.indexing.vectors import example_vectors
from whence.models.moments import read_moments
from whence.numerics import generator, inverse_or_zero
from whence.selection.views import IndexView

SAMPLE = 64
"""Rows whose gradients are formed to see how far D stretches them."""
NAME = "frozen-v"


@dataclass(frozen=True)
class _Offset:
    """The features' offset a, which all rows share under one checkpoint, and the stretch by D."""

    vector: Float32[Tensor, " k"]
    """a."""
    norm: float
    """|a|."""
    pull: Float32[Tensor, " k"]
    """D * a."""
    stretch: float
    """|D * g| / |g|."""

    def row_norms(self, rows: Float32[Tensor, "n k"], norms: Float32[Tensor, " n"]) -> Float32[Tensor, " n"]:
        """|f|, from rows' vectors and from their norms before projection and codec."""
        stretched = self.stretch * norms
        squares = self.norm**2 + 2 * rows @ self.pull + stretched**2
        least = (self.norm - stretched).square()  # by Cauchy and Schwarz; the vectors are estimates
        return squares.maximum(least).sqrt()


@dataclass(frozen=True)
class FrozenView(IndexView):
    """A plain index, read as if it held Adam's features.

    Raises:
        SettingError: The index has another view, or its layers are divided by their norms.
        ModelError: A checkpoint has no moments; raised when it is read.
    """

    adam_mode: str = "torch"
    """"torch" or "less"; see `adam`."""
    seed: int = 0
    """Seed of the sample of rows."""

    def __post_init__(self):
        space = self.index.space
        if (space.view, space.normalise) != ("sgd", "none"):
            raise SettingError(
                f"{self.index.store.place.root} has --view {space.view} --normalise {space.normalise}; the view {NAME} "
                "is a query's, on an index of --view sgd --normalise none."
            )

    def vectors(self) -> Iterator[tuple[Float32[Tensor, "c n k"], Bool[Tensor, " n"]]]:
        """Always refused: the features are never formed."""
        raise SettingError(
            f"--view {NAME} makes inner products and cosines (--method less, influence, reach), not the features "
            "themselves, which this method reads. Index with --view adam, or leave --view out."
        )

    def query_vectors(self, queries: Sequence[Encoded]) -> Float32[Tensor, "c q k2"]:
        """D * q, and q itself: k2 = 2 k. Not finite where a query has no gradient."""
        width = self.index.store.manifest.width
        out = torch.zeros(len(self.index.weights), len(queries), 2 * width)
        for checkpoint in reversed(range(len(self.index.weights))):  # the last one is loaded already
            model = self.index.model(checkpoint)
            layers, projection = self.index.layers(model), self.index.projection(model)
            frozen = FrozenGamma(read_moments(model, layers), mode=self.adam_mode)
            for half, transform in enumerate((frozen, None)):
                gradients = example_vectors(
                    model, layers, projection, list(queries), settings=self.index.settings, transform=transform
                )
                out[checkpoint, :, half * width : (half + 1) * width] = gradients.vectors
        return out

    def norms(self, vectors: Float32[Tensor, "c s k2"]) -> Float32[Tensor, "c s"]:
        """|q|."""
        return vectors[:, :, self.index.store.manifest.width :].norm(dim=2)

    def scores(self, vectors: Float32[Tensor, "c s k2"], *, cosine: bool) -> Float32[Tensor, "s n"]:
        """<D * q, g> + <q, a>, divided by |f| with `cosine`."""
        store, weights = self.index.store, self.index.weights
        scaled, plain = vectors.split(store.manifest.width, dim=2)
        out = torch.zeros(vectors.shape[1], store.rows)
        for checkpoint, offset in enumerate(self._offsets):
            for part, entry in enumerate(store.manifest.parts):
                shard, columns = store.shard(checkpoint, part), slice(entry.first_row, entry.first_row + entry.rows)
                rows = shard.decoded(store.codec, store.manifest.width)
                products = scaled[checkpoint] @ rows.T + (plain[checkpoint] @ offset.vector)[:, None]
                if cosine:
                    products *= inverse_or_zero(offset.row_norms(rows, shard.norm))
                out[:, columns] += torch.where(shard.status == 0, weights[checkpoint] * products, -torch.inf)
        return out

    @cached_property
    def _offsets(self) -> list[_Offset]:
        last_first = [self._offset(checkpoint) for checkpoint in reversed(range(len(self.index.weights)))]
        return last_first[::-1]  # the last one is loaded already

    def _offset(self, checkpoint: int) -> _Offset:
        model = self.index.model(checkpoint)
        layers, projection = self.index.layers(model), self.index.projection(model)
        frozen = FrozenGamma(read_moments(model, layers), mode=self.adam_mode)
        pulled = {layer: frozen.factors[layer] * offset for layer, offset in frozen.offsets.items()}
        return _Offset(
            vector=_sketched(frozen.offsets, projection),
            norm=float(torch.stack([offset.norm() for offset in frozen.offsets.values()]).norm()),
            pull=_sketched(pulled, projection),
            stretch=_stretch(self.index, checkpoint, frozen, self.seed),
        )


def _sketched(arrays: dict[str, Tensor], projection: Projection) -> Float32[Tensor, " k"]:
    row = torch.zeros(projection.width)
    for layer, array in arrays.items():
        row[projection.columns(layer)] += projection.flat(array[None], layer=layer)[0]
    return row


def _stretch(index: Index, checkpoint: int, frozen: FrozenGamma, seed: int) -> float:
    """Median of |D * g| / |g| over a sample of rows."""
    model, rankable = index.model(checkpoint), index.store.rankable()
    order = torch.randperm(len(rankable), generator=generator(seed, "frozen", "sample"))
    drawn = rankable[order[:SAMPLE]].sort().values
    longest, stretches = index.store.manifest.settings["max_tokens"], []
    stored_rows = index.store.read_rows(drawn.tolist())
    rows = [encode(json.loads(row["row"]), model.tokenizer, longest) for row in stored_rows]
    for numbers in bucketed([row.positions for row in rows], index.tokens_per_batch):
        squares = torch.zeros(2, len(numbers))

        def add(captured: Captured, squares: Tensor = squares) -> None:
            owners = torch.arange(squares.shape[1]) if captured.rows is None else captured.rows.cpu()
            for number, (a, g) in enumerate(zip(captured.a.split(1), captured.g.split(1), strict=True)):
                gradient = example_gradients(a, g)
                for kind, array in enumerate((gradient, frozen(gradient, captured.layer))):
                    squares[kind, owners[number]] += array.square().sum().cpu()

        batch = collate([rows[number] for number in numbers])
        backward(model, index.layers(model), batch, add, reduction=index.space.reduction, whole=True)
        stretches.append((squares[1] * inverse_or_zero(squares[0])).sqrt())
    return float(torch.cat(stretches).median()) if stretches else 0.0
