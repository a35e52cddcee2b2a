"""A run of `whence train --replayable`, opened to be replayed: the model, its rows as they were read, and the log."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from whence.brief import brief
from whence.corpus.layouts import Row
from whence.corpus.reading import IN_MEMORY, Corpus, open_corpus
from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.models.loading import LoadedModel
from whence.training.recipe import TrainSettings
from whence.training.repetition import read_recipe, repeatable
from whence.training.step_derivatives import RowLosses
from whence.training.step_log import StepLog, open_log, remove_dropout
from whence.training.trained_weights import trainable
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
    places: Int64[Tensor, " n"]
    """Place in the corpus of each row that was trained on, from 0: some have no supervised token, or were not drawn."""

    @property
    def model(self) -> LoadedModel:
        """The model, in training precision."""
        return self.losses.model


def open_replayable(
    run: str | Path,
    corpus: str | Path | Corpus | Iterable[Row] | None = None,
    *,
    model: str | Path | None = None,
    is_sampled: bool = False,
    flag: str = "--model",
) -> ReplayableRun:
    """Open a finished run.

    Args:
        run: Directory of `whence train --replayable`.
        corpus: What it was trained on, where that is not where it was; None: where its record says.
        model: The model that it was trained from, if that has moved.
        is_sampled: The corpus is just the rows of the training, of which no share is drawn.
        flag: The option that names the model that it was trained from, for messages.

    Raises:
        MissingLogError: The run does not say what it did at each step.
        SettingError: It is not finished.
        ManifestMismatchError: The corpus gives other rows now, or the model has other weights.
    """
    log, read = open_log(run), read_recipe(Path(run))["corpus"]
    if corpus is None and read.endswith(IN_MEMORY):
        raise SettingError(
            f"{run}: it was trained on {read}, which no file holds: give the same rows again, as --corpus FILE or, in "
            "Python, corpus=ROWS"
        )
    texts = open_corpus(read if corpus is None else corpus)
    training = repeatable(run, texts, model=model, is_sampled=is_sampled, flag=flag)
    opened = training.opened
    net: Any = trainable(opened.loaded, opened.settings)
    remove_dropout(net)
    has_adapter = opened.loaded.has_adapter or opened.settings.lora_rank is not None
    held = LoadedModel(net.eval(), opened.loaded.tokenizer, str(run), has_adapter)
    rows = [Encoded(row["input_ids"].tolist(), row["supervised"].tolist()) for row in opened.rows.rows]
    last = log.state(len(log.steps)).weights
    weights = {name: weight for name, weight in net.requires_grad_(False).named_parameters() if name in last}
    put(last, weights)
    ids, sources = tuple(opened.rows.ids), tuple(opened.rows.sources)
    return ReplayableRun(RowLosses(held, weights, rows), log, ids, sources, texts, opened.settings,
                         torch.tensor(opened.rows.places))  # fmt: skip
