"""`train` writes an ordinary Trainer directory, from Whence's tokenisation, the same for the same seed."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from whence import demo
from whence.errors import CorpusError, SettingError
from whence.model import load_model
from whence.tokens import encode
from whence.train import TrainSettings, train

ROWS = [
    {"id": str(number), "prompt": f"What is {number}?", "completion": f" It is {number} of {40 - number}."}
    for number in range(40)
]
QUICK = {"batch_size": 8, "lr": 1e-2, "progress": False}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return demo.make_parent(tmp_path_factory.mktemp("train") / "parent", ROWS)


@pytest.fixture(scope="module")
def run(parent, tmp_path_factory):
    return train(parent, ROWS, tmp_path_factory.mktemp("train") / "run", **QUICK, max_steps=7, checkpoints=2)


def test_out_is_a_trainer_directory(run):
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-7"]
    state = json.loads((run / "checkpoint-7" / "trainer_state.json").read_text())
    assert state["global_step"] == 7
    for directory in (run, run / "checkpoint-4"):
        assert AutoTokenizer.from_pretrained(directory).eos_token == "</s>"
    moments = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert all({"exp_avg", "exp_avg_sq"} <= set(entry) for entry in moments.values())
    AutoModelForCausalLM.from_pretrained(run / "checkpoint-7")
    settings = json.loads((run / "whence_train.json").read_text())
    assert (settings["max_steps"], settings["corpus"]) == (7, "40 rows in memory")


def test_every_learning_rate_is_logged(run):
    state = json.loads((run / "checkpoint-7" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"]}
    # One step of warm-up from 0, then a straight line that reaches 0 one step after the last.
    assert rates == pytest.approx({1: 0.0} | {step: 1e-2 * (8 - step) / 6 for step in range(2, 8)})


def test_first_loss_is_the_mean_over_supervised_tokens(run, parent):
    loaded = load_model(parent)
    out = train(parent, ROWS, run.parent / "whole", batch_size=40, max_steps=1, progress=False)
    logged = json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())["log_history"][0]["loss"]
    total = targets = 0.0
    for row in ROWS:
        encoded = encode(row, loaded.tokenizer)
        with torch.no_grad():
            logits = loaded.base(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
        for place, token in enumerate(encoded.ids):
            if encoded.supervised[place]:
                total -= logits[place - 1, token].item()
                targets += 1
    assert logged == pytest.approx(total / targets, rel=1e-5)


def test_same_seed_same_weights(run, parent, tmp_path):
    again = train(parent, ROWS, tmp_path / "again", **QUICK, max_steps=7, checkpoints=2)
    other = train(parent, ROWS, tmp_path / "other", **QUICK, max_steps=7, checkpoints=2, seed=1)
    weights = [load_file(path / "checkpoint-7" / "model.safetensors") for path in (run, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_an_epoch_closes_with_a_checkpoint(parent, tmp_path):
    out = train(parent, ROWS, tmp_path / "run", **QUICK, epochs=2, fraction=0.5)  # 20 rows, 3 steps each
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_lora_trains_the_adapter_alone_and_can_go_on(parent, tmp_path):
    first = train(parent, ROWS, tmp_path / "first", **QUICK, max_steps=2, lora_rank=2) / "checkpoint-2"
    loaded = load_model(first)
    assert isinstance(loaded.model, PeftModel)
    assert {name.split(".lora_")[0].split(".")[-1] for name in loaded.layers()} >= {"q_proj", "down_proj"}
    second = train(first, ROWS, tmp_path / "second", **QUICK, max_steps=2) / "checkpoint-2"
    before, after = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(SettingError, match="has an adapter already"):
        train(first, ROWS, tmp_path / "third", **QUICK, lora_rank=2)


def test_nothing_is_written_to_stdout(parent, tmp_path, capsys):
    train(parent, ROWS, tmp_path / "run", batch_size=20, max_steps=2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err
    assert "Writing" not in captured.err


def test_a_directory_with_checkpoints_is_refused(run, parent):
    with pytest.raises(SettingError, match="holds checkpoints already"):
        train(parent, ROWS, run, **QUICK)


def test_a_corpus_without_targets_is_refused(parent, tmp_path):
    with pytest.raises(CorpusError, match="no row has a supervised token"):
        train(parent, [{"prompt": "a", "completion": None}], tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "--epochs 0: a number above 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"fraction": 1.5}, "--fraction 1.5"),
        ({"warmup": 1.0}, "--warmup 1.0"),
        ({"schedule": "sinus"}, "--schedule sinus: choose one of linear, cosine"),
    ],
)
def test_a_setting_that_cannot_train_is_named(setting, message):
    with pytest.raises(SettingError, match=message):
        TrainSettings(**setting)
