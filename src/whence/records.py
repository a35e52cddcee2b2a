"""JSON that Whence wrote, read back as dataclasses whose annotations are checked: nothing in a file is believed.

    Count = Annotated[int, range(2**63)]                  a whole number in a range; others with `Between`
    Digest = Annotated[str, re.compile("[0-9a-f]{64}")]   a text that a pattern matches as a whole

A dataclass or a named tuple takes exactly its fields, so that what another version wrote is refused, not dropped. A
`TypedDict` stays a dictionary and may hold more. A float may be NaN, as losses may be; true is no number.
"""

import functools
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from whence.checksums import document_of
from whence.errors import ChecksumError

Count = Annotated[int, range(2**63)]
Digest = Annotated[str, re.compile("[0-9a-f]{64}")]
FastDigest = Annotated[str, re.compile("[0-9a-f]{32}")]


@dataclass(frozen=True)
class Between:
    """Numbers from the lowest to the highest, both included; not NaN."""

    lowest: float
    highest: float

    def __contains__(self, value: float) -> bool:
        return self.lowest <= value <= self.highest


class MisfitError(ValueError):
    """A value is not of the kind that is expected; the message says where it stands, and what it is."""


def read_record(kind: Any, data: bytes, where: str, remedy: str) -> Any:
    """A file's bytes as a record.

    Args:
        kind: A dataclass, a `TypedDict` or a dictionary.
        data: A JSON object, with a checksum of its own or without one (`checksums.sealed`).
        where: The file's path, for messages.
        remedy: A sentence that says what mends it.

    Raises:
        ChecksumError: The checksum is wrong, or the bytes are not JSON of this kind.
    """
    try:
        document = document_of(data)
    except (ValueError, RecursionError) as error:
        raise ChecksumError(f"{where} is not what was written ({error}). {remedy}") from None
    try:
        return fitting(kind, document)
    except MisfitError as error:
        raise unlike_written(where, error, remedy) from None


def unlike_written(where: str, what: object, remedy: str) -> ChecksumError:
    """The refusal of a file for what it says."""
    return ChecksumError(f"{where} is not as Whence writes it: {' '.join(str(what).split())[:300]}. {remedy}")


def fitting(kind: Any, value: Any, name: str = "") -> Any:
    """A JSON value as a kind: a dataclass, or what its fields are annotated with.

    Raises:
        MisfitError: It is none.

    >>> fitting(tuple[Count, ...], [3, 4]), fitting(dict[str, float], {"loss": 1})
    ((3, 4), {'loss': 1.0})
    >>> fitting(Count, -1, "rows")
    Traceback (most recent call last):
    whence.records.MisfitError: rows is -1
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        plain = fitting(arguments[0], value, name)
        _require(all(_allows(rule, plain) for rule in arguments[1:]), name, value)
        return plain
    if origin in (Union, types.UnionType):  # of one kind and None
        return (
            None
            if value is None
            else fitting(next(kind for kind in arguments if kind is not types.NoneType), value, name)
        )
    if origin is NotRequired:
        return fitting(arguments[0], value, name)
    if is_dataclass(kind) or is_typeddict(kind) or hasattr(kind, "_fields"):
        return _record(kind, value, name)
    if origin is Literal:
        _require(isinstance(value, str) and value in arguments, name, value)
        return value
    if origin in (list, tuple, Sequence):
        _require(isinstance(value, list), name, value)
        if origin is tuple and Ellipsis not in arguments:
            _require(len(value) == len(arguments), name, value)
            parts = zip(arguments, value, strict=True)
            return tuple(fitting(part, item, f"{name}[{number}]") for number, (part, item) in enumerate(parts))
        items = [fitting(arguments[0], item, f"{name}[{number}]") for number, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping):
        _require(isinstance(value, dict), name, value)
        return {
            fitting(arguments[0], key, f"a name in {name}"): fitting(arguments[1], item, f"{name}.{key}")
            for key, item in value.items()
        }
    _require(_is_plain(kind, value), name, value)
    return float(value) if kind is float else value


def _record(kind: Any, value: Any, name: str) -> Any:
    _require(isinstance(value, dict), name, value)
    known, required = _fields(kind)
    prefix = f"{name}." if name else ""
    if missing := required - value.keys():
        raise MisfitError(f"{prefix}{min(missing)} is missing")
    if is_typeddict(kind):
        return value | {key: fitting(known[key], value[key], prefix + key) for key in known.keys() & value.keys()}
    if unknown := value.keys() - known.keys():
        raise MisfitError(f"{prefix}{min(unknown)} is none of its entries")
    return kind(**{key: fitting(known[key], item, prefix + key) for key, item in value.items()})


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Kinds of the fields by name, and the names of those that must be there."""
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        return hints, frozenset(name for name, hint in hints.items() if get_origin(hint) is not NotRequired)
    if hasattr(kind, "_fields"):
        return hints, frozenset(hints.keys() - kind._field_defaults.keys())
    all_fields = fields(kind)
    required = (field.name for field in all_fields if field.default is MISSING and field.default_factory is MISSING)
    return {field.name: hints[field.name] for field in all_fields}, frozenset(required)


def _is_plain(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, float) or (_is_plain(int, value) and abs(value) < 2**1000)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def _allows(rule: Any, value: Any) -> bool:
    return rule.fullmatch(value) is not None if isinstance(rule, re.Pattern) else value in rule


def _require(holds: bool, name: str, value: Any) -> None:
    if not holds:
        text = json.dumps(value, default=str)
        raise MisfitError(f"{name or 'the whole'} is {text if len(text) <= 60 else text[:60] + '...'}")
