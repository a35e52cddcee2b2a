"""A limit on the time of foreign code that runs in this process, such as a chat template with an endless loop.

It works in any thread, and without signals, which belong to whoever runs the process: one other thread looks at all
limits a few times a second, and raises an error in the thread whose time is over. Python notices it between two of its
instructions, so that one long call into C ends first. A limit costs about a microsecond: templates are many and short.
"""

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PERIOD = 0.1
"""Seconds from one look to the next: the most by which a limit is late."""
_deadlines: dict[object, tuple[int, float]] = {}
"""The thread and the end of each limit. Whoever takes an entry out decides whether its error is raised."""
_watch: threading.Thread | None = None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in what is done under it after some seconds.

    >>> with time_limit(0.01):
    ...     while True:
    ...         pass
    Traceback (most recent call last):
    TimeoutError
    """
    _start()
    entry = object()
    _deadlines[entry] = threading.get_ident(), time.monotonic() + seconds
    try:
        yield
    finally:
        if _deadlines.pop(entry, None) is None:
            while not isinstance(sys.exception(), TimeoutError):  # it is on its way, and must not come later
                time.sleep(0.001)


def _start() -> None:
    """Start the thread that looks at limits, unless it runs: a forked process has none."""
    global _watch
    if _watch is None or not _watch.is_alive():
        _watch = threading.Thread(target=_raise_where_time_is_over, name="whence-time-limits", daemon=True)
        _watch.start()


def _raise_where_time_is_over() -> None:
    while True:
        time.sleep(PERIOD)
        for entry, (thread, end) in _deadlines.copy().items():
            if time.monotonic() > end and _deadlines.pop(entry, None) is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeoutError))
