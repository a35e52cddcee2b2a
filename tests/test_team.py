"""Work is shared by threads, those of torch where they can be had; what one raises is raised."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from whence import team

WAYS = [
    pytest.param(
        "torch", marks=pytest.mark.skipif(team._torch_threads() is None, reason="this torch has no GNU OpenMP library")
    ),
    "new",
]


@pytest.fixture
def way(request, monkeypatch):
    """Which threads are used."""
    if request.param == "new":
        monkeypatch.setattr(team, "_torch_threads", lambda: None)
    return request.param


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_run_at_once_and_share_what_they_take(way, threads):
    together, seen, waiting = threading.Barrier(threads), [], iter(range(1000))

    def work():
        together.wait(timeout=30)
        seen.extend((number, threading.get_native_id()) for number in waiting)
        together.wait(timeout=30)

    team.run_together(work, threads)
    assert sorted(number for number, _ in seen) == list(range(1000))
    assert len({thread for _, thread in seen} | {threading.get_native_id()}) <= threads


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("is_caller", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_one_thread_raises_is_raised(way, is_caller, error, capfd):
    together, caller = threading.Barrier(2), threading.get_native_id()

    def work():
        together.wait(timeout=30)
        if (threading.get_native_id() == caller) == is_caller:
            raise error("of one thread")

    with pytest.raises(error, match="of one thread"):
        team.run_together(work, 2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("way", WAYS[:1], indirect=True)
def test_the_threads_are_those_of_torch(way, monkeypatch):
    together, seen = threading.Barrier(2), []

    def work():
        together.wait(timeout=30)
        seen.append(threading.get_native_id())

    def tasks():
        return {int(task.name) for task in Path("/proc/self/task").iterdir()}

    used = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(1 << 20).sum()
        before = tasks()
        team.run_together(work, 2)
    finally:
        torch.set_num_threads(used)
    assert len(set(seen)) == 2
    assert set(seen) <= before


def test_a_forked_child_starts_its_own_threads():
    code = """
import os, threading, torch
from whence.team import run_together
torch.set_num_threads(2)
torch.randn(1 << 20).sum()
def count(threads):
    together, seen = threading.Barrier(threads), []
    run_together(lambda: (together.wait(30), seen.append(1)), threads)
    return len(seen)
assert count(2) == 2
if (child := os.fork()) == 0:
    os._exit(0 if count(2) == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
