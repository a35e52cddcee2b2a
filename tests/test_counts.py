"""Counted nouns agree with their count, in answers about one of a thing as about many."""

import pytest

import whence
from conftest import corpus_rows
from whence.counts import number_of
from whence.reports.index_tables import info_answer
from whence.reports.select_tables import select_answer


@pytest.mark.parametrize(("count", "words"), [(1, "1 epoch"), (1.0, "1 epoch"), (0, "0 epochs"), (0.5, "0.5 epochs")])
def test_one_is_one_and_all_else_is_many(count, words):
    assert number_of(count, "epoch") == words


def test_answers_about_one_row_are_of_one_row():
    assert info_answer({"complete": True, "ok_rows": 1, "rows": 1}) == (
        "The index is complete: 1 of its 1 row can be ranked."
    )
    assert select_answer(whence.select(corpus_rows(8), method="random", count=1)).startswith("1 of 8 rows is chosen")
    assert repr(whence.select(corpus_rows(8), method="random", count=1)).startswith("Chosen(1 of 8 rows, 0 tokens, by")
