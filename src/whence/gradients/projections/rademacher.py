"""Dense random signs, as LESS and TRAK use: k inner products with sign vectors, over sqrt(k).

The matrix [d k] of a layer is made in blocks of rows from its own seeds, so that it never has to exist whole; blocks
are kept while they fit in `KEPT_BYTES` and made again at every batch beyond it, which dominates the time of any model
but a LoRA. (Both codes leave out the 1/sqrt(k), and their matrix depends on the GPU.) Layers are added.

Cost: t d + d k a layer.
Source: Xia et al. 2024, https://arxiv.org/abs/2402.04333, section 3.1; Park et al. 2023, https://arxiv.org/abs/2303.14186
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from whence.gradients.capture import example_gradients
from whence.gradients.protocols import Shapes
from whence.numerics import generator, signs

SIGNS_PER_BLOCK = 2**24
KEPT_BYTES = 2**30


class Rademacher:
    """`width` numbers in all, 8,192 unless told."""

    forms_gradient = False  # it does, but signs are drawn anew at every call: all examples at once

    def __init__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0):
        self.width = 8192 if width is None else width
        self.seed = seed
        self._blocks: dict[tuple[str, int, torch.device], Tensor] = {}
        self._kept = 0

    def columns(self, layer: str) -> slice:
        """All of them."""
        return slice(0, self.width)

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """Inner products of the layer's gradient with the sign vectors."""
        return self.flat(example_gradients(a, g), layer=layer)

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same of a gradient that is formed already."""
        flat = gradient.flatten(1)
        out = flat.new_zeros(len(flat), self.width)
        rows = max(1, SIGNS_PER_BLOCK // self.width)
        for number, piece in enumerate(flat.split(rows, dim=1)):
            out += piece @ self._block(layer, number, piece).to(flat)
        return out / self.width**0.5

    def _block(self, layer: str, number: int, piece: Tensor) -> Int8[Tensor, "d k"]:
        key = (layer, number, piece.device)
        if key in self._blocks:
            return self._blocks[key]
        count = piece.shape[1] * self.width
        drawn = signs(count, generator(self.seed, "rademacher", layer, str(number)))
        block = drawn.view(piece.shape[1], self.width).to(piece.device)
        if self._kept + count <= KEPT_BYTES:
            self._blocks[key] = block
            self._kept += count
        return block
