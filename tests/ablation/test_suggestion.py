"""Descent through averages: slopes by finite differences, a mixture that is better, caps, mistakes."""

import numpy as np
import pytest
import torch
from test_ablate import HELD, QUICK, ROWS

from conftest import save_tiny_llama
from whence.ablation.heldout_losses import EvalSet, Losses, measure
from whence.ablation.member_training import train_pool
from whence.ablation.mixed_model import mixed_model
from whence.ablation.suggestion import _slopes, gain_of, suggest
from whence.corpus.tokens import encode
from whence.errors import CorpusError, SettingError
from whence.numerics import bootstrap_interval

SETS = [EvalSet(name, tuple(rows)) for name, rows in HELD.items()]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    place = tmp_path_factory.mktemp("suggesting")
    parent = str(save_tiny_llama(place / "parent"))
    return train_pool(parent, ROWS, place / "pool", progress=False, **QUICK)


def test_slopes_are_those_of_finite_differences(pool):
    made = mixed_model(pool)
    weights = np.array([0.5, 0.3, 0.2])
    rows = [[encode(row, made.model.tokenizer, 32) for row in one.rows] for one in SETS]
    loss, slopes = _slopes(made, dict(zip("abc", weights, strict=True)), rows, [0.7, 0.3], 64)

    def at(mixture):
        model = made.become(dict(zip("abc", mixture, strict=True)))
        return sum(
            weight * measure(model, one, max_tokens=32).loss for weight, one in zip([0.7, 0.3], SETS, strict=True)
        )

    assert loss == pytest.approx(at(weights), rel=1e-4)
    for along in (np.array([1.0, -1.0, 0.0]), np.array([0.0, 1.0, -1.0])):
        step = 0.01
        expected = (at(weights + step * along) - at(weights - step * along)) / (2 * step)
        assert float(slopes @ along) == pytest.approx(expected, rel=0.02, abs=2e-3)


def test_a_suggestion_is_better_than_all_alike_and_within_its_caps(pool):
    found = suggest(pool, SETS, steps=12, rate=1.0, progress=False)
    assert sum(found.mixture.values()) == pytest.approx(1)
    mean = {name: sum(losses.values()) / 2 for name, losses in
            (("found", found.losses), ("uniform", found.uniform), ("parent", found.parent))}  # fmt: skip
    assert mean["found"] < mean["uniform"] and found.mixture.get("c", 0.0) < 1 / 3, "c helps neither set"
    assert len(found.steps) == 12 and found.steps[-1]["loss"] < found.steps[0]["loss"]
    again = suggest(pool, SETS, steps=12, rate=1.0, progress=False)
    assert again.mixture == found.mixture
    held = suggest(pool, SETS, steps=12, rate=1.0, caps={"a": 0.2}, progress=False)
    assert held.mixture["a"] <= 0.2 + 1e-9
    only = suggest(pool, SETS, steps=12, rate=1.0, targets={"b": 1.0}, progress=False)
    assert max(only.mixture, key=only.mixture.get) == "b" and only.alone == "b"


def test_mistakes_are_told(pool):
    for options, said in (
        ({"steps": 0}, "--steps 0, --rows 64, --rate 0.5: numbers above 0"),
        ({"caps": {"z": 0.5}}, "z"),
        ({"caps": {"a": 0.1, "b": 0.1, "c": 0.1}}, "sum to 0.3"),
        ({"targets": {"z": 1.0}}, "--target z: no such evaluation set; there are a, b"),
        ({"targets": {"a": 0.0}}, "weights of 0 or more are expected"),
    ):
        with pytest.raises(SettingError, match=said):
            suggest(pool, SETS, progress=False, **options)
    with pytest.raises(CorpusError, match="the evaluation set e has no text"):
        suggest(pool, [EvalSet("e", ({"text": None},))], steps=1, progress=False)


def test_the_gain_over_all_alike_has_the_interval_of_a_bootstrap_over_rows():
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 30, (200,), generator=random)
    before = tokens * (3 + torch.randn(200, generator=random, dtype=torch.float64))
    after = before - tokens * (0.1 + 0.4 * torch.randn(200, generator=random, dtype=torch.float64))
    losses = [Losses(nats, tokens, tokens) for nats in (before, after)]
    gain, low, high = gain_of(losses[:1], losses[1:], [1.0])
    assert gain == pytest.approx(losses[0].loss - losses[1].loss)
    pairs = torch.stack([before - after, tokens.double()], 1)
    expected = bootstrap_interval(
        pairs, seed=0, resamples=2000, statistic=lambda drawn: drawn.sum(1)[:, 0] / drawn.sum(1)[:, 1]
    )
    assert (low, high) == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))
    one = [Losses(nats[:1], tokens[:1], tokens[:1]) for nats in (before, after)]
    assert gain_of(one[:1], one[1:], [1.0])[1] == -float("inf")
