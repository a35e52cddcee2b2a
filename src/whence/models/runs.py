"""A run: the checkpoints of a training in order, with the learning rate that led to each.

A Hugging Face Trainer's output directory is a run as it stands: `checkpoint-STEP/` directories, whose order and
learning rates come from the newest `trainer_state.json`. A single model directory or a Hub name is a run of one
checkpoint.

The weight of a checkpoint in a score summed over checkpoints (TracInCP, LESS) is the mean learning rate of the
interval that it closes, rescaled so that the weights sum to 1. Source: Pruthi et al. 2020,
https://arxiv.org/abs/2002.08484, section 3.2; Xia et al. 2024, https://arxiv.org/abs/2402.04333, section 3.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whence.errors import ModelError, SettingError
from whence.models.saved_files import check_file


@dataclass(frozen=True)
class Checkpoint:
    """One saved state of a training."""

    path: str
    step: int | None = None
    """Optimizer steps done; None for a model that is not a Trainer's checkpoint."""
    learning_rate: float | None = None
    """Mean over the logged steps of the interval that this checkpoint closes; None where none was logged."""
    weight: float = 1.0
    """Its weight in a score that is summed over checkpoints."""


@dataclass(frozen=True)
class Run:
    """A trained model as a directory: checkpoints in the order of their steps."""

    path: str
    checkpoints: tuple[Checkpoint, ...]


def open_run(path: str | Path, *, which: str = "last") -> Run:
    """Read a Trainer's output directory, a model directory or a Hub name as a run.

    Args:
        path: A directory, or a Hub name.
        which: "all" checkpoints, or only the "last". A final model beside the checkpoints of a Trainer's directory
            counts only if there is no checkpoint.

    Raises:
        SettingError: `which` is something else.
        ModelError: The Trainer's state cannot be read, or with "all" lacks the learning rates.
    """
    if which not in ("all", "last"):
        raise SettingError(f"--checkpoints {which}: choose all or last")
    directories = _checkpoint_directories(Path(path))
    if not directories:
        return Run(str(path), (Checkpoint(str(path)),))
    history = _learning_rates(directories[-1])
    steps = [_step(directory) for directory in directories]
    rates = [
        _mean([rate for step, rate in history if start < step <= end])
        for start, end in zip([0, *steps], steps, strict=False)
    ]
    if which == "last":
        return Run(str(path), (Checkpoint(str(directories[-1]), steps[-1], rates[-1]),))
    return Run(str(path), tuple(_weighted(directories, steps, rates)))


def _weighted(directories: list[Path], steps: list[int], rates: list[float | None]) -> list[Checkpoint]:
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(rates) or sum(known) == 0:
        lacking = [directory.name for directory, rate in zip(directories, rates, strict=True) if not rate]
        if not (file := directories[-1] / "trainer_state.json").exists():
            raise ModelError(
                f"{file}: there is no such file, and only it says the learning rates that weight checkpoints. Use "
                "--checkpoints last, or copy the file from where the model was trained."
            )
        raise ModelError(
            f"{file}: no learning rate was logged before {', '.join(lacking)}, so the "
            "checkpoints cannot be weighted. Use --checkpoints last, or train with a smaller logging_steps."
        )
    total = sum(known)
    return [
        Checkpoint(str(directory), step, rate, rate / total)
        for directory, step, rate in zip(directories, steps, known, strict=True)
    ]


def _checkpoint_directories(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    directories = [item for item in path.iterdir() if re.fullmatch(r"checkpoint-\d+", item.name) and item.is_dir()]
    return sorted(directories, key=_step)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("checkpoint-"))


def _learning_rates(directory: Path) -> list[tuple[int, float]]:
    """`(step, rate)` of every log line. The newest state repeats the whole history."""
    file = directory / "trainer_state.json"
    check_file(file)
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        logged = [line for line in state["log_history"] if "learning_rate" in line]
        return [(int(line["step"]), float(line["learning_rate"])) for line in logged]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not a Trainer's state ({error!r})") from None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
