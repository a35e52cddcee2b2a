"""Files on their way to a store: large ones are not held in memory."""

import os
import tracemalloc

from fsspec.implementations.local import LocalFileSystem

from whence import uploads
from whence.checksums import digest


def test_a_large_file_is_not_gathered_in_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("WHENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(uploads, "IN_MEMORY", 2**20)
    piece, count = os.urandom(2**20), 40
    tracemalloc.start()
    written = uploads.upload(
        LocalFileSystem(), str(tmp_path / "out"), (piece for _ in range(count)), count * 2**20, lambda call: call()
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23, f"{peak:,} bytes of {count * 2**20:,}"
    assert (tmp_path / "out").stat().st_size == written.bytes == count * 2**20
    assert written.xxh3 == digest(piece for _ in range(count))
    assert [*(tmp_path / "cache").iterdir()] == []
