"""What a verb would cost, before it starts: time, disk and memory, and which of them is the limit.

`Plan` is the answer of every verb that plans. `plan` makes that of an index: sizes follow from the manifest, the codec
and the projection as a build uses them, time and memory from a pilot (`pilot`), and nothing is written.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus
from whence.counts import number_of
from whence.indexing.codecs import codec
from whence.indexing.manifest import (
    MANIFEST,
    PartEntry,
    ShardEntry,
    check_same,
    part_file,
    read_manifest,
    shard_file,
)
from whence.indexing.memory import available_memory, resident
from whence.indexing.memory_bound import expected_peak, least_tokens
from whence.indexing.pilot import Pilot, Sample, sample_of
from whence.indexing.preparation import Prepared, prepared
from whence.indexing.shards import COLUMN_BYTES, STATUSES
from whence.indexing.vectors import IndexSettings, batch_tokens, with_options
from whence.paths import free_bytes
from whence.runner.engines import LOCAL, EngineOption, check_engine
from whence.sizes import size_of
from whence.storage import Place

DISK, MEMORY, TIME = "disk", "memory", "time"
LISTED = 200
"""Parts by which the manifest's size is told."""


@dataclass(frozen=True)
class Phase:
    """A part of the work."""

    name: str
    seconds: float
    about: str = ""
    """What is done in it, such as "48 steps"."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a verb would take."""

    verb: str
    about: str
    """What it would do, in a few words."""
    phases: tuple[Phase, ...]
    disk: Mapping[str, int]
    """Bytes that would be written, by part."""
    memory: int
    """Bytes of the process at its peak, or of the GPU, where passes run on one."""
    free_disk: int | None
    """Free bytes where it would write; None: not known, as of an object store."""
    free_memory: int | None
    """Bytes that a process may take here now, or that the GPU has free; None: not known."""
    on_gpu: bool = False
    bytes_per_row: int | None = None
    """Bytes of a row's vectors, of all checkpoints, with what is stored beside them."""
    remedies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Flags that mend a limit, by its name."""
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Time of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def disk_bytes(self) -> int:
        """Bytes that would be written."""
        return sum(self.disk.values())

    @property
    def limit(self) -> str:
        """The first limit that is reached: the disk or memory, of which there is too little; else time."""
        shares = {}
        if self.free_disk is not None:
            shares[DISK] = self.disk_bytes / max(1, self.free_disk)
        if self.free_memory is not None:
            shares[MEMORY] = self.memory / max(1, self.free_memory)
        worst = max(shares, key=lambda name: shares[name], default=TIME)
        return worst if shares.get(worst, 0) > 1 else TIME

    @property
    def fits(self) -> bool:
        """Whether there is room for all of it."""
        return self.limit == TIME

    def as_json(self) -> dict[str, Any]:
        """All of it, with sums."""
        sums = {"seconds": self.seconds, "disk_bytes": self.disk_bytes, "limit": self.limit, "fits": self.fits}
        return {
            "verb": self.verb,
            "about": self.about,
            "phases": [vars(phase) for phase in self.phases],
            "disk": dict(self.disk),
            "memory": self.memory,
            "on_gpu": self.on_gpu,
            "free_disk": self.free_disk,
            "free_memory": self.free_memory,
            "bytes_per_row": self.bytes_per_row,
            "remedies": {name: list(flags) for name, flags in self.remedies.items()},
            "notes": list(self.notes),
            **sums,
        }


def plan(
    model: str | Path,
    corpus: str | Path | Corpus | list[Row],
    out: str | Path = "INDEX",
    *,
    settings: IndexSettings | None = None,
    restart: bool = False,
    memory: int | str | None = None,
    **options: Any,
) -> Plan:
    """What an index would take: bytes a row, disk, memory and time. Nothing is written.

    Time is measured in a pilot of a few passes of the real model over rows from all over the corpus, memory in the
    largest passes there are, in this process: what it holds for other reasons counts too.

    Args:
        model: See `build.index`.
        corpus: See `build.index`.
        out: Directory in which the index would be built. If one was begun there, its rest is planned.
        settings: Settings of the index; or its fields by name as `options`.
        restart: Plan without what is in `out`.
        memory: See `build.index`.
        **options: See `settings`.

    Raises:
        CorpusError: See `build.index`, as all others.
        ModelError: See there.
        SettingError: See there.
    """
    start = time.perf_counter()
    limit = None if memory is None else size_of(memory)
    chosen = with_options(settings or IndexSettings(), options)
    made = prepared(model, corpus, out, chosen, restart=restart, memory=limit)
    began = time.perf_counter() - start
    sample = sample_of(made.texts, made.fingerprint.rows, made.manifest.width)
    left = Left.of(None if restart else Place.at(out), made, sample)
    pilot = Pilot(made.loaded, made.settings, made.transform, longest=made.manifest.settings["max_tokens"])
    widest = pilot.tokenised(sample.widest)
    tokens = batch_tokens(made.settings, pilot.model.device)
    peak = expected_peak(pilot, pilot.peak(widest, tokens))
    passes = pilot.passes(sample.parts)
    encoding, largest = pilot.shard(max(sample.sizes))
    headers = [largest - max(sample.sizes) * _row_bytes(made)] * (len(sample.sizes) - 1)
    headers.append(pilot.shard(sample.sizes[-1])[1] - sample.sizes[-1] * _row_bytes(made))
    vectors = made.fingerprint.rows * _row_bytes(made) + sum(headers)
    checkpoints = len(made.run.checkpoints)
    times = checkpoints * left.shards / max(sample.share, 1e-9)
    phases = (
        Phase("checking and loading", began),
        Phase(
            "copying rows",
            (sample.seconds + sample.part_seconds / max(sample.share, 1e-9)) * left.parts,
            number_of(round(made.fingerprint.rows * left.parts), "row"),
        ),
        Phase("gradients", passes.seconds * times, f"{round(passes.positions * times):,} tokens, padding included"),
        Phase("encoding", encoding * len(sample.sizes) * checkpoints * left.shards),
    )
    return Plan(
        verb="index",
        about=_about(made, sample, tokens),
        phases=phases,
        disk=_disk(made, sample, vectors, left),
        memory=peak,
        free_disk=free_disk(out),
        free_memory=_free_memory(pilot),
        on_gpu=pilot.on_gpu,
        bytes_per_row=checkpoints * _row_bytes(made),
        remedies=_remedies(made, can_shrink=tokens > least_tokens(widest, tokens), free=_free_memory(pilot)),
        notes=(*left.notes, *_of_workers(chosen.engine)),
    )


def _of_workers(engine: EngineOption) -> tuple[str, ...]:
    """What a plan of one process says of several."""
    chosen = check_engine(engine)
    if chosen.name == LOCAL or chosen.workers == 1:
        return ()
    count = "n" if chosen.workers is None else str(chosen.workers)
    return (
        f"Memory and time are of one process. Of {count} workers each takes that memory; gradients and encoding take "
        f"1/{count} of the time where every worker has a core or a GPU to itself.",
    )


@dataclass(frozen=True)
class Left:
    """Shares of a build that are still to do."""

    parts: float = 1.0
    shards: float = 1.0
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(place: Place | None, made: Prepared, sample: Sample) -> "Left":
        """Of the index that was begun at a place, if one was.

        Raises:
            ManifestMismatchError: It was begun with other settings.
        """
        if place is None or not place.exists(MANIFEST):
            return Left()
        begun = read_manifest(place)
        check_same(begun, made.manifest, place.root)
        rows, shards = made.fingerprint.rows, len(sample.sizes) * len(made.run.checkpoints)
        done = sum(entry.rows for entry in begun.shards) / len(made.run.checkpoints)
        note = (
            f"An index was begun in {place.root}: {len(begun.shards):,} of {number_of(shards, 'shard')} are there, and "
        )
        return Left(max(0.0, 1 - begun.rows / rows), max(0.0, 1 - done / rows), (f"{note}this is the rest.",))


def _row_bytes(made: Prepared) -> int:
    return codec(made.settings.codec_name).bytes_per_row(made.manifest.width) + COLUMN_BYTES


def _disk(made: Prepared, sample: Sample, vectors: int, left: Left) -> dict[str, int]:
    """Bytes of the files that are still to be written, where a checkpoint's vectors are so many."""
    return {
        "vectors": round(len(made.run.checkpoints) * vectors * left.shards),
        "the corpus' copy": round(sample.part_bytes / max(sample.share, 1e-9) * left.parts),
        "the manifest": _manifest_bytes(made, sample),
    }


def _manifest_bytes(made: Prepared, sample: Sample) -> int:
    """Bytes of the manifest of the complete index; of a long one from its first files."""
    sizes, checkpoints = sample.sizes[:LISTED], len(made.run.checkpoints)
    sums = {"sha256": 64 * "0", "xxh3": 32 * "0"}
    parts = [
        PartEntry(file=part_file(number), rows=rows, first_row=number * sizes[0], bytes=10**5, **sums)
        for number, rows in enumerate(sizes)
    ]
    counts: dict[str, int] = dict.fromkeys((*STATUSES, "truncated", "completion_truncated"), 0)
    shards = [
        ShardEntry(checkpoint=c, part=p, file=shard_file(c, p), rows=rows, bytes=10**7, counts=counts, **sums)
        for c in range(checkpoints)
        for p, rows in enumerate(sizes)
    ]
    empty = len(made.manifest.to_json())
    listed = len(replace(made.manifest, parts=tuple(parts), shards=tuple(shards), has_all_parts=True).to_json())
    return empty + round((listed - empty) * len(sample.sizes) / len(sizes))


def _about(made: Prepared, sample: Sample, tokens: int) -> str:
    space, checkpoints = made.settings.space, len(made.run.checkpoints)
    under = "" if checkpoints == 1 else f" under {number_of(checkpoints, 'checkpoint')}"
    return (
        f"{number_of(made.fingerprint.rows, 'row')}{under}: {space.sketch} of {made.manifest.width:,} numbers as "
        f"{made.settings.codec_name}, {number_of(len(sample.sizes), 'shard')}, passes of {number_of(tokens, 'token')}"
    )


def _remedies(made: Prepared, *, can_shrink: bool, free: int | None) -> dict[str, tuple[str, ...]]:
    smaller = made.settings.codec_name != "onebit"
    disk = ("--codec", "onebit") if smaller else ("-o", "ANOTHER_DISK/INDEX")
    memory = ("--memory", f"{max(1, int(0.9 * (free or 0) / 1e6))}M") if can_shrink else ("--gradient-checkpointing",)
    return {DISK: disk, MEMORY: memory}


def free_disk(out: str | Path) -> int | None:
    """Free bytes of the disk of a directory that need not exist; None where it is no local one."""
    place = Place.at(out)
    return free_bytes(Path(place.root)) if place.is_local else None


def free_memory() -> int | None:
    """Bytes that a process in the place of this one may take; None: not known."""
    available = available_memory()
    return None if available is None else available + resident()


def _free_memory(pilot: Pilot) -> int | None:
    if not pilot.on_gpu:
        return free_memory()
    return torch.cuda.mem_get_info(pilot.model.device)[0] + torch.cuda.memory_reserved(pilot.model.device)
