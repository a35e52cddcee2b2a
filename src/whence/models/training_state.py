"""What `whence train` and a Trainer say of the training in a directory: how far it has come, which of its
checkpoints is its best, and on which day it was made.
"""

import filecmp
import json
import logging
import re
from pathlib import Path
from typing import Any

from whence.errors import WhenceError
from whence.models.runs import open_run
from whence.models.weights import weight_files
from whence.storage import Place

logger = logging.getLogger(__name__)

RECORD = "whence_train.json"
"""File in which `whence train` says what was trained on what."""
IS_COMPLETE = "is_complete"
"""Its entry that becomes true when the training is done."""


def state_of(checkpoint: str | Path) -> dict[str, Any]:
    """A Trainer's state in a checkpoint; empty where there is none that can be read."""
    try:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def date_of_training(model: str | Path) -> str | None:
    """The day that a chat template wrote into the rows of a training, as YYYY-MM-DD.

    Args:
        model: Directory of a run of `whence train`, or one of its checkpoints.

    Returns:
        None where no day is recorded: for a template without a date, and for any other model.
    """
    return _recorded(model, "date")


def supervision_of_training(model: str | Path) -> str | None:
    """Which tokens of a row were supervised in a training, one of `corpus.templates.SUPERVISED`.

    Args:
        model: Directory of a run of `whence train`, or one of its checkpoints.

    Returns:
        None where nothing is recorded: for the assistant's alone, and for any other model.
    """
    return _recorded(model, "supervise")


def _recorded(model: str | Path, setting: str) -> str | None:
    path = Path(model)
    run = path.parent if re.fullmatch(r"checkpoint-\d+", path.name) else path
    try:
        value = json.loads((run / RECORD).read_text()).get(setting)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def warn_of_another_day(model: str | Path, date: str | None) -> None:
    """Log a note if rows are to be written with another day than those that the model was trained on."""
    trained = date_of_training(model)
    if date and trained and date != trained:
        logger.warning(
            "%s was trained on rows in which the chat template wrote the day %s; here it writes %s. They are other "
            "tokens: without --date, in a new directory, the day is the training's.", model, trained, date,
        )  # fmt: skip


def unfinished_note(path: str | Path) -> str | None:
    """A sentence on a run whose last checkpoint is not the end of its training; None for any other model.

    A training that was meant to stop early looks the same in another tool's run, so this is never an error.
    """
    last = Path(open_run(path).checkpoints[-1].path)
    if last == Path(path):  # a model or a checkpoint that was named itself
        return None
    state = state_of(last)
    step, steps = state.get("global_step"), state.get("max_steps")
    place = f"checkpoint {step} of {steps}" if isinstance(step, int) and isinstance(steps, int) else last.name
    try:
        is_complete = Place.at(path).read_document(RECORD).get(IS_COMPLETE)
    except (OSError, WhenceError):
        is_complete = None
    if is_complete is False:
        return f"{path} is a training that is not finished ({place}): `whence train` with the same settings goes on."
    if is_complete is None and isinstance(step, int) and isinstance(steps, int) and step < steps:
        return f"{path} is a training that ended before its last step ({place}): stopped early, or not finished."
    return None


def best_note(path: str | Path) -> str | None:
    """A sentence on a run whose own weights are those of its best checkpoint, where the last one is taken; else None.

    With `load_best_model_at_end` a Trainer's directory holds the best weights, and its newest checkpoint the last.
    """
    last = Path(open_run(path).checkpoints[-1].path)
    best, own = state_of(last).get("best_model_checkpoint"), weight_files(path) if last != Path(path) else []
    if not (isinstance(best, str) and own) or Path(best).name == last.name:
        return None
    if all((last / file.name).is_file() and filecmp.cmp(file, last / file.name, shallow=False) for file in own):
        return None
    where = Path(path) / Path(best).name
    return (
        f"{path}: the weights beside its checkpoints are not those of {last.name}: the Trainer's best by its metric is "
        f"{Path(best).name} (load_best_model_at_end). {last.name} is taken; for the best, "
        + (f"name {where}." if where.is_dir() else "copy the model's own files to another directory and name that.")
    )


def run_notes(path: str | Path) -> tuple[str, ...]:
    """What a reader has to know of the checkpoint that stands for a run: `unfinished_note` and `best_note`."""
    return tuple(note for note in (unfinished_note(path), best_note(path)) if note)


def warn_of_run(path: str | Path) -> None:
    """Log the notes of `run_notes`."""
    for note in run_notes(path):
        logger.warning("%s", note)
