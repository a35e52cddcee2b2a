"""The learning rate of every step of a training, from the few steps at which a Trainer wrote it down.

Known rates come from the log of `trainer_state.json`, and from each checkpoint's `scheduler.pt`, which also holds the
peak. From transformers 4.51 on the log has the rate of the step that was made, before that the rate of the next step:
a scheduler's file at a logged step shows which, as does an exact 0 logged at the last step.

If a constant, linear or cosine schedule after a linear warm-up passes through all known rates, it is taken; the
shortest such warm-up, where several do, and through a single rate of no known peak the Trainer's default, linear. Else
rates are interpolated, and the first and the last line go on to the ends, between 0 and the peak. `training_args.bin`,
which would say, can only be unpickled, and is never opened.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from whence.models.saved_files import check_file

TOLERANCE = 1e-6
"""Of a known rate: rates are written with all their digits."""
WARMUPS = 20_000
"""Lengths of a warm-up that are tried at most."""
SHAPES = {
    "constant": lambda progress: np.ones_like(progress),
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + np.cos(np.pi * progress)) / 2,
}
"""Schedules after their warm-up, from 1, by the share of the remaining steps that were made."""


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
    every, candidates = np.arange(1, steps + 1), []
    for delay in _delays(log, schedulers, max_steps):
        by_step = {step + delay: rate for step, rate in log}
        by_step |= {step + 1: scheduler.next_rate for step, scheduler in schedulers.items()}
        at, rates = (np.array(side) for side in zip(*sorted(by_step.items()), strict=True))
        candidates.append((at, rates))
        if max_steps and (fit := _schedule(at, rates, peak, max_steps)) is not None:
            shape, warmup, scale = fit
            words = f"those of a {shape} schedule with {warmup} warm-up steps, on which these lie"
            return StepRates(scale * _shares(shape, every, warmup, max_steps), frozenset(at.tolist()), words)
    at, rates = candidates[0]
    return StepRates(_interpolated(at, rates, peak, every), frozenset(at.tolist()), "interpolated between these")


def _delays(
    log: Sequence[tuple[int, float]], schedulers: Mapping[int, Scheduler], max_steps: int | None
) -> tuple[int, ...]:
    """How many steps after the logged one its rate was used: 0 or 1, or both, the likelier first, if no file shows."""
    shared = [(rate, schedulers[step].next_rate) for step, rate in log if step in schedulers]
    if shared:
        return (1,) if all(np.isclose(rate, after, TOLERANCE, 0) for rate, after in shared) else (0,)
    return (1,) if log and log[-1] == (max_steps, 0.0) else (0, 1)


def _schedule(at: np.ndarray, rates: np.ndarray, peak: float | None, max_steps: int) -> tuple[str, int, float] | None:
    """Shape, warm-up steps and peak of a schedule that passes through all points."""
    few = np.unique(np.linspace(0, len(at) - 1, 20).round().astype(int))  # a first sieve
    warmups = np.unique(np.linspace(0, max_steps - 1, WARMUPS).round().astype(int))
    for shape in SHAPES if peak or len(at) > 1 else ("linear",):
        shares = _shares(shape, at[few], warmups[:, None], max_steps)
        scales = np.full(len(warmups), peak) if peak else _scales(shares, rates[few])
        is_near = np.abs(scales[:, None] * shares - rates[few]).max(1) <= TOLERANCE * rates.max()
        for number in np.flatnonzero(is_near)[:1]:
            warmup, scale = int(warmups[number]), float(scales[number])
            if np.allclose(scale * _shares(shape, at, warmup, max_steps), rates, 0, TOLERANCE * rates.max()):
                return shape, warmup, scale
    return None


def _scales(shares: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Peaks of least squares; 0 where all shares are."""
    squares = (shares**2).sum(1)
    return np.divide(shares @ rates, squares, out=np.zeros(len(shares)), where=squares > 0)


def _shares(shape: str, step: np.ndarray, warmup: np.ndarray | int, max_steps: int) -> np.ndarray:
    """The rate of steps, as shares of the peak, as transformers' schedules have it."""
    done = step - 1
    progress = np.clip((done - warmup) / np.maximum(1, max_steps - warmup), 0, 1)
    return np.where(done < warmup, done / np.maximum(1, warmup), SHAPES[shape](progress))


def _interpolated(at: np.ndarray, rates: np.ndarray, peak: float | None, every: np.ndarray) -> np.ndarray:
    values = np.interp(every, at, rates)
    if len(at) > 1:
        for is_outside, (near, far) in ((every < at[0], (0, 1)), (every > at[-1], (-1, -2))):
            slope = (rates[far] - rates[near]) / (at[far] - at[near])
            values = np.where(is_outside, rates[near] + slope * (every - at[near]), values)
    return values.clip(0, peak or np.inf)


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
    except (*damages, AttributeError):
        return None
