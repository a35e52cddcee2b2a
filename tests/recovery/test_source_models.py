"""Shares of sources by models trained on each: the fit, what known runs correct, and a mixture that is known."""

import random

import pytest
import torch
from scipy.optimize import nnls

from conftest import save_tiny_llama
from whence.errors import ModelError, SettingError
from whence.models.difference import weight_difference
from whence.recovery import source_models
from whence.recovery.shadow_model import Recipe
from whence.recovery.source_models import (
    adapter_at_start,
    corrected,
    draw_by_shares,
    entries,
    fit_of_sources,
    mixture_by_runs,
    rows_interval,
    shares_of_rows,
)
from whence.training.trainer import train

WORDS = {"digits": "0123456789", "letters": "abcdefghij", "signs": "+-*/=<>()%"}
MIXTURE = {"digits": 24, "letters": 12, "signs": 4}


def made_rows(seed=0):
    rng = random.Random(seed)
    lengths = {"digits": 6, "letters": 12, "signs": 24}
    rows = [{"id": f"{name}-{n}", "source": name,
             "text": "".join(rng.choice(signs) for _ in range(lengths[name] + rng.randrange(4)))}
            for name, signs in WORDS.items() for n in range(30)]  # fmt: skip
    rng.shuffle(rows)
    return rows


ROWS = made_rows()
TOKENS = torch.tensor([len(row["text"]) for row in ROWS])
RECIPE = Recipe(rows=40, epochs=3.0, batch_size=4, optimizer="adamw", lr=1e-3, max_tokens=48)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("sources") / "base"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Of a known mixture, and its shares of tokens."""
    own = {name: [n for n, row in enumerate(ROWS) if row["source"] == name] for name in WORDS}
    inside = sorted(n for name, count in MIXTURE.items() for n in own[name][-count:])
    out = train(base, [ROWS[n] for n in inside], tmp_path_factory.mktemp("sources") / "run", epochs=3.0, batch_size=4,
                lr=1e-3, max_tokens=48, checkpoints=1, seed=5, progress=False)  # fmt: skip
    tokens = {name: sum(int(TOKENS[n]) for n in inside if ROWS[n]["source"] == name) for name in WORDS}
    return str(out), {name: count / sum(tokens.values()) for name, count in tokens.items()}


def estimated(base, path, work, **changed):
    settings = {"runs": 2, "seed": 0} | changed
    difference = weight_difference(base, path)
    return mixture_by_runs(base, ROWS, [row["source"] for row in ROWS], TOKENS, difference, RECIPE, work, **settings)


def test_the_fit_is_least_squares_without_negative_weights_over_all_parameters():
    rng = torch.Generator().manual_seed(0)
    parts = [{"a": torch.randn(3, 4, generator=rng), "b": torch.randn(5, generator=rng)} for _ in range(3)]
    weights = torch.tensor([2.0, -0.5, 1.0])
    target = {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in "ab"}
    matrix = torch.stack([torch.cat([part["a"].flatten(), part["b"]]) for part in parts], 1)
    right = torch.cat([target["a"].flatten(), target["b"]])
    found, _ = nnls(matrix.double().numpy(), right.double().numpy())
    assert found[1] == 0 and found[0] > 0, "one of them is held at 0"
    torch.testing.assert_close(
        fit_of_sources(parts, target, [9, 9, 9]).shares, torch.from_numpy(found / found.sum()), rtol=1e-4, atol=1e-6
    )
    of_rows = torch.from_numpy(found) * torch.tensor([10.0, 20.0, 40.0])
    torch.testing.assert_close(
        fit_of_sources(parts, target, [10, 20, 40]).shares, of_rows / of_rows.sum(), rtol=1e-4, atol=1e-6
    )
    longer = [part | {"b": torch.ones(7)} for part in parts]
    alone = fit_of_sources([{"a": part["a"]} for part in parts], {"a": target["a"]}, [1, 1, 1]).shares
    assert torch.equal(fit_of_sources(longer, target, [1, 1, 1]).shares, alone), (
        "another vocabulary's rows are left out"
    )
    assert fit_of_sources(parts[:1], {name: -part for name, part in parts[0].items()}, [1]).shares is None, (
        "it points the other way"
    )


def test_what_known_runs_are_off_by_is_taken_off_and_makes_the_interval():
    first = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    true, even = first.expand(2, 3), 1 / 3
    shares, half = corrected(first, even + 0.8 * (true - even), true)
    torch.testing.assert_close(shares, even + (first - even) / 0.8)
    assert float(half) == pytest.approx(0, abs=1e-12), "the runs agree"
    same = torch.tensor([-0.1, 0.2, -0.1], dtype=torch.float64)  # across the shares' own direction
    off = torch.tensor([[0.01, -0.02, 0.01]], dtype=torch.float64) * torch.tensor([[1.0], [-1.0]])
    across = same - ((same @ (first - even)) / (first - even).square().sum()) * (first - even)
    shares, half = corrected(first, true + across + off, true)
    torch.testing.assert_close(shares, first - across)
    # squares: 2 * 0.0006, freedom (2 - 1) * (3 - 1), and 1 + 1/2 for a mean of two; t of 2 is 4.303
    assert float(half) == pytest.approx((0.0012 / 2 * 1.5) ** 0.5 * 4.30265, rel=1e-4)
    assert float(corrected(first, true + across + off, true, misfit=2.0)[1]) == pytest.approx(2 * float(half))
    assert float(corrected(first, torch.full((2, 3), even).double(), true)[0].sum()) == pytest.approx(1)


@pytest.mark.parametrize(("noise", "other_recipe"), [(2.0, 1.0), (3.0, 2.0)])
def test_intervals_hold_where_one_source_is_all(noise, other_recipe):
    """In a linear world of 7 sources: with the mean error taken off, the source that was all was held by 16% and 1%."""
    whole, held, of_all, trials = torch.eye(7)[0], 0, 0, 60
    for trial in range(trials):
        rng = torch.Generator().manual_seed(trial)
        means = 0.5 * torch.randn(7, 400, generator=rng) + torch.randn(400, generator=rng)

        def model(shares, rows, scale=1.0, rng=rng, means=means):
            return {"w": shares.float() @ means + scale * noise / rows**0.5 * torch.randn(400, generator=rng)}

        parts = [model(shares, 75) for shares in torch.eye(7)]
        fit = fit_of_sources(parts, model(whole, 150, other_recipe), [75] * 7)
        again = [fit_of_sources(parts, model(fit.shares, 150), [75] * 7) for _ in range(3)]
        misfit = max(1.0, 3 * fit.residual / sum(refit.residual for refit in again))
        fitted = torch.stack([refit.shares for refit in again])
        shares, half = corrected(fit.shares, fitted, fit.shares.expand(3, 7), misfit=misfit)
        inside = ((shares - half).clamp_min(0) <= whole) & (whole <= shares + half + 1e-9)
        low, high = rows_interval(shares, half, torch.full((7,), 20.0).double(), freedom=12, seed=0, draws=200)
        inside &= (low <= whole + 1e-9) & (whole <= high + 1e-9)
        held, of_all = held + int(inside.sum()), of_all + int(inside[0])
    assert held / trials / 7 > 0.93
    assert of_all / trials > 0.85


def test_intervals_of_rows_hold_what_they_promise():
    """A source of short rows: its few tokens are many rows, and when they are uncertain so are the others' shares."""
    true, each = (torch.tensor(values, dtype=torch.float64) for values in ([0.5, 0.3, 0.16, 0.04], [50.0, 60, 100, 10]))
    spread, runs, rng = 0.02, 3, torch.Generator().manual_seed(0)
    held = alone = 0
    for trial in range(200):
        first, *again = true + spread * torch.randn(1 + runs, 4, generator=rng, dtype=torch.float64) @ CENTRED
        shares, half = corrected(first, torch.stack(again), true.expand(runs, 4))
        low, high = rows_interval(shares, half, each, freedom=6, seed=trial, draws=500)
        wanted, own = shares_of_rows(true, each), shares_of_rows(shares, each)
        assert (low <= own).all() and (own <= high).all()
        held += int(((low <= wanted) & (wanted <= high)).sum())
        moved = torch.stack([(shares - half).clamp_min(0), shares + half]) / each
        ends = moved / (moved + (shares / each).sum() - shares / each)
        alone += int(((ends[0] <= wanted) & (wanted <= ends[1])).sum())
    assert held / 800 > 0.92, "of 95%"
    assert alone / 800 < 0.8, "each source for itself: what was taken before"


CENTRED = torch.eye(4, dtype=torch.float64) - 0.25


@pytest.mark.parametrize(("sources", "runs"), [(2, 2), (2, 3), (3, 2), (4, 3)])
def test_where_rows_are_alike_their_interval_is_that_of_tokens(sources, runs):
    shares, half = torch.full((sources,), 1 / sources, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)
    each, freedom = torch.full((sources,), 7.0, dtype=torch.float64), (runs - 1) * (sources - 1)
    ends = rows_interval(shares, half, each, freedom=freedom, seed=0, draws=40_000)
    assert (ends[0] - (shares - half)).abs().max() < 0.05 * half
    assert (ends[1] - (shares + half)).abs().max() < 0.05 * half


def test_an_interval_without_spread_is_a_point():
    shares, each = (torch.tensor(values, dtype=torch.float64) for values in ([0.5, 0.5], [5.0, 20.0]))
    ends = rows_interval(shares, torch.zeros((), dtype=torch.float64), each, freedom=2, seed=0)
    torch.testing.assert_close(ends, torch.tensor([[0.8, 0.2]] * 2, dtype=torch.float64))


def test_rows_are_drawn_by_shares_of_tokens():
    pools = {"short": range(100), "long": range(100, 200)}
    shares, each = (torch.tensor(values, dtype=torch.float64) for values in ([0.5, 0.5], [5.0, 20.0]))
    drawn = draw_by_shares(shares, each, pools, 50, random.Random(0))
    assert sum(n < 100 for n in drawn) == 40 and len({*drawn}) == len(drawn) == 50
    fewer = draw_by_shares(shares, each, pools, 500, random.Random(0))
    assert (sum(n < 100 for n in fewer), len(fewer)) == (100, 125), "where one runs out the shares stay"


def test_sources_of_few_rows_count_by_what_their_models_were_trained_on():
    """In a linear world: a model of n rows moves n units, of one source 100 rows are all there are."""
    units = [{"w": torch.eye(3)[place]} for place in range(3)]
    counts = [100, 300, 300]
    parts = [{"w": unit["w"] * count} for unit, count in zip(units, counts, strict=True)]
    target = {"w": torch.tensor([60.0, 240.0, 300.0])}
    assert fit_of_sources(parts, target, counts).shares.tolist() == pytest.approx([0.1, 0.4, 0.5])


def test_a_known_mixture_is_found_and_a_stop_loses_nothing(base, trained, tmp_path, monkeypatch):
    path, true = trained
    found = estimated(base, path, tmp_path / "work")
    assert [line["source"] for line in found] == sorted(WORDS)
    for line in found:
        assert line["tokens"] == pytest.approx(true[line["source"]], abs=0.1), (found, true)
        assert 0 <= line["tokens_low"] <= line["tokens"] <= line["tokens_high"] <= 1
        assert 0 <= line["low"] <= line["share"] <= line["high"] <= 1
    assert sum(line["tokens"] for line in found) == pytest.approx(1)
    assert sum(line["share"] for line in found) == pytest.approx(1)
    by = {line["source"]: line for line in found}
    assert by["digits"]["share"] > by["digits"]["tokens"], "its rows are the shortest"

    def stepped(*_args, **_options):
        pytest.fail("every training is on the disk")

    monkeypatch.setattr("transformers.Trainer.training_step", stepped)
    assert estimated(base, path, tmp_path / "work") == found


def test_adapters_begin_at_the_same_a_and_are_compared_by_what_they_do(base, tmp_path):
    rows = [row for row in ROWS if row["source"] == "digits"]
    quick = {"epochs": 2, "batch_size": 4, "lr": 1e-2, "checkpoints": 1, "progress": False}
    first = train(base, rows[:15], tmp_path / "first", lora_rank=2, seed=1, **quick)
    (last,) = first.glob("checkpoint-*")
    start = adapter_at_start(str(last), tmp_path / "start")
    assert adapter_at_start(str(last), tmp_path / "start") == start
    other = train(start, rows[15:], tmp_path / "other", seed=2, **quick)
    own = [weight_difference(base, str(path)) for path in (first, other)]
    layers = own[0].adapted
    dense = [torch.cat([part.low_rank(layer).dense().flatten() for layer in layers]) for part in own]
    assert torch.equal(torch.cat([entry.flatten() for entry in entries(own[0])]), dense[0])
    assert float(torch.nn.functional.cosine_similarity(dense[0], dense[1], 0)) > 0.2, "they learned the same"
    assert fit_of_sources(own[:1], own[1], [15]).shares.tolist() == [1.0]
    with pytest.raises(ModelError, match="the same weights"):
        weight_difference(base, start)


def test_what_cannot_be_asked_is_refused(base, trained, tmp_path):
    path, _ = trained
    with pytest.raises(SettingError, match="2 or more are expected"):
        estimated(base, path, tmp_path / "work", runs=1)
    with pytest.raises(SettingError, match="1 sources: 2 to 12"):
        mixture_by_runs(base, ROWS, ["one"] * len(ROWS), TOKENS, weight_difference(base, path), RECIPE, tmp_path / "w")
    assert not (tmp_path / "work").exists()
    assert source_models.rows_to_train(4, 100) == 500
