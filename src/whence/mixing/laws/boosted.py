"""Boosted trees: losses as a sum of small regression trees over the shares, by LightGBM (the extra `laws`).

The rows of the table are dealt to `FOLDS` folds; for each, trees are grown on the other rows until the fold's error has
not fallen for `PATIENCE` trees, and the law is the mean of the folds' sums. So every row takes part, and the rows that
stop the growth are never rows that a grade is computed on. Leaves may hold as few as `LEAST_IN_LEAF` rows: with
LightGBM's own 20, some dozens of mixtures cannot be split at all. The number and size of leaves were chosen by
cross-validation within RegMix's training mixtures (docs/results/mixing.md).

Trees extrapolate no trend: outside the table's range they repeat its outermost predictions. Their optimum is found by
random search, not by descent.

Source: Liu et al. 2025, RegMix, https://arxiv.org/abs/2407.01492; Ke et al. 2017, LightGBM. RegMix' code stops early by
the error on its test set; here held-out rows of the training table decide.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from whence.brief import brief
from whence.errors import MissingExtraError
from whence.mixing.tables import MixtureTable, refuse_too_few
from whence.numerics import mixed_seed

FOLDS = 5
ROUNDS = 3000
"""Most trees of a fold."""
PATIENCE = 50
RATE = 0.03
LEAVES = 4
LEAST_IN_LEAF = 3
PARALLEL_ROWS = 1000
"""From this number of mixtures on, prediction uses all cores."""
PARAMETERS: dict[str, Any] = {
    "objective": "regression",
    "metric": "l2",
    "learning_rate": RATE,
    "num_leaves": LEAVES,
    "min_data_in_leaf": LEAST_IN_LEAF,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,  # tables are small, and sums of threads differ from run to run
    "seed": 0,
    "verbosity": -1,
}


@dataclass(frozen=True, kw_only=True)
class BoostedLaw:
    """Fitted trees."""

    __repr__ = brief

    domains: tuple[str, ...]
    sets: tuple[str, ...]
    trees: tuple[tuple[Any, ...], ...]
    """For each set, one LightGBM booster a fold."""
    is_convex: bool = False

    @staticmethod
    def least_rows(domains: int) -> int:
        """Enough that either side of a split holds a leaf, in every fold."""
        return 4 * LEAST_IN_LEAF

    @classmethod
    def fit(cls, table: MixtureTable, *, seed: int = 0) -> "BoostedLaw":
        """Fit every set of a table.

        Args:
            table: Mixtures and losses.
            seed: Decides which rows form which fold.

        Raises:
            SettingError: The table has fewer rows than `least_rows`.
            MissingExtraError: LightGBM is not installed.
        """
        refuse_too_few(table, cls.least_rows(len(table.domains)), "lightgbm")
        fold = np.random.default_rng(mixed_seed(seed, "boosted law")).permutation(table.n) % FOLDS
        trees = (
            tuple(_booster(table.mixtures, losses, fold == number) for number in range(FOLDS))
            for losses in table.losses.T
        )
        return cls(domains=table.domains, sets=table.sets, trees=tuple(trees))

    def predict(self, mixtures: Float64[np.ndarray, "n K"]) -> Float64[np.ndarray, "n E"]:
        """Losses of mixtures."""
        threads = 1 if len(mixtures) < PARALLEL_ROWS else 0  # 0: all; rows are apart, so numbers stay the same
        by_set = ([booster.predict(mixtures, num_threads=threads) for booster in boosters] for boosters in self.trees)
        return np.stack([np.mean(by_fold, 0) for by_fold in by_set], 1)

    def slopes(self, mixture: Float64[np.ndarray, " K"]) -> None:
        """None: a tree is flat but at its splits, where it has no derivative."""
        return None

    @property
    def formula(self) -> str:
        """The law in letters."""
        return "L(r) = mean over folds of a sum of trees in the shares r"

    @property
    def terms(self) -> tuple[()]:
        """None: thousands of leaves."""
        return ()


def _booster(r: Float64[np.ndarray, "n K"], losses: Float64[np.ndarray, " n"], is_validation: np.ndarray) -> Any:
    """A booster grown on the other rows, with as many trees as predict the validation rows best."""
    try:
        import lightgbm
    except (ImportError, OSError) as error:  # OSError: the package without its OpenMP library
        raise MissingExtraError(
            f"--law lightgbm needs one more package ({error}): pip install 'whence[laws]'"
        ) from None
    rows = lightgbm.Dataset(r[~is_validation], losses[~is_validation])
    return lightgbm.train(
        PARAMETERS,
        rows,
        ROUNDS,
        valid_sets=[lightgbm.Dataset(r[is_validation], losses[is_validation], reference=rows)],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
