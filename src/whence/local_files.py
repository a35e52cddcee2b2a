"""Files and directories of a local disk: written whole or not at all, removed with all that is in them.

A file is written to a draft beside its final name, synced, renamed, and its directory synced. Two writers of one name
wait for each other; what a killed one has left of its draft is written over.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

import xxhash

from whence.checksums import Written

TEMPORARY = ".tmp"


def write_whole(final: Path, pieces: Iterable[bytes | memoryview]) -> Written:
    """Write a file by a draft and a rename; its directory is made."""
    temporary = final.with_name(final.name + TEMPORARY)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _draft(temporary) as file:
        written = copied(pieces, file)
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(final)
    _sync_directory(final.parent)
    return written


def copied(pieces: Iterable[bytes | memoryview], file: Any) -> Written:
    """Write pieces to an open file; how many bytes they are, and their checksums."""
    sha, xxh3, count = hashlib.sha256(), xxhash.xxh3_128(), 0
    for piece in pieces:
        file.write(piece)
        sha.update(piece)
        xxh3.update(piece)
        count += len(piece)
    return Written(count, sha.hexdigest(), xxh3.hexdigest())


@contextmanager
def _draft(path: Path) -> Iterator[BufferedWriter]:
    """An empty file that no other process or thread writes, to be renamed; removed where that does not come about.

    What a killed process left is written over. A second writer waits for the first, so that both files are whole.
    """
    file = None
    try:
        file = _opened_alone(path)
        yield file
    except BaseException:
        if file is not None and _is_at(file, path):
            path.unlink()
        raise
    finally:
        if file is not None:
            file.close()


def _opened_alone(path: Path) -> BufferedWriter:
    """A file to write, emptied once no other has it open for that."""
    while True:
        file = path.open("ab")  # as it is: another may be writing it
        with suppress(OSError):  # a network disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, path):
            file.truncate(0)
            return file
        file.close()  # the other has renamed it meanwhile


def _is_at(file: BufferedWriter, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:  # asked for once: another writer may rename it at any moment
        return False


def remove_directory(path: str | os.PathLike) -> None:
    """Remove a directory with all that is in it, also where the process is stopped meanwhile; none is no error."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(path, ignore_errors=True)
        raise


@contextmanager
def temporary_directory(folder: str | os.PathLike, prefix: str) -> Iterator[str]:
    """A directory of its own name in a folder, for as long as it is used; a killed process leaves it."""
    path = tempfile.mkdtemp(dir=folder, prefix=prefix)
    try:
        yield path
    finally:
        remove_directory(path)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
