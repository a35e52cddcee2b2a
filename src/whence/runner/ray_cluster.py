"""A connection to a cluster of Ray, and workers on it that have nothing to do.

They end with the last job of one `map`, unless the caller asks for more of them (`workers_kept`): starting one takes
seconds.
"""

import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from whence.errors import SettingError
from whence.runner.engines import Engine

REACHED = 5.0
"""Seconds in which a cluster answers."""
STORE_BYTES = 2**28
"""Ray's memory for what workers exchange, on this machine: results are small."""
UNASKED = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Ray would report its use to its makers; and warn of a setting to come."""


UNKNOWN = -1
"""Process of a worker that is there, whatever its process is by now."""


@dataclass
class Hand:
    """A worker as the driver knows it."""

    actor: Any
    process: int = 0
    job: int | None = None
    since: float = 0.0
    asked: Any = None
    """A question how far it is, that has no answer yet."""
    is_dismissed: bool = False

    def end(self) -> None:
        """End the process, whatever it is doing."""
        with contextlib.suppress(Exception):  # it, or the cluster, is gone already
            ray.kill(self.actor)


@dataclass(frozen=True)
class Kind:
    """How many workers there are, and what each has to itself."""

    workers: int
    cores: int
    gpus: int | float

    @property
    def share(self) -> tuple[int, int | float]:
        """What each has to itself."""
        return self.cores, self.gpus

    @staticmethod
    def of(engine: Engine, jobs: int) -> "Kind":
        """As the engine says, or as suits the cluster; never more than there are jobs."""
        machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
        most = max((machine.get("GPU", 0) for machine in machines), default=0)
        gpus = engine.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if most else 0.0
        if gpus > most:
            raise SettingError(
                f"--gpus-per-worker {gpus:g}: a machine of the cluster has {most:g} at most. Lower it, or let machines "
                "with GPUs join"
            )
        of_gpus = sum(int(machine.get("GPU", 0) // gpus) for machine in machines) if gpus else 0
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        fitting = engine.workers or of_gpus or max(1, sum(cores))
        # whatever the number of jobs: a job that is left over must be done as all others were, to the last bit
        share = max(1, max(cores, default=1) // fitting) if len(machines) == 1 else 1
        return Kind(max(1, min(fitting, jobs)), min(torch.get_num_threads(), share), gpus)


@dataclass
class Kept:
    """A connection to a cluster, and workers on it that have nothing to do."""

    connection: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    engine: Engine | None = None
    """The one that the connection is of; None before the first job."""
    idle: dict[tuple[int, int | float], list[Hand]] = field(default_factory=dict)
    """By the cores and GPUs that each has to itself."""

    def join(self, engine: Engine) -> None:
        """Connect to an engine's cluster, unless it is the one at hand and has room for its workers."""
        if self.engine is not None and self.engine.address == engine.address and ray.is_initialized():
            has_room = (engine.workers or 1) <= ray.cluster_resources().get("CPU", 0)
            if engine.address or os.environ.get("RAY_ADDRESS") or has_room:
                return
        self.end()
        self.connection.enter_context(cluster(engine))
        self.engine = engine

    def taken(self, share: tuple[int, int | float], count: int) -> list[Hand]:
        """Idle workers that have this to themselves, at most so many; those that have something else make room."""
        for other in [*self.idle]:
            if other != share:
                for hand in self.idle.pop(other):
                    hand.end()
        idle = self.idle.setdefault(share, [])
        taken = [idle.pop() for _ in range(min(count, len(idle)))]
        for hand in taken:
            hand.process = UNKNOWN  # Ray may have started it again meanwhile
        return taken

    def end(self) -> None:
        """End the workers and the connection."""
        for hand in itertools.chain.from_iterable(self.idle.values()):
            hand.end()
        self.idle, self.engine = {}, None
        self.connection.close()


_scope: ContextVar[Kept | None] = ContextVar("_scope", default=None)


@contextlib.contextmanager
def workers_of(engine: Engine) -> Iterator[Kept]:
    """An engine's idle workers, with a connection to its cluster."""
    scope = _scope.get()
    kept = scope or Kept()
    try:
        kept.join(engine)
        yield kept
    finally:
        if scope is None:
            kept.end()


@contextlib.contextmanager
def workers_kept() -> Iterator[None]:
    """See `runner.workers_kept`."""
    if _scope.get() is not None:
        yield
        return
    kept = Kept()
    token = _scope.set(kept)
    try:
        yield
    finally:
        try:
            kept.end()
        finally:
            _scope.reset(token)


@contextlib.contextmanager
def cluster(engine: Engine) -> Iterator[None]:
    """A connection to the cluster that is asked for, or to workers of this machine that end with it."""
    if ray.is_initialized():  # by the caller, as in a job of `ray job submit`
        yield
        return
    for name, value in UNASKED.items():
        os.environ.setdefault(name, value)
    address = engine.address or os.environ.get("RAY_ADDRESS")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "whence"}
    if address is None:
        cores = max(_cores(), engine.workers or 1)
        quiet |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        _reach(address)
        ray.init(address=address or "local", **quiet)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        where = f"--address {address}" if engine.address else f"RAY_ADDRESS {address}" if address else "--engine ray"
        mend = "Start it with: ray start --head; or leave the address out for workers of this machine"
        if "Authentication" in str(error):
            mend = "It asks for its token: export RAY_AUTH_MODE=token, and let ~/.ray/auth_token be that of the head"
        raise SettingError(f"{where}: Ray cannot be reached or started ({last_line(error)}). {mend}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str | None) -> None:
    """Raise an OSError where nobody listens at an address HOST:PORT: Ray would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=REACHED).close()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def last_line(error: BaseException) -> str:
    """Of an error's message, which may be a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
