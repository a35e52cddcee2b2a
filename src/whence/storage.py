"""A directory of files, here or at any fsspec address: atomic writing, memory-mapped reading, one writer.

A local file is written to `NAME.tmp` beside its place, synced, renamed, and its directory synced: after a
kill or a power cut a name holds all of its bytes or is not there. An object store shows a file only once it
is whole, so there the bytes go straight to the name. What cannot be written is removed and told as a
`StorageError`.
"""

import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec.core
import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import UInt8
from torch import Tensor

from whence.errors import ManifestMismatchError, StorageError

TEMPORARY = ".tmp"
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Written:
    """What was written: enough to know the file again."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Place:
    """A directory. Names are paths inside it, with forward slashes."""

    fs: Any
    root: str

    @staticmethod
    def at(path: str | os.PathLike) -> "Place":
        """The directory at a path or address; it need not exist yet."""
        fs, root = fsspec.core.url_to_fs(os.fspath(path))
        return Place(fs, root.rstrip("/") or "/")

    @property
    def is_local(self) -> bool:
        """Files can be mapped, locked and renamed."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Full path of a name, for messages too."""
        return f"{self.root}/{name}"

    def names(self) -> list[str]:
        """Every file below the directory, sorted."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.root):
            return []
        found = self.fs.find(self.root, withdirs=False)
        return sorted(str(path).removeprefix(self.root).lstrip("/") for path in found)

    def exists(self, name: str) -> bool:
        """There is such a file."""
        return self.fs.exists(self.path(name))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self.fs.info(self.path(name))["size"]

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        return self.fs.cat_file(self.path(name))

    def digest(self, name: str) -> str:
        """SHA-256 of a file, read in pieces."""
        sha = hashlib.sha256()
        with self.fs.open(self.path(name), "rb") as file:
            while piece := file.read(_READ_BYTES):
                sha.update(piece)
        return sha.hexdigest()

    def mapped(self, name: str) -> UInt8[Tensor, " bytes"]:
        """The bytes of a file as a tensor: memory-mapped where local (changes stay private), else read."""
        if not self.is_local:
            return torch.frombuffer(bytearray(self.read(name)), dtype=torch.uint8)
        # mode "c": pages are shared with the file until written to, and torch warns of read-only arrays
        return torch.from_numpy(np.memmap(self.path(name), dtype=np.uint8, mode="c"))

    def write(self, name: str, pieces: Iterable[bytes | memoryview], *, total: int) -> Written:
        """Write a file whole or not at all.

        Raises:
            StorageError: Disk full, quota, permission: with what was wanted and what is free.
        """
        try:
            return self._write_local(name, pieces) if self.is_local else self._write_remote(name, pieces)
        except OSError as error:
            raise StorageError(self._failure(name, total, error)) from error

    def remove(self, name: str) -> None:
        """Remove a file, and its directory where that leaves it empty."""
        self.fs.rm_file(self.path(name))
        folder = Path(self.path(name)).parent
        if self.is_local and folder != Path(self.root) and not any(folder.iterdir()):
            folder.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for writing; the lock goes with the process. Elsewhere than locally: no lock.

        The directory is made where there is none; what nothing was written to is removed again.
        """
        if not self.is_local:
            yield
            return
        is_new = not Path(self.root).exists()
        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root, os.O_RDONLY)
        except OSError as error:
            raise StorageError(self._failure("", 0, error)) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield
            finally:
                if is_new:
                    with suppress(OSError):  # something is in it, as a rule
                        Path(self.root).rmdir()
        except BlockingIOError as error:
            raise ManifestMismatchError(
                f"Another process is writing {self.root}; wait for it or stop it, then retry"
            ) from error
        finally:
            os.close(handle)

    def _write_local(self, name: str, pieces: Iterable[bytes | memoryview]) -> Written:
        final = Path(self.path(name))
        temporary = final.with_name(final.name + TEMPORARY)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                written = _copied(pieces, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(final.parent)
        return written

    def _write_remote(self, name: str, pieces: Iterable[bytes | memoryview]) -> Written:
        self.fs.makedirs(self.path(name).rsplit("/", 1)[0], exist_ok=True)
        whole = io.BytesIO()
        written = _copied(pieces, whole)
        self.fs.pipe_file(self.path(name), whole.getvalue())  # one request: there whole, or not at all
        return written

    def _failure(self, name: str, total: int, error: OSError) -> str:
        there = Path(self.root)
        while self.is_local and not there.exists():
            there = there.parent
        free = f"; {shutil.disk_usage(there).free:,} are free there" if self.is_local else ""
        wanted = f" It takes {total:,} bytes{free}." if total else ""
        why = error.strerror or str(error)
        return (
            f"Cannot write {self.path(name)}: {why}.{wanted} Nothing of it was kept; "
            "mend this and run the same command again: it resumes"
        )


def _copied(pieces: Iterable[bytes | memoryview], file: Any) -> Written:
    sha, count = hashlib.sha256(), 0
    for piece in pieces:
        file.write(piece)
        sha.update(piece)
        count += len(piece)
    return Written(count, sha.hexdigest())


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
