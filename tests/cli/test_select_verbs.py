"""The verbs `select` and `evaluate selection` as a user types them."""

import json
import shlex

import pytest

from conftest import corpus_rows, save_tiny_llama, write_jsonl
from whence.evaluation.selection import NOTHING, Line, SelectionTable
from whence.reports.evaluate_tables import evaluate_plot

TASK = [{"prompt": "3 and 4?", "completion": " yes, 7"}, {"prompt": "What?", "completion": " it is so"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("select")
    pool = [row | {"source": f"s{number % 2}"} for number, row in enumerate(corpus_rows(16))]
    write_jsonl(folder / "pool.jsonl", pool)
    write_jsonl(folder / "task.jsonl", TASK)
    write_jsonl(folder / "graded.jsonl", corpus_rows(3, first=40))
    save_tiny_llama(folder / "model")
    return folder


def test_rows_are_chosen_written_and_told(command, files, tmp_path, monkeypatch):
    out = tmp_path / "chosen.jsonl"
    code, said, _ = command(
        "select", files / "pool.jsonl", "--tasks", files / "task.jsonl", "--method", "bm25", "--count", 4, "-o", out,
        "--cap", "s0=2", "--compare", "random",
    )  # fmt: skip
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and len(rows) == 4
    assert sum(row["source"] == "s0" for row in rows) <= 2
    assert {*rows[0]} == {"id", "prompt", "completion", "source", "whence_score"}
    for words in ("4 of 16 rows", "by bm25", "times the pool's", "Rows in common with: random", "rows are chosen"):
        assert words in said
    assert "--compare less" not in said
    monkeypatch.setenv("COLUMNS", "40")  # no width breaks the line that holds a command
    said = command("select", files / "pool.jsonl", "--tasks", files / "task.jsonl", "--method", "bm25", "--count", 4)[1]
    assert "bm25 gained 0.50, -0.02 and 0.26 nats" in said and said.count("--compare less") == 1


def test_the_report_is_one_page(command, files, tmp_path):
    page = tmp_path / "chosen.html"
    words = ["select", files / "pool.jsonl", "--method", "random", "--count", 2, "--report"]
    code, said, _ = command(*words, page)
    assert code == 0 and f"report written to {page}" in said
    assert page.read_text().startswith("<!doctype html>")
    code, said, complaint = command(*words, tmp_path / "chosen.pdf")
    assert code == 2 and "--report" in complaint and "is written to .html" in complaint and not said


def test_json_is_one_document(command, files):
    code, said, _ = command("select", files / "pool.jsonl", "--method", "random", "--fraction", 0.5, "--json")
    found = json.loads(said)
    assert code == 0 and len(found["rows"]) == 8
    assert sum(line["rows"] for line in found["composition"]) == 8
    assert found["left_out"] == {"below the budget": 8}


@pytest.mark.parametrize(
    "words, told",
    [
        (["--method", "bm26"], "Did you mean bm25?"),
        (["--method", "bm25", "--count", 2], "add --tasks FILE"),
        (["--count", 2], "no index, which --method less needs"),
        (["--method", "random"], "give one of --fraction, --count and --tokens-budget"),
        (["--method", "random", "--count", 2, "--fraction", 0.1], "given: fraction, count"),
        (["--method", "random", "--count", 2, "--cap", "s0"], "--cap s0: NAME=VALUE is expected"),
        (["--method", "random", "--count", 2, "--cap", "s0=some"], "rows (300) or a share (0.3)"),
        (["--method", "random", "--count", 2, "--floor", "s9=1"], "no row has this source. There are s0, s1."),
        (["--method", "random", "--count", 2, "--set", "k=1"], "no such option"),
        (["--method", "random", "--count", 2, "--by", "word"], "choose task or example"),
        (["--method", "random", "--count", 2, "--selector", "best"], "There are max, mean, round_robin"),
        (["--method", "random", "--count", 2, "--temperature", -1], "--temperature"),
        (["--method", "random", "--count", 2, "-o", "chosen.txt"], ".jsonl"),
        (["--method", "loss", "--count", 2], "add --model MODEL"),
        (["--method", "random", "--count", 2, "--view", "adam"], "frozen-v is expected"),
    ],
)
def test_mistakes_are_one_clear_line(command, files, words, told):
    code, said, complaint = command("select", files / "pool.jsonl", *words)
    assert code == 2 and not said
    assert told in complaint and "Traceback" not in complaint


def test_an_empty_task_file_is_told(command, files, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    code, _, complaint = command("select", files / "pool.jsonl", "--tasks", empty, "--method", "bm25", "--count", 2)
    assert code == 2 and "no rows" in complaint


def test_the_closed_loop_is_one_command(command, files, tmp_path):
    out = tmp_path / "table.svg"
    words = ["evaluate", "selection", files / "model", files / "pool.jsonl", "--tasks", f"sums={files / 'task.jsonl'}",
             "--graded", f"sums={files / 'graded.jsonl'}", "--methods", "bm25,dsir:least_words=1", "--fraction", 0.4,
             "--seeds", 2, "--steps", 2, "-o", out]  # fmt: skip
    code, said, complaint = command(*words)
    assert code == 0, complaint
    for name in ("nothing", "random", "full pool", "bm25", "dsir:least_words=1"):
        assert name in said
    assert out.read_text().startswith("<svg") and (tmp_path / "table.work").is_dir()
    code, said, complaint = command(*words[:-2], "--work", tmp_path / "table.work", "--json")
    assert code == 0 and len(json.loads(said)["rows"]) == 5, "from the kept cells"


@pytest.fixture(scope="module")
def warmed(files):
    """An index as LESS makes it: by a run that began at the model."""
    from whence.indexing.build import index
    from whence.training.trainer import train

    pool = files / "pool.jsonl"
    train(str(files / "model"), pool, files / "run", max_steps=2, lora_rank=2, checkpoints=2, progress=False)
    return index(files / "run", pool, files / "index", view="adam", checkpoints="all", width=64, progress=False)


def test_the_closed_loop_takes_an_index_of_a_warm_up_run(command, files, warmed, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    asked = ("select", "index", "--tasks", "task.jsonl", "--fraction", 0.3, "--compare", "random", "-o")
    code, said, _ = command(*asked, tmp_path / "chosen.jsonl")
    assert code == 0 and " Next: whence evaluate selection MODEL index --tasks task.jsonl " in said
    loop = ("evaluate", "selection", "model", "index", "--tasks", "task.jsonl", "--graded", "graded.jsonl",
            "--methods", "less:within=mean_cosine", "--fraction", 0.4, "--seeds", 2, "--steps", 1, "--batch-size", 2,
            "--work", tmp_path / "work")  # fmt: skip
    code, said, complaint = command(*loop)
    assert code == 0, complaint
    *_, following = said.partition(" Next: whence ")
    assert command(*shlex.split(following), "-o", tmp_path / "chosen.jsonl")[0] == 0
    chosen = [json.loads(line)["id"] for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    graded = [json.loads(file.read_text()) for file in (tmp_path / "work").glob("choice-*.json")]
    graded = [document for document in graded if document["method"].startswith("less")]
    assert [[row["id"] for row in document["choices"]["task"]["rows"]] for document in graded] == [chosen]

    (files / "run").rename(files / "moved")
    code, _, complaint = command(*loop)
    assert code == 2 and "If it has moved, name it with --model" in complaint
    code, said, complaint = command(*loop, "--model", "moved")
    assert code == 0 and " --model moved " in said, complaint
    said = command(*asked, tmp_path / "again.jsonl", "--model", "moved")[1]
    assert "evaluate selection MODEL index " in said and said.endswith(" --model moved\n")


def test_where_an_index_model_is_says_nothing_of_a_corpus(command, files):
    code, _, complaint = command("evaluate", "selection", files / "model", files / "pool.jsonl", "--tasks",
                                 files / "task.jsonl", "--graded", files / "graded.jsonl", "--model", "x")  # fmt: skip
    assert code == 2 and "--model x: where an index' model is, and " in complaint


def test_tasks_and_graded_rows_must_be_of_the_same_tasks(command, files):
    code, _, complaint = command("evaluate", "selection", files / "model", files / "pool.jsonl", "--tasks",
                             files / "task.jsonl", "--graded", f"other={files / 'graded.jsonl'}")  # fmt: skip
    assert code == 2 and "other, task is in one of them alone" in complaint


def test_names_in_the_plot_are_text():
    lines = [
        Line("<b>", "a & b", 2, 1.0, 9.0, 1.0, 0.5, 1.0, 0.1, 0.2, (0.1, 0.3)),
        Line(NOTHING, "a & b", 1, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, -0.8, (-1.0, -0.5)),
    ]
    drawn = evaluate_plot(SelectionTable(lines, {"seeds": [0, 1]}))
    assert "&lt;b&gt;" in drawn and "a &amp; b" in drawn and "<b>" not in drawn
    assert 'class="better"' in drawn and NOTHING not in drawn
