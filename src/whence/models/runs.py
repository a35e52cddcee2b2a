"""A run: the checkpoints of a training in order, with the learning rate that led to each.

A Hugging Face Trainer's output directory is a run as it stands: `checkpoint-STEP/` directories, whose order and
learning rates come from the newest `trainer_state.json`. A single model directory or a Hub name is a run of one
checkpoint.

The weight of a checkpoint in a score summed over checkpoints (TracInCP, LESS) is the mean learning rate of the
interval that it closes, rescaled so that the weights sum to 1; rates that were not logged come from `learning_rates`.
A checkpoint of weight 0 is left out: nothing was learnt on the way to it. Source: Pruthi et al. 2020,
https://arxiv.org/abs/2002.08484, section 3.2; Xia et al. 2024, https://arxiv.org/abs/2402.04333, section 3.

Every checkpoint's log is the beginning of the newest one's, and their schedulers have one peak, unless the directory
holds checkpoints of two trainings: such a directory is refused.
"""

import itertools
import json
import math
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whence.counts import number_of
from whence.errors import ModelError, SettingError
from whence.models.learning_rates import Scheduler, StepRates, read_scheduler, step_rates
from whence.models.saved_files import check_file
from whence.models.unreadable_layouts import accelerate_checkpoints
from whence.paths import is_directory, require_readable


@dataclass(frozen=True)
class Checkpoint:
    """One saved state of a training."""

    path: str
    step: int | None = None
    """Optimizer steps done; None for a model that is not a Trainer's checkpoint."""
    learning_rate: float | None = None
    """Mean over the steps of the interval that this checkpoint closes; None where no rate is on file."""
    weight: float = 1.0
    """Its weight in a score that is summed over checkpoints."""
    rates: str | None = None
    """How learning rates that no file states came about, in words; None for a run of one checkpoint."""


@dataclass(frozen=True)
class Run:
    """A trained model as a directory: checkpoints in the order of their steps."""

    path: str
    checkpoints: tuple[Checkpoint, ...]
    notes: tuple[str, ...] = ()
    """What was assumed of the weights, and which checkpoints were left out."""


def open_run(path: str | Path, *, which: str = "last") -> Run:
    """Read a Trainer's output directory, a model directory or a Hub name as a run.

    Args:
        path: A directory, or a Hub name.
        which: "all" checkpoints, or only the "last". A final model beside the checkpoints of a Trainer's directory
            counts only if there is no checkpoint.

    Raises:
        SettingError: `which` is something else.
        ModelError: The Trainer's state cannot be read, or with "all" lacks the learning rates; or the directory holds
            checkpoints of two trainings.
        ChecksumError: `whence train` wrote the directory, and a file with learning rates is damaged.
    """
    if which not in ("all", "last"):
        raise SettingError(f"--checkpoints {which}: choose all or last")
    directories = _checkpoint_directories(Path(path))
    if not directories:
        if which == "all" and (others := accelerate_checkpoints(Path(path))):
            raise ModelError(
                f"{path}: its checkpoints are {others[0].name} to {others[-1].name}, of which no file says the "
                "learning rates that weight them, as a Trainer's checkpoint-STEP does: --checkpoints last, or name one."
            )
        return Run(str(path), (Checkpoint(str(path)),))
    states = [_read_state(directory) for directory in directories]
    if states[-1].log is None:  # `Trainer.save_state` writes it beside the checkpoints
        states[-1] = _read_state(Path(path))
    schedulers = [read_scheduler(directory) for directory in directories]
    _refuse_two_trainings(directories, states)
    _refuse_two_peaks(directories, schedulers)
    steps, newest = [_step(directory) for directory in directories], states[-1]
    rates = _step_rates(steps, schedulers, newest)
    means = (
        [float(rates.rates[start:end].mean()) for start, end in zip([0, *steps], steps, strict=False)] if rates else []
    )
    if which == "last":
        return Run(str(path), (Checkpoint(str(directories[-1]), steps[-1], means[-1] if means else None),))
    if rates is None or not any(means):
        raise _no_rates(directories[-1])
    checkpoints = [
        Checkpoint(str(directory), step, mean, mean / sum(means), rates.origin)
        for directory, step, mean in zip(directories, steps, means, strict=True)
    ]
    idle = [Path(checkpoint.path).name for checkpoint in checkpoints if not checkpoint.weight]
    notes = [f"{path}: the learning rate was 0 up to {', '.join(idle)}, of weight 0: left out."] if idle else []
    if _is_sparse(rates.known, steps):
        weights = ", ".join(f"{checkpoint.weight:.3f}" for checkpoint in checkpoints)
        few = f"learning rates are on file for {len(rates.known)} of {number_of(steps[-1], 'step')}"
        notes.append(f"{path}: {few}; the others are taken to be {rates.origin}. Weights of checkpoints: {weights}.")
    return Run(str(path), tuple(checkpoint for checkpoint in checkpoints if checkpoint.weight), tuple(notes))


@dataclass(frozen=True)
class _State:
    """What a checkpoint's `trainer_state.json` says."""

    log: Sequence[dict[str, Any]] | None = None
    """None where there is no such file."""
    max_steps: int | None = None


def _read_state(directory: Path) -> _State:
    file = directory / "trainer_state.json"
    check_file(file)
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        log = [entry | {"step": int(entry["step"])} for entry in state["log_history"]]
        for entry in log:
            entry |= {"learning_rate": float(entry["learning_rate"])} if "learning_rate" in entry else {}
        return _State(log, int(state["max_steps"]) if state.get("max_steps") else None)
    except FileNotFoundError:
        return _State()
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: not a Trainer's state ({error!r})") from None


def _refuse_two_trainings(directories: list[Path], states: list[_State]) -> None:
    """Refuse a log that is not the beginning of the newest one: of an earlier training, say, that went farther."""
    newest = states[-1].log
    if newest is None:
        return
    for directory, state in zip(directories[:-1], states[:-1], strict=True):
        if state.log is None:
            continue
        log = state.log
        here = [*log, *({} for _ in newest[len(log) :])]
        there = [*newest, *({} for _ in log[len(newest) :])]
        for number, (entry, other) in enumerate(zip(here, there, strict=True)):
            if not entry and other["step"] >= _step(directory):
                break  # later entries are of later steps
            if json.dumps(entry, sort_keys=True) != json.dumps(other, sort_keys=True):  # NaN equals itself here
                what = f"entry {number + 1} of their logs is {_shown(entry)} in the first and {_shown(other)}"
                raise _two_trainings(directory, directories[-1], what)


def _refuse_two_peaks(directories: list[Path], schedulers: list[Scheduler | None]) -> None:
    """Refuse schedulers of several peaks: a scheduler keeps its own when its training is resumed."""
    peaks = [
        (directory, scheduler.peak)
        for directory, scheduler in zip(directories, schedulers, strict=True)
        if scheduler is not None and scheduler.peak is not None
    ]
    for directory, peak in peaks[:-1]:
        newest, other = peaks[-1]
        if not math.isclose(peak, other, rel_tol=1e-6):
            what = f"the peak of the learning rate in their scheduler.pt is {peak:g} in the first and {other:g}"
            raise _two_trainings(directory, newest, what)


def _two_trainings(directory: Path, newest: Path, what: str) -> ModelError:
    return ModelError(
        f"{directory.parent}: {directory.name} and {newest.name} are of two trainings: {what} in the second. "
        f"Move the checkpoints of one of them away, or name a single one, such as {directory}."
    )


def _shown(entry: dict[str, Any]) -> str:
    values = [f"{name} {entry[name]}" for name in ("learning_rate", "loss") if name in entry]
    return " ".join([f"step {entry['step']}:", *values]) if entry else "missing"


def _step_rates(steps: list[int], schedulers: list[Scheduler | None], newest: _State) -> StepRates | None:
    entries = [entry for entry in newest.log or () if math.isfinite(entry.get("learning_rate", math.nan))]
    log = [(entry["step"], float(entry["learning_rate"])) for entry in entries]
    by_step = {step: state for step, state in zip(steps, schedulers, strict=True) if state is not None}
    return step_rates(log, by_step, steps[-1], newest.max_steps)


def _is_sparse(known: Set[int], steps: list[int]) -> bool:
    """Whether a tenth of an interval or more lies between two known rates, or between one and an end."""
    ends = [1, *sorted(step for step in known if step <= steps[-1]), steps[-1]]
    gap = max(after - before for before, after in itertools.pairwise(ends))
    interval = min(end - start for start, end in zip([0, *steps], steps, strict=False))
    return gap > max(1, interval / 10)


def _no_rates(newest: Path) -> ModelError:
    file = newest / "trainer_state.json"
    if not file.exists():
        return ModelError(
            f"{file}: there is no such file, and only it says the learning rates that weight checkpoints. Use "
            "--checkpoints last, or copy the file from where the model was trained."
        )
    return ModelError(
        f"{file}: no learning rate above 0 was logged up to {newest.name}, so the checkpoints cannot be weighted. Use "
        "--checkpoints last, or train with a smaller logging_steps."
    )


def _checkpoint_directories(path: Path) -> list[Path]:
    if not is_directory(path):
        return []
    require_readable(path, ())
    directories = [item for item in path.iterdir() if re.fullmatch(r"checkpoint-\d+", item.name) and item.is_dir()]
    return sorted(directories, key=_step)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("checkpoint-"))
