"""Sampling without replacement as sorting: Gumbel-top-k.

Rows sorted by score / temperature + G, with G = -log(-log u) drawn for each row by itself, come in the order in which
they would be drawn one after the other, each with probability softmax(score / temperature) over those that are left.
With scores that are logs of weights (dsir, density), temperature 1 draws in proportion to the weights. As the
temperature falls to 0 the order becomes that of the scores.

Source: Kool et al. 2019, Stochastic Beams and Where to Find Them, https://arxiv.org/abs/1903.06059.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from whence.errors import SettingError
from whence.numerics import generator


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What every selector can be told of its noise."""

    temperature: float = 0.0
    """In the scores' unit; the noise is added to what rows are ordered by, a target's own where targets take turns."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise SettingError(f"--temperature {self.temperature}: 0 (the best rows) or a number above it is expected")


def known(scores: Float[Tensor, "*any"]) -> Float64[Tensor, "*any"]:
    """Scores with -inf for every one that is not finite: a NaN would rank first, an infinity is no comparison."""
    return torch.where(torch.isfinite(scores), scores, -math.inf).double()


def order(scores: Float64[Tensor, " n"], temperature: float, seed: int, *scope: str) -> Int64[Tensor, " m"]:
    """Numbers of the rows with a finite score, best or first drawn first; equal scores by the lower number.

    Args:
        scores: Finite, or -inf.
        temperature: In the scores' own unit; 0 draws nothing.
        seed: Of the noise.
        scope: What else the noise belongs to: another scope has another stream.
    """
    keys = scores
    if temperature:
        noise = torch.empty(len(scores), dtype=torch.float64)
        noise.exponential_(generator=generator(seed, "gumbel", *scope))
        keys = scores / temperature - noise.clamp(min=1e-300).log()  # -log of an exponential is a Gumbel
    ranked = keys.argsort(descending=True, stable=True)
    return ranked[torch.isfinite(scores[ranked])]
