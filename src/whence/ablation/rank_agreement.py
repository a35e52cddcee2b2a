"""How well a proxy ranks candidates, against the losses of models that were really trained.

For each evaluation set, over candidates: Pearson's correlation of losses, Spearman's and Kendall's of ranks, and the
top-1 regret, loss_true(argmin of the proxy) - min loss_true, in nats: the cost of choosing by the proxy, averaged
over candidates that it ranks alike. Over sets: losses are centred in each set before they are pooled, or the sets' own
levels would make any proxy look good; candidates are resampled with their losses on all sets, and regrets are averaged.

Candidates that have an evaluation set's own partition in them are always better on it, which is too easy to predict:
agreement is also given apart for candidates that contain it and for those that do not.

Source: Na et al. 2024, https://arxiv.org/abs/2410.15661; regret and the split, ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from whence.errors import SettingError
from whence.numerics import bootstrap_interval, mean_spearman, order_codes, spearman

FEWEST = 4
"""Candidates that a correlation needs, at least."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of a proxy with the truth, over candidates."""

    candidates: int
    pearson: float
    spearman: float
    spearman_interval: tuple[float, float]
    """95% interval, bootstrapped over candidates."""
    kendall: float
    regret: float
    """Nats, 0 or more."""
    spread: float
    """Largest less smallest true loss, with which a regret is to be compared; over several sets the mean."""

    def row(self) -> dict[str, Any]:
        """As plain values."""
        low, high = self.spearman_interval
        return {"candidates": self.candidates, "pearson": self.pearson, "spearman": self.spearman, "low": low,
                "high": high, "kendall": self.kendall, "regret": self.regret, "spread": self.spread}  # fmt: skip


def agreement(proxy: Sequence[float], truth: Sequence[float], *, seed: int = 0, sets: int = 1) -> Agreement | None:
    """Agreement of a proxy's losses with the true ones; None for fewer candidates than `FEWEST`, or all alike.

    Args:
        proxy: Losses of candidates on a set; for several sets, one set after the other, centred (see `centred`).
        truth: The true losses, in the same order.
        seed: Seed of the interval.
        sets: Number of sets.

    Raises:
        SettingError: Lengths differ, or a loss is not finite.
    """
    x, y = (torch.tensor([float(value) for value in values], dtype=torch.float64) for values in (proxy, truth))
    if len(x) != len(y):
        raise SettingError(f"{len(x)} losses of a proxy and {len(y)} true ones: as many are expected")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise SettingError("a loss is not finite: agreement is of losses that are")
    if len(x) < FEWEST * sets or (x == x[0]).all() or (y == y[0]).all():
        return None
    correlation, interval = rank_correlation(x, y, sets=sets, seed=seed)
    by_set = list(zip(x.reshape(sets, -1), y.reshape(sets, -1), strict=True))
    return Agreement(
        candidates=len(x) // sets,
        pearson=float(torch.corrcoef(torch.stack([x, y]))[0, 1]),
        spearman=correlation,
        spearman_interval=interval,
        kendall=kendall(x, y),
        regret=math.fsum(regret(predicted, true) for predicted, true in by_set) / sets,
        spread=math.fsum(float(true.max() - true.min()) for _, true in by_set) / sets,
    )


def rank_correlation(
    x: Float64[Tensor, " cells"], y: Float64[Tensor, " cells"], *, sets: int = 1, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Spearman's correlation and its 95% interval, bootstrapped over candidates, each with its cells of all sets.

    Cells of a candidate are not independent: resampled one by one they would make the interval too narrow.

    Args:
        x: Values of the candidates on one set, then on the next.
        y: Values to correlate with, in the same order.
        sets: Number of sets.
        seed: Seed of the interval.
    """
    by_candidate = torch.stack([x, y], 1).reshape(sets, -1, 2).transpose(0, 1)
    codes = order_codes(by_candidate.reshape(-1, 1, 2)).reshape(by_candidate.shape)
    interval = bootstrap_interval(codes, seed=seed, resamples=1000, statistic=_of_all_cells)
    return spearman_of(by_candidate), interval


def _of_all_cells(codes: Float64[Tensor, "r n sets 2"]) -> Float64[Tensor, " r"]:
    return mean_spearman(codes.reshape(len(codes), -1, 1, 2))


def regret(proxy: Float64[Tensor, " n"], truth: Float64[Tensor, " n"]) -> float:
    """Nats lost by taking the candidate that a proxy ranks first; of several that it ranks first, any of them.

    >>> regret(torch.tensor([1.0, 1.0, 2.0]).double(), torch.tensor([3.0, 5.0, 4.0]).double())
    1.0
    """
    return float(truth[proxy == proxy.min()].mean() - truth.min())


def centred(losses: Mapping[str, Sequence[float]]) -> list[float]:
    """Losses of all sets in one list, each set's mean taken off."""
    pooled: list[float] = []
    for values in losses.values():
        mean = math.fsum(values) / len(values)
        pooled += [value - mean for value in values]
    return pooled


def kendall(x: Float64[Tensor, " n"], y: Float64[Tensor, " n"]) -> float:
    """Kendall's tau b."""
    from scipy.stats import kendalltau

    correlation: Any = kendalltau(x.numpy(), y.numpy())
    return float(correlation[0])


def spearman_of(pairs: Float64[Tensor, "n sets 2"]) -> float:
    """Spearman's correlation over all cells; 0 where all values of a side are alike."""
    x, y = pairs.reshape(-1, 2).T
    return 0.0 if (x == x[0]).all() or (y == y[0]).all() else spearman(x, y)


def groups(names: Sequence[str], contains: Callable[[str], bool]) -> dict[str, list[int]]:
    """Places of all candidates, of those that contain a set's own partition, and of those that do not."""
    contained = [place for place, name in enumerate(names) if contains(name)]
    return {"all": list(range(len(names))), "contained": contained,
            "not contained": [place for place in range(len(names)) if place not in {*contained}]}  # fmt: skip
