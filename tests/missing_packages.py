"""An environment that lacks a package; apart from `conftest`, which imports transformers: some children need not."""

import sys


def without_s3fs(monkeypatch):
    """As if s3fs were not installed, though a test before may have used it."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for protocol in ("s3", "s3a"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
