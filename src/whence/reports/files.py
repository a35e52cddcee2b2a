"""Results as files: rows as .jsonl, .csv or .parquet, pages as .html; whole or not at all.

Rows come from untrusted text: lone surrogates, which JSON may hold and UTF-8 lacks, are replaced, and a number that
JSON has no word for becomes null. Text in a .csv that a spreadsheet would take for a formula stays as it is, for the
file is to be read again as a corpus; a note says that it is there.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence.errors import SettingError, StorageError
from whence.outputs import require_writable
from whence.paths import is_directory
from whence.storage import Place, reason

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of cells that spreadsheets take for formulas (OWASP, CSV Injection)."""


def write_rows(rows: Sequence[dict[str, Any]], out: str | Path) -> None:
    """Write rows by the ending of a file's name: .jsonl, .csv or .parquet; whole or not at all.

    Args:
        rows: What is found.
        out: A file, here or at an fsspec address.

    Raises:
        StorageError: The file cannot be written.
    """
    ending = Path(out).suffix
    rows = _all_storable(rows)
    if ending == ".parquet":
        data = _parquet(rows)
    elif ending == ".csv":
        data = _csv([_flat(row) for row in rows]).encode("utf-8", "replace")
    else:
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        data = "".join(lines).encode("utf-8", "replace")
    _write(out, data)


def write_page(page: str, out: str | Path) -> None:
    """Write a report, here or at an fsspec address, whole or not at all.

    Raises:
        StorageError: The file cannot be written.
    """
    _write(out, page.encode("utf-8", "replace"))


def write_result(document: bytes, out: str | Path) -> None:
    """Write a whole result, as `result_json` has it, whole or not at all.

    Raises:
        StorageError: The file cannot be written.
    """
    _write(out, document)


def _write(out: str | Path, data: bytes | memoryview) -> None:
    place, name = destination(out)
    try:
        place.write(name, [data], total=len(data))
    except StorageError as error:
        raise StorageError(f"{out}: cannot be written ({reason(error.__cause__ or error)})") from None


def destination(out: str | Path) -> tuple[Place, str]:
    """The directory that a file goes to, and its name there."""
    file = Place.at(out)
    folder, _, name = file.root.rpartition("/")
    return Place(file.fs, folder), name


def _all_storable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{_storable(name): _storable(value) for name, value in row.items()} for row in rows]


def _storable(value: Any) -> Any:
    """Text without lone surrogates, which JSON may hold and UTF-8 lacks; numbers as JSON has them."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else finite(value)


def finite(value: Any) -> Any:
    """The same, with null for numbers that JSON has no word for.

    >>> finite({"z": [1.5, float("nan")]})
    {'z': [1.5, None]}
    """
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """For tables: what is nested becomes JSON text, one type a column."""
    nested = dict | list | tuple
    return {name: json.dumps(value, default=str) if isinstance(value, nested) else value for name, value in row.items()}


def check_ending(
    path: str | Path, endings: Sequence[str] | None = (".jsonl", ".csv", ".parquet"), *, flag: str = "-o"
) -> None:
    """Refuse, before any work is done, a file name or address that nothing can be written to."""
    if endings is not None and Path(path).suffix not in endings:
        listed = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise SettingError(f"{flag} {path}: what is found is written to {listed}")
    place, _ = destination(path)
    if place.is_local:
        if not is_directory(place.root or "/"):
            raise SettingError(f"{flag} {path}: there is no directory {place.root}")
        require_writable(place.root or "/", f"{flag} {path}")


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names)
    writer.writeheader()
    writer.writerows(rows)
    if count := sum(isinstance(cell, str) and cell.startswith(FORMULA) for row in rows for cell in row.values()):
        logger.warning(
            "%d cells of this .csv begin with = + - or @: they are the corpus' own text, which a spreadsheet would run "
            "as formulas. Open it as text, or write .jsonl.",
            count,
        )
    return stream.getvalue()


def arrow_table(rows: Sequence[dict[str, Any]], columns: Mapping[str, str] | None = None) -> "pyarrow.Table":
    """Rows as the table that `write_rows` writes to .parquet.

    Args:
        rows: What is found.
        columns: Columns, with the names of their types, that the table has where there is no row.

    >>> arrow_table([], {"rank": "int64"}).schema.names, arrow_table([{"rank": 1, "by": [0.5]}]).to_pylist()
    (['rank'], [{'rank': 1, 'by': '[0.5]'}])
    """
    import pyarrow

    if not rows:
        types = {name: pyarrow.type_for_alias(kind) for name, kind in (columns or {}).items()}
        return pyarrow.table({name: pyarrow.array([], kind) for name, kind in types.items()})
    rows = [_flat(row) for row in _all_storable(rows)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pyarrow.table({name: _column([row.get(name) for row in rows]) for name in names})


def _parquet(rows: Sequence[dict[str, Any]]) -> memoryview:
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(arrow_table(rows), sink, compression="zstd")
    return sink.getbuffer()


def _column(values: Sequence[Any]) -> Any:
    """Values as a column of one type; as text where they have several, or one that Parquet lacks.

    >>> _column([1, None, 0.5]).to_pylist(), _column([1, "odd"]).to_pylist(), _column([2**64]).to_pylist()
    ([1.0, None, 0.5], ['1', 'odd'], ['18446744073709551616'])
    """
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1 or kinds == {int, float}:
        try:
            return pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
            pass
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]
    return pyarrow.array([None if value is None else text for value, text in zip(values, texts, strict=True)])
