"""A directory of files, here or at any fsspec address: atomic writing, memory-mapped reading, one writer.

A local file is written to `NAME.tmp` beside its final name, synced, renamed, and its directory synced: after a kill or
a power cut a name either holds all of its bytes or does not exist. What a kill leaves of `NAME.tmp` is written over by
the next writer; two at a time wait for each other. An object store shows a file only once it is whole,
so there the bytes go straight to the name. A file that cannot be written whole is removed.

A local directory is locked by the system, one of an object store by a lease (`leases`). What makes other files count,
such as a manifest, is a commit: it is written last, and in a store that has puts on a condition (S3) only where it is
still what this process read or wrote. Calls to a store are made again where they fail for a while (`remote_calls`), and
files that are mapped are kept on this machine's disk (`local_cache`).

Whatever an operating system or a store refuses becomes a `StorageError`, except that a file does not exist, which the
callers expect.

Whatever Whence writes for itself is checked when a process first uses it (`checksums`): a JSON document carries its own
checksum, another file is recorded in one.
"""

import fcntl
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from whence import commits
from whence.checksums import Recorded, Written, digest, sealed
from whence.errors import (
    ChecksumError,
    ManifestMismatchError,
    MissingExtraError,
    SettingError,
    StorageError,
    WhenceError,
)
from whence.leases import NAME as LEASE
from whence.leases import Lease
from whence.local_cache import cached, work_directory
from whence.local_files import copied, write_whole
from whence.paths import exists, free_bytes, reason, refuse_impossible
from whence.records import Count, FastDigest, read_record
from whence.remote_calls import persistent
from whence.uploads import upload

AGAIN = "Remove it, and run the same command again: it makes the file anew."
"""Remedy for a damaged file that the command at hand can make again."""
_READ_BYTES = 1 << 22
_leases: dict[str, Lease] = {}
"""Those that this process holds, by directory."""
_intact: set[tuple[Any, ...]] = set()
"""Files that this process has checked, as they were then: see `Place.check`."""


class FileEntry(TypedDict):
    """What a document says of a file in its directory."""

    file: str
    bytes: Count
    xxh3: FastDigest


@dataclass(frozen=True)
class Place:
    """A directory. Names are paths inside it, with forward slashes."""

    fs: Any
    root: str
    """A path, or an address with its protocol."""

    @staticmethod
    def at(path: str | os.PathLike) -> "Place":
        """The directory at a path or address; it need not exist yet.

        Raises:
            SettingError: The address is of an unknown kind, or a path that no file can have.
            MissingExtraError: The address needs a package that is not installed.
        """
        try:
            fs, root = fsspec.core.url_to_fs(os.fspath(path), use_listings_cache=False)
        except ImportError as error:
            raise MissingExtraError(f"{path}: {_missing_package(os.fspath(path), error)}") from None
        except (ValueError, OSError) as error:
            raise SettingError(
                f"{path}: not an address that can be opened ({error}). Give a directory, or an address of fsspec's "
                "such as s3://bucket/name"
            ) from None
        if isinstance(fs, LocalFileSystem):
            refuse_impossible(root)
            return Place(fs, root.rstrip("/") or "/")
        address = fs.unstrip_protocol(root.rstrip("/"))
        # a cache of another store has addresses of its own
        return Place(fs, address if str(fs._strip_protocol(address)) == root.rstrip("/") else root.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether files can be mapped, locked and renamed."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Full path of a name, also for messages."""
        return f"{self.root}/{name}"

    @property
    def scratch(self) -> Path:
        """A directory of this machine's disk for what is made on the way: the place itself, or for a store another."""
        return Path(self.root) if self.is_local else work_directory(self.root)

    def below(self, *names: str) -> "Place":
        """A directory inside this one."""
        return Place(self.fs, "/".join([self.root, *names]))

    def names(self) -> list[str]:
        """Every file below the directory, sorted."""
        with self._refusals_as_errors("read", ""):
            self.fs.invalidate_cache()
            paths = self._persistent(lambda: self.fs.find(self.root, withdirs=False) if self._is_there() else [])
        inside = self.root if self.is_local else self.fs._strip_protocol(self.root)
        names = sorted(str(path).removeprefix(inside).lstrip("/") for path in paths)
        return names if self.is_local else [name for name in names if name != LEASE]

    def _is_there(self) -> bool:
        return self.fs.exists(self.root)

    def _persistent(self, call: Callable[[], Any]) -> Any:
        """A call to the store, made again where it fails for a while; on a disk just the call."""
        return call() if self.is_local else persistent(call, f"a call to {self.root}")

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        with self._refusals_as_errors("read", name):  # fsspec says of a file that may not be looked at: there is none
            found = self._persistent(lambda: self.fs.exists(self.path(name)))
            return found or (self.is_local and exists(self.path(name)))

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        with self._refusals_as_errors("read", name):
            return self._persistent(lambda: self.fs.info(self.path(name)))["size"]

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with self._refusals_as_errors("read", name):
            return self._persistent(lambda: self.fs.cat_file(self.path(name)))

    def defect(self, name: str, recorded: Recorded, *, data: Any = None, fast: bool = False) -> str | None:
        """The defect of a file, such as "wrong checksum"; None where it is as it was written. Every byte is read.

        Args:
            name: The file.
            recorded: Its size and checksums when it was written.
            data: Its bytes, if they are at hand.
            fast: Compare the faster of its checksums alone; else SHA-256, where that was taken.
        """
        try:
            size = self.size(name) if data is None else len(data)
            if size != recorded.bytes:
                return f"{size:,} bytes, not {recorded.bytes:,}"
            is_fast = recorded.xxh3 is not None and (fast or recorded.sha256 is None)
            pieces = self._pieces(name) if data is None else [data]
            is_same = digest(pieces, fast=is_fast) == (recorded.xxh3 if is_fast else recorded.sha256)
            return None if is_same else "wrong checksum"
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a name that no file can have
            return "missing"
        except StorageError as error:
            return f"cannot be read: {reason(error.__cause__ or error)}"

    def check(
        self,
        name: str,
        recorded: Recorded,
        remedy: str,
        *,
        data: Any = None,
        also: Callable[[Path], None] | None = None,
    ) -> None:
        """Refuse a file that is not as it was written, before it is used.

        A local file is read for it once in a process, as long as its inode, size and time of change stay the same. What
        is read of a store after it is not what was checked: see `read_checked` and `here`.

        Args:
            name: The file.
            recorded: Its size and checksums when it was written.
            remedy: How to mend it, a sentence.
            data: Its bytes, if they are at hand.
            also: Another check, called with the path of the file (of a store: of its copy here); it raises what it
                finds.

        Raises:
            ChecksumError: It is missing or has other bytes.
        """
        known = self._state(name, recorded)
        if known in _intact and (self.is_local or also is not None):
            return
        if not self.is_local and also is not None:  # of its copy here, which is what is used
            also(self.here(name, recorded, remedy))
            _intact.add((self.path(name), recorded.xxh3))
            return
        if (what := self.defect(name, recorded, data=data, fast=True)) is not None:
            raise ChecksumError(f"{self.path(name)} is not what was written ({what}). {remedy}")
        if also is not None:
            also(Path(self.path(name)))
        if known is not None and self.is_local:
            _intact.add(known)

    def _state(self, name: str, recorded: Recorded) -> tuple[Any, ...] | None:
        """A file as it is now, with the checksum that it should have; None where it cannot be told."""
        if not self.is_local:
            return self.path(name), recorded.xxh3
        try:
            stat = Path(self.path(name)).stat()
        except OSError:
            return None
        expected = recorded.xxh3 or recorded.sha256
        return self.path(name), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, expected

    def _pieces(self, name: str) -> Iterator[bytes]:
        with self._refusals_as_errors("read", name), self.fs.open(self.path(name), "rb") as file:
            while piece := file.read(_READ_BYTES):
                yield piece

    def write_document(self, name: str, document: Mapping[str, Any], *, is_commit: bool = False) -> None:
        """Write a JSON object that carries its checksum, whole or not at all; for `is_commit` see `write`."""
        data = sealed(document)
        self.write(name, [data], total=len(data), is_commit=is_commit)

    def require_disk(self, flag: str) -> None:
        """Refuse, by a `SettingError`, a directory of a store for what is made in place."""
        if not self.is_local:
            raise SettingError(f"{flag} {self.root}: this writes to a disk alone. Name a directory of this machine")

    def read_document(self, name: str, remedy: str = AGAIN) -> dict[str, Any]:
        """The JSON object in a file; one of an older Whence has no checksum, and is taken as it is.

        Raises:
            ChecksumError: It is damaged; the message ends with the remedy.
        """
        return read_record(dict[str, Any], self.read(name), self.path(name), remedy)

    def write_recorded(self, name: str, data: bytes) -> None:
        """Write a file, and before it a document with its size and checksum at the top of the directory."""
        self.write_document(_record_name(name), {"file": name, "bytes": len(data), "xxh3": digest([data])})
        self.write(name, [data], total=len(data))

    def read_checked(self, name: str, recorded: Recorded, remedy: str) -> bytes:
        """All bytes of a file, once it is known that they are those that were written; for errors see `check`."""
        try:
            data = self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            data = None
        self.check(name, recorded, remedy, data=data)
        assert data is not None
        return data

    def check_recorded(self, name: str) -> None:
        """Refuse a damaged file of `write_recorded`; one of an older Whence has no record, and is taken as it is.

        Raises:
            ChecksumError: The file or its record is damaged, or the record is of another file.
        """
        if (recorded := self._recorded(name)) is not None:
            self.check(name, recorded, AGAIN)

    def read_recorded(self, name: str) -> bytes:
        """All bytes of a file of `write_recorded`, checked as `check_recorded` checks it."""
        recorded = self._recorded(name)
        return self.read(name) if recorded is None else self.read_checked(name, recorded, AGAIN)

    def _recorded(self, name: str) -> Written | None:
        """What a file was when it was written; None for one of an older Whence."""
        record = _record_name(name)
        if not self.exists(record):
            return None
        remedy = f"Remove it and {name}, and run the same command again."
        entry = read_record(FileEntry, self.read(record), self.path(record), remedy)
        if entry["file"] != name:
            raise ChecksumError(f"{self.path(record)} is the record of {entry['file']}. {AGAIN}")
        return Written(entry["bytes"], None, entry["xxh3"])

    def mapped(self, name: str, recorded: Recorded | None = None) -> Any:
        """The bytes of a file as a tensor [bytes], uint8, memory-mapped: changes stay private.

        Of a store its copy on this machine's disk is mapped, or the bytes are read where it cannot be kept there.

        A mapping holds no file handle. Linux allows a process 65,530 mappings (`vm.max_map_count`).

        Args:
            name: The file.
            recorded: Of a store's file its size and checksum when it was written, by which its copy is known.
        """
        import torch  # which no other method needs: the command line opens places before it

        path = self.path(name)
        with self._refusals_as_errors("read", name):
            if not self.is_local:
                copy = None if recorded is None else cached(recorded, lambda file: self._fetch(name, file))
                if copy is None or not copy.exists():  # it is no longer there where there is little room
                    return torch.frombuffer(bytearray(self.read(name)), dtype=torch.uint8)
                path = str(copy)
            # np.memmap holds a handle as long as it lives, torch.from_file none: an index may have thousands of files
            with self.fs.open(path, "rb") if self.is_local else Path(path).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
            if not size:
                return torch.zeros(0, dtype=torch.uint8)
            return torch.from_file(path, shared=False, size=size, dtype=torch.uint8)

    def here(self, name: str, recorded: Recorded, remedy: str) -> Path:
        """Where a file is on this machine's disk; that of a store is copied, and checked as it comes.

        Raises:
            ChecksumError: It is missing in the store, or has other bytes.
            StorageError: There is no room for a copy.
        """
        if self.is_local:
            return Path(self.path(name))
        with self._refusals_as_errors("read", name), suppress(FileNotFoundError):
            if (copy := cached(recorded, lambda file: self._fetch(name, file))) is not None:
                return copy
        if (what := self.defect(name, recorded, fast=True)) is not None:
            raise ChecksumError(f"{self.path(name)} is not what was written ({what}). {remedy}")
        raise StorageError(
            f"{self.path(name)}: no room for a copy of its {recorded.bytes:,} bytes on this machine. Let "
            "WHENCE_CACHE_SIZE be larger, or WHENCE_CACHE name a directory of a larger disk"
        )

    def _fetch(self, name: str, file: Path) -> None:
        self._persistent(lambda: self.fs.get_file(self.path(name), str(file)))

    def write(self, name: str, pieces: Iterable[bytes | memoryview], *, total: int, is_commit: bool = False) -> Written:
        """Write a file whole or not at all.

        Args:
            name: The file.
            pieces: Its bytes.
            total: How many they are, for a message.
            is_commit: Whether other files count by this one: it is not written where another process wrote it since
                this one read or wrote it, as far as the store can tell.

        Raises:
            StorageError: Disk full, quota or permission; the message says how much was needed and how much is free.
            ManifestMismatchError: Another process writes here.
        """
        try:
            if self.is_local:
                return write_whole(Path(self.path(name)), pieces)
            return self._write_remote(name, pieces, total, is_commit)
        except WhenceError:  # raised by whatever makes the pieces
            raise
        except self._refusals as error:
            raise StorageError(self._failure(name, total, error)) from error

    def remove(self, name: str) -> None:
        """Remove a file, and its directory if that leaves it empty."""
        with self._refusals_as_errors("remove", name):
            commits.forget(self.path(name))
            self._persistent(lambda: self.fs.rm_file(self.path(name)))
            folder = Path(self.path(name)).parent
            if self.is_local and folder != Path(self.root) and not any(folder.iterdir()):
                folder.rmdir()

    def require_removable(self, names: Iterable[str]) -> None:
        """Check that files can be removed before any is removed: losing half of them would be worse than losing none.

        Raises:
            StorageError: Their directory cannot be written, because of its permissions or a read-only disk.
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
        """Hold the directory for writing; the lock ends with the process, or a minute later in an object store.

        A local directory is made if it does not exist, and removed again if nothing was written to it.

        Raises:
            ManifestMismatchError: Another process holds it.
        """
        if not self.is_local:
            with self._leased():
                yield
            return
        is_new = not exists(self.root)
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
                    with suppress(OSError):  # it usually holds something by now
                        Path(self.root).rmdir()
        finally:
            os.close(handle)

    @contextmanager
    def _leased(self) -> Iterator[None]:
        """Hold the lease of a directory of a store."""
        lease = Lease(self.fs, self.root)
        with self._refusals_as_errors("write", LEASE):
            lease.take()
        _leases[self.root] = lease
        try:
            yield
        finally:
            del _leases[self.root]
            lease.release()

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ManifestMismatchError(
                f"Another process is writing {self.root}; wait for it or stop it, then retry"
            ) from error
        except OSError as error:  # such as a network disk without locks
            raise StorageError(
                f"Cannot lock {self.root}: {error.strerror}. Give a directory on another disk"
            ) from error

    def _write_remote(self, name: str, pieces: Iterable[bytes | memoryview], total: int, is_commit: bool) -> Written:
        if (lease := self._lease()) is not None:
            lease.require(asks=is_commit)
        self._persistent(lambda: self.fs.makedirs(self.path(name).rsplit("/", 1)[0], exist_ok=True))
        path = self.path(name)
        if not (is_commit and commits.has_conditions(self.fs)):
            return upload(self.fs, path, pieces, total, self._persistent)
        buffer = io.BytesIO()
        written = copied(pieces, buffer)
        commits.commit(self.fs, path, buffer.getvalue())
        return written

    def _lease(self) -> Lease | None:
        """That which this process holds of the directory, or of one that it is in."""
        return next((lease for root, lease in _leases.items() if f"{self.root}/".startswith(f"{root}/")), None)

    def read_committed(self, name: str) -> bytes:
        """All bytes of a file that a commit may replace."""
        if not self.is_local and commits.has_conditions(self.fs):
            with self._refusals_as_errors("read", name):
                commits.see(self.fs, self.path(name))  # first: what comes between the two was not read
        return self.read(name)

    @contextmanager
    def _refusals_as_errors(self, verb: str, name: str) -> Iterator[None]:
        """Turn a refusal to `verb` (read, remove) a file into a `StorageError`."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, WhenceError):
            raise
        except self._refusals as error:
            raise StorageError(
                f"Cannot {verb} {self.path(name).rstrip('/')}: {reason(error)}. Mend that (its permissions, "
                "its disk or connection), then run the same command again"
            ) from error

    @property
    def _refusals(self) -> type[Exception]:
        """The errors by which a file is refused: clients of other stores have errors of their own."""
        return OSError if self.is_local else Exception

    def _failure(self, name: str, total: int, error: Exception) -> str:
        folder = Path(self.root)
        free = f"; {free_bytes(folder):,} are free there" if self.is_local else ""
        size = f" It takes {total:,} bytes{free}." if total else ""
        return (
            f"Cannot write {self.path(name)}: {reason(error)}.{size} Nothing of it was kept; "
            "mend this and run the same command again: it resumes"
        )


def _record_name(name: str) -> str:
    """Name of the document that records a file: it stands at the top of the directory, whatever the file's folder."""
    return f"{PurePosixPath(name).stem}.json"


def _missing_package(path: str, error: ImportError) -> str:
    """The package that an address needs and that is not installed, as a message."""
    kind = path.partition("://")[0]
    package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(kind)
    if package is None:
        return f"addresses {kind}:// need a package that is not installed ({error})"
    return f"addresses {kind}:// need a package that is not installed: pip install {package}"
