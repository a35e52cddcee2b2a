"""JSON in any form, files that are no corpus, and the splits of a directory: read right, or told with a command."""

import gzip
import json

import fsspec
import pytest

from whence.corpus import row_files
from whence.corpus.bounds import rows_up_to
from whence.corpus.reading import open_corpus
from whence.errors import CorpusError, SettingError


def refused(path, *words):
    with pytest.raises(CorpusError) as caught:
        list(open_corpus(path))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


ROWS_OF_TWO = [{"text": "a"}, {"text": "b", "items": [{"data": 1}]}]


@pytest.mark.parametrize("ending", ["json", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize(
    "form",
    [
        "".join(json.dumps(row) + "\n" for row in ROWS_OF_TWO),
        json.dumps(ROWS_OF_TWO),
        json.dumps(ROWS_OF_TWO, indent=2),
        json.dumps({"version": "1", "data": ROWS_OF_TWO}),
        "\ufeff" + json.dumps({"rows": ROWS_OF_TWO}, indent=2),
        "\n\n".join(json.dumps(row, indent=1) for row in ROWS_OF_TWO),
        "".join(json.dumps(row) for row in ROWS_OF_TWO),
    ],
    ids=["lines", "array", "array, indented", "data", "rows, indented", "objects, indented", "one line"],
)
def test_json_is_read_in_any_form_whatever_its_ending(tmp_path, form, ending):
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(gzip.compress(form.encode()) if ending.endswith("gz") else form.encode())
    assert [example.row for example in open_corpus(file)] == ROWS_OF_TWO
    assert {example.file for example in open_corpus(file)} == {"rows"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{\n "text": "a",\n "text": b\n}', ["JSON over several lines", "line 3", "jq -c . "]),
        ("a.jsonl", b'{"text": "a"\n{"text": "b"}\n', ["a.jsonl:1: not a line of JSON"]),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), ["in UTF-16,", "iconv -f UTF-16 -t UTF-8"]),
        ("a.csv", "text\na\n".encode("utf-16-le"), ["in UTF-16LE,", "iconv -f UTF-16LE -t UTF-8"]),
        ("a.json", b"\x1f\x8b\x08\0\0", ["gzip-compressed", "mv {0} {0}.gz"]),
        ("a.csv", b"PK\x03\x04\0\0", ["a zip archive or a spreadsheet"]),
        ("a.jsonl", b"PAR1\0\0", ["a Parquet file", "mv {0} {0}.parquet"]),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", ["a pointer of Git LFS", "git lfs pull"]),
        ("a.json", b"<!DOCTYPE html>\n<html>", ["a web page or XML"]),
        ("a.xlsx", b"PK", ["a spreadsheet", "pandas.read_excel("]),
        ("a b.md", b"one\ntwo\n", ["plain text", "cp '{1}/a b.md' '{1}/a b.md.txt'"]),
        ("a.zip", b"PK", ["an archive", "unzip {0} -d {1}/a"]),
        ("a.tar.gz", b"", ["an archive", "tar -xf {0}"]),
        ("a.pkl", b"", ["unpickles nothing"]),
    ],
)
def test_a_file_that_is_no_corpus_says_what_it_is_and_the_command_that_makes_one(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    refused(file, str(file), *(word.format(file, tmp_path) for word in words))


TEXT = "\ufeffone two\r\nthree\n\n\nfour  five six\n  \nseven"


@pytest.mark.parametrize(
    ("text_rows", "expected"),
    [
        ("line", ["one two", "three", "four  five six", "seven"]),
        ("paragraph", ["one two\nthree", "four  five six", "seven"]),
        ("file", ["one two\nthree\n\n\nfour  five six\n  \nseven"]),
        ("2", ["one two\n", "three\n\n\nfour  ", "five six\n  \n", "seven"]),
        ("4", ["one two\nthree\n\n\nfour  ", "five six\n  \nseven"]),
        ("99", ["one two\nthree\n\n\nfour  five six\n  \nseven"]),
    ],
)
def test_rows_of_plain_text(tmp_path, caplog, text_rows, expected):
    for name in ("a.txt", "b.txt.gz"):
        file = tmp_path / name
        file.write_bytes(gzip.compress(TEXT.encode()) if name.endswith("gz") else TEXT.encode())
        assert [example.row["text"] for example in open_corpus(file, text_rows=text_rows)] == expected
    caplog.clear()
    corpus = open_corpus(tmp_path, text_rows=text_rows)
    assert [example.row["text"] for example in (*corpus, *open_corpus(corpus))] == 4 * expected
    what = f"{text_rows} words" if text_rows.isdecimal() else f"a {text_rows}"
    said = f"{tmp_path}: plain text, of which a row is {what} (--text-rows line|paragraph|file|WORDS)."
    assert caplog.messages == [said]


def test_plain_text_that_is_no_utf8_or_too_large(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\n")
    refused(tmp_path / "a.txt", f"{tmp_path}/a.txt:2: not UTF-8", "iconv")
    (tmp_path / "a.txt").write_text("one two\n" * 100)
    with rows_up_to(200):
        assert len(list(open_corpus(tmp_path / "a.txt"))) == 100
        for text_rows in ("file", "paragraph"):
            with pytest.raises(CorpusError, match=f"a.txt:1: a {text_rows} of more than 200 bytes"):
                list(open_corpus(tmp_path / "a.txt", text_rows=text_rows))
    for wrong in ("page", "0", "-1", "9" * 5000):
        with pytest.raises(SettingError, match=f"--text-rows {wrong[:60]}: line, paragraph, file, or a number"):
            open_corpus(tmp_path / "a.txt", text_rows=wrong)
    (tmp_path / "b.jsonl").write_text('{"text": "row"}\n')
    assert [example.row for example in open_corpus(tmp_path)] == [{"text": "row"}], "beside rows it is a note"


@pytest.mark.parametrize(
    ("names", "read", "left_out"),
    [
        (["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"], [0, 1], "test"),
        (["train", "validation", "test"], [0], "test and validation"),
        (["train/0", "dev/0"], [0], "validation"),
        (["code", "train", "eval_set"], [0, 1], "test"),
        (["training", "trains", "latest"], [0, 1, 2], None),
        (["code", "test"], [0, 1], None),
    ],
)
def test_of_a_data_sets_splits_only_train_is_read(tmp_path, names, read, left_out, caplog):
    for number, name in enumerate(names):
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"text": str(number)}) + "\n")
    assert sorted(int(example.row["text"]) for example in open_corpus(tmp_path)) == read
    if left_out is None:
        assert not caplog.messages
        return
    (message,) = caplog.messages
    assert f"only its split `train` is read; files of {left_out} are left out" in message
    named = message.partition("For another, name ")[2]
    assert {int(example.row["text"]) for example in open_corpus(named)}.isdisjoint(read)


def test_splits_without_train_are_named(tmp_path):
    for name in ("test", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    refused(tmp_path, f"splits are test, validation; name one: {tmp_path}:test")
    refused(f"{tmp_path}:train", "there is no such split; there is test, validation")
    assert len(list(open_corpus(f"{tmp_path}:validation"))) == 1


@pytest.mark.parametrize("most", range(20, 40))
def test_objects_over_lines_beyond_what_is_read_as_a_whole_are_refused_and_not_left_out(tmp_path, monkeypatch, most):
    """Wherever the cut falls: between two objects what is before it is readable."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {number}"}, indent=1) + "\n" for number in range(9)))
    monkeypatch.setattr(row_files, "OVER_LINES", most)
    refused(file, "JSON over several lines", f"{most} bytes", "jq -c . ")


def test_a_split_at_an_address_is_named_as_the_note_says(caplog):
    files = fsspec.filesystem("memory")
    for split in ("train", "test"):
        files.pipe_file(f"/splits/{split}.jsonl", json.dumps({"text": split}).encode())
    assert [example.row["text"] for example in open_corpus("memory://splits")] == ["train"]
    name = caplog.messages[-1].rpartition("name ")[2]
    assert name == "memory://splits:test"
    assert [example.row["text"] for example in open_corpus(name)] == ["test"]
    files.mv("/splits/train.jsonl", "/splits/dev.jsonl")
    refused("memory://splits", "name one: memory://splits:test")
    files.rm("/splits", recursive=True)
