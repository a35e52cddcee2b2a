"""A limit on the time of foreign code that runs in this process, such as a chat template with an endless loop.

It works in any thread, and without signals, which belong to whoever runs the process: another thread waits, and then
raises an error in the first. Python notices it between two of its instructions, so that one long call into C ends
first.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in what is done under it after some seconds.

    >>> with time_limit(0.01):
    ...     while True:
    ...         pass
    Traceback (most recent call last):
    TimeoutError
    """
    thread, lock, state = threading.get_ident(), threading.Lock(), {"is_over": False}

    def interrupt() -> None:
        with lock:
            if not state["is_over"]:
                _raise_in(thread, TimeoutError)

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            state["is_over"] = True
        timer.cancel()


def _raise_in(thread: int, error: type[BaseException]) -> None:
    """Raise an error in another thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
