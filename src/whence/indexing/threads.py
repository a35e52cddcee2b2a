"""Run a function in several threads at once: in torch's own threads where they can be used, else in new ones.

torch's CPU builds for Linux bring GNU's OpenMP library, whose workers stay awake for some milliseconds after a product
and wait for the next. New threads would then wait for a core on which such a worker spins: on two cores a scan of 11 ms
took 13 to 17 ms after other work, and starting the threads takes 0.3 ms in any case.
`GOMP_parallel` is the call that GCC compiles a plain `#pragma omp parallel` to, with a stable interface; called from
here it wakes the very workers of torch's products in this thread. Elsewhere (macOS, Windows, other builds), and in a
child that was forked after this module was imported and has no workers, threads are started for the call.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import get_ident

import torch

_PROCESS = os.getpid()

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_together(work: Callable[[], None], tasks: int) -> None:
    """Call `work` in as many threads at once as torch uses, one of them the caller's, and wait for all.

    There may be fewer threads (OMP_THREAD_LIMIT, a thread that is done before another starts), or more than tasks, so
    `work` must take its tasks one by one from a shared source. An exception in any thread is raised here.

    Args:
        work: Holds Python's lock except where it releases it.
        tasks: Number of tasks to share; a single one is not worth other threads.
    """
    threads = torch.get_num_threads()
    if min(threads, tasks) <= 1:
        work()
    elif (parallel := _gomp_parallel()) is not None and os.getpid() == _PROCESS:
        # always all of torch's: a smaller number would end the other workers, and the next product start them again
        # (https://github.com/pytorch/pytorch/issues/32008)
        _in_torch_threads(parallel, work, threads)
    else:
        _in_new_threads(work, min(threads, tasks))


def _in_torch_threads(parallel: Callable[..., None], work: Callable[[], None], threads: int) -> None:
    errors: dict[int, BaseException | None] = {}
    """The exception of each thread, by its id; None where it raised none."""

    def region(_: int | None) -> None:
        try:
            work()
            errors[get_ident()] = None
        except BaseException as error:  # any error, and Ctrl-C: C passes nothing on, ctypes would drop it
            errors[get_ident()] = error

    parallel(_Region(region), None, threads, 0)
    for error in filter(None, errors.values()):
        raise error
    if get_ident() not in errors:  # a signal's handler raised within `region`, where nothing catches it
        raise KeyboardInterrupt


def _in_new_threads(work: Callable[[], None], threads: int) -> None:
    with ThreadPoolExecutor(threads - 1) as pool:
        futures = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for future in futures:
            future.result()


@cache
def _gomp_parallel() -> Callable[..., None] | None:
    """`GOMP_parallel` of the OpenMP library that torch brings and uses; None where it uses another."""
    home = Path(torch.__file__).parent
    libraries = [*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]
    if len(libraries) != 1 or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        parallel = ctypes.CDLL(str(libraries[0])).GOMP_parallel
        reached = ctypes.CDLL(None).GOMP_parallel  # what torch's own calls reach: another if it was loaded before
    except (OSError, AttributeError):
        return None
    if ctypes.cast(parallel, ctypes.c_void_p).value != ctypes.cast(reached, ctypes.c_void_p).value:
        return None
    parallel.argtypes, parallel.restype = (_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel
