"""Members of a bank and of a pool that workers of Ray train are those that this process trains.

But for rounding: in a process that has done much before, memory lies otherwise, and sums over it may be taken in
another order. That the bytes are the same between fresh processes shows `benchmarks.indexing.workers same`.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import corpus_rows, save_tiny_llama, write_jsonl
from ray_workers import one_thread_and_workers
from whence.ablation.member_training import train_pool
from whence.evaluation.bank_pipeline import bank
from whence.evaluation.bank_store import open_bank
from whence.evaluation.removal import evaluate_removal
from whence.runner import Engine
from whence.training.trainer import train

pytest.importorskip("whence.runner.ray_engine", exc_type=ImportError)
pytestmark = pytest.mark.timeout(300)
TWO = Engine("ray", workers=2)


@pytest.fixture(scope="module", autouse=True)
def workers():
    with one_thread_and_workers(TWO):
        yield


def test_a_bank_and_what_is_trained_in_it_later(tmp_path):
    model, rows = save_tiny_llama(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", corpus_rows(12))
    recipe = {"batch_size": 4, "epochs": 2, "lr": 5e-3, "max_tokens": 32, "checkpoints": 1, "progress": False}
    run, made = train(model, rows, tmp_path / "run", **recipe), {}
    for name, engine in (("here", "local"), ("there", TWO)):
        bank(run, rows, tmp_path / name, queries=corpus_rows(3, first=50), subsets=3, keep_weights=True,
             engine=engine, progress=False)  # fmt: skip
        removed = evaluate_removal(tmp_path / name, ["bm25"], share=0.2, seeds=1, engine=engine)
        made[name] = open_bank(tmp_path / name), removed
    (here, removed_here), (there, removed_there) = made["here"], made["there"]
    torch.testing.assert_close(here.losses(), there.losses(), rtol=1e-4, atol=1e-5)
    assert [member.left_out for member in here.members] == [member.left_out for member in there.members]
    assert there.description.repetition.cosine == pytest.approx(here.description.repetition.cosine, abs=1e-4)
    for mine, theirs in zip(removed_here.rows(), removed_there.rows(), strict=True):
        assert mine["method"] == theirs["method"] and mine["effect"] == pytest.approx(theirs["effect"], abs=1e-4)
    assert close(tmp_path / "here", tmp_path / "there") > 4
    assert not [*(tmp_path / "there").glob("training-*")]


def test_a_pool_has_the_same_members(tmp_path):
    model, rows = save_tiny_llama(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", corpus_rows(12))
    settings = {"tokens": 200, "steps": 4, "warmup_steps": 1, "max_tokens": 32, "lr": 5e-3, "progress": False}
    for name, engine in (("here", "local"), ("there", TWO)):
        train_pool(model, rows, tmp_path / name, engine=engine, **settings)
    assert close(tmp_path / "here", tmp_path / "there") == 2
    pools = [json.loads((tmp_path / name / "pool.json").read_text()) for name in ("here", "there")]
    facts = [
        [(each["partition"], each["file"], each["rows"], each["digest"]) for each in pool["members"]] for pool in pools
    ]
    assert facts[0] == facts[1] and pools[0]["recipe"] == pools[1]["recipe"]
    assert not (tmp_path / "there" / "work").exists()


def close(here, there):
    """Hold every file of weights against the one of the same name elsewhere; how many they are."""
    files = sorted(here.rglob("*.safetensors"))
    assert {file.relative_to(here) for file in files} == {
        file.relative_to(there) for file in there.rglob("*.safetensors")
    }
    for file in files:
        mine, theirs = load_file(file), load_file(there / file.relative_to(here))
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor.float(), theirs[name].float(), rtol=1e-2, atol=1e-4)
    return len(files)
