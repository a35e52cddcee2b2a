"""Workers of Ray build, append to and repair an index byte for byte as this process does, though they be killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import contents, corpus_rows, write_jsonl
from ray_workers import one_thread_and_workers
from whence.errors import StorageError
from whence.indexing import build as building
from whence.indexing.build import ShardWork, append, index, verify
from whence.runner import Engine

pytest.importorskip("whence.runner.ray_cluster", exc_type=ImportError)
pytestmark = pytest.mark.timeout(300)
BUILT = {"projection": "two_sided", "width": 8, "progress": False}
TWO = Engine("ray", workers=2)


@pytest.fixture(scope="module", autouse=True)
def workers():
    with one_thread_and_workers(TWO, Path(__file__).parent):  # they import this file
        yield


class Fatal(ShardWork):
    """Work that takes its worker down, once for each of two shards, before these are written."""

    def __call__(self, job, tick):
        """Write one shard, at the second try."""
        mark = Path(f"{self.built.store.place.root}-{job.part}")
        if job.part in (0, 2) and not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(job, tick)


def built_here(model, rows, out, *more, parts=16, **settings):
    """An index by one process of one thread that has done nothing before: memory lies there as in a worker."""
    words = f"""
import importlib
importlib.import_module("whence.indexing.ingest").ROWS_PER_SHARD = {parts}
from whence.indexing.build import append, index
index({str(model)!r}, {str(rows)!r}, {str(out)!r}, **{BUILT | settings!r})
for rows in {[*map(str, more)]!r}:
    append({str(out)!r}, rows, progress=False)
"""
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", words], check=True, env=one, capture_output=True)
    return contents(out)


def test_two_workers_build_append_and_repair_the_same_bytes(tiny_run, tmp_path, small_parts):
    rows, more = (
        write_jsonl(tmp_path / f"{first}.jsonl", corpus_rows(count, first=first))
        for count, first in ((80, 0), (40, 80))
    )
    expected = built_here(tiny_run, rows, tmp_path / "here", more, checkpoints="all")
    index(tiny_run, rows, tmp_path / "there", engine=TWO, checkpoints="all", **BUILT)
    append(tmp_path / "there", more, engine=TWO, progress=False)
    assert contents(tmp_path / "there") == expected
    shards = sorted((tmp_path / "there").glob("checkpoint-*/*.safetensors"))
    assert len(shards) > 4
    for shard in shards[:3]:
        shard.write_bytes(b"damaged")
    problems, notes = verify(tmp_path / "there", repair=True, engine=TWO)
    assert len(problems) == 3 and sum("the same bytes as before" in note for note in notes) == 3
    assert contents(tmp_path / "there") == expected


def test_workers_that_die_at_a_shard_cost_nothing(tiny_llama, tmp_path, small_parts, monkeypatch):
    rows = write_jsonl(tmp_path / "rows.jsonl", corpus_rows(80))
    expected = built_here(tiny_llama, rows, tmp_path / "here")
    monkeypatch.setattr(building, "ShardWork", Fatal)
    index(tiny_llama, rows, tmp_path / "there", engine=TWO, **BUILT)
    assert contents(tmp_path / "there") == expected
    assert len([*tmp_path.glob("there-*")]) == 2


class Elsewhere(ShardWork):
    """Work on a disk of its own."""

    def __call__(self, job, tick):
        """Write a shard that nobody else sees."""
        entry = super().__call__(job, tick)
        Path(self.built.store.place.path(entry.file)).unlink()
        return entry


def test_a_worker_that_does_not_share_the_disk_is_told_of(tiny_llama, tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr(building, "ShardWork", Elsewhere)
    with pytest.raises(StorageError, match=r"a worker wrote it, and it is not here.* s3://bucket/name"):
        index(tiny_llama, corpus_rows(80), tmp_path / "index", engine=TWO, **BUILT)


def test_a_driver_that_is_killed_leaves_no_process_and_resumes(tiny_llama, tmp_path):
    corpus = write_jsonl(tmp_path / "rows.jsonl", corpus_rows(2100))
    words = ["index", str(tiny_llama), str(corpus), "--engine", "ray", "--workers", "2", "--projection", "two_sided"]
    command, mark = (
        [sys.executable, "-m", "whence", *words, "--width", "8", "-o", str(tmp_path / "there")],
        tmp_path.name,
    )
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    alone |= {"OMP_NUM_THREADS": "1", "WHENCE_TEST": mark}
    killed = subprocess.Popen(command, env=alone, stderr=subprocess.DEVNULL)
    shards, limit = tmp_path / "there" / "checkpoint-000", time.monotonic() + 120
    while not (shards.exists() and any(shards.glob("*.safetensors"))):
        assert time.monotonic() < limit and killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    limit = time.monotonic() + 120
    while left := _with_environment(f"WHENCE_TEST={mark}"):
        assert time.monotonic() < limit, left
        time.sleep(0.5)
    done = subprocess.run(command, check=True, env=alone, capture_output=True, text=True)
    assert "2,100" in done.stdout and "ray" not in done.stderr.lower()
    assert contents(tmp_path / "there") == built_here(tiny_llama, corpus, tmp_path / "here", parts=1024)


def _with_environment(words: str) -> list[str]:
    """Processes that were started under a variable of this value, without Ray's own agents, which end later."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if words.encode() in (process / "environ").read_bytes().split(b"\0"):
                name = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
                found += [name] * ("Agent" not in name)
    return found
