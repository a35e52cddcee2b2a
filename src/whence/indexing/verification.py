"""Check every file of an index against the manifest: its presence, its size and its checksum.

Every byte is read again; nothing is changed, which is left to `repair`. A damaged manifest is the only problem that is
reported, since nothing else can be checked without it.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike

from whence.errors import ChecksumError
from whence.indexing.manifest import MANIFEST, PartEntry, ShardEntry
from whence.indexing.store import Store

FORBIDDEN = tuple(f"cannot be read: {os.strerror(code)}" for code in (errno.EACCES, errno.EPERM))
"""Defects, as `Place.defect` has them, of files that another user or mode keeps from being read."""


@dataclass(frozen=True)
class Problem:
    """A file that is not what the manifest says."""

    file: str
    what: str
    """The defect, such as "wrong checksum"."""

    entry: PartEntry | ShardEntry | None = None

    @property
    def is_forbidden(self) -> bool:
        """Whether a permission is lacking to read it: its bytes may be right, and writing it anew is no remedy."""
        return self.what in FORBIDDEN


def problems_at(path: str | PathLike) -> list[Problem]:
    """All problems of an index, its manifest included; if that is damaged, nothing else can be checked."""
    try:
        store = Store.open(path)
    except ChecksumError as error:
        return [Problem(MANIFEST, str(error))]
    return list(problems_of(store))


def problems_of(store: Store) -> Iterator[Problem]:
    """The problems of all files but the manifest: missing, damaged, or not listed."""
    present = set(store.place.names())
    entries = {entry.file: entry for entry in (*store.manifest.parts, *store.manifest.shards)}
    for name, entry in entries.items():
        what = store.place.defect(name, entry) if name in present else "missing"
        if what is not None:
            yield Problem(name, what, entry)
    for name in sorted(present - entries.keys() - {MANIFEST}):
        yield Problem(name, "not listed in the manifest")
