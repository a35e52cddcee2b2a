"""The manifest of an index: its settings, its files, and the checksum of every file.

It is JSON with sorted keys and no times, so that an interrupted and resumed build writes the same bytes. Its own
checksum is inside, over the rest in canonical form; and a manifest with other bytes than its content would be written
as is refused too, so that any flipped bit is detected.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from whence.errors import ChecksumError, FormatVersionError, ManifestMismatchError, MissingIndexError
from whence.storage import Place

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """One file of corpus rows."""

    file: str
    rows: int
    first_row: int
    """Number of its first row in the index."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One file of vectors."""

    checkpoint: int
    part: int
    file: str
    rows: int
    sha256: str
    bytes: int
    counts: dict[str, int]
    """Rows by status, and other counts, such as truncated rows."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a manifest."""

    whence_version: str
    codec: str
    width: int
    """Entries of a vector, k."""

    settings: dict[str, Any]
    """The gradient space and digests, as JSON values with dicts nested once at most. A resumed build must agree."""

    checkpoints: tuple[dict[str, Any], ...]
    corpora: tuple[dict[str, Any], ...] = ()
    """One entry for each corpus, in the order of appending."""

    parts: tuple[PartEntry, ...] = ()
    shards: tuple[ShardEntry, ...] = ()
    has_all_parts: bool = False
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def rows(self) -> int:
        """Number of rows in all parts."""
        return self.parts[-1].first_row + self.parts[-1].rows if self.parts else 0

    @property
    def is_complete(self) -> bool:
        """Every row of the corpora is in a part, and every part has a shard under every checkpoint."""
        return self.has_all_parts and len(self._by_place) == len(self.parts) * len(self.checkpoints)

    @property
    def joining(self) -> dict[str, Any] | None:
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
        ChecksumError: Its bytes are not those that were written.
        FormatVersionError: A newer Whence wrote it.
    """
    try:
        data = place.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingIndexError(
            f"There is no index at {place.root}; make one with: whence index MODEL CORPUS -o {place.root}"
        ) from error
    try:
        content = json.loads(data)
        checksum, version = content.pop("checksum"), content["format_version"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
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
    parts = tuple(PartEntry(**entry) for entry in content.pop("parts"))
    shards = tuple(ShardEntry(**entry) for entry in content.pop("shards"))
    lists = {name: tuple(content.pop(name)) for name in ("checkpoints", "corpora")}
    return Manifest(parts=parts, shards=shards, **lists, **content)


def check_same(old: Manifest, new: Manifest, where: str) -> None:
    """Refuse to go on with an index that was begun with other settings.

    Raises:
        ManifestMismatchError: Settings differ; the message gives each with both values.
    """
    before, now = _flat(old, len(new.corpora)), _flat(new, len(new.corpora))
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if names:
        differences = (f"{name} is {_value_text(before, name)} there, {_value_text(now, name)} here" for name in names)
        raise ManifestMismatchError(
            f"The index at {where} was begun with other settings: {'; '.join(differences)}. "
            "Use the same settings to go on with it, --restart to start it over, or another directory"
        )


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
    return json.dumps(flat[name], ensure_ascii=False) if name in flat else "not set"


def _damaged(place: Place) -> ChecksumError:
    return ChecksumError(
        f"{place.path(MANIFEST)} is damaged: it does not have the bytes that were written. Restore it "
        "from a copy, or start the index over with --restart"
    )


def _checksum(content: dict) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _pretty(content: dict) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
