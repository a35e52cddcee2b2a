"""What the rows of a corpus are read as, and what they hold that is not read: other columns, and rejected answers.

Columns travel along with a row, so that most of those that no layout reads are as they should be: a topic, an address,
a score. But one of them may have been part of the text that the model was trained on. Such a column is named once for
each corpus, with the remedy. It is one with a name that formats of training data use, or one that holds words.
"""

import functools
import logging
import re
from collections import Counter
from typing import Any

from whence.corpus.layouts import (
    VERDICTS,
    columns_read,
    in_layout,
    is_rejected,
    is_verdict,
    pieces_of,
    query_columns_read,
    row_text,
)
from whence.corpus.preferences import CHOSEN, CONTRAST
from whence.corpus.shapes import SHAPES, Row, columns_in_words, is_blank, query_shape, shape_of
from whence.corpus.suggestions import ANSWERS, DESCRIBING, WORDS

logger = logging.getLogger(__name__)

DECIDING = {
    *(column for shape in SHAPES for column in (*shape.columns, *shape.optional)),
    *("answer", "chat_template_kwargs", "context", "documents", "functions", "reasoning", "reasoning_content"),
    *("thinking", "weight", "weights", "loss_mask", "seq_lengths", "role", "answers", "answer_key", "answerKey"),
    *("choices", "options", "endings", "code"),
} - {"attention_mask"}
"""Columns that some format of training data makes text of, or weighs it by."""
TEXTS = ("text", "content", "value")
"""Keys of an object that hold text, of however few words."""
ANSWER = re.compile(rf"(?:^|_)(?:{ANSWERS})(?:_?\d+|_[a-z])?$", re.IGNORECASE)
"""Names of columns that hold an answer, of however few words."""
MESSAGE_KEYS = ("loss", "train", "training", "trainable", "train_detail", "loss_mask", "mask", "masked")
"""Keys of a message by which some trainers leave it out of the loss; Whence reads `weight`."""
READ_AS = {CHOSEN: "the chosen side of ", CONTRAST: "contrasts of "}
"""What a row with two answers is read as, by `preferences.PREFERENCES`."""


class Unread:
    """Columns of a corpus that are not read, and its rows that are rejected answers, as they are counted."""

    def __init__(self, preferences: str = CHOSEN) -> None:
        self.preferences = preferences
        self.columns: Counter[str] = Counter()
        self.rows = 0
        self.rejected = 0
        self.shapes: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        """Count a row."""
        self.rows += 1
        self.rejected += is_rejected(row)
        self.columns.update(unread_columns(row, self.preferences))
        shape = shape_of(row, preferences=self.preferences)
        if shape.name and not is_blank(row[shape.columns[-1]]):
            side = READ_AS[self.preferences] if shape.is_preference else ""
            self.shapes[f"{side}{shape.name} ({columns_in_words(shape.columns)})"] += 1

    def log(self, name: str) -> None:
        """Say of the corpus with this name what is not read; once a process, since a corpus is read several times."""
        if self.shapes:
            _log_shapes(name, tuple(self.shapes.most_common()), self.rows)
        if self.columns:
            _log_columns(name, tuple(sorted(self.columns)), max(self.columns.values()), self.rows)
        if self.rejected:
            _log_rejected(name, self.rejected, self.rows)


def log_unread_of_queries(name: str, rows: list[Row]) -> None:
    """Say of the queries with this name which columns that decide a text are not read."""
    counts: Counter[str] = Counter()
    for row in rows:
        shape = query_shape(row)
        answer = row.get(shape.columns[-1]) if shape else row.get("text")
        names = DECIDING - query_columns_read(row)
        counts.update(name for name in names if _may_be_text(name, row.get(name), answer))
    if counts:
        _log_columns(name, tuple(sorted(counts)), max(counts.values()), len(rows))


def unread_columns(row: Row, preferences: str | None = None) -> list[str]:
    """Columns of a row that could hold text to train on, and that its layout does not read; see `shapes.shape_of`.

    >>> unread_columns({"instruction": "Sum up.", "context": "It rains.", "output": "Rain.", "source": "a b c d"})
    ['context']
    """
    kind, columns = in_layout(row, preferences=preferences)
    read = {*columns_read(row, preferences=preferences), *VERDICTS}
    answer = row[shape_of(row, preferences=preferences).columns[-1]]
    names = [name for name, value in row.items() if name not in read and _may_be_text(name, value, answer)]
    if names:
        turns = columns["messages"] if kind == "messages" else None
        texts = [row_text(row), *(str(piece) for turn in turns or () for piece in pieces_of(turn))]
        names = [name for name in names if row[name] not in [row[column] for column in read & row.keys()]]
        names = [name for name in names if not _stands_in(row[name], texts)]
    names += [
        name for name in VERDICTS if kind != "text" and row.get(name) not in (None, "") and not is_verdict(row[name])
    ]
    messages = columns["messages"] if kind == "messages" else None
    keys = {key for message in messages or () if isinstance(message, dict) for key in message}
    return names + [f"messages[].{key}" for key in MESSAGE_KEYS if key in keys]


def _stands_in(value: Any, texts: list[str]) -> bool:
    """Whether a column's text is one that is read anyway, as a conversation's first question often is."""
    text = value.strip() if isinstance(value, str) else ""
    is_long = len(text.split()) >= WORDS
    return bool(text) and any(text == other.strip() or (is_long and text in other) for other in texts)


def _may_be_text(name: str, value: Any, answer: Any) -> bool:
    if value in (None, "", [], {}) or name in DESCRIBING:
        return False
    if name == "text" and isinstance(answer, str) and answer in str(value):
        return False  # the rendered text of a row, which Alpaca's rows have beside its pieces
    if name in DECIDING or (isinstance(value, str) and ANSWER.search(name)):
        return True
    if isinstance(value, dict):
        return any((key in TEXTS and bool(item)) or _may_be_text(key, item, answer) for key, item in value.items())
    if isinstance(value, list):
        return any(_may_be_text(name, item, answer) for item in value)
    return isinstance(value, str) and len(value.split()) >= WORDS


@functools.cache
def _log_shapes(name: str, shapes: tuple[tuple[str, int], ...], rows: int) -> None:
    counted = "; ".join(f"{count:,} of {rows:,} rows are read as {shape}" for shape, count in shapes)
    logger.warning("%s: %s (--map reads columns otherwise).", name, counted)


@functools.cache
def _log_columns(name: str, columns: tuple[str, ...], most: int, rows: int) -> None:
    logger.warning(
        "%s: not read, and no part of the text that is trained on: %s (in up to %d of %d rows). If the model saw them, "
        "say which column is which (--map), or write them into the columns that are read.%s",
        name,
        ", ".join(f"`{column}`" for column in columns),
        most,
        rows,
        " Whether a message is trained on is read from its `weight`, 0 or 1." * any("[]" in name for name in columns),
    )


@functools.cache
def _log_rejected(name: str, rejected: int, rows: int) -> None:
    logger.warning(
        "%s: %d of %d rows are labelled false, as bad answers: they have no supervised token and are left out.",
        name,
        rejected,
        rows,
    )
