"""Jobs are done in order, again where a machine failed them, and never where Whence itself refused."""

import itertools
import logging
import re
from functools import partial

import pytest
import torch

from whence import runner
from whence.corpus.tokens import Encoded
from whence.errors import CorpusError, JobError, SettingError
from whence.gradients.forward_passes import batches
from whence.runner import bars, jobs


@pytest.fixture
def pauses(monkeypatch):
    slept = []
    monkeypatch.setattr(jobs.time, "sleep", slept.append)
    return slept


def failing(times, error):
    """Work that raises `error` so often, after reporting progress, and then returns its job doubled."""
    calls = []

    def work(job, tick):
        calls.append(job)
        tick(2, 10)
        if len(calls) <= times:
            raise error
        tick(1, 5)
        return job * 2

    return work, calls


def test_results_come_in_the_order_of_the_jobs():
    assert list(runner.map(lambda job, tick: job**2, [3, 1, 2])) == [(3, 9), (1, 1), (2, 4)]


def test_a_job_begins_only_when_its_result_is_asked_for():
    begun = []
    results = runner.map(lambda job, tick: begun.append(job), iter([1, 2]))
    assert begun == []
    next(results)
    assert begun == [1]


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("device"), ConnectionError("net")])
def test_a_failed_job_is_done_again(error, pauses, caplog):
    work, calls = failing(2, error)
    with caplog.at_level(logging.WARNING):
        assert list(runner.map(work, [4])) == [(4, 8)]
    assert calls == [4, 4, 4]
    assert pauses == [0.25, 0.5]
    assert str(error) in caplog.text


def test_a_job_that_always_fails_is_named(pauses):
    work, calls = failing(9, OSError("no space left\nmore words"))
    done = []
    with pytest.raises(JobError, match=r"^shard 7 failed 3 times, the last time with: no space left\. ") as caught:
        done.extend(runner.map(work, ["shard 7", "shard 8"]))
    assert isinstance(caught.value.__cause__, OSError)
    assert (calls, done, caught.value.exit_code) == (["shard 7"] * 3, [], 1)


def test_memory_that_runs_out_is_told_at_once(pauses, monkeypatch):
    work, calls = failing(9, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words"))
    emptied, ticks = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    told = r"^shard 7: out of memory \(CUDA out .* GiB\.\)\. To mend it: lower --batch-tokens \(now 9\)\.$"
    with pytest.raises(JobError, match=told):
        list(runner.map(work, ["shard 7"], on_tick=lambda *done: ticks.append(done),
                        less_memory="lower --batch-tokens (now 9)"))  # fmt: skip
    assert (calls, pauses, emptied, ticks) == (["shard 7"], [], [True], [(2, 10), (-2, -10)])


@pytest.mark.parametrize("fill", [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: bytearray(1 << 60)])
def test_memory_of_this_machine_that_runs_out_is_told_at_once(fill, pauses):
    def work(job, tick):
        tick(2, 10)
        fill()

    ticks = []
    told = r"^shard 7: out of memory \(.+\)\. To mend it: lower --batch-tokens\.$"
    with pytest.raises(JobError, match=told):
        list(runner.map(work, ["shard 7"], on_tick=lambda *done: ticks.append(done),
                        less_memory="lower --batch-tokens"))  # fmt: skip
    assert (pauses, ticks) == ([], [(2, 10), (-2, -10)])


def test_results_before_a_failure_are_kept(pauses):
    def work(job, tick):
        if job == 2:
            raise OSError
        return job

    done = []
    with pytest.raises(JobError, match="OSError"):
        done.extend(runner.map(work, [1, 2], retries=0))
    assert done == [(1, 1)]
    assert pauses == []


@pytest.mark.parametrize("error", [CorpusError("a bad row"), ValueError("a bug"), KeyboardInterrupt()])
def test_what_would_fail_again_is_not_retried(error, pauses):
    work, calls = failing(1, error)
    with pytest.raises(type(error)):
        list(runner.map(work, [1]))
    assert (calls, pauses) == ([1], [])


def test_a_failed_try_takes_back_its_ticks(pauses):
    work, _ = failing(2, OSError("x"))
    ticks = []
    list(runner.map(work, [4], on_tick=lambda examples, tokens: ticks.append((examples, tokens))))
    assert ticks == [(2, 10), (-2, -10), (2, 10), (-2, -10), (2, 10), (1, 5)]


def test_unknown_engine_is_refused_before_any_work():
    begun = []
    with pytest.raises(SettingError, match="--engine slurm: one of local, ray is expected"):
        list(runner.map(lambda job, tick: begun.append(job), [1], engine="slurm"))
    with pytest.raises(SettingError, match="local"):
        runner.check_engine("slurm")
    assert begun == []


def test_no_bar_writes_nothing(capsys):
    with runner.progress("rows", 2, shown=False) as tick:
        tick(2, 10)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_the_end_is_one_line_on_stderr(capsys):
    with runner.progress("rows", 30, done=10) as tick:
        tick(15, 700)
        tick(-5, -100)
        tick(10, 400)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("rows: 30/30, ")
    assert "examples/s" in err
    assert "tokens/s" in err


def test_a_function_is_called_at_both_ends_and_ten_times_a_second_between(monkeypatch, capsys):
    calls, now = [], itertools.count(0.0, 0.03)
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(now))
    with runner.progress("Indexing", 20, done=4, shown=lambda *call: calls.append(call)) as tick:
        for _ in range(16):
            tick(1, 9)
    assert calls == [(done, 20, "Indexing") for done in (4, 8, 12, 16, 20)]
    with runner.shown_as(lambda *call: calls.append(call), "Tracing"):
        assert list(runner.counted([1, 2], "Ranking", 3, int)) == [1, 2]
    assert calls[-2:] == [(0, 3, "Ranking"), (3, 3, "Ranking")]
    with runner.shown_as(False, "Tracing"):
        assert list(runner.counted([1, 2], "Ranking", 3, int)) == [1, 2]
    assert calls[-1] == (3, 3, "Ranking") and capsys.readouterr() == ("", "")


def test_rows_without_tokens_count_in_a_forward_pass():
    rows, calls = [Encoded([5] * length, [True] * length) for length in (0, 3, 1, 0, 2, 0)], []
    with runner.shown_as(lambda *call: calls.append(call), "Scoring"):
        assert sum(len(numbers) for numbers, _ in batches(rows, 3, len(rows))) == 3
    assert calls[0] == (0, 6, "Reading the corpus") and calls[-1] == (6, 6, "Reading the corpus")


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(bars, "Console", lambda stderr: _Terminal(stderr=stderr))
    with runner.progress("rows", 4) as tick:
        tick(4, 20)
    out, err = capsys.readouterr()
    assert out == ""
    assert "4/4" in err


def test_things_are_called_what_they_are_and_tokens_only_where_they_are_counted(capsys):
    with runner.progress("Reading mixtures", 3, unit="mixtures") as tick:
        tick(3, 0)
    err = capsys.readouterr().err
    assert "mixtures/s" in err and "tokens" not in err and "examples" not in err


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_is_one_line_of_the_terminal(monkeypatch, capsys, width):
    monkeypatch.setattr(bars, "Console", lambda stderr: _Terminal(stderr=stderr, width=width))
    clock = itertools.count(step=0.7)
    monkeypatch.setattr(bars, "Progress", partial(bars.Progress, get_time=lambda: next(clock)))
    with runner.progress("Training a model on each source", 2_000_000, unit="examples") as tick:
        tick(1_234_567, 987_654_321)
    lines = re.split(r"[\r\n]+|\x1b\[[0-9;?]*[A-Za-z]", capsys.readouterr().err)
    whole = "".join(re.split(r"\x1b\[[0-9;?]*[A-Za-z]", "".join(lines)))
    assert "examples/s" in whole and ("tokens/s" in whole) == (width == 120)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "\n".join(lines))
    assert max(map(len, plain.splitlines())) <= width


def test_what_is_counted_shows_a_bar_where_a_command_waits_long(monkeypatch, capsys):
    monkeypatch.setattr(bars, "Console", lambda stderr: _Terminal(stderr=stderr, width=80))
    monkeypatch.setattr(bars, "PATIENCE", 0.0)
    assert list(runner.counted([1, 2, 3], "Scanning", 3, lambda each: 1)) == [1, 2, 3]
    assert capsys.readouterr() == ("", ""), "a library call shows nothing"
    with runner.waiting("Tracing"):
        assert list(runner.counted([1, 2, 3], "Scanning", 3, lambda each: 1, "shards")) == [1, 2, 3]
    assert "Scanning" in (err := capsys.readouterr().err) and "/3" in err
    monkeypatch.undo()
    with runner.waiting("Tracing"):
        assert list(runner.counted([1, 2], "Scanning", 2, lambda each: 1)) == [1, 2]
    assert capsys.readouterr() == ("", ""), "nothing of a short wait goes into a pipe"


class _Terminal(bars.Console):
    def __init__(self, *, stderr, width=100):
        super().__init__(stderr=stderr, force_terminal=True, width=width)
