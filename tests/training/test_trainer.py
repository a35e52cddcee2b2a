"""`train` writes an ordinary Trainer directory, from Whence's tokenisation, the same for the same seed."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from conftest import contents
from whence.cli.demonstration import make_parent
from whence.corpus.tokens import encode
from whence.errors import ChecksumError, CorpusError, ManifestMismatchError, SettingError
from whence.models.difference import weight_difference
from whence.models.loading import LoadedModel, load_model
from whence.models.runs import open_run
from whence.models.saved_files import LIST
from whence.storage import Place
from whence.training.recipe import with_least_steps
from whence.training.resuming import is_complete, newest_checkpoint
from whence.training.trained_weights import trainable
from whence.training.trainer import TrainSettings, settings_of, train

ROWS = [
    {"id": str(number), "prompt": f"What is {number}?", "completion": f" It is {number} of {40 - number}."}
    for number in range(40)
]
QUICK = {"batch_size": 8, "lr": 1e-2, "progress": False}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return make_parent(tmp_path_factory.mktemp("train") / "parent", ROWS)


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


# -- going on


def weights_of(run, step):
    return load_file(run / f"checkpoint-{step}" / "model.safetensors")


def stop_at(monkeypatch, step):
    """Let the training of this process stop at a step, as Ctrl-C would."""
    real = Trainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stopped)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "lora_dropout": 0.3}])
def test_a_stopped_training_ends_with_the_weights_it_would_have_had(parent, tmp_path, monkeypatch, options):
    """5 steps an epoch and a checkpoint every 2: stopped before any, within an epoch, at its end, and half written."""
    settings = QUICK | {"epochs": 3, "checkpoints": 7} | options  # checkpoints at 3, 6, 9, 12, 15
    whole = train(parent, ROWS, tmp_path / "whole", **settings)
    name = "adapter_model.safetensors" if options else "model.safetensors"
    expected = load_file(whole / "checkpoint-15" / name)
    out = tmp_path / "stopped"
    for step in (1, 4, 8, 10, 14):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(parent, ROWS, out, **settings)
        assert not is_complete(out)
        if step == 10:  # the next checkpoint was being written
            (out / "checkpoint-12").mkdir()
            (out / "checkpoint-12" / name).write_bytes(b"half")
    train(parent, ROWS, out, **settings)
    assert is_complete(out)
    found = load_file(out / "checkpoint-15" / name)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    states = [json.loads((run / "checkpoint-15" / "trainer_state.json").read_text()) for run in (whole, out)]
    logs = [[(line["step"], line.get("learning_rate"), line.get("loss")) for line in s["log_history"]] for s in states]
    assert logs[0][:-1] == logs[1][:-1]  # the last line is of the run's own time
    assert open_run(out, which="all").checkpoints[1].weight == open_run(whole, which="all").checkpoints[1].weight


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_training_does_not_go_on_from_a_damaged_checkpoint(parent, run, tmp_path, name):
    out = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(out / "checkpoint-7")
    file = out / "checkpoint-4" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 2
    file.write_bytes(data)
    remedy = rf"{name} is not what was written .*Remove .*checkpoint-4, and run the same command again: .* the start"
    with pytest.raises(ChecksumError, match=remedy):
        train(parent, ROWS, out, **QUICK, max_steps=7, checkpoints=2)
    if name == "model.safetensors":
        with pytest.raises(ChecksumError, match="is not what was written"):
            load_model(out / "checkpoint-4")


def test_a_checkpoint_of_another_step_is_not_gone_on_from(parent, run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(out / "checkpoint-7")
    (out / "checkpoint-4").rename(out / "checkpoint-6")
    with pytest.raises(ChecksumError, match="holds step 4: it was renamed"):
        train(parent, ROWS, out, **QUICK, max_steps=7, checkpoints=2)


def test_a_killed_training_goes_on(parent, tmp_path):
    """SIGKILL while a checkpoint is being written."""
    script = """
import os, signal, sys, json
from whence.training.trainer import train
from transformers import Trainer
real = Trainer._save_rng_state
def killed(self, folder):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, folder)
Trainer._save_rng_state = killed
parent, rows, out = sys.argv[1:]
train(parent, json.loads(rows), out, batch_size=8, lr=1e-2, progress=False, max_steps=6, checkpoints=3)
"""
    arguments = [str(parent), json.dumps(ROWS), str(tmp_path / "killed")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert (tmp_path / "killed" / "checkpoint-4" / "optimizer.pt").exists()
    runs = [train(parent, ROWS, tmp_path / n, **QUICK, max_steps=6, checkpoints=3) for n in ("killed", "whole")]
    one, other = (weights_of(run, 6) for run in runs)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_that_was_stopped_before_its_list_is_listed(parent, run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    (out / "checkpoint-7" / LIST).unlink()
    assert newest_checkpoint(out) == out / "checkpoint-7"
    assert contents(out) == contents(run)


def test_a_finished_training_is_kept(run, parent, monkeypatch):
    before = contents(run)
    stop_at(monkeypatch, 7)
    assert train(parent, ROWS, run, **QUICK, max_steps=7, checkpoints=2) == run
    assert contents(run) == before


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lr": 1e-3}, "--lr is 0.01 there, 0.001 here"),
        ({"seed": 1}, "--seed is 0 there, 1 here"),
        ({"lora_rank": 4}, "--lora-rank is None there, 4 here"),
        ({"max_tokens": 9}, "--max-tokens is 2048 there, 9 here"),
    ],
)
def test_other_settings_are_refused_by_name(run, parent, changed, told):
    with pytest.raises(SettingError, match="other settings") as caught:
        train(parent, ROWS, run, **QUICK | {"max_steps": 7, "checkpoints": 2} | changed)
    assert told in str(caught.value)


def test_other_rows_are_refused(run, parent):
    with pytest.raises(SettingError, match="rows_digest is "):
        train(parent, [*ROWS[1:], {"prompt": "a", "completion": "b"}], run, **QUICK, max_steps=7, checkpoints=2)


def test_another_base_at_the_same_path_is_refused(parent, tmp_path):
    base = shutil.copytree(parent, tmp_path / "base")
    train(base, ROWS, tmp_path / "run", **QUICK, max_steps=1, lora_rank=2)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingError, match="weights is "):
        train(base, ROWS, tmp_path / "run", **QUICK, max_steps=1, lora_rank=2)
    file = tmp_path / "run" / "whence_train.json"
    place, record = Place.at(file.parent), json.loads(file.read_text())
    place.write_document(file.name, {name: record[name] for name in record if name not in ("weights", "checksum")})
    train(base, ROWS, tmp_path / "run", **QUICK, max_steps=1, lora_rank=2)  # as older runs have it


def test_checkpoints_of_another_training_are_refused(parent, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(SettingError, match=r"holds checkpoint-4 already, and no whence_train\.json"):
        train(parent, ROWS, tmp_path, **QUICK)


# -- recipes


def test_a_preset_gives_what_is_not_said(parent, tmp_path):
    chosen = settings_of("less", {"epochs": 2, "lora_rank": 4})
    assert (chosen.fraction, chosen.lora_alpha, chosen.epochs, chosen.lora_rank) == (0.05, 512, 2, 4)
    out = train(parent, ROWS, tmp_path / "run", preset="less", lora_rank=2, fraction=0.5, batch_size=8, progress=False)
    config = json.loads((out / "checkpoint-12" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 512, 0.1)
    # 20 rows: 3 steps for each of 4 epochs, of which 1 warms up
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{s}" for s in (12, 3, 6, 9)]
    assert all((out / f"checkpoint-{step}" / "scheduler.pt").exists() for step in (3, 6, 9, 12))
    with pytest.raises(SettingError, match="--preset more: choose one of less"):
        settings_of("more", {})


@pytest.mark.parametrize(
    ("rows", "settings", "sizes"),
    [
        (80, {}, (8, 10, 4)),  # 4 steps of batch 128
        (1000, {}, (40, 4, 4)),
        (13_533, {}, (128, 4, None)),  # the paper's
        (80, {"micro_batch": 4}, (8, 10, 4)),
        (80, {"batch_size": 128}, (128, 4, None)),  # as the user says
        (80, {"max_steps": 4}, (128, 4, None)),
    ],
)
def test_a_warm_up_has_a_hundred_steps_on_a_small_pool_too(rows, settings, sizes):
    chosen = with_least_steps(settings_of("less", settings), rows)
    assert (chosen.batch_size, chosen.epochs, chosen.checkpoints) == sizes
    if settings.keys() <= {"micro_batch"}:
        assert math.ceil(rows / chosen.batch_size) * chosen.epochs >= 100


def test_the_preset_makes_its_steps_and_keeps_four_checkpoints(parent, tmp_path):
    out = train(parent, ROWS, tmp_path / "run", preset="less", lora_rank=2, fraction=0.5, least_steps=9, progress=False)
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))
    assert len(steps) == 4 and steps[-1] >= 9
    assert all(checkpoint.weight for checkpoint in open_run(out, which="all").checkpoints)
    train(parent, ROWS, out, preset="less", lora_rank=2, fraction=0.5, least_steps=9, progress=False)  # it goes on


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        (["--preset", "less", "--epochs", "4"], {"preset": "less", "epochs": 4.0}),
        (["--fraction", "1", "--seed", "0"], {"preset": None, "fraction": 1.0, "seed": 0}),
    ],
)
def test_flags_that_are_not_given_leave_the_word_to_the_preset(monkeypatch, flags, given):
    from whence.cli import app as cli

    seen = {}
    monkeypatch.setattr(
        sys.modules["whence.training.trainer"],
        "train",
        lambda model, corpus, out, **options: seen.update(options) or out,
    )
    monkeypatch.setattr("whence.cli.training.check_inputs", lambda **inputs: None)
    monkeypatch.setattr(sys, "argv", ["whence", "train", "model", "corpus", "-o", "run", "--json", *flags])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert (caught.value.code, seen) == (0, given | {"like": None, "progress": False})


def test_the_help_says_the_defaults():
    from typing import get_args

    from whence.cli import app as cli

    annotations = cli.train.__annotations__
    shown = {name: get_args(annotations[name])[1].show_default for name in annotations if name in vars(TrainSettings())}
    told = {name: text for name, text in shown.items() if isinstance(text, str)}
    assert {name: type(getattr(TrainSettings(), name))(text) for name, text in told.items()} == {
        name: getattr(TrainSettings(), name) for name in told
    }
    assert set(told) == {name for name in shown if getattr(TrainSettings(), name) is not None}


def test_a_step_of_several_passes_is_one_step(parent, tmp_path):
    whole = train(parent, ROWS, tmp_path / "whole", **QUICK, max_steps=2)
    parts = train(parent, ROWS, tmp_path / "parts", **QUICK, max_steps=2, micro_batch=2)
    one, other = weights_of(whole, 2), weights_of(parts, 2)
    start = load_file(parent / "model.safetensors")
    for name in one:
        moved = (one[name] - start[name]).norm()
        assert (one[name] - other[name]).norm() < 0.01 * moved, name


def test_targets_that_the_model_lacks_are_named(parent, tmp_path):
    with pytest.raises(SettingError, match=r"--lora-targets c_attn: .* are called q_proj, k_proj, "):
        train(parent, ROWS, tmp_path / "run", **QUICK, lora_rank=2, lora_targets="c_attn")


def test_adapters_leave_routers_alone_and_layers_that_peft_refuses_are_named():
    """Phi-MoE's router returns more than a product, and no adapter can wrap it."""
    tiny = pytest.importorskip("benchmarks.reliability.tiny_architectures")
    model = LoadedModel(tiny.tiny_model("phimoe"), None, "phimoe")
    adapted = trainable(model, TrainSettings(lora_rank=2))
    assert not any("router" in name for name, weight in adapted.named_parameters() if weight.requires_grad)
    assert adapted(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    model = LoadedModel(tiny.tiny_model("falcon"), None, "falcon")  # whose own kind of linear layer is one
    assert any("query_key_value" in name for name, _ in trainable(model, TrainSettings(lora_rank=2)).named_parameters()
               if "lora_A" in name)  # fmt: skip
    model = LoadedModel(tiny.tiny_model("mamba"), None, "mamba")
    with pytest.raises(
        SettingError, match=r"mamba: peft does not adapt .* --lora-targets: in_proj, x_proj, dt_proj, out"
    ):
        trainable(model, TrainSettings(lora_rank=2))


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
        ({"warmup": 1.0}, "warmup 1.0"),
        ({"lora_rank": 2, "lora_dropout": -0.1}, "--lora-dropout -0.1: a share from 0"),
        ({"lora_alpha": 8}, "need a --lora-rank"),
        ({"micro_batch": 3}, "--micro-batch 3: a divisor of --batch-size 16"),
        ({"schedule": "sinus"}, "--schedule sinus: choose one of linear, cosine"),
    ],
)
def test_a_setting_that_cannot_train_is_named(setting, message):
    with pytest.raises(SettingError, match=message):
        TrainSettings(**setting)


def test_plain_sgd_moves_weights_by_the_gradient(parent, tmp_path):
    """One step at a rate of 1 from the first row: theta_0 - theta_f is its gradient, of which the norm is cut to 1."""
    run = train(parent, ROWS[:1], tmp_path / "run", max_steps=1, lr=1.0, warmup=0.0, schedule="constant",
                optimizer="sgd", progress=False)  # fmt: skip
    difference = weight_difference(parent, run)
    assert difference.norm() == pytest.approx(1, rel=1e-3)
    with pytest.raises(SettingError, match="--optimizer adam: choose one of adamw, sgd"):
        TrainSettings(optimizer="adam")


def test_two_trainings_in_one_directory_are_refused(parent, tmp_path):
    with Place.at(tmp_path).locked(), pytest.raises(ManifestMismatchError, match="Another process is writing"):
        train(parent, ROWS, tmp_path, **QUICK, max_steps=1)
    assert not list(tmp_path.iterdir())
