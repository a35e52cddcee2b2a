"""Files of object stores on this machine's disk, where they can be memory-mapped.

A file is kept under the checksum of what it should hold, `DIRECTORY/<xxh3>-<bytes>`, so that one which was replaced in
its store is fetched anew and two stores share what is equal. It is checked as it comes; what came short is fetched
again. Together the files take `most_bytes()`: those that were used longest ago are removed first. A file that is mapped
stays readable when it is removed.

    WHENCE_CACHE        the directory; else ~/.cache/whence
    WHENCE_CACHE_SIZE   such as 20G; else a fifth of what is free there
"""

import errno
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from whence.checksums import Recorded, digest
from whence.paths import free_bytes
from whence.sizes import size_of

FETCHES = 3
"""Times that a file which comes damaged is fetched."""
SHARE_OF_FREE = 0.2
DRAFT, OLD = "draft-", 86_400.0
"""Beginning of the names of files that are being fetched, and seconds after which none is any more."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = re.compile(r"[0-9a-f]{32}-\d+")
_PIECE = 1 << 22
_whole: set[tuple[str, int]] = set()
"""Copies that this process has checked."""


def directory() -> Path:
    """Where files are kept."""
    given = os.environ.get("WHENCE_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "whence"


def work_directory(address: str) -> Path:
    """A directory here for what is made on the way to an address of a store, such as trainings."""
    return directory() / "work" / hashlib.sha256(address.encode()).hexdigest()[:16]


def most_bytes() -> int:
    """How much all files may take together.

    Raises:
        SettingError: `WHENCE_CACHE_SIZE` is no size.
    """
    given = os.environ.get("WHENCE_CACHE_SIZE")
    if given:
        return size_of(given, "WHENCE_CACHE_SIZE")
    own = sum(size for _, size, _ in _listed())
    return int(SHARE_OF_FREE * (free_bytes(directory()) + own))


def cached(recorded: Recorded, fetch: Callable[[Path], None]) -> Path | None:
    """A file of these bytes on this disk; None where it cannot be kept, or did not come as it should be.

    Args:
        recorded: Its size and checksum; without XXH3 it is not kept.
        fetch: Writes it to a path; called up to `FETCHES` times.
    """
    if recorded.xxh3 is None:
        return None
    folder = directory()
    file = folder / f"{recorded.xxh3}-{recorded.bytes}"
    try:
        if _is_whole(file, recorded):
            os.utime(file)
            return file
        if recorded.bytes > (most := most_bytes()):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=folder, prefix=DRAFT)
        os.close(handle)
    except OSError:
        return None
    try:
        for _ in range(FETCHES):
            fetch(Path(draft))
            if Path(draft).stat().st_size == recorded.bytes and _digest(Path(draft)) == recorded.xxh3:
                Path(draft).chmod(0o644)
                Path(draft).replace(file)
                _whole.add((str(file), file.stat().st_ino))
                _make_room(file, most)
                return file
    except OSError as error:
        if error.errno not in FULL:
            raise
    finally:
        Path(draft).unlink(missing_ok=True)
    return None


def _is_whole(file: Path, recorded: Recorded) -> bool:
    """Whether a copy has its bytes, which are read once in a process; a damaged one is removed."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return False
    known = (str(file), stat.st_ino)
    if known in _whole:
        return True
    if stat.st_size == recorded.bytes and _digest(file) == recorded.xxh3:
        _whole.add(known)
        return True
    file.unlink(missing_ok=True)
    return False


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return digest(iter(lambda: opened.read(_PIECE), b""))


def _listed() -> list[tuple[float, int, Path]]:
    """Time of last use, size and path of each copy; what else is in the directory is left alone."""
    found = []
    with suppress(OSError):
        for file in directory().iterdir():
            with suppress(OSError):  # another process removed it
                stat = file.stat()
                if _NAME.fullmatch(file.name):
                    found.append((stat.st_mtime, stat.st_size, file))
                elif file.name.startswith(DRAFT) and time.time() - stat.st_mtime > OLD:
                    file.unlink()  # of a process that was killed
    return sorted(found)


def _make_room(newest: Path, most: int) -> None:
    """Remove copies that were used longest ago, until all are within the limit."""
    files = _listed()
    excess = sum(size for _, size, _ in files) - most
    for _, size, file in files:
        if excess <= 0:
            return
        if file != newest:
            with suppress(OSError):
                file.unlink()
                excess -= size
