"""Run a function in several threads at once, as many as torch computes with.

Threads are started for each call. Those of torch's own OpenMP region would be awake already, but can be had by a
symbol of a library alone, and gained nothing on the last machine it was measured on (docs/results/indexing.md).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def run_together(work: Callable[[], None], tasks: int) -> None:
    """Call `work` in several threads at once, one of them the caller's, and wait for all.

    A thread may be done before another starts, so `work` must take its tasks one by one from a shared source. An
    exception in any thread is raised here.

    Args:
        work: Holds Python's lock except where it releases it.
        tasks: Number of tasks to share; a single one is not worth other threads.
    """
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        work()
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        futures = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for future in futures:
            future.result()
