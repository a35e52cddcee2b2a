"""What a projection is: the protocol that every file in `projections` implements, and the contract tests hold.

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
    """A linear map from a model's gradient to `k` numbers, made of one map a layer.

    The whole gradient's sketch is the sum over layers of `columns(layer)` filled with the layer's block: projections
    that concatenate give every layer its own columns, projections that add give every layer all of them. For each
    seed it is the same map on any device, worker and batch size, and over seeds its inner products are unbiased:
    E <sketch(x), sketch(y)> = <x, y>.
    """

    width: int
    """`k`, the numbers a row."""
    forms_gradient: bool
    """Whether `__call__` forms all examples' gradients [b o i]: then it gets so few at a time as memory bears."""

    def columns(self, layer: str) -> slice:
        """Where in a row the layer's block goes."""
        ...

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """Sketch of `sum over t of g_t a_t^T`, as fp32; padded positions have g = 0.

        `a` and `g` are fp32, or both of a model's own 16-bit type on a GPU: `numerics.product` sums those in fp32.
        """
        ...

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same of a gradient that is formed already: what an optimizer makes of one is no product of two."""
        ...


class MakeProjection(Protocol):
    """What the catalogue lists: the layers' shapes, a width (None for the method's own) and a seed."""

    def __call__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0) -> Projection: ...
