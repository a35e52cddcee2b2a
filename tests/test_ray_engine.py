"""Workers of Ray do what this process would, whatever happens to them.

The cluster is started once, for it takes seconds: what is tested is the crew. That a command starts one and ends it is
tested where builds are killed (`indexing/test_ray_builds.py`).
"""

import gc
import os
import signal
import socket
import time
from contextvars import Context
from pathlib import Path

import pytest

from whence import runner
from whence.errors import CorpusError, JobError, ManifestMismatchError, MissingExtraError, SettingError
from whence.runner import Engine, engines

ray_engine = pytest.importorskip("whence.runner.ray_engine", exc_type=ImportError)
ray_worker = pytest.importorskip("whence.runner.ray_worker", exc_type=ImportError)
ray_cluster = pytest.importorskip("whence.runner.ray_cluster", exc_type=ImportError)

pytestmark = pytest.mark.timeout(240)
ROOM = Engine("ray", workers=12)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Workers that are hired by one test serve the next; there is room for as many again."""
    with pytest.MonkeyPatch.context() as patch:
        paths = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))  # workers import this file
        with runner.workers_kept(ROOM), ray_cluster.workers_of(ROOM):
            yield


class Work:
    """What jobs are done by: a folder in which they leave traces."""

    def __init__(self, folder, behaviour="double"):
        self.folder, self.behaviour = str(folder), behaviour
        self.ballast = bytes(10**6) if behaviour.startswith("heavy") else b""

    def __call__(self, job, tick):
        """As the behaviour says."""
        return getattr(self, f"_{self.behaviour}")(job, tick)

    def attempts(self, job):
        """How often a job was begun, this time included."""
        file = Path(self.folder) / f"{job}-{time.time_ns()}-{os.getpid()}"
        file.write_text("")
        return len([*Path(self.folder).glob(f"{job}-*")])

    def _double(self, job, tick):
        tick(1, 10)
        return job * 2

    def _where(self, job, tick):
        time.sleep(0.3)
        return os.getpid()

    def _is_slow_at_first(self, job, tick):
        time.sleep(0 if job else 1.0)
        return job * 2

    def _meets(self, job, tick):
        (Path(self.folder) / f"process-{os.getpid()}").touch()
        end = time.monotonic() + 60.0
        while len([*Path(self.folder).glob("process-*")]) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.3)  # so that both have some
        return os.getpid()

    def _counts(self, job, tick):
        return sum(isinstance(each, Work) for each in gc.get_objects())

    def _dies_once(self, job, tick):
        tick(1, 10)
        if job == 2 and self.attempts(job) == 1:
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        tick(1, 10)
        return job * 2

    def _dies_always(self, job, tick):
        self.attempts(job)
        os.kill(os.getpid(), signal.SIGKILL)

    def _stops(self, job, tick):
        if job == 0 and self.attempts(job) == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.2)
        return job * 2

    def _refuses(self, job, tick):
        raise CorpusError(f"line {job} is bad")

    def _fails_twice(self, job, tick):
        tick(3, 0)
        if self.attempts(job) < 3:
            raise OSError("disk")
        return job

    def _heavy_dies_once(self, job, tick):
        assert len(self.ballast) == 10**6
        return self._dies_once(job, tick)

    def _is_taken(self, job, tick):
        if job == 0 and self.attempts(job) == 1:
            end = time.monotonic() + 60.0
            while len([*Path(self.folder).glob("0-*")]) == 1 and time.monotonic() < end:
                time.sleep(0.1)
            time.sleep(2.0)  # in which the other one refuses
        elif job == 0:
            raise ManifestMismatchError("busy")
        time.sleep(0.2)
        return job * 2

    def _is_out_of_memory(self, job, tick):
        raise MemoryError("no more")


def done(work, jobs, workers=2, **more):
    return dict(runner.map(work, jobs, engine=Engine("ray", workers=workers), **more))


def test_results_are_those_of_this_process(tmp_path):
    ticks = []
    found = done(Work(tmp_path), range(7), on_tick=lambda *count: ticks.append(count))
    assert found == dict(runner.map(Work(tmp_path), range(7)))
    assert [sum(column) for column in zip(*ticks, strict=True)] == [7, 70]


def test_results_can_be_held_back_until_it_is_their_turn(tmp_path):
    found = [*runner.map_in_order(Work(tmp_path, "is_slow_at_first"), range(5), engine=Engine("ray", workers=2))]
    assert found == [(job, job * 2) for job in range(5)]


def test_jobs_run_in_as_many_processes_as_are_asked_for(tmp_path):
    processes = {*Context().run(done, Work(tmp_path, "where"), range(9), workers=3).values()}
    assert len(processes) == 3 and os.getpid() not in processes


def test_workers_stay_for_the_next_work_and_hold_nothing_of_the_last(tmp_path):
    """Within a block; outside of it each map has its own."""
    first, second = ({*done(Work(tmp_path, "meets"), range(6)).values()} for _ in range(2))
    assert first == second and len(first) == 2
    assert {*done(Work(tmp_path, "counts"), range(6)).values()} == {1}
    alone = {*Context().run(done, Work(tmp_path, "where"), range(6)).values()}
    assert not alone & first


def test_no_jobs_take_no_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_Crew", None)
    assert done(Work(tmp_path), []) == {}


@pytest.mark.parametrize("behaviour", ["dies_once", "heavy_dies_once"])
def test_a_lost_worker_costs_the_job_that_it_had(tmp_path, behaviour):
    ticks = []
    found = done(Work(tmp_path, behaviour), range(5), on_tick=lambda *count: ticks.append(count))
    assert found == {job: job * 2 for job in range(5)}
    assert [sum(column) for column in zip(*ticks, strict=True)] == [10, 100]


def test_a_job_that_takes_down_every_worker_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "LOSSES", 1)
    with pytest.raises(JobError, match=r"^job lost its worker 2 times, .* take fewer --workers, or give"):
        Context().run(done, Work(tmp_path, "dies_always"), ["job"])  # by workers of its own
    assert len([*tmp_path.iterdir()]) == 2


def test_a_stragglers_job_is_given_to_another_worker(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ray_engine, "LEAST_SLOW", 1.0)
    assert done(Work(tmp_path, "stops"), range(4)) == {job: job * 2 for job in range(4)}
    assert "0 has taken" in caplog.text and "the first result counts" in caplog.text


def test_a_finished_job_is_not_given_out_again(tmp_path):
    crew = ray_engine._Crew(
        ray_cluster.Kind(3, 1, 0.0),
        ray_cluster.Kept(),
        b"",
        range(3),
        lambda *_: None,
        ray_worker.How(0, "", str(tmp_path)),
    )
    slow, copy, other = (ray_cluster.Hand(None, process=number, job=0, since=-1e6) for number in (1, 2, 3))
    other.job, crew.hands, crew.seconds, crew.finished = 1, [slow, copy, other], [1.0], {0, 2}
    slow.is_dismissed = copy.is_dismissed = True
    assert crew._next() == 1  # the one that is still running, and not the one whose copies were dismissed


def test_a_refusal_by_one_of_two_copies_is_not_the_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ray_engine, "LEAST_SLOW", 1.0)
    assert done(Work(tmp_path, "is_taken"), range(4)) == {job: job * 2 for job in range(4)}
    assert caplog.text.count("one of two workers that do it refuses: busy") == 1


def test_the_last_job_has_no_more_threads_than_the_others(monkeypatch):
    machine = {"Alive": True, "Resources": {"CPU": 8.0}}
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [machine, {"Alive": False, "Resources": {"CPU": 64.0}}])
    monkeypatch.setattr(ray_cluster.torch, "get_num_threads", lambda: 8)
    kinds = [ray_cluster.Kind.of(Engine("ray", workers=4), jobs) for jobs in (9, 2, 1)]
    assert [(kind.workers, kind.cores) for kind in kinds] == [(4, 2), (2, 2), (1, 2)]
    assert ray_cluster.Kind.of(Engine("ray"), 99) == ray_cluster.Kind(8, 1, 0.0)
    machine["Resources"]["GPU"] = 2.0
    assert ray_cluster.Kind.of(Engine("ray"), 99) == ray_cluster.Kind(2, 4, 1.0)
    assert ray_cluster.Kind.of(Engine("ray", gpus_per_worker=0.5), 99) == ray_cluster.Kind(4, 2, 0.5)


def test_a_cluster_without_room_is_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ray_engine, "PATIENCE", 0.5)
    monkeypatch.setattr(ray_engine, "Kind", type("Kind", (), {"of": lambda *_: kind_of_worker(1, 64, 0.0)}))
    monkeypatch.setattr(ray_engine._Crew, "_look", stop_when(lambda: "no worker has come" in caplog.text))
    with pytest.raises(KeyboardInterrupt):
        done(Work(tmp_path), [1])
    assert "each takes 64 cores and 0 GPUs; the cluster has" in caplog.text


kind_of_worker = ray_cluster.Kind


def stop_when(is_enough):
    """A look at workers after which the user presses Ctrl-C."""

    def look(self):
        if is_enough():
            raise KeyboardInterrupt

    return look


def test_what_whence_refuses_is_raised_here(tmp_path):
    with pytest.raises(CorpusError, match=r"^line 3 is bad$"):
        done(Work(tmp_path, "refuses"), [3])


def test_a_failed_job_is_done_again_and_what_went_wrong_is_said(tmp_path, caplog):
    ticks = []
    assert done(Work(tmp_path, "fails_twice"), [5], on_tick=lambda *count: ticks.append(count)) == {5: 5}
    assert sum(examples for examples, _ in ticks) == 3
    assert "5 failed (disk); trying again" in caplog.text


def test_lack_of_memory_is_explained(tmp_path):
    with pytest.raises(JobError, match=r"^1: out of memory \(no more\)\. To mend it: take less\.$"):
        done(Work(tmp_path, "is_out_of_memory"), [1], less_memory="take less")


def test_another_whence_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("whence.__version__", "9.9.9")
    with pytest.raises(SettingError, match=r"has Whence \d\S*, and this is 9\.9\.9"):
        Context().run(done, Work(tmp_path), [1])  # a worker of its own, that is greeted


def test_gpus_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(SettingError, match=r"^--gpus-per-worker 2: a machine of the cluster has 0 at most"):
        list(runner.map(Work(tmp_path), [1], engine=Engine("ray", gpus_per_worker=2)))


def test_a_cluster_that_is_not_there_is_told_of_at_once(monkeypatch):
    monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SettingError, match=rf"^--address 127\.0\.0\.1:{port}: Ray cannot be reached .*refused"):
        list(runner.map(Work(""), [1], engine=Engine("ray", address=f"127.0.0.1:{port}")))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "slurm"}, "--engine slurm: one of local, ray"),
        ({"name": "ray", "workers": 0}, "--workers 0: 1 or more, or auto"),
        ({"workers": 2}, "--workers 2: --engine local is this process; add --engine ray"),
        ({"address": "auto"}, "--address auto: --engine local"),
        ({"gpus_per_worker": 1.0}, "--gpus-per-worker 1.0: --engine local"),
        ({"name": "ray", "gpus_per_worker": -1.0}, "--gpus-per-worker -1: 0 or more"),
    ],
)
def test_what_no_engine_has_is_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        Engine(**settings)


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'whence\[ray\]'"):
        Engine("ray")
