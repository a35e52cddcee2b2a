"""An output is no input: what is about to be written must not be a file or directory that the same command reads.

Two names are one file if they lead to it by links, relative paths or another form of address, or are hard links of one
another. An input directory stands for the files below it. An index, pool, run or adapter also stands for what its own
files name: the corpus, the parent, the base.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from whence.errors import SettingError, WhenceError
from whence.local_files import TEMPORARY
from whence.paths import exists
from whence.paths import is_directory as folder_exists
from whence.storage import Place

DESCRIPTIONS = ("manifest.json", "pool.json", "bank.json", "curvature.json", "whence_train.json", "adapter_config.json")
"""Files of a directory that name others."""
NAMING = {
    "name",
    "path",
    "base",
    "parent",
    "corpus",
    "model",
    "run",
    "index",
    "tokenizer_path",
    "base_model_name_or_path",
}
"""Keys of addresses in these files."""


@dataclass(frozen=True)
class Address:
    """Where a path or an fsspec address leads, links followed."""

    given: str
    fs: Any
    path: str

    @staticmethod
    def of(path: str | os.PathLike) -> "Address":
        """The address of a path; it need not exist."""
        place = Place.at(path)
        fs, root = place.fs, place.root if place.is_local else str(place.fs._strip_protocol(place.root))
        while not isinstance(fs, LocalFileSystem) and hasattr(fs, "fs"):  # a cache of another file system
            fs = fs.fs
        return Address(str(path), fs, os.path.realpath(root) if isinstance(fs, LocalFileSystem) else root)

    @property
    def is_local(self) -> bool:
        """Whether it is on a local disk."""
        return isinstance(self.fs, LocalFileSystem)

    def is_same(self, other: "Address") -> bool:
        """Whether two addresses are of one file or directory."""
        if not (self.is_local and other.is_local):
            return self.fs.unstrip_protocol(self.path) == other.fs.unstrip_protocol(other.path)
        with suppress(OSError):
            return Path(self.path).samefile(other.path)
        return self.path == other.path

    def is_below(self, other: "Address") -> bool:
        """Whether this is inside another, a directory."""
        mine, root = self.fs.unstrip_protocol(self.path), other.fs.unstrip_protocol(other.path).rstrip("/")
        return mine.startswith(f"{root}/")

    def is_file_of(self, directory: "Address") -> bool:
        """Whether this is a file that exists below a directory, by its name or by a link there."""
        if not self.is_local:
            return self.is_below(directory) and self.fs.exists(self.path)
        file = Path(self.path)
        if not (directory.is_local and file.is_file() and Path(directory.path).is_dir()):
            return False
        if self.is_below(directory):
            return True
        status = file.stat()
        return any((status.st_dev, status.st_ino) == identity for identity in _identities_below(directory.path))


def refuse_inputs(
    out: str | os.PathLike,
    inputs: Iterable[Any],
    *,
    flag: str = "-o",
    is_directory: bool = False,
    is_own: bool = False,
) -> None:
    """Refuse an output that is, holds or would replace an input.

    Args:
        out: A file or directory that is to be written.
        inputs: What is read: paths, addresses, objects opened from them; None, rows in memory and names of the Hub are
            passed over.
        flag: The output's flag, for the message.
        is_directory: Whether `out` is a directory; it may lie in an input's directory, and no input in it.
        is_own: Whether a file in the directory of an input is no part of it, as Whence's own tables are none.

    Raises:
        SettingError: It is one, or a directory cannot be made or written there.
    """
    written = Address.of(out)
    if is_directory and written.is_local:
        if not _is_utf8(written.path):  # safetensors cannot open what is below it
            raise SettingError(f"{flag} {out}: its name is not UTF-8. Name another place, or rename the directory.")
        require_writable(written.path, f"{flag} {out}")
    drafts = () if is_directory else (Address.of(f"{out}{TEMPORARY}"),)  # written first, then renamed
    for source in addresses(inputs):
        for target in (written, *drafts):
            if target.is_same(source) or (is_directory and source.is_below(target)):
                relation = "is" if target.is_same(source) else "holds"
                raise SettingError(f"{flag} {out}: it {relation} the input {source.given}. Name another place.")
            if not (is_directory or is_own) and target.is_file_of(source):
                raise SettingError(f"{flag} {out}: a file of the input {source.given}. Name another place.")


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # Python holds other bytes of a name as lone surrogates
        return False
    return True


def require_writable(directory: str | os.PathLike, label: str) -> None:
    """Refuse, before any work is done, a local directory that cannot be made or written.

    Args:
        directory: It need not exist.
        label: What the user gave, for the message.

    Raises:
        SettingError: It is a file or lies below one, or this user may not write there.
    """
    place = Path(directory)
    while not exists(place) and place != place.parent:
        place = place.parent
    if not folder_exists(place):
        what = (
            "a file, where a directory is"
            if place == Path(directory)
            else f"{place} is a file, and no directory can be"
        )
        raise SettingError(f"{label}: {what} to be written. Name another place.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise SettingError(
            f"{label}: this user may not write in {place} (permission denied). Let yourself write there (chmod, chown) "
            "or name another place."
        )


def addresses(inputs: Iterable[Any]) -> Iterator[Address]:
    """Addresses of inputs, and of what they name in turn."""
    for source in inputs:
        source = getattr(source, "origin", source)  # a corpus
        source = getattr(getattr(source, "store", source), "place", source)  # an index, a pool
        source = source.fs.unstrip_protocol(source.root) if isinstance(source, Place) else source
        if isinstance(source, str | os.PathLike) and str(source):
            with suppress(WhenceError):  # whoever reads it says what is wrong with it
                address = Address.of(source)
                yield address
                yield from map(Address.of, _named_in(address))


def is_described(path: Any) -> bool:
    """Whether a path is a directory of Whence's or an adapter's, whose files are named in it, and not of rows."""
    if not isinstance(path, str | os.PathLike) or not folder_exists(path):
        return False
    return any(os.access(Path(path, name), os.F_OK) for name in DESCRIPTIONS)


def _named_in(directory: Address) -> set[str]:
    """Local files and directories that a directory's own descriptions name."""
    named: set[str] = set()
    if directory.is_local:
        for name in DESCRIPTIONS:
            with suppress(OSError, ValueError, RecursionError):
                named.update(_values(json.loads(Path(directory.path, name).read_bytes())))
    return {path for path in named if re.match(r"/|file:", path)}


def _values(content: Any) -> Iterator[str]:
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, str) and key in NAMING:
            yield value
        for item in value if isinstance(value, list) else [value]:
            yield from _values(item)


def _identities_below(directory: str) -> Iterator[tuple[int, int]]:
    """Device and inode of every file below a directory; links are followed, each directory is read once."""
    visited: set[Path] = set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        if (real := Path(folder).resolve()) in visited:
            folders.clear()
            continue
        visited.add(real)
        for name in names:
            with suppress(OSError):
                status = Path(folder, name).stat()
                yield status.st_dev, status.st_ino
