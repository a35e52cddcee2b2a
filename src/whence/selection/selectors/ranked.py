"""One order for all targets: by a row's best score over them, or by the mean of its scores.

`max` takes a row that is excellent for one target; one target whose scores run high can fill the whole choice. `mean`
wants rows that serve many targets and compares their scores as they are, in whatever unit each has.

A score that is not finite does not count: it neither lifts its row nor spoils the row's scores for other targets. (In
LESS's released code one NaN among a subtask's examples makes every row's maximum NaN, and NaN sorts first.)

Source: max is LESS, Xia et al. 2024, https://arxiv.org/abs/2402.04333; the mean has none.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.selection.protocols import Pick
from whence.selection.selectors.sampling import Sampled, known, order


@dataclass(frozen=True, kw_only=True)
class Best(Sampled):
    """By the best over targets, which is the target that a row is taken for; of equal ones, the first."""

    def __call__(self, scores: Float32[Tensor, "s n"]) -> Generator[Pick, bool, None]:
        """Rows by their best score."""
        finite = known(scores)
        best = finite.amax(0)
        targets = (finite == best).int().argmax(0)  # max(0) does not say which of equal ones it finds
        for row in order(best, self.temperature, self.seed, "max").tolist():
            yield Pick(row, float(best[row]), int(targets[row]))


@dataclass(frozen=True, kw_only=True)
class Mean(Sampled):
    """By the mean over those targets for which a row has a score; it is taken for no single one."""

    def __call__(self, scores: Float32[Tensor, "s n"]) -> Generator[Pick, bool, None]:
        """Rows by their mean score."""
        finite = known(scores)
        counted = torch.isfinite(finite)
        total = finite.masked_fill(~counted, 0.0).sum(0)
        mean = torch.where(counted.any(0), total / counted.sum(0).clamp(min=1), -math.inf)
        for row in order(mean, self.temperature, self.seed, "mean").tolist():
            yield Pick(row, float(mean[row]), None)
