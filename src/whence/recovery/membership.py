"""Whether a row was trained on: all kinds of evidence side by side, and one calibrated probability.

No single score finds the rows behind a weight difference under every optimizer: under plain SGD joint matching is best,
under Adam the cosine of single rows, or their loss (docs/results/recovery.md). So the evidence becomes a table of
features, standardised within each corpus, and a logistic model is fitted to it where membership is known: on a
shadow, a model fine-tuned in the same way on rows that we chose (`shadow_model`). Its log odds rank the rows of the
real corpus.

Features of a row, with g its gradient at a point and T = theta_0 - theta_f: at each point the loss, ln |g|, the cosine
of g and T (exact), the mean over layers of their cosines, and <g, T>; how far the loss fell, absolutely and
relatively; ln |g_f| / |g_0|; ln of the supervised tokens; and the row's coefficient in the non-negative sum of unit
gradients that matches T, with and without their mean direction (`pursuit`).

Sources: calibrating on shadow models is Shokri et al. 2017, https://arxiv.org/abs/1610.05820, loss under a reference
model Carlini et al. 2022, https://arxiv.org/abs/2112.03570; with the weight difference as evidence, ours.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from scipy.optimize import minimize
from torch import Tensor

from whence.brief import brief
from whence.errors import SettingError
from whence.numerics import generator, inverse_or_zero
from whence.recovery.evidence import PointEvidence
from whence.recovery.matching_problem import GramProblem, gram_problem
from whence.recovery.pursuit import nnls

RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Candidate ridges, in units of a row's log loss for each squared unit of weight."""
FOLDS = 5
"""Folds of the cross-validation."""
CLIP_DEVIATIONS = 8.0
"""Robust standard deviations at which a standardised feature is clipped."""


@dataclass(frozen=True)
class CorpusEvidence:
    """Evidence of a corpus at every point against one weight difference T."""

    points: Mapping[str, PointEvidence]
    """Evidence by point's name, from "base" over those between to "final"."""
    direction: str
    """Name of T in the points' `dots`."""
    lengths: Mapping[str, Mapping[str, float]]
    """|T| by point and traced layer; an adapter has the same layers at every point."""
    sketch: Float32[Tensor, " k"]
    """Sketch of T, made as the vectors at "final"."""
    short_list: Int64[Tensor, " m"]
    """Numbers of the rows that are matched jointly: see `with_short_list`."""

    @property
    def usable(self) -> Bool[Tensor, " n"]:
        """Rows with evidence at every point."""
        return torch.stack([point.usable for point in self.points.values()]).all(0)

    @cached_property
    def vector_lengths(self) -> Float32[Tensor, " m"]:
        """Norms of the short list's vectors at "final"."""
        return self.points["final"].vectors(self.short_list).norm(dim=1)

    @cached_property
    def units(self) -> GramProblem:
        """Unit vectors at "final" of the short list, to be matched to T; made once, since it takes m^2 k products."""
        return gram_problem(torch.nn.functional.normalize(self.points["final"].vectors(self.short_list)), self.sketch)

    def gradients(self) -> GramProblem:
        """The same problem with the vectors as they are."""
        lengths = self.vector_lengths
        products = self.units.gram * lengths[:, None] * lengths
        return GramProblem(products, self.units.linear * lengths.double(), self.units.square)


@dataclass(frozen=True)
class Features:
    """A table of evidence: one row a row of the corpus, one column a feature."""

    names: tuple[str, ...]
    values: Float64[Tensor, "n f"]
    usable: Bool[Tensor, " n"]

    def standard(self) -> Float64[Tensor, "n f"]:
        """Features less their medians, over a robust standard deviation, clipped.

        The share of members, which differs from corpus to corpus, must move neither. So a feature that is the same for
        more than half of the rows, as coefficients of a fit are, is divided by the median of its nonzero deviations.
        """
        usable = self.values[self.usable]
        centre = usable.median(0).values
        deviations = (usable - centre).abs()
        spread = deviations.median(0).values * 1.4826  # a Gaussian's standard deviation over its median deviation
        nonzero = torch.stack(
            [column[column > 0].median() if column.any() else column.max() for column in deviations.T]
        )
        spread = torch.where(spread > 0, spread, nonzero)
        return (
            ((self.values - centre) * inverse_or_zero(spread)).nan_to_num(0.0).clamp(-CLIP_DEVIATIONS, CLIP_DEVIATIONS)
        )


def cosines(evidence: CorpusEvidence, point: str) -> Float32[Tensor, "l n"]:
    """Cosines of g and T by layer, exact; 0 where either is 0."""
    at_point = evidence.points[point]
    lengths = torch.tensor([evidence.lengths[point][layer] for layer in at_point.layers])
    return at_point.dots[evidence.direction] * inverse_or_zero(at_point.norms * lengths[:, None])


def cosine(evidence: CorpusEvidence, point: str) -> Float32[Tensor, " n"]:
    """Cosine of g and T over all layers together."""
    total = float(torch.tensor(list(evidence.lengths[point].values())).norm())
    return evidence.points[point].cosine(evidence.direction, total)


def matched(
    evidence: CorpusEvidence, *, without_mean: bool = True
) -> tuple[Float32[Tensor, " m"], Float32[Tensor, " m"]]:
    """Coefficient of each row of the short list in the non-negative sum of unit gradients that matches T; and scores.

    Args:
        evidence: Its vectors at "final" and its short list are used.
        without_mean: Project the mean of the unit gradients, which any row of the corpus' kind has, off all.

    Returns:
        Coefficients, 0 for rows outside the sum; scores, in which such rows have their cosine with the residual.
    """
    problem = evidence.units
    fit = nnls(problem.without(problem.mean()) if without_mean else problem)
    return fit.weights, fit.scores


LENGTH_CLASSES = 5
"""Classes of length, with equal numbers of rows; a short list takes its share from each."""


def with_short_list(evidence: CorpusEvidence, size: int, *, groups: Sequence[str] | None = None) -> CorpusEvidence:
    """The evidence with a short list of about `size` rows that are worth matching jointly.

    Every class of length and every group gives the same share of its rows: the best by each of three signs of
    membership in turn, cosine at "final", cosine at "base" and relative loss drop, since no single sign serves under
    all optimizers.

    Args:
        evidence: Evidence against one weight difference.
        size: Rows to list, about; all usable rows if there are no more.
        groups: Group of each row, such as its source; groups too small for a row of each length are joined. None: one
            group.
    """
    rows = evidence.usable.nonzero()[:, 0]
    if len(rows) <= size:
        return replace(evidence, short_list=rows)
    before, after = evidence.points["base"].loss, evidence.points["final"].loss
    signs = [cosine(evidence, "final"), cosine(evidence, "base"), (before - after) * inverse_or_zero(before)]
    tokens = evidence.points["final"].tokens[rows].double()
    every = max(1, len(tokens) // 1_000_000)  # torch's quantile takes no more than 2^24
    edges = tokens[::every].quantile(torch.linspace(0, 1, LENGTH_CLASSES + 1, dtype=torch.float64)[1:-1])
    names, numbers = groups or [""] * len(evidence.usable), list(map(int, rows))
    group_sizes = Counter(names[row] for row in numbers)
    large = {
        name for name, count in group_sizes.items() if size * count >= LENGTH_CLASSES * len(rows)
    }  # a row of each length
    strata: dict[tuple[int, str], list[int]] = {}
    for row, length in zip(numbers, map(int, torch.bucketize(tokens, edges)), strict=True):
        strata.setdefault((length, names[row] if names[row] in large else ""), []).append(row)
    listed: set[int] = set()
    for stratum in strata.values():
        stratum_rows, quota = torch.tensor(stratum), max(1, round(size * len(stratum) / len(rows)))
        orders = [stratum_rows[sign[stratum_rows].argsort(descending=True, stable=True)].tolist() for sign in signs]
        best: dict[int, None] = {}
        for candidates in zip(*orders, strict=True):
            best |= dict.fromkeys(candidates)
            if len(best) >= quota:
                break
        listed |= {*list(best)[:quota]}
    return replace(evidence, short_list=torch.tensor(sorted(listed)))


def features(evidence: CorpusEvidence) -> Features:
    """The features of every row; coefficients are 0 for rows outside the short list."""
    base, final, usable = evidence.points["base"], evidence.points["final"], evidence.usable
    table: dict[str, Tensor] = {}
    for name, point in evidence.points.items():
        table[f"loss at {name}"] = point.loss
        table[f"ln |g| at {name}"] = point.norm.clamp_min(1e-30).log()
        table[f"cosine at {name}"] = cosine(evidence, name)
        table[f"cosine by layer at {name}"] = cosines(evidence, name).mean(0)
        table[f"dot at {name}"] = point.dots[evidence.direction].sum(0)
    table["loss drop"] = base.loss - final.loss
    table["relative loss drop"] = (base.loss - final.loss) * inverse_or_zero(base.loss)
    table["ln |g| ratio"] = table["ln |g| at final"] - table["ln |g| at base"]
    table["ln tokens"] = final.tokens.clamp_min(1).log()
    for name, without_mean in (("part", True), ("part with the mean", False)):
        coefficients = matched(evidence, without_mean=without_mean)[0]
        table[name] = torch.zeros(len(usable)).index_copy_(0, evidence.short_list, coefficients)
    values = torch.stack([column.double() for column in table.values()], 1)
    return Features(tuple(table), values, usable & values.isfinite().all(1))


@dataclass(frozen=True)
class Calibration:
    """A logistic model of standardised features."""

    __repr__ = brief

    names: tuple[str, ...]
    weights: Float64[Tensor, " f"]
    intercept: float
    share: float
    """Share of members among the rows that it was fitted on."""
    ridge: float
    held_out: Float64[Tensor, " n"]
    """Log odds of those rows, each by a model that was not fitted on it; NaN for rows that are not usable."""

    def log_odds(self, table: Features, *, share: float | None = None) -> Float64[Tensor, " n"]:
        """Log odds of membership; -inf for rows without evidence.

        Args:
            table: Rows with the same features.
            share: Share of members among these rows, if known; None: the calibration's.

        Raises:
            SettingError: The table has other features.
        """
        if table.names != self.names:
            raise SettingError(f"features {', '.join(table.names)} are not those calibrated: {', '.join(self.names)}")
        odds = table.standard() @ self.weights + self.intercept
        if share is not None:
            odds = odds + logit(share) - logit(self.share)
        return torch.where(table.usable, odds, -torch.inf)


def calibrate(table: Features, members: Bool[Tensor, " n"], *, seed: int = 0) -> Calibration:
    """Fit a logistic model to rows that are known to be members or not.

    Features are standardised over all rows, as those of any corpus: when the two differed, probabilities were half of
    what they should be. The ridge is the one with the least log loss in cross-validation.

    Raises:
        SettingError: There are too few members, or too few others.
    """
    usable = table.usable
    if min(int((members & usable).sum()), int((~members & usable).sum())) < 2 * FOLDS:
        raise SettingError(f"known members: {int((members & usable).sum())}, others: {int((~members & usable).sum())}; "
                           f"{2 * FOLDS} of each are the least to calibrate on")  # fmt: skip
    x, y = table.standard()[usable], members[usable].double()
    folds = torch.randperm(len(y), generator=generator(seed, "calibrate")) % FOLDS
    odds_by_ridge = {ridge: _cross_validated(x, y, folds, ridge) for ridge in RIDGES}
    ridge = min(odds_by_ridge, key=lambda ridge: float(_log_loss(odds_by_ridge[ridge], y)))
    coefficients = _fit(x, y, ridge)
    held_out = torch.full((len(usable),), torch.nan, dtype=torch.float64)
    held_out[usable] = odds_by_ridge[ridge]
    return Calibration(table.names, coefficients[:-1], float(coefficients[-1]), float(y.mean()), ridge, held_out)


def _cross_validated(x: Tensor, y: Tensor, folds: Tensor, ridge: float) -> Float64[Tensor, " n"]:
    odds = torch.zeros_like(y)
    for fold in range(FOLDS):
        coefficients = _fit(x[folds != fold], y[folds != fold], ridge)
        odds[folds == fold] = x[folds == fold] @ coefficients[:-1] + coefficients[-1]
    return odds


def _log_loss(odds: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(odds, y)


def _fit(x: Float64[Tensor, "n f"], y: Float64[Tensor, " n"], ridge: float) -> Float64[Tensor, " f_and_1"]:
    """Weights and intercept that minimise the log loss, summed over rows, plus ridge |weights|^2."""

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(point)
        odds = x @ w[:-1] + w[-1]
        error = odds.sigmoid() - y
        loss = _log_loss(odds, y) * len(y) + ridge * w[:-1].square().sum()
        slope = torch.cat([x.T @ error + 2 * ridge * w[:-1], error.sum()[None]])
        return float(loss), slope.numpy()

    return torch.from_numpy(minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x)


def logit(share: float) -> float:
    """ln(share / (1 - share)), with the share clipped to 1e-6 from 0 and 1."""
    clipped = min(max(share, 1e-6), 1 - 1e-6)
    return float(np.log(clipped / (1 - clipped)))
