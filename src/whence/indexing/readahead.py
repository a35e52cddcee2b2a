"""Ask the system to read mapped files before they are needed.

A page that is not in memory is read when it is touched, with some 128 KB that follow it: a disk then waits for the
processor and the processor for the disk. `MADV_WILLNEED` starts the reading of a whole stretch and returns at once.
Where the pages are in memory it costs microseconds, and where there is no such call nothing happens.

Source: madvise(2), https://man7.org/linux/man-pages/man2/madvise.2.html.
"""

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TypeVar

from torch import Tensor

ItemT = TypeVar("ItemT")


def advise(tensor: Tensor) -> None:
    """Let the memory of a mapped tensor be read from now on."""
    call, size = _madvise(), tensor.numel() * tensor.itemsize
    if call is not None and size:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        call(start, tensor.data_ptr() + size - start, mmap.MADV_WILLNEED)


def ahead(items: Iterable[ItemT], tensors: Callable[[ItemT], Iterable[Tensor]]) -> Iterator[ItemT]:
    """The items, each after the tensors of the next one were asked for."""
    waiting: list[ItemT] = []
    for item in items:
        for tensor in tensors(item):
            advise(tensor)
        if waiting:
            yield waiting.pop()
        waiting.append(item)
    yield from waiting


@cache
def _madvise() -> Callable[..., int] | None:
    if not hasattr(mmap, "MADV_WILLNEED"):
        return None
    call = getattr(ctypes.CDLL(None), "madvise", None)
    if call is not None:
        call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
