"""Names of untrusted files, columns, sources and flags reach a terminal as text: no control character, one line."""

import re
import subprocess
import sys

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
    code, out, err = run(
        "index", tiny_llama, corpus, "-o", tmp_path / "index", "--projection", "two_sided", "--width", 4
    )
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


def test_names_and_numbers_out_of_all_bounds_are_one_line(command, tiny_llama, tiny_index, tiny_corpus, tmp_path):
    """Of inputs too, which are looked at before anything is imported."""
    long = "9" * 300
    for words in (
        ("pool", "train", tiny_llama, long, "-o", tmp_path / "pool"),
        ("recover", long, tiny_llama, tiny_corpus),
        ("trace", tiny_index, "--queries", long),
        ("select", tiny_index, "--tasks", tiny_corpus, "--corpus", f"a={long}", "--method", "bm25", "--count", 1),
    ):
        code, _, err = command(*words)
        assert (
            code == 2
            and f"no file can be called so: it has a name of {len(long) + words.count(f'a={long}') * 2}" in err
        )
    table = tmp_path / "a.csv"
    table.write_text("train_a,train_b,metric/x\n0.5,0.5,1\n1,0,2\n")
    code, _, err = command("mix", "law", table, "--max-row-bytes", 10**30)
    assert "unexpected" not in err
    code, _, err = command("pool", "grams", "memory://a/pool")
    assert code == 2 and "unexpected" not in err


def test_what_libraries_advise_programmers_is_not_printed():
    script = "import sys, warnings\nfrom whence.cli import app\n"
    script += "sys.argv = ['whence', '--version']\n"
    script += "try:\n    app.run()\nexcept SystemExit:\n    warnings.warn('is deprecated', FutureWarning)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.startswith("whence ")
