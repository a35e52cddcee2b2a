"""What commit 5a17c86 wrote opens, verifies, goes on and answers as it did; see `make_files.py` beside this file."""

import json
import math
import shutil
from pathlib import Path

import pytest

from conftest import contents
from whence.checksums import is_sealed

WRITTEN = Path(__file__).parent / "written_by_5a17c86"
PLACE = Path("/tmp/whence-5a17c86")
ANSWERS = json.loads((WRITTEN / "answers.json").read_text())
TRAINING = ("--max-steps", 4, "--checkpoints", 2, "--batch-size", 4, "--lr", "1e-2", "--max-tokens", 64)
MEMBERS = ("--by", "source", "--max-tokens", 64, "--tokens", 512, "--steps", 4, "--warmup-steps", 1)
RECOVERY = ("--count", 20, "--method", "nnls", "--mixture", "gradients")


@pytest.fixture
def written(monkeypatch, small_parts):
    """A copy of the files where they were written, for an index and a training are held to their inputs' paths."""
    shutil.rmtree(PLACE, ignore_errors=True)
    shutil.copytree(WRITTEN, PLACE)
    monkeypatch.chdir(PLACE)
    yield PLACE
    shutil.rmtree(PLACE)


@pytest.fixture
def answer(command):
    """JSON that a command prints."""

    def call(*words):
        code, out, err = command(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


def same(new, old):
    """Whether two JSON values agree: numbers to rounding (another CPU adds in another order), all else exactly."""
    if isinstance(old, dict):
        return new.keys() == old.keys() and all(same(new[key], old[key]) for key in old)
    if isinstance(old, list):
        return len(new) == len(old) and all(map(same, new, old))
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(new, old, rel_tol=2e-3, abs_tol=2e-5)
    return new == old


def files(directory):
    """Names of the files of a directory, but those that Whence never opens and lists it did not write."""
    return {name for name in contents(directory) if not name.endswith(("training_args.bin", "whence_checksums.json"))}


def test_an_index_opens_verifies_and_answers(written, answer, command):
    before = contents(written / "index")
    assert same(answer("info", "index"), ANSWERS["info"])
    assert command("verify", "index")[0] == 0
    asked = ("--prompt", "37 and 1?", "--completion", " yes, 1!", "--top", 5, "--exact", "--shortlist", 100)
    trace = answer("trace", "index", *asked)
    of_exact = ("z", "percentile")  # of the exact score now, of the index' own when the answers were written
    rows, older = (
        [{name: value for name, value in row.items() if name not in of_exact} for row in answers]
        for answers in (trace["rows"], ANSWERS["trace"]["rows"])
    )
    assert same(rows, older)
    assert same(trace["answers"], ANSWERS["trace"]["answers"])
    published = ("--method", "less", "--by", "task", "--selector", "max")  # the default when the answers were written
    chosen = answer("select", "index", "--tasks", "task.jsonl", *published, "--count", 6)
    assert same(chosen["rows"], ANSWERS["select"]["rows"])
    assert contents(written / "index") == before


def test_an_index_that_was_stopped_goes_on_to_the_same_bytes(written, answer):
    building = ("--projection", "two_sided", "--width", 8, "--checkpoints", "all", "--codec", "int8")
    before = contents(written / "index-stopped")
    assert len(before) < len(contents(written / "index"))
    answer("index", "run", "corpus.jsonl", "-o", "index-stopped", *building)
    after = contents(written / "index-stopped")
    parts = {name for name in before if name.endswith(".parquet")}
    shards = {name for name in before if name.endswith(".safetensors")} - {"checkpoint-001/shard-00000.safetensors"}
    assert parts and shards and all(after[name] == before[name] for name in parts | shards)
    assert after.keys() == contents(written / "index").keys()
    assert answer("verify", "index-stopped")["rows"] == []


def test_rows_join_an_index(written, answer):
    before = {name: data for name, data in contents(written / "index").items() if name != "manifest.json"}
    assert answer("append", "index", "more.jsonl")["rows"] == 48
    assert before.items() <= contents(written / "index").items()


def test_a_run_is_read_and_one_that_was_stopped_goes_on(written, answer, command):
    fresh = answer(
        "index",
        "run",
        "corpus.jsonl",
        "-o",
        "again",
        "--projection",
        "two_sided",
        "--width",
        8,
        "--checkpoints",
        "all",
        "--codec",
        "int8",
        "--batch-tokens",
        4096,
    )
    for entry in fresh["checkpoints"]:
        assert entry.pop("rates")  # newer: how learning rates that were not logged came about
    assert fresh["format_version"] == 2
    assert same({**fresh, "path": ANSWERS["info"]["path"], "format_version": 1}, ANSWERS["info"])
    before = contents(written / "run-stopped" / "checkpoint-2")
    code, _, err = command("train", "base", "corpus.jsonl", "-o", "run-stopped", *TRAINING, "--json")
    assert code == 0, err
    after = contents(written / "run-stopped" / "checkpoint-2")
    assert after.pop("whence_checksums.json", None), "a checkpoint without its list of files gets one"
    assert after == before
    assert files(written / "run-stopped") == files(written / "run")


def test_a_pool_answers_and_one_that_was_stopped_goes_on(written, answer, command):
    assert command("pool", "verify", "pool")[0] == 0
    before = contents(written / "pool" / "losses").keys()
    answer("pool", "train", "base", "corpus.jsonl", "-o", "pool", *MEMBERS)
    assert same(answer("ablate", "pool", "--eval", "eval.jsonl")["rows"], ANSWERS["ablate"]["rows"])
    after = contents(written / "pool" / "losses")
    assert after.keys() == before and all(map(is_sealed, after.values())), "losses without a checksum: measured again"
    assert same(answer("ablate", "pool", "--eval", "eval.jsonl")["rows"], ANSWERS["ablate"]["rows"])
    assert contents(written / "pool" / "losses") == after, "losses are read, not measured again"
    members = answer("pool", "train", "base", "corpus.jsonl", "-o", "pool-stopped", *MEMBERS)["rows"]
    assert [member["partition"] for member in members] == ["s0", "s1"]
    assert command("pool", "verify", "pool-stopped")[0] == 0


def test_evidence_is_read_and_what_is_missing_of_it_gathered(written, answer):
    asked = ("recover", "base", "run/checkpoint-4", "corpus.jsonl", *RECOVERY, "--work", "evidence")
    before = contents(written / "evidence")
    assert same(answer(*asked)["rows"], ANSWERS["recover"]["rows"])
    assert contents(written / "evidence") == before, "evidence is read, not gathered again"
    (written / "evidence/evidence/final/part-00000.safetensors").unlink()
    assert same(answer(*asked)["rows"], ANSWERS["recover"]["rows"])
    assert contents(written / "evidence").keys() == before.keys() | {"evidence/final/part-00000.json"}
