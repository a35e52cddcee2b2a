"""The mixtures that an ablation judges: those that are given, or the usual ones of a pool."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whence.ablation.merging import checked
from whence.ablation.pool import Pool
from whence.corpus.reading import rows_with_place
from whence.errors import SettingError

MOST_DEFAULT = 200
"""Candidates that are made up where none are given."""


@dataclass(frozen=True)
class Candidate:
    """A mixture to be judged."""

    name: str
    weights: Mapping[str, float]
    """By partition, summing to 1."""
    budgets: float
    """Token budget of its real training, in members': the number of its partitions, unless given."""


def read_candidates(pool: Pool, mixtures: str | Path | Sequence[Mapping[str, Any]] | None) -> list[Candidate]:
    """Candidates from a file, from rows, or the usual ones.

    Raises:
        SettingError: See `merging.checked`; also two of one name.
    """
    if mixtures is None:
        return usual_candidates(pool.partitions)
    rows = rows_with_place(str(mixtures)) if isinstance(mixtures, str | Path) else (
        (f"mixture {number}", dict(row)) for number, row in enumerate(mixtures, 1))  # fmt: skip
    found: list[Candidate] = []
    for where, row in rows:
        given = row.get("weights")
        others = {name: value for name, value in row.items() if name not in ("name", "budgets")}
        columns = given if isinstance(given, dict) else others
        try:
            shares = {str(name): float(str(value or 0.0)) for name, value in columns.items()}
        except (TypeError, ValueError):
            raise SettingError(f"{where}: a weight is not a number: {columns!r}") from None
        weights = checked(shares, pool.members, name=where)
        budgets = _budgets(row.get("budgets"), len(weights), where)
        name = str(row.get("name") or " + ".join(f"{weight:.3g} {part}" for part, weight in weights.items()))
        found.append(Candidate(name, weights, budgets))
    _refuse_twins(found)
    return found


def _budgets(given: Any, usual: int, where: str) -> float:
    """A number above 0, or as many as there are partitions."""
    try:
        found = float(given or usual)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 < found < math.inf:
        raise SettingError(f"{where}: budgets {given!r}; a number above 0 is expected")
    return found


def usual_candidates(partitions: Sequence[str]) -> list[Candidate]:
    """Every partition alone, all pairs (as many as there is room for), all together."""
    singles = [Candidate(name, {name: 1.0}, 1.0) for name in partitions]
    pairs = [Candidate(f"{a} + {b}", {a: 0.5, b: 0.5}, 2.0) for a, b in itertools.combinations(partitions, 2)]
    everything = Candidate("all", {name: 1 / len(partitions) for name in partitions}, float(len(partitions)))
    return [*singles, *pairs[: max(0, MOST_DEFAULT - len(singles))], *([everything] if len(partitions) > 2 else [])]


def _refuse_twins(candidates: Iterable[Candidate]) -> None:
    names: set[str] = set()
    for candidate in candidates:
        if candidate.name in names:
            raise SettingError(f"--mixtures: two mixtures are called {candidate.name!r}")
        names.add(candidate.name)
    if not names:
        raise SettingError("--mixtures: one mixture or more is expected")
