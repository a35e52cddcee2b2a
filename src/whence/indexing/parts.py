"""One part: some of the rows that an index can show, as a Parquet file of their ids, sources and JSON."""

import io
import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from whence.corpus.layouts import Row
from whence.corpus.row_files import parquet_file
from whence.corpus.templates import Tokenizer
from whence.corpus.tokens import Encoded, encode
from whence.counts import number_of
from whence.errors import CorpusError

_SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("row", pa.string())])


def part_bytes(rows: Sequence[Row]) -> memoryview:
    """The file of some rows of id, source (may be None) and row (JSON)."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_SCHEMA), sink, compression="zstd")
    return sink.getbuffer()


def part_rows(data: bytes | memoryview, count: int) -> list[Row]:
    """The rows of a file, of which so many are listed.

    Raises:
        ValueError: The file holds others.
        ArrowException: It is no Parquet file.
    """
    table = parquet_file(pa.BufferReader(data)).read(use_threads=False)
    if (table.schema.names, len(table)) != (_SCHEMA.names, count):
        raise ValueError(f"{number_of(len(table), 'row')} of {', '.join(table.schema.names)}; {count} are listed")
    return table.to_pylist()


def encoded_row(row: Row, tokenizer: Tokenizer, longest: int) -> Encoded:
    """Token ids of a stored row.

    Raises:
        CorpusError: The row has none of the layouts; it is named.
    """
    try:
        return encode(json.loads(row["row"]), tokenizer, longest)
    except CorpusError as error:
        raise CorpusError(f"row {row['id']}: {error}") from None
