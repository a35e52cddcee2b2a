"""What a bank would take, by a pilot of a few steps of its run's training. Nothing is written."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.counts import number_of
from whence.evaluation.bank_protocol import (
    BankSettings,
    bank_rows,
    refuse_differences,
    requested_plans,
    require_work,
    subsets_of,
)
from whence.evaluation.bank_store import BANK, FULL, read_description, read_members
from whence.indexing.planning import DISK, Phase, Plan, free_disk
from whence.outputs import refuse_inputs
from whence.storage import Place
from whence.training.dry_run import pilot_steps, positions_of, steps_of
from whence.training.left_out_rows import draws_masks
from whence.training.repetition import repeatable

ROOM_OF_TOKENIZER = 20_000
"""Bytes of a kept model beside its weights, at least."""


def plan_bank(
    run: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    out: str | Path,
    *,
    queries: str | Path | Corpus | Iterable[Row] | None = None,
    model: str | Path | None = None,
    **settings: Any,
) -> Plan:
    """What `bank` would take with these arguments: time, disk and memory. Members that are there are not counted.

    Args:
        run: See `bank_pipeline.bank`.
        corpus: See there.
        out: See there.
        queries: See there; the time of measuring them is not counted.
        model: See there.
        **settings: Fields of `BankSettings`.

    Raises:
        CorpusError: See `bank`, as all others.
        ManifestMismatchError: See there.
        SettingError: See there.
    """
    start = time.perf_counter()
    chosen, place = BankSettings(**settings), Place.at(out)
    refuse_inputs(out, [run, corpus, queries, model, *chosen.rows], is_directory=True)
    require_work(place, chosen, has_queries=queries is not None)
    texts = open_corpus(corpus)
    training = repeatable(run, texts, model=model)
    known = read_description(place) if place.exists(BANK) else None
    if known is not None:
        refuse_differences(place, known, training, chosen)
    leave_out = chosen.leave_out or ("zero" if known is None else known.protocol.leave_out)
    keeps = chosen.keep_weights if known is None else known.protocol.keep_weights
    subsets = subsets_of(chosen, None if known is None else known.subsets, place.root)
    rows, opened = bank_rows(training, texts), training.opened
    there = {} if known is None else read_members(place, known)
    plans = requested_plans(rows, subsets, chosen, opened.settings.seed)
    todo = [plan for plan in plans if plan.name not in there]
    began = time.perf_counter() - start
    masks = opened.settings.lora_dropout > 0 or draws_masks(opened.loaded.model)
    found = pilot_steps(opened)
    tokens = sum(row.tokens for row in rows)
    shares = [
        1.0 if masks and leave_out == "zero" else 1 - sum(rows[number].tokens for number in plan.left_out) / tokens
        for plan in todo
    ]
    seconds = found.seconds_per_position * positions_of(opened) * sum(shares)
    steps, _ = steps_of(opened.settings, len(rows))
    kept = len(todo) * (found.trained + ROOM_OF_TOKENIZER) if keeps else 0
    return Plan(
        verb="bank",
        about=f"{number_of(len(todo), 'training')} of {number_of(len(rows), 'row')} or a part of them, "
        f"{number_of(steps, 'step')} for all rows" + ("" if FULL in there else "; the first one is on all rows"),
        phases=(
            Phase("checking and loading", began),
            Phase("trainings", seconds, f"the work of {sum(shares):,.1f} on all rows"),
        ),
        disk={"losses": 20_000 + 10 * sum(len(plan.left_out) for plan in todo), "weights": kept},
        memory=found.memory + found.trained,
        free_disk=free_disk(out),
        free_memory=found.free,
        on_gpu=found.on_gpu,
        remedies={DISK: ("-o", "ANOTHER_DISK/BANK")},
        notes=("A training without rows is taken to cost its share of the tokens; measuring queries is not counted.",),
    )
