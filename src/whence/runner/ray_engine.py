"""Jobs on workers of Ray: each is an actor that opens what the work holds once, and is then given jobs.

Ray starts workers, restarts those that are lost with the job that they had (`LOSSES` times), and carries results. What
is ours: one bar for all workers, which are asked how far they are; and stragglers. A job that runs for `SLOW` times
the median while a worker has nothing to do is given to it too, and the first result counts: jobs may be done twice.

Source: https://docs.ray.io/en/latest/ray-core/actors.html, and fault_tolerance/actors.html there.
"""

import logging
import pickle  # of what this process sends to its own workers
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

import whence
from whence import errors
from whence.counts import number_of
from whence.errors import JobError, SettingError
from whence.runner.bars import Tick
from whence.runner.engines import Engine
from whence.runner.jobs import JobT, ResultT, Work
from whence.runner.ray_cluster import REACHED, UNASKED, UNKNOWN, Hand, Kept, Kind, last_line, workers_of
from whence.runner.ray_worker import How, Outcome, Worker

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
    with workers_of(engine) as kept:
        kind, how = Kind.of(engine, len(jobs)), How(retries, less_memory, str(Path.cwd()))
        crew = _Crew(kind, kept, pickle.dumps(work), jobs, on_tick, how)
        try:
            yield from crew.results()
        finally:
            crew.dismiss()


@dataclass
class _Crew:
    """Workers, and what each is doing."""

    kind: Kind
    kept: Kept
    work: bytes
    jobs: Sequence[Any]
    on_tick: Tick
    how: How
    begun: float = field(default_factory=time.monotonic)
    is_told: bool = False
    """Whether it was said that no worker has come."""
    todo: deque[int] = field(default_factory=deque)
    hands: list[Hand] = field(default_factory=list)
    waiting: dict[Any, Hand] = field(default_factory=dict)
    """By what they are to answer: a greeting, or the outcome of a job."""
    idle: list[Hand] = field(default_factory=list)
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
        hiring = ray.remote(Worker).options(  # type: ignore[attr-defined]
            num_cpus=self.kind.cores,
            num_gpus=self.kind.gpus,
            max_concurrency=2,
            max_restarts=-1,
            max_task_retries=LOSSES,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, **UNASKED, **hidden}},
        )
        self.pickled = [ray.put(self.work)]  # within a list: it is fetched once by each worker, not with each job
        self.hands = self.kept.taken(self.kind.share, self.kind.workers)
        self.idle = [*self.hands]
        for _ in range(self.kind.workers - len(self.hands)):
            hand = Hand(hiring.remote())
            self.hands.append(hand)
            self.waiting[hand.actor.hello.remote()] = hand

    def _greet(self, hand: Hand, answer: Any) -> None:
        try:
            version, host, hand.process = ray.get(answer)
        except RayActorError as error:
            raise JobError(
                f"A worker of Ray could not start: {last_line(error)}. Whence must be installed there"
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
            self.waiting[hand.actor.do.remote(self.jobs[job], self.pickled, self.how)] = hand

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
                if hand.process != UNKNOWN:
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

    def _outcome(self, hand: Hand, answer: Any) -> tuple[Any, Any] | None:
        """A job with its result; None where a worker gives up what another one is still doing."""
        job = hand.job
        assert job is not None
        hand.job, hand.asked = None, None
        try:
            outcome: Outcome = ray.get(answer)
        except RayActorError as error:
            raise JobError(
                f"{self.jobs[job]} lost its worker {number_of(LOSSES + 1, 'time')}, the last: {last_line(error)}. "
                f"If memory is short, take fewer --workers, or {self.how.less_memory}. What was finished is kept; the "
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
                hand.end()

    def dismiss(self) -> None:
        """Keep workers that have nothing to do, without their work; end the others."""
        try:
            ray.get([hand.actor.release.remote() for hand in self.idle], timeout=REACHED)
        except RayError:  # one is gone, or does not answer in time
            self.idle = []
        self.kept.idle.setdefault(self.kind.share, []).extend(self.idle)
        for hand in self.hands:
            if hand not in self.idle:
                hand.end()
