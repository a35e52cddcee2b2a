"""A run of `whence train --replayable`, opened to be replayed: the model, its rows as they were read, and the log."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from whence.brief import brief
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus
from whence.corpus.tokens import Encoded
from whence.errors import CorpusError, SettingError
from whence.models.loading import LoadedModel, directory_digest
from whence.models.training_state import IS_COMPLETE, RECORD
from whence.storage import Place
from whence.training.recipe import TrainSettings
from whence.training.resuming import LOST_RECORD
from whence.training.step_derivatives import RowLosses
from whence.training.step_log import StepLog, open_log, remove_dropout
from whence.training.trainer import open_training, trainable


@dataclass(frozen=True)
class ReplayableRun:
    """What a replay needs."""

    __repr__ = brief

    losses: RowLosses
    """The model, with the trained weights that require gradients, and the rows."""
    log: StepLog
    ids: tuple[str, ...]
    """Ids of the rows that were trained on, in the order of their numbers."""
    sources: tuple[str | None, ...]
    corpus: str
    """Name of the corpus."""
    settings: TrainSettings

    @property
    def model(self) -> LoadedModel:
        """The model, in training precision."""
        return self.losses.model


def open_replayable(run: str | Path, corpus: str | Path | Corpus | Iterable[Row] | None = None) -> ReplayableRun:
    """Open a finished run.

    Args:
        run: Directory of `whence train --replayable`.
        corpus: What it was trained on, where that is not where it was; None: where its record says.

    Raises:
        SettingError: It is not such a run, or not finished, or the model that it started from has changed.
        CorpusError: The corpus has other rows now.
    """
    log, directory = open_log(run), Path(run)
    record: dict[str, Any] = Place.at(directory).read_document(RECORD, LOST_RECORD)
    if not record.get(IS_COMPLETE):
        raise SettingError(f"{run} is a training that is not finished: the same `whence train` command goes on")
    known = {field.name for field in fields(TrainSettings)} - {"in_run", "in_run_every", "in_run_order", "in_run_rows"}
    settings = TrainSettings(**{name: value for name, value in record.items() if name in known})
    opened = open_training(record["model"], record["corpus"] if corpus is None else corpus, directory, settings)
    if directory_digest(opened.source) != record["weights"]:
        raise SettingError(f"{record['model']} has other weights than {run} was trained from: put those back")
    if opened.rows.record()["rows_digest"] != record["rows_digest"]:
        raise CorpusError(
            f"{opened.corpus}: these rows are not those that {run} was trained on ({record['rows']:,} rows of "
            f"{record['corpus']}). Give that corpus with --corpus"
        )
    net: Any = trainable(opened.loaded, opened.settings)
    remove_dropout(net)
    has_adapter = opened.loaded.has_adapter or settings.lora_rank is not None
    model = LoadedModel(net.eval(), opened.loaded.tokenizer, str(directory), has_adapter)
    rows = [Encoded(row["input_ids"].tolist(), row["supervised"].tolist()) for row in opened.rows.rows]
    weights = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
    return ReplayableRun(
        RowLosses(model, weights, rows),
        log,
        tuple(opened.rows.ids),
        tuple(opened.rows.sources),
        opened.corpus,
        settings,
    )
