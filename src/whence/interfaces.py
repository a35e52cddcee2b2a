"""The Protocols that methods implement, and the settings that decide what vector an example becomes.

One alphabet in shapes: `b` batch, `t` tokens, `i` a layer's input, `o` its output, `k` sketch width, `n` training
examples, `q` queries, `c` checkpoints, `l` layers, `v` vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Float32
from torch import Tensor

from whence.corpus import Row
from whence.errors import SettingError
from whence.model import LoadedModel
from whence.tokens import Encoded

Shapes = Mapping[str, tuple[int, int]]
"""`(o, i)` of every traced layer by name, in the model's own order."""


@runtime_checkable
class Projection(Protocol):
    """A linear map from a model's gradient to `k` numbers, made of one map a layer.

    The whole gradient's sketch is the sum over layers of `columns(layer)` filled with the layer's block: projections
    that concatenate give every layer its own columns, projections that add give every layer all of them. For each
    seed it is the same map on any device, worker and batch size, and over seeds its inner products are unbiased:
    E <sketch(x), sketch(y)> = <x, y>.
    """

    width: int
    """`k`, the numbers a row."""

    def columns(self, layer: str) -> slice:
        """Where in a row the layer's block goes."""
        ...

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """Sketch of `sum over t of g_t a_t^T`, as fp32. `a` and `g` are fp32; padded positions have g = 0."""
        ...


class MakeProjection(Protocol):
    """What the catalogue lists: the layers' shapes, a width (None for the method's own) and a seed."""

    def __call__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0) -> Projection: ...


@dataclass(frozen=True, kw_only=True)
class GradientSpace:
    """All that decides what vector an example becomes. A query is scored only in the space of its index."""

    layers: str | None = None
    """Patterns of layer names; None for the default choice of `LoadedModel.layers`."""
    reduction: str = "mean"
    """Over an example's supervised tokens: "mean", as a Trainer's loss of one row, or "sum"."""
    normalise: str = "none"
    """"layer" divides each layer's gradient by its norm, as RapidIn does; a score then weighs all layers alike."""
    view: str = "sgd"
    """The optimizer's view of a gradient; "sgd" takes it as it is."""
    projection: str = "two_sided"
    """Name in `catalogue.PROJECTIONS`."""
    width: int | None = None
    """Of the projection: a side of `two_sided` (16 gives 16 x 16 a layer), the total of the others; None: its own."""
    seed: int = 0

    def __post_init__(self):
        if self.reduction not in ("mean", "sum"):
            raise SettingError(f"--reduction {self.reduction}: choose mean or sum")
        if self.normalise not in ("none", "layer"):
            raise SettingError(f"--normalise {self.normalise}: choose none or layer")
        if self.view != "sgd":
            raise SettingError(f"--view {self.view}: this version has the view sgd alone")
        if self.width is not None and self.width < 1:
            raise SettingError(f"--width {self.width}: a positive number is expected")

    def as_json(self) -> dict[str, Any]:
        """The fields by name, for a manifest.

        `normalise` is left out where it is "none", as in an index that was built before there was a choice.
        """
        return {name: value for name, value in asdict(self).items() if (name, value) != ("normalise", "none")}


@dataclass(frozen=True)
class QueryText:
    """A query as a scorer reads it: as text and as token ids."""

    prompt: str
    completion: str
    encoded: Encoded
    """Prompt and completion, laid out like a row of the corpus; the completion is supervised."""


@runtime_checkable
class View(Protocol):
    """What a scorer reads of an indexed corpus. Rows always come in the index's own order."""

    @property
    def rows(self) -> int:
        """`n`."""
        ...

    @property
    def tokens_per_batch(self) -> int:
        """Most tokens of one forward pass, padding included."""
        ...

    def examples(self) -> Iterator[Row]:
        """Every corpus row, also those that are never ranked."""
        ...

    def encoded(self) -> Iterator[Encoded]:
        """The same rows as token ids, cut as the index cut them."""
        ...

    def model(self) -> LoadedModel:
        """The model of the last checkpoint."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """A score of every training example for every query, from whatever a `View` shows.

    A score says how much an example should help with a query: larger is more helpful, always. Its unit is the
    scorer's own, so scores of different scorers compare by rank alone. A row that has no score (no tokens, states
    that are not finite) is given -inf and must not be ranked; NaN is never returned.
    """

    def __call__(self, view: View, queries: Sequence[QueryText]) -> Float32[Tensor, "q n"]:
        """Scores, on the CPU."""
        ...


class MakeScorer(Protocol):
    """What the catalogue lists. A scorer without randomness takes a seed too, and does not use it."""

    def __call__(self, *, seed: int = 0) -> Scorer: ...
