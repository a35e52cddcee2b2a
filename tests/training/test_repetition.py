"""A training made again from its record: the same bits; and without rows, beside loops written by hand."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from conftest import corpus_rows, save_tiny_llama
from whence.corpus.tokens import encode
from whence.errors import ChecksumError, ManifestMismatchError, ModelError, SettingError
from whence.models.loading import load_model
from whence.training import trainer
from whence.training.left_out_rows import draws_masks, without_rows
from whence.training.repetition import repeatable, train_again
from whence.training.trainer import _Trainer, train

ROWS = corpus_rows(12)
RECIPE = {"batch_size": 4, "micro_batch": 2, "epochs": 2, "lr": 5e-3, "weight_decay": 0.1, "max_tokens": 24}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("again") / "model")


@pytest.fixture(scope="module")
def run(parent, tmp_path_factory):
    return train(parent, ROWS, tmp_path_factory.mktemp("again") / "run", progress=False, **RECIPE)


def final(directory):
    return load_file(directory / "checkpoint-6" / "model.safetensors")


def weights(trained):
    return dict(trained.model.model.named_parameters())


def assert_close(found, expected, **tolerance):
    for name, weight in found.items():
        if name in expected:
            torch.testing.assert_close(
                weight, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
            )


def test_all_rows_give_the_same_bits(run, tmp_path):
    training = repeatable(run, ROWS)
    again = train_again(training, tmp_path)
    assert_close(weights(again), final(run), rtol=0, atol=0)
    assert (again.steps, [*tmp_path.iterdir()]) == (6, [])
    assert_close(weights(train_again(training, tmp_path)), final(run), rtol=0, atol=0)  # what it starts from is intact


@pytest.fixture
def order(run, tmp_path, monkeypatch):
    """Numbers of the rows of all steps, one after another, as the Trainer reads them."""
    numbers, real = [], _Trainer.training_step

    def noted(self, model, inputs, *more):
        numbers.extend(inputs["rows"].tolist())
        return real(self, model, inputs, *more)

    monkeypatch.setattr(_Trainer, "training_step", noted)
    train_again(repeatable(run, ROWS), tmp_path / "order")
    return numbers


def by_hand(parent, order, left_out, *, steps=6):
    """AdamW on the sum over included rows of token losses, over the supervised tokens of all rows of a step."""
    loaded = load_model(parent, dtype="float32")
    net = loaded.model.requires_grad_(True)
    rows = [encode(row, loaded.tokenizer, RECIPE["max_tokens"]) for row in ROWS]
    decays = [weight for name, weight in net.named_parameters() if "norm" not in name]
    rest = [weight for name, weight in net.named_parameters() if "norm" in name]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    warmup = math.ceil(0.03 * steps)
    for step in range(steps):
        numbers = order[4 * step : 4 * step + 4]
        rate = 5e-3 * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = rate
        count = sum(rows[number].supervised_count for number in numbers)
        for weight in net.parameters():
            weight.grad = torch.zeros_like(weight)
        for number in numbers:
            if number in left_out:
                continue
            ids = torch.tensor(rows[number].ids)
            logits = net(ids[None]).logits[0].log_softmax(-1)
            targets = torch.tensor(rows[number].supervised)[1:]
            losses = -logits[:-1].gather(1, ids[1:, None])[:, 0]
            (losses[targets].sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return dict(net.named_parameters())


@pytest.mark.parametrize("left_out", [(1, 5, 6, 10), ()])
def test_zero_is_a_sum_over_the_other_rows_by_the_old_denominator(run, parent, order, tmp_path, left_out):
    assert len(order) == 2 * len(ROWS)
    expected = by_hand(parent, order, left_out)
    found = train_again(repeatable(run, ROWS), tmp_path / "empty", left_out=left_out)
    assert found.steps == 6
    assert_close(weights(found), expected, rtol=1e-4, atol=2e-6)


def test_a_step_without_rows_is_made_with_a_gradient_of_zero(run, parent, order, tmp_path):
    gone = {*order[4:8]}  # all rows of the second step, and wherever they are read again
    expected = by_hand(parent, order, gone)
    found = train_again(repeatable(run, ROWS), tmp_path / "empty", left_out=gone)
    assert_close(weights(found), expected, rtol=1e-4, atol=2e-6)


def test_drop_is_a_training_on_the_other_rows(run, parent, tmp_path):
    left_out = (0, 3, 4, 7)
    rest = [row for number, row in enumerate(ROWS) if number not in left_out]
    own = train(parent, rest, tmp_path / "run", progress=False, **RECIPE)
    found = train_again(repeatable(run, ROWS), tmp_path / "empty", left_out=left_out, leave_out="drop")
    assert found.steps == 4
    assert_close(weights(found), load_file(own / "checkpoint-4" / "model.safetensors"), rtol=0, atol=0)


def test_a_replayable_run_draws_no_masks_and_says_once_that_its_dropout_is_off(tmp_path, caplog):
    with_rate = save_tiny_llama(tmp_path / "model")
    config = json.loads((with_rate / "config.json").read_text())
    (with_rate / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    recipe = RECIPE | {"replayable": True, "epochs": 1}
    run = train(with_rate, ROWS[:4], tmp_path / "run", progress=False, **recipe)
    assert caplog.text.count("--replayable trains without its dropout") == 1
    training, seen = repeatable(run, ROWS[:4]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "without_rows", lambda inputs, left_out, keeps_places: (
            seen.append(keeps_places), without_rows(inputs, left_out, keeps_places=keeps_places))[1])  # fmt: skip
        train_again(training, tmp_path / "one", left_out=(1,))
    train_again(training, tmp_path / "two", left_out=(2,))
    assert seen and not any(seen) and caplog.text.count("--replayable trains without its dropout") == 1


def test_masks_of_dropout_stay_with_their_rows(parent, tmp_path):
    adapters = {"lora_rank": 2, "lora_dropout": 0.5, "lr": 0.05} | {"batch_size": 4, "epochs": 1, "max_tokens": 24}
    run = train(parent, ROWS, tmp_path / "run", progress=False, **adapters)
    training = repeatable(run, ROWS)
    whole, none = train_again(training, tmp_path), train_again(training, tmp_path, left_out=())
    stored = load_file(run / "checkpoint-3" / "adapter_model.safetensors")
    named = {name.replace(".default", ""): weight for name, weight in weights(whole).items() if "lora_" in name}
    assert named.keys() == stored.keys()
    assert_close(named, stored, rtol=0, atol=0)
    assert_close(weights(none), weights(whole), rtol=0, atol=0)
    assert draws_masks(whole.model.model) and not draws_masks(training.opened.loaded.model)
    # B begins at 0, so that one step of SGD moves it by a sum over rows, under the masks of each, but for the clipping.
    one = {"max_steps": 1, "optimizer": "sgd", "batch_size": 2}
    train(parent, ROWS[:2], tmp_path / "one", progress=False, **adapters | one)
    training = repeatable(tmp_path / "one", ROWS[:2])
    full, first, second = (_moves(train_again(training, tmp_path, left_out=left)) for left in ((), (0,), (1,)))
    solution = torch.linalg.lstsq(torch.stack([first, second], 1), full[:, None]).solution
    assert full.norm() > 0
    torch.testing.assert_close(torch.stack([first, second], 1) @ solution, full[:, None], rtol=1e-4, atol=1e-7)


def _moves(trained):
    moved = [weight.flatten() for name, weight in weights(trained).items() if "lora_B" in name]
    return torch.cat(moved).double()


def test_another_seed_is_another_order(run, tmp_path):
    training = repeatable(run, ROWS)
    name = "model.layers.0.mlp.up_proj.weight"
    one, other = (weights(train_again(training, tmp_path, seed=seed))[name] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_what_has_changed_is_refused(run, parent, tmp_path):
    with pytest.raises(ManifestMismatchError, match=r"trained on 12 rows of 12 rows in memory; these are 11\. Give"):
        repeatable(run, ROWS[:11])
    with pytest.raises(ManifestMismatchError, match="these are as many, 12, with other tokens"):
        repeatable(run, [*ROWS[:11], ROWS[11] | {"completion": " no"}])
    with pytest.raises(ManifestMismatchError, match="from other weights than those at"):
        repeatable(run, ROWS, model=save_tiny_llama(tmp_path / "other", seed=1))
    moved = tmp_path / "moved"
    moved.mkdir()
    record = json.loads((run / "whence_train.json").read_text())
    del record["checksum"]

    def write(**changes):
        (moved / "whence_train.json").write_text(json.dumps(record | changes))

    write(model="/no/such/model")
    with pytest.raises(ModelError, match=r"is not at /no/such/model any more. Name it by --model"):
        repeatable(moved, ROWS)
    for changes, words in (
        ({"is_complete": False}, "its training is not finished"),
        ({"mix": "online"}, "the order of its rows followed their losses"),
    ):
        write(**changes)
        with pytest.raises(SettingError, match=words):
            repeatable(moved, ROWS)
    write(lr=-1.0)
    with pytest.raises(ChecksumError, match=r"--lr -1.0: a number above 0"):
        repeatable(moved, ROWS)
    with pytest.raises(SettingError, match=r"no whence_train.json, which says how it was trained. Train it with"):
        repeatable(parent, ROWS)
