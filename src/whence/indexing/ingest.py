"""Check the rows of a corpus and copy them into the parts of an index.

The corpus is read once to check every row and take its digest, so that a bad line is found before anything is written,
and again to copy its rows, which must give the same digest. In between it is read once more if rows become
conversations, to check that the tokenizer's template takes them; and, if it joins an index, to find ids that the index
has already. From then on the index needs no other file than the model. A part holds as many rows as its shard, so that
one job reads one file.
"""

import array
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import UInt64

from whence.corpus.layouts import in_layout, layout, segments_of, tools_of, turns_before
from whence.corpus.plain_text import LINE
from whence.corpus.preferences import CONTRAST
from whence.corpus.reading import Corpus, Example, open_corpus, row_json
from whence.corpus.shapes import LAYOUTS, Row, shape_of
from whence.corpus.tokens import Tokenizer, render, sides_of
from whence.errors import CorpusError
from whence.indexing.manifest import CorpusEntry, Manifest
from whence.indexing.store import Store

NUMBERS_PER_SHARD = 2**23
"""A shard holds about so many numbers (32 MB in fp32), in at most `ROWS_PER_SHARD` rows: that much a kill loses and a
job holds in memory."""
ROWS_PER_SHARD = 1024
EXPECTED = {"messages": "a list of messages", "segments": "a list of segments", "tokens": "a list of token ids"}
"""What stands in a layout's columns that is no text."""
BYTES_PER_PART = 2**28
"""A part with so many bytes of rows ends, however few they are: it is read into memory as a whole."""


@dataclass(frozen=True)
class Fingerprint:
    """Digest, size and layouts of a corpus, from a first reading."""

    digest: str
    rows: int
    layouts: tuple[str, ...]
    """Layouts of its rows, in the order of their first appearance."""

    @property
    def layout(self) -> str:
        """Layout of its first row."""
        return self.layouts[0]


def rows_per_shard(width: int) -> int:
    """Rows of a shard of vectors of `width` numbers.

    >>> rows_per_shard(256), rows_per_shard(65536)
    (1024, 128)
    """
    return max(16, min(ROWS_PER_SHARD, NUMBERS_PER_SHARD // width))


def fingerprint_of(corpus: Corpus) -> Fingerprint:
    """Read a corpus through, checking every row.

    Raises:
        CorpusError: A row cannot be read, lacks columns, or has the id of another row.
    """
    digest, rows = hashlib.sha256(), 0
    layouts: dict[str, None] = {}
    keys = array.array("Q")
    for example in corpus:
        layouts[_checked_layout(example, corpus)] = None
        keys.append(xxhash.xxh3_64_intdigest(example.id.encode("utf-8", "surrogatepass")))
        digest.update(row_json(example.row).encode())
        rows += 1
    _refuse_repeated_ids(corpus, np.frombuffer(keys, dtype=np.uint64))
    return Fingerprint(digest.hexdigest(), rows, tuple(layouts))


def _refuse_repeated_ids(corpus: Corpus, keys: UInt64[np.ndarray, " n"]) -> None:
    """Refuse a corpus two of whose ids are the same; ids of the same hash are read again and compared."""
    order = keys.argsort(kind="stable")
    is_repeated = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if not len(is_repeated):
        return
    suspects, known = {*order[is_repeated].tolist(), *order[is_repeated + 1].tolist()}, set()
    for number, example in enumerate(corpus):
        if number not in suspects:
            continue
        if example.id in known:
            raise CorpusError(
                f"{corpus.name}: the id {example.id!r} is given twice (the second time at row {number}). Ids name "
                "examples in every answer: make them unique, or leave the column out and Whence makes them."
            )
        known.add(example.id)


def _checked_layout(example: Example, corpus: Corpus) -> str:
    """A row's layout. Values that no tokenizer takes for text are refused here, before anything is written."""
    kind, row = in_layout(example.row, preferences=corpus.preferences)
    columns = ("instruction", "input", "output") if kind == "instruction" else LAYOUTS[kind]
    expected: Any = str | int | float | None if kind in ("prompt", "instruction", "text") else list | None
    for column in columns:
        if not isinstance(value := row.get(column), expected):
            raise CorpusError(
                f"{corpus.name}: row {example.id} has a {type(value).__name__} as `{column}`, where "
                f"{EXPECTED.get(kind, 'text')} is expected: {str(value)[:60]!r}"
            )
    try:
        tools_of(row) if kind == "messages" else None
        turns_before(row) if kind == "instruction" else segments_of(row) if kind == "segments" else None
    except CorpusError as error:
        raise CorpusError(f"{corpus.name}: row {example.id}: {error}") from None
    return kind


def check_conversations(corpus: Corpus, layouts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Render once every row that becomes a conversation, so that a faulty one is found before a file is made.

    Instructions become conversations if the tokenizer has a chat template. Without such `layouts` nothing is read.

    Raises:
        CorpusError: The template refuses a row, or a message lacks its role or content.
    """
    kinds = ("messages", "instruction") if tokenizer.chat_template else ("messages",)
    if not set(kinds) & set(layouts):
        return
    for example in corpus:
        if layout(example.row, preferences=corpus.preferences) in kinds:
            try:
                for row in sides_of(example.row, tokenizer):
                    render(row, tokenizer)
            except CorpusError as error:
                raise CorpusError(f"{corpus.name}: row {example.id}: {error}") from None


def refuse_without_pairs(corpus: Corpus) -> None:
    """Refuse a corpus that is to be contrasts and has no pair of answers; rows are read up to the first pair.

    Raises:
        CorpusError: There is no pair.
    """
    if corpus.preferences != CONTRAST:
        return
    if not any(shape_of(example.row, preferences=CONTRAST).is_preference for example in corpus):
        raise CorpusError(
            f"{corpus.name}: --preferences contrast: no row has a preferred and a rejected answer, as `chosen` and "
            "`rejected`. Name their columns with --map, or leave --preferences out."
        )


def refuse_known_ids(store: Store, corpus: Corpus) -> None:
    """Refuse a corpus with a row whose id the index has already."""
    known = {row["id"] for part in range(len(store.manifest.parts)) for row in store.read_part(part)}
    for example in corpus:
        if example.id in known:
            raise CorpusError(f"{corpus.name}: the index has a row with the id {example.id!r} already.")


def copy_rows(store: Store, corpus: Corpus, *, after: int) -> None:
    """Copy the rows of a corpus, the first of which is row number `after` of the index, into new parts.

    The corpus may have changed since it was checked, or since a killed build copied some of it. So the rows in the
    parts are counted and digested, and if they differ from those checked they are removed from the index again.

    Raises:
        CorpusError: The corpus has changed, or cannot be read any longer. The index is as it was before any of its
            rows were copied: empty, or complete without the corpus that was to join it.
    """
    if store.manifest.has_all_parts:
        return
    try:
        _copy_as_checked(store, corpus, after)
    except CorpusError:
        _remove_rows(store, after)
        raise
    store.finish_parts()


def _copy_as_checked(store: Store, corpus: Corpus, after: int) -> None:
    digest, size, expected = hashlib.sha256(), rows_per_shard(store.manifest.width), store.manifest.corpora[-1]
    for number, part in enumerate(store.manifest.parts):
        if part.first_row >= after:
            _add_to_digest(digest, store.read_part(number))
    for rows in rows_in_groups(corpus, size, skip=store.rows - after):
        _add_to_digest(digest, rows)
        store.write_part(len(store.manifest.parts), rows)
    copied = (store.rows - after, digest.hexdigest())
    if copied != (expected["rows"], expected["digest"]):
        raise CorpusError(
            f"{corpus.name}: {expected['rows']} rows of digest {expected['digest'][:12]} were checked, and "
            f"{copied[0]} of digest {copied[1][:12]} were copied: the corpus has changed meanwhile. No row of it is "
            "kept. Run the same command again once nothing writes to it; an index needs --restart if the change stays."
        )


def _add_to_digest(digest: Any, rows: list[Row]) -> None:
    """Add rows to a digest as `fingerprint_of` does."""
    for row in rows:
        digest.update(row["row"].encode())


def _remove_rows(store: Store, after: int) -> None:
    """Remove the rows from number `after` on from the index, and the corpus of an append with them.

    They have no shards yet: shards follow when all parts are written. The manifest is written first, so that a kill
    leaves unlisted files, which the next build removes.
    """
    if after:
        store.undo_extend()
        return
    files = [part.file for part in store.manifest.parts]
    store._save(replace(store.manifest, parts=()))
    for file in files:
        store.place.remove(file)


def rows_in_groups(corpus: Corpus, size: int, *, skip: int = 0, most: float = BYTES_PER_PART) -> Iterator[list[Row]]:
    """Rows of each part, as it stores them."""
    rows: list[Row] = []
    held = 0
    for number, example in enumerate(corpus):
        if number < skip:
            continue
        rows.append({"id": example.id, "source": example.source, "row": row_json(example.row)})
        held += len(rows[-1]["row"])
        if len(rows) == size or held >= most:
            yield rows
            rows, held = [], 0
    if rows:
        yield rows


def reading_of(manifest: Manifest, entry: CorpusEntry) -> dict[str, Any]:
    """How the rows of a corpus in an index were read, as arguments of `open_corpus`."""
    reading = {"columns": entry.get("columns", {}), "text_rows": entry.get("text_rows", LINE)}
    return reading | {"preferences": manifest.settings.get("preferences")}


def reread_part(store: Store, part: int) -> list[Row]:
    """Rows of a part, read again from the corpus that it came from, if that is unchanged."""
    entry, first = store.manifest.parts[part], 0
    for corpus in store.manifest.corpora:
        if entry.first_row < first + corpus["rows"]:
            if not Path(corpus["name"]).exists() and corpus["name"].endswith("rows in memory"):
                raise CorpusError(f"{corpus['name']}: they are gone")
            texts = open_corpus(corpus["name"], first_number=first, **reading_of(store.manifest, corpus))
            if fingerprint_of(texts).digest != corpus["digest"]:
                raise CorpusError(f"{corpus['name']}: its rows are not those that were indexed")
            return next(rows_in_groups(texts, entry.rows, skip=entry.first_row - first, most=math.inf))
        first += corpus["rows"]
    raise AssertionError(f"part {part} belongs to no corpus")
