"""Run idempotent jobs, with retries and a progress bar. Jobs run in this process; callers do not depend on an engine.

A job is a value; `work(job, tick)` does it and returns a result, calling `tick(examples, tokens)` as it makes progress.
Doing a job twice must do no harm, so that a failed one is simply done again. Results come back as they are finished.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from whence.errors import JobError, SettingError

logger = logging.getLogger(__name__)

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")
Tick = Callable[[int, int], None]
"""Called with the examples and tokens done since the last call."""
ENGINES = ("local",)


def map(
    work: Callable[[JobT, Tick], ResultT],
    jobs: Iterable[JobT],
    *,
    engine: str = "local",
    retries: int = 2,
    on_tick: Tick | None = None,
    less_memory: str = "give it more memory",
) -> Iterator[tuple[JobT, ResultT]]:
    """Do every job and yield it with its result as soon as it is finished.

    Args:
        work: Called with a job and a function to report progress to.
        jobs: Idempotent jobs, in the order in which to do them.
        engine: Where jobs run: "local" is this process, one job after another.
        retries: Further tries after an operating system's or a device's error. Whence's own errors are final.
        on_tick: Called with the progress; a failed try takes back what it had reported.
        less_memory: Advice for the message if memory runs out, which another try would not change.

    Raises:
        JobError: A job failed at every try.
        SettingError: No such engine.
    """
    check_engine(engine)
    for job in jobs:
        try:
            result = _with_retries(work, job, retries, on_tick or (lambda examples, tokens: None))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise JobError(f"{job}: out of memory ({_first_line(error)}). To mend it: {less_memory}.") from error
        yield job, result


def check_engine(name: str) -> None:
    """Refuse an unknown engine before any work is done."""
    if name not in ENGINES:
        raise SettingError(f"--engine {name}: this version has {', '.join(ENGINES)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, for which torch has its own error, or this machine's, for which there are two.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("device"))
    (True, False)
    """
    is_torch_on_a_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return is_torch_on_a_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _with_retries(work: Callable[[JobT, Tick], ResultT], job: JobT, retries: int, on_tick: Tick) -> ResultT:
    for attempt in range(retries + 1):
        done = [0, 0]

        def tick(examples: int, tokens: int, done: list[int] = done) -> None:
            done[0] += examples
            done[1] += tokens
            on_tick(examples, tokens)

        try:
            return work(job, tick)
        except (OSError, RuntimeError, MemoryError) as error:
            on_tick(-done[0], -done[1])
            if is_out_of_memory(error):
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                raise
            reason = _first_line(error)
            if attempt == retries:
                raise JobError(
                    f"{job} failed {retries + 1} times, the last time with: {reason}. What was finished is kept; "
                    "the same command goes on from there."
                ) from error
            logger.warning("%s failed (%s); trying again", job, reason)
            time.sleep(2**attempt / 4)
    raise AssertionError("not reached")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class _Rate(ProgressColumn):
    """Examples and tokens per second since the bar began."""

    def render(self, task: Task) -> Text:
        elapsed, done = task.elapsed or 0, task.completed - task.fields["before"]
        if elapsed < 0.5 or done <= 0:
            return Text("")
        return Text(f"{done / elapsed:,.1f} examples/s · {task.fields['tokens'] / elapsed:,.0f} tokens/s")


@contextlib.contextmanager
def progress(label: str, total: int, *, done: int = 0, shown: bool = True) -> Iterator[Tick]:
    """A bar on stderr with examples/s, tokens/s and the time left, or one line per minute if stderr is no terminal.

    Args:
        label: What is being done.
        total: Examples in all.
        done: Examples done before this run; they do not count in the rates.
        shown: Whether to show a bar at all.
    """
    console = Console(stderr=True)
    if not shown:
        yield lambda examples, tokens: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        )
        with Progress(*columns, _Rate(), TimeRemainingColumn(compact=True), console=console) as bar:
            task = bar.add_task(label, total=total, completed=done, tokens=0, before=done)
            yield lambda examples, tokens: bar.update(
                task, advance=examples, tokens=bar.tasks[task].fields["tokens"] + tokens
            )
    else:
        yield _line_a_minute(label, total, done)


def _line_a_minute(label: str, total: int, done: int) -> Tick:
    start = last = time.monotonic()
    count, tokens_done = done, 0

    def tick(examples: int, tokens: int) -> None:
        nonlocal count, tokens_done, last
        count, tokens_done = count + examples, tokens_done + tokens
        now = time.monotonic()
        if now - last < 60 and count < total:
            return
        last, rate = now, (count - done) / max(now - start, 1e-9)
        seconds_left = (total - count) / rate if rate > 0 else 0
        sys.stderr.write(
            f"{label}: {count:,}/{total:,}, {rate:,.1f} examples/s, "
            f"{tokens_done / max(now - start, 1e-9):,.0f} tokens/s, {seconds_left:,.0f} s left\n"
        )

    return tick
