"""Rows of text from files and data sets, each with an id.

A corpus is an ordered collection that can be read again: jsonl, csv and Parquet files (compressed or not, local or
at any fsspec address), a directory of them in the order of their names (of its splits `train` alone, or
DIRECTORY:SPLIT; see `directories`), a data set of the Hugging Face Hub (by name, `name:split`, or
`name:configuration:split` as in `openai/gsm8k:main:train`), a `save_to_disk` directory, or rows in
memory. Rows are read as a stream, and only the current one is held; one that is too large is refused (`bounds`).

A directory is read with its subdirectories and links, but without hidden files, without the metadata of data sets, and
without indexes: the index of a corpus may lie in the corpus' own directory.

A row needs one of the shapes of `shapes.SHAPES`, tried in their order. (An Alpaca row often carries a rendered `text`
beside its other columns. Those win, because only they say which tokens were supervised.) A shape whose columns are
filled comes before one with a null, because a table that was joined from several has every column in every row. Other
columns travel along; those that may hold text to train on are named in a note (`unread`). A missing value is None,
whatever wrote the file (`missing`).

This module does not tokenise; `tokens` does.
"""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whence.brief import brief
from whence.corpus import plain_text
from whence.corpus.addresses import (
    KINDS,
    SUFFIXES,
    file_system,
    has_suffix,
    hub_rows,
    require_hub_data_set,
    split_of,
)
from whence.corpus.columns import checked, current, renamed
from whence.corpus.directories import files_below, is_index, is_metadata, of_split, warn_of_left_out_files
from whence.corpus.layouts import check_messages, query_in_layout
from whence.corpus.message_forms import NOT_MESSAGES, are_turns
from whence.corpus.missing import without_missing
from whence.corpus.preferences import checked as checked_preferences
from whence.corpus.row_files import checked_object, file_rows, saved_rows
from whence.corpus.shapes import Row
from whence.corpus.unread import Unread
from whence.counts import number_of
from whence.errors import CorpusError

logger = logging.getLogger(__name__)

IN_MEMORY = " in memory"
"""How the name of rows ends that no file holds."""


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
        columns: Names that Whence reads, and the rows' own in their place; None: those of `columns_called`.
        text_rows: What is a row of plain text: "line", "paragraph", "file", or a number of words; None: that of
            `plain_text.text_rows_are`.
        preferences: What a row with two answers is, for the note that says how rows are read; see `preferences`.
    """

    def __init__(
        self,
        origin: "str | Path | list[Row]",
        *,
        first_number: int = 0,
        from_arrow: bool = False,
        columns: Mapping[str, str] | None = None,
        text_rows: str | None = None,
        preferences: str | None = None,
    ):
        self.columns = current() if columns is None else checked(columns)
        self.text_rows = plain_text.current() if text_rows is None else plain_text.checked(text_rows)
        self.origin = origin
        self.first_number = first_number
        self.from_arrow = from_arrow
        self.preferences = checked_preferences(preferences)

    @property
    def name(self) -> str:
        """Name of the corpus in messages and manifests."""
        return f"{number_of(len(self.origin), 'row')}{IN_MEMORY}" if isinstance(self.origin, list) else str(self.origin)

    def __iter__(self) -> Iterator[Example]:
        """Yield every row as an example.

        Raises:
            CorpusError: The corpus does not exist, holds no row, or a row cannot be read.
        """
        unread = Unread(self.preferences)
        for number, (where, row) in enumerate(self._rows(), start=self.first_number):
            check_messages(row, where)
            unread.add(row)
            yield _example(row, number, _file_of(where))
        if not unread.rows:
            raise CorpusError(f"{self.name}: no rows. A corpus needs at least one.")
        unread.log(self.name)

    def _rows(self) -> Iterator[tuple[str, Row]]:
        return rows_with_place(self.origin, self.from_arrow, self.columns, self.text_rows)


def open_corpus(
    origin: "str | Path | Corpus | Iterable[Any]",
    *,
    first_number: int = 0,
    columns: Mapping[str, str] | None = None,
    text_rows: str | None = None,
    preferences: str | None = None,
) -> Corpus:
    """A corpus from a path, from the name of a data set, or from rows in memory: dicts, a data set, a DataFrame.

    Args:
        origin: What it is read from.
        first_number: As for `Corpus`.
        columns: Names that Whence reads, and the rows' own in their place, as in `{"prompt": "question"}`; None: those
            of the corpus that `origin` is, or of `columns.columns_called`.
        text_rows: What is a row of plain text, likewise; see `Corpus`.
        preferences: What a row with two answers is, for a note; see `Corpus`.

    >>> [example.id for example in open_corpus([{"text": "a", "id": 7}])]
    ['7']
    """
    if isinstance(origin, Corpus):
        names, text_rows = origin.columns if columns is None else columns, text_rows or origin.text_rows
        reading: Any = {"columns": names, "text_rows": text_rows, "preferences": preferences or origin.preferences}
        return Corpus(origin.origin, first_number=first_number, from_arrow=origin.from_arrow, **reading)
    reading = {"columns": columns, "preferences": preferences}
    if isinstance(origin, str | Path):
        return Corpus(origin, first_number=first_number, text_rows=text_rows, **reading)
    rows, from_arrow = rows_in_memory(origin), is_from_arrow(origin)
    return Corpus(rows, first_number=first_number, from_arrow=from_arrow, **reading)


def conversation_in(path: str) -> Row:
    """The one conversation of a JSON file: a list of messages, or an object that holds them as a row does.

    Raises:
        CorpusError: The file cannot be read, or holds something else.
    """
    try:
        value = json.loads(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: not JSON: {error}. A list of messages is expected.") from None
    row = {"messages": value} if isinstance(value, list) else value
    asked = query_in_layout(row) if isinstance(row, dict) else None
    if asked is None or not are_turns(asked[1].get("messages", [])):
        raise CorpusError(f"{path}: {NOT_MESSAGES}; found {str(value)[:60]!r}")
    return row


def rows_in_memory(origin: Iterable[Any]) -> list[Any]:
    """The rows of a DataFrame, a data set, or any iterable."""
    if not hasattr(origin, "iterrows"):
        return list(origin)
    frame: Any = origin
    return frame.set_axis([str(name) for name in frame.columns], axis=1).to_dict("records")


def is_from_arrow(origin: Any) -> bool:
    """Whether rows in memory are a Hugging Face data set's, or a DataFrame's, which may be read from Parquet."""
    return type(origin).__module__.partition(".")[0] in ("datasets", "pandas")


def rows_with_place(
    origin: "str | Path | list[Row]",
    from_arrow: bool = False,
    columns: Mapping[str, str] | None = None,
    text_rows: str | None = None,
) -> Iterator[tuple[str, Row]]:
    """Rows whatever their columns, with None for missing values, each with the name of its place for messages.

    Columns have the names that Whence reads, by `columns` or else `columns_called`; rows of plain text are those of
    `text_rows`, or else of `plain_text.text_rows_are`.

    Raises:
        CorpusError: There is no such file, or a row cannot be read.
    """
    columns = current() if columns is None else columns
    for where, row in _rows(origin, text_rows or plain_text.current()):
        try:
            plain = without_missing(row, from_arrow=from_arrow or _is_arrows_place(origin, where))
        except CorpusError as error:
            raise CorpusError(f"{where}: {error}.") from None
        yield where, renamed(plain, columns, where) if columns else plain


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


def _rows(origin: "str | Path | list[Row]", text_rows: str) -> Iterator[tuple[str, Row]]:
    if isinstance(origin, list):
        return ((f"row {number}", checked_object(row, f"row {number}")) for number, row in enumerate(origin))
    address = str(origin)
    files, root = file_system(address)
    if files.isfile(root):
        if has_suffix(root, plain_text.SUFFIXES):
            plain_text.tell(root, text_rows)
        return file_rows(files, root, text_rows)
    if files.isdir(root):
        return _directory_rows(files, root, address if "://" in address else root, text_rows)
    if named := split_of(files, address):
        folder, split = named
        return _directory_rows(files, files._strip_protocol(folder), folder, text_rows, split)
    require_hub_data_set(address)
    return hub_rows(address)


def _directory_rows(
    files: Any, root: str, address: str, text_rows: str, split: str | None = None
) -> Iterator[tuple[str, Row]]:
    if _is_saved_data_set(files, root):
        address, root = (f"{place}/{split}" if split else place for place in (address, root))
        return saved_rows(files, root, address)
    below = files_below(files, root)
    indexes = [path.rpartition("/")[0] for path in below if path.endswith("/manifest.json") and is_index(files, path)]
    if root in indexes:
        raise CorpusError(f"{root}: an index of Whence, not a corpus. Name the files that it was made from.")
    outside_indexes = [path for path in below if not path.startswith(tuple(f"{index}/" for index in indexes))]
    data = [path for path in outside_indexes if not is_metadata(path, below)]
    row_files = [path for path in data if has_suffix(path, SUFFIXES)]
    if not row_files and (row_files := [path for path in data if has_suffix(path, plain_text.SUFFIXES)]):
        plain_text.tell(root, text_rows)  # beside other files, a .txt is a licence or a note
    others = tuple(path for path in data if path not in set(row_files))
    if not row_files:
        example = f" ({len(others)} of other kinds, such as {others[0]})" if others else ""
        raise CorpusError(f"{root}: no corpus file in this directory{example}. A corpus is {KINDS}.")
    if others:
        warn_of_left_out_files(root, others)
    chosen = of_split(row_files, root, address, split)
    return itertools.chain.from_iterable(file_rows(files, path, text_rows) for path in chosen)


def _is_saved_data_set(files: Any, root: str) -> bool:
    """Whether `save_to_disk` wrote a directory; others keep a `dataset_info.json` of their own beside files of rows."""
    names = {str(path).rpartition("/")[2] for path in files.ls(root, detail=False)}
    has_rows = "state.json" in names or any(name.endswith(".arrow") for name in names)
    return "dataset_dict.json" in names or ("dataset_info.json" in names and has_rows)
