r"""A whole result as JSON, and back, with every number as it was.

    {"whence_result": "trace", "format": 1, "version": "0.1.0", "fields": {...}}

Fields are those of the result's dataclass. What JSON has no word for is an object with one marked key: `$float`, a
number that is not finite; `$tensor`, its type beside `shape` and `values`; `$dtype`; `$items`, the pairs of a
dictionary whose keys are no text or begin with `$`. Whatever else a row may hold, such as a date or bytes,
becomes text.

A file is not believed: its fields are checked against the annotations of the dataclasses (`records`), and against each
other (`result_checks`).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence import __version__
from whence.errors import FormatVersionError, SettingError
from whence.records import MisfitError, fitting, unlike_written

FORMAT = 1
KEY = "whence_result"
DTYPES = ("bool", "int32", "int64", "float16", "bfloat16", "float32", "float64")
FLOATS = ("nan", "inf", "-inf")
AGAIN = "Save the result again, by its .save or with the verb that made it."


def written(name: str, result: Any) -> bytes:
    """A result as a JSON document, in UTF-8.

    Args:
        name: Of its kind, such as `trace`.
        result: A dataclass.
    """
    document = {KEY: name, "format": FORMAT, "version": __version__, "fields": plain(result)}
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes its escape in JSON


def opened(data: bytes, where: str, kinds: Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]]) -> Any:
    """The result that `written` made a document of.

    Args:
        data: The document.
        where: The file's path, for messages.
        kinds: From the names of kinds to functions that give the dataclass, and functions that raise `MisfitError`
            where its fields do not belong together.

    Raises:
        SettingError: It is another file.
        FormatVersionError: A newer Whence wrote it.
        ChecksumError: It is not as Whence writes it.
    """
    try:
        document = json.loads(data, object_hook=_decoded)
    except MisfitError as error:
        raise unlike_written(where, error, AGAIN) from None
    except (ValueError, RecursionError):
        document = None
    document = document if isinstance(document, dict) else {}
    name = document.get(KEY)
    if not isinstance(name, str):
        raise SettingError(
            f"{where}: not a whole result. One is written by its .save('NAME.json'), or by the command with -o "
            "NAME.json (trace) or --report NAME.json; what --json prints has only what a person reads."
        )
    version = document.get("format")
    version = version if type(version) is int else None
    if name not in kinds or version != FORMAT:
        raise FormatVersionError(
            f"{where}: a result of the kind {name[:60]!r} in format {str(version)[:20]}; this version "
            f"of Whence, {__version__}, reads {', '.join(kinds)} in format {FORMAT}. Update Whence."
        )
    result_class, check = kinds[name]
    try:
        result = fitting(result_class(), document.get("fields"), "fields")
        check(result)
    except (MisfitError, AssertionError) as error:  # a class asserts that its fields belong together
        raise unlike_written(where, error, AGAIN) from None
    return result


def plain(value: Any) -> Any:
    """A value as JSON has it.

    >>> plain((1, math.inf, {2: torch.tensor([0.5])}))
    [1, {'$float': 'inf'}, {'$items': [[2, {'$tensor': 'float32', 'shape': [1], 'values': [0.5]}]]}]
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, Tensor):
        values = value.detach().flatten().tolist()
        return {"$tensor": str(value.dtype)[6:], "shape": list(value.shape), "values": [plain(each) for each in values]}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value)[6:]}
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.compare}
    if hasattr(value, "_asdict"):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        if all(isinstance(name, str) and not name.startswith("$") for name in value):
            return {name: plain(part) for name, part in value.items()}
        return {"$items": [[plain(name), plain(part)] for name, part in value.items()]}
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, Sequence):
        return [plain(part) for part in value]
    return str(value)


def _decoded(entries: dict[str, Any]) -> Any:
    mark = next((name for name in entries if name.startswith("$")), None)
    if mark is None:
        return entries
    try:
        match entries:
            case {"$float": str(word), **rest} if word in FLOATS and not rest:
                return float(word)
            case {"$dtype": str(name), **rest} if name in DTYPES and not rest:
                return getattr(torch, name)
            case {"$items": list(pairs), **rest} if not rest:
                return dict(pairs)
            case {"$tensor": str(name), "shape": list(shape), "values": list(values), **rest} if (
                name in DTYPES and not rest and all(type(size) is int and size >= 0 for size in shape)
            ):
                return torch.tensor(values, dtype=getattr(torch, name)).reshape(shape)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise MisfitError(f"{mark} is no value that Whence writes")
