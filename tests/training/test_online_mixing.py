"""The online mixer by hand-worked numbers and by what must hold of any of its options; and trainings that use it."""

import itertools
import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import stop_at

from conftest import corpus_rows
from whence.errors import ChecksumError, CorpusError, JobError, SettingError
from whence.models.saved_files import LIST
from whence.training.online_mixing import LOG, MixOptions, OnlineBatches, OnlineMixer, domains_of, read_options
from whence.training.recipe import TrainSettings
from whence.training.trainer import train

OPTIONS = [
    MixOptions(reward=reward, weighted=weighted, smoothing=smoothing, update=update)
    for reward, weighted, smoothing, update in itertools.product(
        ("loss", "exp", "scaled"), (True, False), (0.9, None), ("gibbs", "linear")
    )
]
ROWS = corpus_rows(20)
QUICK = {"batch_size": 6, "lr": 1e-2, "progress": False}


def fed(mixer, losses, steps, seed=0):
    """Draw domains by the mixer's probabilities and feed it their losses; the probabilities of every step."""
    rng, found = random.Random(seed), []
    for _ in range(steps):
        shares = mixer.probs()
        found.append(shares)
        domain = rng.choices(list(shares), list(shares.values()))[0]
        mixer.update(domain, losses[domain])
    return found


def test_the_papers_numbers_by_hand():
    """K = 2: e_1 = 1/2; R_a = .1 * 2 / .5 = .4; e_2 = sqrt(ln 2 / 4) = .4163; p_a = .4163 + .1674 / (1 + exp(-.2))."""
    mixer = OnlineMixer(["a", "b"])
    assert mixer.probs() == {"a": 0.5, "b": 0.5}
    mixer.update("a", 2.0)
    assert mixer.state_dict() == {"domains": ["a", "b"], "rewards": [pytest.approx(0.4), 0.0], "steps": 1}
    least = math.sqrt(math.log(2) / 4)
    share = least + (1 - 2 * least) / (1 + math.exp(-0.5 * 0.4))
    assert mixer.probs() == pytest.approx({"a": share, "b": 1 - share})
    assert share == pytest.approx(0.5083, abs=1e-4)
    mixer.update("b", 1.0)  # R_b = .1 / p_b; e_2 weighs it
    least = math.sqrt(math.log(2) / 6)
    share = least + (1 - 2 * least) / (1 + math.exp(math.sqrt(math.log(2) / 4) * (0.1 / (1 - share) - 0.4)))
    assert mixer.probs()["a"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("options", "reward"),
    [
        ({}, 0.1 * 3 / 0.5),
        ({"weighted": False}, 0.1 * 3),
        ({"smoothing": None}, 3 / 0.5),
        ({"smoothing": 0.0, "weighted": False}, 3.0),
        ({"reward": "scaled", "smoothing": None, "weighted": False}, 0.3),
        ({"reward": "scaled", "scale": 4.0, "smoothing": None}, 1.5),
        ({"reward": "exp", "smoothing": None, "weighted": False}, math.exp(3)),
    ],
)
def test_rewards_by_hand(options, reward):
    mixer = OnlineMixer(["a", "b"], MixOptions(**options))
    mixer.update("b", 3.0)
    assert mixer.state_dict()["rewards"] == [0.0, pytest.approx(reward)]


def test_the_linear_update_by_hand():
    """Rewards 1 and 3 at step 3 of K = 2: e = sqrt(ln 2 / 6) = .3399; p_b = e + (1 - 2 e) * 3/4."""
    mixer = OnlineMixer(["a", "b"], MixOptions(update="linear", weighted=False, smoothing=None))
    mixer.update("a", 1.0)
    mixer.update("b", 3.0)
    least = math.sqrt(math.log(2) / 6)
    assert mixer.probs()["b"] == pytest.approx(least + (1 - 2 * least) * 0.75)


def test_warm_up_follows_the_prior_and_the_prior_weighs_the_rest():
    options = MixOptions(warmup=3, prior={"a": 3.0, "b": 1.0}, weighted=False, smoothing=None)
    mixer = OnlineMixer(["a", "b"], options)
    for _ in range(3):
        assert mixer.probs() == {"a": 0.75, "b": 0.25}
        mixer.update("b", 0.0)
    least = math.sqrt(math.log(2) / 8)
    assert mixer.probs()["a"] == pytest.approx(least + (1 - 2 * least) * 0.75)  # no rewards: the prior alone


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_keeps_the_floor_and_sums_to_one(options):
    domains = list("abcde")
    mixer = OnlineMixer(domains, options)
    losses = {domain: 0.5 + place for place, domain in enumerate(domains)}
    for t, shares in enumerate(fed(mixer, losses, 400), start=1):
        least = min(1 / 5, math.sqrt(math.log(5) / (5 * t)))
        assert min(shares.values()) >= least - 1e-12
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_domain_of_larger_loss_gets_more(options):
    """Little more where rewards are a tenth and a moving mean, whose weight e falls."""
    found = fed(OnlineMixer(["low", "high"], options), {"low": 1.0, "high": 4.0}, 300)
    is_weak = options.reward == "scaled" and options.update == "gibbs" and options.smoothing is not None
    assert sum(shares["high"] for shares in found[100:]) / 200 > (0.501 if is_weak else 0.52)


@pytest.mark.parametrize("options", [option for option in OPTIONS if option.weighted or option.smoothing is not None])
def test_equal_losses_keep_it_uniform(options):
    """On average over draws: a moving mean ends alike for all, weighted sums are unbiased. Plain sums feed on draws."""
    shares = [fed(OnlineMixer(list("abc"), options), dict.fromkeys("abc", 2.0), 200, seed=s)[-1] for s in range(20)]
    for domain in "abc":
        assert sum(share[domain] for share in shares) / 20 == pytest.approx(1 / 3, abs=0.1)


def test_equal_losses_in_turn_stay_uniform():
    mixer = OnlineMixer(["a", "b", "c"], MixOptions(weighted=False, smoothing=0.0))
    for _ in range(50):
        for domain in "abc":
            mixer.update(domain, 2.0)
    assert mixer.probs() == pytest.approx(dict.fromkeys("abc", 1 / 3))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_loss_of_ten_thousand_overflows_nothing(options):
    mixer = OnlineMixer(["a", "b", "c"], options)
    for shares in fed(mixer, {"a": 1e4, "b": 1e4, "c": 0.0}, 500):
        assert all(math.isfinite(share) and share > 0 for share in shares.values())


@pytest.mark.parametrize("options", OPTIONS[:6])
def test_a_state_makes_the_round_trip_through_json(options):
    losses = {"a": 1.0, "b": 3.0, "c": 2.0}
    mixer, again = OnlineMixer(list("abc"), options), OnlineMixer(list("abc"), options)
    fed(mixer, losses, 37)
    again.load_state_dict(json.loads(json.dumps(mixer.state_dict())))
    assert again.probs() == mixer.probs()
    assert fed(again, losses, 20, seed=1) == fed(mixer, losses, 20, seed=1)
    with pytest.raises(SettingError, match="the state is of a, b, c; domains are a, b"):
        OnlineMixer(["a", "b"]).load_state_dict(mixer.state_dict())


def test_one_domain_is_drawn_always():
    mixer = OnlineMixer(["only"])
    mixer.update("only", 5.0)
    assert mixer.probs() == {"only": 1.0}


def test_options_come_as_text_too():
    given = {"reward": "exp", "smoothing": "none", "weighted": "False", "warmup": "20", "prior.a": "2", "prior.b": "1"}
    assert read_options(given) == MixOptions(
        reward="exp", smoothing=None, weighted=False, warmup=20, prior={"a": 2.0, "b": 1.0}
    )
    assert read_options({"smoothing": 0.5, "prior": {"a": 1.0}}) == MixOptions(smoothing=0.5, prior={"a": 1.0})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speed": "1"}, "--mix-set speed: choose among prior, reward"),
        ({"reward": "log"}, "--mix-set reward=log: choose one of loss, exp, scaled"),
        ({"update": "softmax"}, "--mix-set update=softmax: choose one of gibbs, linear"),
        ({"smoothing": "1"}, r"--mix-set smoothing=1.0: a share"),
        ({"smoothing": "much"}, "--mix-set smoothing=much: a number"),
        ({"weighted": "maybe"}, "--mix-set weighted=maybe: true or false"),
        ({"scale": "0"}, r"--mix-set scale=0\.0: a number above 0"),
        ({"warmup": "-1"}, "--mix-set warmup=-1: a number of steps"),
        ({"prior.a": "0"}, r"--mix-set prior\.a=0\.0: a number above 0"),
        ({"prior.a": "x"}, r"--mix-set prior\.a=x: a number"),
    ],
)
def test_options_that_cannot_be_are_named(given, message):
    with pytest.raises(SettingError, match=message):
        read_options(given)
    with pytest.raises(SettingError, match=message):
        TrainSettings(mix="online", mix_set=given)


def test_what_no_mixer_can_use_is_refused():
    for domains in ([], ["a", "a"]):
        with pytest.raises(SettingError, match="different names are expected"):
            OnlineMixer(domains)
    with pytest.raises(SettingError, match="the prior is of a; the domains are a, b"):
        OnlineMixer(["a", "b"], MixOptions(prior={"a": 1.0}))
    mixer = OnlineMixer(["a", "b"])
    with pytest.raises(SettingError, match="no domain 'c'"):
        mixer.update("c", 1.0)
    with pytest.raises(JobError, match="the loss of a is nan at step 1"):
        mixer.update("a", math.nan)
    for settings, message in (
        ({"mix": "offline"}, "--mix offline: online is expected"),
        ({"by": "topic"}, "--by and --mix-set need --mix online"),
    ):
        with pytest.raises(SettingError, match=message):
            TrainSettings(**settings)


# -- rows


def test_no_row_comes_again_before_all_of_its_domain_have(tmp_path):
    rows = {"a": list(range(7)), "b": list(range(7, 12))}
    batches = OnlineBatches(rows, tmp_path, MixOptions(), seed=0)
    batches.load(None)
    drawn = {"a": [], "b": []}
    for step in range(30):
        found = batches.draw(step, 4)
        drawn[batches.domain] += found
        batches.add(1.0)
        batches.close(step)
    for domain, size in (("a", 7), ("b", 5)):
        epochs = [drawn[domain][start : start + size] for start in range(0, len(drawn[domain]), size)]
        assert all(sorted(epoch) == rows[domain] for epoch in epochs[:-1])
        assert len(set(map(tuple, epochs[:-1]))) > 1  # each in an order of its own
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["epochs"] == {"a": round(len(drawn["a"]) / 7, 4), "b": round(len(drawn["b"]) / 5, 4)}
    assert lines[0]["probs"] == {"a": 0.5, "b": 0.5}


def test_same_seed_same_rows_and_another_other_ones(tmp_path):
    def drawn(seed):
        batches = OnlineBatches({"a": list(range(9)), "b": list(range(9, 18))}, tmp_path, MixOptions(), seed=seed)
        batches.load(None)
        found = []
        for step in range(12):
            found += batches.draw(step, 2)
            batches.add(2.0 if batches.domain == "a" else 1.0)
            batches.close(step)
        return found

    assert drawn(0) == drawn(0) != drawn(1)


def test_domains_are_the_values_of_a_column():
    assert domains_of(["x", "y", "x", 3], list("abcd"), by="topic") == {"x": [0, 2], "y": [1], "3": [3]}
    with pytest.raises(CorpusError, match="row b has no `topic`, by which --mix online is to divide"):
        domains_of(["x", None], ["a", "b"], by="topic")
    with pytest.raises(CorpusError, match="every row has the same `topic`, 'x'"):
        domains_of(["x", "x"], ["a", "b"], by="topic")


# -- trainings


def weights_of(run, step):
    return load_file(run / f"checkpoint-{step}" / "model.safetensors")


def lines_of(run):
    return [json.loads(line) for line in (run / LOG).read_text().splitlines()]


@pytest.mark.parametrize("more", [{}, {"micro_batch": 2, "mix_set": {"update": "linear", "warmup": "2"}}])
def test_a_stopped_training_ends_with_the_same_weights_and_log(tiny_llama, tmp_path, monkeypatch, more):
    settings = QUICK | {"epochs": 3, "checkpoints": 4, "mix": "online"} | more  # 4 steps an epoch, checkpoints each 3
    whole = train(tiny_llama, ROWS, tmp_path / "whole", **settings)
    out = tmp_path / "stopped"
    for step in (2, 4, 8):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(tiny_llama, ROWS, out, **settings)
    train(tiny_llama, ROWS, out, **settings)
    one, other = weights_of(whole, 12), weights_of(out, 12)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / LOG).read_bytes() == (out / LOG).read_bytes()
    assert [line["step"] for line in lines_of(out)] == list(range(1, 13))
    record = json.loads((out / "whence_train.json").read_text())
    assert (record["mix"], record["by"], "in_run" in record) == ("online", None, False)
    (out / "checkpoint-12" / "online_mixing.json").unlink()
    with pytest.raises(ChecksumError, match=r"online_mixing\.json is not what was written \(missing\)"):
        train(tiny_llama, ROWS, out, **settings)
    (out / "checkpoint-12" / LIST).unlink()  # as an older Whence left it
    with pytest.raises(SettingError, match="not a state of --mix online"):
        train(tiny_llama, ROWS, out, **settings)


def test_a_step_trains_on_one_domain_and_its_loss_is_the_reward(tiny_llama, tmp_path, monkeypatch):
    from transformers import Trainer

    seen, real = [], Trainer.training_step

    def noted(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        seen.append((inputs["input_ids"].shape[0], float(loss)))
        return loss

    monkeypatch.setattr(Trainer, "training_step", noted)
    rows = [row | {"topic": f"t{number % 3}"} for number, row in enumerate(ROWS)]
    run = train(tiny_llama, rows, tmp_path / "run", **QUICK | {"batch_size": 5}, max_steps=9, mix="online", by="topic")
    lines = lines_of(run)
    assert {line["domain"] for line in lines} <= {"t0", "t1", "t2"}
    assert [(5, line["loss"]) for line in lines] == seen  # batches are full, whatever the domain's size
    logged = json.loads((run / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
    assert [line["loss"] for line in lines] == pytest.approx([entry["loss"] for entry in logged if "loss" in entry])
    sizes = {f"t{n}": len(rows[n::3]) for n in range(3)}
    assert sum(round(share * sizes[domain]) for domain, share in lines[-1]["epochs"].items()) == 45


def test_a_corpus_without_the_column_is_refused_before_anything_is_written(tiny_llama, tmp_path):
    with pytest.raises(CorpusError, match="row row-0 has no `topic`"):
        train(tiny_llama, ROWS, tmp_path / "run", **QUICK, mix="online", by="topic")
    assert not (tmp_path / "run" / "whence_train.json").exists()
