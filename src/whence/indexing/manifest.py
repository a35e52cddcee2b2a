"""The manifest of an index: its settings, its files, and the checksum of every file.

It is JSON with sorted keys and no times, so that an interrupted and resumed build writes the same bytes. Its own
checksum is inside, over the rest in canonical form; and a manifest with other bytes than its content would be written
as is refused too, so that any flipped bit is detected.
"""

import bisect
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, NotRequired, TypedDict

from whence.brief import brief
from whence.errors import ChecksumError, FormatVersionError, ManifestMismatchError, MissingIndexError
from whence.indexing.shards import STATUSES
from whence.records import Count, Digest, FastDigest, MisfitError, fitting, unlike_written
from whence.storage import Place

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
"""Version 1 had no `xxh3`."""

REMEDY = "Restore it from a copy, or start the index over with --restart"


class CorpusEntry(TypedDict):
    """A corpus whose rows are in the index."""

    name: str
    digest: str
    rows: Count
    columns: NotRequired[dict[str, str]]
    """Names that Whence reads, and the corpus' own in their place; see `corpus.columns`."""
    text_rows: NotRequired[str]
    """What is a row of plain text, unless a line; see `corpus.plain_text`."""


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """One file of corpus rows."""

    file: Annotated[str, re.compile(r"corpus/part-[0-9]{5,}\.parquet")]
    rows: Count
    first_row: Count
    """Number of its first row in the index."""

    sha256: Digest
    bytes: Count
    xxh3: FastDigest | None = None
    """XXH3-128, checked when the file is first read; None where an older Whence wrote it, and `sha256` is checked."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One file of vectors."""

    checkpoint: Count
    part: Count
    file: Annotated[str, re.compile(r"checkpoint-[0-9]{3,}/shard-[0-9]{5,}\.safetensors")]
    rows: Count
    sha256: Digest
    bytes: Count
    xxh3: FastDigest | None = None
    """See `PartEntry`."""

    counts: dict[str, Count]
    """Rows by status, and other counts, such as truncated rows."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a manifest."""

    __repr__ = brief

    whence_version: str
    codec: str
    width: Annotated[int, range(1, 2**31)]
    """Entries of a vector, k."""

    settings: dict[str, Any]
    """The gradient space and digests, as JSON values with dicts nested once at most. A resumed build must agree."""

    checkpoints: tuple[dict[str, Any], ...]
    corpora: tuple[CorpusEntry, ...] = ()
    """One entry for each corpus, in the order of appending."""

    parts: tuple[PartEntry, ...] = ()
    shards: tuple[ShardEntry, ...] = ()
    has_all_parts: bool = False
    format_version: Annotated[int, range(1, FORMAT_VERSION + 1)] = field(default=FORMAT_VERSION)

    @property
    def rows(self) -> int:
        """Number of rows in all parts."""
        return self.parts[-1].first_row + self.parts[-1].rows if self.parts else 0

    def located(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[int], list[int]]]:
        """Where rows of the index lie: each part that holds some, their places in `numbers`, their rows in the part."""
        firsts = [part.first_row for part in self.parts]
        by_part: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            by_part.setdefault(bisect.bisect_right(firsts, number) - 1, []).append(place)
        for part in sorted(by_part):
            yield part, by_part[part], [numbers[place] - firsts[part] for place in by_part[part]]

    @property
    def is_complete(self) -> bool:
        """Every row of the corpora is in a part, and every part has a shard under every checkpoint."""
        return self.has_all_parts and len(self._by_place) == len(self.parts) * len(self.checkpoints)

    @property
    def joining(self) -> CorpusEntry | None:
        """The corpus of an unfinished append; None where there is none."""
        return self.corpora[-1] if len(self.corpora) > 1 and not self.is_complete else None

    def without_last_corpus(self) -> "Manifest":
        """The manifest from before its last corpus began to join. A part holds rows of one corpus only."""
        rows = sum(corpus["rows"] for corpus in self.corpora[:-1])
        parts = tuple(part for part in self.parts if part.first_row < rows)
        shards = tuple(shard for shard in self.shards if shard.part < len(parts))
        return replace(self, corpora=self.corpora[:-1], parts=parts, shards=shards, has_all_parts=True)

    @cached_property
    def _by_place(self) -> dict[tuple[int, int], ShardEntry]:
        return {(entry.checkpoint, entry.part): entry for entry in self.shards}

    def shard(self, checkpoint: int, part: int) -> ShardEntry | None:
        """The entry of a shard; None where it is not written yet."""
        return self._by_place.get((checkpoint, part))

    def missing(self) -> list[tuple[int, int]]:
        """(checkpoint, part) of every shard that is not listed, in order."""
        pairs = ((c, p) for c in range(len(self.checkpoints)) for p in range(len(self.parts)))
        return [place for place in pairs if place not in self._by_place]

    def with_shard(self, entry: ShardEntry) -> "Manifest":
        """The manifest with one shard added or replaced; shards are sorted, whatever order they come in."""
        entries = {**self._by_place, (entry.checkpoint, entry.part): entry}
        return replace(self, shards=tuple(entries[place] for place in sorted(entries)))

    def to_json(self) -> bytes:
        """The bytes of the file."""
        content = json.loads(json.dumps(asdict(self)))
        return _pretty({**content, "checksum": _checksum(content)})


def read_manifest(place: Place) -> Manifest:
    """Read and check the manifest of an index.

    Raises:
        MissingIndexError: There is no manifest.
        ChecksumError: Its bytes are not those that were written, or what it says cannot be true of an index.
        FormatVersionError: A newer Whence wrote it.
    """
    try:
        data = place.read_committed(MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingIndexError.at(place.root) from error
    try:
        content = json.loads(data)
        checksum, version = content.pop("checksum"), content["format_version"]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise _damaged(place) from error
    # a newer format may be laid out in another way, so its version is believed before its checksum
    is_intact = checksum == _checksum(content) and data == _pretty({**content, "checksum": checksum})
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{place.path(MANIFEST)} has format version {version}, written by Whence "
            f"{content.get('whence_version', '(unknown)')}; this Whence reads format versions up to "
            f"{FORMAT_VERSION}. "
            f"Install that version: pip install 'whence>={content.get('whence_version', '')}'"
            + ("" if is_intact else " (its checksum is wrong too: the file may be damaged)")
        )
    if not is_intact:
        raise _damaged(place)
    try:
        manifest = fitting(Manifest, content)
        _check_consistent(manifest)
    except MisfitError as error:
        raise unlike_written(place.path(MANIFEST), error, REMEDY) from None
    return manifest


def _check_consistent(manifest: Manifest) -> None:
    """Check that files have the names of their places and that numbers agree: a name of its own could lie anywhere.

    Raises:
        MisfitError: One does not.
    """
    rows = 0
    _require(len(manifest.checkpoints) > 0, "no checkpoint is listed")
    for number, part in enumerate(manifest.parts):
        _require(
            (part.file, part.first_row) == (part_file(number), rows),
            f"part {number} is {part.file}, from row {part.first_row}",
        )
        rows += part.rows
    corpus_rows = sum(corpus["rows"] for corpus in manifest.corpora)
    is_sum = rows == corpus_rows if manifest.has_all_parts else rows <= corpus_rows
    _require(is_sum, f"parts have {rows} rows, corpora {corpus_rows}")
    places = [(shard.checkpoint, shard.part) for shard in manifest.shards]
    _require(len({*places}) == len(places), "a shard is listed twice")
    for shard in manifest.shards:
        name = f"the shard of checkpoint {shard.checkpoint} and part {shard.part}"
        _require(
            shard.checkpoint < len(manifest.checkpoints) and shard.part < len(manifest.parts),
            f"{name} is of none that it lists",
        )
        _require(shard.file == shard_file(shard.checkpoint, shard.part), f"{name} is {shard.file}")
        _require(shard.rows == manifest.parts[shard.part].rows, f"{name} has {shard.rows} rows")
        counted = sum(shard.counts.get(status, -1) for status in STATUSES)
        _require(counted == shard.rows, f"{name} has {shard.counts} for its {shard.rows} rows")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise MisfitError(otherwise)


def part_file(number: int) -> str:
    """Name of a part's file."""
    return f"corpus/part-{number:05d}.parquet"


def shard_file(checkpoint: int, part: int) -> str:
    """Name of a shard's file."""
    return f"checkpoint-{checkpoint:03d}/shard-{part:05d}.safetensors"


def check_same(old: Manifest, new: Manifest, where: str) -> None:
    """Refuse to go on with an index that was begun with other settings.

    Raises:
        ManifestMismatchError: Settings differ; the message gives each with both values.
    """
    before, now = _flat(old, len(new.corpora)), _flat(new, len(new.corpora))
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if names:
        raise ManifestMismatchError(
            f"The index at {where} was begun with other settings: {'; '.join(_differences(names, before, now))}. "
            "Use the same settings to go on with it, --restart to start it over, or another directory."
        )


_CONSEQUENCES = ("layer_names", "traced_fraction", "width")
"""What follows from the model and from flags: it is named only where nothing else differs."""
_CORRECTIONS = ("slopes", "dropout", "has_tied_head", "layout_version")
"""What tells an index from those of versions that were wrong; no flag sets it."""
_WORDS = {
    **{name: f"the correction `{name}`" for name in _CORRECTIONS},
    **{"tokenizer": "the tokenizer", "tokenizer_path": "--tokenizer", "tokens_per_batch": "--batch-tokens"},
}
_PLAIN = ("layout", "number of checkpoints", *_CONSEQUENCES)
"""What no flag sets."""


def _differences(names: Sequence[str], before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs, in a user's words: models and corpora by path with what of them differs, settings by flag."""
    things: dict[str, list[str]] = {}
    for name in names:
        if re.match(r"(checkpoint|corpus) \d+ ", name):
            thing, _, entry = name.rpartition(" ")
            things.setdefault(thing, []).append(entry)
    for thing, entries in things.items():
        kind, number = thing.split()
        is_only = kind == "corpus" or now["number of checkpoints"] == before["number of checkpoints"] == 1
        label = {"checkpoint": "the model", "corpus": "the corpus"}[kind] if is_only else f"{kind} {int(number) + 1}"
        yield f"{label} is {_identity(before, thing, entries)} there, {_identity(now, thing, entries)} here"
    settings = [name for name in names if name.rpartition(" ")[0] not in things]
    for name in [name for name in settings if name not in _CONSEQUENCES] or ([] if things else settings):
        flag = name.removeprefix("space.").replace("_", "-")
        label = _WORDS.get(name) or (name if name in _PLAIN or "." in flag else f"--{flag}")
        yield f"{label} is {_value_text(before, name)} there, {_value_text(now, name)} here"


def _identity(flat: dict[str, Any], thing: str, entries: Sequence[str]) -> str:
    """A model or corpus by its path or name, with those of its entries that differ."""
    known = {name.removeprefix(f"{thing} "): value for name, value in flat.items() if name.startswith(f"{thing} ")}
    if not known:
        return "none"
    place = known.get("path") or known.get("name") or "another"
    more = (f"{entry} {str(known.get(entry))[:12]}" for entry in entries if entry not in ("path", "name"))
    return f"{place} ({', '.join(more)})" if {*entries} - {"path", "name"} else str(place)


WEIGHT_DIGITS = 6
"""Digits to which a checkpoint's weight is compared: below lies rounding."""
_NOT_COMPARED = ("base", "learning_rate", "rates")
"""An adapter's base is identified by its digest; of learning rates, the weights that they gave are compared."""


def _flat(manifest: Manifest, corpora: int) -> dict[str, Any]:
    out: dict[str, Any] = {"codec": manifest.codec, "width": manifest.width}
    out["number of checkpoints"] = len(manifest.checkpoints)
    groups = {
        "": manifest.settings,
        **{f"checkpoint {i} ": entry for i, entry in enumerate(manifest.checkpoints)},
        **{f"corpus {i} ": entry for i, entry in enumerate(manifest.corpora[:corpora])},
    }
    for prefix, group in groups.items():
        for name, value in json.loads(json.dumps(group)).items():
            if name in _NOT_COMPARED:
                continue
            value = round(value, WEIGHT_DIGITS) if name == "weight" else value
            inner = value.items() if isinstance(value, dict) else [(None, value)]
            out.update({prefix + (name if key is None else f"{name}.{key}"): item for key, item in inner})
    return out


def _value_text(flat: dict[str, Any], name: str) -> str:
    if flat.get(name) is None:
        return "not given"
    text = json.dumps(flat[name], ensure_ascii=False)
    if name == "tokenizer":
        return f"of digest {flat[name][:12]}"
    return (
        text if name != "chat_template" else f"{text[:60]}… of digest {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    )


def _damaged(place: Place) -> ChecksumError:
    return ChecksumError(f"{place.path(MANIFEST)} is damaged: it does not have the bytes that were written. {REMEDY}")


def _checksum(content: dict) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _pretty(content: dict) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
