"""The density sketch, against collisions counted by hand and the kernel that it estimates."""

import math

import pytest
import torch
from small_views import Tokens, asking

from conftest import random_examples, tiny_model
from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.numerics import generator
from whence.selection.scorers import density
from whence.selection.scorers.density import Density, Sketch, default_width

SMALL = {"functions": 300, "buckets": 500}


def test_collisions_counted_by_hand():
    """Two functions, floor(x) and floor(1/2 - x), modulo 4.

    0.2, 0.7, 1.2 and -0.3 fall into 0, 0, 1, 3 by the first and into 0, 3, 3, 0 by the second.
    """
    sketch = Sketch(torch.tensor([[1.0, -1.0]]), torch.tensor([0.0, 0.5]), 1.0, 4)
    codes = sketch.codes(torch.tensor([[0.2], [0.7], [1.2], [-0.3]]))
    assert codes.tolist() == [[0, 0], [0, 3], [1, 3], [3, 0]]
    sketch.add(codes[:3])
    sketch.add(codes[3:])
    assert sketch.counts.tolist() == [[2, 1, 0, 1], [2, 0, 0, 2]]
    expected = torch.tensor([2 + 2, 2 + 2, 1 + 2, 1 + 2], dtype=torch.float64) / 2 / 4
    torch.testing.assert_close(sketch.density(codes), expected)
    torch.testing.assert_close(sketch.density(sketch.codes(torch.tensor([[2.1]]))), torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0, 3.0])
def test_density_estimates_the_kernel(distance):
    """k(c) = integral from 0 to w of f(t / c) / c (1 - t / w), f half-normal; within five standard errors."""
    width, functions = 1.5, 5_000
    rng = generator(0, "test")
    sketch = Sketch(torch.randn(3, functions, generator=rng), torch.rand(functions, generator=rng), width, 3_000)
    away = torch.tensor([[1.0, 2.0, 3.0], [1.0 + distance, 2.0, 3.0]])
    codes = sketch.codes(away)
    sketch.add(codes)
    kernel = 1.0
    if distance:
        t = torch.linspace(0, width, 100_001, dtype=torch.float64)
        normal = 2 / distance / math.sqrt(2 * math.pi) * torch.exp(-((t / distance) ** 2) / 2)
        kernel = torch.trapezoid(normal * (1 - t / width), t).item()
    assert sketch.density(codes).tolist() == pytest.approx([(1 + kernel) / 2] * 2, abs=5 * 0.25 / functions**0.5)


def test_a_row_of_many_copies_is_common_and_an_outlier_rare():
    model, rows = tiny_model("llama"), random_examples(12, seed=1)
    scores = Density(**SMALL)(Tokens([*rows, *[rows[0]] * 12], model), asking("", ""))
    assert scores.shape == (2, 24)
    assert torch.equal(scores[0], scores[1])
    assert (scores[0, [0, *range(12, 24)]] <= math.log(24 / 13) + 1e-5).all()
    assert scores[0, 1:12].min() > scores[0, 0]
    assert scores.max() <= math.log(24) + 1e-5


def test_score_is_minus_log_of_the_share_of_collisions():
    model, rows = tiny_model("llama"), random_examples(2, seed=1)
    alone = Density(**SMALL, width=1e-3)(Tokens(rows, model), asking(""))
    torch.testing.assert_close(alone, torch.full((1, 2), math.log(2)))
    together = Density(**SMALL, width=1e9)(Tokens(rows, model), asking(""))
    torch.testing.assert_close(together, torch.zeros(1, 2))


def test_second_pass_equals_held_buckets(monkeypatch):
    model, rows = tiny_model("llama"), random_examples(12, seed=1)
    held = Density(**SMALL)(Tokens(rows, model), asking(""))
    monkeypatch.setattr(density, "STORED_BYTES", 0)
    assert torch.equal(Density(**SMALL)(Tokens(rows, model), asking("")), held)


def test_more_buckets_than_a_short_integer_holds():
    model, rows = tiny_model("llama"), random_examples(12, seed=1)
    assert torch.isfinite(Density(functions=50, buckets=40_000)(Tokens(rows, model), asking(""))).all()


def test_rows_without_an_embedding_are_not_counted():
    model, rows = tiny_model("llama"), random_examples(8, seed=1)
    rows = [Encoded([1 + i % 50 for i in row.ids], row.supervised) for row in rows]
    expected = Density(**SMALL, width=2.0)(Tokens(rows, model), asking(""))
    model.base.get_input_embeddings().weight[60] = math.nan
    broken = [Encoded([], []), *rows, Encoded([60, 5], [False, True])]
    scores = Density(**SMALL, width=2.0)(Tokens(broken, model), asking(""))
    torch.testing.assert_close(scores[:, 1:9], expected, rtol=0.02, atol=0.02)
    assert scores[0, [0, 9]].tolist() == [-math.inf] * 2


def test_no_row_with_tokens_has_no_scores():
    view = Tokens([Encoded([], [])] * 3, tiny_model("llama"))
    assert (Density(**SMALL)(view, asking("")) == -math.inf).all()


def test_default_width_is_half_the_median_distance():
    assert default_width(torch.tensor([[0.0], [1.0], [3.0]])) == 1.0
    assert default_width(torch.zeros(5, 2)) == 1.0
    assert default_width(torch.zeros(0, 1)) == 1.0


def test_width_comes_from_a_seeded_sample(monkeypatch):
    model, rows = tiny_model("llama"), random_examples(30, seed=1)
    monkeypatch.setattr(density, "SAMPLED", 5)
    first, again, other = (density._sample(Tokens(rows, model), seed) for seed in (0, 0, 1))
    assert len(first) == 5
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("wrong", [{"functions": 0}, {"buckets": 1}, {"width": 0.0}, {"width": math.nan}])
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(SettingError, match="expected"):
        Density(**wrong)
