"""Queries rounded at random to few levels, and how far that can move their products with rows of signs; no kernels.

An entry q is clipped to a limit c and rounded up or down to a whole multiple of a step, with the probability that
leaves its mean as it was. Errors of entries are independent and less than a step, so that the error of a product with
any signs has mean 0 but for what clipping takes away. With L = ln(2 / RISK) and probability 1 - RISK it is at most

    sum of max(|q| - c, 0)  +  the smaller of   step sqrt(k L / 2)             (Hoeffding)
                                                step (sqrt(2 V L) + L / 3)     (Bernstein)

where V is the sum of the variances f (1 - f) of the entries, f being the fraction that is rounded away. The limit is
one of several shares of the largest entry, the one that makes this smallest: so a few outliers do not spoil the step of
all others.

Source: Boucheron, Lugosi and Massart 2013, Concentration inequalities, theorems 2.8 and 2.10. RaBitQ (Gao and
Long 2024, arXiv 2405.12497, section 3.3) rounds its queries in the same way.
"""

import math

import numpy as np
from jaxtyping import Float32, Int16
from torch import Tensor

from whence.indexing.threads import run_together

RISK = 1e-9
"""Probability that the error of one product is larger than its bound."""
_LOG = math.log(2 / RISK)
_FEW_LEVELS = 63
"""With more levels Hoeffding's bound is small enough, and many queries are in haste."""
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
"""Limits that are tried, of the largest entry."""
_FP32 = 2.0**-20  # of an entry: what quotients, sums with the noise and scores lose in fp32
_TINY = np.float32(2.0**-100)  # far above numbers whose steps would be subnormal


def rounded(
    queries: Float32[Tensor, "q k"], levels: int
) -> tuple[Int16[np.ndarray, "q k"], Float32[np.ndarray, " q"], Float32[np.ndarray, " q"]]:
    """Whole numbers from -levels to levels, their step, and the bound on the error of a product with signs.

    The noise is the same in every call, and for every query: so is a query's result.

    Args:
        queries: On the CPU, finite.
        levels: At most 2^15 - 1.
    """
    values = queries.numpy()
    whole = np.empty(values.shape, np.int16)
    step, error = np.empty((2, len(values)), np.float32)
    noise = np.random.default_rng(0).random(values.shape[1], np.float32)
    waiting = iter(range(len(values)))

    def work() -> None:
        for q in waiting:  # a row at a time stays in cache
            step[q], error[q] = _round_row(values[q], levels, noise, whole[q])

    run_together(work, len(values) if values.size > 1 << 18 else 1)
    return whole, step, error


def _round_row(values: np.ndarray, levels: int, noise: np.ndarray, out: np.ndarray) -> tuple[float, float]:
    sizes = np.abs(values)
    limit, excess = _limit(sizes, levels)
    step = float(limit) / levels
    scaled = values / np.float32(step)
    arithmetic = _FP32 * step * math.sqrt(len(values) * float(np.dot(scaled, scaled)))  # |errors| |signs|
    np.clip(scaled, -levels, levels, out=scaled)
    bound = math.sqrt(len(values) * _LOG / 2)
    if levels <= _FEW_LEVELS:
        fraction = scaled - np.floor(scaled)
        variance = float(np.dot(fraction, 1 - fraction))
        bound = min(bound, math.sqrt(2 * variance * _LOG) + _LOG / 3)
    scaled += noise
    out[:] = np.floor(scaled, out=scaled)
    return step, excess + step * bound + arithmetic


def _limit(sizes: np.ndarray, levels: int) -> tuple[np.float32, float]:
    """The limit with the smallest bound, were an average entry's variance a sixth; and what clipping takes away.

    The bound is convex in the limit, so that the first one that is no better ends the search. A sample of the entries
    would not do: it has too few outliers.
    """
    largest, k = np.maximum(sizes.max(initial=0), _TINY), len(sizes)
    chosen, taken, best = largest, 0.0, math.inf
    for share in _SHARES:
        limit = largest * np.float32(share)
        excess = float(np.maximum(sizes - limit, 0).sum(dtype=np.float64)) if share < 1 else 0.0
        bound = excess + float(limit) / levels * math.sqrt(k * _LOG / 3)
        if bound >= best:
            break
        chosen, taken, best = limit, excess, bound
    return chosen, taken
