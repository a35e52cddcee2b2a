"""Rows of one file: json, csv, Parquet and plain text, compressed or not, and a data set's `save_to_disk` directory.

A json or jsonl file is one object a line, an array, one object that holds the rows (`json_values`), or objects over
several lines, whatever its ending. Only the current row is held; one that is too large is refused (`bounds`).
"""

import csv
import io
import itertools
import json
import lzma
import shlex
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec

from whence.corpus import bounds, plain_text
from whence.corpus.addresses import COMPRESSED, KINDS, SUFFIXES, has_suffix
from whence.corpus.foreign_files import by_content, by_ending
from whence.corpus.json_values import rows_in, values_of, wrapped_rows
from whence.corpus.shapes import LAYOUTS, Row
from whence.errors import CorpusError, MissingExtraError

OVER_LINES = 1 << 28
"""Bytes of a file that is not one object a line, which is read as a whole."""


def file_rows(files: Any, path: str, text_rows: str = plain_text.LINE) -> Iterator[tuple[str, Row]]:
    """Rows of a file, each with its place for messages.

    Args:
        files: Its file system.
        path: Its path there.
        text_rows: What is a row of plain text; see `plain_text`.

    Raises:
        CorpusError: It is of no kind that is read, or a row cannot be read.
        MissingExtraError: Its compression needs one more package.
    """
    if not has_suffix(path, (*SUFFIXES, *plain_text.SUFFIXES)):
        reason = by_ending(path) or f"not a kind of file that Whence reads. A corpus is {KINDS}."
        raise CorpusError(f"{path}: {reason}")
    if path.lower().endswith(".zst") and "zstd" not in fsspec.available_compressions():
        raise MissingExtraError(f"{path}: zstd needs one more package: pip install zstandard")
    try:
        if not path.lower().endswith(COMPRESSED) and (reason := by_content(files.cat_file(path, end=512), path)):
            raise CorpusError(f"{path}: {reason}")
        if has_suffix(path, (".parquet",)):
            yield from _parquet_rows(files, path)
        elif has_suffix(path, plain_text.SUFFIXES):
            with files.open(path, "rb", compression="infer") as stream:
                yield from plain_text.rows(stream, path, text_rows)
        else:
            yield from _text_rows(files, path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CorpusError(f"{path}: cannot be read: {error}") from None


def _text_rows(files: Any, path: str) -> Iterator[tuple[str, Row]]:
    with files.open(path, "rb", compression="infer") as stream:
        if has_suffix(path, (".csv", ".tsv")):
            yield from _csv_rows(stream, path)
        elif has_suffix(path, (".json",)) and _starts_with_bracket(files, path):
            yield from _array_rows(stream, path)
        else:
            yield from _json_rows(stream, path)


def _starts_with_bracket(files: Any, path: str) -> bool:
    with files.open(path, "rb", compression="infer") as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _json_rows(stream: Any, path: str) -> Iterator[tuple[str, Row]]:
    is_first, lines = True, bounds.lines(stream, path)
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf").strip()
        if not text:
            continue
        where = f"{path}:{number}"
        try:
            row = _parsed(text, where)
        except CorpusError as error:
            if not is_first:
                raise
            whole = b"\n".join(bounds.up_to(itertools.chain([text], lines), OVER_LINES))
            yield from _placed(_values_over_lines(whole, path, error), path)
            return
        yield from [(where, row)] if (rows := wrapped_rows(row)) is None else _placed(rows, where)
        is_first = False


def _placed(rows: Iterable[Any], path: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows):
        where = f"{path}[{number}]"
        yield where, checked_object(row, where)


def _values_over_lines(text: bytes, path: str, of_first_line: CorpusError) -> list[Any]:
    """Rows of a file whose first line is no object: objects over several lines, or several without line breaks."""
    name = shlex.quote(path)
    try:
        rows = rows_in(list(values_of(text.decode())))
        if not all(isinstance(row, dict) for row in rows):
            raise of_first_line
        if len(text) > OVER_LINES:  # it was cut, here between two values
            raise CorpusError(
                f"{path}: JSON over several lines, of more than {OVER_LINES:,} bytes, the most that is read so. Write "
                f"one object a line: jq -c . {name} > NEW"
            )
        return rows
    except json.JSONDecodeError as error:
        if error.lineno == 1 or _is_object(text.split(b"\n", 2)[1]):  # one object a line, of which the first is damaged
            raise of_first_line from None
        cut = f", of which {OVER_LINES:,} bytes are read" if len(text) > OVER_LINES else ""
        raise CorpusError(
            f"{path}: JSON over several lines{cut}, and not readable: {error}. Write one object a line: jq -c . {name} "
            "> NEW"
        ) from None
    except (ValueError, RecursionError):
        raise of_first_line from None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(text: bytes, where: str) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError both are ValueErrors
        raise CorpusError(f"{where}: not a line of JSON: {error}. One object a line is expected.") from None
    return checked_object(row, where)


def checked_object(row: Any, where: str) -> Row:
    """A row, refused where it is no object.

    Raises:
        CorpusError: It is something else.
    """
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: a {type(row).__name__} where an object is expected: {str(row)[:60]!r}")
    return row


def _array_rows(stream: Any, path: str) -> Iterator[tuple[str, Row]]:
    yield from _placed(bounds.array_items(stream, path), path)


def _csv_rows(stream: Any, path: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(bounds.max_row_bytes())  # the default refuses cells over 128 KiB
    last = 0
    # Bytes that are not UTF-8 pass here, since decoding in blocks cannot say in which line they are.
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        # strict: a quote that is never closed would silently swallow all that follows into one cell.
        delimiter = "\t" if has_suffix(path, (".tsv",)) else ","
        lines = bounds.TextLines(text, path)
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            _refuse_duplicate_columns(reader.fieldnames or (), f"{path}:{reader.line_num}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row:
                    raise CorpusError(f"{where}: more cells than the header has columns.")
                lines.row_bytes = 0
                yield where, _filled_cells(row)
                last = reader.line_num
        except csv.Error as error:
            raise CorpusError(f"{path}:{last + 1}: not readable as csv from here: {error}.") from None


def _filled_cells(row: Row) -> Row:
    """A row of csv, which has no other null than an empty cell or blanks. The question of an answer may be empty."""
    cells = {name: cell if cell and cell.strip() else None for name, cell in row.items()}
    for question, answer in (LAYOUTS["prompt"], LAYOUTS["instruction"]):
        if cells.get(answer) and question in cells:
            cells[question] = cells[question] or ""
    return cells


def _refuse_duplicate_columns(columns: Iterable[str], where: str) -> None:
    """Refuse two columns of one name, since a row can hold only one of them. Columns without a name do not count."""
    counts = Counter(column for column in columns if column)
    if duplicates := [column for column, count in counts.items() if count > 1]:
        raise CorpusError(
            f"{where}: the column `{duplicates[0]}` is there {counts[duplicates[0]]} times. Rename or drop one of them."
        )


def parquet_file(source: Any) -> Any:
    """A Parquet file, to be read with `use_threads=False`.

    Arrow's threads may still hold Python's bytes when the interpreter ends, and releasing them then aborts the process
    (pyarrow 26: "terminate called without an active exception", in a quarter of short commands). A file that is read
    in this thread alone, without reading ahead, leaves nothing to those threads.
    """
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(source, pre_buffer=False)


def _parquet_rows(files: Any, path: str) -> Iterator[tuple[str, Row]]:
    import pyarrow

    try:
        with files.open(path, "rb") as stream:
            table, number = parquet_file(stream), 0
            _refuse_duplicate_columns(table.schema_arrow.names, path)
            for batch in bounds.parquet_batches(table, stream, path):
                for row in _batch_rows(batch, path, number):
                    yield f"{path}[{number}]", row
                    number += 1
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path}: not a readable Parquet file: {error}") from None


def _batch_rows(batch: Any, path: str, first: int) -> list[Row]:
    """Rows of a batch whose first row has the number `first`.

    Raises:
        CorpusError: The batch holds what Python cannot, such as a date after the year 9999 or text that is not UTF-8.
    """
    try:
        return batch.to_pylist()
    except (OverflowError, ValueError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, value in enumerate(column, start=first):
                try:
                    value.as_py()
                except (OverflowError, ValueError) as error:
                    raise CorpusError(
                        f"{path}[{number}]: the column `{name}` holds a {value.type} that Python cannot ({error}). "
                        "Leave the column out, or write it as text."
                    ) from None
        raise


def saved_rows(files: Any, root: str, address: str) -> Iterator[tuple[str, Row]]:
    """Rows of a `save_to_disk` directory, likewise.

    Raises:
        CorpusError: It cannot be read.
    """
    import datasets
    import pyarrow

    try:
        split = _chosen_split(files, root)
        state = _parsed(files.cat_file(f"{root}{split}/state.json"), f"{root}{split}/state.json")
        # datasets itself raises IndexError on a set that was saved without rows, since that has no file.
        data = datasets.load_from_disk(f"{address}{split}") if state["_data_files"] else []
        if split and not len(data):
            raise CorpusError(f"{address}{split}: no rows in this split. Name another by its directory.")
        for number, row in enumerate(data):
            yield f"{address}[{number}]", dict(row)
    except (OSError, ValueError, OverflowError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise CorpusError(f"{address}: not a readable `save_to_disk` directory: {error}") from None


def _chosen_split(files: Any, root: str) -> str:
    """Folder of the split to read, with a slash before it: `train`, or the only one; empty for a set without splits."""
    split_list = f"{root}/dataset_dict.json"
    if not files.exists(split_list):
        return ""
    splits = _parsed(files.cat_file(split_list), split_list)["splits"]
    if "train" in splits or len(splits) == 1:
        return f"/{'train' if 'train' in splits else splits[0]}"
    raise CorpusError(f"{root}: splits are {', '.join(splits)}; name one: {root}/{splits[0]}")
