"""What a projection is: the protocol that every file in `projections` implements and the contract tests check.

Letters in shapes: `b` batch, `t` tokens, `i` a layer's input, `o` its output, `k` sketch width.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Shapes = Mapping[str, tuple[int, int]]
"""`(o, i)` of every traced layer by name, in the model's own order."""


@runtime_checkable
class Projection(Protocol):
    """A linear map from a model's gradient to `k` numbers, made of one map per layer.

    The whole gradient's sketch is the sum over layers of `columns(layer)` filled with the layer's block: projections
    that concatenate give every layer its own columns, projections that add give every layer all of them. A seed gives
    the same map on any device, worker and batch size. Over seeds, inner products are unbiased:
    E <sketch(x), sketch(y)> = <x, y>.
    """

    width: int
    """`k`, the numbers per row."""
    forms_gradient: bool
    """Whether `__call__` forms all examples' gradients [b o i]: then it gets only as many at a time as memory bears."""

    def columns(self, layer: str) -> slice:
        """The columns of a row that the layer's block goes to."""
        ...

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """Sketch of `sum over t of g_t a_t^T`, as fp32; padded positions have g = 0.

        `a` and `g` are fp32, or on a GPU both of the model's own 16-bit type: `numerics.product` sums those in fp32.
        """
        ...

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same for a gradient that is formed already, as what an optimizer makes of one is no product of two."""
        ...


class MakeProjection(Protocol):
    """What the catalogue lists: from the layers' shapes, a width (None for the default) and a seed to a projection."""

    def __call__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0) -> Projection: ...
