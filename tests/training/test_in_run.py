"""In-run contributions against loops of single-example autograd, brute-force Shapley values, and what training did."""

import itertools
import json
import math
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_trainer import stop_at
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import COMMON, byte_tokenizer, corpus_rows, save_tiny_llama, write_jsonl
from whence.corpus.tokens import encode
from whence.errors import ChecksumError, CorpusError, ModelError, SettingError
from whence.models.loading import load_model
from whence.models.saved_files import LIST
from whence.training.in_run import SCORES, SETTINGS, STEPS, InRun, InRunPlan
from whence.training.recipe import IN_RUN, MIX, REPLAY, TrainSettings
from whence.training.trainer import train

ROWS, VALIDATION = corpus_rows(20), corpus_rows(7, first=100)
QUICK = {"batch_size": 6, "lr": 1e-2, "warmup": 0.0, "progress": False}
SGD = {"optimizer": "sgd", "lr": 0.1}


def save_model(directory, kind, dropout=0.0):
    """A tiny model of a kind, with the byte tokenizer."""
    import transformers as t

    if kind == "llama":
        return save_tiny_llama(directory)
    torch.manual_seed(0)
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 96}
    drops = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout)
    config = {
        "gpt2": lambda: t.GPT2Config(**small, **drops, vocab_size=259, bos_token_id=1, eos_token_id=2),
        "tied": lambda: t.LlamaConfig(
            **COMMON | {"vocab_size": 259, "max_position_embeddings": 96}, num_key_value_heads=1,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        "mixtral": lambda: t.MixtralConfig(
            **COMMON | {"vocab_size": 259, "max_position_embeddings": 96}, num_key_value_heads=1, num_local_experts=2,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
    }[kind]()  # fmt: skip
    model = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in ("llama", "tied", "gpt2")}


def scores_of(run):
    return {row["id"]: row for row in pyarrow.parquet.read_table(run / SCORES).to_pylist()}


def steps_of(run):
    return [json.loads(line) for line in (run / STEPS).read_text().splitlines()]


def outputs(run):
    return [(run / name).read_bytes() for name in (SCORES, SETTINGS, STEPS)]


def weights_of(run):
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return load_file(next(newest.glob("*.safetensors")))


# -- the oracle


def sum_of_losses(net, ids, supervised):
    """Of one example, alone and unpadded, by the model's own forward."""
    logits = net(input_ids=torch.tensor([ids])).logits[0].float()
    targets = [t for t, wanted in enumerate(supervised) if wanted]
    return F.cross_entropy(logits[[t - 1 for t in targets]], torch.tensor(ids)[targets], reduction="sum")


class Checked(InRun):
    """Contributions that are computed a second time, one example at a time."""

    log = []  # noqa: RUF012 - of one training at a time

    def __post_init__(self):
        super().__post_init__()
        self.seen_rows, self.kept = [], None
        Checked.log = []

    def watching(self, inputs, rows):
        """Note the examples, unpadded."""
        for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
            length = int(mask.sum())
            self.seen_rows.append((ids[:length].tolist(), (labels[:length] != -100).tolist()))
        return super().watching(inputs, rows)

    def step(self, optimizer, number):
        """Compute what is to be found, and find it."""
        net, weights = self.model.model, list(self.weights.values())
        net.eval()
        total = sum(sum(supervised) for _, supervised in self.seen_rows)
        with torch.enable_grad():
            mine = [
                torch.autograd.grad(sum_of_losses(net, ids, supervised) / total, weights)
                for ids, supervised in self.seen_rows
            ]
        norm = math.sqrt(sum(float(sum(parts).double().square().sum()) for parts in zip(*mine, strict=True)))
        clip = min(1.0, 1 / (norm + 1e-6))
        rates = []
        for weight in weights:
            group = next(g for g in optimizer.param_groups if any(weight is w for w in g["params"]))
            rate = torch.full_like(weight, group["lr"])
            if "betas" in group:
                kept, (_, beta) = optimizer.state[weight], group["betas"]
                before, done = kept.get("exp_avg_sq", torch.zeros_like(weight)), int(kept.get("step", 0))
                root = ((beta * before + (1 - beta) * weight.grad**2) / (1 - beta ** (done + 1))).sqrt()
                rate = rate / (root + group["eps"])
            rates.append(rate)
        taken = [rate * weight.grad for rate, weight in zip(rates, weights, strict=True)]
        if number % self.plan.save_steps % self.plan.every == 0:
            self.drawn = self._validation_draw(number)
            self.kept = None
        if self.kept is None or self.plan.order == 2:
            self.kept = self.validation_slope(net, weights, taken)
        directions = [clip * rate * slope for rate, slope in zip(rates, self.kept, strict=True)]
        expected = [sum(float((g * d).double().sum()) for g, d in zip(z, directions, strict=True)) for z in mine]
        rows, before = np.concatenate([rows for rows, _ in self._passes]), self.scores.copy()
        super().step(optimizer, number)
        Checked.log.append((self.scores[rows] - before[rows], np.array(expected), clip, self.steps[-1]))
        self.seen_rows.clear()

    def validation_slope(self, net, weights, taken):
        """By parameter; less half the Hessian's product with the step for the second order."""
        tokens = sum(row.supervised_count for row in self.drawn)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = sum(sum_of_losses(net, row.ids, row.supervised) for row in self.drawn) / tokens
            slope = torch.autograd.grad(loss, weights, create_graph=self.plan.order == 2)
            if self.plan.order == 1:
                return slope
            along = sum((g * s).sum() for g, s in zip(slope, taken, strict=True))
            products = torch.autograd.grad(along, weights, materialize_grads=True)
        return [(g - h / 2).detach() for g, h in zip(slope, products, strict=True)]


CASES = {
    "llama by sgd": ("llama", SGD),
    "llama by adamw, in passes": ("llama", {"micro_batch": 2, "weight_decay": 0.1}),
    "tied": ("tied", SGD | {"micro_batch": 3}),
    "gpt2": ("gpt2", {}),
    "gpt2 by sgd": ("gpt2", SGD),
    "lora": ("llama", {"lora_rank": 2, "lr": 1e-2}),
    "lora on gpt2 by sgd": ("gpt2", SGD | {"lora_rank": 2}),
    "second order": ("llama", SGD | {"in_run_order": 2}),
    "second order by adamw, in passes": ("tied", {"in_run_order": 2, "micro_batch": 2, "lr": 1e-3}),
    "second order of gpt2": ("gpt2", SGD | {"in_run_order": 2}),
    "second order of lora": ("llama", SGD | {"in_run_order": 2, "lora_rank": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_contribution_equals_single_example_autograd(models, tmp_path, monkeypatch, case):
    """Two epochs of uneven rows, the last batch of each smaller; validation rows are drawn every 3 steps."""
    kind, more = CASES[case]
    monkeypatch.setattr(sys.modules["whence.training.trainer"], "InRun", Checked)
    settings = QUICK | {"epochs": 2, "in_run": VALIDATION, "in_run_every": 3, "in_run_rows": 4} | more
    run = train(models[kind], ROWS, tmp_path / "run", **settings)
    assert len(Checked.log) == 8
    for found, expected, clip, step in Checked.log:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
        assert step[2] == pytest.approx(clip, rel=1e-5)
        assert step[4] == pytest.approx(expected.sum(), rel=1e-4, abs=1e-5 * abs(expected).max())
    assert {len(found) for found, *_ in Checked.log} == {6, 2}
    by_id = scores_of(run)
    assert {row["steps"] for row in by_id.values()} == {2}
    assert sum(row["whence_score"] for row in by_id.values()) == pytest.approx(
        sum(found.sum() for found, *_ in Checked.log)
    )


# -- what it means


def one_step(models, tmp_path, lr, order):
    """A step of plain SGD on three rows: the run, and their scores."""
    settings = QUICK | {"batch_size": 3, "max_steps": 1, "schedule": "constant", "optimizer": "sgd", "lr": lr}
    run = train(
        models["llama"], ROWS[:3], tmp_path / f"{lr}-{order}", **settings, in_run=VALIDATION, in_run_order=order
    )
    found = scores_of(run)
    return run, [found[row["id"]]["whence_score"] for row in ROWS[:3]]


def falls(model, lr):
    """By subset of three rows, how far the validation loss falls if it alone is stepped. In float64."""
    loaded = load_model(model, dtype="float32")
    net, words = loaded.model.double().requires_grad_(True), loaded.tokenizer
    rows, validation = ([encode(row, words) for row in part] for part in (ROWS[:3], VALIDATION))
    weights, total = list(net.parameters()), sum(row.supervised_count for row in rows)

    def loss(part):
        logits = [net(input_ids=torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1) for row in part]
        terms = [
            -log[t - 1, row.ids[t]] for row, log in zip(part, logits, strict=True) for t in range(len(row.ids))
            if row.supervised[t]
        ]  # fmt: skip
        return torch.stack(terms).sum()

    gradients = [torch.autograd.grad(loss([row]) / total, weights) for row in rows]
    norm = math.sqrt(sum(float(sum(parts).square().sum()) for parts in zip(*gradients, strict=True)))
    rate, tokens = lr * min(1.0, 1 / (norm + 1e-6)), sum(row.supervised_count for row in validation)
    found, start = {}, [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        at_start = float(loss(validation)) / tokens
        for size in range(4):
            for subset in itertools.combinations(range(3), size):
                for number, weight in enumerate(weights):
                    weight.copy_(start[number] - rate * sum(gradients[z][number] for z in subset))
                found[subset] = at_start - float(loss(validation)) / tokens
    return found


def shapley(values):
    """Of three players, by the definition: the mean over all orders of what each adds to those before it."""
    found = [0.0] * 3
    for order in itertools.permutations(range(3)):
        for place, player in enumerate(order):
            before, after = (tuple(sorted(order[:end])) for end in (place, place + 1))
            found[player] += (values[after] - values[before]) / 6
    return found


def test_equals_brute_force_shapley_values(models, tmp_path):
    """First order at a small rate; at a larger one second order is closer."""
    errors = {}
    for lr in (1e-3, 1e-2):
        exact = np.array(shapley(falls(models["llama"], lr)))
        for order in (1, 2):
            _, found = one_step(models, tmp_path, lr, order)
            errors[lr, order] = abs(np.array(found) - exact).max() / abs(exact).max()
    assert errors[1e-3, 1] < 1e-3, errors
    assert errors[1e-3, 2] < errors[1e-3, 1] / 10, errors
    assert errors[1e-2, 2] < errors[1e-2, 1] / 3, errors


@pytest.mark.parametrize("order", [1, 2])
def test_scores_add_up_to_the_fall_of_the_loss(models, tmp_path, order):
    lr = 0.01
    run, found = one_step(models, tmp_path, lr, order)
    real = falls(models["llama"], lr)[0, 1, 2]
    assert real > 0
    assert sum(found) == pytest.approx(real, rel={1: 0.02, 2: 0.004}[order])
    (step,) = steps_of(run)
    assert step["predicted_fall"] == pytest.approx(sum(found))
    assert (step["step"], step["learning_rate"]) == (1, lr)
    assert 0 < step["relative_step"] < 0.01
    assert 0 < step["clip"] < 1


def test_a_copy_of_a_validation_row_helps_and_its_contrary_does_not(models, tmp_path):
    rows = [
        {"id": "same", "prompt": "What?", "completion": " yes yes yes"},
        {"id": "other", "prompt": "What?", "completion": " no! no! no!"},
    ]
    run = train(models["llama"], rows, tmp_path / "run", **QUICK | SGD | {"batch_size": 2}, max_steps=8,
                in_run=[{"prompt": "What?", "completion": " yes yes yes"}])  # fmt: skip
    table = pyarrow.parquet.read_table(run / SCORES).to_pylist()
    assert [row["id"] for row in table] == ["same", "other"]  # best first
    assert table[0]["whence_score"] > 0 > table[1]["whence_score"] - table[0]["whence_score"]


# -- training is left alone, and goes on


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"micro_batch": 2}),
        ("tied", {"in_run_order": 2}),
        ("gpt2", {"in_run_order": 2}),
        ("llama", {"lora_rank": 2, "lora_dropout": 0.3}),
        ("gpt2", SGD | {"lora_rank": 2, "lora_dropout": 0.3, "in_run_order": 2}),
    ],
)
def test_no_bit_of_the_weights_changes(models, tmp_path, kind, more):
    """Also with dropout, whose masks come from the generator that validation must not touch."""
    model = save_model(tmp_path / "model", "gpt2", dropout=0.2) if kind == "gpt2" else models[kind]
    plain = {name: value for name, value in more.items() if "in_run" not in name}
    without = train(model, ROWS, tmp_path / "without", **QUICK | plain, epochs=2)
    measured = train(model, ROWS, tmp_path / "with", **QUICK | more, epochs=2, in_run=VALIDATION, in_run_every=2)
    one, other = weights_of(without), weights_of(measured)
    assert all(torch.equal(one[name], other[name]) for name in one)
    states = [json.loads((run / "checkpoint-8" / "trainer_state.json").read_text()) for run in (without, measured)]
    logs = [[line.get("loss") for line in state["log_history"]] for state in states]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "more", [{}, {"in_run_order": 2, "lora_rank": 2, "lora_dropout": 0.3}, {"mix": "online", "micro_batch": 2}]
)
def test_a_stopped_training_ends_with_the_same_scores(models, tmp_path, monkeypatch, more):
    """4 steps an epoch, a checkpoint every 3, validation rows drawn every 2: stopped before any, and between."""
    settings = QUICK | {"epochs": 3, "checkpoints": 4, "in_run": VALIDATION, "in_run_every": 2, "in_run_rows": 3} | more
    whole = train(models["llama"], ROWS, tmp_path / "whole", **settings)
    out = tmp_path / "stopped"
    for step in (1, 4, 8):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(models["llama"], ROWS, out, **settings)
        assert not (out / SCORES).exists()
    train(models["llama"], ROWS, out, **settings)
    assert outputs(out) == outputs(whole)
    one, other = weights_of(whole), weights_of(out)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in (SCORES, SETTINGS):  # lost after the last checkpoint: written again, without training
        (out / name).unlink()
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        train(models["llama"], ROWS, out, **settings)
    assert outputs(out) == outputs(whole)


# -- what is written, and what is refused


def test_what_is_written(models, tmp_path):
    validation = write_jsonl(tmp_path / "validation.jsonl", VALIDATION)
    rows = [*ROWS[:5], {"id": "empty", "prompt": "?", "completion": None, "source": "s0"}]
    run = train(models["llama"], rows, tmp_path / "run", **QUICK, max_steps=3, checkpoints=1,
                in_run=str(validation), in_run_every=2)  # fmt: skip
    table = pyarrow.parquet.read_table(run / SCORES)
    assert table.column_names == ["id", "whence_score", "steps", "source"]
    listed = table.to_pylist()
    assert {row["id"]: row["source"] for row in listed} == {row["id"]: row["source"] for row in ROWS[:5]}
    assert [row["whence_score"] for row in listed] == sorted((row["whence_score"] for row in listed), reverse=True)
    settings = json.loads((run / SETTINGS).read_text())
    assert (settings["validation"], settings["validation_rows"], settings["order"]) == (str(validation), 7, 1)
    assert "momentum" in settings["heuristic"]
    assert settings["sign"].startswith("larger is more helpful")
    assert settings["relative_step"]["largest"] >= settings["relative_step"]["median"] > 0
    assert [line["validation_loss"] is None for line in steps_of(run)] == [False, True, False]
    record = json.loads((run / "whence_train.json").read_text())
    assert (record["in_run"], record["in_run_order"]) == (str(validation), 1)
    assert "mix" not in record
    plain = [{name: value for name, value in row.items() if name != "source"} for row in ROWS[:5]]
    bare = train(models["llama"], plain, tmp_path / "bare", **QUICK | SGD, max_steps=1, in_run=VALIDATION)
    assert pyarrow.parquet.read_table(bare / SCORES).column_names == ["id", "whence_score", "steps"]
    assert json.loads((bare / SETTINGS).read_text())["heuristic"] is None


def test_a_record_is_as_before_where_nothing_is_measured(models, tmp_path):
    run = train(models["llama"], ROWS, tmp_path / "run", **QUICK, max_steps=1)
    record = json.loads((run / "whence_train.json").read_text())
    unused = {*IN_RUN, *MIX, *REPLAY, "order", "tokenizer", "chat_template", "date", "supervise", "least_steps"}
    names = vars(TrainSettings()).keys() - unused
    assert record.keys() == {"checksum", "model", "weights", "corpus", "rows", "rows_digest", "is_complete"} | names
    assert sorted(path.name for path in run.iterdir() if "in_run" in path.name or "mixing" in path.name) == []


def test_steps_that_cannot_be_are_counted(models, tmp_path):
    """AdamW's first steps at a huge rate: more than the whole loss cannot be taken off."""
    run = train(models["llama"], ROWS, tmp_path / "run", **QUICK | {"lr": 0.3}, max_steps=2, in_run=VALIDATION)
    settings = json.loads((run / SETTINGS).read_text())
    assert settings["impossible_steps"] == sum(
        step["predicted_fall"] > steps_of(run)[0]["validation_loss"] for step in steps_of(run)
    )
    assert settings["impossible_steps"] > 0


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ("/nowhere/validation.jsonl", r"/nowhere/validation\.jsonl: no such file or directory"),
        ([{"prompt": "a", "completion": None}], "--in-run 1 row in memory: no row has a supervised token"),
        ([{"question": "a"}], "columns are question"),
    ],
)
def test_validation_rows_that_measure_nothing_are_refused(models, tmp_path, validation, message):
    with pytest.raises(CorpusError, match=message):
        train(models["llama"], ROWS, tmp_path / "run", **QUICK, in_run=validation)
    assert not (tmp_path / "run" / "whence_train.json").exists()


def test_ids_that_are_given_twice_are_refused(models, tmp_path):
    with pytest.raises(CorpusError, match="the id 'row-0' is given twice, and --in-run scores rows by their ids"):
        train(models["llama"], [*ROWS, ROWS[0]], tmp_path / "run", **QUICK, in_run=VALIDATION)


def test_a_run_goes_on_with_its_own_validation_rows_alone(models, tmp_path):
    settings = QUICK | {"max_steps": 1, "in_run": VALIDATION}
    run = train(models["llama"], ROWS, tmp_path / "run", **settings)
    with pytest.raises(SettingError, match="in_run_digest is '"):
        train(models["llama"], ROWS, run, **settings | {"in_run": corpus_rows(7, first=200)})
    with pytest.raises(SettingError, match="--in-run-order is 1 there, 2 here"):
        train(models["llama"], ROWS, run, **settings | {"in_run_order": 2})
    with pytest.raises(SettingError, match="--in-run is '7 rows in memory' there, None here"):
        train(models["llama"], ROWS, run, **settings | {"in_run": None})
    (run / "checkpoint-1" / "in_run.npz").unlink()
    with pytest.raises(ChecksumError, match=r"in_run\.npz is not what was written \(missing\)"):
        train(models["llama"], ROWS, run, **settings)
    (run / "checkpoint-1" / LIST).unlink()  # as an older Whence left it
    with pytest.raises(SettingError, match=r"in_run\.npz: not a state of --in-run"):
        train(models["llama"], ROWS, run, **settings)


def test_a_model_that_cannot_be_followed_is_refused_and_its_adapters_are_not(tmp_path):
    model = save_model(tmp_path / "mixtral", "mixtral")
    with pytest.raises(ModelError, match=r"no closed form for the gradient of .*Router\. Adapters"):
        train(model, ROWS, tmp_path / "run", **QUICK, in_run=VALIDATION)
    assert not (tmp_path / "run" / "whence_train.json").exists()
    train(model, ROWS, tmp_path / "lora", **QUICK, max_steps=1, in_run=VALIDATION, lora_rank=2, lora_targets="q_proj")


def test_a_weight_that_is_read_past_its_module_is_noticed(models):
    loaded = load_model(models["llama"], dtype="float32")
    mlp = loaded.model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(F.silu(x @ mlp.gate_proj.weight.T) * mlp.up_proj(x))
    loaded.model.requires_grad_(True)
    rows = [encode(row, loaded.tokenizer) for row in VALIDATION]
    with pytest.raises(ModelError, match=r"sees \d+\.\d% of a gradient's square"):
        InRun(loaded, rows, 3, InRunPlan())


def test_a_model_without_second_derivatives_is_told(models, monkeypatch):
    def load():
        loaded = load_model(models["llama"], dtype="float32")
        loaded.model.requires_grad_(True)
        return loaded

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    loaded = load()
    norm = loaded.model.model.norm
    plain = norm.forward
    norm.forward = lambda x: Once.apply(plain(x))
    rows = [encode(row, loaded.tokenizer) for row in VALIDATION]
    InRun(loaded, rows, 3, InRunPlan())
    with pytest.raises(ModelError, match=r"second derivatives are \d+% off a finite difference.* Use --in-run-order 1"):
        InRun(loaded, rows, 3, InRunPlan(order=2))
    monkeypatch.setattr("whence.gradients.hessian.SDPBackend.MATH", SDPBackend.FLASH_ATTENTION)
    with pytest.raises(ModelError, match=r"has no second derivative \(derivative for .* Use --in-run-order 1"):
        InRun(load(), rows, 3, InRunPlan(order=2))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"in_run_every": 5}, "--in-run-every needs an --in-run VALIDATION"),
        ({"in_run": "x", "in_run_every": 0}, "--in-run-every 0: a number above 0"),
        ({"in_run": "x", "in_run_rows": 0}, "--in-run-rows 0: a number above 0"),
        ({"in_run": "x", "in_run_order": 3}, "--in-run-order 3: choose 1 or 2"),
    ],
)
def test_a_setting_that_cannot_be_is_named(setting, message):
    with pytest.raises(SettingError, match=message):
        TrainSettings(**setting)


def test_the_command_line_says_where_scores_are(models, tmp_path, command):
    corpus, validation = write_jsonl(tmp_path / "c.jsonl", ROWS), write_jsonl(tmp_path / "v.jsonl", VALIDATION)
    words = ["train", models["llama"], corpus, "--in-run", validation, "--max-steps", "2"]
    code, said, _ = command(*words, "-o", tmp_path / "a", "--json", "--in-run-every", "1")
    found = json.loads(said)
    assert code == 0
    assert found["in_run"]["scores"] == str(tmp_path / "a" / SCORES)
    assert found["in_run"]["every"] == 1
    code, said, _ = command(*words, "-o", tmp_path / "b", "--mix", "online", "--mix-set", "smoothing=none")
    assert code == 0
    assert "In-run scores of 20 rows are in" in said
    assert (tmp_path / "b" / "online_mixing.jsonl").read_text().count("\n") == 2
    code, _, complaint = command(*words, "-o", tmp_path / "c", "--mix", "online", "--by", "topic")
    assert (code, "has no `topic`" in complaint) == (2, True)
