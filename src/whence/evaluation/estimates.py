"""A number with its interval, and means over queries whose intervals come from one set of resamples for all methods."""

from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from whence.numerics import generator


class Estimate(NamedTuple):
    """A number with its 95% interval; NaN and None where there is none."""

    value: float
    interval: tuple[float, float] | None

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.interval is not None and self.interval[0] > 0

    def columns(self, name: str) -> dict[str, float | None]:
        """The columns NAME, NAME_low and NAME_high of a row."""
        low, high = self.interval or (None, None)
        return {name: self.value, f"{name}_low": low, f"{name}_high": high}


def middle(values: Float64[Tensor, " r"]) -> tuple[float, float] | None:
    """The middle 95% of a statistic's resamples; those in which it has no value are left out.

    >>> middle(torch.tensor([0.0, 1.0, torch.nan, 2.0]).double())
    (0.05, 1.95)
    """
    known = values[values.isfinite()]
    if not len(known):
        return None
    low, high = known.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def query_draws(queries: int, seed: int, resamples: int = 2000) -> Int64[Tensor, "r q"]:
    """Queries drawn again with replacement, r times; every mean that is to be compared takes the same."""
    return torch.randint(queries, (resamples, queries), generator=generator(seed, "queries"))


def mean_over_queries(values: Float64[Tensor, " q"], draws: Int64[Tensor, "r q"]) -> Estimate:
    """Mean over the queries that have a value, bootstrapped over queries; no interval for fewer than two.

    Source of the interval: Efron 1979, https://doi.org/10.1214/aos/1176344552.

    >>> mean_over_queries(torch.tensor([1.0, torch.nan]).double(), torch.tensor([[0, 0]]))
    Estimate(value=1.0, interval=None)
    """
    value = float(values.nanmean())
    if int((~values.isnan()).sum()) < 2:
        return Estimate(value, None)
    return Estimate(value, middle(values[draws].nanmean(1)))
