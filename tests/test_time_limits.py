"""A limit of time: raised in the thread whose time is over, there alone, and never after its work."""

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
    assert endings <= {"over", "done"} and not time_limits._deadlines


def test_short_works_share_one_thread():
    outcome(0.0)
    before = threading.active_count()
    for _ in range(100):
        with time_limit(10.0):
            pass
    assert threading.active_count() == before and not time_limits._deadlines
    with pytest.raises(KeyError), time_limit(10.0):
        raise KeyError
    assert not time_limits._deadlines
