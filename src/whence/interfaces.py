"""The Protocols that methods implement, and the settings that decide what vector an example becomes.

One alphabet in shapes: `b` batch, `t` tokens, `i` a layer's input, `o` its output, `k` sketch width, `n` training
examples, `q` queries, `c` checkpoints, `l` layers, `v` vocabulary.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from whence.errors import SettingError

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
        if self.view != "sgd":
            raise SettingError(f"--view {self.view}: this version has the view sgd alone")
        if self.width is not None and self.width < 1:
            raise SettingError(f"--width {self.width}: a positive number is expected")

    def as_json(self) -> dict[str, Any]:
        """The fields by name, for a manifest."""
        return asdict(self)
