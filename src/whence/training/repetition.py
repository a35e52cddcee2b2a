"""A training of `whence train` made again from its record: all of it, or without some of its rows.

The record beside the checkpoints says the model, the digest of the rows, and every setting, so the recipe needs only
the corpus. Made again on the same machine with as many threads, the training ends with the same bits; elsewhere sums
are rounded in another order, and the steps of a training multiply what differs.

Two ways in which rows leave:

    zero    they keep their places in the batches and add nothing (`left_out_rows`)
    drop    a training on the other rows alone by the same recipe: as many epochs, so fewer steps, in another order

Nothing is written: the trained model stays in memory. What follows a training is left out (`in_run`); a training whose
order of rows depends on its losses (`online_mixing`) cannot be made again without some of its rows.
"""

import copy
import gc
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from whence import runner
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.counts import number_of
from whence.errors import ManifestMismatchError, ModelError, SettingError
from whence.models.loading import LoadedModel, directory_digest
from whence.models.training_state import IS_COMPLETE, RECORD
from whence.paths import absolute, exists
from whence.records import MisfitError, fitting, unlike_written
from whence.storage import Place
from whence.training.recipe import IN_RUN, LeaveOut, TrainSettings
from whence.training.resuming import LOST_RECORD
from whence.training.trainer import Opened, open_training, trainer_of, training_until_its_end


@dataclass(frozen=True, kw_only=True)
class Repeatable:
    """A training that can be made again."""

    run: Path
    """Directory that `whence train` wrote."""
    opened: Opened
    """What it started from."""
    record: dict[str, Any]
    """The record of the run."""
    corpus: Corpus
    model: str | None = None
    """Where the model is that it was trained from, if that has moved."""
    is_sampled: bool = False
    """Whether the corpus is just the rows of the training."""

    def __reduce__(self) -> Any:
        """Another process opens it anew, from the same files."""
        corpus = copy.copy(self.corpus)
        if not isinstance(corpus.origin, list):
            corpus.origin = str(absolute(str(corpus.origin)))
        run, model = self.run.resolve(), absolute(self.model)
        return partial(repeatable, run, corpus, model=model, is_sampled=self.is_sampled), ()


@dataclass(frozen=True)
class Trained:
    """A training that was made again."""

    model: LoadedModel
    start: dict[str, Tensor]
    """Trained weights before the first step, by their names in the model."""
    steps: int
    seconds: float
    """Wall time of its steps."""


def repeatable(
    run: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    *,
    model: str | Path | None = None,
    is_sampled: bool = False,
    flag: str = "--model",
) -> Repeatable:
    """What a run of `whence train` started from, once it is known that nothing of it has changed.

    Args:
        run: Directory of the run.
        corpus: The corpus that it was trained on.
        model: The model that it was trained from, if that has moved.
        is_sampled: The corpus is just the rows of the training, of which no share is drawn.
        flag: The option that names the model, for messages.

    Raises:
        SettingError: `whence train` did not write the run, or it cannot be made again.
        ManifestMismatchError: The corpus gives other rows, or the model has other weights.
        ModelError: The model is not there any more.
        ChecksumError: The record is damaged.
    """
    directory = Path(run)
    record = read_recipe(directory)
    source = str(model or record["model"])
    if model is None and source.startswith("/") and not exists(source):
        raise ModelError(f"{run}: the model that it was trained from is not at {source} any more. Name it by {flag}.")
    settings = settings_in(directory, record)
    settings = replace(settings, fraction=1.0) if is_sampled else settings
    texts = open_corpus(corpus)
    opened = open_training(source, texts, directory, settings)
    if "weights" in record and directory_digest(opened.source) != record["weights"]:
        raise ManifestMismatchError(
            f"{run}: it was trained from other weights than those at {source}. Name the model it was trained from by "
            f"{flag}."
        )
    _refuse_other_rows(run, opened, record)
    moved = None if model is None else str(model)
    return Repeatable(run=directory, opened=opened, record=record, corpus=texts, model=moved, is_sampled=is_sampled)


def read_recipe(run: Path) -> dict[str, Any]:
    """The record of a finished run; for errors see `repeatable`."""
    if not exists(run / RECORD):
        raise SettingError(
            f"{run}: no {RECORD}, which says how it was trained. Train it with `whence train`, whose runs can be made "
            "again."
        )
    record = Place.at(run).read_document(RECORD, LOST_RECORD)
    if record.get(IS_COMPLETE) is not True:
        raise SettingError(f"{run}: its training is not finished. `whence train` with the same settings goes on.")
    if record.get("mix") is not None:
        raise SettingError(
            f"{run}: the order of its rows followed their losses (--mix {record['mix']}), which leaving rows out "
            "changes. Train without --mix."
        )
    return record


def settings_in(run: Path, record: dict[str, Any]) -> TrainSettings:
    """Settings of `train` in a run's record, without those that change no weight."""
    names = {field.name for field in fields(TrainSettings)} - {*IN_RUN, "mix", "by", "mix_set"}
    try:
        for name in ("model", "rows_digest", "corpus"):
            fitting(str, record.get(name), name)
        fitting(int, record.get("rows"), "rows")
        return TrainSettings(**{name: record[name] for name in names & record.keys()})
    except (MisfitError, SettingError, TypeError) as error:
        raise unlike_written(str(run / RECORD), error, LOST_RECORD) from None


def _refuse_other_rows(run: str | Path, opened: Opened, record: dict[str, Any]) -> None:
    found = opened.rows.record()
    if found["rows_digest"] == record["rows_digest"]:
        return
    rows = number_of(record["rows"], "row")
    what = f"as many, {found['rows']:,}, with other tokens" if found["rows"] == record["rows"] else f"{found['rows']:,}"
    raise ManifestMismatchError(
        f"{opened.corpus}: the run at {run} was trained on {rows} of {record['corpus']}; these are {what}. Give the "
        "corpus that it was trained on."
    )


def train_again(
    training: Repeatable,
    directory: Path,
    *,
    left_out: Iterable[int] = (),
    leave_out: LeaveOut = "zero",
    seed: int | None = None,
    tick: runner.Tick = lambda steps, tokens: None,
) -> Trained:
    """Make a training again, without some of its rows.

    Args:
        training: What to make again; it is as before afterwards.
        directory: An empty directory, which the Trainer asks for and writes nothing in.
        left_out: Numbers of the rows to leave out.
        leave_out: How they leave.
        seed: Seed of the order of rows, of dropout and of the start of adapters; None: the run's own.
        tick: Called after each step.

    Raises:
        ModelError: Rows cannot leave a training of this model by "zero".
    """
    opened, numbers = training.opened, frozenset(left_out)
    drops = leave_out == "drop"
    assert len(numbers) < len(opened.rows), "no row is left"
    begun = replace(
        opened,
        loaded=replace(opened.loaded, model=copy.deepcopy(opened.loaded.model)),
        rows=opened.rows.without(numbers) if drops and numbers else opened.rows,
        left_out=frozenset() if drops else numbers,
        settings=replace(opened.settings, seed=opened.settings.seed if seed is None else seed),
    )
    trainer = trainer_of(begun, directory)
    trainer.args.save_strategy = "no"  # type: ignore[assignment]
    net: Any = trainer.model
    start = {name: weight.detach().cpu().clone() for name, weight in net.named_parameters() if weight.requires_grad}
    began = time.perf_counter()
    training_until_its_end(trainer, tick)
    seconds = time.perf_counter() - began
    has_adapter = opened.loaded.has_adapter or opened.settings.lora_rank is not None
    steps = int(trainer.state.global_step)
    model = LoadedModel(net.requires_grad_(False).eval(), opened.loaded.tokenizer, opened.loaded.path, has_adapter)
    trainer.optimizer = trainer.lr_scheduler = None
    del trainer
    gc.collect()  # a Trainer and its callbacks hold one another: moments of a dozen members would stay
    return Trained(model, start, steps, seconds)
