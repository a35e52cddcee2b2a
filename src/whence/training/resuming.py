"""Resuming a training that was stopped, so that it ends with the weights it would have had.

A Trainer's checkpoint holds the weights, the optimizer's and the schedule's states, and the generators' states at its
step. It lacks the order of the epoch's rows, which was drawn when the epoch began: `RowOrder` remembers the generator's
state from before the draw, and `OrderKept` puts it into every `trainer_state.json`. The Trainer writes that file last,
so a checkpoint without it was cut short, and is removed.

The record beside the checkpoints says what they were trained from and how; only the same settings resume a training.
"""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler

from whence.errors import SettingError

RECORD = "whence_train.json"
IS_COMPLETE = "is_complete"
NOT_FLAGS = ("model", "corpus", "rows", "rows_digest", "in_run_digest")
"""Entries of the record that are not the value of a flag."""


class RowOrder(LengthGroupedSampler):
    """Groups rows of like length, in an order that can be drawn again."""

    drawn_from: Tensor | None = None
    """State of torch's generator before the epoch's order was drawn."""
    resumed_from: Tensor | None = None
    """The same state for the epoch in which a training was stopped; used once."""

    def __iter__(self) -> Iterator[int]:
        if self.resumed_from is not None:
            torch.set_rng_state(self.resumed_from)  # the Trainer restores the step's own state after this
            self.resumed_from = None
        self.drawn_from = torch.get_rng_state()
        return super().__iter__()


class OrderKept(TrainerCallback, ExportableState):
    """Has the Trainer write down the state from which the epoch's order was drawn.

    Its name is in every `trainer_state.json`: under another, older checkpoints could not be resumed.
    """

    def __init__(self, order: RowOrder):
        self.order = order

    def state(self) -> dict[str, Any]:
        """The entry of `trainer_state.json`."""
        state = self.order.drawn_from
        text = None if state is None else base64.b64encode(state.numpy().tobytes()).decode()
        return {"args": {}, "attributes": {"drawn_from": text}}


def read_order(checkpoint: Path) -> Tensor:
    """The generator's state from which the order of a checkpoint's epoch was drawn."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    text = state["stateful_callbacks"][OrderKept.__name__]["attributes"]["drawn_from"]
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def newest_checkpoint(directory: Path) -> Path | None:
    """The last checkpoint that was written whole; later ones are incomplete and are removed."""
    checkpoints = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(checkpoints, key=step_of, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            return path
    return None


def step_of(checkpoint: Path) -> int:
    """Number of steps done at a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def begin(directory: Path, record: dict[str, Any]) -> None:
    """Write the record of a training, or check that the record already there says the same.

    Raises:
        SettingError: The record has other settings, each of which is named; or there are checkpoints without a record.
    """
    file = directory / RECORD
    if file.exists():
        _check_same(file, record)
        return
    if any(directory.glob("checkpoint-*")):
        raise SettingError(
            f"{directory} holds checkpoints already, and no {RECORD} that says how they were trained. Remove it, or "
            "name another directory."
        )
    directory.mkdir(parents=True, exist_ok=True)
    _write(file, record | {IS_COMPLETE: False})


def date_of_start(directory: Path) -> str | None:
    """The day that the rows of the training in a directory were written with; None where it is not recorded."""
    try:
        return json.loads((directory / RECORD).read_text()).get("date")
    except (OSError, ValueError, AttributeError):
        return None


def finish(directory: Path) -> None:
    """Mark a training as done."""
    file = directory / RECORD
    _write(file, json.loads(file.read_text()) | {IS_COMPLETE: True})


def is_complete(directory: Path) -> bool:
    """Whether the training in a directory is done."""
    try:
        return json.loads((directory / RECORD).read_text())[IS_COMPLETE]
    except (OSError, ValueError, KeyError):
        return False


def _write(file: Path, record: dict[str, Any]) -> None:
    """Write a record in one step: half a record would refuse its own training."""
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(json.dumps(record, indent=2) + "\n")
    draft.replace(file)


def _check_same(file: Path, record: dict[str, Any]) -> None:
    try:
        before = json.loads(file.read_text())
    except ValueError as error:
        raise SettingError(f"{file}: not a record of a training ({error}). Name another directory.") from None
    now = json.loads(json.dumps(record))
    names = [name for name in before | now if name != IS_COMPLETE and before.get(name) != now.get(name)]
    if names:
        differences = (f"{_flag_of(name)} is {before.get(name)!r} there, {now.get(name)!r} here" for name in names)
        raise SettingError(
            f"{file.parent} holds a training with other settings: {'; '.join(differences)}. Use the same settings to "
            "go on with it, or name another directory."
        )


def _flag_of(name: str) -> str:
    return name if name in NOT_FLAGS else f"--{name.replace('_', '-')}"
