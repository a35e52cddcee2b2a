"""A corpus' rows, checked and copied into the parts of an index.

The corpus is read to check every row and take its digest, so that a bad line is found before anything is written; and
again to copy its rows, which must give the same digest. Between the two it is read once more where rows become
conversations, which must be such as the tokenizer's template takes; and, where it joins an index, for ids that are
there already. From then on the index needs no other file than the model. A part holds as many rows as its shard, so
that one job reads one file.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whence.corpus.layouts import LAYOUTS, Row, layout
from whence.corpus.reading import Corpus, Example, open_corpus, row_json
from whence.corpus.tokens import Tokenizer, render
from whence.errors import CorpusError
from whence.indexing.store import Store

NUMBERS_PER_SHARD = 2**23
"""A shard holds as many rows as make about so many numbers (32 MB in fp32), at most `ROWS_PER_SHARD`: what a kill
loses, and what a job keeps in memory."""
ROWS_PER_SHARD = 1024


@dataclass(frozen=True)
class Fingerprint:
    """What a first reading of a corpus finds."""

    digest: str
    rows: int
    layouts: tuple[str, ...]
    """Of its rows, in the order in which they are met."""

    @property
    def layout(self) -> str:
        """Of its first row."""
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
        CorpusError: A row cannot be read, lacks columns, or has the id of another.
    """
    digest, rows = hashlib.sha256(), 0
    layouts: dict[str, None] = {}
    seen: set[bytes] = set()
    for example in corpus:
        layouts[_checked_layout(example, corpus.name)] = None
        key = hashlib.blake2b(example.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if key in seen:
            raise CorpusError(
                f"{corpus.name}: the id {example.id!r} is given twice (the second time at row {rows}). Ids name "
                "examples in every answer: make them unique, or leave the column out and Whence makes them."
            )
        seen.add(key)
        digest.update(row_json(example.row).encode())
        rows += 1
    return Fingerprint(digest.hexdigest(), rows, tuple(layouts))


def _checked_layout(example: Example, name: str) -> str:
    """A row's layout. What no tokenizer takes for text in its columns is refused, before anything is written."""
    kind = layout(example.row)
    columns = ("instruction", "input", "output") if kind == "instruction" else LAYOUTS[kind]
    wanted: Any = list | None if kind == "messages" else str | int | float | None
    for column in columns:
        if not isinstance(value := example.row.get(column), wanted):
            raise CorpusError(
                f"{name}: row {example.id} has a {type(value).__name__} as `{column}`, where "
                f"{'a list of messages' if kind == 'messages' else 'text'} is expected: {str(value)[:60]!r}"
            )
    return kind


def check_conversations(corpus: Corpus, layouts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Render once every row that becomes a conversation, so that one which cannot is found before a file is made.

    Instructions become one where the tokenizer has a chat template. A corpus none of whose `layouts` does is not read.

    Raises:
        CorpusError: The template refuses a row, or a message lacks its role or content.
    """
    kinds = ("messages", "instruction") if tokenizer.chat_template else ("messages",)
    if not set(kinds) & set(layouts):
        return
    for example in corpus:
        if layout(example.row) in kinds:
            try:
                render(example.row, tokenizer)
            except CorpusError as error:
                raise CorpusError(f"{corpus.name}: row {example.id}: {error}") from None


def refuse_known_ids(store: Store, corpus: Corpus) -> None:
    """Refuse a corpus of which a row has the id of a row that the index holds."""
    known = {row["id"] for part in range(len(store.manifest.parts)) for row in store.read_part(part)}
    for example in corpus:
        if example.id in known:
            raise CorpusError(f"{corpus.name}: the index has a row with the id {example.id!r} already.")


def copy_rows(store: Store, corpus: Corpus, *, after: int) -> None:
    """Copy the rows of a corpus, whose first is row number `after` of the index, into parts that are not there.

    The corpus may have changed since it was checked, or since a build that was killed had copied some of it. So the
    rows in the parts are counted and digested, and what is not as it was checked is taken out of the index again.

    Raises:
        CorpusError: The corpus has changed, or cannot be read any longer. The index is as it was before any of its
            rows were copied: empty, or complete without the corpus that was to join it.
    """
    if store.manifest.has_all_parts:
        return
    try:
        _copy_as_checked(store, corpus, after)
    except CorpusError:
        _take_out(store, after)
        raise
    store.finish_parts()


def _copy_as_checked(store: Store, corpus: Corpus, after: int) -> None:
    digest, size, expected = hashlib.sha256(), rows_per_shard(store.manifest.width), store.manifest.corpora[-1]
    for number, part in enumerate(store.manifest.parts):
        if part.first_row >= after:
            _digest(digest, store.read_part(number))
    for rows in _groups(corpus, size, skip=store.rows - after):
        _digest(digest, rows)
        store.write_part(len(store.manifest.parts), rows)
    found = (store.rows - after, digest.hexdigest())
    if found != (expected["rows"], expected["digest"]):
        raise CorpusError(
            f"{corpus.name}: {expected['rows']} rows of digest {expected['digest'][:12]} were checked, and "
            f"{found[0]} of digest {found[1][:12]} were copied: the corpus has changed meanwhile. No row of it is "
            "kept. Run the same command again once nothing writes to it; an index needs --restart if the change stays."
        )


def _digest(digest: Any, rows: list[Row]) -> None:
    """Of the rows alone, as `fingerprint_of` takes it."""
    for row in rows:
        digest.update(row["row"].encode())


def _take_out(store: Store, after: int) -> None:
    """Take the rows from number `after` on out of the index, and the corpus of an append with them.

    They have no shard yet: those come when all parts are there. The manifest goes first, so that a kill leaves files
    that are not listed, which the next build removes.
    """
    if after:
        store.undo_extend()
        return
    files = [part.file for part in store.manifest.parts]
    store._save(replace(store.manifest, parts=()))
    for file in files:
        store.place.remove(file)


def _groups(corpus: Corpus, size: int, *, skip: int = 0) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for number, example in enumerate(corpus):
        if number < skip:
            continue
        rows.append({"id": example.id, "source": example.source, "row": row_json(example.row)})
        if len(rows) == size:
            yield rows
            rows = []
    if rows:
        yield rows


def part_again(store: Store, part: int) -> list[Row]:
    """Rows of a part, read again from the corpus it came from, if that is still the same."""
    entry, first = store.manifest.parts[part], 0
    for corpus in store.manifest.corpora:
        if entry.first_row < first + corpus["rows"]:
            if not Path(corpus["name"]).exists() and corpus["name"].endswith("rows in memory"):
                raise CorpusError(f"{corpus['name']}: they are gone")
            texts = open_corpus(corpus["name"], first_number=first)
            if fingerprint_of(texts).digest != corpus["digest"]:
                raise CorpusError(f"{corpus['name']}: its rows are not those that were indexed")
            return next(_groups(texts, entry.rows, skip=entry.first_row - first))
        first += corpus["rows"]
    raise AssertionError(f"part {part} belongs to no corpus")
