"""What of an answer stands word for word in the corpus: the longest pieces, and where.

A suffix array of all rows' texts (`pydivsufsort`, whose C library sorts them in O(n log n)) finds by binary search the
longest piece of an answer that begins at a given place and occurs anywhere. A piece counts if no longer one holds it,
and if it has `LEAST` characters or more. Rows are joined by a byte that is in no text of UTF-8, so that no piece runs
from one row into another.

Cost: the array holds 4 bytes (8 from 2 GiB on) for each byte of text, beside the text.

Source: Manber and Myers 1993, Suffix arrays, https://doi.org/10.1137/0222058.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from whence.errors import MissingExtraError, SettingError
from whence.sizes import shown_size

LEAST = 12
MOST_ROWS = 20
"""Rows that are listed for a piece."""
MOST_BYTES = 2**31
BETWEEN = b"\xff"


@dataclass(frozen=True)
class Piece:
    """A piece of a text that stands in the corpus."""

    start: int
    end: int
    """Characters of the text, from and to."""
    count: int
    """Times that it occurs."""
    rows: list[int]
    """The first rows that hold it, ascending, `MOST_ROWS` at most."""


class VerbatimIndex:
    """A suffix array of the texts of some rows."""

    def __init__(self, texts: Iterable[str]):
        """Sort all suffixes.

        Raises:
            MissingExtraError: The package is not installed.
            SettingError: The texts are too long for memory.
        """
        try:
            from pydivsufsort import divsufsort
        except ImportError as error:
            raise MissingExtraError(
                "verbatim pieces are found by pydivsufsort, which is not installed: pip install 'whence[web]'"
            ) from error
        encoded = [_bytes(text) for text in texts]
        lengths = np.array([len(text) + 1 for text in encoded], np.int64)
        total = int(lengths.sum())
        if total > MOST_BYTES:
            raise SettingError(
                f"verbatim pieces are found among {shown_size(MOST_BYTES)} of text at most; these rows have "
                f"{shown_size(total)}"
            )
        self._starts = np.cumsum(lengths) - lengths
        self._text = BETWEEN.join(encoded) + BETWEEN
        self._order = divsufsort(self._text) if total else np.zeros(0, np.int32)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return len(self._text) + self._order.nbytes

    def pieces(self, text: str, *, least: int = LEAST) -> list[Piece]:
        """Longest pieces of a text that occur, in the order of their starts."""
        found: list[Piece] = []
        reached = 0
        for start in range(len(text)):
            end = self._longest(text, start, max(start, reached))
            if end > reached:
                if end - start >= least:
                    count, rows = self._occurrences(text[start:end])
                    found.append(Piece(start, end, count, rows))
                reached = end
        return found

    def _longest(self, text: str, start: int, end: int) -> int:
        """End of the longest piece from `start` that occurs; `end`: of one that is known to.

        Most pieces end where the one before did, so that the search doubles its steps from there.
        """
        low, step = end, 1
        while low + step <= len(text) and self._occurs(text[start : low + step]):
            low, step = low + step, 2 * step
        high = min(len(text), low + step - 1)
        while low < high:
            middle = (low + high + 1) // 2
            if self._occurs(text[start:middle]):
                low = middle
            else:
                high = middle - 1
        return low

    def _occurs(self, piece: str) -> bool:
        first, end = self._range(piece)
        return first < end

    def _range(self, piece: str) -> tuple[int, int]:
        """Places in the order of the suffixes that begin with a piece."""
        wanted = _bytes(piece)

        def beginning(place: np.integer) -> bytes:
            return self._text[int(place) : int(place) + len(wanted)]

        first = bisect_left(self._order, wanted, key=beginning)
        return first, bisect_right(self._order, wanted, lo=first, key=beginning)

    def _occurrences(self, piece: str) -> tuple[int, list[int]]:
        first, end = self._range(piece)
        rows = np.unique(np.searchsorted(self._starts, self._order[first:end], "right") - 1)  # each of many once
        return end - first, rows[:MOST_ROWS].tolist()


def _bytes(text: str) -> bytes:
    """A text in UTF-8; half a surrogate pair, which JSON may hold, stands for itself."""
    return text.encode("utf-8", "surrogatepass")
