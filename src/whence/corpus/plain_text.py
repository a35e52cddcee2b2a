"""Rows of a plain text file, which does not say where one ends: a line, a paragraph, the file, or so many words.

Lines are what `datasets` and the trainers that use it make of .txt files. Words, not tokens: so the rows of a corpus
are the same whatever model reads them.
"""

import functools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from whence.corpus import bounds
from whence.corpus.shapes import Row
from whence.errors import CorpusError, SettingError

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".text")
LINE, PARAGRAPH, FILE = "line", "paragraph", "file"
DIGITS = 12
"""Digits of the largest number of words."""
_text_rows = LINE


@contextmanager
def text_rows_are(text_rows: str | None) -> Iterator[None]:
    """Let this be a row of plain text within the context, in all threads, where nothing else is given.

    Raises:
        SettingError: It is none of those that `checked` takes.
    """
    global _text_rows
    before, _text_rows = _text_rows, _text_rows if text_rows is None else checked(text_rows)
    try:
        yield
    finally:
        _text_rows = before


def current() -> str:
    """What is a row of plain text, by `text_rows_are`."""
    return _text_rows


def checked(text_rows: str) -> str:
    """What is a row of plain text: "line", "paragraph", "file", or a number of words.

    Raises:
        SettingError: It is something else.
    """
    is_number = text_rows.isdecimal() and len(text_rows) <= DIGITS and int(text_rows) > 0
    if text_rows not in (LINE, PARAGRAPH, FILE) and not is_number:
        raise SettingError(f"--text-rows {text_rows[:60]}: line, paragraph, file, or a number of words is expected")
    return text_rows


def rows(stream: Any, path: str, text_rows: str) -> Iterator[tuple[str, Row]]:
    """Rows of a binary stream, each with its place. Blank ones are left out, and no other character is.

    Raises:
        CorpusError: It is not UTF-8, or a row is too large.
    """
    for number, text in _pieces(bounds.lines(stream, path), path, text_rows):
        if text.strip():
            yield f"{path}:{number}", {"text": text}


def _pieces(lines: Iterator[bytes], path: str, text_rows: str) -> Iterator[tuple[int, str]]:
    """Pieces of a text with the number of the line that each begins in; together they are the text."""
    begin, piece, size = 1, [], 0
    for number, raw in enumerate(lines, start=1):
        line = _decoded(raw, f"{path}:{number}")
        if text_rows == LINE:
            yield number, line
            continue
        if text_rows == PARAGRAPH and not line.strip():
            yield begin, "\n".join(piece)
            begin, piece, size = number + 1, [], 0
            continue
        piece.append(line)
        size += len(raw) + 1
        if text_rows in (PARAGRAPH, FILE):
            if size > bounds.max_row_bytes():
                raise bounds.too_large(f"{path}:{begin}", f"a {text_rows}")
            continue
        *whole, rest = _by_words("\n".join(piece), int(text_rows))
        for text in whole:
            yield begin, text
        begin, piece = (number if whole else begin), [rest]
    if piece:
        yield begin, "\n".join(piece)


def _by_words(text: str, count: int) -> list[str]:
    """A text in pieces of so many words, the last of which may have fewer; spaces go with the word before.

    >>> _by_words("a b  c d e", 2)
    ['a b  ', 'c d ', 'e']
    """
    return re.findall(rf"\s*(?:\S+\s*){{1,{count}}}", text) or [text]


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig" if where.endswith(":1") else "utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: not UTF-8: {error.reason}. Convert it: iconv -f ENCODING -t UTF-8") from None


@functools.cache  # once per process, since a corpus is read several times
def tell(root: str, text_rows: str) -> None:
    """Say what is a row of a corpus of plain text."""
    what = f"a {text_rows}" if text_rows in (LINE, PARAGRAPH, FILE) else f"{text_rows} words"
    logger.warning("%s: plain text, of which a row is %s (--text-rows line|paragraph|file|WORDS).", root, what)
