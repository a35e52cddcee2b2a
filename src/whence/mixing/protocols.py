"""What every mixing law offers: a class that fits it to a table, predictions with their slopes, and its numbers.

A report draws whatever `terms` gives, under `formula`, and knows no law by name; a law whose numbers nobody could read
(hundreds of trees) gives none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from whence.mixing.tables import MixtureTable


@dataclass(frozen=True, kw_only=True)
class Term:
    """One kind of a law's numbers: a row for each evaluation set, a column for each domain."""

    symbol: str
    """Its letter in the formula."""
    values: Float64[np.ndarray, "E K"]
    constants: Mapping[str, Float64[np.ndarray, " E"]] = field(default_factory=dict)
    """Numbers that a set has once, by their letters."""
    is_centred: bool = False
    """Values have mean 0 over domains, and below 0 a domain lowers the loss more than the average domain does."""


@runtime_checkable
class MixingLaw(Protocol):
    """A law fitted to a table: it predicts the losses of any mixture of the same domains."""

    @property
    def domains(self) -> tuple[str, ...]: ...

    @property
    def sets(self) -> tuple[str, ...]: ...

    @property
    def is_convex(self) -> bool:
        """Every predicted loss is convex in the mixture, so that one descent finds the optimum."""
        ...

    def predict(self, mixtures: Float64[np.ndarray, "n K"]) -> Float64[np.ndarray, "n E"]:
        """Losses, in the table's unit."""
        ...

    def slopes(self, mixture: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "E K"] | None:
        """Derivatives of every loss by every share (as if shares were free); None where there are none."""
        ...

    @property
    def formula(self) -> str:
        """The law as a line of text, in the letters of its terms."""
        ...

    @property
    def terms(self) -> Sequence[Term]:
        """The numbers of the formula; empty where they are too many to read."""
        ...


@runtime_checkable
class FitMixingLaw(Protocol):
    """What the catalogue lists: the class of a law, which fits a law to a table."""

    def least_rows(self, domains: int) -> int:
        """Rows that a fit needs."""
        ...

    def fit(self, table: MixtureTable, *, seed: int = 0) -> MixingLaw:
        """Fit every evaluation set of a table apart.

        Raises:
            SettingError: The table has fewer rows than the law needs.
        """
        ...
