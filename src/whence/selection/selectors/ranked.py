"""One order for all targets: by a row's best score over them, or by the mean of its scores.

`max` takes a row that is excellent for one target; one target with high scores can fill the whole choice. `mean` takes
rows that serve many targets, and adds their scores as they are, in whatever unit each has.

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
from whence.selection.sampling import Sampled, finite_scores, order


@dataclass(frozen=True, kw_only=True)
class Best(Sampled):
    """Rows by their best score over targets; a row is taken for its best target, the first of equal ones."""

    def __call__(self, scores: Float32[Tensor, "s n"]) -> Generator[Pick, bool, None]:
        """Rows by their best score."""
        finite = finite_scores(scores)
        best = finite.amax(0)
        targets = (finite == best).int().argmax(0)  # max(0) does not say which of equal values it returns
        for row in order(best, self.temperature, self.seed, "max").tolist():
            yield Pick(row, float(best[row]), int(targets[row]))


@dataclass(frozen=True, kw_only=True)
class Mean(Sampled):
    """Rows by the mean over the targets for which they have a score; a row is taken for no single target."""

    def __call__(self, scores: Float32[Tensor, "s n"]) -> Generator[Pick, bool, None]:
        """Rows by their mean score."""
        finite = finite_scores(scores)
        is_scored = torch.isfinite(finite)
        total = finite.masked_fill(~is_scored, 0.0).sum(0)
        mean = torch.where(is_scored.any(0), total / is_scored.sum(0).clamp(min=1), -math.inf)
        for row in order(mean, self.temperature, self.seed, "mean").tolist():
            yield Pick(row, float(mean[row]), None)
