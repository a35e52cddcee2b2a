"""What a person reads shows corpus text as text, and rows are written whole or not at all."""

import csv
import io
import json

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from whence.answers import Answer, Hit, Trace
from whence.errors import SettingError, StorageError
from whence.report import answer_text, check_ending, info_table, trace_tables, visible, write_rows
from whence.store import Store

ROWS = [
    {"query": 0, "rank": 1, "id": "a", "score": 0.5, "source": None, "prompt": 'é, "q"\nb', "completion": " c"},
    {"query": 0, "rank": -1, "id": "b", "score": -0.25, "source": "s", "text": "only text"},
]


def shown(part, width=100):
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(part)
    return console.export_text()


def answer(probabilities, *, prompt="p", is_generated=False):
    return Answer(
        prompt=prompt,
        completion="x" * len(probabilities),
        is_generated=is_generated,
        tokens=["x"] * len(probabilities),
        probabilities=probabilities,
    )


def hit(rank, score, row, query=0):
    return Hit(query, rank, f"id{rank}", score, None, row)


# -- tables


def test_a_trace_shows_each_answer_with_its_examples():
    found = Trace(
        answers=[answer([0.9, 0.8]), answer([0.9], is_generated=True)],
        hits=[
            hit(1, 0.75, {"prompt": "why", "completion": " because"}),
            hit(-1, -0.5, {"text": "against it"}),
            hit(1, 0.25, {"instruction": "do", "output": "done"}, query=1),
        ],
        method="cosine",
        rows=1234,
    )
    text = shown(trace_tables(found))
    first, second = text.split("model said")
    for words in ("completion  xx", "2 of 2 tokens at p >= 0.5", "+0.750", "why because", "-0.500", "against it"):
        assert words in first
    assert "do done" in second
    assert "cosine over 1,234 examples" in text
    assert found.of(0)[0].rank == 1
    assert [each.rank for each in found.of(0, opposing=True)] == [-1]


def test_a_long_trace_says_where_the_rest_is():
    found = Trace([answer([0.9])] * 5, [hit(1, 0.5, {"text": "t"}, query=number) for number in range(5)], "dot", 9)
    text = shown(trace_tables(found, most=2))
    assert "... and 3 more queries; write them all with -o FILE" in text
    assert text.count("how sure") == 2


def test_a_guessed_answer_is_said_to_be_one():
    assert "The model guesses here" in answer_text(answer([0.9, 0.1, 0.2])).plain
    assert "The model guesses here" not in answer_text(answer([0.9, 0.6, 0.2])).plain


def test_perplexity_is_that_of_the_geometric_mean():
    assert answer([0.5, 0.125]).perplexity == pytest.approx(4)
    assert answer([1.0, 1.0]).perplexity == 1
    assert answer([0.0]).perplexity > 1e20


def test_corpus_text_is_neither_markup_nor_control_characters():
    hostile = "[red]no[/red] \x1b[2J\x07 \x9b1m \x7f"
    found = Trace([answer([0.5], prompt=hostile)], [hit(1, 0.5, {"text": hostile})], "dot", 1)
    text = shown(trace_tables(found))
    assert text.count("[red]no[/red] ␛[2J␇ \\x9b1m \\x7f") == 2
    assert not {"\x1b", "\x07", "\x9b", "\x7f"} & set(text)


def test_visible_keeps_what_is_text():
    assert visible("tab\tline\né 漢 \U0001f600") == "tab\tline\né 漢 \U0001f600"
    assert visible("a\x00b\rc") == "a␀b␍c"


def test_a_null_in_a_row_shows_as_nothing():
    found = Trace([answer([0.5])], [hit(1, 0.5, {"prompt": "asked", "completion": None})], "dot", 1)
    assert "None" not in shown(trace_tables(found))


def test_an_index_is_shown_with_its_counts(tiny_index):
    info = Store.open(tiny_index).info()
    text = shown(info_table(info))
    for words in ("complete", "20, of which 20 can be ranked", "none", "as bfloat16", "projection two_sided"):
        assert words in text
    counts = info["counts"] | {"non_finite": 3, "truncated": 1}
    stopped = shown(info_table(info | {"complete": False, "counts": counts}))
    assert "not complete: run the command that made it again, it resumes" in stopped
    assert "non_finite 3, truncated 1" in stopped


# -- files of rows


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_rows_are_read_back(tmp_path, ending):
    file = tmp_path / f"rows.{ending}"
    write_rows(ROWS, file)
    names = [*ROWS[0], "text"]
    if ending == "jsonl":
        assert [json.loads(line) for line in file.read_text().splitlines()] == ROWS
    elif ending == "parquet":
        assert pq.read_table(file).to_pylist() == [{name: row.get(name) for name in names} for row in ROWS]
    else:
        with file.open(newline="") as stream:
            found = list(csv.DictReader(stream))
        expected = [{name: "" if row.get(name) is None else str(row[name]) for name in names} for row in ROWS]
        assert found == expected


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_lone_surrogate_is_replaced(tmp_path, ending):
    write_rows([{"text": "a\ud800b"}], tmp_path / f"rows.{ending}")
    assert b"a?b" in (tmp_path / f"rows.{ending}").read_bytes()


def test_an_ending_or_directory_that_is_not_there_is_refused(tmp_path):
    for name in ("rows.txt", "rows", "rows.json", "none/rows.csv"):
        with pytest.raises(SettingError, match="-o "):
            check_ending(tmp_path / name)
    check_ending(tmp_path / "rows.csv")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "rows.csv"
    file.write_text("old")

    def full(self, data):
        self.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(StorageError, match=r"rows\.csv: cannot be written \(No space left on device\)"):
        write_rows(ROWS, file)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"rows.csv": "old"}
