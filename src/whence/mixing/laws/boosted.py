"""Boosted trees: losses as a sum of small regression trees over the shares, by LightGBM (the extra `laws`).

The rows of the table are dealt to `FOLDS` folds; for each, trees are grown on the other rows until the fold's error has
not fallen for `PATIENCE` trees, and the law is the mean of the folds' sums. So every row takes part, and what stops the
growth is never a row that anything is graded by. Leaves may hold as few as `LEAST_IN_LEAF` rows: with LightGBM's own
20, some dozens of mixtures cannot be split at all. Their number and size were chosen by cross-validation within
RegMix's training mixtures (docs/mix.md).

Trees know no trend: beyond what the table holds they predict what it held last, and their optimum is searched for, not
descended to.

Source: Liu et al. 2025, RegMix, https://arxiv.org/abs/2407.01492; Ke et al. 2017, LightGBM. RegMix' code stops early by
the error on its test set; here held-out rows of the training table decide.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from whence.errors import MissingExtraError
from whence.mixing.tables import MixtureTable, refuse_too_few
from whence.numerics import mixed_seed

FOLDS = 5
ROUNDS = 3000
"""Trees at most."""
PATIENCE = 50
RATE = 0.03
LEAVES = 4
LEAST_IN_LEAF = 3
MANY = 1000
"""Mixtures from which all cores predict."""
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

    domains: tuple[str, ...]
    sets: tuple[str, ...]
    trees: tuple[tuple[Any, ...], ...]
    """Of each set, a LightGBM booster a fold."""
    is_convex: bool = False

    @staticmethod
    def least_rows(domains: int) -> int:
        """That leave a split on either side, in every fold."""
        return 4 * LEAST_IN_LEAF

    @classmethod
    def fit(cls, table: MixtureTable, *, seed: int = 0) -> "BoostedLaw":
        """Fit every set of a table.

        Args:
            table: Mixtures and losses.
            seed: Of the dealing to folds.

        Raises:
            SettingError: Fewer rows than `least_rows`.
            MissingExtraError: LightGBM is not installed.
        """
        refuse_too_few(table, cls.least_rows(len(table.domains)), "lightgbm")
        fold = np.random.default_rng(mixed_seed(seed, "boosted law")).permutation(table.n) % FOLDS
        trees = (
            tuple(_grown(table.mixtures, losses, fold == held) for held in range(FOLDS)) for losses in table.losses.T
        )
        return cls(domains=table.domains, sets=table.sets, trees=tuple(trees))

    def predict(self, mixtures: Float64[np.ndarray, "n K"]) -> Float64[np.ndarray, "n E"]:
        """Losses of mixtures."""
        threads = 1 if len(mixtures) < MANY else 0  # 0: all; of rows apart, so the numbers stay the same
        of_sets = ([one.predict(mixtures, num_threads=threads) for one in of_set] for of_set in self.trees)
        return np.stack([np.mean(of_folds, 0) for of_folds in of_sets], 1)

    def slopes(self, mixture: Float64[np.ndarray, " K"]) -> None:
        """None: they are 0, or there is none."""
        return None


def _grown(r: Float64[np.ndarray, "n K"], losses: Float64[np.ndarray, " n"], held: np.ndarray) -> Any:
    """Trees of the rows not held, as many as are best for those that are."""
    try:
        import lightgbm
    except (ImportError, OSError) as error:  # OSError: the package without its OpenMP library
        raise MissingExtraError(
            f"--law lightgbm needs one more package ({error}): pip install 'whence[laws]'"
        ) from None
    rows = lightgbm.Dataset(r[~held], losses[~held])
    return lightgbm.train(
        PARAMETERS,
        rows,
        ROUNDS,
        valid_sets=[lightgbm.Dataset(r[held], losses[held], reference=rows)],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
