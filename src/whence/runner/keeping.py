"""The same workers for several maps: starting one takes seconds, and each imports torch."""

import contextlib
from collections.abc import Iterator

from whence.runner.engines import LOCAL, EngineOption, check_engine


@contextlib.contextmanager
def workers_kept(engine: EngineOption) -> Iterator[None]:
    """Let workers stay between the maps of a `with` block, without what they held open; they end with the block.

    Args:
        engine: That of the maps; with the local one there is nothing to keep.
    """
    if check_engine(engine).name == LOCAL:
        yield
        return
    from whence.runner import ray_cluster  # an extra

    with ray_cluster.workers_kept():
        yield
