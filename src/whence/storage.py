"""A directory of files, here or at any fsspec address: atomic writing, memory-mapped reading, one writer.

A local file is written to `NAME.tmp` beside its place, synced, renamed, and its directory synced: after a
kill or a power cut a name holds all of its bytes or is not there. An object store shows a file only once it
is whole, so there the bytes go straight to the name. What cannot be written is removed.

Whatever an operating system or a store refuses is told as a `StorageError`, but that a file is not there, which the
callers expect.
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

from whence.errors import ManifestMismatchError, MissingExtraError, SettingError, StorageError, WhenceError

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
        """The directory at a path or address; it need not exist yet.

        Raises:
            SettingError: An address of a kind that is not known.
            MissingExtraError: It needs a package that is not installed.
        """
        try:
            fs, root = fsspec.core.url_to_fs(os.fspath(path))
        except ImportError as error:
            raise MissingExtraError(f"{path}: {_needed(os.fspath(path), error)}") from None
        except (ValueError, OSError) as error:
            raise SettingError(
                f"{path}: not an address that can be opened ({error}). Give a directory, or an address of fsspec's "
                "such as s3://bucket/name"
            ) from None
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
        with self._told("read", ""):
            self.fs.invalidate_cache()
            if not self.fs.exists(self.root):
                return []
            found = self.fs.find(self.root, withdirs=False)
        return sorted(str(path).removeprefix(self.root).lstrip("/") for path in found)

    def exists(self, name: str) -> bool:
        """There is such a file."""
        with self._told("read", name):
            return self.fs.exists(self.path(name))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self._told("read", name):
            return self.fs.info(self.path(name))["size"]

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with self._told("read", name):
            return self.fs.cat_file(self.path(name))

    def digest(self, name: str) -> str:
        """SHA-256 of a file, read in pieces."""
        sha = hashlib.sha256()
        with self._told("read", name), self.fs.open(self.path(name), "rb") as file:
            while piece := file.read(_READ_BYTES):
                sha.update(piece)
        return sha.hexdigest()

    def mapped(self, name: str) -> UInt8[Tensor, " bytes"]:
        """The bytes of a file as a tensor: memory-mapped where local (changes stay private), else read."""
        if not self.is_local:
            return torch.frombuffer(bytearray(self.read(name)), dtype=torch.uint8)
        # mode "c": pages are shared with the file until written to, and torch warns of read-only arrays
        with self._told("read", name):
            return torch.from_numpy(np.memmap(self.path(name), dtype=np.uint8, mode="c"))

    def write(self, name: str, pieces: Iterable[bytes | memoryview], *, total: int) -> Written:
        """Write a file whole or not at all.

        Raises:
            StorageError: Disk full, quota, permission: with what was wanted and what is free.
        """
        try:
            return self._write_local(name, pieces) if self.is_local else self._write_remote(name, pieces)
        except WhenceError:  # of whatever makes the pieces
            raise
        except self._refusals as error:
            raise StorageError(self._failure(name, total, error)) from error

    def remove(self, name: str) -> None:
        """Remove a file, and its directory where that leaves it empty."""
        with self._told("remove", name):
            self.fs.rm_file(self.path(name))
            folder = Path(self.path(name)).parent
            if self.is_local and folder != Path(self.root) and not any(folder.iterdir()):
                folder.rmdir()

    def require_removable(self, names: Iterable[str]) -> None:
        """See that files can be removed, before any is: half of them gone would be worse than none.

        Raises:
            StorageError: A directory that they are in cannot be written, by its permissions or a read-only disk.
        """
        if self.is_local:
            for folder in sorted({Path(self.path(name)).parent for name in names}):
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise StorageError(
                        f"Cannot remove what is in {folder}: it is read-only here. Nothing was removed. Let yourself "
                        "write there, or give another directory"
                    )

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
            self._lock(handle)
            try:
                yield
            finally:
                if is_new:
                    with suppress(OSError):  # something is in it, as a rule
                        Path(self.root).rmdir()
        finally:
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ManifestMismatchError(
                f"Another process is writing {self.root}; wait for it or stop it, then retry"
            ) from error
        except OSError as error:  # a network disk without locks
            raise StorageError(
                f"Cannot lock {self.root}: {error.strerror}. Give a directory on another disk"
            ) from error

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

    @contextmanager
    def _told(self, doing: str, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise
        except self._refusals as error:
            raise StorageError(
                f"Cannot {doing} {self.path(name).rstrip('/')}: {reason(error)}. Mend that (its permissions, "
                "its disk or connection), then run the same command again"
            ) from error

    @property
    def _refusals(self) -> type[Exception]:
        """What says that a file cannot be had: other stores' clients have errors of their own."""
        return OSError if self.is_local else Exception

    def _failure(self, name: str, total: int, error: Exception) -> str:
        there = Path(self.root)
        while self.is_local and not there.exists():
            there = there.parent
        free = f"; {shutil.disk_usage(there).free:,} are free there" if self.is_local else ""
        wanted = f" It takes {total:,} bytes{free}." if total else ""
        return (
            f"Cannot write {self.path(name)}: {reason(error)}.{wanted} Nothing of it was kept; "
            "mend this and run the same command again: it resumes"
        )


def reason(error: BaseException) -> str:
    """What an operating system or a store's client says, in one line."""
    told = error.strerror if isinstance(error, OSError) else None
    return told or " ".join(str(error).split())[:200] or type(error).__name__


def _needed(path: str, error: ImportError) -> str:
    """What an address needs that is not installed."""
    kind = path.partition("://")[0]
    package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(kind)
    if package is None:
        return f"addresses {kind}:// need a package that is not installed ({error})"
    return f"addresses {kind}:// need a package that is not installed: pip install {package}"


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
