"""A run that a Trainer made by itself, made again by `train --like`."""

import json

import pytest
import torch
from test_in_run import save_model

from conftest import corpus_rows, write_jsonl
from whence import trace
from whence.corpus.tokens import encode
from whence.errors import ModelError, SettingError
from whence.models.loading import load_model
from whence.training.likeness import FILE, likeness
from whence.training.trainer import train

ROWS = corpus_rows(20)
RECIPE = {"epochs": 2, "lr": 1e-3, "batch_size": 4, "warmup": 0.0, "seed": 42, "weight_decay": 0.01}


def by_trainer(model, out):
    """Train with transformers' own defaults for order, seed, schedule and clipping, and a collator written here."""
    import transformers as t

    tokenizer = load_model(model).tokenizer
    rows = [encode(row, tokenizer) for row in ROWS]

    def collated(items):
        longest = max(len(item["ids"]) for item in items)
        ids = torch.tensor([item["ids"] + [0] * (longest - len(item["ids"])) for item in items])
        labels = torch.tensor([[i if s else -100 for i, s in zip(item["ids"], item["supervised"], strict=True)]
                               + [-100] * (longest - len(item["ids"])) for item in items])  # fmt: skip
        mask = torch.tensor([[1] * len(item["ids"]) + [0] * (longest - len(item["ids"])) for item in items])
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    arguments = t.TrainingArguments(
        output_dir=str(out), num_train_epochs=2, learning_rate=1e-3, per_device_train_batch_size=4, weight_decay=0.01,
        remove_unused_columns=False, logging_steps=2, save_strategy="epoch", report_to="none",
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    t.Trainer(
        model=t.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=[{"ids": row.ids, "supervised": row.supervised} for row in rows],
        data_collator=collated,
    ).train()
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("like")
    model = save_model(root / "model", "llama")
    return model, write_jsonl(root / "rows.jsonl", ROWS), by_trainer(model, root / "theirs")


def test_a_trainers_run_is_made_again_and_replayed(made, tmp_path):
    model, corpus, theirs = made
    run = train(model, corpus, tmp_path / "run", **RECIPE, order="random", replayable=True, like=theirs, progress=False)
    found = json.loads((run / FILE).read_text())
    assert found["cosine"] > 0.9999 and found["difference"] < 1e-2 and found["parted"] is None
    assert found["logged_steps"] == 5
    assert trace(run, ROWS[0]["prompt"], ROWS[0]["completion"], method="replay", top=3).hits


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"lr": 2e-3}, "learning rate is"), ({"order": "length"}, "loss is"), ({"seed": 1}, "loss is")],
)
def test_another_training_is_refused_by_the_step_where_they_part(made, tmp_path, changed, words):
    model, corpus, theirs = made
    settings = RECIPE | {"order": "random", "replayable": True, "progress": False} | changed
    with pytest.raises(ModelError, match=rf"not the training of .*They part at step 2, where the {words}"):
        train(model, corpus, tmp_path / "run", **settings, like=theirs)
    assert likeness(tmp_path / "run", theirs).cosine < 0.99


def test_it_needs_the_weights_of_the_start(made, tmp_path):
    model, corpus, theirs = made
    with pytest.raises(SettingError, match="--like needs --replayable"):
        train(model, corpus, tmp_path / "run", **RECIPE, like=theirs, progress=False)


def test_a_stopped_training_in_random_order_goes_on(made, tmp_path, monkeypatch):
    from test_trainer import stop_at

    model, corpus, _ = made
    settings = RECIPE | {"order": "random", "checkpoints": 5, "progress": False}
    whole = train(model, corpus, tmp_path / "whole", **settings)
    for step in (3, 7):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(model, corpus, tmp_path / "stopped", **settings)
    stopped = train(model, corpus, tmp_path / "stopped", **settings)
    ends = [dict(load_model(run / "checkpoint-10").model.named_parameters()) for run in (whole, stopped)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_command_line_says_how_alike(made, tmp_path, command):
    model, corpus, theirs = made
    words = ("--epochs", 2, "--lr", 1e-3, "--batch-size", 4, "--warmup", 0, "--seed", 42, "--weight-decay", 0.01)
    code, out, _ = command("train", model, corpus, "-o", tmp_path / "run", *words, "--order", "random", "--replayable",
                           "--like", theirs)  # fmt: skip
    assert code == 0 and "the cosine of the two weight changes is 1.0000" in " ".join(out.split())
    code, _, err = command("train", model, corpus, "-o", tmp_path / "other", "--order", "alphabetical")
    assert code == 2 and "--order alphabetical: choose one of length, random" in err
