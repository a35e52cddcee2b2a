"""The exponential law: L_i(r) = c_i + exp(b_i + sum over domains j of t_ij r_j).

L_i(r) is the loss on evaluation set i of a model trained on mixture r; c_i is the loss that no mixture takes away, and
t_ij says how far domain j lowers (below 0) or raises the rest. The law is convex in r. As shares sum to 1, b_i could be
put into the t_ij; here their mean over j is 0, which leaves K + 1 free numbers a set.

Each set is fitted apart, to losses less their median and over their spread (from quartiles), so that units do not
matter: least squares with Huber's loss (a residual over `HUBER` spreads counts linearly) by a trust-region Gauss-Newton
method with the exact Jacobian, from `STARTS` values of c, of which the best result counts. A start fixes c and solves
the rest, which is then linear: ln(L - c) = b + t . r. A weak penalty `PENALTY` on the t holds domains that the table
hardly has near the others; without it, a fit to few mixtures can predict losses of hundreds.

`HUBER` and `PENALTY` were chosen by cross-validation within the first 32, 64 and 128 of RegMix's training mixtures
(docs/results/mixing.md). Except with very few rows, starts differ by under 1% in the objective that they reach.

The law cannot express domains that help only together, or that help up to some share and harm beyond it: along any line
the exponential rises or falls throughout.

Source: Ye et al. 2025, Data Mixing Laws, https://arxiv.org/abs/2403.16952. Their code fits with L-BFGS and Huber's loss
in nats; scales, penalty and starts are ours.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.optimize import least_squares

from whence.brief import brief
from whence.mixing.protocols import Term
from whence.mixing.tables import MixtureTable, refuse_too_few
from whence.numerics import mixed_seed

HUBER = 0.5
"""Residual, in spreads of a set's losses, from which it counts linearly."""
NORMAL = 1.349
"""Interquartile range of a normal variable of standard deviation 1; a few wild losses do not move quartiles."""
PENALTY = 3e-5
"""Weight of the sum over domains of (t_ij - mean t_i)^2, beside half the sum of squared residuals."""
STARTS = 4
GAPS = (0.05, 2.0)
"""Least and largest distance of a start's c below the lowest loss, in spreads."""
HIGHEST = 30.0
"""Largest exponent that a fit tries, for losses in spreads."""
OVERFLOW = 700.0
"""Largest exponent: beyond about 709 float64 overflows."""


@dataclass(frozen=True, kw_only=True)
class ExpLaw:
    """A fitted exponential law.

    >>> law = ExpLaw(domains=("a", "b"), sets=("x",), c=np.ones(1), b=np.zeros(1), t=np.array([[-1.0, 1.0]]))
    >>> law.predict(np.array([[0.5, 0.5]])).tolist()
    [[2.0]]
    """

    __repr__ = brief

    domains: tuple[str, ...]
    sets: tuple[str, ...]
    c: Float64[np.ndarray, " E"]
    """In the unit of the losses."""
    b: Float64[np.ndarray, " E"]
    """exp(b) has the unit of the losses."""
    t: Float64[np.ndarray, "E K"]
    """For a whole share: a hundredth more of a domain, in place of the average one, adds 0.01 t to the exponent."""
    is_convex: bool = True

    @staticmethod
    def least_rows(domains: int) -> int:
        """One row more than a set has free numbers."""
        return domains + 2

    @classmethod
    def fit(cls, table: MixtureTable, *, seed: int = 0) -> "ExpLaw":
        """Fit every set of a table.

        Args:
            table: Mixtures and losses.
            seed: Jitters the starts.

        Raises:
            SettingError: The table has fewer rows than `least_rows`.
        """
        refuse_too_few(table, cls.least_rows(len(table.domains)), "exp")
        fits = [
            _set_numbers(table.mixtures, losses, seed, name)
            for name, losses in zip(table.sets, table.losses.T, strict=True)
        ]
        c, b, t = (np.stack(numbers) for numbers in zip(*fits, strict=True))
        return cls(domains=table.domains, sets=table.sets, c=c, b=b, t=t)

    def predict(self, mixtures: Float64[np.ndarray, "n K"]) -> Float64[np.ndarray, "n E"]:
        """Losses of mixtures."""
        return self.c + np.exp(np.minimum(self.b + mixtures @ self.t.T, OVERFLOW))

    def slopes(self, mixture: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "E K"]:
        """Derivatives of every loss by every share."""
        return np.exp(np.minimum(self.b + self.t @ mixture, OVERFLOW))[:, None] * self.t

    @property
    def formula(self) -> str:
        """The law in letters."""
        return "L(r) = c + exp(b + sum of t r) for shares r"

    @property
    def terms(self) -> tuple[Term]:
        """The t, with c and exp(b) of each set."""
        constants = {"c": self.c, "exp(b)": np.exp(np.minimum(self.b, OVERFLOW))}
        return (Term(symbol="t", values=self.t, constants=constants, is_centred=True),)


def _set_numbers(
    r: Float64[np.ndarray, "n K"], losses: Float64[np.ndarray, " n"], seed: int, name: str
) -> tuple[np.float64, np.float64, Float64[np.ndarray, " K"]]:
    """c, b and t of one set."""
    low, middle, high = np.quantile(losses, [0.25, 0.5, 0.75])
    spread = (high - low) / NORMAL if high > low else losses.std()
    if spread <= 1e-12 * max(1.0, abs(middle)):  # the same loss everywhere, so t cannot be known
        return np.float64(middle - 1), np.float64(0.0), np.zeros(r.shape[1])
    fit = _LeastSquares(r, (losses - middle) / spread)
    rng = np.random.default_rng(mixed_seed(seed, "exponential law", name))
    jitter = rng.uniform(-0.5, 0.5, STARTS)  # of a step of the ladder
    gaps = np.geomspace(*GAPS, STARTS) * (GAPS[1] / GAPS[0]) ** (jitter / (STARTS - 1))
    c, *t = min((fit.descend(gap) for gap in gaps), key=lambda result: result[0])[1]
    mean = np.mean(t)
    return middle + spread * c, mean + np.log(spread), np.array(t) - mean


class _LeastSquares:
    """Least squares for one set in p = K + 1 numbers (c, t), with losses less their median, over their spread.

    Methods that run at every step have no shapes: checking them would take longer than the step.
    """

    def __init__(self, r: Float64[np.ndarray, "n K"], losses: Float64[np.ndarray, " n"]):
        n, domains = r.shape
        self.r, self.losses, self.n = r, losses, n
        self.penalty = (2 * PENALTY) ** 0.5 * (np.eye(domains) - 1 / domains)  # centred t, as K more residuals

    def descend(self, gap: float) -> tuple[float, Float64[np.ndarray, " p"]]:
        """Objective and parameters that a start reaches."""
        solution = least_squares(
            self._residuals,
            self._start(gap),
            self._jacobian,  # type: ignore[arg-type]  # scipy's stubs know of names only
            loss=self._huber,  # type: ignore[arg-type]
            x_scale="jac",
            max_nfev=300,
            ftol=1e-10,
            xtol=1e-10,
            gtol=1e-10,
        )
        return float(solution.cost), solution.x

    def _start(self, gap: float) -> np.ndarray:
        c = self.losses.min() - gap
        logs = np.log(self.losses - c)
        small = 1e-2 * np.eye(self.r.shape[1])
        t = np.linalg.solve(self.r.T @ self.r + small, self.r.T @ (logs - logs.mean())) + logs.mean()
        return np.concatenate([[c], t])

    def _rest(self, parameters: np.ndarray) -> np.ndarray:
        return np.exp(np.minimum(self.r @ parameters[1:], HIGHEST))

    def _residuals(self, parameters: np.ndarray) -> np.ndarray:
        fitted = parameters[0] + self._rest(parameters)
        return np.concatenate([fitted - self.losses, self.penalty @ parameters[1:]])

    def _jacobian(self, parameters: np.ndarray) -> np.ndarray:
        upper = np.column_stack([np.ones(self.n), self._rest(parameters)[:, None] * self.r])
        return np.vstack([upper, np.column_stack([np.zeros(len(self.penalty)), self.penalty])])

    def _huber(self, squares: np.ndarray) -> np.ndarray:
        """Huber's loss of squared residuals, its first and second derivative; the penalty stays a square."""
        far = squares > HUBER**2
        far[self.n :] = False
        root = np.sqrt(np.where(far, squares, 1.0))
        value = np.where(far, 2 * HUBER * root - HUBER**2, squares)
        first = np.where(far, HUBER / root, 1.0)
        second = np.where(far, -0.5 * HUBER / root**3, 0.0)
        return np.stack([value, first, second])
