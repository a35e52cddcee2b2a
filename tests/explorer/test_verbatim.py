"""Pieces of a text that stand in the corpus, against a search that looks at every piece."""

import random

import pytest

from whence.explorer.verbatim import MOST_ROWS, Piece, VerbatimIndex


def naive(texts, text, least):
    """All pieces that occur in one row and that no longer one holds, by looking at each."""
    out, reached = [], 0
    for start in range(len(text)):
        end = start
        while end < len(text) and any(text[start : end + 1] in other for other in texts):
            end += 1
        if end > reached:
            if end - start >= least:
                piece = text[start:end]
                rows = [number for number, other in enumerate(texts) if piece in other]
                count = sum(sum(other.startswith(piece, place) for place in range(len(other))) for other in texts)
                out.append(Piece(start, end, count, rows[:MOST_ROWS]))
            reached = end
    return out


@pytest.mark.parametrize("alphabet", ["ab", "abc ", "aé語🙂 ", "a\u0301\ud800b"])
def test_pieces_equal_those_of_a_naive_search(alphabet):
    draw = random.Random(1)
    for _ in range(60):
        texts = ["".join(draw.choices(alphabet, k=draw.randrange(30))) for _ in range(6)]
        text = "".join(draw.choices(alphabet, k=draw.randrange(25)))
        for least in (1, 3):
            assert VerbatimIndex(texts).pieces(text, least=least) == naive(texts, text, least)


def test_a_piece_ends_with_its_row():
    found = VerbatimIndex(["the end", "of it"]).pieces("the endof it", least=4)
    assert [(piece.start, piece.end, piece.rows) for piece in found] == [(0, 7, [0]), (7, 12, [1])]


def test_a_piece_lists_some_rows_and_counts_all():
    (piece,) = VerbatimIndex([f"{number} the same words here" for number in range(40)]).pieces("the same words here")
    assert (piece.count, piece.rows) == (40, list(range(MOST_ROWS)))


def test_nothing_is_found_in_nothing():
    assert VerbatimIndex([]).pieces("some words that nobody wrote") == []
    assert VerbatimIndex(["", ""]).pieces("") == []
    assert VerbatimIndex(["abc"]).pieces("") == []
