"""The verbs `pool`, `ablate`, `evaluate join` and `recover` as a user types them, and the mistakes they answer."""

import json

import pytest
from test_ablate import HELD, ROWS
from test_recover import ROWS as LETTERS

from conftest import save_tiny_llama, write_jsonl
from whence.models.loading import load_model

TRAIN = ["--tokens", 200, "--steps", 4, "--warmup-steps", 1, "--max-tokens", 32, "--lr", 5e-3]


@pytest.fixture
def run(command):
    """Run a command; its exit code, stdout and stderr, each without line breaks."""

    def call(*words):
        code, said, complaint = command(*words)
        return code, " ".join(said.split()), complaint

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-pool")
    write_jsonl(folder / "rows.jsonl", ROWS)
    (folder / "held").mkdir()
    for name, rows in HELD.items():
        write_jsonl(folder / "held" / f"{name}.jsonl", rows)
    write_jsonl(folder / "letters.jsonl", LETTERS)
    save_tiny_llama(folder / "model")
    return folder


@pytest.fixture
def pool(run, files):
    place = files / "pool"
    if not place.exists():
        code, said, _ = run("pool", "train", files / "model", files / "rows.jsonl", "-o", place, *TRAIN)
        assert code == 0 and "3 members" in said and f"whence ablate {place}" in said
    return place


def test_mixtures_are_read_and_told(run, files, pool, tmp_path):
    code, said, _ = run("ablate", pool, "--eval", files / "held", "-o", tmp_path / "cells.csv")
    assert code == 0
    for words in ("Perplexity of the merged model", "a + b", "the parent", "cheaper from", "7 mixtures"):
        assert words in said
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 1 + 7 * 2
    code, said, _ = run("ablate", pool, "--eval", files / "held" / "a.jsonl", "--json")
    document = json.loads(said)
    assert code == 0 and {row["set"] for row in document["rows"]} == {"a"}
    assert {"mixture", "merged", "mean", "best", "perplexity", "bits_per_byte"} <= {*document["rows"][0]}
    code, said, _ = run("ablate", pool, "--eval", files / "held", "--bits")
    assert code == 0 and "Bits per byte" in said


def test_truth_is_told_beside(run, files, pool, tmp_path):
    table = tmp_path / "mixtures.csv"
    table.write_text("name,a,b,c\none,1,0,0\ntwo,0,1,0\nthree,0,0,1\nfour,0.5,0.5,0\n")
    code, said, _ = run("ablate", pool, "--eval", files / "held", "--mixtures", table, "--truth")
    assert code == 0 and "Rank correlation with really trained models" in said and "all sets" in said
    assert "regret: nats lost by choosing" in said and "ngram" in said


def test_a_mixture_is_written_as_a_model(run, files, pool, tmp_path):
    code, said, _ = run("pool", "merge", pool, "--mixture", "a=0.25,b=0.75", "-o", tmp_path / "out", "--yaml",
                        tmp_path / "recipe.yaml")  # fmt: skip
    assert code == 0 and f"a model in {tmp_path / 'out'}" in said
    assert load_model(tmp_path / "out").tokenizer is not None
    assert "task_arithmetic" in (tmp_path / "recipe.yaml").read_text()
    words = ["pool", "merge", pool, "--mixture", "a=0.25,b=0.75", "--method", "regmean", "--alpha", 0.5]
    assert run(*words, "-o", tmp_path / "other")[0] == 0
    one, other = (load_model(tmp_path / name).model.state_dict() for name in ("out", "other"))
    assert any(not one[name].equal(other[name]) for name in one)
    code, said, _ = run("pool", "grams", pool, "--tokens", 50)
    assert code == 0 and f"Inputs of 3 members are in {pool}/grams" in said
    table = tmp_path / "mixtures.csv"
    table.write_text("name,a,b,c\none,0.5,0.5,0\n")
    found = {}
    for method in ("mean", "regmean"):
        words = ["ablate", pool, "--eval", files / "held", "--mixtures", table, "--method", method, "--json"]
        found[method] = json.loads(run(*words)[1])
    assert found["mean"]["rows"][0]["merged"] != found["regmean"]["rows"][0]["merged"]
    assert "RegMean" in found["regmean"]["notes"][-1]
    assert run("pool", "verify", pool)[0] == 0


def test_a_mixture_is_suggested(run, files, pool, tmp_path):
    out = tmp_path / "mixture.jsonl"
    words = ["mix", "suggest", pool, "--eval", files / "held", "--steps", 3, "--cap", "a=0.3"]
    code, said, _ = run(*words, "-o", out)
    assert code == 0 and "all alike" in said and f"whence pool merge {pool} --mixture" in said
    rows = {row["partition"]: row["weight"] for row in map(json.loads, out.read_text().splitlines())}
    assert rows["a"] <= 0.3 + 1e-9 and sum(rows.values()) == pytest.approx(1)
    assert run("mix", "suggest", pool, "--eval", files / "held", "--cap", "z=0.3")[0] == 2


def test_the_join_is_one_command(run, files, pool, tmp_path):
    index = tmp_path / "index"
    assert run("index", files / "model", files / "rows.jsonl", "-o", index, "--max-tokens", 32)[0] == 0
    words = ["evaluate", "join", index, pool, "--eval", files / "held", "--methods", "influence,bm25"]
    code, said, _ = run(*words, "-o", tmp_path / "join.svg")
    assert code == 0 and "influence" in said and "most missed" in said
    assert (tmp_path / "join.svg").read_text().startswith("<svg")
    assert len(json.loads(run(*words, "--json")[1])["rows"]) == 2 * 3 * 2


@pytest.mark.parametrize(("words", "said"), [
    (["ablate", "POOL", "--eval", "nowhere.jsonl"], "nowhere.jsonl"),
    (["ablate", "nowhere", "--eval", "HELD"], "no pool here"),
    (["pool", "merge", "POOL", "--mixture", "a=0.5,b=0.4", "-o", "x"], "sum to 0.9"),
    (["pool", "merge", "POOL", "--mixture", "a=0.5,d=0.5", "-o", "x"], "no partition 'd'"),
    (["pool", "merge", "POOL", "--mixture", "a", "-o", "x"], "--mixture a: NAME=WEIGHT,... is expected, or micro"),
    (["pool", "merge", "POOL", "--mixture", "a=1,b", "-o", "x"], "'b' is not NAME=WEIGHT"),
    (["pool", "merge", "POOL", "--mixture", "a=1", "-o", "x", "--scale", "nan"], "--scale nan: a number from"),
    (["pool", "merge", "POOL", "--mixture", "a=1", "-o", "x", "--yaml", "no/x.yaml"], "no/x.yaml: there is no"),
    (["pool", "merge", "POOL", "--mixture", "a=1", "-o", "MODEL"], "the pool's parent, which its members"),
    (["mix", "suggest", "POOL", "--eval", "HELD", "--rate", "nan"], "--rate nan: numbers above 0 are expected"),
    (["mix", "suggest", "POOL", "--eval", "HELD", "--target", "a=nan"], "--target"),
    (["pool", "merge", "POOL", "--mixture", "a=1", "-o", "x", "--method", "ties"], "--method ties: choose one of"),
    (["pool", "merge", "POOL", "--mixture", "a=1", "-o", "x", "--method", "regmean", "--alpha", "3"], "from 0 to 1"),
    (["pool", "merge", "POOL", "--mixture", "a=1", "-o", "x", "--method", "regmean", "--yaml", "y"], "no regmean"),
    (["pool", "train", "MODEL", "ROWS", "-o", "POOL"], "were trained with"),
    (["pool", "train", "MODEL", "ROWS", "-o", "other", "--by", "topic"], "has no 'topic' to partition by"),
    (["recover", "MODEL", "MODEL", "LETTERS", "--count", "5"], "nothing to find"),
    (["recover", "MODEL", "nowhere", "LETTERS", "--count", "5"], "nowhere"),
    (["recover", "MODEL", "MODEL", "LETTERS", "--method", "nnls"], "add --count N"),
    (["recover", "MODEL", "MODEL", "LETTERS", "--count", "5", "--template", "{text}?"], "need --choices"),
    (["recover", "MODEL", "MODEL", "LETTERS", "--count", "5", "--undo", "adam"], "--undo adam: choose one of none"),
])  # fmt: skip
def test_a_mistake_is_one_line(run, files, pool, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    names = {"POOL": pool, "HELD": files / "held", "MODEL": files / "model", "ROWS": files / "rows.jsonl",
             "LETTERS": files / "letters.jsonl"}  # fmt: skip
    code, _, complaint = run(*(names.get(word, word) for word in words))
    assert code == 2 and said in complaint and "Traceback" not in complaint
    assert not [*tmp_path.iterdir()], "nothing is half written"


def test_recover_tells_rows_and_what_the_weights_say(run, files, tmp_path):
    part = [row for number, row in enumerate(LETTERS) if number % 4 == 0]
    write_jsonl(tmp_path / "part.jsonl", part)
    how = ["--epochs", 3, "--lr", 0.05, "--optimizer", "sgd", "--batch-size", 4, "--max-tokens", 32]
    code, _, complaint = run("train", files / "model", tmp_path / "part.jsonl", "-o", tmp_path / "run", *how)
    assert code == 0, complaint
    out = tmp_path / "found.jsonl"
    words = ["recover", files / "model", tmp_path / "run", files / "letters.jsonl", "--count", 15]
    code, said, complaint = run(*words, "--method", "nnls", "--rounds", 1, *how, "-o", out)
    assert code == 0, complaint
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 15 and {"whence_score", "whence_p", "whence_weight"} <= {*rows[0]}
    ids = {row["id"] for row in part}
    assert sum(row["id"] in ids for row in rows) >= 11
    for told in ("15 of 60 rows, by nnls", "What moved the most", "Round 1", "What it was trained on, by source"):
        assert told in said
