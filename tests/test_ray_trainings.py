"""Members of a bank and of a pool that workers of Ray train are those that this process trains."""

import pytest
import torch

from conftest import contents, corpus_rows, save_tiny_llama, write_jsonl
from whence.ablation.member_training import train_pool
from whence.evaluation.bank_pipeline import bank
from whence.evaluation.bank_store import open_bank
from whence.evaluation.removal import evaluate_removal
from whence.runner import Engine
from whence.training.trainer import train

ray_engine = pytest.importorskip("whence.runner.ray_engine", exc_type=ImportError)
pytestmark = pytest.mark.timeout(300)
TWO = Engine("ray", workers=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_a_cluster():
    """Threads change the order of sums; the cluster is started once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ray_engine._cluster(TWO):
        yield
    torch.set_num_threads(threads)


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
    assert torch.equal(here.losses(), there.losses())
    assert [member.left_out for member in here.members] == [member.left_out for member in there.members]
    assert there.description.repetition == here.description.repetition
    effects = [[(row["method"], row["effect"]) for row in table.rows()] for table in (removed_here, removed_there)]
    assert effects[0] == effects[1]
    weights = [
        {name: data for name, data in contents(tmp_path / place).items() if name.endswith("model.safetensors")}
        for place in ("here", "there")
    ]
    assert len(weights[0]) > 4 and weights[0] == weights[1]
    assert not [*(tmp_path / "there").glob("training-*")]


def test_a_pool_has_the_same_bytes(tmp_path):
    model, rows = save_tiny_llama(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", corpus_rows(12))
    settings = {"tokens": 200, "steps": 4, "warmup_steps": 1, "max_tokens": 32, "lr": 5e-3, "progress": False}
    for name, engine in (("here", "local"), ("there", TWO)):
        train_pool(model, rows, tmp_path / name, engine=engine, **settings)
    here, there = contents(tmp_path / "here"), contents(tmp_path / "there")
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []
