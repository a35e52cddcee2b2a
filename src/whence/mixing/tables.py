"""Tables of mixtures and losses: what shares of each domain a model was trained on, and what it made of each text.

A mixture is a row r of K shares, none negative, that sum to 1; its losses are E numbers, one for each evaluation set,
in whatever unit the table has (nats a token, as a rule; a law does not care). A table comes from anywhere: real runs,
merged models of a pool, somebody else's csv. Files are read as corpora are (csv, jsonl, Parquet; see `corpus`) in one
of three layouts:

- two files, of mixtures and of losses, matched by a column `index`, `id` or `name` that both have, or else by order;
- one file with both, told apart by how a column's name begins: `train_NAME` or `mixture/NAME` is the share of a
  domain, `metric/NAME` or `loss/NAME` the loss on a set. In jsonl, `{"mixture": {...}, "loss": {...}}` is the same, and
  a domain that an object does not name has no share;
- the long layout that `whence ablate -o` writes, a row for each `mixture` and `set`, with the loss as `loss`, `truth`
  or `merged` (the first that every row has), and the shares as `mixture/NAME`, or in another file with a column `name`.

What is wrong with a table is told here, by row and column, so that laws see clean numbers only.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64

from whence.corpus.layouts import Row
from whence.corpus.reading import rows_with_place
from whence.errors import SettingError

KEYS = ("index", "id", "name")
"""Columns that say which row this is."""
MIXTURE_PREFIXES = ("train_", "mixture/", "weights/")
LOSS_PREFIXES = ("metric/", "loss/", "losses/")
LOSS_ENDINGS = ("_val_loss", "_loss")
"""Left out of a set's name where every column has it."""
LONG_COLUMNS = ("loss", "truth", "merged")
"""Of the long layout, in order of trust."""
ROUNDING = 1e-2
"""How far from 1 shares may sum: they are often written with three digits, and are then made to sum to 1."""


@dataclass(frozen=True, kw_only=True)
class MixtureTable:
    """Mixtures, and the losses that they gave.

    Shares are made to sum to 1 exactly where they did up to `ROUNDING`.

    Raises:
        SettingError: A share that is negative, a row that does not sum to 1, a number that is not finite, a name given
            twice, no row; the message names row and column.

    >>> MixtureTable(domains=("a", "b"), sets=("x",), mixtures=np.array([[0.5, 0.502]]), losses=np.array([[3.0]])).n
    1
    """

    domains: tuple[str, ...]
    """Names of the K columns of `mixtures`."""
    sets: tuple[str, ...]
    """Names of the E columns of `losses`."""
    mixtures: Float64[np.ndarray, "n K"]
    losses: Float64[np.ndarray, "n E"]
    places: tuple[str, ...] = ()
    """What to call each row in messages; unless given, its number."""
    column: str = ""
    """Of the long layout, which of `LONG_COLUMNS` the losses are."""

    def __post_init__(self):
        n = len(self.mixtures)
        if not self.places:
            object.__setattr__(self, "places", tuple(f"row {number}" for number in range(n)))
        shapes = (self.mixtures.shape, self.losses.shape, len(self.places))
        assert shapes == ((n, len(self.domains)), (n, len(self.sets)), n), f"a table of {shapes}"
        _refuse_repeated("domain", self.domains)
        _refuse_repeated("evaluation set", self.sets)
        if not n or not self.sets or len(self.domains) < 2:
            raise SettingError(
                f"a table of {n} mixtures of {len(self.domains)} domains and {len(self.sets)} evaluation sets: it "
                "needs rows, two domains and one set at least"
            )
        self._refuse(~np.isfinite(self.mixtures), self.mixtures, self.domains, "is not finite")
        self._refuse(self.mixtures < 0, self.mixtures, self.domains, "is negative, and no share can be")
        self._refuse(~np.isfinite(self.losses), self.losses, self.sets, "is not finite")
        sums = self.mixtures.sum(1)
        for row in np.flatnonzero(np.abs(sums - 1) > ROUNDING + 1e-9)[:1]:
            hint = " (percentages? divide them by 100)" if abs(sums[row] - 100) <= 100 * ROUNDING else ""
            raise SettingError(
                f"{self.places[row]}: the shares of {len(self.domains)} domains sum to {sums[row]:.6g}, not to 1{hint}"
                f". They are {', '.join(self.domains[:4])}{', ...' if len(self.domains) > 4 else ''}"
            )
        object.__setattr__(self, "mixtures", self.mixtures / sums[:, None])

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.mixtures)

    def rows(self, which: Int64[np.ndarray, " m"]) -> "MixtureTable":
        """Some of the rows, in that order."""
        return MixtureTable(
            domains=self.domains,
            sets=self.sets,
            mixtures=self.mixtures[which],
            losses=self.losses[which],
            places=tuple(self.places[row] for row in which),
            column=self.column,
        )

    def _refuse(self, wrong: np.ndarray, values: np.ndarray, columns: Sequence[str], why: str) -> None:
        for row, column in np.argwhere(wrong)[:1]:
            raise SettingError(f"{self.places[row]}: {columns[column]} is {values[row, column]:.6g}, which {why}")


@runtime_checkable
class MixingLaw(Protocol):
    """A law fitted to a table: it predicts the losses of any mixture of the same domains."""

    domains: tuple[str, ...]
    sets: tuple[str, ...]
    is_convex: bool
    """Every predicted loss is convex in the mixture, so that one descent finds the optimum."""

    def predict(self, mixtures: Float64[np.ndarray, "n K"]) -> Float64[np.ndarray, "n E"]:
        """Losses, in the table's unit."""
        ...

    def slopes(self, mixture: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "E K"] | None:
        """Derivatives of every loss by every share (as if shares were free); None where there are none."""
        ...


@runtime_checkable
class FitMixingLaw(Protocol):
    """What the catalogue lists: the class of a law, which makes one of a table."""

    def least_rows(self, domains: int) -> int:
        """Rows that a fit needs."""
        ...

    def fit(self, table: MixtureTable, *, seed: int = 0) -> MixingLaw:
        """Fit every evaluation set of a table apart.

        Raises:
            SettingError: The table has fewer rows than the law needs.
        """
        ...


def refuse_too_few(table: MixtureTable, least: int, law: str) -> None:
    """Say that a table is too short for a law."""
    if table.n < least:
        raise SettingError(
            f"{table.n} mixtures of {len(table.domains)} domains: --law {law} needs {least} at least; train or merge "
            "more of them, or put domains together"
        )


def place_of(name: str, names: Sequence[str], flag: str, kind: str) -> int:
    """Position of a name that a person gave.

    Raises:
        SettingError: There is none such; the message lists those there are.
    """
    if name in names:
        return list(names).index(name)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise SettingError(f"{flag} {name}: the table has no {kind} of this name.{hint} There are {', '.join(names)}.")


def read_mixture_table(
    mixtures: str | Path | list[Row],
    losses: str | Path | list[Row] | None = None,
    *,
    mixture_prefix: str | None = None,
    loss_prefix: str | None = None,
) -> MixtureTable:
    """Read a table from files, or from rows in memory.

    Args:
        mixtures: Of shares, or of both shares and losses.
        losses: Of losses, where they are in another file.
        mixture_prefix: How the columns of shares begin; unless given one of `MIXTURE_PREFIXES`, or, in a file of its
            own where none begins so, every column but `KEYS`.
        loss_prefix: The same of losses, and `LOSS_PREFIXES`.

    Raises:
        CorpusError: A file cannot be read.
        SettingError: No such columns, rows that do not match, or what `MixtureTable` refuses.
    """
    first, column = _wide(_flattened(mixtures))
    second, column = (first, column) if losses is None else _wide(_flattened(losses))
    if not first or not second:
        raise SettingError(f"{mixtures if not first else losses}: no rows. A table of mixtures needs some.")
    is_single = losses is None
    domains = _columns(first, mixture_prefix, MIXTURE_PREFIXES, "shares", is_single)
    sets = _without_ending(_columns(second, loss_prefix, LOSS_PREFIXES, "losses", is_single))
    shares = np.array([[_number(*row, column) for column in domains] for row in first])
    found = np.array([[_number(*row, column) for column in sets] for row in second])
    if not is_single:
        if column and not all("name" in row for _, row in first):
            raise SettingError(f"{first[0][0]}: no column name, by which the rows of {losses} call their mixtures")
        found = found[_matched(first, second)]
    return MixtureTable(
        domains=tuple(domains.values()),
        sets=tuple(sets.values()),
        mixtures=shares,
        losses=found,
        places=tuple(where for where, _ in first),
        column=column,
    )


_Placed = list[tuple[str, Row]]
"""Rows, each with what to call its place."""


def _flattened(origin: str | Path | list[Row]) -> _Placed:
    return [(where, dict(_cells(row))) for where, row in rows_with_place(origin)]


def _cells(row: Row) -> Iterable[tuple[str, Any]]:
    """Objects opened: `{"mixture": {"a": 1}}` is `mixture/a`. What an object holds as null, Parquet filled in."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", cell) for inner, cell in value.items() if cell is not None)
        else:
            yield name, value


def _wide(rows: _Placed) -> tuple[_Placed, str]:
    """Rows in the long layout as one row a mixture, and the column that their losses are from."""
    if not rows or not all("mixture" in row and "set" in row for _, row in rows):
        return rows, ""
    column = next((name for name in LONG_COLUMNS if all(row.get(name) not in (None, "") for _, row in rows)), None)
    if column is None:
        raise SettingError(
            f"{rows[0][0]}: rows of a mixture and a set each, without a loss in every one; as a column "
            f"{', '.join(LONG_COLUMNS[:-1])} or {LONG_COLUMNS[-1]} it is expected"
        )
    found: dict[str, tuple[str, Row]] = {}
    for where, row in rows:
        shares = {name: cell for name, cell in row.items() if name.startswith(MIXTURE_PREFIXES)}
        _, one = found.setdefault(str(row["mixture"]), (where, {"name": row["mixture"], **shares}))
        key = f"loss/{row['set']}"
        if key in one:
            raise SettingError(f"{where}: mixture {row['mixture']} has two losses on {row['set']}")
        one[key] = row[column]
    return list(found.values()), column


def _columns(rows: _Placed, prefix: str | None, usual: Sequence[str], kind: str, is_single: bool) -> dict[str, str]:
    """Columns of one kind, each with the name that it stands for."""
    every = list(dict.fromkeys(column for _, row in rows for column in row))
    looked_for = usual if prefix is None else (prefix,)
    found = {
        column: column.removeprefix(start)
        for column in every
        for start in looked_for
        if column.startswith(start) and column not in KEYS
    }
    if not found and prefix is None and not is_single:
        found = {column: column for column in every if column not in KEYS}
    if found:
        return found
    flag = "--mixture-prefix" if kind == "shares" else "--loss-prefix"
    more = " or give --losses FILE," if is_single and kind == "losses" else ""
    raise SettingError(
        f"{rows[0][0]}: no column of {kind} begins with {' or '.join(looked_for)}. Columns are {', '.join(every)}. "
        f"Rename them,{more} or say how they begin: {flag} TEXT"
    )


def _without_ending(columns: dict[str, str]) -> dict[str, str]:
    for ending in LOSS_ENDINGS:
        if all(name.endswith(ending) and name != ending for name in columns.values()):
            return {column: name.removesuffix(ending) for column, name in columns.items()}
    return columns


def _number(where: str, row: Row, column: str) -> float:
    value = row.get(column)
    if value is None or value == "":
        kind, slash, _ = column.partition("/")
        if slash and column not in row and f"{kind}/" in MIXTURE_PREFIXES:
            return 0.0
        raise SettingError(f"{where}: nothing in column {column}, where a number is expected")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise SettingError(
            f"{where}: column {column} holds {str(value)[:40]!r}, where a number is expected. A column that names the "
            f"row is called {', '.join(KEYS[:-1])} or {KEYS[-1]}"
        ) from None


def _matched(first: _Placed, second: _Placed) -> list[int]:
    """For each row of mixtures, the number of its row of losses."""
    shared = [key for key in KEYS if all(key in row for _, row in (*first, *second))]
    if not shared:
        if len(first) != len(second):
            raise SettingError(
                f"{len(first)} rows of mixtures and {len(second)} of losses, without a column {', '.join(KEYS[:-1])} "
                f"or {KEYS[-1]} in both that would say which belong together"
            )
        return list(range(len(first)))
    ours, theirs = _numbered(first, shared[0]), _numbered(second, shared[0])
    for key, number in ours.items():
        if key not in theirs:
            raise SettingError(f"{first[number][0]}: {shared[0]} {key} has a mixture, but no losses")
    for key, number in theirs.items():
        if key not in ours:
            raise SettingError(f"{second[number][0]}: {shared[0]} {key} has losses, but no mixture")
    return [theirs[key] for key in ours]


def _numbered(rows: _Placed, key: str) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for number, (where, row) in enumerate(rows):
        if numbers.setdefault(str(row[key]), number) != number:
            raise SettingError(f"{where}: {key} {row[key]} is there twice; before at {rows[numbers[str(row[key])]][0]}")
    return numbers


def _refuse_repeated(kind: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"{kind} {name}: two columns of this name")


def named_amounts(
    given: Mapping[str, float], names: Sequence[str], flag: str, kind: str, default: float
) -> Float64[np.ndarray, " names"]:
    """Numbers by name as a vector.

    Raises:
        SettingError: An unknown name, or a number that is negative or not finite.
    """
    out = np.full(len(names), float(default))
    for name, value in given.items():
        place = place_of(name, names, flag, kind)
        if not (math.isfinite(value) and value >= 0):
            raise SettingError(f"{flag} {name}={value:g}: a number of 0 or more is expected")
        out[place] = value
    return out
