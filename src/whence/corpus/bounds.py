"""How much of a file one row may take: a few kilobytes of a compressed file can hold a cell of gigabytes.

A row of more than `max_row_bytes` is refused before more of it is held: lines and cells as they are read, objects of a
JSON array as they are parsed, and rows of Parquet before they are decoded, by what the file's own metadata says of
their sizes; where that gives only a mean, before they become Python's. Then Arrow holds the largest page of the file.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from whence.errors import CorpusError, SettingError

MAX_ROW_BYTES = 2**26
"""64 MiB: some 30 novels."""
_UNBOUNDED = 2**50
"""Bytes beyond which a bound is none: more than any memory, and a number of C's."""
_CHUNK = 2**16
_BATCH_BYTES = 2**26
"""Decoded rows of Parquet that are held at a time, or one row."""
_BATCH_ROWS = 1024
_SPACES = " \t\r\n"
_DECODER = json.JSONDecoder()
_largest = MAX_ROW_BYTES


@contextmanager
def rows_up_to(size: int) -> Iterator[None]:
    """Read rows of up to `size` bytes within the context, in all threads.

    Raises:
        SettingError: `size` is not positive.
    """
    global _largest
    if size < 1:
        raise SettingError(f"--max-row-bytes {size}: a number above 0 is expected")
    before, _largest = _largest, min(size, _UNBOUNDED)
    try:
        yield
    finally:
        _largest = before


def max_row_bytes() -> int:
    """Size of the largest row that is read."""
    return _largest


def too_large(where: str, what: str = "a row", size: int | None = None) -> CorpusError:
    """The refusal of a row."""
    measured = f"of {size:,} bytes, more than" if size is not None else "of more than"
    return CorpusError(
        f"{where}: {what} {measured} {_largest:,} bytes, the most that is read of one. If it is meant to be so long, "
        f"add --max-row-bytes {max(2 * _largest, size or 0)}"
    )


def lines(stream: Any, path: str) -> Iterator[bytes]:
    """Lines of a binary stream without their ends, split at newlines alone.

    Raises:
        CorpusError: A line is too large.
    """
    begun, number = bytearray(), 1
    while chunk := stream.read(_CHUNK):
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            whole = bytes(begun) + line if begun else line
            if len(whole) > _largest:
                raise too_large(f"{path}:{number}", "a line")
            yield whole
            begun.clear()
            number += 1
        begun += rest
        if len(begun) > _largest:
            raise too_large(f"{path}:{number}", "a line")
    if begun:
        yield bytes(begun)


def up_to(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Pieces until they have more than `size` bytes together."""
    total = 0
    for piece in pieces:
        yield piece
        total += len(piece)
        if total > size:
            return


class TextLines:
    """Lines of a text stream with their ends, for a reader that makes rows of one or more."""

    def __init__(self, text: Any, path: str):
        self.text = text
        self.path = path
        self.row_bytes = 0
        """Bytes since the reader of rows last set it to 0."""

    def __iter__(self) -> Iterator[str]:
        """Yield every line.

        Raises:
            CorpusError: A row is too large, or bytes are not UTF-8 (the stream lets them pass as surrogates).
        """
        number = 1
        while line := self.text.readline(_largest + 1):
            try:
                self.row_bytes += len(line.encode())
            except UnicodeEncodeError:
                raise CorpusError(f"{self.path}:{number}: not UTF-8. Save the file in that encoding.") from None
            if self.row_bytes > _largest:
                raise too_large(f"{self.path}:{number}")
            yield line
            number += 1


def array_items(stream: Any, path: str) -> Iterator[Any]:
    """Items of a JSON array, parsed one after another, so that the array itself is never held.

    Raises:
        CorpusError: It is no JSON array, or an item is too large.
    """
    text, number = _Text(stream), 0
    try:
        text.expect("[")
        if text.next_is("]"):
            text.expect("]")
        else:
            while True:
                yield _item(text, f"{path}[{number}]")
                number += 1
                if text.next_is("]"):
                    break
                text.expect(",")
            text.expect("]")
        if text.next_is(""):
            return
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: not a JSON array: at item {number}: {error}.") from None
    raise CorpusError(f"{path}: not a JSON array: something follows its end.")


class _Text:
    """Text of a stream of UTF-8, of which `at` characters are read."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.is_whole = "", 0, False

    def more(self, least: int) -> None:
        """Append at least so many bytes, unless the stream ends; forget what is read."""
        pieces, size = [self.text[self.at :]], 0
        while size < least and not self.is_whole:
            chunk = self.stream.read(_CHUNK)
            self.is_whole = not chunk
            pieces.append(self.decoder.decode(chunk, final=self.is_whole))
            size += len(chunk)
        self.text, self.at = "".join(pieces), 0

    def next_is(self, character: str) -> bool:
        """Whether it comes next after spaces; nothing stands for the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACES:
                self.at += 1
            if self.at < len(self.text) or self.is_whole:
                return self.text[self.at : self.at + 1] == character
            self.more(1)

    def expect(self, character: str) -> None:
        """Read a character."""
        if not self.next_is(character):
            found = self.text[self.at : self.at + 20]
            raise ValueError(f"{character!r} expected, found {found!r}" if found else "the file ends before it does")
        self.at += 1


def _item(text: _Text, where: str) -> Any:
    text.next_is("")  # reads to where it begins
    while True:
        try:
            item, end = _DECODER.raw_decode(text.text, text.at)
            if end < len(text.text) or text.is_whole:  # else more of a number may follow
                break
        except json.JSONDecodeError as error:
            if text.is_whole:
                raise ValueError(error.msg) from None
        size = len(text.text) - text.at
        if size > _largest:
            raise too_large(where, "an item")
        text.more(max(size, _CHUNK))
    if len(text.text[text.at : end].encode("utf-8", "replace")) > _largest:
        raise too_large(where, "an item")
    text.at = end
    return item


# -- Parquet


def parquet_batches(table: Any, stream: Any, path: str) -> Iterator[Any]:
    """Batches of a Parquet file's rows, as many rows in each as memory bears by the sizes in the file's metadata.

    Args:
        table: The open `pyarrow.parquet.ParquetFile`.
        stream: The file.
        path: For messages.

    Raises:
        CorpusError: A row is too large.
    """
    number = 0
    for group in range(table.metadata.num_row_groups):
        metadata = table.metadata.row_group(group)
        if not metadata.num_rows:
            continue
        columns = [metadata.column(column) for column in range(metadata.num_columns)]
        mean = sum(column.total_uncompressed_size for column in columns) // metadata.num_rows
        if mean > _largest:
            rows = "the row" if metadata.num_rows == 1 else f"rows of which the mean is {mean:,} bytes, so that one is"
            raise too_large(f"{path}[{number}]", rows, mean if metadata.num_rows == 1 else None)
        repeated = sum(
            _dictionary_bytes(stream, column) * -(-column.num_values // metadata.num_rows) for column in columns
        )
        size = min(max(_BATCH_BYTES // max(mean, repeated, 1), 1), _BATCH_ROWS)
        for batch in table.iter_batches(batch_size=size, row_groups=[group], use_threads=False):
            _refuse_large_rows(batch, path, number)
            yield batch
            number += len(batch)


def _dictionary_bytes(stream: Any, column: Any) -> int:
    """Size of a column's dictionary of values, which bounds each of its values; 0 where it has none.

    The header of a page, in Thrift's compact protocol, begins with its type (2: a dictionary) and uncompressed size.
    """
    offsets = (column.data_page_offset, column.dictionary_page_offset)
    place = stream.tell()
    stream.seek(min((offset for offset in offsets if offset and offset > 0), default=0))
    header = stream.read(16)
    stream.seek(place)
    kind, rest = _field(header)
    size, _ = _field(rest)
    return size if kind == 2 else 0


def _field(header: bytes) -> tuple[int, bytes]:
    """The zigzag number of a 32-bit field that follows the one before it, and what comes behind."""
    value = 0
    for place, byte in enumerate(header[1:]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return (value >> 1) ^ -(value & 1), header[place + 2 :]
    return 0, b""


def _refuse_large_rows(batch: Any, path: str, first: int) -> None:
    if batch.nbytes <= _largest:
        return
    for place in range(len(batch)):
        if (size := batch.slice(place, 1).nbytes) > _largest:
            raise too_large(f"{path}[{first + place}]", size=size)
