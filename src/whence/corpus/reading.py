"""Rows of text from files and data sets, each with an id.

A corpus is an ordered collection that can be read again: jsonl, csv and Parquet files (compressed or not, local or
at any fsspec address), a directory of them in the order of their names (of its splits `train` alone, or
DIRECTORY:SPLIT; see `directories`), a data set of the Hugging Face Hub (by name, `name:split`, or
`name:configuration:split` as in `openai/gsm8k:main:train`), a `save_to_disk` directory, or rows in
memory. Rows are read as a stream, and only the current one is held; one that is too large is refused (`bounds`).

A json or jsonl file is one object a line, an array, one object that holds the rows (`json_values`), or objects over
several lines, whatever its ending.

A directory is read with its subdirectories and links, but without hidden files, without the metadata of data sets, and
without indexes: the index of a corpus may lie in the corpus' own directory.

A row needs one of four layouts, tried in this order: `messages`; `prompt` and `completion`; `instruction` (and
`input`) and `output`; `text`. (An Alpaca row often carries a rendered `text` beside its other columns. Those win,
because only they say which tokens were supervised.) A layout whose columns are filled comes before one with a null,
because a table that was joined from several has every column in every row. Other columns travel along; those that may
hold text to train on are named in a note (`unread`). A missing value is None, whatever wrote the file (`missing`).

This module does not tokenise; `tokens` does.
"""

import csv
import hashlib
import io
import itertools
import json
import logging
import lzma
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from whence.brief import brief
from whence.corpus import bounds
from whence.corpus.addresses import (
    COMPRESSED,
    KINDS,
    SUFFIXES,
    file_system,
    has_suffix,
    hub_rows,
    require_hub_data_set,
    split_of,
)
from whence.corpus.directories import files_below, is_index, is_metadata, of_split, warn_of_left_out_files
from whence.corpus.foreign_files import by_content, by_ending
from whence.corpus.json_values import rows_in, values_of, wrapped_rows
from whence.corpus.layouts import LAYOUTS, Row, check_messages, layout
from whence.corpus.missing import without_missing
from whence.corpus.unread import Unread
from whence.counts import number_of
from whence.errors import CorpusError, MissingExtraError

logger = logging.getLogger(__name__)


OVER_LINES = 1 << 28
"""Bytes of a file that is not one object a line, which is read as a whole."""


@dataclass(frozen=True)
class Example:
    """One row of a corpus."""

    __repr__ = brief

    id: str
    """The row's own `id`, else a hash of its content with its number, so that two identical rows stay distinct."""
    source: str | None
    """The row's `source`, where it has one."""
    row: Row
    """The row as it was read."""
    file: str | None = None
    """Name of the file that it was read from, without directories and endings; None for rows in memory."""


class Corpus:
    """An ordered, re-readable collection of examples.

    Args:
        origin: A path, the name of a data set, or rows in memory; see `open_corpus`.
        first_number: Number of the first row, which is part of the ids that are made from content: rows that join an
            index continue its numbers.
        from_arrow: Rows in memory come from Arrow, which fills their objects with nulls; see `missing`.
    """

    def __init__(self, origin: "str | Path | list[Row]", *, first_number: int = 0, from_arrow: bool = False):
        self.origin = origin
        self.first_number = first_number
        self.from_arrow = from_arrow

    @property
    def name(self) -> str:
        """Name of the corpus in messages and manifests."""
        return f"{number_of(len(self.origin), 'row')} in memory" if isinstance(self.origin, list) else str(self.origin)

    def __iter__(self) -> Iterator[Example]:
        """Yield every row as an example.

        Raises:
            CorpusError: The corpus does not exist, holds no row, or a row cannot be read.
        """
        unread = Unread()
        for number, (where, row) in enumerate(rows_with_place(self.origin, self.from_arrow), start=self.first_number):
            check_messages(row, layout(row, where), where)
            unread.add(row)
            yield _example(row, number, _file_of(where))
        if not unread.rows:
            raise CorpusError(f"{self.name}: no rows. A corpus needs at least one.")
        unread.log(self.name)


def open_corpus(origin: "str | Path | Corpus | Iterable[Any]", *, first_number: int = 0) -> Corpus:
    """A corpus from a path, from the name of a data set, or from rows in memory: dicts, a data set, a DataFrame.

    >>> [example.id for example in open_corpus([{"text": "a", "id": 7}])]
    ['7']
    """
    if isinstance(origin, Corpus):
        return Corpus(origin.origin, first_number=first_number, from_arrow=origin.from_arrow)
    if isinstance(origin, str | Path):
        return Corpus(origin, first_number=first_number)
    return Corpus(rows_in_memory(origin), first_number=first_number, from_arrow=is_from_arrow(origin))


def rows_in_memory(origin: Iterable[Any]) -> list[Any]:
    """The rows of a DataFrame, a data set, or any iterable."""
    return origin.to_dict("records") if hasattr(origin, "iterrows") else list(origin)  # type: ignore[attr-defined]


def is_from_arrow(origin: Any) -> bool:
    """Whether rows in memory are a Hugging Face data set's, or a DataFrame's, which may be read from Parquet."""
    return type(origin).__module__.partition(".")[0] in ("datasets", "pandas")


def rows_with_place(origin: "str | Path | list[Row]", from_arrow: bool = False) -> Iterator[tuple[str, Row]]:
    """Rows whatever their columns, with None for missing values, each with the name of its place for messages.

    Raises:
        CorpusError: There is no such file, or a row cannot be read.
    """
    for where, row in _rows(origin):
        try:
            plain = without_missing(row, from_arrow=from_arrow or _is_arrows_place(origin, where))
        except CorpusError as error:
            raise CorpusError(f"{where}: {error}.") from None
        yield where, plain


def _is_arrows_place(origin: "str | Path | list[Row]", where: str) -> bool:
    """Whether the row at a place is Arrow's: a Parquet file's, a saved data set's, or the Hub's."""
    file = where.rpartition("[")[0] if where.endswith("]") else where.rpartition(":")[0]
    if isinstance(origin, list) or has_suffix(file, tuple(set(SUFFIXES) - {".parquet"})):
        return False
    return where.endswith("]")


def row_json(row: Row) -> str:
    """One row as JSON text, the same text for the same row; a value that JSON lacks (a date) becomes a string."""
    return json.dumps(row, default=str)


def _file_of(where: str) -> str | None:
    """Name of the file in a row's place, as messages write it.

    >>> _file_of("data/code.jsonl.gz:7"), _file_of("data/code.parquet[7]"), _file_of("row 7")
    ('code', 'code', None)
    """
    match = re.fullmatch(r"(.+?)(?::\d+|\[\d+\])", where)
    return match[1].rpartition("/")[2].partition(".")[0] if match else None


def _example(row: Row, number: int, file: str | None) -> Example:
    identifier, source = row.get("id"), row.get("source")
    if identifier is None or identifier == "":
        identifier = f"{hashlib.sha256(row_json(row).encode()).hexdigest()[:12]}-{number}"
    return Example(id=storable(identifier), source=None if source is None else storable(source), row=row, file=file)


def storable(value: object) -> str:
    """A value as text that any file can hold: JSON may give lone surrogates, which UTF-8 lacks."""
    return str(value).encode("utf-8", "replace").decode()


def _rows(origin: "str | Path | list[Row]") -> Iterator[tuple[str, Row]]:
    if isinstance(origin, list):
        return ((f"row {number}", _checked_object(row, f"row {number}")) for number, row in enumerate(origin))
    address = str(origin)
    files, root = file_system(address)
    if files.isfile(root):
        return _file_rows(files, root)
    if files.isdir(root):
        return _directory_rows(files, root, address if "://" in address else root)
    if named := split_of(files, address):
        folder, split = named
        return _directory_rows(files, files._strip_protocol(folder), folder, split)
    require_hub_data_set(address)
    return hub_rows(address)


def _directory_rows(files: Any, root: str, address: str, split: str | None = None) -> Iterator[tuple[str, Row]]:
    if _is_saved_data_set(files, root):
        address, root = (f"{place}/{split}" if split else place for place in (address, root))
        return _saved_rows(files, root, address)
    below = files_below(files, root)
    indexes = [path.rpartition("/")[0] for path in below if path.endswith("/manifest.json") and is_index(files, path)]
    if root in indexes:
        raise CorpusError(f"{root}: an index of Whence, not a corpus. Name the files that it was made from.")
    outside_indexes = [path for path in below if not path.startswith(tuple(f"{index}/" for index in indexes))]
    data = [path for path in outside_indexes if not is_metadata(path, below)]
    row_files = [path for path in data if has_suffix(path, SUFFIXES)]
    others = tuple(path for path in data if path not in set(row_files))
    if not row_files:
        example = f" ({len(others)} of other kinds, such as {others[0]})" if others else ""
        raise CorpusError(f"{root}: no corpus file in this directory{example}. A corpus is {KINDS}.")
    if others:
        warn_of_left_out_files(root, others)
    return itertools.chain.from_iterable(_file_rows(files, path) for path in of_split(row_files, root, address, split))


def _is_saved_data_set(files: Any, root: str) -> bool:
    """Whether `save_to_disk` wrote a directory; others keep a `dataset_info.json` of their own beside files of rows."""
    names = {str(path).rpartition("/")[2] for path in files.ls(root, detail=False)}
    has_rows = "state.json" in names or any(name.endswith(".arrow") for name in names)
    return "dataset_dict.json" in names or ("dataset_info.json" in names and has_rows)


def _file_rows(files: Any, path: str) -> Iterator[tuple[str, Row]]:
    if not has_suffix(path, SUFFIXES):
        reason = by_ending(path) or f"not a kind of file that Whence reads. A corpus is {KINDS}."
        raise CorpusError(f"{path}: {reason}")
    if path.lower().endswith(".zst") and "zstd" not in fsspec.available_compressions():
        raise MissingExtraError(f"{path}: zstd needs one more package: pip install zstandard")
    try:
        if not path.lower().endswith(COMPRESSED) and (reason := by_content(files.cat_file(path, end=512), path)):
            raise CorpusError(f"{path}: {reason}")
        yield from _parquet_rows(files, path) if has_suffix(path, (".parquet",)) else _text_rows(files, path)
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
        yield where, _checked_object(row, where)


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
    return _checked_object(row, where)


def _checked_object(row: Any, where: str) -> Row:
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


def _saved_rows(files: Any, root: str, address: str) -> Iterator[tuple[str, Row]]:
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
