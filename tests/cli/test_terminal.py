"""Names of untrusted files, columns, sources and flags reach a terminal as text: no control character, one line."""

import re

import pytest

from conftest import corpus_rows, write_jsonl

ESCAPE = "\x1b]0;owned\x07"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.fixture
def run(printed):
    """Run a command: its exit code, stdout and stderr, neither of which has a control character."""

    def call(*words):
        code, out, err = printed(*words)
        assert not CONTROLS.search(out + err), repr((out, err))
        return code, out, err

    return call


@pytest.mark.parametrize(
    "words",
    [
        ["trace", f"no{ESCAPE}index\nhere", "--prompt", "x"],
        ["ablate", f"no{ESCAPE}pool", "--eval", "x"],
        ["mix", "law", f"no{ESCAPE}table.csv"],
        ["index", "model", f"./no{ESCAPE}corpus.jsonl", "-o", "out"],
        ["trace", "x", "--prompt", "y", f"--no-such{ESCAPE}flag\r"],
        ["pool", "verify", f"no{ESCAPE}pool\r"],
    ],
)
def test_what_is_typed_is_told_in_one_plain_line(run, words):
    code, out, err = run(*words)
    assert code == 2 and not out and len(err.splitlines()) == 1 and "owned" in err


def test_names_in_a_corpus_are_told_in_plain_text(run, tiny_llama, tmp_path):
    rows = [row | {f"more{ESCAPE}\ntext": "some words of a column", "source": f"s{ESCAPE}"} for row in corpus_rows(8)]
    corpus = write_jsonl(tmp_path / f"c{ESCAPE}.jsonl", rows)
    code, out, err = run("index", tiny_llama, corpus, "-o", tmp_path / "index", "--width", 4)
    assert code == 0 and "␛" in out
    assert run("info", tmp_path / "index")[0] == 0
    assert run("trace", tmp_path / "index", "--prompt", "5 and 3?", "--completion", " yes")[0] == 0
    bad = write_jsonl(tmp_path / "bad.jsonl", [{f"a{ESCAPE}\n": "x"}])
    code, _, err = run("index", tiny_llama, bad, "-o", tmp_path / "other")
    assert code == 2 and len(err.splitlines()) == 1


def test_names_of_partitions_are_told_in_plain_text(run, tiny_llama, tmp_path):
    rows = [row | {"source": f"s{number % 2}{ESCAPE}"} for number, row in enumerate(corpus_rows(8))]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    arguments = (
        "pool",
        "train",
        tiny_llama,
        corpus,
        "-o",
        tmp_path / "pool",
        "--steps",
        1,
        "--warmup-steps",
        0,
        "--tokens",
        40,
    )
    code, _, err = run(*arguments)
    assert code == 0, err
    assert run("pool", "merge", tmp_path / "pool", "--mixture", f"x{ESCAPE}=1", "-o", tmp_path / "merged")[0] == 2
