"""Files of tensors, open to be read one tensor at a time, wherever they are.

A file of a store is copied to this machine's disk, where it may make way for others at any time. So it is opened once
and stays open: the files of many members, each read tensor by tensor in turn, would else be fetched for every tensor.
"""

import threading
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import safetensors

from whence.checksums import Recorded
from whence.storage import Place

MOST_OPEN = 256
_open: OrderedDict[tuple[str, str | None, int], Any] = OrderedDict()
_lock = threading.Lock()


def opened_tensors(place: Place, name: str, recorded: Recorded, remedy: str) -> Any:
    """A context in which a safetensors file is open; for errors see `Place.here`.

    Args:
        place: The directory that it is in.
        name: Its name there.
        recorded: Its size and checksum when it was written.
        remedy: How to mend it, a sentence.
    """
    if place.is_local:
        return safetensors.safe_open(place.path(name), framework="pt")
    key = place.path(name), recorded.xxh3, recorded.bytes
    with _lock:
        if key not in _open:
            _open[key] = safetensors.safe_open(place.here(name, recorded, remedy), framework="pt").__enter__()
            while len(_open) > MOST_OPEN:
                _open.popitem(last=False)
        _open.move_to_end(key)
        return nullcontext(_open[key])
