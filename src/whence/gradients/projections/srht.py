"""Subsampled randomised Hadamard transform.

Random signs, an orthonormal Walsh-Hadamard transform of the layer's gradient (padded to D, a power of two), then k
of its D coordinates, times sqrt(D / k): inner products are unbiased over seeds, and the transform spreads heavy
entries over all coordinates, so the error does not depend on where a gradient is large. Layers are added.

Cost: t d for the gradient and 64 D log64(D) per layer, three times a training step on a CPU.
Source: Tropp 2011, https://arxiv.org/abs/1011.1595
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from whence.gradients.capture import example_gradients
from whence.gradients.protocols import Shapes
from whence.numerics import generator, hadamard, signs


class SRHT:
    """A sketch of `width` numbers in all, by default 8,192. A smaller layer is sampled with replacement."""

    forms_gradient = True

    def __init__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0):
        self.width = 8192 if width is None else width
        self.seed = seed
        self._draws: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def columns(self, layer: str) -> slice:
        """All columns, since layers are added."""
        return slice(0, self.width)

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """Sampled coordinates of the transformed gradient."""
        return self.flat(example_gradients(a, g), layer=layer)

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same for a gradient that is formed already."""
        flat = gradient.flatten(1)
        padded = 1 << (flat.shape[1] - 1).bit_length()
        sign, coordinates = self._draw(layer, flat, padded)
        spread = hadamard(F.pad(flat * sign, (0, padded - flat.shape[1])))
        return spread[:, coordinates] * (padded / self.width) ** 0.5

    def _draw(self, layer: str, flat: Tensor, padded: int) -> tuple[Tensor, Tensor]:
        key = (layer, flat.device)
        if key not in self._draws:
            rng = generator(self.seed, "srht", layer)
            sign = signs(flat.shape[1], rng)
            if self.width <= padded:
                coordinates = torch.randperm(padded, generator=rng)[: self.width]
            else:
                coordinates = torch.randint(padded, (self.width,), generator=rng)
            self._draws[key] = (sign.to(flat.device), coordinates.to(flat.device))
        return self._draws[key]
