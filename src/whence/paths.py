"""Paths that an operating system refuses: too long, forbidden, gone, or on a full disk; each said in one line.

Python says of such a path what the system says, in five types of errors; safetensors and torch write by code of their
own, in Rust and C++, which has errors of its own. Here each becomes one of Whence's, which names the path and what
mends it.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from whence.errors import SettingError, StorageError, WhenceError

LONGEST_NAME = 255
"""Bytes of a file's name, on all usual file systems."""


@contextmanager
def writing_to(directory: str | os.PathLike) -> Iterator[None]:
    """Turn what other libraries raise where they cannot write below a directory into a `StorageError`.

    transformers, safetensors and torch write checkpoints by code of their own, in Python, Rust and C++, which has an
    error of its own each: a full disk is an `OSError`, a `SafetensorError` or a `RuntimeError`. Other errors pass.
    """
    folder = Path(directory)
    try:
        yield
    except WhenceError as error:
        if isinstance(error.__cause__, FileNotFoundError) and not folder.is_dir():
            raise StorageError(_gone(folder)) from error
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if not isinstance(error, OSError) and not _UNWRITTEN.search(str(error)):
            raise
        if isinstance(error, FileNotFoundError) or _MISSING.search(str(error)):
            raise StorageError(_gone(folder)) from error
        file = error.filename if isinstance(error, OSError) and error.filename else folder
        what = "a file was cut short" if _CUT.search(str(error)) else reason(error)
        raise StorageError(
            f"Cannot write {os.fspath(file)}: {what}; {free_bytes(folder):,} bytes are free there. Mend that "
            "(room, or a permission), then run the same command again: it goes on from what is finished"
        ) from error


_UNWRITTEN = re.compile(r"os error \d+|file write failed|inline_container|Parent directory .* does not exist")
"""What safetensors and torch say of a write that failed."""
_CUT = re.compile(r"file write failed|inline_container")
"""What torch says where it could write a part of a file alone."""
_MISSING = re.compile(r"os error 2\)|Parent directory .* does not exist")


def _gone(folder: Path) -> str:
    return (
        f"A file or directory of {folder} was removed while it was in use. Run the same command again: it makes it anew"
    )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk of a directory, which need not exist."""
    while not exists(folder) and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_readable(directory: str | os.PathLike, patterns: Iterable[str]) -> None:
    """Refuse a directory of which this user may not read all the files that its reader wants.

    Libraries say of such a file that there is none, or pass over it.

    Args:
        directory: A local directory.
        patterns: Names of the files, such as `*.json`.

    Raises:
        StorageError: One may not be read.
    """
    folder = Path(directory)
    if not os.access(folder, os.R_OK | os.X_OK):
        raise not_permitted(folder)
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            if not os.access(file, os.R_OK) and file.exists():
                raise not_permitted(file)


def not_permitted(path: str | os.PathLike) -> StorageError:
    """The refusal of a file or directory that may not be read."""
    return StorageError(
        f"{os.fspath(path)}: this user may not read it (permission denied). Let yourself read it (chmod, chown), or "
        "run as a user who may"
    )


def is_directory(path: str | os.PathLike) -> bool:
    """Whether there is a directory at a path, which may be any text.

    Raises:
        StorageError: One of the directories on the way may not be entered.
    """
    return _looked_at(path, Path.is_dir)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is anything at a path, which may be any text.

    Raises:
        StorageError: One of the directories on the way may not be entered.
    """
    return _looked_at(path, Path.exists)


def may_exist(address: str) -> bool:
    """Whether there may be anything at a path or address: of another's than a disk, only opening it tells."""
    return "://" in address or exists(address)


def _looked_at(path: str | os.PathLike, test: Callable[[Path], bool]) -> bool:
    try:
        return test(Path(path))
    except PermissionError:
        raise not_permitted(path) from None
    except (OSError, ValueError):  # too long for a name, or a character that none has
        return False


def reason(error: BaseException) -> str:
    """The message of an operating system or of a store's client, in one line."""
    message = error.strerror if isinstance(error, OSError) else None
    return message or " ".join(str(error).split())[:200] or type(error).__name__


def refuse_impossible(path: str) -> None:
    """Refuse a local path that no file system takes, which an operating system says in several ways."""
    longest = max(path.split("/"), key=len)
    if "\0" in path or len(os.fsencode(longest)) > LONGEST_NAME:
        what = "it holds a null character" if "\0" in path else f"it has a name of {len(longest):,} characters"
        raise SettingError(f"{path[:80]}: no file can be called so: {what}. Name another place.")


def absolute(path: str | None) -> str | None:
    """An existing path made absolute, so that it holds in any directory; anything else as it is."""
    return str(Path(path).resolve()) if path is not None and exists(path) else path
