"""What a recover job would take: its readings of the corpus and its trainings, from a pilot of each.

A reading is one pass over the rows at a point; the pilot reads some rows, evenly spread over the corpus. A training is
that of a shadow, or of a model of one source; the pilot makes a few steps of the first shadow's. How many trainings
find the shadow's rate is seen only as they are made: the plan has one, and says how many there may be.
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.templates import prepare, stored_date, today, written_by
from whence.corpus.tokens import bucketed, encode
from whence.counts import number_of
from whence.indexing.ingest import fingerprint_of
from whence.indexing.memory import forget_peak, peak_resident, resident
from whence.indexing.planning import DISK, MEMORY, Phase, Plan, free_disk, free_memory
from whence.indexing.vectors import batch_tokens, projection_for
from whence.models.loading import load_tokenizer
from whence.models.training_state import date_of_training, supervision_of_training
from whence.outputs import refuse_inputs
from whence.recovery.case import Case, at_point, only_moved, open_case, refuse_uninformative
from whence.recovery.evidence import Pass
from whence.recovery.points import DIFFERENCE, points_of
from whence.recovery.settings import RecoverSettings, check_count
from whence.recovery.shadow_calibration import recipe_of, shadow_split
from whence.recovery.shadow_model import BATCH_SIZES, EPOCHS, MOST_TRAININGS
from whence.recovery.source_models import CHECK_TRAININGS, MOST_SOURCES, rows_to_train
from whence.storage import Place
from whence.training.dry_run import PilotSteps, pilot_steps, positions_of
from whence.training.recipe import settings_of
from whence.training.trainer import OPTIMIZERS, open_training

PILOT_ROWS = 128
"""Rows that are read in the pilot."""
PILOT_MEMBERS = 256
"""Rows of the pilot's training."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What reading rows at one point takes."""

    seconds_per_row: float
    peak: int
    row_bytes: int
    """Bytes of a row's evidence on disk."""

    def __add__(self, other: "Reading") -> "Reading":
        """Both, one after the other."""
        seconds, size = self.seconds_per_row + other.seconds_per_row, self.row_bytes + other.row_bytes
        return Reading(seconds_per_row=seconds, peak=max(self.peak, other.peak), row_bytes=size)

    def times(self, count: int) -> "Reading":
        """The same so many times."""
        return Reading(seconds_per_row=self.seconds_per_row * count, peak=self.peak, row_bytes=self.row_bytes * count)


def plan_recovery(
    base: str | Path,
    final: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    *,
    count: int | None = None,
    work: str | Path = "whence-recover.work",
    **settings: Any,
) -> Plan:
    """What `recover` would take with these arguments, from the start: time, disk and memory. Nothing is written.

    Args:
        base: See `pipeline.recover`.
        final: See there.
        corpus: See there.
        count: See there.
        work: Directory of the evidence, for the disk it is on.
        **settings: Fields of `RecoverSettings`.

    Raises:
        CorpusError: See `recover`, as all others.
        ModelError: See there.
        SettingError: See there.
    """
    start = time.perf_counter()
    chosen = RecoverSettings(**settings)
    check_count(count, chosen)
    refuse_inputs(work, [base, final, corpus, chosen.tokenizer], flag="--work", is_directory=True)
    case, place = open_case(str(base), str(final), chosen), Place.at(work)
    tokenizer = load_tokenizer(case.tokenizer or case.final, case.base, False)
    prepare(tokenizer, chosen.chat_template)
    date = stored_date(place) or chosen.date or date_of_training(case.final) or today()
    supervised = chosen.supervise or supervision_of_training(case.final)
    with written_by(chosen.chat_template, date, supervised):
        opened = open_corpus(corpus)
        rows = fingerprint_of(opened).rows
        refuse_uninformative(case, opened)
        case, _ = only_moved(case)
        began = time.perf_counter() - start
        sources = {example.source for example in opened if example.source is not None}
        trained_on = min(count or max(1, rows // 10), max(1, rows // 2))
        at_final, elsewhere = _readings(case, opened, rows)
        points = len(points_of(case, chosen.points))
        readings = points, at_final + elsewhere.times(points - 1), at_final + elsewhere.times(points - 2)
        if chosen.method == "calibrated" or chosen.rounds:
            return _plan(case, chosen, began, rows, trained_on, len(sources), readings,
                         *_training(case, chosen, opened, rows, trained_on), work=work)  # fmt: skip
    return _plan(case, chosen, began, rows, trained_on, len(sources), readings, None, 0.0, work=work)


def _readings(case: Case, corpus: Corpus, rows: int) -> tuple[Reading, Reading]:
    """Read some rows at theta_f, as `evidence.gather_point` reads all: with vectors, as there, and without."""
    every = max(1, rows // PILOT_ROWS)
    sample = [example.row for example in itertools.islice(corpus, 0, every * PILOT_ROWS, every)]
    with at_point(case, 1.0) as model:
        layers = model.layers(case.settings.space.layers)
        direction = case.direction(model, layers)
        projection = projection_for(model, case.settings)
        sketched, plain = (
            Pass(model, layers, {DIFFERENCE: direction}, kind, case.settings) for kind in (projection, None)
        )
        start = time.perf_counter()
        encoded = [encode(row, model.tokenizer, plain.longest) for row in sample]
        tokenising = time.perf_counter() - start
        lengths = [len(row.ids) for row in encoded]
        forget_peak()
        first = bucketed(lengths, batch_tokens(case.settings, model.device))[0]
        sketched.rows([encoded[number] for number in first], lambda examples, tokens: None)  # draws the projection
        readings = []
        for over in (sketched, plain):
            start = time.perf_counter()
            arrays = over.rows(encoded, lambda examples, tokens: None)
            seconds = time.perf_counter() - start + tokenising
            size = sum(array.numel() * array.element_size() for array in arrays.values())
            readings.append(
                Reading(
                    seconds_per_row=seconds / len(sample), peak=peak_resident(), row_bytes=round(size / len(sample))
                )
            )
    return readings[0], readings[1]


def _training(case: Case, chosen: RecoverSettings, corpus: Corpus, rows: int, count: int) -> tuple[PilotSteps, float]:
    """A few steps of the first shadow's training, and the positions of a row in an epoch."""
    members = shadow_split(rows, count, chosen.seed)[0]
    inside = {*members[:: max(1, len(members) // PILOT_MEMBERS)]}
    sample = [example.row for number, example in enumerate(corpus) if number in inside]
    recipe = recipe_of(case, chosen, len(sample)).training()
    recipe |= {"optimizer": recipe["optimizer"] or next(iter(OPTIMIZERS)), "lr": recipe["lr"] or 1e-4, "epochs": 1}
    opened = open_training(case.base, sample, Path("whence-pilot-of-no-run"), settings_of(None, recipe))
    return pilot_steps(opened), positions_of(opened) / len(sample)


def shadow_trainings(settings: RecoverSettings) -> tuple[list[float], int]:
    """Epochs of each of a shadow's trainings that are made in any case, and how many more may find the rate.

    >>> shadow_trainings(RecoverSettings(optimizer="adamw", epochs=2.0, batch_size=16, lr=1e-4))
    ([2.0], 0)
    >>> shadow_trainings(RecoverSettings())
    ([2.0, 2.0, 1.0, 1.0, 2.0, 5.0, 5.0], 3)
    """
    first = EPOCHS[0] if settings.epochs is None else settings.epochs
    epochs = EPOCHS if settings.epochs is None else (settings.epochs,)
    batches = BATCH_SIZES if settings.batch_size is None else (settings.batch_size,)
    pairs = sorted({*itertools.product(epochs, batches)} - {(first, batches[0])})
    made = [first] * (len(OPTIMIZERS) if settings.optimizer is None else 1)
    return [*made, *(epoch for epoch, _ in pairs)], 0 if settings.lr else MOST_TRAININGS - 1


def _plan(
    case: Case,
    chosen: RecoverSettings,
    began: float,
    rows: int,
    trained_on: int,
    sources: int,
    readings: tuple[int, Reading, Reading],
    training: PilotSteps | None,
    positions: float,
    *,
    work: str | Path,
) -> Plan:
    points, reading, but_base = readings
    phases = [Phase("comparing the models, checking the corpus", began)]
    phases.append(Phase("reading the corpus", reading.seconds_per_row * rows, _points(rows, points)))
    disk, notes = {"evidence": reading.row_bytes * rows}, ["Joint matching and fits are not counted."]
    if training is not None:
        row_seconds = training.seconds_per_position * positions
        epochs, more = shadow_trainings(chosen)
        if chosen.method == "calibrated":
            members, known = shadow_split(rows, trained_on, chosen.seed)
            made = [*epochs, *(epochs[:1] if more else [])]
            about = f"{number_of(len(made), 'training')} on {number_of(len(members), 'row')}"
            phases.append(Phase("shadow models", row_seconds * len(members) * sum(made), about))
            phases.append(Phase("reading for the shadow", but_base.seconds_per_row * len(known),
                                _points(len(known), points - 1)))  # fmt: skip
            disk["shadow models"] = training.checkpoint * (1 + len(case.between)) * len(made)
            disk["evidence"] += but_base.row_bytes * len(known)
            if more:
                longest = row_seconds * len(members) * max(epochs) * more
                notes.append(f"The shadow's rate may take {more} trainings more, not 1: up to {longest:,.0f} s.")
            if chosen.mixture in (None, "runs") and 2 <= sources <= MOST_SOURCES:
                seconds = row_seconds * rows_to_train(sources, trained_on) * epochs[0]
                count = sources + CHECK_TRAININGS
                phases.append(Phase("models of each source", seconds, number_of(count, "training")))
                disk["models of each source"] = training.checkpoint * count
        if chosen.rounds:
            listed = min(rows, chosen.short_list)
            seconds = row_seconds * trained_on * epochs[0] + reading.seconds_per_row * listed
            phases.append(Phase("rounds", seconds * chosen.rounds, number_of(chosen.rounds, "round")))
            disk["rounds"] = (training.checkpoint + reading.row_bytes * listed) * chosen.rounds
    if chosen.choices:
        notes.append("Labelling the rows, one forward pass a choice, is not counted.")
    return Plan(
        verb="recover",
        about=f"{number_of(rows, 'row')}, of which {trained_on:,} are thought to be trained on, by {chosen.method}",
        phases=tuple(phases),
        disk=disk,
        memory=_memory(chosen, rows, [reading.peak, *([training.memory] if training else [])]),
        free_disk=free_disk(work),
        free_memory=free_memory(),
        remedies={DISK: ("--work", "ANOTHER_DISK/WORK"), MEMORY: ("--short-list", str(max(2, chosen.short_list // 2)))},
        notes=tuple(notes),
    )


def _points(rows: int, points: int) -> str:
    return f"{number_of(rows, 'row')} at {number_of(points, 'point')}"


def _memory(settings: RecoverSettings, rows: int, peaks: Sequence[int]) -> int:
    """The largest of the passes' peaks, and of the joint matching: the list's sketches and their inner products."""
    listed, size = min(rows, settings.short_list), torch.float32.itemsize
    return max(*peaks, resident() + size * listed * (listed + settings.width))
