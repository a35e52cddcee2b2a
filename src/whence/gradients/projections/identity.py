"""No projection: the gradient itself, layers concatenated, for small models and tests. It is as large as the weights.

Source: none needed.
"""

import math

from jaxtyping import Float
from torch import Tensor

from whence.errors import SettingError
from whence.gradients.capture import example_gradients
from whence.gradients.protocols import Shapes


class Identity:
    """One number per weight; it takes no width."""

    forms_gradient = True

    def __init__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0):
        if width is not None:
            raise SettingError(f"--width {width}: identity keeps every number of the gradient; leave --width out")
        self._columns: dict[str, slice] = {}
        self.width = 0
        for layer, shape in shapes.items():
            self._columns[layer] = slice(self.width, self.width + math.prod(shape))
            self.width += math.prod(shape)

    def columns(self, layer: str) -> slice:
        """The layer's own columns."""
        return self._columns[layer]

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """The layer's gradient, flattened."""
        return self.flat(example_gradients(a, g), layer=layer)

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same for a gradient that is formed already."""
        return gradient.flatten(1)
