"""Tables of mixtures and losses: the share of each domain that a model was trained on, and its loss on each set.

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

Mistakes in a table are reported here, by row and column, so that laws see clean numbers only.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from whence.corpus.layouts import Row
from whence.corpus.reading import rows_with_place
from whence.counts import number_of
from whence.errors import SettingError

LARGEST = 1e100
"""Squares of larger numbers overflow."""
KEYS = ("index", "id", "name")
"""Columns that name a row."""
MIXTURE_PREFIXES = ("train_", "mixture/", "weights/")
LOSS_PREFIXES = ("metric/", "loss/", "losses/")
LOSS_ENDINGS = ("_val_loss", "_loss")
"""An ending that every column has is left out of the sets' names."""
LONG_COLUMNS = ("loss", "truth", "merged")
"""Columns of the long layout that may hold the losses; the first that is filled in counts."""
ROUNDING = 1e-2
"""How far from 1 the shares of a row may sum: they are often written with three digits, and are scaled to sum to 1."""


@dataclass(frozen=True, kw_only=True)
class MixtureTable:
    """Mixtures and the losses of models trained on them.

    Shares that sum to 1 within `ROUNDING` are scaled to do so exactly.

    Raises:
        SettingError: A share is negative, a row does not sum to 1, a number is not finite, a name is given twice, or
            there is no row; the message names row and column.

    >>> MixtureTable(domains=("a", "b"), sets=("x",), mixtures=np.array([[0.5, 0.502]]), losses=np.array([[3.0]])).n
    1
    """

    domains: tuple[str, ...]
    """Names of the K columns of `mixtures`."""
    sets: tuple[str, ...]
    """Names of the E columns of `losses`."""
    mixtures: Float64[np.ndarray, "n K"]
    losses: Float64[np.ndarray, "n E"]
    row_names: tuple[str, ...] = ()
    """What messages call each row; its number unless given."""
    column: str = ""
    """Which of `LONG_COLUMNS` the losses come from; "" in another layout."""

    def __repr__(self) -> str:
        domains, sets = number_of(len(self.domains), "domain"), number_of(len(self.sets), "set")
        return f"MixtureTable({number_of(len(self.mixtures), 'mixture')} of {domains}, {sets})"

    def __post_init__(self):
        n = len(self.mixtures)
        if not self.row_names:
            object.__setattr__(self, "row_names", tuple(f"row {number}" for number in range(n)))
        shapes = (self.mixtures.shape, self.losses.shape, len(self.row_names))
        assert shapes == ((n, len(self.domains)), (n, len(self.sets)), n), f"a table of {shapes}"
        _refuse_duplicates("domain", self.domains)
        _refuse_duplicates("evaluation set", self.sets)
        if not n or not self.sets or len(self.domains) < 2:
            raise SettingError(
                f"a table of {number_of(n, 'mixture')} of {number_of(len(self.domains), 'domain')} and "
                f"{number_of(len(self.sets), 'evaluation set')}: it needs rows, two domains and one set at least"
            )
        self._refuse(~np.isfinite(self.mixtures), self.mixtures, self.domains, "is not finite")
        self._refuse(self.mixtures < 0, self.mixtures, self.domains, "is negative, and no share can be")
        self._refuse(~np.isfinite(self.losses), self.losses, self.sets, "is not finite")
        sums = self.mixtures.sum(1)
        for row in np.flatnonzero(np.abs(sums - 1) > ROUNDING + 1e-9)[:1]:
            hint = " (percentages? divide them by 100)" if abs(sums[row] - 100) <= 100 * ROUNDING else ""
            raise SettingError(
                f"{self.row_names[row]}: the shares of {len(self.domains)} domains sum to {sums[row]:.6g}, not to 1"
                f"{hint}. They are {', '.join(self.domains[:4])}{', ...' if len(self.domains) > 4 else ''}"
            )
        object.__setattr__(self, "mixtures", self.mixtures / sums[:, None])

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.mixtures)

    def rows(self, which: Int64[np.ndarray, " m"]) -> "MixtureTable":
        """The rows of these numbers, in that order."""
        return MixtureTable(
            domains=self.domains,
            sets=self.sets,
            mixtures=self.mixtures[which],
            losses=self.losses[which],
            row_names=tuple(self.row_names[row] for row in which),
            column=self.column,
        )

    def _refuse(self, wrong: np.ndarray, values: np.ndarray, columns: Sequence[str], problem: str) -> None:
        for row, column in np.argwhere(wrong)[:1]:
            raise SettingError(
                f"{self.row_names[row]}: {columns[column]} is {values[row, column]:.6g}, which {problem}"
            )


def refuse_too_few(table: MixtureTable, least: int, law: str) -> None:
    """Refuse a table that is too short for a law."""
    if table.n < least:
        raise SettingError(
            f"{number_of(table.n, 'mixture')} of {len(table.domains)} domains: --law {law} needs {least} at least; "
            "train or merge more of them, or put domains together"
        )


def place_of(name: str, names: Sequence[str], flag: str, kind: str) -> int:
    """Position among `names` of a name that the user gave.

    Raises:
        SettingError: The table has no such name; the message lists those it has.
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
        mixtures: File or rows with the shares, or with both shares and losses.
        losses: File or rows with the losses, where they are apart.
        mixture_prefix: How the columns of shares begin. None: as one of `MIXTURE_PREFIXES`; in a file of its own
            where no column begins so, every column but `KEYS` is a share.
        loss_prefix: How the columns of losses begin. None: as one of `LOSS_PREFIXES`, with the same exception.

    Raises:
        CorpusError: A file cannot be read.
        SettingError: There are no such columns, rows do not match, or `MixtureTable` refuses the numbers.
    """
    mixture_rows, column = _wide(_flat_rows(mixtures))
    loss_rows, column = (mixture_rows, column) if losses is None else _wide(_flat_rows(losses))
    if not mixture_rows or not loss_rows:
        raise SettingError(f"{mixtures if not mixture_rows else losses}: no rows. A table of mixtures needs some.")
    is_single = losses is None
    domains = _columns(mixture_rows, mixture_prefix, MIXTURE_PREFIXES, "shares", is_single)
    sets = _without_ending(_columns(loss_rows, loss_prefix, LOSS_PREFIXES, "losses", is_single))
    shares = np.array([[_number(*row, column) for column in domains] for row in mixture_rows])
    loss_values = np.array([[_number(*row, column) for column in sets] for row in loss_rows])
    if not is_single:
        if column and not all("name" in row for _, row in mixture_rows):
            raise SettingError(
                f"{mixture_rows[0][0]}: no column name, by which the rows of {losses} call their mixtures"
            )
        loss_values = loss_values[_matching_rows(mixture_rows, loss_rows)]
    return MixtureTable(
        domains=tuple(domains.values()),
        sets=tuple(sets.values()),
        mixtures=shares,
        losses=loss_values,
        row_names=tuple(where for where, _ in mixture_rows),
        column=column,
    )


def has_losses(origin: str | Path | list[Row], loss_prefix: str | None = None) -> bool:
    """Whether a table of mixtures has columns of losses too."""
    prefixes = LOSS_PREFIXES if loss_prefix is None else (loss_prefix,)
    return any("set" in row or any(name.startswith(prefixes) for name in row) for _, row in _flat_rows(origin))


def read_mixtures(
    origin: str | Path | list[Row], sets: Sequence[str], *, mixture_prefix: str | None = None
) -> MixtureTable:
    """Read mixtures without losses, as a table whose losses on some sets are 0."""
    rows = _flat_rows(origin)
    if not rows:
        raise SettingError(f"{origin}: no rows. A table of mixtures needs some.")
    domains = _columns(rows, mixture_prefix, MIXTURE_PREFIXES, "shares", False)
    shares = np.array([[_number(*row, column) for column in domains] for row in rows])
    names, nothing = tuple(where for where, _ in rows), np.zeros((len(rows), len(sets)))
    return MixtureTable(
        domains=tuple(domains.values()), sets=tuple(sets), mixtures=shares, losses=nothing, row_names=names
    )


_NamedRows = list[tuple[str, Row]]
"""Rows, each with what messages call it."""


def _flat_rows(origin: str | Path | list[Row]) -> _NamedRows:
    return [(where, dict(_cells(row))) for where, row in rows_with_place(origin)]


def _cells(row: Row) -> Iterable[tuple[str, Any]]:
    """Cells with nested objects flattened: `{"mixture": {"a": 1}}` is `mixture/a`. Nulls inside are Parquet's."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", cell) for inner, cell in value.items() if cell is not None)
        else:
            yield name, value


def _wide(rows: _NamedRows) -> tuple[_NamedRows, str]:
    """Rows of the long layout turned into one row a mixture, and the column that their losses come from."""
    if not rows or not all("mixture" in row and "set" in row for _, row in rows):
        return rows, ""
    column = next((name for name in LONG_COLUMNS if all(row.get(name) not in (None, "") for _, row in rows)), None)
    if column is None:
        raise SettingError(
            f"{rows[0][0]}: rows of a mixture and a set each, without a loss in every one; as a column "
            f"{', '.join(LONG_COLUMNS[:-1])} or {LONG_COLUMNS[-1]} it is expected"
        )
    by_mixture: dict[str, tuple[str, Row]] = {}
    for where, row in rows:
        shares = {name: cell for name, cell in row.items() if name.startswith(MIXTURE_PREFIXES)}
        _, wide_row = by_mixture.setdefault(str(row["mixture"]), (where, {"name": row["mixture"], **shares}))
        key = f"loss/{row['set']}"
        if key in wide_row:
            raise SettingError(f"{where}: mixture {row['mixture']} has two losses on {row['set']}")
        wide_row[key] = row[column]
    return list(by_mixture.values()), column


def _columns(rows: _NamedRows, prefix: str | None, usual: Sequence[str], kind: str, is_single: bool) -> dict[str, str]:
    """Columns of one kind, each with the name that it stands for."""
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    prefixes = usual if prefix is None else (prefix,)
    names = {
        column: column.removeprefix(start)
        for column in columns
        for start in prefixes
        if column.startswith(start) and column not in KEYS
    }
    if not names and prefix is None and not is_single:
        names = {column: column for column in columns if column not in KEYS}
    if names:
        return names
    flag = "--mixture-prefix" if kind == "shares" else "--loss-prefix"
    alternative = " or give --losses FILE," if is_single and kind == "losses" else ""
    raise SettingError(
        f"{rows[0][0]}: no column of {kind} begins with {' or '.join(prefixes)}. Columns are {', '.join(columns)}. "
        f"Rename them,{alternative} or say how they begin: {flag} TEXT"
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
        number = float(value)
        if LARGEST < abs(number) < math.inf:
            raise OverflowError
        return number
    except OverflowError:
        raise SettingError(
            f"{where}: column {column} holds a number above {LARGEST:g}, which is no share and no loss"
        ) from None
    except (TypeError, ValueError):
        raise SettingError(
            f"{where}: column {column} holds {str(value)[:40]!r}, where a number is expected. A column that names the "
            f"row is called {', '.join(KEYS[:-1])} or {KEYS[-1]}"
        ) from None


def _matching_rows(mixture_rows: _NamedRows, loss_rows: _NamedRows) -> list[int]:
    """For each row of mixtures, the number of its row of losses."""
    shared = [key for key in KEYS if all(key in row for _, row in (*mixture_rows, *loss_rows))]
    if not shared:
        if len(mixture_rows) != len(loss_rows):
            raise SettingError(
                f"{number_of(len(mixture_rows), 'row')} of mixtures and {len(loss_rows)} of losses, without a column "
                f"{', '.join(KEYS[:-1])} or {KEYS[-1]} in both that would say which belong together"
            )
        return list(range(len(mixture_rows)))
    mixture_numbers, loss_numbers = _numbers_by_key(mixture_rows, shared[0]), _numbers_by_key(loss_rows, shared[0])
    for key, number in mixture_numbers.items():
        if key not in loss_numbers:
            raise SettingError(f"{mixture_rows[number][0]}: {shared[0]} {key} has a mixture, but no losses")
    for key, number in loss_numbers.items():
        if key not in mixture_numbers:
            raise SettingError(f"{loss_rows[number][0]}: {shared[0]} {key} has losses, but no mixture")
    return [loss_numbers[key] for key in mixture_numbers]


def _numbers_by_key(rows: _NamedRows, key: str) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for number, (where, row) in enumerate(rows):
        if numbers.setdefault(str(row[key]), number) != number:
            raise SettingError(f"{where}: {key} {row[key]} is there twice; before at {rows[numbers[str(row[key])]][0]}")
    return numbers


def _refuse_duplicates(kind: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"{kind} {name}: two columns of this name")


def named_amounts(
    amounts: Mapping[str, float], names: Sequence[str], flag: str, kind: str, default: float
) -> Float64[np.ndarray, " names"]:
    """Amounts by name as a vector in the order of `names`, with a default for those not given.

    Raises:
        SettingError: A name is unknown, or a number is negative or not finite.
    """
    out = np.full(len(names), float(default))
    for name, value in amounts.items():
        position = place_of(name, names, flag, kind)
        if not (math.isfinite(value) and value >= 0):
            raise SettingError(f"{flag} {name}={value:g}: a number of 0 or more is expected")
        out[position] = value
    return out
