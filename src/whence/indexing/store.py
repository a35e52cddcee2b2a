"""The index on disk: manifest, corpus parts, shards; atomic commit, resume, verify, append.

    INDEX/manifest.json                           what the index is and what is in it, with checksums
    INDEX/corpus/part-00000.parquet               the rows it can show (zstd)
    INDEX/checkpoint-000/shard-00000.safetensors  the vectors of part 0's rows under checkpoint 0 (`shards`)

Part p and shard p of every checkpoint hold the same rows. A file is listed in the manifest only after it is
whole under its name, so that a kill at any moment loses at most the files in flight, and the same build
resumed ends with the same bytes: nothing here depends on time, process or order. Settings are opaque to the
store. What is mended in an index is in `mending`.
"""

import bisect
import io
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from os import PathLike

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence.corpus.reading import parquet_file
from whence.errors import ChecksumError, MissingIndexError, SettingError, StorageError
from whence.indexing import scan
from whence.indexing.codecs import Codec, codec
from whence.indexing.manifest import MANIFEST, Manifest, PartEntry, ShardEntry, check_same, read_manifest
from whence.indexing.shards import STATUSES, Shard, ShardArrays, encoded, read_shard, shard_pieces
from whence.storage import TEMPORARY, Place, reason

_OURS = re.compile(
    re.escape(MANIFEST) + r"|corpus/part-[0-9]{5,}\.parquet|checkpoint-[0-9]{3,}/shard-[0-9]{5,}\.safetensors"
)
_SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("row", pa.string())])


@dataclass(frozen=True)
class Problem:
    """A file that is not what the manifest says."""

    file: str
    what: str
    """Such as "wrong checksum"."""

    entry: PartEntry | ShardEntry | None = None


class Store:
    """An index directory. Open one with `Store.open`, or make or resume one with `Store.resume`."""

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.place = place
        self.manifest = manifest
        self._open_shards: dict[str, Shard] = {}
        self._laid_out: tuple[Manifest | None, dict[int, list[scan.Batch]]] = (None, {})

    @staticmethod
    def create(path: str | PathLike, manifest: Manifest) -> "Store":
        """Start an index in a new or empty directory."""
        place = Place.at(path)
        _refuse_strangers(place)
        if place.exists(MANIFEST):
            raise SettingError(f"{place.root} holds an index; start it over with --restart")
        _refuse_orphans(place)
        store = Store(place, manifest)
        store._save(manifest)
        return store

    @staticmethod
    def open(path: str | PathLike) -> "Store":
        """Open an index, complete or not.

        Raises:
            MissingIndexError: No index there.
            FormatVersionError: A newer Whence wrote it.
            ChecksumError: The manifest is damaged.
        """
        place = Place.at(path)
        return Store(place, read_manifest(place))

    @staticmethod
    def resume(path: str | PathLike, manifest: Manifest) -> "Store":
        """Open an index to go on building it, or create it, under its lock. What a killed writer left is removed.

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
        _refuse_strangers(place)
        place.require_removable(names)
        # the manifest last: a restart that is killed can be restarted
        for name in sorted((name for name in names if is_ours(name)), key=lambda name: name == MANIFEST):
            place.remove(name)

    def remove_leftovers(self) -> None:
        """Remove what a killed writer left: files with an index's names alone, half-written or not listed.

        Only under the lock, and before anything is written: what this process has in flight is not listed either.
        Where there is no lock (`Place.locked`) that may be another's, so that whole files stay.
        """
        for name in self._unlisted():
            if self.place.is_local or name.endswith(TEMPORARY):
                self.place.remove(name)

    def _unlisted(self) -> list[str]:
        listed = {MANIFEST, *(entry.file for entry in (*self.manifest.parts, *self.manifest.shards))}
        return [name for name in self.place.names() if is_ours(name) and name not in listed]

    def lock(self) -> AbstractContextManager[None]:
        """Hold the index for writing; a second process is told so."""
        return self.place.locked()

    # -- what it holds

    @property
    def codec(self) -> Codec:
        """How vectors are stored."""
        return codec(self.manifest.codec)

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return self.manifest.rows

    def missing(self) -> list[tuple[int, int]]:
        """(checkpoint, part) of every shard that is not there yet, in order."""
        return self.manifest.missing()

    def shard(self, checkpoint: int, part: int) -> Shard:
        """One shard; memory-mapped and kept open where the index is local."""
        entry = self.manifest.shard(checkpoint, part)
        if entry is None:
            raise MissingIndexError(f"{self.place.root} has no shard of part {part} under checkpoint {checkpoint} yet")
        if entry.file in self._open_shards:
            return self._open_shards[entry.file]
        shard = read_shard(self.place, entry.file, self.codec, self.manifest.width, entry.rows)
        if self.place.is_local:
            self._open_shards[entry.file] = shard
        return shard

    def read_part(self, number: int) -> list[dict]:
        """The corpus rows of a part: id, source, row (the original row as JSON)."""
        entry = self.manifest.parts[number]
        try:
            return _table(self.place.read(entry.file)).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise ChecksumError(
                f"{self.place.path(entry.file)} cannot be read ({error}); see: whence verify {self.place.root}"
            ) from error

    def read_rows(self, numbers: Sequence[int]) -> list[dict]:
        """Corpus rows by their number in the index, in the order asked; reads only the parts they are in."""
        firsts = [part.first_row for part in self.manifest.parts]
        where = [bisect.bisect_right(firsts, number) - 1 for number in numbers]
        parts = {part: self.read_part(part) for part in sorted(set(where))}
        return [parts[part][number - firsts[part]] for part, number in zip(where, numbers, strict=True)]

    def vectors(self, numbers: Sequence[int]) -> tuple[Float32[Tensor, "c m k"], Float32[Tensor, "c m"]]:
        """Stored vectors of some rows under every checkpoint, decoded, and their norms before they were stored."""
        firsts = [part.first_row for part in self.manifest.parts]
        checkpoints, width = len(self.manifest.checkpoints), self.manifest.width
        vectors, norms = torch.zeros(checkpoints, len(numbers), width), torch.zeros(checkpoints, len(numbers))
        where = torch.tensor([bisect.bisect_right(firsts, number) - 1 for number in numbers], dtype=torch.int64)
        for part in where.unique().tolist():
            places = (where == part).nonzero()[:, 0]
            rows = torch.tensor(numbers)[places] - firsts[part]
            for c in range(checkpoints):
                shard = self.shard(c, part)
                vectors[c, places] = self.codec.decode(shard.vectors[rows], shard.scale[rows], width)
                norms[c, places] = shard.norm[rows]
        return vectors, norms

    def rankable(self) -> Int64[Tensor, " m"]:
        """Numbers of the rows whose status is ok under every checkpoint, ascending."""
        found = []
        for first, shards in self._pieces():
            is_ok = torch.stack([shard.status == 0 for shard in shards]).all(0)
            found.append(is_ok.nonzero()[:, 0] + first)
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)

    def info(self) -> dict:
        """Rows, counts by status, sizes and settings."""
        manifest = self.manifest
        counts = Counter()
        for part in range(len(manifest.parts)):
            counts.update(self._counts(part))
        size = sum(entry.bytes for entry in (*manifest.parts, *manifest.shards))
        return {
            "path": self.place.root,
            "complete": manifest.is_complete,
            "to_do": self.remedy(),
            "rows": self.rows,
            "ok_rows": counts[STATUSES[0]],
            "counts": dict(sorted(counts.items())),
            "width": manifest.width,
            "codec": manifest.codec,
            "bytes": size,
            "bytes_per_row": size / self.rows if self.rows else 0.0,
            "checkpoints": list(manifest.checkpoints),
            "corpora": list(manifest.corpora),
            "settings": manifest.settings,
            "format_version": manifest.format_version,
            "whence_version": manifest.whence_version,
        }

    def _counts(self, part: int) -> dict[str, int]:
        """Rows of a part by status: ok only where ok under every checkpoint, else by the first that is not.

        The manifest says it, but where several checkpoints have rows that are not ok: they need not be the same rows.
        """
        entries = [self.manifest.shard(c, part) for c in range(len(self.manifest.checkpoints))]
        listed = [entry for entry in entries if entry is not None]
        if len(listed) < len(entries) or not listed:
            return {}
        harmed = [entry for entry in listed if entry.counts[STATUSES[0]] < entry.rows]
        if len(harmed) < 2:
            return (harmed or listed)[0].counts
        status = torch.zeros_like(self.shard(0, part).status)
        for checkpoint in range(len(listed)):
            status = torch.where(status == 0, self.shard(checkpoint, part).status, status)
        return listed[0].counts | {name: int((status == code).sum()) for code, name in enumerate(STATUSES)}

    # -- writing

    def write_part(self, number: int, rows: Sequence[dict]) -> None:
        """Write the next corpus part: rows with id, source (may be None) and row (JSON)."""
        assert number == len(self.manifest.parts), "parts are written in order"
        entry = self._written_part(number, rows, first_row=self.rows)
        self._save(replace(self.manifest, parts=(*self.manifest.parts, entry)))

    def replace_part(self, number: int, rows: Sequence[dict]) -> PartEntry:
        """Write a part that is listed anew, with as many rows, and list it as it is now."""
        parts = list(self.manifest.parts)
        assert len(rows) == parts[number].rows, f"{len(rows)} rows, not {parts[number].rows}"
        parts[number] = self._written_part(number, rows, first_row=parts[number].first_row)
        self._save(replace(self.manifest, parts=tuple(parts)))
        return parts[number]

    def _written_part(self, number: int, rows: Sequence[dict], *, first_row: int) -> PartEntry:
        name, data = f"corpus/part-{number:05d}.parquet", _parquet(rows)
        written = self.place.write(name, [data], total=len(data))
        return PartEntry(file=name, rows=len(rows), first_row=first_row, sha256=written.sha256, bytes=written.bytes)

    def finish_parts(self) -> None:
        """All rows of the corpora are in parts."""
        self._save(replace(self.manifest, has_all_parts=True))

    def extend(self, corpus: dict) -> None:
        """Let another corpus join: more parts, then their shards. Files of earlier parts stay as they are."""
        self.require_complete()
        self._save(replace(self.manifest, corpora=(*self.manifest.corpora, corpus), has_all_parts=False))

    def undo_extend(self) -> None:
        """Take back an append that was not finished: its rows leave, those from before it stay as they are.

        The manifest goes back first, so that a kill leaves files that are not listed. Whoever undoes again, builds or
        appends removes them.

        Raises:
            SettingError: None was begun, or it is finished.
        """
        root = self.place.root
        if self.manifest.joining is None:
            removed = self._remove_unlisted() if self.manifest.is_complete else 0  # else a build may be under way
            told = f" ({removed} files that an earlier command left were removed)" if removed else ""
            raise SettingError(f"{root}: no append to it was left unfinished, so there is nothing to undo{told}")
        before = self.manifest.without_last_corpus()
        if not before.is_complete:
            raise MissingIndexError(f"{root}: files of rows from before are missing too; see: whence verify {root}")
        self._open_shards.clear()
        self._laid_out = (None, {})
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
        """Write a shard without listing it, as workers elsewhere do; the entry goes to `add_shard`."""
        rows, width = self.manifest.parts[part].rows, self.manifest.width
        assert arrays.vectors.shape == (rows, width), f"{tuple(arrays.vectors.shape)}, not {(rows, width)}"
        shard = encoded(arrays, self.codec)
        name = f"checkpoint-{checkpoint:03d}/shard-{part:05d}.safetensors"
        pieces, total = shard_pieces(shard)
        written = self.place.write(name, pieces, total=total)
        counts = {status: int((shard.status == code).sum()) for code, status in enumerate(STATUSES)}
        return ShardEntry(
            checkpoint=checkpoint,
            part=part,
            file=name,
            rows=rows,
            sha256=written.sha256,
            bytes=written.bytes,
            counts={**counts, **arrays.counts},
        )

    def add_shard(self, entry: ShardEntry) -> None:
        """List a written shard, in place of an earlier one of the same part and checkpoint."""
        self._open_shards.pop(entry.file, None)
        self._laid_out = (None, {})
        self._save(self.manifest.with_shard(entry))

    def _save(self, manifest: Manifest) -> None:
        data = manifest.to_json()
        self.place.write(MANIFEST, [data], total=len(data))
        self.manifest = manifest

    # -- checking

    def verify(self) -> Iterator[Problem]:
        """Re-read every file and yield what is wrong. `verify(path)` checks the manifest as well."""
        present = set(self.place.names())
        entries = {entry.file: entry for entry in (*self.manifest.parts, *self.manifest.shards)}
        for name, entry in entries.items():
            what = self.harm(entry) if name in present else "missing"
            if what is not None:
                yield Problem(name, what, entry)
        for name in sorted(present - entries.keys() - {MANIFEST}):
            yield Problem(name, "not listed in the manifest")

    def harm(self, entry: PartEntry | ShardEntry) -> str | None:
        """What is wrong with a file, if anything is."""
        try:
            if (size := self.place.size(entry.file)) != entry.bytes:
                return f"{size:,} bytes, not {entry.bytes:,}"
            return None if self.place.digest(entry.file) == entry.sha256 else "wrong checksum"
        except FileNotFoundError:
            return "missing"
        except StorageError as error:
            return f"cannot be read: {reason(error.__cause__ or error)}"

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

        There are at most as many places as rows. `minus` is subtracted from the queries, after their division by
        their norms for the cosine.
        """
        if m < 1:
            raise SettingError(f"There is no top {m}: ask for 1 or more")
        question = self._question(queries, weights, cosine, minus)
        return scan.top_k(question, self._batches(queries.shape[1]), min(m, max(self.rows, 1)))

    def scores(
        self,
        queries: Float32[Tensor, "c q k"],
        weights: Float32[Tensor, " c"],
        *,
        cosine: bool = False,
        queries_as_they_are: bool = False,
    ) -> Iterator[tuple[int, Float32[Tensor, "q n"]]]:
        """Every score, a part at a time: (number of its first row, scores); -inf where not ok.

        With `queries_as_they_are` the cosine divides by the rows' norms alone: queries that are means of unit vectors
        give means of cosines.
        """
        question = self._question(queries, weights, cosine)
        if queries_as_they_are:
            question = replace(question, queries=queries.cpu())
        return scan.block_scores(question, self._pieces())

    def _question(self, queries: Tensor, weights: Tensor, cosine: bool, minus: Tensor | None = None) -> scan.Question:
        self.require_complete()
        checkpoints, width = len(self.manifest.checkpoints), self.manifest.width
        if (queries.shape[0], queries.shape[2]) != (checkpoints, width):
            raise SettingError(
                f"Queries of {queries.shape[0]} checkpoints and width {queries.shape[2]} cannot be scored in "
                f"{self.place.root}, which has {checkpoints} checkpoints and width {width}"
            )
        queries = scan.unit(queries.cpu()) if cosine else queries.cpu()
        if minus is not None:
            queries = queries - minus
        return scan.Question(queries=queries, weights=weights.cpu(), cosine=cosine, codec=self.codec)

    def _batches(self, q: int) -> Iterable[scan.Batch]:
        """All rows, for q queries; kept where the index is local, for shards are kept open there too."""
        if not self.place.is_local:
            return scan.batches_of(self._pieces(), q)
        if self._laid_out[0] is not self.manifest:
            self._laid_out = (self.manifest, {})
        laid_out = self._laid_out[1]
        if (key := scan.rows_at_once(q)) not in laid_out:
            laid_out[key] = list(scan.batches_of(self._pieces(), q))
        return laid_out[key]

    def _pieces(self) -> Iterator[scan.Piece]:
        for number, part in enumerate(self.manifest.parts):
            yield part.first_row, [self.shard(c, number) for c in range(len(self.manifest.checkpoints))]

    def require_complete(self) -> None:
        """Refuse an index that is not complete.

        Raises:
            MissingIndexError: Rows or shards are still to come.
        """
        if (remedy := self.remedy()) is not None:
            raise MissingIndexError(f"{self.place.root} is not complete: {remedy}")

    def remedy(self) -> str | None:
        """What is still to come in an index that is not complete, and the command that finishes it."""
        manifest, root = self.manifest, shlex.quote(self.place.root)
        if manifest.is_complete:
            return None
        lacking = f"{len(self.missing())} shards are missing" if manifest.has_all_parts else "rows are still to come"
        if manifest.joining is None:
            return f"{lacking}; run the command that made it again, it resumes"
        name = manifest.joining["name"]
        return (
            f"the rows of {name} are still joining it ({lacking}). Finish that with: whence append {root} "
            f"{shlex.quote(name)}, or drop them with: whence append {root} --undo"
        )


def info(path: str | PathLike) -> dict:
    """What an index holds: rows, counts by status, sizes and settings."""
    return Store.open(path).info()


def verify(path: str | PathLike) -> list[Problem]:
    """Everything that is wrong with an index, its manifest included (then nothing else can be checked)."""
    try:
        store = Store.open(path)
    except ChecksumError as error:
        return [Problem(MANIFEST, str(error))]
    return list(store.verify())


def _table(data: bytes | memoryview) -> pa.Table:
    return parquet_file(pa.BufferReader(data)).read(use_threads=False)


def _parquet(rows: Sequence[dict]) -> memoryview:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_SCHEMA), sink, compression="zstd")
    return sink.getbuffer()


def _refuse_strangers(place: Place) -> None:
    """Refuse a directory that holds files which are not an index's, before anything in it is touched."""
    strangers = [name for name in place.names() if not is_ours(name)]
    if strangers:
        raise SettingError(
            f"{place.root} is not empty and not an index's alone ({strangers[0]} is there). Nothing was changed; "
            "move that away, or give the index a directory of its own"
        )


def _refuse_orphans(place: Place) -> None:
    """Refuse whole files with an index's names where no index is: no kill leaves them, so they may be anybody's."""
    orphans = [name for name in place.names() if not name.endswith(TEMPORARY)]
    if orphans:
        raise SettingError(
            f"{place.root} has files with an index's names, such as {orphans[0]}, and no {MANIFEST}. Nothing was "
            "changed. Give the index a directory of its own, or, if they are what is left of one, add --restart"
        )


def is_ours(name: str) -> bool:
    """A file that an index writes, whole or half: one that may be removed."""
    return _OURS.fullmatch(name.removesuffix(TEMPORARY)) is not None
