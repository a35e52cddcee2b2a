"""Workers of Ray for the tests of a module: they are started once, and have one thread, as this process then has."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from whence.runner import workers_kept


@contextmanager
def one_thread_and_workers(engine, folder=None):
    """Threads change the order of sums. Of a folder, workers can import the files, and those beside this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            paths = str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        with workers_kept(engine):
            yield
    torch.set_num_threads(threads)
