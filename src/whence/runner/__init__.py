"""Run idempotent jobs, with retries and a progress bar, on an engine that callers do not depend on.

A job is a value; `work(job, tick)` does it and returns a result, calling `tick(examples, tokens)` as it makes progress.
Doing a job twice must do no harm, so that a failed one is simply done again. Results come back as they are finished.

    engines     where jobs run: this process, or workers of Ray
    jobs        `map`: every job once, with retries
    ray_engine  the same by actors of Ray; `ray_cluster`, `ray_worker`: where those are, and what each does
    keeping     `workers_kept`: the same workers for several maps
    bars        how far they are
"""

from whence.runner.bars import (
    ProgressOption,
    Tick,
    check_progress,
    counted,
    counting,
    progress,
    shown_as,
    unwatched,
    waiting,
)
from whence.runner.engines import ENGINES, LOCAL, Engine, EngineOption, check_engine
from whence.runner.jobs import is_out_of_memory, map, map_in_order
from whence.runner.keeping import workers_kept

__all__ = [
    "ENGINES",
    "LOCAL",
    "Engine",
    "EngineOption",
    "ProgressOption",
    "Tick",
    "check_engine",
    "check_progress",
    "counted",
    "counting",
    "is_out_of_memory",
    "map",
    "map_in_order",
    "progress",
    "shown_as",
    "unwatched",
    "waiting",
    "workers_kept",
]
