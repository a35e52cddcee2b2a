"""Random scores: the choice that chance alone makes.

Every target has its own stream, so its scores do not depend on the number of other targets.

Source: none needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.numerics import generator
from whence.selection.protocols import Target, View


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Independent scores, uniform in [0, 1)."""

    seed: int = 0

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """The same numbers for a seed, a target's number and a row's number, whatever their texts."""
        scores = torch.empty(len(targets), view.rows)
        for number, row in enumerate(scores):
            row.uniform_(generator=generator(self.seed, "uniform", str(number)))
        return scores
