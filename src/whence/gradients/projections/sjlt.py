"""Sparse Johnson-Lindenstrauss transform, block construction.

Each of the d = o i gradient entries is added, with a random sign, to one bin in each of `s` = 4 blocks of k / s bins,
and the sketch is divided by sqrt(s): inner products are unbiased over seeds, with a variance of about
(|x|^2 |y|^2 + <x, y>^2) / k. Layers are added. `count_sketch` has the same variance at a fraction of the time; the
four bins guard against two heavy entries that share a bin.

Cost: t d for the gradient and s d scattered additions per layer.
Source: Kane and Nelson 2014, Sparser Johnson-Lindenstrauss Transforms, https://arxiv.org/abs/1012.1577
"""

import torch
from jaxtyping import Float
from torch import Tensor

from whence.errors import SettingError
from whence.gradients.capture import example_gradients
from whence.gradients.protocols import Shapes
from whence.numerics import generator, signs


class SJLT:
    """A sketch of `width` numbers in all, by default 8,192; a multiple of 4."""

    s = 4
    forms_gradient = True

    def __init__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0):
        self.width = 8192 if width is None else width
        if self.width % self.s:
            raise SettingError(f"--width {self.width}: sjlt spreads over {self.s} blocks; give a multiple of {self.s}")
        self.seed = seed
        self._hashes: dict[tuple[str, torch.device], list[tuple[Tensor, Tensor]]] = {}

    def columns(self, layer: str) -> slice:
        """All columns, since layers are added."""
        return slice(0, self.width)

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """Hashed sums of the layer's gradient."""
        return self.flat(example_gradients(a, g), layer=layer)

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same for a gradient that is formed already."""
        flat = gradient.flatten(1)
        out = flat.new_zeros(len(flat), self.width)
        for bins, sign in self._hash(layer, flat):
            out.index_add_(1, bins, flat * sign)
        return out / self.s**0.5

    def _hash(self, layer: str, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        key = (layer, flat.device)
        if key not in self._hashes:
            rng, d, block = generator(self.seed, "sjlt", layer), flat.shape[1], self.width // self.s
            drawn = [
                (torch.randint(block, (d,), generator=rng, dtype=torch.int32) + number * block, signs(d, rng))
                for number in range(self.s)
            ]
            self._hashes[key] = [(bins.to(flat.device), sign.to(flat.device)) for bins, sign in drawn]
        return self._hashes[key]
