"""Sampling without replacement as sorting: Gumbel-top-k.

Rows sorted by score / temperature + G, with G = -log(-log u) drawn for each row, come in the order in which
they would be drawn one after the other, each with probability softmax(score / temperature) over the rows not drawn yet.
If scores are logs of weights (dsir, density), temperature 1 draws in proportion to the weights. As the
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
    """A selector's settings of noise, the same for every selector."""

    temperature: float = 0.0
    """In the scores' unit. Noise is added to the scores that rows are ordered by; where targets take turns, each target
    has its own noise."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise SettingError(f"--temperature {self.temperature}: 0 (the best rows) or a number above it is expected")


def finite_scores(scores: Float[Tensor, "*any"]) -> Float64[Tensor, "*any"]:
    """Scores with -inf for each that is not finite: a NaN would rank first, and an infinity compares with nothing."""
    return torch.where(torch.isfinite(scores), scores, -math.inf).double()


def order(scores: Float64[Tensor, " n"], temperature: float, seed: int, *scope: str) -> Int64[Tensor, " m"]:
    """Numbers of the rows with a finite score, the best or the first drawn first; equal scores by the lower number.

    Args:
        scores: Finite, or -inf.
        temperature: In the scores' own unit; 0 adds no noise.
        seed: Seed of the noise.
        scope: Names of the noise's stream: another scope has another stream.
    """
    keys = scores
    if temperature:
        noise = torch.empty(len(scores), dtype=torch.float64)
        noise.exponential_(generator=generator(seed, "gumbel", *scope))
        keys = scores / temperature - noise.clamp(min=1e-300).log()  # -log of an exponential is a Gumbel
    ranked = keys.argsort(descending=True, stable=True)
    return ranked[torch.isfinite(scores[ranked])]
