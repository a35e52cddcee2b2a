"""`whence bank` and `whence info BANK` as a user types them, and the mistakes they answer."""

import json

import pytest

from conftest import corpus_rows, save_tiny_llama, write_jsonl
from whence.reports.existing_files import is_written_by_whence

TRAIN = ["--epochs", 1, "--batch-size", 4, "--lr", 5e-3, "--max-tokens", 32]


@pytest.fixture
def run(command):
    """Exit code, stdout without line breaks, and stderr without them."""

    def call(*words):
        code, said, complaint = command(*words)
        return code, " ".join(said.split()), complaint

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-bank")
    write_jsonl(folder / "rows.jsonl", corpus_rows(10))
    write_jsonl(folder / "held.jsonl", corpus_rows(2, first=50))
    write_jsonl(folder / "top.jsonl", [{"id": "row-3"}])
    write_jsonl(folder / "short.jsonl", corpus_rows(9))
    save_tiny_llama(folder / "model")
    return folder


@pytest.fixture
def bank(run, files):
    """A bank of two subsets, and of one list of rows."""
    place = files / "bank"
    if not place.exists():
        assert run("train", files / "model", files / "rows.jsonl", "-o", files / "run", *TRAIN)[0] == 0
        words = ["--queries", files / "held.jsonl", "--subsets", 2, "--rows", files / "top.jsonl"]
        code, said, _ = run("bank", files / "run", files / "rows.jsonl", "-o", place, *words)
        assert code == 0 and "4 trainings made: the bank has 3 retrainings beside the one on all rows" in said
        assert f"Next: whence evaluate lds {place} --methods bm25,random" in said
        assert "the run's weights, bit for bit" in said and "between random subsets a query's loss differs by" in said
    return place


def test_the_same_command_says_that_nothing_was_to_be_done(run, files, bank):
    words = ["bank", files / "run", files / "rows.jsonl", "-o", bank, "--subsets", 2]
    code, said, _ = run(*words)
    assert code == 0 and "Nothing was to be done: the bank has 3 retrainings" in said
    code, said, _ = run(*words, "--json")
    document = json.loads(said)
    assert document["trained"] == [] and len(document["rows"]) == 5 * 2
    assert {row["kind"] for row in document["rows"]} == {"parent", "full", "random", "rows"}
    assert document["subsets"] == {"fraction": 0.5, "seed": 0} and document["leave_out"] == "zero"


def test_info_tells_a_bank(run, files, bank):
    code, said, _ = run("info", bank)
    assert code == 0 and "zero: rows keep their places in the batches" in said and "random subsets 2 5" in said
    assert "listed rows left out 1 9" in said and "10 rows of" in said
    code, said, _ = run("info", bank, "--json")
    assert code == 0 and json.loads(said)["repetition"] == {"largest": 0.0, "cosine": 1.0}


def test_verify_tells_a_bank(run, files, bank):
    code, said, _ = run("verify", bank)
    assert code == 0 and "This is a bank, of which 8 files are as written" in said


def test_a_dry_run_says_what_it_takes(run, files, bank):
    code, said, _ = run("bank", files / "run", files / "rows.jsonl", "-o", bank, "--subsets", 6, "--dry-run")
    assert code == 0 and "4 trainings of 10 rows" in said and "the work of 2." in said and "It fits" in said
    words = ["--queries", files / "held.jsonl", "--by", "source", "--keep-weights", "--dry-run"]
    code, said, _ = run("bank", files / "run", files / "rows.jsonl", "-o", files / "none", *words)
    assert code == 0 and "3 trainings of 10 rows" in said and not (files / "none").exists()


@pytest.mark.parametrize(("words", "said"), [
    (["RUN", "ROWS", "-o", "NEW", "--subsets", "2"], "--queries: a file of held-out rows is expected"),
    (["RUN", "ROWS", "-o", "BANK"], "nothing to leave out: give --subsets N, --by COLUMN or --rows FILE"),
    (["RUN", "ROWS", "-o", "BANK", "--subsets", "2", "--fraction", "0.3"], "its random subsets have --fraction 0.5"),
    (["RUN", "ROWS", "-o", "BANK", "--subsets", "2", "--leave-out", "drop"], "leave out zero there, drop here"),
    (["RUN", "SHORT", "-o", "BANK", "--subsets", "2"], "was trained on 10 rows"),
    (["RUN", "ROWS", "-o", "BANK", "--queries", "SHORT"], "members have no weights to measure them on"),
    (["MODEL", "ROWS", "-o", "NEW", "--queries", "HELD", "--subsets", "2"], "no whence_train.json, which says how"),
    (["RUN", "ROWS", "-o", "RUN", "--queries", "HELD", "--subsets", "2"], "it is the input"),
    (["RUN", "ROWS", "-o", "NEW", "--queries", "nowhere.jsonl", "--subsets", "2"], "nowhere.jsonl"),
    (["RUN", "ROWS", "-o", "NEW", "--queries", "HELD", "--subsets", "2", "--engine", "slurm"], "--engine slurm: one"),
])  # fmt: skip
def test_a_mistake_is_one_line(run, files, bank, words, said):
    names = {"RUN": files / "run", "ROWS": files / "rows.jsonl", "SHORT": files / "short.jsonl", "BANK": bank,
             "NEW": files / "new", "HELD": files / "held.jsonl", "MODEL": files / "model"}  # fmt: skip
    code, _, complaint = run("bank", *(names.get(word, word) for word in words))
    assert code == 2 and said in complaint and complaint.count("error") == 1
    assert not (files / "new").exists()


def test_removal_and_addition_are_one_command(run, files, bank, tmp_path):
    words = ["--methods", "bm25", "--share", 0.2, "--seeds", 2]
    code, said, _ = run("evaluate", "removal", bank, *words, "-o", tmp_path / "removal.csv")
    assert code == 0 and "How much does leaving the top rows out raise the loss?" in said
    assert "Leaving out the top 2 rows of bm25 raises the loss most" in said or "may be chance" in said
    assert is_written_by_whence(str(tmp_path / "removal.csv"))
    for _ in range(2):  # its own files may be written over
        code, said, _ = run("evaluate", "removal", bank, *words, "-o", tmp_path / "removal.svg")
        assert code == 0 and "</svg>" in (tmp_path / "removal.svg").read_text()
    code, said, _ = run("evaluate", "addition", bank, *words, "--json")
    document = json.loads(said)
    assert {row["method"] for row in document["rows"]} == {"bm25", "random"} and document["settings"]["rows"] == 2
    code, _, complaint = run("evaluate", "removal", bank, *words, "--share", 2)
    assert code == 2 and "--share 2.0: a share above 0 and below 1" in complaint
    code, _, complaint = run("evaluate", "removal", files / "run", *words)
    assert code == 2 and "no bank here" in complaint
