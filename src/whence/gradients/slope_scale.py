"""Powers of two that keep slopes within float16 in a backward pass, and are divided out of what is handed over.

The smallest float16 is 6e-8, and the slopes of a token that a model is sure of are far smaller. A backward pass is
linear in its slopes, and examples never mix in it, so each example has a factor of its own: its largest slope becomes a
number in [1/2, 1), which leaves 2^16 for slopes to grow on their way down. A power of two changes no digit. bfloat16
and fp32 have exponents enough and are left alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from whence.models.loading import LoadedModel

MOST = 100
"""Largest power: the inverse of 2^100 and what it multiplies are still normal numbers of fp32."""


def scales_of(slopes: Float32[Tensor, "n *any"]) -> Float32[Tensor, " n"]:
    """The power of two for each entry of the first dimension; 1 where all slopes are 0 or one is not finite.

    >>> scales_of(torch.tensor([[3e-9, -1e-9], [0.75, 0.0], [0.0, 0.0]])).log2()
    tensor([28.,  0.,  0.])
    """
    largest = slopes.flatten(1).abs().amax(1)
    exponents = torch.frexp(largest).exponent.clamp(-MOST, MOST)
    return torch.where(largest.isfinite(), torch.ldexp(torch.ones_like(largest), -exponents), 1.0)


@dataclass
class SlopeScale:
    """Factors of one backward pass."""

    is_needed: bool = False
    """Whether the pass has float16 in it; otherwise every factor is 1."""
    of_examples: Float32[Tensor, " b"] | None = None
    """Factors of the examples, in the decoder."""
    of_positions: Float32[Tensor, " s"] | None = None
    """Factors of the positions of the current chunk of the output head."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Type in which slopes are held between the head and the decoder; None: the model's."""
        return torch.float32 if self.is_needed else None

    def in_head(self, slopes: Float32[Tensor, "s v"]) -> Float32[Tensor, "s v"]:
        """Slopes of a chunk of logits, each position scaled by itself."""
        if not self.is_needed:
            return slopes
        self.of_positions = scales_of(slopes)
        return slopes * self.of_positions[:, None]

    def in_decoder(self, slopes: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Slopes of the decoder's states, scaled by example."""
        if not self.is_needed:
            return slopes
        self.of_examples = scales_of(slopes)
        return slopes * self.of_examples[:, None, None]

    def undone_in_head(self, slopes: Float[Tensor, "s *any"]) -> Float[Tensor, "s *any"]:
        """Slopes of the chunk as they were before they were scaled, in fp32; in their own type if they never were."""
        return slopes if self.of_positions is None else _divided(slopes, self.of_positions)

    def undone(self, slopes: Float[Tensor, "n *any"]) -> Float[Tensor, "n *any"]:
        """The same for slopes of the decoder, of [b ...] or with all positions in the first dimension, [(b t) ...]."""
        return slopes if self.of_examples is None else _divided(slopes, self.of_examples)


def _divided(slopes: Tensor, scales: Tensor) -> Tensor:
    by_entry = scales.to(slopes.device).repeat_interleave(len(slopes) // len(scales))
    return slopes.float() / by_entry.view(-1, *[1] * (slopes.dim() - 1))


def scale_for(model: LoadedModel) -> SlopeScale:
    """The factors that a pass through a model needs."""
    return SlopeScale(any(weight.dtype == torch.float16 for weight in model.model.parameters()))
