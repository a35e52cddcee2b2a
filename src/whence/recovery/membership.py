"""Was a row trained on? All kinds of evidence of it side by side, and one calibrated answer.

No single score finds the rows behind a weight difference whatever the optimizer: under plain SGD rows matched jointly
win, under Adam the cosine of single rows, or their loss (docs/recover.md). So the evidence becomes a table of features,
standardised within each corpus, and a logistic model of it is fitted where membership is known: on a shadow, a model
that was fine-tuned in the same way on rows that we chose (`shadow`). Its log odds rank the rows of the real corpus.

Features of a row, with g its gradient at a point and T = theta_0 - theta_f: at each point the loss, ln |g|, the cosine
of g and T (exact), the mean over layers of their cosines, and <g, T>; how far the loss fell, absolutely and
relatively; ln |g_f| / |g_0|; ln of the supervised tokens; and the row's part in a non-negative sum of unit gradients
that matches T, with and without their mean direction (`selectors.pursuit`).

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

from whence.errors import SettingError
from whence.gradients.capture import inverse
from whence.numerics import generator
from whence.recovery.atoms import Gram, gram
from whence.recovery.evidence import Evidence
from whence.recovery.pursuit import nnls

RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Strengths that are tried, in units of a row's log loss for each squared unit of weight."""
FOLDS = 5
FARTHEST = 8.0
"""Robust standard deviations beyond which a feature says no more."""


@dataclass(frozen=True)
class Seen:
    """What is known of a corpus against one target."""

    points: Mapping[str, Evidence]
    """From "base" to "final", by name; those between them too."""
    target: str
    """Its name in their `dots`."""
    lengths: Mapping[str, Mapping[str, float]]
    """|T| by point and traced layer; the layers of an adapter's points are the same."""
    sketch: Float32[Tensor, " k"]
    """Of T, as the vectors at "final" are."""
    short: Int64[Tensor, " m"]
    """Rows that are matched jointly: see `with_short_list`."""

    @property
    def usable(self) -> Bool[Tensor, " n"]:
        """Rows with evidence at every point."""
        return torch.stack([point.usable for point in self.points.values()]).all(0)

    @cached_property
    def lengths_of_vectors(self) -> Float32[Tensor, " m"]:
        """Norms of the short list's vectors at "final"."""
        return self.points["final"].vectors(self.short).norm(dim=1)

    @cached_property
    def units(self) -> Gram:
        """Unit vectors at "final" of the short list, and T: made once, for it takes m^2 k products."""
        return gram(torch.nn.functional.normalize(self.points["final"].vectors(self.short)), self.sketch)

    def gradients(self) -> Gram:
        """The same of the vectors as they are."""
        lengths = self.lengths_of_vectors
        products = self.units.gram * lengths[:, None] * lengths
        return Gram(products, self.units.linear * lengths.double(), self.units.square)


@dataclass(frozen=True)
class Features:
    """A table of evidence."""

    names: tuple[str, ...]
    values: Float64[Tensor, "n f"]
    usable: Bool[Tensor, " n"]

    def standard(self) -> Float64[Tensor, "n f"]:
        """Medians off, over the median deviation of a Gaussian's standard deviation.

        Members are to move neither, for their share differs from corpus to corpus: so a feature of which more than half
        is the same, as parts of a fit are, is taken over the median of the deviations that there are.
        """
        known = self.values[self.usable]
        centre = known.median(0).values
        far = (known - centre).abs()
        spread = far.median(0).values * 1.4826  # of a Gaussian, its standard deviation
        other = torch.stack([column[column > 0].median() if column.any() else column.max() for column in far.T])
        spread = torch.where(spread > 0, spread, other)
        return ((self.values - centre) * inverse(spread)).nan_to_num(0.0).clamp(-FARTHEST, FARTHEST)


def cosines(seen: Seen, point: str) -> Float32[Tensor, "l n"]:
    """Of g and T, by layer, exact; 0 where either is 0."""
    evidence = seen.points[point]
    lengths = torch.tensor([seen.lengths[point][layer] for layer in evidence.layers])
    return evidence.dots[seen.target] * inverse(evidence.norms * lengths[:, None])


def cosine(seen: Seen, point: str) -> Float32[Tensor, " n"]:
    """Of all layers together."""
    total = float(torch.tensor(list(seen.lengths[point].values())).norm())
    return seen.points[point].cosine(seen.target, total)


def matched(seen: Seen, *, without_mean: bool = True) -> tuple[Float32[Tensor, " m"], Float32[Tensor, " m"]]:
    """Part of each row of the short list in the non-negative sum of unit gradients that matches T; and a ranking.

    Args:
        seen: Vectors at "final" are used.
        without_mean: Project the mean of the unit gradients, which any row of the corpus' kind has, off all.

    Returns:
        Parts, 0 for rows that are not in the sum; scores in which rows without a part have their cosine with the rest.
    """
    problem = seen.units
    found = nnls(problem.without(problem.mean()) if without_mean else problem)
    return found.weights, found.scores


STRATA = 5
"""Classes of length, of equal numbers of rows, from each of which a short list takes its share."""


def with_short_list(seen: Seen, size: int, *, groups: Sequence[str] | None = None) -> Seen:
    """The same with the rows that are worth matching jointly, where there are more than can be.

    Of every class of length and every group as large a share as of all: its best rows by each of three signs of
    membership in turn, cosine at "final", cosine at "base" and relative loss drop, for no one of them serves under all
    optimizers.

    Args:
        seen: Against one target.
        size: Rows to keep, about; all usable ones if there are no more.
        groups: Of each row, such as its source; None: all are one. Those too small for a row of each length are one.
    """
    rows = seen.usable.nonzero()[:, 0]
    if len(rows) <= size:
        return replace(seen, short=rows)
    before, after = seen.points["base"].loss, seen.points["final"].loss
    signs = [cosine(seen, "final"), cosine(seen, "base"), (before - after) * inverse(before)]
    tokens = seen.points["final"].tokens[rows].double()
    every = max(1, len(tokens) // 1_000_000)  # torch's quantile takes no more than 2^24
    edges = tokens[::every].quantile(torch.linspace(0, 1, STRATA + 1, dtype=torch.float64)[1:-1])
    names, numbers = groups or [""] * len(seen.usable), list(map(int, rows))
    own_rows = Counter(names[row] for row in numbers)
    large = {name for name, count in own_rows.items() if size * count >= STRATA * len(rows)}  # a row of each length
    strata: dict[tuple[int, str], list[int]] = {}
    for row, length in zip(numbers, map(int, torch.bucketize(tokens, edges)), strict=True):
        strata.setdefault((length, names[row] if names[row] in large else ""), []).append(row)
    kept: set[int] = set()
    for members in strata.values():
        own, wanted = torch.tensor(members), max(1, round(size * len(members) / len(rows)))
        orders = [own[sign[own].argsort(descending=True, stable=True)].tolist() for sign in signs]
        taken: dict[int, None] = {}
        for places in zip(*orders, strict=True):
            taken |= dict.fromkeys(places)
            if len(taken) >= wanted:
                break
        kept |= {*list(taken)[:wanted]}
    return replace(seen, short=torch.tensor(sorted(kept)))


def features(seen: Seen) -> Features:
    """All evidence of every row; those that are not in the short list have no part."""
    base, final, usable = seen.points["base"], seen.points["final"], seen.usable
    table: dict[str, Tensor] = {}
    for name, point in seen.points.items():
        table[f"loss at {name}"] = point.loss
        table[f"ln |g| at {name}"] = point.norm.clamp_min(1e-30).log()
        table[f"cosine at {name}"] = cosine(seen, name)
        table[f"cosine by layer at {name}"] = cosines(seen, name).mean(0)
        table[f"dot at {name}"] = point.dots[seen.target].sum(0)
    table["loss drop"] = base.loss - final.loss
    table["relative loss drop"] = (base.loss - final.loss) * inverse(base.loss)
    table["ln |g| ratio"] = table["ln |g| at final"] - table["ln |g| at base"]
    table["ln tokens"] = final.tokens.clamp_min(1).log()
    for name, without_mean in (("part", True), ("part with the mean", False)):
        table[name] = torch.zeros(len(usable)).index_copy_(0, seen.short, matched(seen, without_mean=without_mean)[0])
    values = torch.stack([column.double() for column in table.values()], 1)
    return Features(tuple(table), values, usable & values.isfinite().all(1))


@dataclass(frozen=True)
class Calibration:
    """A logistic model of standardised features."""

    names: tuple[str, ...]
    weights: Float64[Tensor, " f"]
    intercept: float
    share: float
    """Of members among the rows that it was fitted on."""
    ridge: float
    held_out: Float64[Tensor, " n"]
    """Log odds of those rows, each by a model that had not seen it; NaN for rows that were not usable."""

    def log_odds(self, table: Features, *, share: float | None = None) -> Float64[Tensor, " n"]:
        """Of membership; -inf for rows without evidence.

        Args:
            table: With the same features.
            share: Of members among these rows, where known; None: as many as in the calibration.

        Raises:
            SettingError: Other features.
        """
        if table.names != self.names:
            raise SettingError(f"features {', '.join(table.names)} are not those calibrated: {', '.join(self.names)}")
        odds = table.standard() @ self.weights + self.intercept
        if share is not None:
            odds = odds + logit(share) - logit(self.share)
        return torch.where(table.usable, odds, -torch.inf)


def calibrate(table: Features, members: Bool[Tensor, " n"], *, seed: int = 0) -> Calibration:
    """Fit membership on a table of rows that are known to be members or not.

    Standardised as any corpus will be, over all rows: where the two differed, probabilities were half of what they
    should be. The ridge is the one with the least log loss in cross-validation.

    Raises:
        SettingError: Too few of either.
    """
    usable = table.usable
    if min(int((members & usable).sum()), int((~members & usable).sum())) < 2 * FOLDS:
        raise SettingError(f"{int((members & usable).sum())} members and {int((~members & usable).sum())} others are "
                           f"known: {2 * FOLDS} of each are the least to calibrate on")  # fmt: skip
    x, y = table.standard()[usable], members[usable].double()
    folds = torch.randperm(len(y), generator=generator(seed, "calibrate")) % FOLDS
    tried = {ridge: _cross_validated(x, y, folds, ridge) for ridge in RIDGES}
    ridge = min(tried, key=lambda ridge: float(_log_loss(tried[ridge], y)))
    fitted = _fit(x, y, ridge)
    held_out = torch.full((len(usable),), torch.nan, dtype=torch.float64)
    held_out[usable] = tried[ridge]
    return Calibration(table.names, fitted[:-1], float(fitted[-1]), float(y.mean()), ridge, held_out)


def _cross_validated(x: Tensor, y: Tensor, folds: Tensor, ridge: float) -> Float64[Tensor, " n"]:
    out = torch.zeros_like(y)
    for fold in range(FOLDS):
        fitted = _fit(x[folds != fold], y[folds != fold], ridge)
        out[folds == fold] = x[folds == fold] @ fitted[:-1] + fitted[-1]
    return out


def _log_loss(odds: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(odds, y)


def _fit(x: Float64[Tensor, "n f"], y: Float64[Tensor, " n"], ridge: float) -> Float64[Tensor, " f_and_1"]:
    """Weights and intercept: the least log loss, summed over rows, plus ridge |weights|^2."""

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(point)
        odds = x @ w[:-1] + w[-1]
        error = odds.sigmoid() - y
        loss = _log_loss(odds, y) * len(y) + ridge * w[:-1].square().sum()
        slope = torch.cat([x.T @ error + 2 * ridge * w[:-1], error.sum()[None]])
        return float(loss), slope.numpy()

    return torch.from_numpy(minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x)


def logit(share: float) -> float:
    """ln(share / (1 - share)), of shares held between 1e-6 and 1 - 1e-6."""
    inside = min(max(share, 1e-6), 1 - 1e-6)
    return float(np.log(inside / (1 - inside)))
