"""Dense random signs, as LESS and TRAK use: k inner products with sign vectors, over sqrt(k).

The matrix [d k] of a layer is drawn in blocks of rows from its own seeds, so that it never exists whole. Blocks are
cached up to `CACHED_BYTES`; the others are drawn again at every batch, which dominates the time of any model but a
LoRA. (Both codes leave out the 1/sqrt(k), and their matrix depends on the GPU.) Layers are added.

Cost: t d + d k per layer.
Source: Xia et al. 2024, https://arxiv.org/abs/2402.04333, section 3.1; Park et al. 2023, https://arxiv.org/abs/2303.14186
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from whence.gradients.capture import example_gradients
from whence.gradients.protocols import Shapes
from whence.numerics import generator, signs

SIGNS_PER_BLOCK = 2**24
CACHED_BYTES = 2**30


class Rademacher:
    """A sketch of `width` numbers in all, by default 8,192."""

    forms_gradient = False  # it does, but every call draws signs again, so it takes all examples at once

    def __init__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0):
        self.width = 8192 if width is None else width
        self.seed = seed
        self._blocks: dict[tuple[str, int, torch.device], Tensor] = {}
        self._cached_bytes = 0

    def columns(self, layer: str) -> slice:
        """All columns, since layers are added."""
        return slice(0, self.width)

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """Inner products of the layer's gradient with the sign vectors."""
        return self.flat(example_gradients(a, g), layer=layer)

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same for a gradient that is formed already."""
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
        if self._cached_bytes + count <= CACHED_BYTES:
            self._blocks[key] = block
            self._cached_bytes += count
        return block
