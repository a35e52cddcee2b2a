"""What the training of a pool's members would take, by a pilot of a few steps of the first one that is missing."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from whence.ablation.member_training import PoolSettings, read_partitions, refuse_other_rows, training_of, with_own_ids
from whence.ablation.pool import DTYPES, MANIFEST, open_pool
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.templates import stored_date, today, written_by
from whence.counts import number_of
from whence.errors import SettingError
from whence.indexing.planning import DISK, MEMORY, Phase, Plan, free_disk
from whence.models.local_copies import local_directory
from whence.models.runs import open_run
from whence.models.training_state import date_of_training
from whence.outputs import refuse_inputs
from whence.storage import Place
from whence.training.dry_run import bytes_of, pilot_steps, positions_of
from whence.training.recipe import settings_of
from whence.training.trainer import open_training


def plan_pool(
    parent: str | Path, corpus: str | Path | Corpus | Iterable[Row], out: str | Path, **settings: Any
) -> Plan:
    """What `train_pool` would take with these arguments: time, disk and memory. Nothing is written to `out`.

    Args:
        parent: See `member_training.train_pool`.
        corpus: See there.
        out: The pool's directory; members that it has are not planned again.
        **settings: Fields of `PoolSettings`.

    Raises:
        CorpusError: See `train_pool`, as all others.
        ManifestMismatchError: See there.
        SettingError: See there.
    """
    start = time.perf_counter()
    chosen, place = PoolSettings(**settings), Place.at(out)
    refuse_inputs(out, [parent, corpus], is_directory=True)
    source, opened = local_directory(open_run(parent).checkpoints[-1].path), open_corpus(corpus)
    date = stored_date(place) or date_of_training(source) or today()
    partitions = read_partitions(source, opened, chosen, date=date)
    members = {}
    if place.exists(MANIFEST):
        pool = open_pool(out)
        members = dict(pool.members)
        for partition in partitions.values():
            refuse_other_rows(pool, partition, opened.name)
    if len({*partitions, *members}) < 2:
        raise SettingError(
            f"--by {chosen.by}: {len(partitions)} partition in the corpus; two or more are expected, to be mixed"
        )
    todo = [partition for name, partition in partitions.items() if name not in members]
    began = time.perf_counter() - start
    # The first member stands for the others: all have as many tokens, in rows of the same longest length.
    start, rows = time.perf_counter(), (todo or list(partitions.values()))[0].draw(chosen.tokens, seed=chosen.seed)
    with written_by(None, date):
        training = settings_of(None, training_of(len(rows), chosen, tokens=chosen.tokens))
        member = open_training(source, with_own_ids(rows), place.scratch / "work" / "pilot", training)
    loading = time.perf_counter() - start
    found = pilot_steps(member)
    member_bytes = _member_bytes(member.loaded.model.parameters(), found.trained, chosen)
    seconds = found.seconds_per_position * positions_of(member)
    return Plan(
        verb="pool train",
        about=f"{number_of(len(todo), 'member')} of {len({*partitions, *members}):,} to train, each "
        f"{number_of(chosen.steps, 'step')} of {number_of(member.settings.batch_size, 'row')}",
        phases=(
            Phase("reading partitions", began, number_of(len(partitions), "partition")),
            Phase("loading for each member", loading * len(todo)),
            Phase("training members", seconds * len(todo), f"{number_of(chosen.steps * len(todo), 'step')}"),
        ),
        disk={"members": member_bytes * len(todo), "one training at a time": found.checkpoint if todo else 0},
        memory=found.memory,
        free_disk=free_disk(out),
        free_memory=found.free,
        on_gpu=found.on_gpu,
        remedies={
            DISK: ("--lora-rank", "8") if chosen.lora_rank is None else ("-o", "ANOTHER_DISK/POOL"),
            MEMORY: ("--steps", str(2 * chosen.steps)),
        },
        notes=("The time of writing members is not counted.",),
    )


def _member_bytes(parameters: Iterable[Any], trained: int, settings: PoolSettings) -> int:
    """Bytes of a member's file: factors of an adapter in float32, else the delta of every weight."""
    if settings.lora_rank is not None:
        return trained
    return bytes_of({id(weight): weight for weight in parameters}.values(), DTYPES[settings.dtype])
