"""Replay: what each row of a training did to a loss at its end, through every step between.

Let w_i weigh row i in the loss of every step that reads it (`step_derivatives`), and f be a loss of the weights theta_T
that the training ends with. The score of row i is

    - d f / d w_i    at w = 1      in nats; larger is more helpful

so that leaving the row out (w_i = 0, everything else as it was) raises f by about the score, and leaving several out by
about the sum. It is exact to first order: the training is gone through backward, with an adjoint of all that a step
hands to the next. With lambda the derivatives of f by (weights, moments) after step t, and g the step's gradient,

    mu      = derivative by g, through the moments, the update and the clipping          (`update_rules`)
    score_i -= <gradient of row i's share of the step's loss, mu>
    lambda  <- derivatives by the state before, at fixed g, plus the Hessian's product with mu for the weights

Several losses share a step's first backward pass, and take a second one each. `hessian=False` leaves the Hessian's
product out: the row's effect on later gradients is then ignored (in-run scores do so too, and ignore the moments).

Weights before a step follow from what it left behind where the optimizer is reversible, and are held to the stored
states on the way (`Replayed.drifts`). Otherwise each piece between two stored states is trained again and held.

Source: Ilyas and Engstrom 2025, MAGIC, https://arxiv.org/abs/2504.16430, where all of a piece's states are computed
again; Hara et al. 2019, for SGD.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.utils import get_total_norm

from whence.corpus.tokens import Encoded
from whence.errors import ModelError
from whence.runner import ProgressOption
from whence.runner import progress as progress_bar
from whence.training.step_derivatives import RecordedStep, RowLosses
from whence.training.step_log import Step, StepLog
from whence.training.update_rules import Moment, State, Tensors, clip, pull_back_clip

LARGEST_DRIFT = 1e-2
"""Of weights that were taken back from one stored state to the one before, relative to what the steps between moved."""


@dataclass(frozen=True)
class Replayed:
    """Scores of a training's rows for some losses."""

    scores: Float64[Tensor, "q n"]
    """Nats by which leaving a row out raises a loss, to first order; larger is more helpful. 0 for a row that no step
    read."""
    losses: tuple[float, ...]
    """The losses at the end of the training, in nats a token."""
    drifts: tuple[tuple[int, float], ...]
    """Of each stored state that was reached going backward: its step, and how far the weights were from it, relative to
    what the steps of the piece moved. Empty where pieces were trained again."""


def replay(
    losses: RowLosses,
    log: StepLog,
    targets: Sequence[Sequence[Encoded]],
    *,
    hessian: bool = True,
    progress: ProgressOption = True,
) -> Replayed:
    """Scores of all rows of a training for each target's loss.

    Args:
        losses: The model, whose weights are overwritten, and the rows that it was trained on.
        log: What was done at each step.
        targets: Queries of each target; its loss is the mean over queries of each one's mean loss over its supervised
            tokens.
        hessian: See above.
        progress: Show a bar on stderr; or a function to call with (done, total, what is being done).

    Raises:
        ModelError: The way back leads to other weights than those that were stored.
    """
    weights = {name: weight.detach() for name, weight in losses.weights.items()}
    walk = _Undoing(log, weights) if log.optimizer.rule.is_reversible else _Redoing(log, weights, losses)
    found = [losses.mean_gradient(queries) for queries in targets] if walk.at_end() else []
    adjoint = _adjoint([slopes for slopes, _ in found], log)
    scores = torch.zeros(len(targets), len(losses.rows), dtype=torch.float64)
    with progress_bar("Replaying", len(log.steps), unit="steps", shown=progress) as tick:
        for number in reversed(range(len(log.steps))):
            step = log.steps[number]
            state, moment = walk.before(number), Moment(number + 1, step.rate)
            recorded = RecordedStep(losses, step.passes)
            clipped, factor = clip(recorded.gradient, log.optimizer.clip)
            along = log.optimizer.rule.pull_back(adjoint, state, clipped, moment)
            pull_back_clip(along, recorded.gradient, factor)
            by_weights, by_rows = recorded.derivatives(along, hessian=hessian)
            scores.index_add_(1, torch.tensor(step.rows), -by_rows.double().cpu())
            for name, product in by_weights.items():
                adjoint.weights[name].add_(product)
            walk.leave(number, clipped)
            tick(1, 0)
    return Replayed(scores, tuple(loss for _, loss in found), tuple(walk.drifts))


def _adjoint(slopes: Sequence[Tensors], log: StepLog) -> State:
    """Derivatives by the last state: those by the weights, and zeros by the moments."""
    weights = {name: torch.stack([each[name] for each in slopes]) for name in slopes[0]}
    moments = [{name: torch.zeros_like(each) for name, each in weights.items()} if log.optimizer.name == "adamw" else {}
               for _ in range(2)]  # fmt: skip
    return State(weights, *moments)


@torch.no_grad()
def _place(state: Tensors, weights: Tensors) -> None:
    for name, weight in weights.items():
        weight.copy_(state[name])


@dataclass
class _Undoing:
    """The way back by undoing steps. `state` shares the model's own weights."""

    log: StepLog
    weights: Tensors
    drifts: list[tuple[int, float]] = field(default_factory=list)

    def at_end(self) -> bool:
        """Put the model to the end of the training."""
        self._load(len(self.log.steps))
        return True

    def _load(self, number: int) -> None:
        stored = self.log.state(number, next(iter(self.weights.values())).device)
        _place(stored.weights, self.weights)
        self._began = stored.weights
        self.state = State(self.weights, stored.first, stored.second)

    def before(self, number: int) -> State:
        """Weights before a step, with the moments after it; the model has the weights."""
        if number + 1 in self.log.stored and number + 1 < len(self.log.steps):
            self._check(number + 1)
            self._load(number + 1)
        self.log.optimizer.rule.undo_weights(self.state, Moment(number + 1, self.log.steps[number].rate))
        return self.state

    def leave(self, number: int, gradient: Tensors) -> None:
        """Go on to the state before the step, which had this clipped gradient."""
        self.log.optimizer.rule.undo_moments(self.state, gradient)
        if number == 0:
            self._check(0)

    def _check(self, number: int) -> None:
        """Hold the weights to the stored ones."""
        stored = self.log.state(number, next(iter(self.weights.values())).device).weights
        moved = get_total_norm([self._began[name] - stored[name] for name in stored])
        drift = get_total_norm([self.weights[name] - stored[name] for name in stored])
        share = float(drift / moved.clamp_min(1e-30))
        self.drifts.append((number, share))
        if not share <= LARGEST_DRIFT:
            raise ModelError(
                f"{self.log.place.root}: going back to step {number} leads to other weights than were stored there, by "
                f"{share:.1%} of what the steps since moved. Store states more often: whence train ... --replay-every "
                "with a smaller number"
            )


@dataclass
class _Redoing:
    """The way back by training each piece again, all of whose states are held."""

    log: StepLog
    weights: Tensors
    losses: RowLosses
    drifts: list[tuple[int, float]] = field(default_factory=list)

    def at_end(self) -> bool:
        """Put the model to the end of the training."""
        _place(self.log.state(len(self.log.steps)).weights, self.weights)
        self._held: dict[int, State] = {}
        return True

    def before(self, number: int) -> State:
        """Weights before a step, with the moments after it; the model has the weights."""
        if number not in self._held:
            self._train_piece(number)
        state = self._held.pop(number)
        _place(state.weights, self.weights)
        return state

    def leave(self, number: int, gradient: Tensors) -> None:
        """Nothing is left to do."""

    def _train_piece(self, last: int) -> None:
        """Train from the stored state before a step up to it."""
        first = max(number for number in self.log.stored if number <= last)
        stored, rule = self.log.state(first, next(iter(self.weights.values())).device), self.log.optimizer.rule
        _place(stored.weights, self.weights)
        state = State(self.weights, stored.first, stored.second)
        for number in range(first, last + 1):
            step: Step = self.log.steps[number]
            before = {name: weight.clone() for name, weight in state.weights.items()}
            clipped, _ = clip(self.losses.gradient(step.passes), self.log.optimizer.clip)
            rule.step(state, clipped, Moment(number + 1, step.rate))
            self._held[number] = State(before, *({name: each.clone() for name, each in part.items()}
                                                 for part in (state.first, state.second)))  # fmt: skip
