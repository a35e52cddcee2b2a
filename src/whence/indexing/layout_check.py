"""Are the rows of an index laid out as queries would be today?

An index keeps what decides the text of its rows: another chat template, the day that the template writes, the version
of the layout rules. One that was made before these were kept may hold other tokens than its rows would become now. So
its first rows are laid out again, and their supervised tokens are compared in number with those that were stored.
"""

import json
import shlex
from collections.abc import Iterable

from whence.corpus.layouts import in_layout, layout
from whence.corpus.shapes import Row, shape_of
from whence.corpus.templates import Tokenizer, writes_date
from whence.corpus.tokens import encode, request_of
from whence.errors import ChecksumError, CorpusError
from whence.indexing.store import Store

ROWS = 64
"""Rows that are laid out again."""
READ_LATER = {
    1: {"messages": ("tools", "system"), "instruction": ("system", "history")},
    2: {"messages": ("system",)},
    3: {"segments": ("segments",)},
}
"""Columns of each layout that a version of the rules read otherwise; they need not change the number of targets."""
QUESTIONS = ("question", "query", "input")
"""Columns beside `chosen` and `rejected` that no version up to the third read."""


CHANGES = {
    1: "every turn of the assistant is closed, and `gpt` is the assistant; tools, system, history and weights are "
    "read; NaN and empty cells are missing; a beginning is read once",
    2: "a conversation's `system` is read; rows of more shapes are conversations",
    3: "under a chat template an instruction and its input are joined by one line break; `segments` are tokenised each "
    "by itself; a pair of answers has its `question` and its `system`; what a template writes behind "
    "a turn's end is not supervised",
}
"""What came after a version of the rules."""


def layout_notes(store: Store, tokenizer: Tokenizer, *, is_dated: bool) -> list[str]:
    """What an index' rows and today's layout differ in, with the remedy; nothing where they agree.

    Args:
        store: The index.
        tokenizer: Its model's.
        is_dated: The day that a chat template writes is known.
    """
    settings, root = store.manifest.settings, store.place.root
    again = f"whence index MODEL CORPUS -o {shlex.quote(root)} --restart"
    notes = []
    if settings["layout"] in ("messages", "instruction") and writes_date(tokenizer) and not is_dated:
        notes.append(
            f"{root}: the chat template writes the date, and the index does not say of which day its rows are; queries "
            f"are written with today's. Say the day with --date YYYY-MM-DD, or index again: {again}"
        )
    version = settings.get("layout_version", 1)
    if version not in (*CHANGES,):
        return notes
    changed, rows = _changed_rows(store, tokenizer)
    if changed:
        changes = "; ".join(CHANGES[number] for number in CHANGES if number >= version)
        notes.append(
            f"{root}: its rows were laid out by older rules, and queries are by today's: {changed} of the first {rows} "
            f"rows would be other tokens now ({changes}). Index again: {again}"
        )
    return notes


def _changed_rows(store: Store, tokenizer: Tokenizer) -> tuple[int, int]:
    """Rows of the first that would be other tokens now, and how many were looked at.

    Without a version an index may be of any rules, but those of today keep theirs where a chat template writes rows.
    """
    settings = store.manifest.settings
    place = next(((entry.checkpoint, entry.part) for entry in store.manifest.shards), None)
    if place is None:
        return 0, 0
    try:
        rows, tokens = store.read_part(place[1])[:ROWS], store.shard(*place).tokens.tolist()
    except ChecksumError:
        return 0, 0  # whoever reads the damaged file says so
    version = settings.get("layout_version")
    first = [json.loads(row["row"]) for row in rows]
    is_old = version is not None or bool(tokenizer.chat_template)
    is_old |= bool(rows) and _layout_now(first[0], settings.get("preferences")) != settings["layout"]
    versions = range(version or 1, (max(READ_LATER) if version else 1) + 1)
    changed = (
        _is_changed(row, count, tokenizer, settings["max_tokens"], versions) or (is_old and _is_other_pair(row))
        for row, count in zip(first, tokens, strict=False)
    )
    return sum(changed), len(rows)


def _layout_now(row: Row, preferences: str | None) -> str | None:
    try:
        return layout(row, preferences=preferences)
    except CorpusError:
        return None


def _is_other_pair(row: Row) -> bool:
    """Whether a row is a pair of answers of which a version up to the third left out the question, or the system."""
    shape, (kind, columns) = shape_of(row), in_layout(row)
    if "chosen" not in shape.columns or shape.columns[0] not in (*QUESTIONS, "prompt"):
        return False
    if shape.columns[0] == "prompt":
        return kind == "instruction"
    return in_layout({name: value for name, value in row.items() if name not in QUESTIONS})[1] != columns


def _is_changed(row: Row, tokens: int, tokenizer: Tokenizer, longest: int, versions: Iterable[int]) -> bool:
    try:
        kind, columns = in_layout(row)
        has_more = any(row.get(name) for version in versions for name in READ_LATER[version].get(kind, ()))
        has_more |= bool(tokenizer.chat_template) and kind == "instruction" and len(request_of(columns)) > 1
        return has_more or encode(row, tokenizer, longest).supervised_count != tokens
    except CorpusError:
        return True
