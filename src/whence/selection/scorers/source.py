"""SOURCE: influence through a training that is cut into a few segments, each with a curvature and gradients of its own.

In a segment of steps with rates eta_t, weights follow the gradient of the mean loss under a curvature H that stands
still, by eigenvalue lambda and for the time tau = p * sum of eta_t. What the target's gradient s at its end asks of the
segment, and of what came before, is then in the basis of H

    pushed    (1 - exp(-tau lambda)) / lambda * s          a row's share in the segment, times its gradient / (N T)
    left      exp(-tau lambda) * s                         the s of the segment before

with T the mean number of supervised tokens of N rows: a training's loss is the mean over a batch's tokens, so that
lambda is EK-FAC's eigenvalue of a row's summed loss over T. The score is the sum over segments: of gradient descent
what leaving the row out adds to the target's loss, in nats; of AdamW, which hardly feels a gradient's size, its order
alone means something (scores were 8 times those of a replay). Where tau lambda is small that is an inner product of
gradients, where it is large that of an influence function: no damping is to be chosen.

For AdamW p is what it multiplies a gradient by, 1 / (sqrt(second moment) + eps), as a mean over a layer's entries by
their second moments, where gradients have their energy; for SGD it is 1. Decay is left out, and so is clipping, so that
scores of a training by SGD that was clipped are too large by as much. Each segment is seen at the stored state nearest
to its middle.

Cost: for each segment a pass over the rows (scores), and two over as many as curvature needs (`sampled_rows`). Twice
the traced weights are held for every target, from the first segment to the last.

Source: Bae et al. 2024, https://arxiv.org/abs/2405.12186, equations 12 to 14.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from whence.errors import SettingError
from whence.gradients.corpus_scores import direction_scores, query_directions
from whence.gradients.exact import SignedSequence
from whence.gradients.space import GradientSpace
from whence.runner import counting
from whence.second_order.eigen import Curvature, LayerCurvature, ekfac, ekfac_sums, kfac
from whence.second_order.factors import kfac_factors
from whence.second_order.sampled_rows import sampled_rows
from whence.selection.protocols import Target, View
from whence.training.replayed_run import ReplayableRun
from whence.training.step_log import StepLog
from whence.training.update_rules import State, put
from whence.turns import one_at_a_time


@dataclass(frozen=True, kw_only=True)
class SOURCE:
    """A target's loss is the mean over its queries of each one's mean loss over its supervised tokens."""

    seed: int = 0
    """Of the answers that the model draws."""
    segments: int = 3

    def __post_init__(self):
        if self.segments < 1:
            raise SettingError(f"segments {self.segments} of source: at least 1 is expected")

    @one_at_a_time
    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores; -inf for rows that the training did not read.

        Raises:
            SettingError: The view is not of a run that can be replayed.
        """
        run = getattr(view, "run", None)  # of a `run_view.RunView`, whose import would bring other methods
        if not isinstance(run, ReplayableRun):
            raise SettingError(
                "--method source reads a run of `whence train --replayable`, in place of an index or a corpus"
            )
        asked = [target.sequences() for target in targets]
        scores = torch.full((len(targets), view.rows), -torch.inf)
        scores[:, run.places] = self.of_run(run, asked, tokens_per_batch=view.tokens_per_batch)
        return scores

    def of_run(
        self, run: ReplayableRun, targets: Sequence[Sequence[SignedSequence]], *, tokens_per_batch: int
    ) -> Float32[Tensor, "s n"]:
        """Scores of the rows that a run was trained on, for targets whose losses are signed sums of mean losses."""
        names = {id(weight): name for name, weight in run.losses.weights.items()}
        traced = {name: layer for name, layer in run.model.layers().items() if id(layer.weight) in names}
        weights = {name: names[id(layer.weight)] for name, layer in traced.items()}
        last = run.log.state(len(run.log.steps)).weights
        try:
            return self._scores(run, traced, weights, targets, tokens_per_batch)
        finally:
            put(last, run.losses.weights)

    def _scores(
        self,
        run: ReplayableRun,
        layers: dict[str, nn.Module],
        weights: dict[str, str],
        targets: Sequence[Sequence[SignedSequence]],
        tokens_per_batch: int,
    ) -> Float32[Tensor, "s n"]:
        """Scores, while the weights are moved through the segments."""
        model, rows = run.model, list(run.losses.rows)
        tokens = sum(row.supervised_count for row in rows) / len(rows)
        asked = query_directions(model, layers, targets, GradientSpace())
        total = torch.zeros(len(targets), len(rows))
        with counting("Segments", self.segments * len(rows)) as tick:
            for segment in reversed(segments_of(run.log, self.segments)):
                state = run.log.state(segment.state, device=model.device)
                put(state.weights, run.losses.weights)
                curvature = self._curvature(run, layers, tokens_per_batch)
                pushed = {}
                for name, layer in curvature.items():
                    tau = segment.rates * step_scale(run.log, state, segment.state, weights[name])
                    pushed[name], asked[name] = flow(_of_mean_loss(layer, tokens), tau, asked[name])
                    pushed[name] /= len(rows) * tokens
                total += direction_scores(
                    model, layers, pushed, rows, reduction="sum", tokens_per_batch=tokens_per_batch, tick=tick
                )
        return total

    def _curvature(self, run: ReplayableRun, layers: dict[str, nn.Module], tokens_per_batch: int) -> Curvature:
        rows, model = list(run.losses.rows), run.model
        tokens = torch.tensor([row.supervised_count for row in rows])
        rows = [rows[place] for place in sampled_rows(tokens, layers, seed=self.seed).tolist()]
        bases = kfac(kfac_factors(model, layers, rows, seed=self.seed, tokens_per_batch=tokens_per_batch))
        sums = ekfac_sums(model, layers, bases, rows, seed=self.seed, tokens_per_batch=tokens_per_batch)
        return ekfac(bases, sums, len(rows))


@dataclass(frozen=True)
class Segment:
    """Some steps of a training, one after another."""

    rates: float
    """Sum of their learning rates."""
    state: int
    """Number of steps after which it is seen."""


def segments_of(log: StepLog, count: int) -> list[Segment]:
    """A training's steps in so many segments of about equal length, or one for each step where there are fewer."""
    steps, count = len(log.steps), min(count, len(log.steps))
    ends = [round(number * steps / count) for number in range(count + 1)]
    return [
        Segment(
            sum(step.rate for step in log.steps[first:end]),
            min(log.stored, key=lambda state: abs(state - (first + end) / 2)),
        )
        for first, end in pairwise(ends)
    ]


def step_scale(log: StepLog, state: State, after: int, weight: str) -> float:
    """p: the mean factor between a gradient of a weight and a step along it, times the learning rate."""
    optimizer = log.optimizer
    if optimizer.name == "sgd" or not after:  # AdamW has no moments before its first step
        return 1.0 if optimizer.name == "sgd" else step_scale(log, log.state(_first(log)), _first(log), weight)
    second = state.second[weight].double() / (1 - optimizer.beta2**after)
    return float((second / (second.sqrt() + optimizer.eps)).sum() / second.sum().clamp(min=1e-300))


def _first(log: StepLog) -> int:
    """The first stored state that has moments."""
    return log.stored[1]


def flow(
    curvature: LayerCurvature, tau: float, asked: Float[Tensor, "*s o i"]
) -> tuple[Float[Tensor, "*s o i"], Float[Tensor, "*s o i"]]:
    """What a target's gradient asks of a segment, and of what came before: `pushed` and `left` of the module's text."""
    rotated, z = curvature.rotated(asked), tau * curvature.eigenvalues
    share = torch.where(z > 1e-6, -torch.expm1(-z) / z.clamp(min=1e-30), 1 - z / 2)  # (1 - exp(-z)) / z
    pushed, left = (curvature.slopes @ (rotated * factor) @ curvature.inputs.T for factor in (tau * share, (-z).exp()))
    return pushed, left


def _of_mean_loss(layer: LayerCurvature, tokens: float) -> LayerCurvature:
    """Of the loss that is the mean over a batch's tokens."""
    return LayerCurvature(layer.inputs, layer.slopes, layer.eigenvalues / tokens)
