"""Columns under names of their own: `--map prompt=question` says that the column `question` is the prompt.

Rows are read under the names that Whence knows, whatever file they are in, and written under their own again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from whence.corpus.shapes import SHAPES
from whence.errors import CorpusError, SettingError

Row = dict[str, Any]
NAMES = {column for shape in SHAPES for column in (*shape.columns, *shape.optional)} | {"id", "source", "label"}
"""Columns that Whence reads."""
_columns: dict[str, str] = {}


@contextmanager
def columns_called(columns: Mapping[str, str] | None) -> Iterator[None]:
    """Read rows under these names within the context, in all threads, where no others are given.

    Args:
        columns: From the name that Whence reads to the row's own. None changes nothing.

    Raises:
        SettingError: Whence reads no such column, or one column has two names.
    """
    global _columns
    before, _columns = _columns, _columns if columns is None else checked(columns)
    try:
        yield
    finally:
        _columns = before


def current() -> dict[str, str]:
    """The names of `columns_called`."""
    return dict(_columns)


def checked(columns: Mapping[str, str]) -> dict[str, str]:
    """The same names.

    Raises:
        SettingError: Whence reads no such column, or one column has two names.
    """
    for name, own in columns.items():
        if name not in NAMES:
            known = ", ".join(sorted(NAMES))
            raise SettingError(f"--map {name}={own}: Whence reads no column `{name}`; it reads {known}")
        if list(columns.values()).count(own) > 1:
            raise SettingError(f"--map {name}={own}: the column `{own}` is given two names")
    return dict(columns)


def renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    """A row under the names that Whence reads; a row without the columns as it is.

    Raises:
        CorpusError: The row has a filled column of that name beside its own.

    >>> renamed({"question": "Why?", "n": 1}, {"prompt": "question"}, "row 0")
    {'prompt': 'Why?', 'n': 1}
    """
    names = {own: name for name, own in columns.items() if own in row and own != name}
    for own, name in names.items():
        if row.get(name) not in (None, "") and name not in names:
            raise CorpusError(
                f"{where}: --map {name}={own}: the row has a column `{name}` too. Leave that one out of the file, or "
                "give it another name by --map."
            )
    replaced = set(names.values()) - names.keys()
    return {names.get(column, column): value for column, value in row.items() if column not in replaced}


def original(row: Row, columns: Mapping[str, str]) -> Row:
    """A row under its own names again.

    >>> original({"prompt": "Why?", "n": 1}, {"prompt": "question"})
    {'question': 'Why?', 'n': 1}
    """
    return {columns.get(column, column): value for column, value in row.items()}
