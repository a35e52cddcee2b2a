"""A limit of time: raised in the thread whose time is over, there alone, and never after its work."""

import contextlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from whence import time_limits
from whence.time_limits import PERIOD, time_limit


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def outcome(seconds):
    try:
        with time_limit(PERIOD):
            spin(seconds)
    except TimeoutError:
        return "over"
    spin(0.002)  # an error that came late would be raised here
    return "done"


def test_it_is_raised_in_the_thread_whose_time_is_over():
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(outcome, (60.0, 0.0, 60.0, 0.01))) == ["over", "done", "over", "done"]


def test_work_that_ends_as_its_time_does_has_one_of_both_endings():
    endings = {outcome(PERIOD * (1 + share / 10)) for share in range(0, 11, 2)}
    assert endings <= {"over", "done"} and not time_limits._running


RACES = """
import time
from whence import time_limits
time_limits.PERIOD = 0.0005
endings, end = [], time.monotonic() + 2
while time.monotonic() < end:
    try:
        with time_limits.time_limit(0.001 * (len(endings) % 7) / 7):
            done = time.monotonic() + 0.001 * (len(endings) % 11) / 11
            while time.monotonic() < done:
                pass
    except TimeoutError:
        endings.append("over")
    else:
        endings.append("done")
    assert not time_limits._running
print(*sorted(set(endings)))
"""


def test_works_that_end_as_the_watch_looks_leave_nothing_behind():
    """An error between two instructions of `with` itself once left a limit that waited for ever.

    In a process of its own: the checks of types that tests run with are code between those instructions as well.
    """
    done = subprocess.run([sys.executable, "-c", RACES], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("done over\n", "")


def test_work_that_catches_the_error_is_over_too():
    with pytest.raises(TimeoutError), time_limit(PERIOD), contextlib.suppress(OSError):
        spin(60.0)


def test_short_works_share_one_thread():
    outcome(0.0)
    before = threading.active_count()
    for _ in range(100):
        with time_limit(10.0):
            pass
    assert threading.active_count() == before and not time_limits._running
    with pytest.raises(KeyError), time_limit(10.0):
        raise KeyError
    assert not time_limits._running
