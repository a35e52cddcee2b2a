"""What a person reads shows corpus text as text, and rows are written whole or not at all."""

import csv
import io
import json
import math
from dataclasses import replace

import fsspec
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from missing_packages import without_s3fs
from whence.cli.console import print_json
from whence.errors import MissingExtraError, SettingError, StorageError
from whence.indexing.store import Store
from whence.reports.files import check_ending, write_page, write_rows
from whence.reports.index_tables import info_table
from whence.reports.text import visible
from whence.reports.trace_tables import WINDOW, answer_text, trace_tables
from whence.tracing.results import Answer, Hit, Null, TokenMatrix, Trace

ROWS = [
    {"query": 0, "rank": 1, "id": "a", "score": 0.5, "source": None, "prompt": 'é, "q"\nb', "completion": " c"},
    {"query": 0, "rank": -1, "id": "b", "score": -0.25, "source": "s", "text": "only text"},
]
NULLS = [Null([0.1, 0.2], 0.15, 3.5, 99.0, True), Null([0.6, 0.7], 0.65, -1.0, 0.0, False)]


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


def test_an_answer_says_where_it_ended_unless_its_end_stands_there():
    own = answer([0.9, 0.8], is_generated=True)
    assert "ending      cut after 2 tokens" in answer_text(replace(own, ending="cut after 2 tokens")).plain
    assert "ending" not in answer_text(replace(own, ending="ended by x")).plain
    assert "ending      ended by <|end|>" in answer_text(replace(own, ending="ended by <|end|>")).plain


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


def token_matrix(train, influence, query=("x",)):
    matrix = torch.tensor([influence], dtype=torch.float32)
    return TokenMatrix("position", list(query), list(train), [True] * len(train), matrix)


def test_coloured_tokens_are_neither_markup_nor_control_characters():
    hostile = ["[red]", "no\n", "\x1b[2J", "\x07", "\x9b", "[/red]"]
    shares = [0.1, 0.2, 1.0, -1.0, 0.5, -0.3]
    found = Trace(
        [answer([0.5])], [replace(hit(1, 0.5, {"text": "t"}), tokens=token_matrix(hostile, shares))], "dot", 1
    )
    text = shown(trace_tables(found))
    assert "[red]no⏎␛[2J␇\\x9b[/red]" in text
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_colours_of_tokens_have_a_legend_with_their_unit():
    matrix = token_matrix(["a", "b"], [2.5, -1.0])
    asked = Trace([answer([0.5])], [replace(hit(1, 0.5, {"text": "t"}), tokens=matrix)], "dot", 1)
    text = " ".join(shown(trace_tables(asked), width=80).split())
    assert "Training tokens, by position of its gradient: helps opposes the answer" in text
    assert "of the example's exact score (its largest token has 2.5 at most)" in text
    assert "Training tokens" not in shown(trace_tables(Trace([answer([0.5])], [hit(1, 0.5, {"text": "t"})], "dot", 1)))


def test_only_tokens_around_the_most_influential_are_shown():
    train, influence = [f"<{number}>" for number in range(500)], [0.1] * 500
    influence[250] = -3.0
    found = Trace(
        [answer([0.5])], [replace(hit(1, 0.5, {"text": "t"}), tokens=token_matrix(train, influence))], "dot", 1
    )
    text = "".join(shown(trace_tables(found)).split())
    assert text.count("<") == WINDOW
    assert "<249><250><251>" in text


@pytest.mark.parametrize(("train", "influence"), [([], []), (["a"], [0.0])])
def test_an_example_without_influence_is_shown(train, influence):
    found = Trace(
        [answer([0.5])], [replace(hit(1, 0.5, {"text": "t"}), tokens=token_matrix(train, influence))], "dot", 1
    )
    assert "id1" in shown(trace_tables(found))


def test_a_null_is_shown_with_its_verdict_and_what_is_generic():
    rows = [replace(hit(rank, 0.5, {"text": "t"}), exact=0.25, null=null) for rank, null in enumerate(NULLS, start=1)]
    chosen = {"verdicts": ["Nothing here stands above the null."], "overlaps": [0.5], "notes": ["[b]only 2 rows"]}
    text = shown(trace_tables(Trace([answer([0.5])], rows, "cosine", 2, **chosen)))
    for words in (
        "[b]only 2 rows",
        "+0.250",
        "+3.5*",
        "-1.0 ",
        "Nothing here stands",
        "* scores high for any question (generic)",
        "50% are among",
    ):
        assert words in text
    assert "generic" not in shown(trace_tables(Trace([answer([0.5])], rows[1:], "cosine", 2, **chosen)))


def test_a_span_and_a_contrast_are_shown():
    asked = replace(answer([0.9, 0.8]), asked=[True, False], contrast="yz", contrast_tokens=["y", "z"])
    text = answer_text(replace(asked, contrast_probabilities=[0.9, 0.01]))
    assert "completion  xx\nand not     yz\n" in text.plain
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans if span.end - span.start == 1}
    assert styles == {"x": "dim", "y": "green", "z": "red"}
    assert replace(asked, contrast_probabilities=[0.9, 0.1]).query_tokens() == ["x", "y", "z"]


def test_a_row_has_columns_for_what_was_looked_at_alone():
    plain = hit(1, 0.5, {"text": "t"})
    assert list(plain.as_row()) == ["query", "rank", "id", "score", "source", "text"]
    full = replace(plain, exact=0.25, null=NULLS[0], by_token=[0.5], tokens=token_matrix(["a", "b"], [1.0, 2.0]))
    assert full.as_row() == {
        "query": 0, "rank": 1, "id": "id1", "score": 0.5, "exact": 0.25, "z": 3.5, "percentile": 99.0, "generic": True,
        "source": None, "text": "t", "by_token": [0.5],
        "tokens": {"basis": "position", "query": ["x"], "train": ["a", "b"], "matrix": [[1.0, 2.0]]},
    }  # fmt: skip


def test_visible_keeps_what_is_text():
    assert visible("tab\tline\né 漢 \U0001f600") == "tab\tline\né 漢 \U0001f600"
    assert visible("a\x00b\rc") == "a␀b␍c"


def test_a_null_in_a_row_shows_as_nothing():
    found = Trace([answer([0.5])], [hit(1, 0.5, {"prompt": "asked", "completion": None})], "dot", 1)
    assert "None" not in shown(trace_tables(found))


def test_an_index_is_shown_with_its_counts(tiny_index):
    info = Store.open(tiny_index).info()
    text = shown(info_table(info))
    for words in (
        "complete",
        "20, of which 20 can be ranked",
        "none",
        f"as {info['codec']}",
        f"projection {info['settings']['space']['projection']}",
    ):
        assert words in text
    counts = info["counts"] | {"non_finite": 3, "truncated": 1}
    stopped = shown(info_table(info | {"complete": False, "to_do": "run it again", "counts": counts}))
    assert "not complete: run it again" in stopped
    assert "non_finite 3, truncated 1" in stopped


# -- files of rows


def test_text_that_a_spreadsheet_would_run_stays_and_is_told(tmp_path, caplog):
    rows = [
        {"text": "=HYPERLINK(1)", "score": -1.5},
        {"text": "- a list", "score": 2.0},
        {"text": "a = b", "score": 0.0},
    ]
    write_rows(rows, tmp_path / "rows.jsonl")
    assert not caplog.text
    write_rows(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as stream:
        assert [row["text"] for row in csv.DictReader(stream)] == [row["text"] for row in rows]
    assert "2 cells of this .csv begin with = + - or @" in caplog.text


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

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"rows\.csv: cannot be written \(No space left on device\)"):
        write_rows(ROWS, file)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"rows.csv": "old"}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_rows_and_pages_go_to_addresses_too(tmp_path, ending, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(ROWS, f"plain.{ending}")
    for address in (f"file://{tmp_path}/rows.{ending}", f"memory://rows/{tmp_path.name}.{ending}"):
        check_ending(address)
        write_rows(ROWS, address)
        with fsspec.open(address, "rb") as file:
            assert file.read() == (tmp_path / f"plain.{ending}").read_bytes()
    write_page("<p>", f"memory://{tmp_path.name}.html")
    assert fsspec.filesystem("memory").cat_file(f"/{tmp_path.name}.html") == b"<p>"
    without_s3fs(monkeypatch)
    with pytest.raises(MissingExtraError, match="pip install s3fs"):
        check_ending(f"s3://bucket/rows.{ending}")
    with pytest.raises(SettingError, match="there is no directory /no/such"):
        check_ending(f"file:///no/such/rows.{ending}")


def test_json_has_null_for_what_is_no_number(tmp_path, capsys):
    rows = [{"score": math.nan, "tokens": {"matrix": [[math.inf, 1.5]]}, "by_token": (-math.inf, 2)}]
    write_rows(rows, tmp_path / "rows.jsonl")
    print_json({"rows": rows})
    line, printed = (tmp_path / "rows.jsonl").read_text(), capsys.readouterr().out
    assert json.loads(line) == {"score": None, "tokens": {"matrix": [[None, 1.5]]}, "by_token": [None, 2]}
    assert json.loads(printed) == {"rows": [json.loads(line)]}
