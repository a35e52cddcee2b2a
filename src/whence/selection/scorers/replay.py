"""Scores by replay: what each row of a training did to the task's loss at its end, through every step between.

One way back through the training serves all rows; see `training.replay`. Scores are in nats a token: about what leaving
the row out adds to the target's loss.

Source: Ilyas and Engstrom 2025, MAGIC, https://arxiv.org/abs/2504.16430.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.errors import SettingError
from whence.gradients.exact import sequences_of
from whence.selection.protocols import Target, View
from whence.training.replay import instability, replay
from whence.training.replayed_run import ReplayableRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A target's loss is the mean over its queries of each one's mean loss over its supervised tokens."""

    seed: int = 0
    hessian: bool = True
    """Whether a row's effect on the gradients of later steps counts."""
    differences: bool = True
    """Whether that comes from differences of gradients, at half the price, and not from second derivatives."""
    seconds_before: ClassVar[float] = 0.0
    """What calls before the last one took of its scores, as it went on from where they were stopped; no option."""

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores; -inf for rows that the training did not read.

        Raises:
            SettingError: The view is not of a run that can be replayed.
        """
        run = getattr(view, "run", None)  # of a `run_view.RunView`, whose import would bring other methods
        if not isinstance(run, ReplayableRun):
            raise SettingError(
                "--method replay reads a run of `whence train --replayable`, in place of an index or a corpus"
            )
        losses = [[sequences_of(query.encoded) for query in target.queries] for target in targets]
        replayed = replay(run.losses, run.log, losses, hessian=self.hessian, differences=self.differences,
                          is_resumable=True)  # fmt: skip
        for note in instability(replayed, len(run.model.tokenizer)):
            logger.warning("%s", note)
        object.__setattr__(self, "seconds_before", replayed.seconds_before)
        scores = torch.full((len(targets), view.rows), -torch.inf)
        scores[:, run.places] = replayed.scores.float()
        return scores
