"""A file on its way to an object store, whole: the store has all of it or nothing.

Its checksums are those of what was gathered, in memory where that is little, else in a draft on this machine's disk: a
pool's member of a large model has more bytes than most machines have memory.
"""

import io
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from whence.checksums import Written
from whence.errors import StorageError
from whence.local_cache import DRAFT, directory
from whence.local_files import copied
from whence.paths import reason

IN_MEMORY = 2**26
"""Bytes of the largest file that is gathered in memory."""


def upload(
    fs: Any,
    path: str,
    pieces: Iterable[bytes | memoryview],
    total: int,
    persistent: Callable[[Callable[[], Any]], Any],
) -> Written:
    """Write a file of a store.

    Args:
        fs: Its fsspec filesystem.
        path: The file.
        pieces: Its bytes.
        total: How many they are.
        persistent: Calls what it is given, and again where that fails for a while.

    Raises:
        StorageError: The draft cannot be written.
        OSError: The store refused it, or whatever else its client raises.
    """
    if total <= IN_MEMORY:
        buffer = io.BytesIO()
        written = copied(pieces, buffer)
        persistent(lambda: fs.pipe_file(path, buffer.getvalue()))
        return written
    draft = None
    try:
        try:
            directory().mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=directory(), prefix=DRAFT)
            with os.fdopen(handle, "wb") as file:
                written = copied(pieces, file)
        except OSError as error:
            raise StorageError(
                f"{path}: a draft of its {total:,} bytes cannot be written to {directory()}: {reason(error)}. Let "
                "WHENCE_CACHE name a directory with that much room, then run the same command again: it resumes"
            ) from error
        persistent(lambda: fs.put_file(draft, path))
    finally:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
    return written
