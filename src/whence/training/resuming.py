"""Resuming a training that was stopped, so that it ends with the weights it would have had.

A Trainer's checkpoint holds the weights, the optimizer's and the schedule's states, and the generators' states at its
step. It lacks the order of the epoch's rows, which was drawn when the epoch began: `RowOrder` remembers the generator's
state from before the draw, and `OrderKept` puts it into every `trainer_state.json`. The Trainer writes that file last,
so a checkpoint without it was cut short, and is removed. Then `FilesListed` lists the checkpoint's files with their
checksums: a checkpoint that is damaged since is refused, and not trained on. A training that was stopped between the
two lists them when it goes on.

The record beside the checkpoints says what they were trained from and how; only the same settings resume a training.
"""

import base64
import itertools
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

from whence.errors import ChecksumError, SettingError
from whence.models.saved_files import LIST, check_listed, list_files
from whence.models.training_state import IS_COMPLETE, RECORD, state_of
from whence.records import read_record
from whence.storage import Place

LOST_RECORD = "Restore it from a copy, or train into another directory."
NOT_FLAGS = ("model", "weights", "corpus", "rows", "rows_digest", "in_run_digest")
"""Entries of the record that are not the value of a flag."""
UNRECORDED = {"weights"}
"""Entries that older records lack: what is not said there is not compared."""


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


class FilesListed(TrainerCallback):
    """Lists a checkpoint's files with their checksums when the checkpoint is whole."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has written a checkpoint."""
        list_files(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def read_order(checkpoint: Path) -> Tensor:
    """The generator's state from which the order of a checkpoint's epoch was drawn.

    Raises:
        SettingError: The checkpoint does not hold it.
    """
    try:
        text = state_of(checkpoint)["stateful_callbacks"][OrderKept.__name__]["attributes"]["drawn_from"]
        order = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
        torch.Generator().set_state(order)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SettingError(
            f"{checkpoint / 'trainer_state.json'}: it does not say how the rows of its epoch were drawn ({reason}). "
            f"Remove {checkpoint}: the same command goes on from an earlier one."
        ) from None
    return order


def newest_checkpoint(directory: Path) -> Path | None:
    """The last checkpoint that was written whole; later ones are incomplete and are removed.

    Raises:
        ChecksumError: That checkpoint is damaged since, or is of another step than its name says.
    """
    checkpoints = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    ordered = sorted(checkpoints, key=step_of, reverse=True)
    for path, before in itertools.zip_longest(ordered, ordered[1:]):
        if (path / LIST).exists():
            origin = "the start" if before is None else before.name
            remedy = f"Remove {path}, and run the same command again: it goes on from {origin}."
            check_listed(path, remedy=remedy)
            if (step := state_of(path).get("global_step")) != step_of(path):
                raise ChecksumError(f"{path} holds step {step}: it was renamed. Give it back its name, or: {remedy}")
            return path
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError, RecursionError):
            shutil.rmtree(path)
        else:
            list_files(path)  # it was stopped right before that
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
    refuse_others(directory)
    Place.at(directory).write_document(RECORD, record | {IS_COMPLETE: False})


def refuse_others(directory: Path) -> None:
    """Refuse a directory of checkpoints or of a model without a record: its files would be overwritten.

    Raises:
        SettingError: It is one.
    """
    if (directory / RECORD).exists():
        return
    for pattern in ("checkpoint-*", "config.json", "tokenizer*", "*.safetensors"):
        if others := sorted(directory.glob(pattern)):
            raise SettingError(
                f"{directory} holds {others[0].name} already, and no {RECORD} that says how it was trained. Remove it, "
                "or name another directory."
            )


def finish(directory: Path) -> None:
    """Mark a training as done, and list the files beside its checkpoints with their checksums."""
    place = Place.at(directory)
    place.write_document(RECORD, place.read_document(RECORD, LOST_RECORD) | {IS_COMPLETE: True})
    list_files(directory, but=RECORD)


def is_complete(directory: Path) -> bool:
    """Whether the training in a directory is done."""
    try:
        return _stored(directory / RECORD).get(IS_COMPLETE) is True
    except (OSError, ChecksumError):
        return False


def _stored(file: Path) -> dict[str, Any]:
    """A record as stored.

    Raises:
        ChecksumError: It is none.
    """
    return read_record(dict[str, Any], Place.at(file.parent).read(file.name), str(file), LOST_RECORD)


def _check_same(file: Path, record: dict[str, Any]) -> None:
    before = _stored(file)
    now = json.loads(json.dumps(record))
    passed = {IS_COMPLETE} | (UNRECORDED - before.keys())
    names = [name for name in before | now if name not in passed and before.get(name) != now.get(name)]
    if names:
        differences = (f"{_flag_of(name)} is {before.get(name)!r} there, {now.get(name)!r} here" for name in names)
        raise SettingError(
            f"{file.parent} holds a training with other settings: {'; '.join(differences)}. Use the same settings to "
            "go on with it, or name another directory."
        )


def _flag_of(name: str) -> str:
    return name if name in NOT_FLAGS else f"--{name.replace('_', '-')}"
