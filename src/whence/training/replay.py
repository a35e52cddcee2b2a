"""Replay: what each row of a training did to a loss at its end, through every step between.

Let w_i weigh row i in the loss of every step that reads it (`step_derivatives`), and f be a loss of the weights theta_T
that the training ends with. The score of row i is

    - d f / d w_i    at w = 1      in nats; larger is more helpful

so that leaving the row out (w_i = 0, everything else as it was) raises f by about the score, and leaving several out by
about the sum. It is exact to first order, but for the differences below: the training is gone through backward, with an
adjoint of all that a step hands to the next. With lambda the derivatives of f by (weights, moments) after step t, and g
the step's gradient,

    mu      = derivative by g, through the moments, the update and the clipping          (`update_rules`)
    score_i -= <gradient of row i's share of the step's loss, mu>
    lambda  <- derivatives by the state before, at fixed g, plus the Hessian's product with mu for the weights

Both products with mu come from differences of first derivatives, one gradient a step for each loss, while these are
near what a second derivative says (`step_differences`), and from that otherwise: several losses share a step's first
backward pass then, and take a second one each. `hessian=False` leaves the Hessian's product out: the row's effect on
later gradients is then ignored (in-run scores do so too, and ignore the moments).

The steps between two stored states are trained again and held, which takes one more gradient a step. Where every state
is stored (as fits for adapters) nothing is trained again, and differences take that gradient. Either way the steps must
lead to the next stored state (`Replayed.drifts`): a loss, an order or a denominator that is not the training's own is
found out. Memory: the states of a piece, 4 times the trained weights for each step (3 without differences), and 5 times
for each loss.

(AdamW can be undone: w follows from w', m', v', and then m and v from g. In fp32 that loses the entries whose gradient
once grew a thousandfold, such as those of rare tokens: after 36 steps weights were off by 3.4% of what these moved.)

Source: Ilyas and Engstrom 2025, MAGIC (metagradients by replay), for Adam; Hara et al. 2019, for SGD.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.utils import get_total_norm

from whence.errors import ModelError
from whence.runner import ProgressOption
from whence.runner import progress as progress_bar
from whence.training.step_derivatives import RecordedStep, RowLosses, StepSlope, Target
from whence.training.step_differences import LARGEST_ERROR, DifferencedStep, error_of_differences
from whence.training.step_log import StepLog
from whence.training.unfinished_replay import Standing, Unfinished
from whence.training.update_rules import Moment, State, Tensors, clip, pull_back_clip, put
from whence.turns import one_at_a_time

logger = logging.getLogger(__name__)

LARGEST_DRIFT = 0.02
"""How far a state that is made again may be from the stored one. Rounding makes 1e-6 to 1e-4."""
LOOKS = 10
"""At how many steps differences are held to second derivatives, beside the last; the first is one of them."""


@dataclass(frozen=True)
class Replayed:
    """Scores of a training's rows for some losses."""

    scores: Float64[Tensor, "q n"]
    """Nats by which leaving a row out raises a loss, to first order; larger is more helpful. 0 for a row that no step
    read."""
    losses: tuple[float, ...]
    """The losses at the end of the training, in nats a token."""
    drifts: tuple[tuple[int, float], ...]
    """Of each stored state, which the steps from the one before are held to: its step, and how far they lead from it:
    of AdamW's first moment, relative to it; of weights, relative to what they moved."""
    seconds: float = 0.0
    """What the replay took, from its first step on."""
    seconds_before: float = 0.0
    """That part of it which calls before this one took: it went on from where they were stopped."""
    error: float | None = None
    """How far a step's products by differences were from second derivatives at most, in the length of those, where it
    was looked at: see `step_differences.error_of_differences`. Above its `LARGEST_ERROR`, second derivatives were taken
    from there on. None where all are."""

    @property
    def of_a_half(self) -> Float64[Tensor, " q"]:
        """Standard deviation, in nats, of what leaving out a random half of the rows would do to each loss by these
        scores: rows leave independently, so that it is half the length of a loss's scores.
        """
        return self.scores.norm(dim=1) / 2


def instability(replayed: Replayed, tokens: int) -> list[str]:
    """A note where scores are of a size that no loss can move by: then the training's derivative exploded.

    Args:
        replayed: The scores.
        tokens: In the vocabulary: a guess among all of them has a loss of their number's logarithm, and hardly any loss
            is larger. In a training from scratch at a high rate a random half of the rows moved losses by .7 nats, and
            by 200 as the scores had it (docs/results/evaluation.md).
    """
    most, guess = float(replayed.of_a_half.max()), math.log(tokens)
    if not most > guess:
        return []
    return [
        "the scores are not to be believed: by them, leaving out a random half of the rows would move a loss by "
        f"{most:,.0f} nats, and a guess among all tokens has {guess:.1f}. The training is too unstable for its "
        "derivative, as one from scratch or at a high rate may be; a lower rate or a longer warm-up makes it smoother."
    ]


@one_at_a_time
def replay(
    losses: RowLosses,
    log: StepLog,
    targets: Sequence[Target],
    *,
    hessian: bool = True,
    differences: bool = True,
    is_resumable: bool = False,
    progress: ProgressOption = True,
) -> Replayed:
    """Scores of all rows of a training for each target's loss.

    Args:
        losses: The model, and the rows that it was trained on.
        log: What was done at each step.
        targets: What scores are for, each a list of queries.
        hessian: See above; without it there are no differences either.
        differences: See above; False: every derivative is a second one.
        is_resumable: Write down, beside the log, how far it is, and go on from there when it was stopped.
        progress: Show a bar on stderr; or a function to call with (done, total, what is being done).

    Raises:
        ModelError: Training again leads to other weights than those that were stored.
    """
    kept = Unfinished.of(log, targets, hessian=hessian, differences=differences) if is_resumable else None
    began = time.perf_counter()
    with losses.thawed():
        path = _Path(log, {name: weight.detach() for name, weight in losses.weights.items()}, losses)
        begun = kept and kept.load(losses.device)
        standing, adjoint, scores = begun or _begun(losses, log, targets, differences=hessian and differences)
        path.start(standing)
        way = _WayBack(losses, log, path, adjoint, scores, hessian, list(standing.lengths), standing.error)
        done = len(log.steps) - standing.step
        with progress_bar("Replaying", len(log.steps), unit="steps", done=done, shown=progress) as tick:
            for number in reversed(range(standing.step)):
                way.go_back(number)
                if not scores.isfinite().all():
                    raise ModelError(
                        f"{log.place.root}: going back through step {number + 1:,}, derivatives are not finite: the "
                        "training is too steep to be replayed (a lower --lr, fewer steps)"
                    )
                if kept is not None and number in log.stored[1:]:
                    seconds = standing.seconds + time.perf_counter() - began
                    kept.save(replace(standing, step=number, drifts=tuple(path.drifts), seconds=seconds,
                                      lengths=tuple(way.lengths), error=way.error), adjoint, scores)  # fmt: skip
                tick(1, sum(len(losses.rows[row].ids) for row in log.steps[number].rows))
    if kept is not None:
        kept.remove()
    seconds = standing.seconds + time.perf_counter() - began
    return Replayed(scores, standing.losses, tuple(path.drifts), seconds, standing.seconds, way.error)


def _begun(
    losses: RowLosses, log: StepLog, targets: Sequence[Target], *, differences: bool
) -> tuple[Standing, State, Tensor]:
    """The beginning: derivatives of the targets' losses by the last weights, and no scores."""
    put(log.state(len(log.steps), losses.device).weights, {n: w.detach() for n, w in losses.weights.items()})
    found = [losses.target_gradient(target) for target in targets]
    lengths = (0.0,) * len(targets) if differences else ()
    standing = Standing(step=len(log.steps), losses=tuple(loss for _, loss in found), lengths=lengths)
    scores = torch.zeros(len(targets), len(losses.rows), dtype=torch.float64)
    return standing, _adjoint([slopes for slopes, _ in found], log), scores


def _adjoint(slopes: Sequence[Tensors], log: StepLog) -> State:
    """Derivatives by the last state: those by the weights, and zeros by the moments."""
    weights = {name: torch.stack([each[name] for each in slopes]) for name in slopes[0]}
    moments = [{name: torch.zeros_like(each) for name, each in weights.items()} if log.optimizer.name == "adamw" else {}
               for _ in range(2)]  # fmt: skip
    return State(weights, *moments)


@dataclass
class _WayBack:
    """Goes back through steps: the adjoint is taken from after a step to before it, and the scores grow."""

    losses: RowLosses
    log: StepLog
    path: "_Path"
    adjoint: State
    """Derivatives of each loss by the state after the last step that is still to be gone through [q ...]."""
    scores: Tensor
    """The sums so far [q n]."""
    hessian: bool
    lengths: list[float]
    """See `step_differences.DifferencedStep`; none where second derivatives are taken."""
    error: float | None
    """See `Replayed`."""

    def go_back(self, number: int) -> None:
        """Through one step, counted from 0; its gradient is held to the stored states where it leads to one."""
        state, slope = self.path.before(number, with_slopes=bool(self.lengths))
        step, recorded = self.log.steps[number], None
        if self.lengths:
            gradient = (slope := slope or self.losses.slope(step.passes)).gradient
        else:
            gradient = (recorded := RecordedStep(self.losses, step.passes)).gradient
        clipped, factor = clip(gradient, self.log.optimizer.clip)
        along = self.log.rule.pull_back(self.adjoint, state, clipped, Moment(number + 1, step.rate))
        pull_back_clip(along, gradient, factor)
        every = math.ceil(len(self.log.steps) / LOOKS)
        if self.lengths and (number % every == 0 or number == len(self.log.steps) - 1):
            self._look(number, along, number // every % len(self.lengths))
        if self.lengths and slope is not None:
            differenced = DifferencedStep(self.losses, step.passes, slope, self.lengths, is_back=number % 2 == 1)
            by_weights, by_rows = differenced.derivatives(along)
        else:
            recorded = recorded or RecordedStep(self.losses, step.passes)
            by_weights, by_rows = recorded.derivatives(along, hessian=self.hessian)
        self.scores.index_add_(1, torch.tensor(step.rows), -by_rows.double().cpu())
        for name, product in by_weights.items():
            self.adjoint.weights[name].add_(product)
        self.path.confirm(number, clipped)

    def _look(self, number: int, along: Tensors, k: int) -> None:
        """Hold differences for one of the losses to second derivatives, and go on with those where they are far."""
        one = {name: mu[k : k + 1] for name, mu in along.items()}
        error = error_of_differences(self.losses, self.log.steps[number].passes[0], one, self.lengths[k])
        self.error = max(error, self.error or 0.0)
        if not error <= LARGEST_ERROR:
            logger.warning(
                "%s: at step %s differences of gradients are %.0f%% off second derivatives; from there back these are "
                "taken, which takes twice as long", self.log.place.root, f"{number + 1:,}", 100 * error,
            )  # fmt: skip
            self.lengths = []


@dataclass
class _Path:
    """States of the training, from the last step to the first; each piece between stored ones is trained again."""

    log: StepLog
    weights: Tensors
    """The model's own."""
    losses: RowLosses
    drifts: list[tuple[int, float]] = field(default_factory=list)

    def start(self, standing: Standing) -> None:
        """Begin where a replay stands."""
        self._held: dict[int, tuple[State, StepSlope | None]] = {}
        self._unconfirmed: dict[int, tuple[State, State]] = {}
        self._after, self.drifts = self._stored(standing.step), list(standing.drifts)

    def before(self, number: int, *, with_slopes: bool) -> tuple[State, StepSlope | None]:
        """Weights before a step, with the moments after it, and its slope if it is held; the model gets the weights.

        Args:
            number: The step's, from 0.
            with_slopes: Hold those of the steps that are made again from here on.
        """
        self._holds_slopes = with_slopes
        if number not in self._held:
            self._train_piece(number)
        state, slope = self._held.pop(number)
        put(state.weights, self.weights)
        return state, slope

    def confirm(self, number: int, gradient: Tensors) -> None:
        """Hold a step between two stored states to them, by its gradient, clipped."""
        if number in self._unconfirmed:
            before, after = self._unconfirmed.pop(number)
            self.log.rule.step(before, gradient, Moment(number + 1, self.log.steps[number].rate))
            self._check(number + 1, before, after, self._stored(number).weights)

    def _stored(self, number: int) -> State:
        parts = self.log.state(number, self.losses.device)
        return State(*({name: part[name] for name in self.weights if name in part} for part in parts))

    def _train_piece(self, last: int) -> None:
        """Hold the states from the last stored one before a step up to it; that after it is stored, and known."""
        first = max(number for number in self.log.stored if number <= last)
        began = self._stored(first)
        if first == last:
            self._held[last] = State({name: w.clone() for name, w in began.weights.items()}, *self._after[1:]), None
            self._unconfirmed[last] = began, self._after
        else:
            made = self._redo(first, last, began)
            self._check(last + 1, made, self._after, began.weights)
        self._after = self._stored(first)

    def _redo(self, first: int, last: int, began: State) -> State:
        """Train from a stored state through step `last`, hold what each step came from, and return where it leads."""
        put(began.weights, self.weights)
        state = State(self.weights, *({name: each.clone() for name, each in part.items()} for part in began[1:]))
        for number in range(first, last + 1):
            step = self.log.steps[number]
            before = {name: weight.clone() for name, weight in self.weights.items()}
            slope = self.losses.slope(step.passes)
            clipped, _ = clip(slope.gradient, self.log.optimizer.clip)
            self.log.rule.step(state, clipped, Moment(number + 1, step.rate))
            moments = ({name: each.clone() for name, each in part.items()} for part in state[1:])
            self._held[number] = State(before, *moments), slope if self._holds_slopes else None
        return state

    def _check(self, number: int, made: State, stored: State, began: Tensors) -> None:
        """Hold a state that was made again to the stored one."""
        if made.first:  # AdamW: it moves by signs where gradients are all but 0, and its moment is the better witness
            apart = get_total_norm([made.first[name] - each for name, each in stored.first.items()])
            share = float(apart / _length(stored.first))
        else:
            moved = _length({name: each - began[name] for name, each in stored.weights.items()})
            apart = get_total_norm([made.weights[name] - each for name, each in stored.weights.items()])
            rounding = torch.finfo(apart.dtype).eps * get_total_norm(list(stored.weights.values()))
            share = float((apart - rounding).clamp_min(0) / moved)
        self.drifts.append((number, share))
        if not share <= LARGEST_DRIFT:
            raise ModelError(
                f"{self.log.place.root}: made again from the state before, that after step {number} is {share:.1%} off "
                "the stored one, so this is not how it was trained. Train again with this machine's versions: "
                "whence train ... --replayable"
            )


def _length(tensors: Tensors) -> Tensor:
    """Norm of all tensors together, above 0."""
    norm = get_total_norm(list(tensors.values()))
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)
