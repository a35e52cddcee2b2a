"""The mixture of sources behind a fine-tuning, from models that are the base trained on each source.

A model trained on a mixture moves about as the mean of the models trained on its sources (the averages of
`ablation.merging`, inverted). So with D_s = theta_0 - theta_s of a model trained on rows of source s alone, by the
recipe of the model in question,

    T = sum over sources of v_s D_s + R,  v >= 0,  share of s = v_s n_s / sum of v n

where n_s is the number of rows in the training on s: with a batch's mean loss all steps are about as long, whatever the
rows. D_s includes what the optimizer does to gradients, which mean gradients (`pursuit.mixture`) do not
(docs/results/recovery.md compares both). Shares are of supervised tokens, since a batch's loss is the mean over them.

The estimate is then put to the test: the base is trained a few times more, on rows drawn by the estimated mixture, of
which the shares are known, and the same fit is made. The D_s are noisy, so a fit draws shares towards even ones, the
more the farther they are from even; where one source is all, most. The runs tell this factor and an error beside it,
which are taken off the estimate. The variance of what is left, over runs and sources together, gives the width of the
intervals (a parametric bootstrap, with Student's t). The runs are trained by the shadow's recipe: where T leaves a
larger residual than theirs, as that of another recipe does, intervals are as much wider.

Source: linear averages of trained models, Na et al. 2024, https://arxiv.org/abs/2410.15661; the inversion is ours.
"""

import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float64, Int64
from scipy import stats
from torch import Tensor

from whence.corpus.layouts import Row
from whence.errors import SettingError
from whence.models.difference import WeightDifference, weight_difference
from whence.models.saved_files import LIST, list_files
from whence.numerics import mixed_seed
from whence.recovery.matching_problem import nonnegative
from whence.recovery.shadow_model import Recipe, train_by
from whence.runner import Tick
from whence.storage import Place

CHECK_TRAININGS = 3
"""Trainings on rows drawn by the estimate."""
SOURCE_ROWS_SHARE = 0.5
"""Rows of a source's own model over those of the model in question: one source seldom has more."""
LEAST_FACTOR = 0.5
"""Factor by which a fit draws shares towards even ones, at least."""
MOST_SOURCES = 12
"""Sources on each of which a model is trained, at most; for more, see `whence pool train`."""


def mixture_by_runs(
    base: str,
    rows: Sequence[Row],
    sources: Sequence[str],
    tokens: Int64[Tensor, " n"],
    difference: WeightDifference,
    recipe: Recipe,
    work: Path,
    *,
    start: str | None = None,
    runs: int = CHECK_TRAININGS,
    seed: int = 0,
    tick: Tick = lambda examples, tokens: None,
) -> list[dict[str, Any]]:
    """Share of every source, with 95% intervals.

    Args:
        base: theta_0, a directory.
        rows: Rows like those that the model in question was trained on.
        sources: Source of each row.
        tokens: Supervised tokens of each row.
        difference: theta_0 - theta_f of the model in question.
        recipe: Its recipe, with optimizer and rate; `rows` is the number of rows that it was trained on.
        work: Directory of the runs; the same call goes on from there.
        start: Directory where trainings begin, `adapter_at_start`; None: at the base.
        runs: Trainings that test the estimate, 2 or more.
        seed: Seed of rows and trainings.
        tick: Called with the rows that are trained on.

    Returns:
        One entry a source: `tokens`, its share of supervised tokens, with `tokens_low` and `tokens_high`; and `share`,
        its share of rows, with `low` and `high`. Empty if no source's model moved along the difference.

    Raises:
        SettingError: There are fewer than two runs, fewer than two sources, or more than `MOST_SOURCES`.
    """
    names = sorted({*sources})
    if runs < 2:
        raise SettingError(f"{runs} runs of an estimated mixture: 2 or more are expected, for they tell its interval")
    if not 2 <= len(names) <= MOST_SOURCES:
        raise SettingError(f"{len(names)} sources: 2 to {MOST_SOURCES} are expected, for a model is trained on each")
    supervised = [number for number in range(len(rows)) if tokens[number] > 0]
    numbers = {name: [number for number in supervised if sources[number] == name] for name in names}
    differences, counts, rng = [], [], random.Random(f"mixture {seed}")
    for place, name in enumerate(names):
        size = max(1, round(SOURCE_ROWS_SHARE * recipe.rows))
        drawn = rng.sample(numbers[name], min(size, len(numbers[name])))
        # Not rounded, though the model in question may be: D_s should have no noise of its own.
        source_recipe = replace(recipe, rows=len(drawn), stored=torch.float32)
        path = train_by(start or base, [rows[n] for n in sorted(drawn)], source_recipe, work / f"source-{place}",
                        _seed(seed, "source", place))  # fmt: skip
        differences.append(weight_difference(base, str(path)))
        counts.append(len(drawn))
        tick(size, 0)
    fit = fit_of_sources(differences, difference, counts)
    if fit.shares is None:
        return []
    mean_tokens = torch.tensor([float(tokens[numbers[name]].double().mean()) for name in names], dtype=torch.float64)
    refits, true_shares = [], []
    for run in range(runs):
        drawn = draw_by_shares(fit.shares, mean_tokens, numbers, recipe.rows, random.Random(f"mixture {seed} {run}"))
        drawn_rows = [rows[n] for n in drawn]
        run_recipe = replace(recipe, rows=len(drawn))
        path = train_by(
            start or base, drawn_rows, run_recipe, work / f"run-{run}{recipe.suffix}", _seed(seed, "run", run)
        )
        tick(recipe.rows, 0)
        true = torch.stack([tokens[[n for n in drawn if sources[n] == name]].double().sum() for name in names])
        refits.append(fit_of_sources(differences, weight_difference(base, str(path)), counts))
        true_shares.append(true / true.sum())
    fitted = torch.stack([torch.zeros_like(fit.shares) if refit.shares is None else refit.shares for refit in refits])
    misfit = max(1.0, fit.residual * runs / max(1e-12, sum(refit.residual for refit in refits)))
    freedom = (runs - 1) * (len(names) - 1)
    shares, half = corrected(fit.shares, fitted, torch.stack(true_shares), misfit=misfit)
    return _mixture_rows(names, shares, half, mean_tokens, freedom=freedom, seed=seed)


def adapter_at_start(final: str, out: Path) -> str:
    """Write an adapter with its A as they are and its B at 0: theta_0, from which a training moves in the same few
    directions. Adapters that began at another A share hardly any direction.

    Args:
        final: The adapter's directory.
        out: Directory for the copy; an existing one is used as it is.
    """
    name = "adapter_model.safetensors"
    if not (out / name).exists():
        out.mkdir(parents=True, exist_ok=True)
        for file in Path(final).iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name not in ("trainer_state.json", LIST):
                shutil.copyfile(file, out / file.name)
        tensors = safetensors.torch.load_file(Path(final) / name)
        start = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}
        data = safetensors.torch.save(start, metadata={"format": "pt"})
        Place.at(out).write(name, [data], total=len(data))
        list_files(out)
    return str(out)


def rows_to_train(sources: int, rows: int, runs: int = CHECK_TRAININGS) -> int:
    """Rows of all trainings together, about."""
    return sources * max(1, round(SOURCE_ROWS_SHARE * rows)) + runs * rows


@dataclass(frozen=True)
class SourceFit:
    """A weight difference as a sum of those of sources' models."""

    shares: Float64[Tensor, " s"] | None
    """Shares v_s n_s / sum of v n; None if v is 0."""
    residual: float
    """|T - sum of v_s D_s| over |T|."""


def fit_of_sources(
    differences: Sequence[Mapping[str, Tensor]], difference: Mapping[str, Tensor], counts: Sequence[int]
) -> SourceFit:
    """The v >= 0 that minimises |T - sum of v_s D_s|, as shares.

    Parameters that another vocabulary has made longer are left out.

    Args:
        differences: D_s.
        difference: T.
        counts: n_s, rows that each was trained on.

    >>> a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    >>> fit_of_sources([a, b], {"w": torch.tensor([3.0, 2.0])}, [10, 10]).shares.tolist()
    [0.75, 0.25]
    """
    gram = torch.zeros(len(differences), len(differences), dtype=torch.float64)
    linear, square = torch.zeros(len(differences), dtype=torch.float64), 0.0
    for tensors, entry in zip(zip(*map(entries, differences), strict=True), entries(difference), strict=True):
        if any(tensor.shape != entry.shape for tensor in tensors):
            continue
        rows = torch.stack([tensor.flatten() for tensor in tensors])
        gram += (rows @ rows.T).double()
        linear += (rows @ entry.flatten()).double()
        square += float(entry.double().square().sum())
    weights = nonnegative(gram, linear)
    left = square - 2 * float(weights @ linear) + float(weights @ gram @ weights)
    parts = weights * torch.tensor(counts, dtype=torch.float64)
    shares = parts / parts.sum() if parts.any() else None
    return SourceFit(shares, math.sqrt(max(0.0, left) / square) if square else 0.0)


def entries(difference: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The tensors of a difference, one by one; an adapter's as products of its factors, since A begins anywhere."""
    if isinstance(difference, WeightDifference) and difference.adapted:
        yield from (difference.low_rank(layer).dense() for layer in difference.adapted)
    else:
        yield from (difference[name] for name in difference)


def draw_by_shares(
    shares: Float64[Tensor, " s"],
    mean_tokens: Float64[Tensor, " s"],
    numbers: Mapping[str, Sequence[int]],
    count: int,
    rng: random.Random,
) -> list[int]:
    """Numbers of rows in which sources have these shares of tokens, up to whole rows; fewer if a source runs out.

    Args:
        shares: Shares of tokens.
        mean_tokens: Mean tokens of a source's rows.
        numbers: Numbers of each source's rows.
        count: Rows to draw, about.
        rng: Generator of the draw.
    """
    row_shares = shares_of_rows(shares, mean_tokens)
    sizes = torch.tensor([len(source_rows) for source_rows in numbers.values()], dtype=torch.float64)
    total = min(float(count), float((sizes / row_shares)[row_shares > 0].min()))  # so that no source runs out
    drawn = []
    for share, source_rows in zip(row_shares.tolist(), numbers.values(), strict=True):
        drawn += rng.sample(source_rows, min(len(source_rows), round(share * total)))
    return sorted(drawn)


def corrected(
    estimate: Float64[Tensor, " s"],
    fitted: Float64[Tensor, "r s"],
    true: Float64[Tensor, "r s"],
    *,
    misfit: float = 1.0,
) -> tuple[Float64[Tensor, " s"], Float64[Tensor, ""]]:
    """An estimate without what the runs show that the fit does, and half the width of its 95% interval.

    With u the even shares, a fit is taken as u + factor (true - u) + error: the factor, of at most 1, is that of least
    squares over the runs, and the error their mean.

    Args:
        estimate: Shares.
        fitted: Fitted shares of runs whose shares are known.
        true: These.
        misfit: Factor of the width.
    """
    runs, sources = fitted.shape
    even = 1 / sources
    apart, square = (true - even) * (fitted - even), (true - even).square().sum()
    factor = min(1.0, max(LEAST_FACTOR, float(apart.sum() / square))) if square > 0 else 1.0
    errors = fitted - even - factor * (true - even)
    shares = nearest_shares(even + (estimate - errors.mean(0) - even) / factor)
    freedom = (runs - 1) * (sources - 1)  # shares sum to 1
    spread = ((errors - errors.mean(0)).square().sum() / freedom * (1 + 1 / runs)).sqrt() / factor
    return shares, misfit * spread * float(stats.t.ppf(0.975, freedom))


def nearest_shares(values: Float64[Tensor, "*d s"]) -> Float64[Tensor, "*d s"]:
    """The shares, 0 or more with a sum of 1, that are nearest to these values.

    Cut at 0 and divided by their sum, the others' noise would take from a source that is all.

    Source: Held et al. 1974, doi 10.1007/BF01580223.

    >>> nearest_shares(torch.tensor([1.25, 0.25, -0.5]).double()).tolist()
    [1.0, 0.0, 0.0]
    """
    ordered = values.sort(-1, descending=True).values
    levels = (ordered.cumsum(-1) - 1) / torch.arange(1, values.shape[-1] + 1)
    last = (ordered > levels).sum(-1, keepdim=True) - 1
    return (values - levels.gather(-1, last)).clamp_min(0.0)


def _mixture_rows(
    names: Sequence[str],
    shares: Float64[Tensor, " s"],
    half: Float64[Tensor, ""],
    mean_tokens: Float64[Tensor, " s"],
    *,
    freedom: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Shares of tokens and of rows, with intervals, as plain values: one entry a source."""
    ends = torch.stack([shares, (shares - half).clamp_min(0.0), (shares + half).clamp_max(1.0)])
    rows = torch.stack(
        [shares_of_rows(shares, mean_tokens), *rows_interval(shares, half, mean_tokens, freedom=freedom, seed=seed)]
    )
    return [
        {"source": name, "share": rows[0, place].item(), "low": rows[1, place].item(), "high": rows[2, place].item(),
         "tokens": ends[0, place].item(), "tokens_low": ends[1, place].item(), "tokens_high": ends[2, place].item()}
        for place, name in enumerate(names)
    ]  # fmt: skip


def shares_of_rows(shares: Float64[Tensor, "*d s"], mean_tokens: Float64[Tensor, " s"]) -> Float64[Tensor, "*d s"]:
    """Shares of tokens as shares of rows, given the mean tokens of each source's rows."""
    counts = shares / mean_tokens
    return counts / counts.sum(-1, keepdim=True).clamp_min(1e-300)


def rows_interval(
    shares: Float64[Tensor, " s"],
    half: Float64[Tensor, ""],
    mean_tokens: Float64[Tensor, " s"],
    *,
    freedom: int,
    seed: int,
    draws: int = 4_000,
) -> Float64[Tensor, "2 s"]:
    """Ends of the 95% intervals of shares of rows, if each share of tokens has an interval of half width `half`.

    Shares are drawn together, not each for itself: where a source's rows have few tokens, a few tokens more are many
    rows, and the other sources' shares of rows shrink.

    Args:
        shares: Shares of tokens.
        half: Half the width of any share's 95% interval, by Student's t.
        mean_tokens: Mean tokens of a source's rows.
        freedom: Degrees of freedom of that t.
        seed: Seed of the draws.
        draws: Number of draws.
    """
    rng = np.random.default_rng(seed)
    moves = rng.standard_normal((draws, len(shares)))
    # Shares sum to 1, which reduces their spread by the factor that is given back here.
    moves = (moves - moves.mean(1, keepdims=True)) * math.sqrt(len(shares) / (len(shares) - 1))
    moves /= np.sqrt(rng.chisquare(freedom, (draws, 1)) / freedom) * float(stats.t.ppf(0.975, freedom))
    drawn = shares_of_rows(nearest_shares(shares + torch.from_numpy(moves) * half), mean_tokens)
    ends = drawn.quantile(drawn.new_tensor([0.025, 0.975]), 0)
    row_shares = shares_of_rows(shares, mean_tokens)
    # None and all are the same in tokens and in rows; draws of many sources seldom reach all.
    low, high = torch.where(shares > half, ends[0], 0.0), torch.where(shares + half < 1, ends[1], 1.0)
    return torch.stack([torch.minimum(low, row_shares), torch.maximum(high, row_shares)])


def _seed(seed: int, kind: str, number: int) -> int:
    return mixed_seed(seed, "mixture", kind, str(number)) % 2**31
