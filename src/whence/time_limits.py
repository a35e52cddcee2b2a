"""A limit on the time of foreign code that runs in this process, such as a chat template with an endless loop.

It works in any thread, and without signals, which belong to whoever runs the process: one other thread looks at all
limits a few times a second, and raises an error in the thread whose time is over. Python notices it between two of its
instructions, so that one long call into C ends first. A limit costs about a microsecond: templates are many and short.
"""

import ctypes
import threading
import time

PERIOD = 0.1
"""Seconds from one look to the next: the most by which a limit is late."""
_running: dict["time_limit", None] = {}
"""The limits whose work goes on. Whoever takes one out decides whether its error is raised."""
_watch: threading.Thread | None = None


class time_limit:  # noqa: N801  (named as a function, as a context manager of the standard library is)
    """Raise `TimeoutError` in what is done under it after some seconds.

    A class, not a generator: an error that arrives between two instructions of `with` itself would leave a generator
    behind, half done, whose end comes whenever it is collected.

    >>> with time_limit(0.01):
    ...     while True:
    ...         pass
    Traceback (most recent call last):
    TimeoutError
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._is_raised = False

    def __enter__(self) -> None:
        _start()
        self._thread, self._end = threading.get_ident(), time.monotonic() + self._seconds
        _running[self] = None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if _running.pop(self, self) is None:
            return
        for _ in range(1000):  # the watch has taken it out, and raises its error in its next line
            if self._is_raised:
                break
            time.sleep(0.001)
        _set_error(self._thread, None)  # it may not have come yet, and must not come later
        if not isinstance(error, TimeoutError):  # what ran under the limit caught it, or ended in the same moment
            raise TimeoutError from error

    def raise_where_over(self) -> None:
        """Raise the error in the thread that is under this limit, where its time is over."""
        if time.monotonic() > self._end and _running.pop(self, self) is None:
            _set_error(self._thread, TimeoutError)
            self._is_raised = True


def _set_error(thread: int, error: type[BaseException] | None) -> None:
    """Have a thread raise an error at its next instruction; None takes back one that it has not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


def _start() -> None:
    """Start the thread that looks at limits, unless it runs: a forked process has none."""
    global _watch
    if _watch is None or not _watch.is_alive():
        _watch = threading.Thread(target=_look_at_limits, name="whence-time-limits", daemon=True)
        _watch.start()


def _look_at_limits() -> None:
    never = threading.Event()
    while not never.wait(PERIOD):  # a test may put another function in the place of `time.sleep`
        for limit in _running.copy():
            limit.raise_where_over()
