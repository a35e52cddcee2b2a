"""Jobs on workers of Ray: each is an actor that opens what the work holds once, and is then given jobs.

Ray starts workers, restarts those that are lost with the job that they had (`LOSSES` times), and carries results. What
is ours: one bar for all workers, which are asked how far they are; and stragglers. A job that runs for `SLOW` times
the median while a worker has nothing to do is given to it too, and the first result counts: jobs may be done twice.

Workers are processes of this user and import this Whence: what they are sent is pickled, and they send results alone.

Source: https://docs.ray.io/en/latest/ray-core/actors.html, and fault_tolerance/actors.html there.
"""

import contextlib
import logging
import os
import pickle  # of what this process sends to its own workers
import socket
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

import whence
from whence import errors
from whence.counts import number_of
from whence.errors import JobError, SettingError, WhenceError
from whence.runner.bars import Tick
from whence.runner.engines import Engine
from whence.runner.jobs import JobT, ResultT, Work, done

logger = logging.getLogger(__name__)

LOSSES = 5
"""Times that a job may lose its worker: what takes a worker down each time would do so for ever."""
PATIENCE = 60.0
"""Seconds without any worker after which that is said."""
LOOK = 0.5
"""Seconds between two looks at the workers."""
SLOW = 3.0
"""Times the median of finished jobs from which on a job is a straggler's."""
LEAST_SLOW = 5.0
"""Seconds of a job below which it is never one."""
REACHED = 5.0
"""Seconds in which a cluster answers."""
STORE_BYTES = 2**28
"""Ray's memory for what workers exchange, on this machine: results are small."""
UNASKED = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Ray would report its use to its makers; and warn of a setting to come."""


def map_on_ray(
    work: Work[JobT, ResultT], jobs: Sequence[JobT], engine: Engine, *, on_tick: Tick, retries: int, less_memory: str
) -> Iterator[tuple[JobT, ResultT]]:
    """`runner.map` on workers; results come in the order in which they are finished.

    Raises:
        JobError: A job failed at every try, or lost its worker too often; or a worker could not start.
        SettingError: The cluster is not there, has another Whence, or no worker fits on it.
    """
    if not jobs:
        return
    with _cluster(engine):
        crew = _Crew(_Kind.of(engine, len(jobs)), pickle.dumps(work), jobs, on_tick, retries, less_memory)
        try:
            yield from crew.results()
        finally:
            crew.dismiss()


@contextlib.contextmanager
def _cluster(engine: Engine) -> Iterator[None]:
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
        raise SettingError(f"{where}: Ray cannot be reached or started ({_line(error)}). {mend}") from error
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


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


@dataclass(frozen=True)
class _Kind:
    """How many workers there are, and what each has to itself."""

    workers: int
    cores: int
    gpus: int | float

    @staticmethod
    def of(engine: Engine, jobs: int) -> "_Kind":
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
        return _Kind(max(1, min(fitting, jobs)), min(torch.get_num_threads(), share), gpus)


@dataclass(frozen=True)
class _Outcome:
    """What became of a job."""

    result: Any
    done: tuple[int, int]
    """Examples and tokens, of the job alone."""
    refusal: tuple[str, str] | None = None
    """Name and message of an error that Whence raised on purpose."""
    warnings: tuple[str, ...] = ()


class _Worker:
    """A process that does jobs, and is asked meanwhile how far it is."""

    def __init__(self, retries: int, less_memory: str):
        self.retries, self.less_memory = retries, less_memory
        self.work: Any = None
        self.done = (0, 0)

    def hello(self) -> tuple[str, str, int]:
        """Version of Whence, host, process."""
        return whence.__version__, socket.gethostname(), os.getpid()

    def progress(self) -> tuple[int, int, int]:
        """Examples and tokens of the job at hand, and the process."""
        examples, tokens = self.done
        return examples, tokens, os.getpid()

    def do(self, job: Any, pickled: list[Any]) -> _Outcome:
        """Do a job by the work that a reference is of; an error that Whence raises on purpose is an outcome."""
        self.done, heard = (0, 0), _Heard()

        def tick(examples: int, tokens: int) -> None:
            self.done = self.done[0] + examples, self.done[1] + tokens

        logging.getLogger("whence").addHandler(heard)
        try:
            if self.work is None:
                self.work = pickle.loads(ray.get(pickled[0]))
            result = done(self.work, job, tick, retries=self.retries, less_memory=self.less_memory)
        except WhenceError as error:
            return _Outcome(None, self.done, (type(error).__name__, str(error)), tuple(heard.messages))
        finally:
            logging.getLogger("whence").removeHandler(heard)
        return _Outcome(result, self.done, warnings=tuple(heard.messages))


class _Heard(logging.Handler):
    """Warnings of a job."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@dataclass
class _Hand:
    """A worker as the driver knows it."""

    actor: Any
    process: int = 0
    job: int | None = None
    since: float = 0.0
    asked: Any = None
    """A question how far it is, that has no answer yet."""
    is_dismissed: bool = False


@dataclass
class _Crew:
    """Workers, and what each is doing."""

    kind: _Kind
    work: bytes
    jobs: Sequence[Any]
    on_tick: Tick
    retries: int
    less_memory: str
    begun: float = field(default_factory=time.monotonic)
    is_told: bool = False
    """Whether it was said that no worker has come."""
    todo: deque[int] = field(default_factory=deque)
    hands: list[_Hand] = field(default_factory=list)
    waiting: dict[Any, _Hand] = field(default_factory=dict)
    """By what they are to answer: a greeting, or the outcome of a job."""
    idle: list[_Hand] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)
    single: set[int] = field(default_factory=set)
    """Jobs of which a copy was refused: they are not given out twice again."""
    seconds: list[float] = field(default_factory=list)
    """Of finished jobs."""
    reported: dict[int, tuple[int, int]] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    pickled: list[Any] = field(default_factory=list)
    """A reference to `work`, which lives as long as the crew."""

    def results(self) -> Iterator[tuple[Any, Any]]:
        """Every job with its result."""
        self.todo.extend(range(len(self.jobs)))
        self._hire()
        while len(self.finished) < len(self.jobs):
            self._assign()
            ready, _ = ray.wait([*self.waiting], num_returns=1, timeout=LOOK)
            self._look()
            self._tell_of_waiting()
            for answer in ready:
                hand = self.waiting.pop(answer)
                if hand.is_dismissed:
                    continue
                if hand.job is None:
                    self._greet(hand, answer)
                elif (found := self._outcome(hand, answer)) is not None:
                    yield found

    def _tell_of_waiting(self) -> None:
        """Say that no worker has come for long: the cluster may have no room."""
        if self.is_told or self.finished or any(hand.process for hand in self.hands):
            return
        if time.monotonic() - self.begun > PATIENCE:
            self.is_told, free = True, ray.available_resources()
            logger.warning(
                "no worker has come in %.0f seconds: each takes %d cores and %g GPUs; the cluster has %g and %g free",
                *(PATIENCE, self.kind.cores, self.kind.gpus, free.get("CPU", 0), free.get("GPU", 0)),
            )

    def _hire(self) -> None:
        threads, hidden = str(self.kind.cores), {} if self.kind.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        hiring = ray.remote(_Worker).options(  # type: ignore[attr-defined]
            num_cpus=self.kind.cores,
            num_gpus=self.kind.gpus,
            max_concurrency=2,
            max_restarts=-1,
            max_task_retries=LOSSES,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, **UNASKED, **hidden}},
        )
        self.pickled = [ray.put(self.work)]  # within a list: it is fetched once by each worker, not with each job
        for _ in range(self.kind.workers):
            hand = _Hand(hiring.remote(self.retries, self.less_memory))
            self.hands.append(hand)
            self.waiting[hand.actor.hello.remote()] = hand

    def _greet(self, hand: _Hand, answer: Any) -> None:
        try:
            version, host, hand.process = ray.get(answer)
        except RayActorError as error:
            raise JobError(
                f"A worker of Ray could not start: {_line(error)}. Whence must be installed there"
            ) from error
        if version != whence.__version__:
            raise SettingError(
                f"{host} has Whence {version}, and this is {whence.__version__}. Install the same on every machine"
            )
        self.idle.append(hand)

    def _assign(self) -> None:
        while self.idle and (job := self._next()) is not None:
            hand = self.idle.pop()
            hand.job, hand.since = job, time.monotonic()
            self.waiting[hand.actor.do.remote(self.jobs[job], self.pickled)] = hand

    def _next(self) -> int | None:
        """The next job, or a straggler's."""
        if self.todo:
            return self.todo.popleft()
        if not self.seconds:
            return None
        now, slow = time.monotonic(), max(LEAST_SLOW, SLOW * statistics.median(self.seconds))
        busy = [hand for hand in self.hands if hand.job is not None and not hand.is_dismissed]
        alone = [hand for hand in busy if sum(hand.job == other.job for other in busy) == 1]
        late = [hand for hand in alone if now - hand.since > slow and hand.job not in self.single]
        if not late:
            return None
        oldest = min(late, key=lambda hand: hand.since)
        assert oldest.job is not None
        logger.warning(
            "%s has taken %.0f seconds, and others %.1f: another worker does it too, and the first result counts",
            *(self.jobs[oldest.job], now - oldest.since, statistics.median(self.seconds)),
        )
        return oldest.job

    def _look(self) -> None:
        """Ask the workers how far they are, and move the bar by what they answer."""
        for hand in self.hands:
            if hand.job is None or hand.is_dismissed:
                continue
            if hand.asked is None:
                hand.asked = hand.actor.progress.options(max_task_retries=0).remote()
            try:
                examples, tokens, process = ray.get(hand.asked, timeout=0)
            except GetTimeoutError:
                continue
            except (RayActorError, ActorUnavailableError):  # the outcome of its job will tell
                hand.asked = None
                continue
            hand.asked = None
            if process != hand.process:
                job = self.jobs[hand.job]
                logger.warning("a worker was lost (process %d); another one does %s again", hand.process, job)
                hand.process = process
            self._report(hand.job, (examples, tokens))

    def _report(self, job: int, now: tuple[int, int]) -> None:
        """Move the bar to where a job is; of two copies the last one that was heard counts."""
        before = self.reported.get(job, (0, 0))
        if now != before and job not in self.finished:
            self.reported[job] = now
            self.on_tick(now[0] - before[0], now[1] - before[1])

    def _outcome(self, hand: _Hand, answer: Any) -> tuple[Any, Any] | None:
        """A job with its result; None where a worker gives up what another one is still doing."""
        job = hand.job
        assert job is not None
        hand.job, hand.asked = None, None
        try:
            outcome: _Outcome = ray.get(answer)
        except RayActorError as error:
            raise JobError(
                f"{self.jobs[job]} lost its worker {number_of(LOSSES + 1, 'time')}, the last: {_line(error)}. "
                f"If memory is short, take fewer --workers, or {self.less_memory}. What was finished is kept; the "
                "same command goes on from there"
            ) from error
        self.idle.append(hand)
        for words in {*outcome.warnings} - self.said:
            logger.warning("%s", words)
        self.said.update(outcome.warnings)
        if outcome.refusal is not None:
            name, message = outcome.refusal
            if any(other.job == job and not other.is_dismissed for other in self.hands):
                self.single.add(job)
                logger.warning("%s: one of two workers that do it refuses: %s", self.jobs[job], message)
                return None
            raise getattr(errors, name, JobError)(message)
        self._report(job, outcome.done)
        self.finished.add(job)
        self.seconds.append(time.monotonic() - hand.since)
        self._dismiss_others(job)
        return self.jobs[job], outcome.result

    def _dismiss_others(self, job: int) -> None:
        """End workers that are still at a job which is done."""
        for hand in self.hands:
            if hand.job == job and not hand.is_dismissed:
                hand.is_dismissed = True
                ray.kill(hand.actor)

    def dismiss(self) -> None:
        """End all workers, whatever they are doing."""
        for hand in self.hands:
            with contextlib.suppress(Exception):  # it, or the cluster, is gone already
                ray.kill(hand.actor)
