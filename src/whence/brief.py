"""What Python shows of a dataclass with long fields: one line, with sizes in the place of long values."""

from collections.abc import Collection, Mapping, Sized
from dataclasses import fields, is_dataclass
from typing import Any

LONGEST_VALUE = 60
"""Characters of one field's value."""
LONGEST = 300
"""Characters in all."""


def brief(self: Any) -> str:
    """A dataclass' fields in one line; a class takes it as its `__repr__`. Fields without a value are left out.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Row:
    ...     text: str
    ...     tokens: list
    ...     __repr__ = brief
    >>> Row("word " * 99, [7] * 300)
    Row(text='word word word word word word word word word word word w..., tokens=300 items)
    """
    values = {field.name: getattr(self, field.name) for field in fields(self) if field.repr}
    line = ", ".join(f"{name}={_value(value)}" for name, value in values.items() if value is not None)
    return f"{type(self).__name__}({line if len(line) <= LONGEST else line[: LONGEST - 3] + '...'})"


def _value(value: Any) -> str:
    if shape := getattr(value, "shape", ()):  # of a tensor or an array
        return f"{type(value).__name__} of {' x '.join(map(str, shape))}"
    is_number = getattr(value, "shape", None) == ()  # a tensor or an array of one number has no length
    if isinstance(value, Collection) and not (is_number or isinstance(value, str) or is_dataclass(value)):
        if len(value) > 4:
            return f"{len(value):,} {'entries' if isinstance(value, Mapping) else 'items'}"
        if any(isinstance(item, Sized) and len(item) > LONGEST_VALUE for item in value):
            return f"{type(value).__name__} of {len(value)}"
    if hasattr(value, "named_modules"):
        return type(value).__name__
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE * (3 if is_dataclass(value) else 1) else f"{text[: LONGEST_VALUE - 3]}..."
