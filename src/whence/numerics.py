"""Seeded generators, products and inverses, the Hadamard transform, and measures of a ranking with their intervals.

Randomness comes from `generator(seed, *scope)` alone, on the CPU, and is moved to the device afterwards, so that
a projection is the same on any device, worker and batch size. torch's CPU generator ignores the high 32 bits of a
seed (`manual_seed(5)` and `manual_seed(5 + (1 << 32))` give the same numbers), so seed and scope are mixed into 32.

Measures compare scores as float64 and are exact about ties, of which baselines have many (BM25 gives 0 to every row
without a shared word): no measure depends on the order in which equal scores happen to stand. A row that cannot be
ranked scores -inf and comes last. A measure that has no value (nothing relevant, a constant, NaN) raises ValueError,
because a NaN would vanish in a mean over queries.
"""

import zlib
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int8
from torch import Tensor


def product(x: Float[Tensor, "*b m n"], y: Float[Tensor, "*b n p"]) -> Float32[Tensor, "*b m p"]:
    """`x @ y` of one type, [m n] or [b m n], with sums and result in fp32 whatever that type is.

    A GPU multiplies 16-bit numbers at ten times the rate of fp32, and the product of two of them is exact in fp32. On
    other devices they are widened first.
    """
    if x.dtype == torch.float32:
        return x @ y
    if x.device.type != "cuda":
        return x.float() @ y.float()
    return torch.mm(x, y, out_dtype=torch.float32) if x.ndim == 2 else torch.bmm(x, y, out_dtype=torch.float32)


def inverse_or_zero(values: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """`1 / x` of lengths or sums of squares; 0 where x is 0, so that what has no gradient scores 0.

    What is no larger than the smallest normal number of the dtype counts as 0, since its inverse could overflow; a
    negative number and NaN give 0 too.

    >>> inverse_or_zero(torch.tensor([4.0, 0.0, 1e-45, torch.nan, torch.inf]))
    tensor([0.2500, 0.0000, 0.0000, 0.0000, 0.0000])
    """
    return torch.where(values > torch.finfo(values.dtype).tiny, 1 / values, 0.0)


def mixed_seed(seed: int, *scope: str) -> int:
    """Mix a seed and the names of its purpose into 32 bits (crc32 of `seed/scope/...`).

    Two scopes share a stream with a chance of 2^-32: about 3e-5 that any two of 500 layers do.
    """
    return zlib.crc32("/".join((str(seed), *scope)).encode())


def generator(seed: int, *scope: str) -> torch.Generator:
    """A CPU generator for one purpose, such as `generator(0, "sjlt", layer)`.

    >>> bool(torch.equal(signs(4, generator(0, "x")), signs(4, generator(0, "x"))))
    True
    """
    return torch.Generator().manual_seed(mixed_seed(seed, *scope))


def signs(count: int, rng: torch.Generator) -> Int8[Tensor, " count"]:
    """Independent signs, -1 or +1 with equal chance, as int8."""
    return torch.randint(2, (count,), generator=rng, dtype=torch.int8) * 2 - 1


def hadamard(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Walsh-Hadamard transform of the last axis, orthonormal (norms are kept; its own inverse).

    It is computed as products with small Hadamard matrices (radix 64), which a CPU and a GPU run far faster than the
    log2(d) butterfly passes: O(d * 64 * log64(d)) for a row. `d` must be a power of two.

    >>> hadamard(torch.tensor([1.0, 1.0, 1.0, 1.0])).tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    d = x.shape[-1]
    assert d & (d - 1) == 0, f"Hadamard transform of length {d}, which is not a power of two"
    out, inner = x, 1
    while inner < d:
        radix = min(64, d // inner)
        blocks = out.reshape(*x.shape[:-1], d // (inner * radix), radix, inner)
        out = torch.einsum("rs,...sn->...rn", hadamard_matrix(radix).to(x), blocks).reshape(x.shape)
        inner *= radix
    return out


def hadamard_matrix(d: int) -> Float[Tensor, "d d"]:
    """The orthonormal Walsh-Hadamard matrix in natural order: entry (r, c) has the sign of (-1)^popcount(r & c)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < d:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


def auroc(scores: Float[Tensor, " n"], relevant: Bool[Tensor, " n"]) -> float:
    """Area under the ROC curve: the chance that a relevant row scores above an irrelevant one, ties counting half.

    It is computed from ranks (Mann-Whitney U): 0.5 is chance, 1 puts every relevant row first.

    Raises:
        ValueError: No row is relevant, or all are, or a score is NaN.

    >>> auroc(torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([True, True, False, False]))
    0.875
    """
    _refuse_nan(scores)
    positives, negatives = int(relevant.sum()), int((~relevant).sum())
    if not positives or not negatives:
        raise ValueError(f"auroc of {positives} relevant and {negatives} irrelevant rows: it needs some of both")
    u = _ranks(scores)[relevant.cpu()].sum().item() - positives * (positives + 1) / 2
    return u / (positives * negatives)


def average_precision(scores: Float[Tensor, " n"], relevant: Bool[Tensor, " n"]) -> float:
    """Mean over the relevant rows of the precision at each: the area under the precision-recall curve (auPRC).

    Rows of equal score get their mean over all orders in which they could stand. (scikit-learn credits each of them
    with the precision at the end of the tie, which is not that mean; without ties the two agree.) Chance is about the
    share of relevant rows; 1 puts every relevant row first.

    Raises:
        ValueError: No row is relevant, or a score is NaN.

    Source: McSherry and Najork 2008, Computing Information Retrieval Performance Measures Efficiently in the Presence
    of Tied Scores, https://doi.org/10.1007/978-3-540-78646-7_38.

    >>> average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]))  # (1 / 1 + 2 / 3) / 2
    0.8333333333333333
    >>> average_precision(torch.tensor([1.0, 1.0]), torch.tensor([True, False]))  # first of two, or second
    0.75
    """
    _refuse_nan(scores)
    if not relevant.any():
        raise ValueError(f"average precision of {len(relevant)} rows of which none is relevant")
    ordered, order = scores.double().sort(descending=True)
    _, tie, size = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    hits = torch.zeros(len(size), dtype=torch.float64, device=tie.device).index_add_(0, tie, relevant[order].double())
    rank = torch.arange(1, len(order) + 1, device=tie.device)
    before = rank - 1 - (size.cumsum(0) - size)[tie]  # rows of the same tie above
    # Given that a row of the tie is relevant, each other of its `size - 1` rows is with chance (hits - 1) / (size - 1).
    above = (hits.cumsum(0) - hits)[tie] + ((hits - 1) / (size - 1).clamp(min=1))[tie] * before
    precision = (above + 1) / rank
    return (precision * (hits / size)[tie]).sum().item() / relevant.sum().item()


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Rank correlation, from -1 to 1: Pearson's correlation of the ranks, where equal values share their mean rank.

    Raises:
        ValueError: Fewer than two values, all values of one equal, or a value that is NaN.

    >>> round(spearman(torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])), 4)
    0.9487
    """
    for values in (x, y):
        _refuse_nan(values)
        if len(values) < 2 or (values == values[0]).all():
            raise ValueError(f"rank correlation of {len(values)} values that are all equal")
    return torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1].item()


def order_codes(values: Float64[Tensor, "n e 2"]) -> Float64[Tensor, "n e 2"]:
    """The same order in every column, as whole numbers from 0; equal values share one. See `mean_spearman`."""
    columns = values.flatten(1).unbind(1)
    codes = torch.stack([torch.unique(column, return_inverse=True)[1] for column in columns], 1)
    return codes.reshape(values.shape).double()


def mean_spearman(codes: Float64[Tensor, "*r n e 2"]) -> Float64[Tensor, "*r"]:
    """Mean over e of `spearman` between two columns, by counting: a thousand resamples of a table take no sorting.

    A column that is the same everywhere, as in some resamples, orders nothing, and its correlation counts 0.

    Args:
        codes: Rows of `order_codes`, drawn again or not, r times.
    """
    *resamples, n, e, _ = codes.shape
    size, places = int(codes.max()) + 1, codes.reshape(-1, n, e * 2).long().numpy()
    columns = len(places) * places.shape[2]
    places = places + size * np.arange(columns).reshape(len(places), 1, -1)  # a place for each value of each column
    counts = np.bincount(places.ravel(), minlength=size * columns).reshape(-1, size)
    ranks = (counts.cumsum(1) - (counts - 1) / 2).ravel()[places].reshape(-1, n, e, 2) - (n + 1) / 2
    norms = np.sqrt((ranks**2).sum(1)).prod(-1)
    correlations = (ranks[..., 0] * ranks[..., 1]).sum(1) / np.where(norms > 0, norms, 1.0)
    return torch.from_numpy(correlations.mean(1)).reshape(resamples)


RESAMPLED_NUMBERS = 2**18
"""Numbers that are resampled at once: few calls, and no more memory than some megabytes."""


def bootstrap_interval(
    values: Float[Tensor, "n *rest"],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 10_000,
    statistic: Callable[[Tensor], Tensor] = lambda resamples: resamples.flatten(1).mean(1),
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic: rows of `values` are drawn again with replacement.

    The interval is too narrow for few values (for a mean of ten normal ones it covers about 90% at level 0.95).

    Args:
        values: One row for each independent unit (a query, a retrained model); what is in a row stays together.
        seed: The same seed gives the same interval.
        level: Share of resamples inside.
        resamples: Number of resamples.
        statistic: From r resamples, [r n *rest], to r finite numbers; the mean, unless given.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: Fewer than two rows, a level outside (0, 1), no resamples, or a statistic that is not finite.

    Source: Efron 1979, https://doi.org/10.1214/aos/1176344552.
    """
    if len(values) < 2 or not 0 < level < 1 or resamples < 1:
        raise ValueError(f"bootstrap of {len(values)} values at level {level} with {resamples} resamples")
    rng, n = generator(seed, "bootstrap"), len(values)
    together = max(1, RESAMPLED_NUMBERS // values.numel())
    sizes = [min(together, resamples - start) for start in range(0, resamples, together)]
    draws = (torch.randint(n, (size, n), generator=rng).to(values.device) for size in sizes)
    statistics = torch.cat([statistic(values[draw]).double().cpu() for draw in draws])
    if not torch.isfinite(statistics).all():
        raise ValueError("bootstrap of a statistic that is not finite for some resample")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(statistics, tails).tolist()
    return low, high


def crossed_bootstrap_interval(
    values: Float[Tensor, "s n"], *, seed: int, level: float = 0.95, resamples: int = 4000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a table's mean, whose rows and columns are both samples.

    Rows (trainings) and columns (graded examples) are drawn again with replacement, independently. The interval is a
    little too wide where both matter, and too narrow for few rows: three trainings say little about a fourth.

    Args:
        values: Finite numbers.
        seed: The same seed gives the same interval.
        level: Share of resamples inside.
        resamples: Number of resamples.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: Fewer than two rows and two columns, a level outside (0, 1), no resamples, or values not finite.

    Source: the pigeonhole bootstrap, Owen 2007, https://doi.org/10.1214/07-AOAS122.
    """
    s, n = values.shape
    if s < 2 or n < 2 or not 0 < level < 1 or resamples < 1:
        raise ValueError(f"bootstrap of {s} by {n} values at level {level} with {resamples} resamples")
    if not values.isfinite().all():
        raise ValueError("bootstrap of values that are not finite")
    rng = generator(seed, "crossed bootstrap")
    rows = torch.randint(s, (resamples, s), generator=rng)
    means = torch.empty(resamples, dtype=torch.float64)
    for number in range(resamples):
        columns = torch.randint(n, (n,), generator=rng)
        means[number] = values.double()[rows[number]][:, columns].mean()
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def _ranks(values: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Ranks from 1 for the lowest; equal values share their mean rank."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.double().cpu().numpy()))


def _refuse_nan(values: Float[Tensor, "*any"]) -> None:
    if torch.isnan(values).any():
        raise ValueError("a value to rank is NaN")
