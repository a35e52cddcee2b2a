"""No verb writes to what it reads, and none overwrites what Whence did not write, unless told to."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import contents, corpus_rows, write_jsonl
from whence.reports.existing_files import is_written_by_whence

TEXT = {"text": "mine"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A directory of inputs. None can be opened as what it stands for: an output is refused before that."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "more.jsonl", "rows.csv", "rows.parquet", "page.html", "plot.svg", "recipe.yaml"):
        (tmp_path / name).write_text(json.dumps(TEXT) + "\n")
    for name in ("index", "model", "pool", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(TEXT) + "\n")
    for name in ("index/manifest.json", "pool/pool.json"):
        (tmp_path / name).write_text("{}")
    os.link("rows.jsonl", "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to("rows.jsonl")
    return tmp_path


VERBS = {
    "trace --queries": "trace index --queries IN -o OUT",
    "trace --controls": "trace index --prompt x --controls IN -o OUT",
    "select": "select IN --method random --count 1 -o OUT",
    "select --tasks": "select more.jsonl --tasks IN --method bm25 --count 1 -o OUT",
    "select --corpus": "select index --tasks more.jsonl --corpus IN --count 1 -o OUT",
    "recover": "recover model model IN --count 1 -o OUT",
    "ablate --eval": "ablate pool --eval IN -o OUT",
    "ablate --mixtures": "ablate pool --eval more.jsonl --mixtures IN -o OUT",
    "ablate --corpus": "ablate pool --eval more.jsonl --corpus IN -o OUT",
    "mix law": "mix law IN -o OUT",
    "mix law --losses": "mix law more.jsonl --losses IN -o OUT",
    "mix suggest": "mix suggest pool --eval IN -o OUT",
    "evaluate selection --tasks": "evaluate selection model more.jsonl --tasks a=IN --graded a=more.jsonl -o OUT",
    "evaluate selection --graded": "evaluate selection model more.jsonl --tasks a=more.jsonl --graded a=IN -o OUT",
    "evaluate selection": "evaluate selection model IN --tasks more.jsonl --graded more.jsonl -o OUT",
    "evaluate join": "evaluate join index pool --eval IN -o OUT",
    "evaluate lds --scores": "evaluate lds bank --scores m=IN -o OUT",
    "evaluate retrieval": "evaluate retrieval more.jsonl IN --methods bm25 -o OUT",
    "evaluate retrieval QUERIES": "evaluate retrieval IN more.jsonl --methods bm25 -o OUT",
    "evaluate tail-patch": "evaluate tail-patch model more.jsonl IN --methods bm25 -o OUT",
    "evaluate tail-patch QUERIES": "evaluate tail-patch model IN more.jsonl --methods bm25 -o OUT",
}
DIRECTORIES = (
    "train IN rows.jsonl -o OUT",
    "train model IN -o OUT",
    "train model rows.jsonl --in-run IN -o OUT",
    "index IN rows.jsonl -o OUT",
    "index model IN -o OUT --restart",
    "pool train IN rows.jsonl -o OUT",
    "pool train model IN -o OUT",
    "bank IN rows.jsonl --queries more.jsonl --subsets 2 -o OUT",
    "bank model IN --queries more.jsonl --subsets 2 -o OUT",
    "bank model rows.jsonl --queries IN --subsets 2 -o OUT",
    "bank model rows.jsonl --queries more.jsonl --rows IN -o OUT",
    "recover IN model rows.jsonl --count 1 --work OUT",
    "recover model IN rows.jsonl --count 1 --work OUT",
    "recover model model IN --count 1 --work OUT",
    "evaluate selection IN rows.jsonl --tasks rows.jsonl --graded rows.jsonl --work OUT",
    "evaluate selection model IN --tasks rows.jsonl --graded rows.jsonl --work OUT",
)


def words(line, source, out):
    return line.replace("OUT", str(out)).replace("IN", str(source)).split()


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_writes_to_its_input(command, home, verb):
    before = contents(home)
    for out in ("rows.jsonl", "hard.jsonl"):
        for force in ([], ["--force"]):
            code, said, complaint = command(*words(VERBS[verb], "rows.jsonl", out), *force)
            assert code == 2 and not said and f"-o {out}: it is the input rows.jsonl" in complaint
    assert contents(home) == before


@pytest.mark.parametrize("out", ["./folder/../soft.jsonl", "FILE", "folder/rows.jsonl"])
def test_no_name_of_an_input_is_an_output(command, home, out):
    out, source = (f"file://{home}/rows.jsonl", "rows.jsonl") if out == "FILE" else (out, "rows.jsonl")
    source = "folder" if out.startswith("folder/rows") else source
    before = contents(home)
    code, _, complaint = command("select", source, "--method", "random", "--count", 1, "-o", out, "--force")
    assert code == 2 and "the input" in complaint
    assert contents(home) == before


@pytest.mark.parametrize("line", DIRECTORIES)
def test_no_directory_of_results_is_an_input(command, home, line):
    before = contents(home)
    for out in ("folder", f"file://{home}/folder", home):
        source = "folder" if out != home else "folder/rows.jsonl"
        code, said, complaint = command(*words(line, source, out))
        assert code == 2 and not said and "the input" in complaint, complaint
    assert contents(home) == before


def test_reports_and_recipes_are_no_inputs(command, home):
    for line, flag in (
        ("select page.html --method random --count 1 --report page.html", "--report"),
        ("mix law page.html --report page.html", "--report"),
        ("recover page.html model rows.jsonl --count 1 --report page.html", "--report"),
        ("ablate pool --eval page.html --report page.html", "--report"),
        ("pool merge pool --mixture a=1 -o new --yaml pool/rows.jsonl", "--yaml"),
    ):
        code, _, complaint = command(*line.split(), "--force")
        assert code == 2 and flag in complaint and "the input" in complaint


@pytest.mark.parametrize(
    "line",
    ["trace index --prompt x -o OUT", "select more.jsonl --method random --count 1 -o OUT", "mix law more.jsonl -o OUT",
     "recover model model more.jsonl --count 1 -o OUT", "ablate pool --eval more.jsonl -o OUT",
     "mix suggest pool --eval more.jsonl -o OUT", "evaluate join index pool --eval more.jsonl -o OUT",
     "evaluate selection model more.jsonl --tasks more.jsonl --graded more.jsonl -o OUT",
     "evaluate lds bank --methods bm25 -o OUT", "evaluate retrieval more.jsonl more.jsonl --methods bm25 -o OUT",
     "evaluate tail-patch model more.jsonl more.jsonl --methods bm25 -o OUT"],
)  # fmt: skip
def test_the_files_of_others_need_force(command, home, line):
    for out in ("rows.csv", "rows.jsonl", "rows.parquet"):
        code, _, complaint = command(*words(line, "", out))
        assert code == 2 and f"{out}: there is a file that Whence did not write" in complaint and "--force" in complaint
    assert (home / "rows.csv").read_text() == json.dumps(TEXT) + "\n"


def test_force_overwrites_and_whence_own_files_need_none(command, home):
    write_jsonl(home / "pool.jsonl", corpus_rows(6))
    asked = ["select", "pool.jsonl", "--method", "random", "--count", 2]
    for out in ("rows.csv", "rows.jsonl", "rows.parquet"):
        assert command(*asked, "-o", out)[0] == 2
        assert command(*asked, "-o", out, "--force")[0] == 0
        assert command(*asked, "-o", out)[0] == 0, "a file of an earlier run"
    assert command(*asked, "--report", "page.html")[0] == 2
    for force in (["--force"], []):
        assert command(*asked, "--report", "page.html", *force)[0] == 0
    (home / "empty.jsonl").touch()
    assert command(*asked, "-o", "empty.jsonl")[0] == 0


def test_a_table_in_an_index_is_none_of_its_files(command, home, tiny_index):
    shutil.copytree(tiny_index, "made")
    asked = ["select", "made", "--method", "random", "--count", 2, "-o"]
    assert command(*asked, "made/chosen.jsonl")[0] == command(*asked, "made/chosen.jsonl")[0] == 0
    code, _, complaint = command(*asked, "made/corpus/part-00000.parquet", "--force")
    assert code == 2 and "a file of the input made" in complaint


def test_the_corpus_of_an_index_is_its_input(command, home, tiny_index, tiny_corpus):
    before = tiny_corpus.read_bytes()
    code, _, complaint = command("trace", tiny_index, "--prompt", "x", "-o", tiny_corpus, "--force")
    assert code == 2 and "it is the input" in complaint and tiny_corpus.read_bytes() == before


def test_tables_are_known_by_their_columns(tmp_path):
    trace = {"query": 0, "rank": 1, "id": "a", "score": 0.5, "source": None, "text": "x"}
    mixture = {"partition": "a", "weight": 1.0}
    known = [trace, trace | {"z": 1.0}, mixture, {"text": "x", "whence_score": 1.0}]
    foreign = [{"rank": 1, "id": "a", "score": 1.0}, mixture | {"mine": 1}, {"text": "whence_score"}]
    for row, is_own in [*((row, True) for row in known), *((row, False) for row in foreign)]:
        write_jsonl(tmp_path / "a.jsonl", [row])
        (tmp_path / "a.csv").write_text(",".join(row) + "\n")
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        for ending in ("jsonl", "csv", "parquet"):
            assert is_written_by_whence(str(tmp_path / f"a.{ending}")) is is_own, (row, ending)


def test_a_model_is_no_directory_for_a_run(command, home, tiny_llama, tiny_corpus):
    shutil.copytree(tiny_llama, "mine")
    before = contents(home / "mine")
    code, _, complaint = command("train", tiny_llama, tiny_corpus, "-o", "mine", "--max-steps", 1)
    assert code == 2 and "holds config.json already" in complaint
    assert contents(home / "mine") == before
