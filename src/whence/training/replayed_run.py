"""A run of `whence train --replayable`, opened to be replayed: the model, its rows as they were read, and the log."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from whence.brief import brief
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
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
from whence.training.update_rules import put


@dataclass(frozen=True)
class ReplayableRun:
    """What a replay needs."""

    __repr__ = brief

    losses: RowLosses
    """The model at the end of the training, its trained weights by name, and the rows."""
    log: StepLog
    ids: tuple[str, ...]
    """Ids of the rows that were trained on, in the order of their numbers."""
    sources: tuple[str | None, ...]
    corpus: Corpus
    settings: TrainSettings

    @cached_property
    def places(self) -> Int64[Tensor, " n"]:
        """Place in the corpus of each row that was trained on, from 0: some have no supervised token, or were not
        drawn.
        """
        ids, places = iter(self.ids), []
        expected = next(ids, None)
        for place, example in enumerate(self.corpus):
            if example.id == expected:
                places.append(place)
                expected = next(ids, None)
        return torch.tensor(places)

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
    texts = open_corpus(record["corpus"] if corpus is None else corpus)
    opened = open_training(record["model"], texts, directory, settings)
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
    weights = {name: weight.requires_grad_(False) for name, weight in net.named_parameters() if weight.requires_grad}
    put(log.state(len(log.steps)).weights, weights)
    ids, sources = tuple(opened.rows.ids), tuple(opened.rows.sources)
    return ReplayableRun(RowLosses(model, weights, rows), log, ids, sources, texts, opened.settings)
