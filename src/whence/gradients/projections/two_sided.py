"""Kronecker projection: `L^T G R` for each layer, computed without forming the gradient G.

With G = sum over t of g_t a_t^T, the sketch is `sum over t of (L^T g_t)(R^T a_t)^T`: both sides are contracted
first. L [o k] and R [i k] hold independent signs over sqrt(k), so inner products are unbiased over seeds. Their
variance is that of two nested sketches of k numbers. For gradients of low rank that is larger than the variance of a
flat sketch of k^2 numbers. Layers are concatenated.

Cost: t (i + o) k + t k^2 multiplications per layer, against t i o for the gradient itself.
Source: LoGra, Choe et al. 2024, https://arxiv.org/abs/2405.13954 (random initialisation).
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from whence.gradients.protocols import Shapes
from whence.numerics import generator, product, signs


class TwoSided:
    """A sketch of `width` x `width` numbers per layer, by default 16 x 16, concatenated in the layers' order."""

    forms_gradient = False

    def __init__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0):
        self.side = 16 if width is None else width
        self.seed = seed
        self.width = self.side**2 * len(shapes)
        self._first = {layer: number * self.side**2 for number, layer in enumerate(shapes)}
        self._factors: dict[tuple[str, str, torch.device, torch.dtype], Tensor] = {}

    def columns(self, layer: str) -> slice:
        """The layer's own columns."""
        return slice(self._first[layer], self._first[layer] + self.side**2)

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """`L^T G R`, flattened."""
        if a.dtype != torch.float32:
            return self._sketch_in_16_bits(a, g, layer)
        left = g @ self._factor(layer, "left", g)  # [b t side]
        right = a @ self._factor(layer, "right", a)
        return torch.bmm(left.mT, right).flatten(1)

    def _sketch_in_16_bits(self, a: Tensor, g: Tensor, layer: str) -> Float32[Tensor, "b k"]:
        """The same with plain signs, which 16 bits hold exactly; the result is divided by `side`."""
        left = product(g.flatten(0, 1), self._factor(layer, "left", g)).view(*g.shape[:2], self.side)
        right = product(a.flatten(0, 1), self._factor(layer, "right", a)).view(*a.shape[:2], self.side)
        unused = left.new_empty(1, 1, 1)  # beta is 0
        return torch.baddbmm(unused, left.mT, right, beta=0, alpha=1 / self.side).flatten(1)

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same for a gradient that is formed already."""
        right = gradient @ self._factor(layer, "right", gradient)  # [b o side]
        return (self._factor(layer, "left", gradient.mT).mT @ right).flatten(1)

    def _factor(self, layer: str, name: str, like: Tensor) -> Tensor:
        key = (layer, name, like.device, like.dtype)
        if key not in self._factors:
            rows = like.shape[-1]
            drawn = (
                signs(rows * self.side, generator(self.seed, "two_sided", layer, name)).view(rows, self.side).to(like)
            )
            self._factors[key] = drawn / self.side**0.5 if like.dtype == torch.float32 else drawn
        return self._factors[key]
