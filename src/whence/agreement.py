"""How well a proxy ranks candidates, against the losses of models that were really trained.

For each evaluation set, over candidates: Pearson's correlation of losses, Spearman's and Kendall's of ranks, and the
top-1 regret, loss_true(argmin of the proxy) - min loss_true, in nats: what choosing by the proxy costs. Over sets:
losses are centred in each set before they are pooled, or the sets' own levels would make any proxy look good.

Candidates that have an evaluation set's own partition in them are always better on it, which is too easy to see:
agreement is told for those that contain it and those that do not apart, too.

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
from whence.numerics import bootstrap_interval, spearman

FEWEST = 4
"""Candidates that a correlation is told of."""


@dataclass(frozen=True)
class Agreement:
    """Of a proxy with the truth, over candidates."""

    candidates: int
    pearson: float
    spearman: float
    spearman_interval: tuple[float, float]
    """95%, over candidates drawn anew."""
    kendall: float
    regret: float
    """Nats, 0 or more."""
    spread: float
    """Of the true losses, largest less smallest: what a regret is to be held against."""

    def row(self) -> dict[str, Any]:
        """As plain values."""
        low, high = self.spearman_interval
        return {"candidates": self.candidates, "pearson": self.pearson, "spearman": self.spearman, "low": low,
                "high": high, "kendall": self.kendall, "regret": self.regret, "spread": self.spread}  # fmt: skip


def agreement(proxy: Sequence[float], truth: Sequence[float], *, seed: int = 0) -> Agreement | None:
    """Agreement of a proxy's losses with the true ones; None for fewer candidates than `FEWEST`, or all alike.

    Raises:
        SettingError: Lengths differ, or a loss is not finite.
    """
    x, y = (torch.tensor([float(value) for value in values], dtype=torch.float64) for values in (proxy, truth))
    if len(x) != len(y):
        raise SettingError(f"{len(x)} losses of a proxy and {len(y)} true ones: as many are expected")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise SettingError("a loss is not finite: agreement is of losses that are")
    if len(x) < FEWEST or (x == x[0]).all() or (y == y[0]).all():
        return None
    low, high = bootstrap_interval(torch.stack([x, y], 1), seed=seed, resamples=1000, statistic=_spearman)
    return Agreement(
        candidates=len(x),
        pearson=float(torch.corrcoef(torch.stack([x, y]))[0, 1]),
        spearman=spearman(x, y),
        spearman_interval=(low, high),
        kendall=kendall(x, y),
        regret=float(y[x.argmin()] - y.min()),
        spread=float(y.max() - y.min()),
    )


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

    found: Any = kendalltau(x.numpy(), y.numpy())
    return float(found[0])


def _spearman(pairs: Float64[Tensor, "n 2"]) -> float:
    """0 for a resample in which all values of a side are alike."""
    x, y = pairs.T
    return 0.0 if (x == x[0]).all() or (y == y[0]).all() else spearman(x, y)


def groups(names: Sequence[str], contains: Callable[[str], bool]) -> dict[str, list[int]]:
    """Places of all candidates, of those that contain a set's own partition, and of those that do not."""
    inside = [place for place, name in enumerate(names) if contains(name)]
    return {"all": list(range(len(names))), "contained": inside,
            "not contained": [place for place in range(len(names)) if place not in {*inside}]}  # fmt: skip
