"""`whence mix law --predict`: what a fitted law expects of the mixtures of another table, and how right it is.

Cross-validation says how well a law predicts mixtures that were drawn as its own were. Another table may hold others:
larger shares, another seed, a larger model. Where its losses are known the predictions are graded by them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from whence.corpus.layouts import Row
from whence.errors import SettingError
from whence.mixing.pipeline import Grade, HeldOut, MixLaw, grade_columns
from whence.mixing.tables import MixtureTable, has_losses, read_mixture_table, read_mixtures

UNKNOWN = ("",)
"""Sets of a table of mixtures whose losses nobody knows."""


@dataclass(frozen=True)
class Prediction:
    """Losses that a law expects of mixtures."""

    names: tuple[str, ...]
    sets: tuple[str, ...]
    predicted: Float64[np.ndarray, "n E"]
    objective: Float64[np.ndarray, " n"]
    """Mean over the sets, weighted as the law's search was."""
    held_out: HeldOut | None
    """With the true losses on those of the sets that the table has; None without losses."""

    @property
    def rows(self) -> list[Row]:
        """One row for each mixture."""
        known = self.held_out.table if self.held_out is not None else None
        return [
            {"mixture": name, "objective": float(self.objective[place])}
            | {f"predicted/{one}": float(loss) for one, loss in zip(self.sets, self.predicted[place], strict=True)}
            | (
                {f"true/{one}": float(x) for one, x in zip(known.sets, known.losses[place], strict=True)}
                if known
                else {}
            )
            for place, name in enumerate(self.names)
        ]

    def document(self) -> dict[str, Any]:
        """As JSON: rows, and the grades where losses are known."""
        if self.held_out is None:
            return {"rows": self.rows, "sets": None, "overall": None}
        sets: dict[str, Grade] = self.held_out.sets
        grades = {name: grade_columns(grade) for name, grade in sets.items()}
        return {"rows": self.rows, "sets": grades, "overall": grade_columns(self.held_out.overall)}


def predict(
    result: MixLaw,
    mixtures: str | Path | list[Row] | MixtureTable,
    losses: str | Path | list[Row] | None = None,
    *,
    mixture_prefix: str | None = None,
    loss_prefix: str | None = None,
) -> Prediction:
    """Losses that a fitted law expects of another table's mixtures, graded where the table has losses.

    Args:
        result: What `mix_law` gave.
        mixtures: Shares of the law's domains, in any order; or shares and losses; or what `read_others` gave.
        losses: Losses, where they are in another file.
        mixture_prefix: How the columns of shares begin.
        loss_prefix: How the columns of losses begin.

    Raises:
        SettingError: The table has other domains than the law, none of its sets, or cannot be used.
    """
    own, other = result.table, mixtures
    if not isinstance(other, MixtureTable):
        other = read_others(other, losses, mixture_prefix=mixture_prefix, loss_prefix=loss_prefix)
    if odd := sorted({*other.domains} ^ {*own.domains}):
        raise SettingError(
            f"--predict: {', '.join(odd[:4])} is a domain of one of the two tables alone, and a law predicts mixtures "
            "of its own domains only"
        )
    shares = other.mixtures[:, [other.domains.index(name) for name in own.domains]]
    predicted, held_out = result.law.predict(shares), None
    if other.sets != UNKNOWN:
        known = [name for name in own.sets if name in other.sets]
        if not known:
            raise SettingError(
                f"--predict: the losses are on {', '.join(other.sets)}, of which the law predicts none; it predicts "
                f"{', '.join(own.sets)}"
            )
        losses_known = other.losses[:, [other.sets.index(name) for name in known]]
        table = replace(other, domains=own.domains, sets=tuple(known), mixtures=shares, losses=losses_known)
        columns = [own.sets.index(name) for name in known]
        held_out = HeldOut(table, predicted[:, columns], 0, result.settings["seed"])
    return Prediction(other.row_names, own.sets, predicted, predicted @ result.weights, held_out)


def read_others(
    mixtures: str | Path | list[Row],
    losses: str | Path | list[Row] | None = None,
    *,
    mixture_prefix: str | None = None,
    loss_prefix: str | None = None,
) -> MixtureTable:
    """Read mixtures to predict; their only set is `UNKNOWN` where they have no losses."""
    if losses is not None or has_losses(mixtures, loss_prefix):
        return read_mixture_table(mixtures, losses, mixture_prefix=mixture_prefix, loss_prefix=loss_prefix)
    return read_mixtures(mixtures, UNKNOWN, mixture_prefix=mixture_prefix)
