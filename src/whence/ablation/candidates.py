"""The candidates of an ablation: the mixtures of a file, or the usual ones of a pool."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whence.ablation.mixtures import checked_mixture
from whence.ablation.pool import Pool
from whence.corpus.reading import rows_with_place
from whence.errors import SettingError

MOST_DEFAULT = 200
"""Default candidates, at most."""


@dataclass(frozen=True)
class Candidate:
    """A mixture to be judged."""

    name: str
    weights: Mapping[str, float]
    """Weights by partition, which sum to 1."""
    budgets: float
    """Token budget of its real training, in members' budgets; by default the number of its partitions."""


def read_candidates(pool: Pool, mixtures: str | Path | Sequence[Mapping[str, Any]] | None) -> list[Candidate]:
    """Candidates from a file, from rows, or the usual ones.

    Raises:
        SettingError: See `mixtures.checked_mixture`; also if two have one name.
    """
    if mixtures is None:
        return usual_candidates(pool.partitions)
    rows = rows_with_place(str(mixtures)) if isinstance(mixtures, str | Path) else (
        (f"mixture {number}", dict(row)) for number, row in enumerate(mixtures, 1))  # fmt: skip
    candidates: list[Candidate] = []
    for where, row in rows:
        nested = row.get("weights")
        flat = {name: value for name, value in row.items() if name not in ("name", "budgets")}
        columns = nested if isinstance(nested, dict) else flat
        try:
            shares = {str(name): float(str(value or 0.0)) for name, value in columns.items()}
        except (TypeError, ValueError):
            raise SettingError(f"{where}: a weight is not a number: {columns!r}") from None
        weights = checked_mixture(shares, pool.members, name=where)
        budgets = _budgets(row.get("budgets"), len(weights), where)
        name = str(row.get("name") or " + ".join(f"{weight:.3g} {partition}" for partition, weight in weights.items()))
        candidates.append(Candidate(name, weights, budgets))
    _refuse_equal_names(candidates)
    return candidates


def _budgets(value: Any, default: int, where: str) -> float:
    """The budgets of a row, above 0, or the default."""
    try:
        budgets = float(value or default)
    except (TypeError, ValueError):
        budgets = math.nan
    if not 0 < budgets < math.inf:
        raise SettingError(f"{where}: budgets {value!r}; a number above 0 is expected")
    return budgets


def usual_candidates(partitions: Sequence[str]) -> list[Candidate]:
    """Every partition alone, all pairs (up to `MOST_DEFAULT` candidates), all together."""
    singles = [Candidate(name, {name: 1.0}, 1.0) for name in partitions]
    pairs = [Candidate(f"{a} + {b}", {a: 0.5, b: 0.5}, 2.0) for a, b in itertools.combinations(partitions, 2)]
    everything = Candidate("all", {name: 1 / len(partitions) for name in partitions}, float(len(partitions)))
    return [*singles, *pairs[: max(0, MOST_DEFAULT - len(singles))], *([everything] if len(partitions) > 2 else [])]


def _refuse_equal_names(candidates: Iterable[Candidate]) -> None:
    names: set[str] = set()
    for candidate in candidates:
        if candidate.name in names:
            raise SettingError(f"--mixtures: two mixtures are called {candidate.name!r}")
        names.add(candidate.name)
    if not names:
        raise SettingError("--mixtures: one mixture or more is expected")
