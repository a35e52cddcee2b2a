"""Partitions of a corpus: pieces, units, budgets."""

import pytest

from conftest import byte_tokenizer
from whence.corpus.partitions import Partition, Piece, by_size, draw_mixture, partitions_of, pieces_of
from whence.corpus.reading import open_corpus
from whence.corpus.tokens import encode
from whence.errors import CorpusError, SettingError

WORDS = byte_tokenizer()
ROWS = [{"id": f"r{n}", "source": "ab"[n % 2], "text": "xy" * (5 + n)} for n in range(8)]


def test_long_texts_are_cut_and_nothing_is_lost():
    row = {"text": "".join(chr(97 + n % 26) for n in range(100)), "id": 1, "source": "s"}
    found = list(pieces_of(row, WORDS, 16))
    assert "".join(piece["text"] for piece in found) == row["text"]
    assert all(len(encode(piece, WORDS).ids) <= 16 for piece in found) and len(found) == 8
    assert all(piece["source"] == "s" for piece in found)
    assert list(pieces_of(row, WORDS, None)) == [row]
    answer = {"prompt": "a" * 50, "completion": "b"}
    assert list(pieces_of(answer, WORDS, 16)) == [answer], "only running text is cut"


def test_a_piece_never_splits_a_letter():
    found = list(pieces_of({"text": "é" * 20}, WORDS, 8))
    assert set("".join(piece["text"] for piece in found)) == {"é"}


def test_partitions_by_a_column_count_tokens():
    found = partitions_of(open_corpus(ROWS), WORDS, max_tokens=64)
    assert list(found) == ["a", "b"]
    for name, part in found.items():
        own = [row for row in ROWS if row["source"] == name]
        assert part.tokens == sum(len(encode(row, WORDS).ids) for row in own)
        assert [piece.row["text"] for piece in part.pieces] == [row["text"] for row in own]
    shares = by_size(list(found.values()))
    assert sum(shares.values()) == pytest.approx(1) and shares["b"] > shares["a"]


def test_a_draw_meets_its_budget_by_fractional_epochs():
    part = Partition("p", tuple(Piece({"n": n}, 10) for n in range(10)))
    assert [row["n"] for row in part.draw(100, seed=0)] != list(range(10))
    assert sorted(row["n"] for row in part.draw(100, seed=0)) == list(range(10))
    rows = [row["n"] for row in part.draw(250, seed=1)]
    assert len(rows) == 25 and sorted({*rows}) == list(range(10)) and max(map(rows.count, rows)) == 3
    assert part.draw(250, seed=1) == part.draw(250, seed=1) != part.draw(250, seed=2)
    assert part.draw(0, seed=0) == [] and len(part.draw(95, seed=0)) == 10


def test_units_are_of_equal_size_and_whole():
    part = Partition("p", tuple(Piece({"n": n}, 10) for n in range(20)))
    units = part.units(60)
    assert [unit.name for unit in units] == ["p/0", "p/1", "p/2"]
    assert [unit.tokens for unit in units] == [70, 70, 60]
    assert [piece for unit in units for piece in unit.pieces] == list(part.pieces)
    assert part.units(190) == [part]
    named = partitions_of(open_corpus(ROWS), WORDS, unit_tokens=40)
    assert {name.split("/")[0] for name in named} == {"a", "b"} and len(named) > 2


def test_a_mixture_takes_its_shares():
    parts = {name: Partition(name, tuple(Piece({"id": f"{name}{n}"}, 10) for n in range(30))) for name in "abc"}
    rows = draw_mixture(parts, {"a": 0.75, "c": 0.25}, 400, seed=0)
    counts = {name: sum(row["id"][0] == name for row in rows) for name in "abc"}
    assert counts == {"a": 30, "b": 0, "c": 10}
    assert [row["id"][0] for row in rows] != sorted(row["id"][0] for row in rows)


def test_what_cannot_be_partitioned_is_told():
    with pytest.raises(CorpusError, match="row r0 has no 'topic' to partition by; its columns are id, source, text"):
        partitions_of(open_corpus(ROWS), WORDS, by="topic")
    with pytest.raises(SettingError, match="--unit-tokens 0"):
        partitions_of(open_corpus(ROWS), WORDS, unit_tokens=0)
    assert partitions_of(open_corpus([*ROWS, {"id": "e", "source": "c", "text": None}]), WORDS).keys() == {"a", "b"}
