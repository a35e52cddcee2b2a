"""What stands for a missing value in a row: None, whatever wrote the row.

pandas writes an empty cell as NaN, NaT or NA, and so does JSON that Python made of such a table. Arrow gives every
object of a column the same keys, with null where an object has none; those nulls are no part of the data, so the keys
are dropped. JSON has no such rule: there a null inside an object is the row's own, unless the row bears Arrow's mark,
which is that all its messages have the same keys.

Names of columns and keys become text, as JSON would have them: those of a DataFrame may be numbers.
"""

from typing import Any

import numpy as np

from whence.corpus.shapes import Row
from whence.errors import CorpusError

CONVERSATIONS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected")
"""Columns that may hold messages."""
DEEPEST = 100
"""Levels of lists and objects within a cell: Python follows no more than about a thousand of anything."""


def without_missing(row: Row, *, from_arrow: bool = False) -> Row:
    """A row with None for every missing value, with plain lists and numbers for those of numpy, and text for names.

    Args:
        row: A row in any form; it is not changed.
        from_arrow: Nulls inside the row's objects are Arrow's, and their keys are dropped.

    Raises:
        CorpusError: A cell is nested deeper than `DEEPEST`.

    >>> without_missing({"prompt": "a", "completion": float("nan")})
    {'prompt': 'a', 'completion': None}
    """
    plain = {str(name): _plain(value) for name, value in row.items()}
    if from_arrow or any(_has_arrows_mark(plain.get(column)) for column in CONVERSATIONS):
        return {name: _without_null_keys(value) for name, value in plain.items()}
    return plain


def _plain(value: Any, levels: int = DEEPEST) -> Any:
    if value is None or isinstance(value, str | int):
        return value
    if not levels:
        raise CorpusError(f"a cell holds lists or objects that are nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        return {str(name): _plain(item, levels - 1) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), levels)
    if isinstance(value, list | tuple):
        return [_plain(item, levels - 1) for item in value]
    return None if _is_missing(value) else value


def _is_missing(value: Any) -> bool:
    """Whether a value is NaN, NaT or pandas' NA: none of them equals itself."""
    try:
        return bool(value != value)
    except TypeError:  # NA has no truth
        return True


def _without_null_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null_keys(item) for name, item in value.items() if item is not None}
    return [_without_null_keys(item) for item in value] if isinstance(value, list) else value


def _has_arrows_mark(messages: Any) -> bool:
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(item, dict) for item in messages):
        return False
    keys = messages[0].keys()
    optional = keys - {"role", "content", "from", "value"}
    return all(item.keys() == keys for item in messages) and any(
        item[name] is None for item in messages for name in optional
    )
