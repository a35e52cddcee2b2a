"""The linear datamodeling score: do summed scores rank real retrainings as their losses do?

For query q and member u of a bank, a model trained on a subset of the rows,

    predicted loss  P[u, q] = -sum over the rows i of u's subset of score[q, i]
    LDS(q)          Spearman's correlation over members of P[., q] and the members' losses L[., q]

and a method's LDS is the mean over queries. Larger scores are more helpful, so that the sum has a minus and 1 is
perfect; chance is 0. Beside it stand Pearson's correlation of the same numbers, and the LDS of the mean query: mean
over q of P against mean over q of L, one number a member, which is what choosing rows for a whole task needs.

Intervals are bootstrapped over members and queries together: both are drawn again with replacement, so that they hold
for other subsets and other queries of the same kind. All methods share each resample, so that the interval of two
methods' difference is of the same subsets and queries. Ranks of a resample are counted, not sorted: with w_j copies of
member j, the mean rank of a value x is 1/2 + sum over j of w_j ([x_j < x] + [x_j = x] / 2).

In simulated banks of 60 subsets and 30 queries the intervals hold the mean over banks 98 times of 100, those of a
difference always: they are wide. At an LDS of .97 it is 89 times, and the interval lies low, since a resample repeats
members, which costs a near perfect order some of it.

Nothing counts as 0 that has no value: a query whose losses are not finite, or are all alike, belongs to no method's
mean, and one whose scores say the same of every member is left out of that method's. Both are counted, by reason.

Source: Park et al. 2023 (TRAK), https://arxiv.org/abs/2303.14186, definition 2.3; Ilyas et al. 2022 (datamodels),
https://arxiv.org/abs/2202.00622. Intervals of crossed samples: Owen 2007, https://doi.org/10.1214/07-AOAS122.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from whence.counts import number_of
from whence.errors import SettingError
from whence.evaluation.estimates import Estimate, middle
from whence.numerics import generator

FEWEST = 2
"""Members that a correlation needs, at least."""
FEWEST_FOR_INTERVAL = 4
"""Members that an interval needs, at least: of fewer, a resample is often one member alone."""
FLAT = 1e-12
"""Predictions that differ by less, relative to the sum of the scores' magnitudes, differ by rounding alone."""
NOT_FINITE, SAME_LOSS, SAME_SCORE = "losses not finite", "losses all alike", "scores say the same of every member"
"""Reasons for which a query is left out."""


@dataclass(frozen=True)
class LdsMarks:
    """How well one method's scores predict a bank."""

    method: str
    spearman: Estimate
    """Mean over queries of Spearman's correlation: the LDS."""
    pearson: Estimate
    """Mean over queries of Pearson's correlation."""
    of_mean: Estimate
    """Spearman's correlation of the queries' mean prediction and mean loss."""
    queries: int
    """Queries that have a value."""
    left_out: dict[str, int]
    """Numbers of the other queries, by reason."""
    by_query: list[float]
    """Spearman's correlation of every query; NaN for those that are left out."""


@dataclass(frozen=True)
class _Resamples:
    """One method's correlations in r resamples of the members, and its mean query's in resamples of both."""

    spearman: Float64[Tensor, "r q"]
    pearson: Float64[Tensor, "r q"]
    of_mean: Float64[Tensor, " r"]


@dataclass(frozen=True)
class LdsTable:
    """Methods side by side on one bank, best first."""

    marks: list[LdsMarks]
    members: int
    """Members that are compared: those of which some query's loss is finite."""
    queries: int
    """Queries of the bank."""
    notes: list[str] = field(default_factory=list)
    _resamples: dict[str, _Resamples] = field(default_factory=dict, repr=False)
    _draws: Int64[Tensor, "r q"] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """The methods with their scores, and how to go on."""
        lines = [f"  {marks.method}: {marks.spearman.value:.3f}" for marks in self.marks]
        more = "  More: .rows(), .difference(METHOD, OTHER), .marks, .notes"
        return "\n".join([f"LdsTable({number_of(self.members, 'subset')}, {self.queries} queries)", *lines, more])

    def difference(self, first: str, second: str, *, of_mean: bool = False) -> Estimate:
        """How much higher one method's LDS is than another's, over the queries of both, in the same resamples.

        Args:
            first: A method.
            second: The method whose LDS is taken off.
            of_mean: Compare the LDS of the mean query.
        """
        by_name = {marks.method: marks for marks in self.marks}
        one, other = by_name[first], by_name[second]
        if of_mean:
            value = one.of_mean.value - other.of_mean.value
            resampled = [self._resamples[name].of_mean for name in (first, second)] if self._resamples else []
            return Estimate(value, middle(resampled[0] - resampled[1]) if resampled else None)
        both = torch.tensor(one.by_query, dtype=torch.float64) - torch.tensor(other.by_query, dtype=torch.float64)
        value = float(both.nanmean())
        if not self._resamples or self._draws is None:
            return Estimate(value, None)
        resamples = self._resamples[first].spearman - self._resamples[second].spearman
        resamples[:, both.isnan()] = torch.nan
        return Estimate(value, middle(resamples.gather(1, self._draws).nanmean(1)))

    def rows(self, **more: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Plain rows, best first, each with how far it is below the best method.

        Args:
            more: Further columns, each by method.
        """
        rows = []
        for rank, marks in enumerate(self.marks, start=1):
            estimates = {"lds": marks.spearman, "pearson": marks.pearson, "mean_loss_lds": marks.of_mean,
                         "below_best": self.difference(self.marks[0].method, marks.method)}  # fmt: skip
            row: dict[str, Any] = {"rank": rank, "method": marks.method}
            for name, estimate in estimates.items():
                row |= estimate.columns(name)
            row |= {"queries": marks.queries, "subsets": self.members, "left_out": marks.left_out}
            rows.append(row | {name: column.get(marks.method) for name, column in more.items()})
        return rows


def lds(
    scores: Mapping[str, Float[Tensor, "q n"]],
    included: Bool[Tensor, "m n"],
    losses: Float[Tensor, "m q"],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> LdsTable:
    """Grade scores by retrainings.

    Args:
        scores: Scores of every row for every query, by method; larger is more helpful. A score that is not finite is
            no score, and counts 0 in a sum.
        included: Whether each member was trained on each row.
        losses: Loss of every query under every member, in nats. NaN where it is not known. A member without a finite
            loss is left out; then a query that lacks any.
        seed: Seed of the intervals.
        resamples: Number of resamples.

    Raises:
        SettingError: Fewer than two members have losses, or no query can be graded.
    """
    is_trained = losses.isfinite().any(1)
    if int(is_trained.sum()) < FEWEST:
        raise SettingError(
            f"a linear datamodeling score compares retrainings, {FEWEST} at least: {int(is_trained.sum())} of "
            f"{number_of(len(losses), 'subset')} have losses. Train more subsets with: whence bank"
        )
    truth, subsets = losses[is_trained].double().cpu(), included[is_trained].cpu()
    reasons = _unusable(truth)
    usable = torch.tensor([reason is None for reason in reasons])
    if not usable.any():
        raise SettingError(
            f"none of {number_of(len(reasons), 'query', 'queries')} can be graded: {reasons[0]}, over "
            f"{number_of(len(truth), 'subset')}"
        )
    predictions = {name: predicted_losses(values, subsets)[:, usable] for name, values in scores.items()}
    members, draws = len(truth), None
    points = _correlations(predictions, truth[:, usable], torch.ones(1, members).double(), _every(int(usable.sum())))
    sampled: dict[str, _Resamples] = {}
    if members >= FEWEST_FOR_INTERVAL:
        weights, draws = _draw(members, int(usable.sum()), seed, resamples)
        sampled = _correlations(predictions, truth[:, usable], weights, draws)
    marks = [_marks(name, points[name], sampled.get(name), draws, usable, reasons) for name in scores]
    marks.sort(key=lambda line: -line.spearman.value if math.isfinite(line.spearman.value) else math.inf)
    every = {name: _Resamples(_spread(some.spearman, usable), _spread(some.pearson, usable), some.of_mean)
             for name, some in sampled.items()}  # fmt: skip
    places = None if draws is None else usable.nonzero()[:, 0][draws]
    return LdsTable(marks, members, len(reasons), _notes(scores, losses, is_trained, usable), every, places)


def predicted_losses(scores: Float[Tensor, "q n"], included: Bool[Tensor, "m n"]) -> Float64[Tensor, "m q"]:
    """Minus the sums of scores over each member's rows: what the scores say of its losses, but for a constant.

    Predictions of a query that differ by rounding alone are made equal.

    >>> predicted_losses(torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[True, True, False], [False, True, True]]))
    tensor([[-3.],
            [-1.]], dtype=torch.float64)
    """
    known = torch.where(scores.isfinite(), scores, 0.0).double().cpu()
    predictions = -(included.double().cpu() @ known.T)
    spread = predictions.amax(0) - predictions.amin(0)
    return torch.where(spread > FLAT * known.abs().sum(1), predictions, predictions[:1])


def _unusable(losses: Float64[Tensor, "m q"]) -> list[str | None]:
    """Why each query cannot be graded; None for those that can."""
    reasons: list[str | None] = []
    for values in losses.T:
        is_finite = bool(values.isfinite().all())
        reasons.append(NOT_FINITE if not is_finite else SAME_LOSS if bool((values == values[0]).all()) else None)
    return reasons


def _every(queries: int) -> Int64[Tensor, "1 q"]:
    return torch.arange(queries)[None]


def _draw(members: int, queries: int, seed: int, resamples: int) -> tuple[Float64[Tensor, "r m"], Int64[Tensor, "r q"]]:
    """How often each member is drawn, and which queries are."""
    rng = generator(seed, "linear datamodeling score")
    drawn = torch.randint(members, (resamples, members), generator=rng)
    counts = torch.zeros(resamples, members).scatter_add_(1, drawn, torch.ones(resamples, members))
    return counts.double(), torch.randint(queries, (resamples, queries), generator=rng)


def _correlations(
    predictions: Mapping[str, Float64[Tensor, "m q"]],
    losses: Float64[Tensor, "m q"],
    weights: Float64[Tensor, "r m"],
    draws: Int64[Tensor, "r q"],
) -> dict[str, _Resamples]:
    """Correlations of every method, in resamples of the members that are given by how often each is drawn."""
    queries = losses.shape[1]
    by_query: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in predictions}
    for query in range(queries):
        ranks = mean_ranks(losses[:, query], weights)
        for name, predicted in predictions.items():
            predicted_ranks = mean_ranks(predicted[:, query], weights)
            spearman = weighted_pearson(predicted_ranks, ranks, weights)
            pearson = weighted_pearson(predicted[:, query][None], losses[:, query][None], weights)
            by_query[name].append((spearman, torch.where(spearman.isnan(), torch.nan, pearson)))
    shares = torch.zeros(len(draws), queries).double().scatter_add_(1, draws, torch.ones(draws.shape).double())
    shares /= queries
    mean_ranks_of_losses = _ranks_of_mixtures(losses, shares, weights)
    return {
        name: _Resamples(
            torch.stack([spearman for spearman, _ in by_query[name]], 1),
            torch.stack([pearson for _, pearson in by_query[name]], 1),
            weighted_pearson(_ranks_of_mixtures(predicted, shares, weights), mean_ranks_of_losses, weights),
        )
        for name, predicted in predictions.items()
    }


def mean_ranks(values: Float64[Tensor, "*r m"], weights: Float64[Tensor, "r m"]) -> Float64[Tensor, "r m"]:
    """Ranks from 1 for the lowest, in samples that hold value j `weights[., j]` times; equal values share their mean.

    Args:
        values: Values, the same in every sample; or a row of them for each.
        weights: How often each value stands in each sample.

    >>> mean_ranks(torch.tensor([5.0, 7.0, 7.0]).double(), torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]]).double())
    tensor([[1.0000, 2.5000, 2.5000],
            [1.5000, 3.0000, 3.0000]], dtype=torch.float64)
    """
    lower, equal = values[..., None, :] < values[..., :, None], values[..., None, :] == values[..., :, None]
    counted = lower.double() + equal.double() / 2
    sums = weights @ counted.T if values.ndim == 1 else (counted @ weights[:, :, None])[..., 0]
    return sums + 0.5


def _ranks_of_mixtures(
    values: Float64[Tensor, "m q"], shares: Float64[Tensor, "r q"], weights: Float64[Tensor, "r m"]
) -> Float64[Tensor, "r m"]:
    """Ranks of each sample's own mean over queries."""
    step = max(1, 2**22 // len(values) ** 2)
    parts = zip(shares.split(step), weights.split(step), strict=True)
    return torch.cat([mean_ranks(some @ values.T, counts) for some, counts in parts])


def weighted_pearson(
    x: Float64[Tensor, "*r m"], y: Float64[Tensor, "*r m"], weights: Float64[Tensor, "r m"]
) -> Float64[Tensor, " r"]:
    """Pearson's correlation in samples that hold pair j `weights[., j]` times; NaN where a side is constant."""
    total = weights.sum(1, keepdim=True)
    least = [FLAT**2 * (weights * values.square()).sum(1) for values in (x, y)]
    x, y = (values - (weights * values).sum(1, keepdim=True) / total for values in (x, y))
    squares = [(weights * values.square()).sum(1) for values in (x, y)]
    product = (squares[0] * squares[1]).sqrt()
    is_constant = (squares[0] <= least[0]) | (squares[1] <= least[1])
    return torch.where(is_constant, torch.nan, (weights * x * y).sum(1) / product)


def _marks(
    name: str,
    point: _Resamples,
    sampled: _Resamples | None,
    draws: Int64[Tensor, "r u"] | None,
    usable: Bool[Tensor, " q"],
    reasons: list[str | None],
) -> LdsMarks:
    known = point.spearman[0]
    left_out = {reason: reasons.count(reason) for reason in (NOT_FINITE, SAME_LOSS) if reason in reasons}
    if count := int(known.isnan().sum()):
        left_out[SAME_SCORE] = count

    def estimate(kind: str) -> Estimate:
        value = float(getattr(point, kind).nanmean())
        if sampled is None or draws is None or not math.isfinite(value):
            return Estimate(value, None)
        values = getattr(sampled, kind)
        return Estimate(value, middle(values if values.ndim == 1 else values.gather(1, draws).nanmean(1)))

    by_query = torch.full((len(reasons),), torch.nan).double()
    by_query[usable] = known
    return LdsMarks(
        name,
        estimate("spearman"),
        estimate("pearson"),
        estimate("of_mean"),
        int((~known.isnan()).sum()),
        left_out,
        by_query.tolist(),
    )


def _spread(values: Float64[Tensor, "r u"], usable: Bool[Tensor, " q"]) -> Float64[Tensor, "r q"]:
    """Columns of usable queries among all queries' columns."""
    out = torch.full((len(values), len(usable)), torch.nan).double()
    out[:, usable] = values
    return out


def _notes(
    scores: Mapping[str, Tensor], losses: Tensor, is_trained: Bool[Tensor, " m"], usable: Bool[Tensor, " q"]
) -> list[str]:
    notes = []
    if count := int((~is_trained).sum()):
        notes.append(f"Left out, for none of their losses is finite: {number_of(count, 'subset')}.")
    if len(losses) - count < FEWEST_FOR_INTERVAL:
        notes.append(f"There are no intervals: they take {FEWEST_FOR_INTERVAL} subsets or more.")
    for name, values in scores.items():
        if unscored := int((~values[usable].isfinite()).any(0).sum()):
            notes.append(f"{name} has no score for {number_of(unscored, 'row')}, counted as 0 in sums.")
    return notes
