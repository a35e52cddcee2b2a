"""The learning rate of every step of a training, from the few steps at which a Trainer wrote it down.

Known rates come from the log of `trainer_state.json`, and from each checkpoint's `scheduler.pt`, which also holds the
peak. From transformers 4.51 on the log has the rate of the step that was made, before that the rate of the next step:
a scheduler's file at a logged step shows which, as does an exact 0 logged at the last step.

If one shape of schedule after a linear warm-up passes through all known rates, it is taken, with the shortest such
warm-up: constant, linear or cosine, and with a known peak cosine with restarts. A warm-up that goes on at a known rate
is taken only if there are more known rates above 0 than free parameters. Where several shapes fit, which is so of a
single rate, the Trainer's default, linear, is taken if it is one of them, and `origin` names the others.

Else rates are interpolated. At the ends the line through the nearest two known rates goes on that are half as far apart
as the end is long, between 0 and the peak, or the largest known rate; without such two the rate stays as it is.
`training_args.bin`, which would say, can only be unpickled, and is never opened.
"""

import itertools
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from whence.models.saved_files import check_file

TOLERANCE = 1e-6
"""Of a known rate, which is written with all its digits; of the peak, where that is known."""
ROUNDING = 1e-14
"""Of the largest known rate."""
WARMUPS = 20_000
"""Lengths of a warm-up that are tried at most."""
SHAPES = {
    "constant": lambda progress: np.ones_like(progress),
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + np.cos(np.pi * progress)) / 2,
}
"""Schedules after their warm-up, from 1, by the share of the remaining steps that were made."""
RESTARTS = {
    f"{cycles}-cycle cosine": partial(
        lambda cycles, progress: np.where(progress < 1, (1 + np.cos(np.pi * (cycles * progress % 1))) / 2, 0), cycles
    )
    for cycles in range(2, 9)
}
"""Schedules that return to their peak, likewise."""
DEFAULT = "linear"
"""The Trainer's own choice."""


@dataclass(frozen=True)
class Scheduler:
    """What a checkpoint's `scheduler.pt` says."""

    next_rate: float
    """The rate of the step after the checkpoint's."""
    peak: float | None
    """The rate at the end of the warm-up."""


@dataclass(frozen=True)
class StepRates:
    """The learning rate of every step of a training, from the first."""

    rates: Float64[np.ndarray, " steps"]
    known: frozenset[int]
    """Steps whose rate is on file; steps count from 1."""
    origin: str
    """How the others came about, in words."""


def step_rates(
    log: Sequence[tuple[int, float]], schedulers: Mapping[int, Scheduler], steps: int, max_steps: int | None
) -> StepRates | None:
    """The rates of steps 1 to `steps`; None if no rate is known.

    Args:
        log: `(step, rate)` as logged.
        schedulers: Schedulers of checkpoints, by their steps.
        steps: The last step of interest.
        max_steps: Steps of the whole training, at whose end linear and cosine schedules are at 0. None: not known.
    """
    if not log and not schedulers:
        return None
    peak = next((scheduler.peak for scheduler in schedulers.values() if scheduler.peak), None)
    every, readings = np.arange(1, steps + 1), []
    for delay in _delays(log, schedulers, max_steps):
        by_step = {step + delay: rate for step, rate in log}
        by_step |= {step + 1: scheduler.next_rate for step, scheduler in schedulers.items()}
        at, rates = (np.array(side) for side in zip(*sorted(by_step.items()), strict=True))
        readings.append((at, rates))
    fits = _likeliest(readings, peak, max_steps) if max_steps else {}
    fit = fits[DEFAULT] if DEFAULT in fits else next(iter(fits.values()), None)
    if max_steps and fit and (len(fits) == 1 or (fit.shape == DEFAULT and not fit.is_late)):
        values = fit.peak * _shares(fit.shape, every, fit.shortest, max_steps)
        words = _in_words(fit, [shape for shape in fits if shape != fit.shape])
        return StepRates(values, frozenset(fit.at.tolist()), words)
    at, rates = readings[0]
    values, words = _interpolated(at, rates, peak, every)
    words += f"; these lie on schedules of several shapes ({', '.join(fits)})" if fits else ""
    return StepRates(values, frozenset(at.tolist()), words)


def _delays(
    log: Sequence[tuple[int, float]], schedulers: Mapping[int, Scheduler], max_steps: int | None
) -> tuple[int, ...]:
    """How many steps after the logged one its rate was used: 0 or 1, or both, the likelier first, if no file shows."""
    shared = [(rate, schedulers[step].next_rate) for step, rate in log if step in schedulers]
    if not all(np.isclose(rate, after, TOLERANCE, 0) for rate, after in shared):
        return (0,)
    if log and log[-1] == (max_steps, 0.0):
        return (1,)
    return (1, 0) if len({rate for rate, _ in shared}) > 1 else (0, 1)  # equal ones say nothing where the rate stays


@dataclass(frozen=True)
class _Fit:
    """A schedule that passes through all known rates."""

    shape: str
    shortest: int
    """Steps of the warm-up: the fewest."""
    longest: int
    peak: float
    """With the shortest warm-up."""
    at: np.ndarray
    """Steps of the known rates."""
    is_late: bool
    """The warm-up goes on at the first known rate above 0."""


def _in_words(fit: _Fit, others: Sequence[str]) -> str:
    more = f" (or up to {fit.longest:,})" if fit.longest > fit.shortest else ""
    words = f"those of a {fit.shape} schedule with {fit.shortest:,} warm-up steps{more}, on which these lie"
    if not others:
        return words
    return f"{words}, as they do on {' and '.join(others)} ones: {fit.shape} is the Trainer's default"


def _likeliest(
    readings: Sequence[tuple[np.ndarray, np.ndarray]], peak: float | None, max_steps: int
) -> dict[str, _Fit]:
    """Schedules on which all points of a reading lie, by their shapes: of the first kind of which there is one."""
    plain, late = [(shape, False) for shape in SHAPES], [(shape, True) for shape in SHAPES]
    for kind in (plain, late + [(shape, False) for shape in RESTARTS if peak]):
        fits: dict[str, _Fit] = {}
        for (at, rates), (shape, is_late) in itertools.product(readings, kind):
            if shape not in fits and (fit := _fit(shape, at, rates, peak, max_steps, is_late=is_late)) is not None:
                fits[shape] = fit
        if fits:
            return fits
    return {}


def _fit(
    shape: str, at: np.ndarray, rates: np.ndarray, peak: float | None, max_steps: int, *, is_late: bool
) -> _Fit | None:
    """A schedule through all points, whose warm-up ends after the first that is not 0 (`is_late`), or before it.

    A point of rate 0 tells little of a schedule: it is no evidence for the length of a warm-up.
    """
    above = at[rates > 0]
    first = above[0] if len(above) else at[0]
    if len(above) <= (1 if peak else 2) * is_late:
        return None
    few = np.unique(np.linspace(0, len(at) - 1, 20).round().astype(int))  # a first sieve
    warmups = np.unique(np.linspace(0, max_steps - 1, WARMUPS).round().astype(int))
    warmups = warmups[(warmups >= first) == is_late]
    if peak and len(above) < 2:
        warmups = warmups[:1]  # any other is made to measure

    def peaks_through(warmups: np.ndarray, points: np.ndarray | slice) -> np.ndarray:
        """The peak with each warm-up; NaN where the schedule misses a point."""
        shares = _shares(shape, at[points], warmups[:, None], max_steps)
        peaks = np.full(len(warmups), peak) if peak else _peaks(shares, rates[points])
        allowed = TOLERANCE * peak if peak else TOLERANCE * rates[points] + ROUNDING * rates.max()
        return np.where((np.abs(peaks[:, None] * shares - rates[points]) <= allowed).all(1), peaks, np.nan)

    near = warmups[~np.isnan(peaks_through(warmups, few))]
    passing = (
        (int(warmup), float(scale))
        for warmup in near
        if not np.isnan(scale := peaks_through(np.array([warmup]), slice(None))[0])
    )
    shortest, fitted = next(passing, (None, 0.0))
    if shortest is None:
        return None
    is_longest = not np.isnan(peaks_through(near[-1:], slice(None))[0])
    return _Fit(shape, shortest, int(near[-1]) if is_longest else shortest, fitted, at, is_late)


def _peaks(shares: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Peaks of least squares; 0 where all shares are."""
    squares = (shares**2).sum(1)
    return np.divide(shares @ rates, squares, out=np.zeros(len(shares)), where=squares > 0)


def _shares(shape: str, step: np.ndarray, warmup: np.ndarray | int, max_steps: int) -> np.ndarray:
    """The rate of steps, as shares of the peak, as transformers' schedules have it."""
    done = step - 1
    progress = np.clip((done - warmup) / np.maximum(1, max_steps - warmup), 0, 1)
    return np.where(done < warmup, done / np.maximum(1, warmup), (SHAPES | RESTARTS)[shape](progress))


def _interpolated(at: np.ndarray, rates: np.ndarray, peak: float | None, every: np.ndarray) -> tuple[np.ndarray, str]:
    """The rate of every step, and how it came about, in words."""
    values, words = np.interp(every, at, rates), ["interpolated between these"]
    bound = peak or rates.max()
    for end, side, is_outside in ((0, "before", every < at[0]), (-1, "after", every > at[-1])):
        if not is_outside.any():
            continue
        words.append(f"{side} step {at[end]:,} {rates[end]:.3g} as there")
        if len(far := np.flatnonzero(2 * np.abs(at - at[end]) >= is_outside.sum()).tolist()) and len(at) > 1:
            other = far[end]
            slope = (rates[other] - rates[end]) / (at[other] - at[end])
            values = np.where(is_outside, rates[end] + slope * (every - at[end]), values)
            words[-1] = f"{side} step {at[end]:,} on the line from step {at[other]:,}, at most {bound:.3g}"
    return values.clip(0, bound), ", ".join(words)


def read_scheduler(checkpoint: Path) -> Scheduler | None:
    """A checkpoint's scheduler; None without one that can be read without unpickling objects.

    Raises:
        ChecksumError: `whence train` wrote it, and it is damaged.
    """
    file = checkpoint / "scheduler.pt"
    if not file.is_file():
        return None
    check_file(file)
    damages = (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError)
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
        peaks = state.get("base_lrs")
        return Scheduler(float(state["_last_lr"][0]), float(peaks[0]) if peaks else None)
    except (*damages, AttributeError, ArithmeticError):
        return None
