"""The mixture of sources behind a fine-tuning, by training the base on each source.

A model trained on a mixture moves about as the mean of the models trained on its parts (the averages of `merging`, read
backwards). So with D_s = theta_0 - theta_s of a model trained on rows of source s alone, by the recipe of the model in
question,

    T = sum over sources of v_s D_s + R,  v >= 0,  share of s = v_s n_s / sum of v n

where n_s is the rows that s was trained on: of a batch's mean loss a step goes as far whatever the rows. This sees what
the optimizer does to gradients, where mean gradients (`pursuit.mixture`) do not (docs/recover.md has both). Shares are
of supervised tokens: a batch's loss is the mean over them.

The estimate is then put to the test: the base is trained a few times more, on rows drawn by the estimated mixture, of
which the shares are known, and the same fit is made. What it is off by in the mean is taken off the estimate; how much
that varies, over runs and sources together, is the width of the intervals (a parametric bootstrap, with Student's t).

Source: linear averages of trained models, Na et al. 2024, https://arxiv.org/abs/2410.15661; the inversion is ours.
"""

import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from whence.numerics import mixed_seed
from whence.recovery.atoms import nonnegative
from whence.recovery.shadow_model import Recipe, train_by
from whence.runner import Tick
from whence.storage import Place

RUNS = 3
"""On rows drawn by the estimate."""
PART = 0.5
"""Rows of a source's own model over those of the model in question: seldom does one source have more."""
MOST = 12
"""Sources whose models are trained; more are a pool's, see `whence pool train`."""


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
    runs: int = RUNS,
    seed: int = 0,
    tick: Tick = lambda examples, tokens: None,
) -> list[dict[str, Any]]:
    """Share of every source, with 95% intervals.

    Args:
        base: theta_0, a directory.
        rows: Like those that the model in question was trained on.
        sources: Of each row.
        tokens: Supervised ones of each row.
        difference: theta_0 - theta_f of the model in question.
        recipe: With optimizer and rate; `rows` is how many it was trained on.
        work: Directory of the runs; the same call goes on from there.
        start: Where trainings begin, if not at the base: `adapter_at_start`.
        runs: To put the estimate to the test by, 2 or more.
        seed: Of rows and trainings.
        tick: Told of rows trained on.

    Returns:
        By source `tokens`, its share of supervised tokens, `tokens_low`, `tokens_high`; and `share`, `low`, `high`, of
        rows. Empty where no source's model moved along the difference.

    Raises:
        SettingError: Fewer than two runs, fewer than two sources, or more than `MOST`.
    """
    names = sorted({*sources})
    if runs < 2:
        raise SettingError(f"{runs} runs of an estimated mixture: 2 or more are expected, for they tell its interval")
    if not 2 <= len(names) <= MOST:
        raise SettingError(f"{len(names)} sources: 2 to {MOST} are expected, for a model is trained on each")
    able = [number for number in range(len(rows)) if tokens[number] > 0]
    pools = {name: [number for number in able if sources[number] == name] for name in names}
    own, counts, rng = [], [], random.Random(f"mixture {seed}")
    for place, name in enumerate(names):
        wanted = max(1, round(PART * recipe.rows))
        drawn = rng.sample(pools[name], min(wanted, len(pools[name])))
        # not rounded, as the model in question may be: what is fitted by should have no noise of its own
        own_recipe = replace(recipe, rows=len(drawn), stored=torch.float32)
        path = train_by(start or base, [rows[n] for n in sorted(drawn)], own_recipe, work / f"source-{place}",
                        _seed(seed, "source", place))  # fmt: skip
        own.append(weight_difference(base, str(path)))
        counts.append(len(drawn))
        tick(wanted, 0)
    first = fitted(own, difference, counts)
    if first is None:
        return []
    each = torch.tensor([float(tokens[pools[name]].double().mean()) for name in names], dtype=torch.float64)
    off = []
    for run in range(runs):
        drawn = drawn_by(first, each, pools, recipe.rows, random.Random(f"mixture {seed} {run}"))
        part = [rows[n] for n in drawn]
        own_recipe = replace(recipe, rows=len(drawn))
        path = train_by(start or base, part, own_recipe, work / f"run-{run}{recipe.suffix}", _seed(seed, "run", run))
        tick(recipe.rows, 0)
        true = torch.stack([tokens[[n for n in drawn if sources[n] == name]].double().sum() for name in names])
        found = fitted(own, weight_difference(base, str(path)), counts)
        off.append((torch.zeros_like(first) if found is None else found) - true / true.sum())
    freedom = (runs - 1) * (len(names) - 1)
    return _told(names, *corrected(first, torch.stack(off)), each, freedom=freedom, seed=seed)


def adapter_at_start(final: str, out: Path) -> str:
    """An adapter's directory with its A as they are and its B at 0: theta_0, from which a training moves in the same
    few directions. Between adapters that began at another A hardly any direction is shared.

    Args:
        final: The adapter's directory.
        out: A directory for it; one that is there is taken for it.
    """
    name = "adapter_model.safetensors"
    if not (out / name).exists():
        out.mkdir(parents=True, exist_ok=True)
        for file in Path(final).iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name != "trainer_state.json":
                shutil.copyfile(file, out / file.name)
        tensors = safetensors.torch.load_file(Path(final) / name)
        held = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}
        data = safetensors.torch.save(held, metadata={"format": "pt"})
        Place.at(out).write(name, [data], total=len(data))
    return str(out)


def rows_to_train(sources: int, rows: int, runs: int = RUNS) -> int:
    """In all trainings together, about."""
    return sources * max(1, round(PART * rows)) + runs * rows


def fitted(
    parts: Sequence[Mapping[str, Tensor]], target: Mapping[str, Tensor], counts: Sequence[int]
) -> Float64[Tensor, " s"] | None:
    """Shares v_s n_s of the least |T - sum of v_s D_s|, v >= 0; None where v is 0.

    Parameters that another vocabulary has made longer are left out.

    Args:
        parts: D_s.
        target: T.
        counts: n_s, rows that each was trained on.

    >>> one, other = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    >>> fitted([one, other], {"w": torch.tensor([3.0, 2.0])}, [10, 10]).tolist()
    [0.75, 0.25]
    """
    gram = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    linear = torch.zeros(len(parts), dtype=torch.float64)
    for own, entry in zip(zip(*map(entries, parts), strict=True), entries(target), strict=True):
        if any(part.shape != entry.shape for part in own):
            continue
        rows = torch.stack([part.flatten() for part in own])
        gram += (rows @ rows.T).double()
        linear += (rows @ entry.flatten()).double()
    found = nonnegative(gram, linear) * torch.tensor(counts, dtype=torch.float64)
    return found / found.sum() if found.any() else None


def entries(difference: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """What moved, one tensor after the other; of an adapter what its factors do together, for A begins anywhere."""
    if isinstance(difference, WeightDifference) and difference.adapted:
        yield from (difference.low_rank(layer).dense() for layer in difference.adapted)
    else:
        yield from (difference[name] for name in difference)


def drawn_by(
    shares: Float64[Tensor, " s"],
    each: Float64[Tensor, " s"],
    pools: Mapping[str, Sequence[int]],
    count: int,
    rng: random.Random,
) -> list[int]:
    """Rows in which sources have these shares of tokens, as nearly as whole rows can: fewer where a source runs out.

    Args:
        shares: Of tokens.
        each: Mean tokens of a row.
        pools: Rows of each source.
        count: Rows to draw, about.
        rng: Draws them.
    """
    wanted = of_rows(shares, each)
    sizes = torch.tensor([len(pool) for pool in pools.values()], dtype=torch.float64)
    whole = min(float(count), float((sizes / wanted)[wanted > 0].min()))  # so that no source runs out
    drawn = []
    for share, pool in zip(wanted.tolist(), pools.values(), strict=True):
        drawn += rng.sample(pool, min(len(pool), round(share * whole)))
    return sorted(drawn)


def corrected(
    first: Float64[Tensor, " s"], off: Float64[Tensor, "r s"]
) -> tuple[Float64[Tensor, " s"], Float64[Tensor, ""]]:
    """An estimate less what its like are off by in the mean, and half the width of its interval.

    Args:
        first: Shares.
        off: Of runs of which the shares are known, fitted less true.
    """
    moved = (first - off.mean(0)).clamp_min(0.0)
    runs, sources = off.shape
    freedom = (runs - 1) * (sources - 1)  # shares sum to 1
    spread = ((off - off.mean(0)).square().sum() / freedom * (1 + 1 / runs)).sqrt()
    return moved / moved.sum(), spread * float(stats.t.ppf(0.975, freedom))


def _told(
    names: Sequence[str],
    shares: Float64[Tensor, " s"],
    half: Float64[Tensor, ""],
    each: Float64[Tensor, " s"],
    *,
    freedom: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Shares of tokens and, over mean tokens of a row, of rows."""
    ends = torch.stack([shares, (shares - half).clamp_min(0.0), (shares + half).clamp_max(1.0)])
    rows = torch.stack([of_rows(shares, each), *rows_interval(shares, half, each, freedom=freedom, seed=seed)])
    return [
        {"source": name, "share": rows[0, place].item(), "low": rows[1, place].item(), "high": rows[2, place].item(),
         "tokens": ends[0, place].item(), "tokens_low": ends[1, place].item(), "tokens_high": ends[2, place].item()}
        for place, name in enumerate(names)
    ]  # fmt: skip


def of_rows(shares: Float64[Tensor, "*d s"], each: Float64[Tensor, " s"]) -> Float64[Tensor, "*d s"]:
    """Shares of tokens as shares of rows, of which a source has `each` tokens in the mean."""
    counts = shares / each
    return counts / counts.sum(-1, keepdim=True).clamp_min(1e-300)


def rows_interval(
    shares: Float64[Tensor, " s"],
    half: Float64[Tensor, ""],
    each: Float64[Tensor, " s"],
    *,
    freedom: int,
    seed: int,
    draws: int = 4_000,
) -> Float64[Tensor, "2 s"]:
    """Ends of shares of rows where all shares of tokens are as uncertain as `half` says.

    Not each for itself: where a source's rows have few tokens, a few tokens more are many rows, and the others' shares
    of rows shrink.

    Args:
        shares: Of tokens.
        half: Half the width of a 95% interval of any of them, of Student's t.
        each: Mean tokens of a row.
        freedom: Degrees of it.
        seed: Of the draws.
        draws: How many.
    """
    rng = np.random.default_rng(seed)
    moves = rng.standard_normal((draws, len(shares)))
    # shares sum to 1, which takes a part of the spread away: it is given back; one estimate of it serves all sources
    moves = (moves - moves.mean(1, keepdims=True)) * math.sqrt(len(shares) / (len(shares) - 1))
    moves /= np.sqrt(rng.chisquare(freedom, (draws, 1)) / freedom) * float(stats.t.ppf(0.975, freedom))
    drawn = of_rows((shares + torch.from_numpy(moves) * half).clamp_min(0.0), each)
    ends = drawn.quantile(drawn.new_tensor([0.025, 0.975]), 0)
    own = of_rows(shares, each)
    return torch.stack([torch.minimum(ends[0], own), torch.maximum(ends[1], own)])


def _seed(seed: int, kind: str, number: int) -> int:
    return mixed_seed(seed, "mixture", kind, str(number)) % 2**31
