"""Run a function in several threads at once: in those that torch itself computes with, where they can be had.

torch's CPU builds for Linux bring GNU's OpenMP library, whose workers stay awake for some milliseconds after a
product and wait for the next. Threads of our own would then wait for a core that such a worker keeps busy with
waiting: on two cores a scan of 10 ms took 13 to 17 after other work, and 0.3 ms to start its threads in any case.
`GOMP_parallel` is the one call that GCC compiles `#pragma omp parallel` to, with a stable interface; called from
here it wakes the very workers of torch's products in this thread. Elsewhere (macOS, Windows, other builds), and in a
forked child, which has no workers, threads are started for the call.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

_PROCESS = os.getpid()

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_together(work: Callable[[], None], threads: int) -> None:
    """Call `work` in as many threads at once, one of them the caller's, and wait for all.

    OpenMP may give fewer (OMP_THREAD_LIMIT): work must be shared out as it is taken. What one raises is raised here.

    Args:
        work: Holds Python's lock but where it lets go of it.
        threads: At least one.
    """
    if threads == 1:
        work()
    elif (parallel := _torch_threads()) is not None and os.getpid() == _PROCESS:
        _in_torch_threads(parallel, work, threads)
    else:
        _in_new_threads(work, threads)


def _in_torch_threads(parallel: Callable[..., None], work: Callable[[], None], threads: int) -> None:
    raised: list[BaseException] = []

    def region(_: int | None) -> None:
        try:
            work()
        except BaseException as error:  # ctypes would print it and go on
            raised.append(error)

    parallel(_Region(region), None, threads, 0)
    if raised:
        raise raised[0]


def _in_new_threads(work: Callable[[], None], threads: int) -> None:
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


@cache
def _torch_threads() -> Callable[..., None] | None:
    """`GOMP_parallel` of the library that torch has loaded; None where it brings none, or was built without OpenMP."""
    home = Path(torch.__file__).parent
    found = [*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]
    if len(found) != 1 or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        parallel = ctypes.CDLL(str(found[0])).GOMP_parallel  # loaded already: the same library, not a second one
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = (_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel
