"""Ridge regression of losses on shares and their logarithms: L(r) = w + sum over j of u_j r_j + v_j ln(r_j + eps).

Columns are standardised; the penalty and eps of each set are those of least leave-one-out error, which for ridge
regression has a closed form (residual over 1 - leverage, the intercept's 1/n included). The logarithm lets the first
hundredth of a domain matter more than the tenth one, as it does in RegMix's tables.

Source: Hoerl and Kennard 1970, https://doi.org/10.1080/00401706.1970.10488634; the error is Allen's PRESS, 1974,
https://doi.org/10.1080/00401706.1974.10489157. The columns are ours.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from whence.brief import brief
from whence.mixing.protocols import Term
from whence.mixing.tables import MixtureTable, refuse_too_few

EPS = (1e-3, 3e-3, 1e-2, 3e-2)
"""Values to choose from, as shares."""
PENALTIES = tuple(float(10.0**power) for power in range(-6, 5))
"""Weights to choose from of the squared coefficients of standardised columns, beside the squared residuals."""
FLAT = 1e-9
"""Standard deviation below which a column counts as constant."""


@dataclass(frozen=True, kw_only=True)
class RidgeLaw:
    """A fitted regression.

    >>> zero = np.zeros((1, 2))
    >>> law = RidgeLaw(domains=("a", "b"), sets=("x",), w=np.ones(1), u=zero + [1, 2], v=zero, eps=np.full(1, 0.1))
    >>> law.predict(np.array([[0.5, 0.5]])).tolist()
    [[2.5]]
    """

    __repr__ = brief

    domains: tuple[str, ...]
    sets: tuple[str, ...]
    w: Float64[np.ndarray, " E"]
    u: Float64[np.ndarray, "E K"]
    v: Float64[np.ndarray, "E K"]
    eps: Float64[np.ndarray, " E"]
    penalties: tuple[float, ...] = ()
    """The penalty chosen for each set."""
    is_convex: bool = False
    """A term with v above 0 is concave."""

    @staticmethod
    def least_rows(domains: int) -> int:
        """A fixed number: with the penalty, a fit may have fewer rows than columns."""
        return 8

    @classmethod
    def fit(cls, table: MixtureTable, *, seed: int = 0) -> "RidgeLaw":
        """Fit every set of a table.

        Args:
            table: Mixtures and losses.
            seed: Unused, as nothing is drawn.

        Raises:
            SettingError: The table has fewer rows than `least_rows`.
        """
        refuse_too_few(table, cls.least_rows(len(table.domains)), "ridge")
        grids = [_Columns(table.mixtures, eps) for eps in EPS]
        fits = []
        for losses in table.losses.T:
            candidates = [
                (columns.error(losses, penalty), penalty, columns) for columns in grids for penalty in PENALTIES
            ]
            _, penalty, columns = min(candidates, key=lambda candidate: candidate[0])
            fits.append((*columns.weights(losses, penalty), columns.eps, penalty))
        w, u, v, eps, penalties = zip(*fits, strict=True)
        return cls(
            domains=table.domains, sets=table.sets, w=np.array(w), u=np.stack(u), v=np.stack(v), eps=np.array(eps),
            penalties=penalties,
        )  # fmt: skip

    def predict(self, mixtures: Float64[np.ndarray, "n K"]) -> Float64[np.ndarray, "n E"]:
        """Losses of mixtures."""
        logs = np.log(mixtures[:, None, :] + self.eps[:, None])  # n E K
        return self.w + mixtures @ self.u.T + np.einsum("nek,ek->ne", logs, self.v)

    def slopes(self, mixture: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "E K"]:
        """Derivatives of every loss by every share."""
        return self.u + self.v / (mixture + self.eps[:, None])

    @property
    def formula(self) -> str:
        """The law in letters."""
        return "L(r) = w + sum of u r + v ln(r + eps) for shares r"

    @property
    def terms(self) -> tuple[Term, Term]:
        """The u with each set's w, and the v with its eps."""
        return (
            Term(symbol="u", values=self.u, constants={"w": self.w}),
            Term(symbol="v", values=self.v, constants={"eps": self.eps}),
        )


class _Columns:
    """A table's standardised columns for one eps, with their singular value decomposition."""

    def __init__(self, mixtures: Float64[np.ndarray, "n K"], eps: float):
        raw = np.hstack([mixtures, np.log(mixtures + eps)])
        self.eps, self.mean, spread = eps, raw.mean(0), raw.std(0)
        self.scale = np.where(spread > FLAT, 1 / np.maximum(spread, FLAT), 0.0)
        self.left, self.values, self.right = np.linalg.svd((raw - self.mean) * self.scale, full_matrices=False)

    def error(self, losses: Float64[np.ndarray, " n"], penalty: float) -> float:
        """Mean squared leave-one-out error."""
        shrinkage = self.values**2 / (self.values**2 + penalty)
        leverage = (self.left**2 @ shrinkage) + 1 / len(losses)
        centred = losses - losses.mean()
        residuals = centred - self.left @ (shrinkage * (self.left.T @ centred))
        return float(np.mean((residuals / np.maximum(1 - leverage, FLAT)) ** 2))

    def weights(
        self, losses: Float64[np.ndarray, " n"], penalty: float
    ) -> tuple[float, Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
        """Intercept, weights of shares and of logarithms."""
        inverse = self.values / (self.values**2 + penalty)
        weights = self.scale * (self.right.T @ (inverse * (self.left.T @ (losses - losses.mean()))))
        u, v = np.split(weights, 2)
        return float(losses.mean() - self.mean @ weights), u, v
