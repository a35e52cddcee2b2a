"""Work is shared by threads; what one raises is raised."""

import subprocess
import sys
import threading

import pytest
import torch

from whence.indexing.threads import run_together


@pytest.fixture
def threads(request):
    """So many are torch's."""
    used = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(used)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_threads_run_at_once_and_share_what_they_take(threads):
    together, ids, taken, waiting = threading.Barrier(threads), set(), [], iter(range(1000))

    def work():
        together.wait(timeout=30)
        ids.add(threading.get_native_id())
        taken.extend(waiting)
        together.wait(timeout=30)

    run_together(work, 1000)
    assert sorted(taken) == list(range(1000))
    assert len(ids) == threads
    assert threading.get_native_id() in ids


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("tasks", [0, 1])
def test_one_task_stays_in_the_callers_thread(threads, tasks):
    ids = []
    run_together(lambda: ids.append(threading.get_native_id()), tasks)
    assert ids == [threading.get_native_id()]


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("is_caller", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_one_thread_raises_is_raised(threads, is_caller, error, capfd):
    together, caller = threading.Barrier(threads), threading.get_native_id()

    def work():
        together.wait(timeout=30)
        if (threading.get_native_id() == caller) == is_caller:
            raise error("of one thread")

    with pytest.raises(error, match="of one thread"):
        run_together(work, 2)
    assert capfd.readouterr() == ("", "")


IN_A_NEW_PROCESS = """
import os, threading, torch
from whence.indexing.threads import run_together
torch.set_num_threads(4)
torch.randn(1 << 20).sum()
def ids(tasks, threads):
    together, seen = threading.Barrier(threads), set()
    run_together(lambda: (together.wait(30), seen.add(threading.get_native_id())), tasks)
    return seen
"""


def run(code):
    subprocess.run([sys.executable, "-W", "ignore", "-c", IN_A_NEW_PROCESS + code], check=True, timeout=120)


def test_a_forked_child_starts_its_own_threads():
    run("""
assert len(ids(100, 4)) == 4
if (child := os.fork()) == 0:
    os._exit(0 if len(ids(100, 4)) == 4 else 1)
assert os.waitpid(child, 0)[1] == 0
""")
