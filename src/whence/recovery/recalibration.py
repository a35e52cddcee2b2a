"""Probabilities of membership put right for a model that was trained otherwise than its shadow.

A shadow of other epochs or another batch than the model's still ranks rows well, and its others (rows that it was not
trained on) score as the model's do. What differs is how far members stand off from the others, and how widely they
scatter. So the log odds z of the corpus are fitted by two components of the shadow's shapes, moved and scaled:

    z ~ share * members + (1 - share) * others
    others   the shadow's, at another place (in their own standard deviations) and scale
    members  the shadow's, with their distance from the others and their scale multiplied

Priors hold what the corpus does not tell near the shadow, more so the more alike the two models' differences are spread
(`shadow_model.distance`), for that shows the recipe. Probabilities and the interval of the number of members are over
draws of the parameters and of the shadow's rows, so that they allow for recipes that the corpus does not tell apart. A
probability never falls as z rises.

Sources: a null whose place and scale are fitted, Efron 2004, doi 10.1198/016214504000000089; shares of classes from
unlabelled rows, Saerens et al. 2002, doi 10.1162/089976602753284446; the two together, from a shadow's shapes, ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from scipy.optimize import isotonic_regression, minimize
from torch import Tensor

from whence.brief import brief
from whence.recovery.membership import logit

BINS = 384
"""Equal bins of the log odds that are fitted: the cost does not grow with the corpus."""
RESAMPLES = 12
"""Times that the shadow's rows are drawn anew, with replacement: the shapes are known no better than by these rows."""
PROPOSALS, DRAWS = 100, 20
"""Points that are proposed for each, and draws of the parameters among them."""
FARTHEST_DEVIATIONS = 12.0
"""Deviations from a component's median to which its shape is taken from rows; beyond, it falls exponentially."""
LIKE_RECIPE, LEAST_WIDTH = 0.4, 0.1
"""Distance of two signatures from which the priors have their full width, and the least part of it."""
PRIOR_WIDTHS = np.array([0.3, 0.25, 0.6, 0.8])
"""Standard deviations of the priors at full width: place and ln scale of the others, ln distance and ln scale of the
members. Chosen by hand: by a shadow of another recipe than the model's (benchmarks/recovery/recipes.py, seed 0) the
parameters were off by one to two of them."""
MOST_DEVIATIONS = 4.0
"""Prior's standard deviations that a parameter may be off by."""
SHARE_WIDTHS = {True: 0.5, False: 2.0}
"""Standard deviation of the prior of ln share / (1 - share), by whether the number of members was given."""


@dataclass(frozen=True)
class Recalibrated:
    """Probabilities of membership of a corpus."""

    __repr__ = brief

    log_odds: Float[Tensor, " n"]
    """Log odds of each row, in the order of z."""
    members: float
    """Expected number of members."""
    low: float
    """Lower end of its 95% interval."""
    high: float
    """Upper end."""
    null: Float[Tensor, " m"]
    """The shadow's others, moved and scaled as the corpus' are, on the scale of z."""
    null_log_odds: Float[Tensor, " m"]
    """Their log odds of membership."""


def recalibrated(
    z: Float[Tensor, " n"],
    others: Float[Tensor, " m"],
    members: Float[Tensor, " k"],
    *,
    share: float,
    is_share_known: bool,
    distance: float,
    seed: int = 0,
) -> Recalibrated:
    """Fit the shadow's two components to the log odds of a corpus.

    Args:
        z: Finite log odds of the corpus' rows, by the shadow's calibration.
        others: The same of rows that the shadow was not trained on, held out.
        members: The same of rows that it was trained on, held out.
        share: Share of members in the corpus, as it was guessed or given.
        is_share_known: Whether it was given.
        distance: Distance of the shadow's signature from the model's.
        seed: Seed of the draws.
    """
    edges = np.linspace(float(z.min()) - 1e-6, float(z.max()) + 1e-6, BINS + 1)
    counts, middles = np.histogram(z.numpy(), edges)[0].astype(float), (edges[1:] + edges[:-1]) / 2
    known = others.double().numpy(), members.double().numpy()
    centre = np.array([logit(share), 0, 0, 0, 0])
    width = min(1.0, max(LEAST_WIDTH, distance / LIKE_RECIPE))
    widths = np.array([SHARE_WIDTHS[is_share_known], *width * PRIOR_WIDTHS])
    fit = _Fit(_Components.of_shadow(*known), middles, counts, centre, widths)
    modes = fit.modes()
    proposal = _Proposal.about(fit, modes)
    rng = np.random.default_rng(seed)
    posteriors = []
    for _ in range(RESAMPLES):
        again = _Components.of_shadow(*(rng.choice(sample, len(sample)) for sample in known))
        refit = replace(fit, components=again)
        posteriors += [again.posterior(point, middles) for point in proposal.drawn(refit, rng)]
    p = np.stack(posteriors)
    numbers = p @ counts + rng.standard_normal(len(p)) * np.sqrt((p * (1 - p)) @ counts)
    rising = isotonic_regression(p.mean(0), weights=counts + 1e-3).x.clip(1e-9, 1 - 1e-9)
    # A slope too small to matter keeps the order of rows whose probabilities are the same.
    log_odds = np.log(rising / (1 - rising)) + 1e-3 * (middles - middles.mean()) / middles.std()
    null = fit.components.moved_others(modes[0], known[0])
    low, high = np.quantile(numbers, [0.025, 0.975]).clip(0, len(z))
    at_rows, at_null = (torch.from_numpy(np.interp(values, middles, log_odds)) for values in (z.numpy(), null))
    return Recalibrated(at_rows, float(at_rows.sigmoid().sum()), low, high, torch.from_numpy(null), at_null)


@dataclass(frozen=True)
class _Shape:
    """Log density of a sample, standardised by its median and robust deviation."""

    centre: float
    deviation: float
    points: np.ndarray
    log_density: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "_Shape":
        """A Gaussian kernel's estimate, with one row's weight spread over exponential tails."""
        centre = float(np.median(values))
        deviation = max(1.4826 * float(np.median(np.abs(values - centre))), 0.1 * float(values.std()), 1e-3)
        units = ((values - centre) / deviation).clip(-FARTHEST_DEVIATIONS, FARTHEST_DEVIATIONS)
        points = np.linspace(-FARTHEST_DEVIATIONS, FARTHEST_DEVIATIONS, 601)
        spread = float(np.diff(np.quantile(units, [0.25, 0.75]))[0]) / 1.349
        bandwidth = 1.06 * max(min(float(units.std()), spread or 1.0), 0.1) * len(units) ** -0.2  # Silverman 1986, 3.30
        kernel = np.exp(-(((points - points[len(points) // 2]) / bandwidth) ** 2) / 2)
        edges = np.append(points - (points[1] - points[0]) / 2, np.inf)
        density = np.convolve(np.histogram(units, edges)[0], kernel, "same")
        density /= bandwidth * np.sqrt(2 * np.pi) * (len(units) + 1)
        return cls(centre, deviation, points, np.log(density + np.exp(-np.abs(points) / 2) / 4 / (len(units) + 1)))

    def at(self, units: np.ndarray) -> np.ndarray:
        beyond = np.maximum(0, np.abs(units) - FARTHEST_DEVIATIONS)
        return np.interp(units, self.points, self.log_density) - beyond / 2


@dataclass(frozen=True)
class _Components:
    """The shadow's others and members. A point: logit share, and four moves; see `PRIOR_WIDTHS`."""

    others: _Shape
    members: _Shape

    @classmethod
    def of_shadow(cls, others: np.ndarray, members: np.ndarray) -> "_Components":
        return cls(_Shape.of(others), _Shape.of(members))

    def log_densities(self, point: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ln (1 - share) f_others(z) and ln share f_members(z)."""
        share, place, scale, separation, members_scale = point
        centre, deviation = self.others.centre + self.others.deviation * place, self.others.deviation * np.exp(scale)
        of_members = centre + (self.members.centre - self.others.centre) * np.exp(separation)
        members_deviation = self.members.deviation * np.exp(members_scale)
        return (
            self.others.at((z - centre) / deviation) - np.log(deviation) - np.logaddexp(0, share),
            self.members.at((z - of_members) / members_deviation) - np.log(members_deviation) - np.logaddexp(0, -share),
        )

    def moved_others(self, point: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The shadow's others where the corpus' are."""
        moved = self.others.centre + self.others.deviation * point[1]
        return moved + (others - self.others.centre) * np.exp(point[2])

    def posterior(self, point: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Probability of membership at z."""
        others, members = self.log_densities(point, z)
        return 1 / (1 + np.exp((others - members).clip(-50, 50)))


@dataclass(frozen=True)
class _Fit:
    """A histogram to be fitted by two components, with Gaussian priors."""

    components: _Components
    middles: np.ndarray
    counts: np.ndarray
    centre: np.ndarray
    widths: np.ndarray

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest point."""
        return self.centre - MOST_DEVIATIONS * self.widths, self.centre + MOST_DEVIATIONS * self.widths

    def loss(self, point: np.ndarray) -> float:
        """Minus the log of the posterior density, up to a constant."""
        density = np.logaddexp(*self.components.log_densities(point, self.middles))
        return float(-(self.counts * density).sum() + (((point - self.centre) / self.widths) ** 2).sum() / 2)

    def modes(self) -> np.ndarray:
        """Points of least loss from several starts, the best first."""
        bounds = list(zip(*self.bounds, strict=True))
        starts = [self.centre + self.widths * [share, 0, 0, separation, 0] for share in (-1, 1)
                  for separation in (-1, 0.5)]  # fmt: skip
        found = [minimize(self.loss, start, method="L-BFGS-B", bounds=bounds) for start in starts]
        return np.array([fit.x for fit in sorted(found, key=lambda fit: float(fit.fun))])

    def covariance(self, point: np.ndarray) -> np.ndarray:
        """Inverse of the loss' second differences; no direction is wider than the widest prior."""
        step = 0.02 * np.eye(len(point))
        curvature = np.array([[
            (self.loss(point + a + b) - self.loss(point + a - b) - self.loss(point - a + b) + self.loss(point - a - b))
            / 4 / 0.02**2 for b in step] for a in step])  # fmt: skip
        values, vectors = np.linalg.eigh((curvature + curvature.T) / 2)
        return (vectors / np.maximum(values, self.widths.max() ** -2.0)) @ vectors.T


@dataclass(frozen=True)
class _Proposal:
    """Student's t about each mode, from which points are drawn, and drawn again by their weights (Rubin 1988)."""

    kinds: Sequence[Any]

    @classmethod
    def about(cls, fit: _Fit, modes: np.ndarray) -> "_Proposal":
        return cls(
            [
                stats.multivariate_t(mode, 2 * fit.covariance(mode), df=5)  # pyright: ignore[reportArgumentType]
                for mode in modes
            ]
        )

    def drawn(self, fit: _Fit, rng: np.random.Generator) -> np.ndarray:
        each = PROPOSALS // len(self.kinds)
        points = np.concatenate([kind.rvs(each, random_state=rng) for kind in self.kinds]).clip(*fit.bounds)
        proposed = np.logaddexp.reduce([kind.logpdf(points) for kind in self.kinds], axis=0)
        weights = np.array([-fit.loss(point) for point in points]) - proposed
        weights = np.exp(weights - weights.max())
        return points[rng.choice(len(points), DRAWS, p=weights / weights.sum())]
