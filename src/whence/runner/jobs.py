"""Do every job, again where a machine failed it, and never where Whence itself refused."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from whence.counts import number_of
from whence.errors import JobError
from whence.runner.bars import Tick
from whence.runner.engines import LOCAL, EngineOption, check_engine

logger = logging.getLogger(__name__)

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")
Work = Callable[[JobT, Tick], ResultT]


def map(
    work: Work[JobT, ResultT],
    jobs: Iterable[JobT],
    *,
    engine: EngineOption = LOCAL,
    retries: int = 2,
    on_tick: Tick | None = None,
    less_memory: str = "give it more memory",
) -> Iterator[tuple[JobT, ResultT]]:
    """Do every job and yield it with its result as soon as it is finished.

    Args:
        work: Called with a job and a function to report progress to. For an engine of other processes it can be
            pickled: what it holds open, it opens there again.
        jobs: Idempotent jobs, in the order in which to do them.
        engine: Where jobs run: "local" is this process, one job after another, each when its result is asked for.
        retries: Further tries after an operating system's or a device's error. Whence's own errors are final.
        on_tick: Called with the progress; a failed try takes back what it had reported.
        less_memory: Advice for the message if memory runs out, which another try would not change.

    Raises:
        JobError: A job failed at every try.
        SettingError: No such engine, or it has not what is asked of it.
    """
    where, tick = check_engine(engine), on_tick or (lambda examples, tokens: None)
    if where.name == LOCAL:
        for job in jobs:
            yield job, done(work, job, tick, retries=retries, less_memory=less_memory)
        return
    from whence.runner.ray_engine import map_on_ray  # an extra

    yield from map_on_ray(work, list(jobs), where, on_tick=tick, retries=retries, less_memory=less_memory)


def map_in_order(work: Work[JobT, ResultT], jobs: Iterable[JobT], **how: Any) -> Iterator[tuple[JobT, ResultT]]:
    """As `map`, in the order of the jobs: a result that comes early is held back until those before it have come.

    Args:
        work: See `map`.
        jobs: See `map`.
        how: Its other arguments.
    """
    ordered = list(jobs)
    places, early, due = dict[int, list[int]](), dict[int, ResultT](), 0
    for place, job in enumerate(ordered):
        places.setdefault(id(job), []).append(place)
    for job, result in map(work, ordered, **how):
        early[places[id(job)].pop()] = result
        while due in early:
            yield ordered[due], early.pop(due)
            due += 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, for which torch has its own error, or this machine's, for which there are two.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("device"))
    (True, False)
    """
    import torch  # which the command line waits for only where it is needed

    is_torch_on_a_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return is_torch_on_a_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def done(work: Work[JobT, ResultT], job: JobT, on_tick: Tick, *, retries: int, less_memory: str) -> ResultT:
    """The result of a job in this process.

    Raises:
        JobError: It failed at every try, or memory ran out.
    """
    try:
        return _with_retries(work, job, retries, on_tick)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise JobError(f"{job}: out of memory ({_first_line(error)}). To mend it: {less_memory}.") from error


def _with_retries(work: Work[JobT, ResultT], job: JobT, retries: int, on_tick: Tick) -> ResultT:
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
                _empty_cache()
                raise
            reason = _first_line(error)
            if attempt == retries:
                raise JobError(
                    f"{job} failed {number_of(retries + 1, 'time')}, the last time with: {reason}. What was "
                    "finished is kept; the same command goes on from there."
                ) from error
            logger.warning("%s failed (%s); trying again", job, reason)
            time.sleep(2**attempt / 4)
    raise AssertionError("not reached")


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
