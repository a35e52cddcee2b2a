"""The index on disk: manifest, corpus parts and shards, with atomic commits; read, written and scanned.

    INDEX/manifest.json                           what the index is and what is in it, with checksums
    INDEX/corpus/part-00000.parquet               the rows it can show (zstd)
    INDEX/checkpoint-000/shard-00000.safetensors  the vectors of part 0's rows under checkpoint 0 (`shards`)

Part p and shard p of every checkpoint hold the same rows. A file is listed in the manifest only after it is complete
under its name, so that a kill at any moment loses at most the files being written (of a long index, one file in
`FILES_PER_WRITE`), and the same build resumed ends with the same bytes: nothing here depends on time, process or order.
The store does not interpret the settings. Its files are checked by `verification` and mended by `repair`.
"""

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike

import pyarrow as pa
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence import runner
from whence.counts import number_of
from whence.errors import ChecksumError, MissingIndexError, SettingError
from whence.indexing import scan
from whence.indexing.codecs import Codec, codec
from whence.indexing.index_files import is_index_file, refuse_other_files, refuse_other_manifest, refuse_stray_files
from whence.indexing.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    CorpusEntry,
    Manifest,
    PartEntry,
    ShardEntry,
    check_same,
    part_file,
    read_manifest,
    shard_file,
)
from whence.indexing.parts import part_bytes, part_rows
from whence.indexing.scan_workers import ranked_by_workers, scored_by_workers
from whence.indexing.shards import STATUSES, Shard, ShardArrays, encoded, read_shard, shard_pieces
from whence.local_files import TEMPORARY
from whence.runner import counted
from whence.storage import Place

FILES_PER_WRITE = 250
"""A manifest of more files than this is written once for several new ones, at most one for so many listed."""


class Store:
    """An index directory. Open one with `Store.open`, or make or resume one with `Store.resume`."""

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.place = place
        self.manifest = manifest
        self._unsaved = 0
        """Files that were listed in memory alone, since the manifest was last written."""
        self._open_shards: dict[str, Shard] = {}
        self.engine: runner.EngineOption = runner.LOCAL
        """Where scans run; see `runner`."""
        self._batch_cache: tuple[Manifest | None, dict[int, list[scan.Batch]]] = (None, {})

    @staticmethod
    def create(path: str | PathLike, manifest: Manifest) -> "Store":
        """Start an index in a new or empty directory."""
        place = Place.at(path)
        refuse_other_files(place)
        if place.exists(MANIFEST):
            raise SettingError(f"{place.root} holds an index; start it over with --restart")
        refuse_stray_files(place)
        store = Store(place, manifest)
        store._save(manifest)
        return store

    @staticmethod
    def open(path: str | PathLike) -> "Store":
        """Open an index, complete or not.

        Raises:
            MissingIndexError: There is no index.
            FormatVersionError: A newer Whence wrote it.
            ChecksumError: The manifest is damaged.
        """
        place = Place.at(path)
        return Store(place, read_manifest(place))

    @staticmethod
    def resume(path: str | PathLike, manifest: Manifest) -> "Store":
        """Open an index to go on building it, or create it, under its lock. Leftovers of a killed writer are removed.

        Raises:
            ManifestMismatchError: The index has other settings: each is named with both values.
        """
        place = Place.at(path)
        if not place.exists(MANIFEST):
            store = Store.create(path, manifest)
            store.remove_leftovers()
            return store
        store = Store.open(path)
        check_same(store.manifest, manifest, place.root)
        store.remove_leftovers()
        return store

    @staticmethod
    def restart(path: str | PathLike) -> None:
        """Remove an index's own files, and nothing else.

        Raises:
            SettingError: The directory holds a file that is not an index's; nothing was removed.
        """
        place = Place.at(path)
        names = place.names()
        refuse_other_files(place)
        refuse_other_manifest(place)
        place.require_removable(names)
        # the manifest last: a restart that is killed can be restarted
        for name in sorted((name for name in names if is_index_file(name)), key=lambda name: name == MANIFEST):
            place.remove(name)

    def remove_leftovers(self) -> None:
        """Remove what a killed writer left: half-written or unlisted files, only those with an index's names.

        Call it under the lock, before anything is written: files that this process is writing are not listed either.
        Where there is no lock (`Place.locked`) they may belong to another process, so that complete files stay.
        """
        for name in self._unlisted():
            if self.place.is_local or name.endswith(TEMPORARY):
                self.place.remove(name)

    def _unlisted(self) -> list[str]:
        listed = {MANIFEST, *(entry.file for entry in (*self.manifest.parts, *self.manifest.shards))}
        return [name for name in self.place.names() if is_index_file(name) and name not in listed]

    def lock(self) -> AbstractContextManager[None]:
        """Lock the index for writing; a second process gets an error that says so."""
        return self.place.locked()

    # -- reading

    @property
    def codec(self) -> Codec:
        """How vectors are stored."""
        return codec(self.manifest.codec)

    @property
    def rows(self) -> int:
        """Number of rows in all parts."""
        return self.manifest.rows

    def missing(self) -> list[tuple[int, int]]:
        """(checkpoint, part) of every shard that is not written yet, in order."""
        return self.manifest.missing()

    def shard(self, checkpoint: int, part: int) -> Shard:
        """One shard; memory-mapped and kept open where the index is local."""
        entry = self.manifest.shard(checkpoint, part)
        if entry is None:
            raise MissingIndexError(f"{self.place.root} has no shard of part {part} under checkpoint {checkpoint} yet")
        if entry.file in self._open_shards:
            return self._open_shards[entry.file]
        shard = read_shard(self.place, entry.file, self.codec, self.manifest.width, entry.rows, entry)
        if self.place.is_local:
            self._open_shards[entry.file] = shard
        return shard

    def read_part(self, number: int) -> list[dict]:
        """The corpus rows of a part: id, source, row (the original row as JSON)."""
        entry = self.manifest.parts[number]
        remedy = f"Mend it with: whence verify {shlex.quote(self.place.root)} --repair"
        try:
            data = self.place.read(entry.file)
            self.place.check(entry.file, entry, remedy, data=data)
            return part_rows(data, entry.rows)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ChecksumError(f"{self.place.path(entry.file)} cannot be read ({error}). {remedy}") from error

    def read_rows(self, numbers: Sequence[int]) -> list[dict]:
        """Corpus rows by their numbers in the index, in the order given; reads only the parts that hold them."""
        out: list[dict] = [{}] * len(numbers)
        for number, places, rows in self.manifest.located(numbers):
            part = self.read_part(number)
            for place, row in zip(places, rows, strict=True):
                out[place] = part[row]
        return out

    def vectors(self, numbers: Sequence[int]) -> tuple[Float32[Tensor, "c m k"], Float32[Tensor, "c m"]]:
        """Decoded vectors of rows under every checkpoint, and the vectors' norms before they were stored."""
        checkpoints, width = len(self.manifest.checkpoints), self.manifest.width
        vectors = torch.zeros(checkpoints, len(numbers), width, dtype=torch.float32)
        norms = torch.zeros(checkpoints, len(numbers), dtype=torch.float32)
        for part, places, rows in self.manifest.located(numbers):
            for c in range(checkpoints):
                shard = self.shard(c, part)
                vectors[c, places] = self.codec.decode(shard.vectors[rows], shard.scale[rows], width)
                norms[c, places] = shard.norm[rows]
        return vectors, norms

    def norms(self) -> Float32[Tensor, "c n"]:
        """Norms of all rows' vectors before they were stored, under every checkpoint."""
        pieces = [torch.stack([shard.norm for shard in shards]) for _, shards in self._pieces()]
        return torch.cat(pieces, 1) if pieces else torch.zeros(len(self.manifest.checkpoints), 0)

    def rankable(self) -> Int64[Tensor, " m"]:
        """Numbers of the rows whose status is ok under every checkpoint, ascending."""
        numbers = []
        for first, shards in self._pieces():
            is_ok = torch.stack([shard.status == 0 for shard in shards]).all(0)
            numbers.append(is_ok.nonzero()[:, 0] + first)
        return torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.int64)

    def supervised_tokens(self) -> Int64[Tensor, " n"]:
        """How many tokens of each row are trained on."""
        pieces = [shards[0].tokens for _, shards in self._pieces()]
        return torch.cat(pieces).long() if pieces else torch.zeros(0, dtype=torch.int64)

    def info(self) -> dict:
        """Rows, counts by status, sizes and settings."""
        manifest = self.manifest
        counts = Counter()
        for part in range(len(manifest.parts)):
            counts.update(self._counts(part))
        total_bytes = sum(entry.bytes for entry in (*manifest.parts, *manifest.shards))
        return {
            "path": self.place.root,
            "complete": manifest.is_complete,
            "to_do": self.remedy(),
            "rows": self.rows,
            "ok_rows": counts[STATUSES[0]],
            "counts": dict(sorted(counts.items())),
            "width": manifest.width,
            "codec": manifest.codec,
            "bytes": total_bytes,
            "bytes_per_row": total_bytes / self.rows if self.rows else 0.0,
            "checkpoints": list(manifest.checkpoints),
            "corpora": list(manifest.corpora),
            "settings": manifest.settings,
            "format_version": manifest.format_version,
            "whence_version": manifest.whence_version,
        }

    def _counts(self, part: int) -> dict[str, int]:
        """Rows of a part by status: ok if ok under every checkpoint, else the status under the first where it is not.

        The manifest suffices unless several checkpoints have rows that are not ok, which need not be the same rows.
        """
        entries = [self.manifest.shard(c, part) for c in range(len(self.manifest.checkpoints))]
        listed = [entry for entry in entries if entry is not None]
        if len(listed) < len(entries) or not listed:
            return {}
        not_ok = [entry for entry in listed if entry.counts[STATUSES[0]] < entry.rows]
        if len(not_ok) < 2:
            return (not_ok or listed)[0].counts
        status = torch.zeros_like(self.shard(0, part).status)
        for checkpoint in range(len(listed)):
            status = torch.where(status == 0, self.shard(checkpoint, part).status, status)
        return listed[0].counts | {name: int((status == code).sum()) for code, name in enumerate(STATUSES)}

    # -- writing

    def write_part(self, number: int, rows: Sequence[dict]) -> None:
        """Write the next corpus part: rows with id, source (may be None) and row (JSON)."""
        assert number == len(self.manifest.parts), "parts are written in order"
        entry = self._write_part_file(number, rows, first_row=self.rows)
        self._list(replace(self.manifest, parts=(*self.manifest.parts, entry)))

    def replace_part(self, number: int, rows: Sequence[dict]) -> PartEntry:
        """Write a listed part again, with as many rows, and update its entry."""
        parts = list(self.manifest.parts)
        assert len(rows) == parts[number].rows, f"{len(rows)} rows, not {parts[number].rows}"
        parts[number] = self._write_part_file(number, rows, first_row=parts[number].first_row)
        self._save(replace(self.manifest, parts=tuple(parts)))
        return parts[number]

    def _write_part_file(self, number: int, rows: Sequence[dict], *, first_row: int) -> PartEntry:
        name, data = part_file(number), part_bytes(rows)
        written = self.place.write(name, [data], total=len(data))
        return PartEntry(file=name, rows=len(rows), first_row=first_row, **vars(written))

    def finish_parts(self) -> None:
        """Note in the manifest that all rows of the corpora are in parts."""
        self._save(replace(self.manifest, has_all_parts=True))

    def extend(self, corpus: CorpusEntry) -> None:
        """Begin to append a corpus: its parts follow, then their shards. Files of earlier parts stay as they are."""
        self.require_complete()
        self._save(replace(self.manifest, corpora=(*self.manifest.corpora, corpus), has_all_parts=False))

    def undo_extend(self) -> None:
        """Undo an unfinished append: its rows are removed, earlier rows stay as they are.

        The manifest is reset first, so that a kill leaves unlisted files, which the next undo, build or append removes.

        Raises:
            SettingError: No append was begun, or the last one is finished.
        """
        root = self.place.root
        if self.manifest.joining is None:
            removed = self._remove_unlisted() if self.manifest.is_complete else 0  # else a build may be under way
            note = f" (removed {number_of(removed, 'file')} that an earlier command left)" if removed else ""
            raise SettingError(f"{root}: no append to it was left unfinished, so there is nothing to undo{note}")
        before = self.manifest.without_last_corpus()
        if not before.is_complete:
            raise MissingIndexError(f"{root}: files of rows from before are missing too; see: whence verify {root}")
        self._open_shards.clear()
        self._batch_cache = (None, {})
        self._save(before)
        self._remove_unlisted()

    def _remove_unlisted(self) -> int:
        for name in (names := self._unlisted()):
            self.place.remove(name)
        return len(names)

    def write_shard(self, checkpoint: int, part: int, arrays: ShardArrays) -> None:
        """Write a shard and list it."""
        self.add_shard(self.write_shard_file(checkpoint, part, arrays))

    def write_shard_file(self, checkpoint: int, part: int, arrays: ShardArrays) -> ShardEntry:
        """Write a shard without listing it, as workers in other processes do; pass the entry to `add_shard`."""
        rows, width = self.manifest.parts[part].rows, self.manifest.width
        assert arrays.vectors.shape == (rows, width), f"{tuple(arrays.vectors.shape)}, not {(rows, width)}"
        shard = encoded(arrays, self.codec)
        name = shard_file(checkpoint, part)
        pieces, total = shard_pieces(shard)
        written = self.place.write(name, pieces, total=total)
        counts = {status: int((shard.status == code).sum()) for code, status in enumerate(STATUSES)}
        return ShardEntry(
            checkpoint=checkpoint,
            part=part,
            file=name,
            rows=rows,
            **vars(written),
            counts={**counts, **arrays.counts},
        )

    def add_shard(self, entry: ShardEntry) -> None:
        """List a written shard, in place of an earlier one of the same part and checkpoint."""
        self._open_shards.pop(entry.file, None)
        self._batch_cache = (None, {})
        manifest = self.manifest.with_shard(entry)
        if manifest.is_complete:
            self._save(manifest)
        else:
            self._list(manifest)

    def _list(self, manifest: Manifest) -> None:
        """List a new file. A long manifest is not written for each: that would take longer than the index itself."""
        self.manifest = manifest
        self._unsaved += 1
        if self._unsaved * FILES_PER_WRITE >= len(manifest.parts) + len(manifest.shards):
            self._save(manifest)

    def flush(self) -> None:
        """Write the manifest, if files were listed since it was written."""
        if self._unsaved:
            self._save(self.manifest)

    def _save(self, manifest: Manifest) -> None:
        manifest = replace(manifest, format_version=FORMAT_VERSION)  # an older one's new entries are of this version
        data = manifest.to_json()
        self.place.write(MANIFEST, [data], total=len(data), is_commit=True)
        self.manifest, self._unsaved = manifest, 0

    # -- scanning

    def top_k(
        self,
        queries: Float32[Tensor, "c q k"],
        weights: Float32[Tensor, " c"],
        *,
        m: int,
        cosine: bool = False,
        minus: Float32[Tensor, "c q k"] | None = None,
    ) -> tuple[scan.Ranking, scan.Ranking]:
        """The m most helpful and the m most opposing rows of each query, exactly (`scan.top_k`).

        A ranking is no longer than there are rows. `minus` is subtracted from the queries, for the cosine after their
        division by their norms.
        """
        if m < 1:
            raise SettingError(f"There is no top {m}: ask for 1 or more")
        scan_query = self._scan_query(queries, weights, cosine, minus)
        if not self._is_scanned_here:
            return ranked_by_workers(self, scan_query, m)
        batches = self._batches(queries.shape[1])
        steps = counted(batches, "Ranking", self.rows, lambda batch: int(batch.starts[-1]))
        return scan.top_k(scan_query, steps, min(m, max(self.rows, 1)))

    def scores(
        self,
        queries: Float32[Tensor, "c q k"],
        weights: Float32[Tensor, " c"],
        *,
        cosine: bool = False,
        is_unit_mean: bool = False,
    ) -> Iterator[tuple[int, Float32[Tensor, "q n"]]]:
        """Every score, a part at a time: (number of its first row, scores); -inf where not ok.

        With `is_unit_mean` queries are means of unit vectors: the cosine divides by the rows' norms alone, which gives
        means of cosines.
        """
        scan_query = self._scan_query(queries, weights, cosine)
        if is_unit_mean:
            scan_query = replace(scan_query, queries=queries.cpu())
        if not self._is_scanned_here:
            return scored_by_workers(self, scan_query)
        return scan.block_scores(scan_query, self._pieces())

    @property
    def _is_scanned_here(self) -> bool:
        return runner.check_engine(self.engine).name == runner.LOCAL

    def _scan_query(
        self, queries: Tensor, weights: Tensor, cosine: bool, minus: Tensor | None = None
    ) -> scan.ScanQuery:
        self.require_complete()
        checkpoints, width = len(self.manifest.checkpoints), self.manifest.width
        if (queries.shape[0], queries.shape[2]) != (checkpoints, width):
            raise SettingError(
                f"The queries were made for another index than {self.place.root}: vectors of {queries.shape[2]:,} "
                f"numbers under {number_of(queries.shape[0], 'checkpoint')}, where the index has {width:,} numbers "
                f"under {number_of(checkpoints, 'checkpoint')}. Make them with this index: whence.trace(INDEX, PROMPT)"
            )
        queries = scan.unit(queries.cpu()) if cosine else queries.cpu()
        if minus is not None:
            queries = queries - minus
        return scan.ScanQuery(queries=queries, weights=weights.cpu(), cosine=cosine, codec=self.codec)

    def _batches(self, q: int) -> Iterable[scan.Batch]:
        """All rows, in batches for q queries; cached where the index is local, as its shards stay open."""
        if not self.place.is_local:
            return scan.batches_of(self._pieces(), q)
        if self._batch_cache[0] is not self.manifest:
            self._batch_cache = (self.manifest, {})
        batches = self._batch_cache[1]
        key = scan.rows_at_once(q)
        return batches[key] if key in batches else self._caching(batches, key, q)

    def _caching(self, batches: dict[int, list[scan.Batch]], key: int, q: int) -> Iterator[scan.Batch]:
        """Batches as they are made, kept at the end: a shard that is checked is scanned while it is in memory."""
        made = []
        for batch in scan.batches_of(self._pieces(), q):
            made.append(batch)
            yield batch
        batches[key] = made

    def _pieces(self) -> Iterator[scan.Piece]:
        parts = counted(enumerate(self.manifest.parts), "Scanning the index", self.rows, lambda each: each[1].rows)
        for number, part in parts:
            yield part.first_row, [self.shard(c, number) for c in range(len(self.manifest.checkpoints))]

    def require_complete(self) -> None:
        """Refuse an index that is not complete.

        Raises:
            MissingIndexError: Rows or shards are missing.
        """
        if (remedy := self.remedy()) is not None:
            raise MissingIndexError(f"{self.place.root} is not complete: {remedy}")

    def remedy(self) -> str | None:
        """What an incomplete index lacks, and the command that finishes it; None where it is complete."""
        manifest, root = self.manifest, shlex.quote(self.place.root)
        if manifest.is_complete:
            return None
        shards = number_of(len(self.missing()), "shard is missing", "shards are missing")
        lacking = shards if manifest.has_all_parts else "rows are still to come"
        if manifest.joining is None:
            return f"{lacking}; run the command that made it again, it resumes"
        name = manifest.joining["name"]
        return (
            f"the rows of {name} are still joining it ({lacking}). Finish that with: whence append {root} "
            f"{shlex.quote(name)}, or drop them with: whence append {root} --undo"
        )


def info(path: str | PathLike) -> dict:
    """Rows, counts by status, sizes and settings of an index."""
    return Store.open(path).info()
