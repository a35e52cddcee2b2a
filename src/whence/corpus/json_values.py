"""JSON that is not one object a line: an array, objects over several lines or several on one, `{"data": [...]}`."""

import json
import re
from collections.abc import Iterator
from typing import Any

from whence.corpus.shapes import LAYOUTS

WRAPPERS = ("data", "rows", "examples", "instances", "records", "items", "train")
"""Keys under which a file that is one object keeps its rows."""
COLUMNS = {column for columns in LAYOUTS.values() for column in columns} | {"conversations", "chosen", "rejected"}
"""Columns that only a row itself has."""


def values_of(text: str) -> Iterator[Any]:
    r"""The JSON values of a text, one after the other, whatever stands between them that is blank.

    Raises:
        ValueError: Something else stands there.

    >>> list(values_of('{"a": 1}\n {"a":\n 2}'))
    [{'a': 1}, {'a': 2}]
    """
    decoder, place = json.JSONDecoder(), 0
    while found := re.compile(r"\S").search(text, place):
        value, place = decoder.raw_decode(text, found.start())
        yield value


def rows_in(values: list[Any]) -> list[Any]:
    """The rows of a file's values: an array's or a wrapping object's members, if there is one value; else the values.

    >>> rows_in([[{"text": "a"}]]), rows_in([{"version": 1, "data": [{"text": "a"}]}])
    ([{'text': 'a'}], [{'text': 'a'}])
    """
    if len(values) != 1:
        return values
    (value,) = values
    if isinstance(value, list):
        return value
    return wrapped_rows(value) or values


def wrapped_rows(value: Any) -> list[Any] | None:
    """The rows that an object keeps under one of `WRAPPERS`; None if it is a row itself."""
    if not isinstance(value, dict) or value.keys() & COLUMNS:
        return None
    lists = [value[key] for key in WRAPPERS if isinstance(value.get(key), list)]
    lists = [rows for rows in lists if rows and all(isinstance(row, dict) for row in rows)]
    return lists[0] if len(lists) == 1 else None
