"""The command line: one clear line for what cannot be done, one JSON document with `--json`, and its exit codes."""

import csv
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import whence as whence_package
from conftest import ENDING, byte_tokenizer, contents, corpus_rows, save_tiny_llama, write_jsonl
from missing_packages import without_s3fs
from whence import __version__, catalogue
from whence.cli.app import main
from whence.indexing.codecs import CODECS
from whence.indexing.manifest import FORMAT_VERSION
from whence.indexing.store import Store

COLUMNS = ["query", "rank", "id", "score", "exact", "source", "prompt", "completion"]


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    def json(self):
        """Its one document; fails if stdout holds anything else."""
        return json.loads(self.out)


@pytest.fixture
def whence(monkeypatch, capsys):
    """Run the command line in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["whence", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        if not caught.value.code and not {"--json", "--help", "--version"} & {*arguments}:
            assert ENDING.fullmatch(captured.out.splitlines()[-1]), captured.out
        return Ran(caught.value.code, captured.out, captured.err)

    return run


def in_a_process(*arguments, **options):
    command = [sys.executable, "-m", "whence", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    return Ran(done.returncode, done.stdout, done.stderr)


def complaint(ran):
    """The one line that a user's mistake is told in."""
    assert (ran.code, ran.out) == (2, ""), ran
    (line,) = ran.err.splitlines()
    assert line.startswith("error ")
    return line.removeprefix("error ")


# -- the surface


def test_help_does_not_import_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "whence", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for verb in ("demo", "train", "plan", "index", "trace", "info", "verify", "append", "bench"):
        assert f" {verb} " in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "whence.cli.app" in imported
    assert imported.isdisjoint({"torch", "numpy", "pyarrow", "transformers", "fsspec", "datasets"})


def test_a_verb_is_a_function_and_no_module_bears_its_name():
    verbs = (
        "demo",
        "train",
        "plan",
        "index",
        "trace",
        "select",
        "recover",
        "ablate",
        "info",
        "verify",
        "append",
        "bench",
    )
    names = f"for name in {verbs}: assert callable(getattr(whence, name)), name"
    root = Path(whence_package.__file__).parent
    modules = {path.relative_to(root).with_suffix("") for path in root.rglob("*.py")}
    assert {path.name for path in modules}.isdisjoint(whence_package._HOMES)
    imports = "".join(
        f"import {'.'.join(('whence', *path.parts))}\n" for path in sorted(modules) if path.name[:2] != "__"
    )
    done = subprocess.run([sys.executable, "-c", f"{imports}import whence\n{names}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert whence_package.demo.__module__ == "whence.cli.demonstration"
    assert set(whence_package._HOMES) <= set(dir(whence_package))
    assert all(not isinstance(getattr(whence_package, name), ModuleType) for name in whence_package._HOMES)


def test_version_is_printed(whence):
    assert whence("--version") == Ran(0, f"whence {__version__}\n", "")


def test_no_verb_prints_the_help(whence):
    ran = whence()
    assert "Usage: " in ran.out + ran.err
    assert "error" not in ran.err


def test_help_of_index_lists_every_projection_and_codec(whence):
    text = " ".join(whence("index", "--help").out.split())
    assert all(name in text for name in (*catalogue.PROJECTIONS, *CODECS))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trace"], "Missing argument 'INDEX'. See: whence trace --help"),
        (["index", "m", "c"], "Missing option '-o' / '--out'. See: whence index --help"),
        (["trace", "i", "--promt", "x"], "No such option: --promt"),
        (["trce", "i"], "No such command 'trce'. Did you mean 'trace'? See: whence --help"),
        (["index", "m", "c", "-o", "i", "--seed", "x"], "Invalid value for '--seed'"),
        (["trace", "i", "--span"], "Option '--span' requires an argument. See: whence trace --help"),
        (["pool", "train", "--by"], "Option '--by' requires an argument. See: whence pool train --help"),
        (["mix", "law", "t", "--json=1"], "Option '--json' does not take a value. See: whence mix law --help"),
    ],
)
def test_what_cannot_be_parsed_is_told_in_one_line(whence, arguments, told):
    assert told in complaint(whence(*arguments))


@pytest.mark.parametrize("verb", ["info", "verify", "trace", "append"])
def test_no_index_there_is_told_with_the_command_that_makes_one(whence, tmp_path, tiny_corpus, verb):
    extra = {"trace": ["--prompt", "a"], "append": [tiny_corpus]}.get(verb, [])
    told = complaint(whence(verb, tmp_path / "none", *extra))
    assert told == f"There is no index at {tmp_path}/none; make one with: whence index MODEL CORPUS -o {tmp_path}/none"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--projection", "two_side"], "--projection two_side: no such method. Did you mean two_sided? There are two_"),
        (["--codec", "bfloat"], "--codec bfloat: no such codec. Did you mean bfloat16? There are float32, "),
        (["--engine", "slurm"], "--engine slurm: one of local, ray is expected"),
        (["--reduction", "median"], "--reduction median: choose mean or sum"),
        (["--batch-tokens", "1"], "--batch-tokens 1: at least 2"),
        (["--workers", "2"], "--workers 2: --engine local is this process; add --engine ray"),
        (["--layers", "nothing*"], "--layers nothing*: no linear layer has such a name"),
        (["--tokenizer", "/no/such/place"], "/no/such/place"),
    ],
)
def test_a_flag_that_cannot_work_is_told_and_nothing_is_written(whence, tiny_llama, tiny_corpus, tmp_path, flags, told):
    assert told in complaint(whence("index", tiny_llama, tiny_corpus, "-o", tmp_path / "index", *flags))
    assert not (tmp_path / "index").exists()


def test_an_address_that_needs_a_package_is_told_before_the_model_is_loaded(whence, tiny_corpus, tmp_path, monkeypatch):
    without_s3fs(monkeypatch)
    told = complaint(whence("index", tmp_path / "no model", tiny_corpus, "-o", "s3://bucket/index"))
    assert told == "s3://bucket/index: addresses s3:// need a package that is not installed: pip install s3fs"


# -- bad corpora and models


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("bad.jsonl", '{"text": "a"}\n{"text": "b"\n', "bad.jsonl:2: not a line of JSON"),
        ("list.jsonl", '{"text": "a"}\n\n["b"]\n', "list.jsonl:3: a list where an object is expected"),
        ("columns.jsonl", '{"article": "a", "summary": "b"}\n', "columns.jsonl:1: columns are article, summary; a row"),
        ("late.jsonl", '{"text": "a"}\n{"txt": "a"}\n', "late.jsonl:2: columns are txt; a row needs"),
        ("columns.csv", "article,summary\na,b\n", "columns.csv:2: columns are article, summary; a row needs"),
        ("empty.jsonl", "", "empty.jsonl: no rows"),
        ("empty.csv", "text\n", "empty.csv: no rows"),
        ("bad.parquet", "PAR1", "bad.parquet: not a readable Parquet file"),
        ("corpus.docx", "PK", "corpus.docx: not a kind of file that Whence reads"),
        ("type.jsonl", '{"id": "r", "text": {"a": 1}}\n', "row r has a dict as `text`, where text is expected"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_told_and_nothing_is_written(whence, tiny_llama, tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    assert told in complaint(whence("index", tiny_llama, tmp_path / name, "-o", tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_a_missing_corpus_is_told(whence, tiny_llama, tmp_path):
    told = complaint(whence("index", tiny_llama, tmp_path / "none.jsonl", "-o", tmp_path / "index"))
    assert "none.jsonl: no such file or directory" in told


@pytest.mark.parametrize("harm", ["cut", "garbled", "lacking", "tokenizer", "missing", "file"])
def test_a_model_that_cannot_be_loaded_is_told_and_nothing_is_written(whence, tiny_llama, tiny_corpus, tmp_path, harm):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = model / "model.safetensors"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif harm == "garbled":
        weights.write_bytes(b"\xff" * 1000)
    elif harm == "lacking":
        kept = load_file(weights)
        del kept["model.layers.1.mlp.up_proj.weight"]
        save_file(kept, weights, {"format": "pt"})
    elif harm == "tokenizer":
        words = byte_tokenizer()
        words.add_tokens(["<another>"])
        words.save_pretrained(model)
    elif harm == "missing":
        shutil.rmtree(model)
    else:
        shutil.rmtree(model)
        model.write_text("")
    told = complaint(whence("index", model, tiny_corpus, "-o", tmp_path / "index"))
    assert {
        "cut": "model.safetensors: not a readable safetensors file",
        "garbled": "model.safetensors: not a readable safetensors file",
        "lacking": "its files lack 1 weight that",
        "tokenizer": "has ids up to 259, but the embedding of",
        "missing": "not a model directory",
        "file": "not a model directory",
    }[harm] in told
    assert not (tmp_path / "index").exists()


def test_nan_weights_are_counted_by_index_and_told_by_trace(whence, tiny_llama, tiny_corpus, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    ran = whence("index", model, tiny_corpus, "-o", tmp_path / "index", "--json")
    assert ran.code == 0
    assert ran.json()["counts"]["non_finite"] == 20
    told = complaint(whence("trace", tmp_path / "index", "--prompt", "a", "--completion", "b"))
    assert "none of its 20 rows has a finite gradient, so none can be ranked" in told


def test_an_index_of_a_newer_format_is_told(whence, tiny_index, tmp_path):
    out = shutil.copytree(tiny_index, tmp_path / "index")
    content = json.loads((out / "manifest.json").read_text())
    newer = {**content, "format_version": FORMAT_VERSION + 1, "whence_version": "9.9"}
    (out / "manifest.json").write_text(json.dumps(newer))
    rows = write_jsonl(tmp_path / "x.jsonl", corpus_rows(1))
    for arguments in (["info", out], ["trace", out, "--prompt", "a"], ["verify", out], ["append", out, rows]):
        told = complaint(whence(*arguments))
        assert f"has format version {FORMAT_VERSION + 1}, written by Whence 9.9" in told
        assert "pip install 'whence>=9.9'" in told


def test_a_directory_that_is_no_index_is_left_alone(whence, tiny_llama, tiny_corpus, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for flags in ([], ["--restart"]):
        assert "notes.txt" in complaint(whence("index", tiny_llama, tiny_corpus, "-o", tmp_path, *flags)) or flags
        assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_other_settings_are_told(whence, tiny_llama, tiny_corpus, tiny_index):
    told = complaint(
        whence(
            "index",
            tiny_llama,
            tiny_corpus,
            "-o",
            tiny_index,
            "--projection",
            "two_sided",
            "--width",
            8,
            "--codec",
            "int8",
        )
    )
    assert '--codec is "bfloat16" there, "int8" here' in told


def test_every_verb_that_asks_an_index_takes_where_its_model_and_tokenizer_go(whence, tiny_llama, tiny_index, tmp_path):
    out, more = (
        shutil.copytree(tiny_index, tmp_path / "index"),
        write_jsonl(tmp_path / "more.jsonl", corpus_rows(3, 50)),
    )
    byte_tokenizer().save_pretrained(tmp_path / "words")
    flags = ["--model", tiny_llama, "--tokenizer", tmp_path / "words", "--device-map", "cpu", "--device", "cpu"]
    asked = ["--prompt", "5 and 3?", "--completion", " yes"]
    assert whence("trace", out, *asked, *flags).code == 0
    assert whence("append", out, more, *flags, "--json").json()["rows"] == 23
    (out / "checkpoint-000" / "shard-00001.safetensors").unlink()
    assert whence("verify", out, "--repair", *flags).code == 0
    chosen = ["--tasks", more, "--method", "less", "--count", 2]
    assert whence("select", out, *chosen, *flags).code == 0
    for verb in (["trace", out, *asked], ["select", out, *chosen]):
        told = complaint(whence(*verb, "--tokenizer", tmp_path / "nowhere"))
        assert f"{tmp_path}/nowhere: no loadable tokenizer" in told


def test_bench_takes_the_flags_of_an_index(whence, tiny_llama, tiny_corpus, monkeypatch):
    monkeypatch.setattr("whence.indexing.speed._peak", lambda *given: 1)  # tests/indexing/test_speed.py measures it
    flags = ["--batch-tokens", 64, "--length", 16, "--batches", 1, "--normalise", "layer", "--gradient-checkpointing"]
    found = whence("bench", tiny_llama, tiny_corpus, *flags, "--projection", "shuffle_sum", "--width", 8,
                   "--shuffle-rounds", 3, "--json").json()  # fmt: skip
    assert (found["examples_per_batch"], found["width"]) == (4, 8)


# -- a full disk


def limited_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))


def test_a_full_disk_is_told_and_the_same_command_goes_on(whence, tiny_llama, tmp_path):
    """No file may grow beyond 4,000 bytes: the manifest and the rows fit, the vectors of 20 rows do not."""
    corpus, out = write_jsonl(tmp_path / "corpus.jsonl", corpus_rows(20)), tmp_path / "index"
    arguments = ("index", tiny_llama, corpus, "-o", out, "--projection", "sjlt", "--width", 256)
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = in_a_process(*arguments, preexec_fn=limited_files, env=quiet)
    *progress, told = ran.err.splitlines()
    assert (ran.code, ran.out) == (2, "")
    assert all(line.startswith("Indexing: ") for line in progress)
    assert f"error Cannot write {out}/checkpoint-000/shard-00000.safetensors: File too large" in told
    assert "run the same command again: it resumes" in told
    assert sorted(contents(out)) == ["corpus/part-00000.parquet", "manifest.json"]
    ran = whence(*arguments)
    assert ran.code == 0
    assert "20, of which 20 can be ranked" in ran.out
    assert ran.out.endswith(f"Next: whence trace {out} --prompt '0 and 0?'\n")
    assert Store.open(out).manifest.is_complete


# -- results


def test_index_and_info_print_one_document(whence, tiny_llama, tiny_corpus, tmp_path):
    built = whence(
        "index", tiny_llama, tiny_corpus, "-o", tmp_path / "index", "--projection", "two_sided", "--width", 4, "--json"
    )
    assert built.code == 0
    assert built.json() == whence("info", tmp_path / "index", "--json").json()
    assert (built.json()["rows"], built.json()["complete"], built.json()["width"]) == (20, True, 14 * 4 * 4)
    plain = whence("info", tmp_path / "index")
    assert "complete" in plain.out
    assert "20, of which 20 can be ranked" in plain.out


def test_trace_prints_one_document_of_named_columns(whence, tiny_index):
    ran = whence("trace", tiny_index, "--prompt", "5 and 3?", "--completion", " yes", "--top", 2, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = ran.json()
    assert [list(row) for row in found["rows"]] == [COLUMNS] * 4
    assert [row["rank"] for row in found["rows"]] == [1, 2, -1, -2]
    assert found["method"] == "cosine"
    (answer,) = found["answers"]
    assert (answer["prompt"], answer["completion"], answer["is_generated"]) == ("5 and 3?", " yes", False)
    assert len(answer["tokens"]) == len(answer["probabilities"]) == 5
    assert answer["perplexity"] > 1


def test_trace_prints_a_table(whence, tiny_index):
    ran = whence("trace", tiny_index, "--prompt", "5 and 3?", "--top", 1, "--max-new-tokens", 3)
    assert (ran.code, ran.err) == (0, "")
    for words in ("prompt      5 and 3?", "model said", "how sure", "cosine over 20 examples", "row-"):
        assert words in ran.out


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_trace_writes_rows_by_the_files_ending(whence, tiny_index, tmp_path, ending):
    file = tmp_path / f"rows.{ending}"
    asked = ("trace", tiny_index, "--prompt", "5 and 3?", "--completion", " yes", "--top", 2)
    expected = whence(*asked, "--json").json()["rows"]
    assert whence(*asked, "-o", file).code == 0
    if ending == "jsonl":
        assert [json.loads(line) for line in file.read_text().splitlines()] == expected
    elif ending == "parquet":
        assert pq.read_table(file).to_pylist() == expected
    else:
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [list(row) for row in rows] == [COLUMNS] * 4
        assert [row["completion"] for row in rows] == [row["completion"] for row in expected]
        assert [float(row["score"]) for row in rows] == [row["score"] for row in expected]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("rows.txt", "rows.txt: what is found is written to .jsonl, .csv, .parquet, .html or .json"),
        ("rows", "rows: what is found is written to .jsonl, .csv, .parquet, .html or .json"),
        ("none/rows.csv", "none/rows.csv: there is no directory"),
    ],
)
def test_a_file_that_rows_cannot_go_to_is_refused_before_any_work(whence, tmp_path, name, told):
    # There is no index either: that would be told, if work had begun.
    assert told in complaint(whence("trace", tmp_path / "none", "--prompt", "a", "-o", tmp_path / name))


@pytest.fixture(scope="module")
def wide_index(tiny_llama, tmp_path_factory):
    """With rows enough for a null."""
    from whence.indexing.build import index

    out = tmp_path_factory.mktemp("wide") / "index"
    index(tiny_llama, corpus_rows(34), out, projection="two_sided", width=4, progress=False)
    return out


LOOK = ("--prompt", "5 and 3?", "--completion", " yes", "--top", 2)
CLOSER = (*LOOK, "--exact", "--tokens", "--contrast", " no")
MORE = [*COLUMNS[:5], "z", "percentile", "generic", *COLUMNS[5:], "by_token", "tokens"]


def test_a_closer_look_has_columns_of_its_own(whence, wide_index):
    found = whence("trace", wide_index, *CLOSER).out
    assert all(word in found for word in ("exact", " z ", "and not      no", "are among the exact best"))
    found = whence("trace", wide_index, *CLOSER, "--json").json()
    assert [list(row) for row in found["rows"]] == [MORE] * 4
    (verdict,), (overlap,) = found["verdicts"], found["overlaps"]
    assert verdict.startswith(("Nothing here", "The best example"))
    assert (0 <= overlap <= 1, isinstance(found["needed_z"], float), found["notes"]) == (True, True, [])
    for row in found["rows"]:
        assert list(row["tokens"]) == ["basis", "query", "train", "matrix"]
        assert row["tokens"]["query"] == [*" yes", "</s>", *" no", "</s>"]
        assert len(row["by_token"]) == len(row["tokens"]["matrix"]) == 9
        assert {len(shares) for shares in row["tokens"]["matrix"]} == {len(row["tokens"]["train"])}
        assert isinstance(row["generic"], bool)
        assert 0 <= row["percentile"] <= 100


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_closer_look_is_written_by_the_files_ending(whence, wide_index, tmp_path, ending):
    file = tmp_path / f"rows.{ending}"
    ran = whence("trace", wide_index, *CLOSER, "--json", "-o", file)
    expected = ran.json()["rows"]
    if ending == "jsonl":
        assert [json.loads(line) for line in file.read_text().splitlines()] == expected
        return
    if ending == "parquet":
        rows = pq.read_table(file).to_pylist()
        assert [row["z"] for row in rows] == [row["z"] for row in expected]
    else:
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [row["generic"] for row in rows] == [str(row["generic"]) for row in expected]
    assert [list(row) for row in rows] == [MORE] * 4
    for name in ("by_token", "tokens"):
        assert [json.loads(row[name]) for row in rows] == [row[name] for row in expected]


@pytest.mark.parametrize("method", ["cosine", "bm25"])
def test_a_report_is_one_page(whence, wide_index, tmp_path, method):
    file = tmp_path / "report.html"
    ran = whence("trace", wide_index, *LOOK, "--method", method, "-o", file)
    assert ran.code == 0
    assert "".join(f"written to {file}".split()) in "".join(ran.out.split())
    page = file.read_text()
    assert page.lower().startswith("<!doctype html>")
    found = whence("trace", wide_index, *LOOK, "--method", method, "--json").json()
    for told in (*found["verdicts"], *(row["id"] for row in found["rows"])):
        assert told in page
    assert list(tmp_path.iterdir()) == [file]


def test_a_query_of_a_span_is_given_by_text_or_by_tokens(whence, wide_index):
    by_text = whence("trace", wide_index, *LOOK, "--span", "ye", "--json").json()
    by_tokens = whence("trace", wide_index, *LOOK, "--span-tokens", "1:3", "--json").json()
    assert by_text == by_tokens
    assert by_text["answers"][0]["asked"] == [False, True, True, False, False]


@pytest.mark.parametrize("given", ["1", "1:", ":2", "a:b", "-1:2", "1:2:3", "1-3", ""])
def test_a_range_of_tokens_that_is_none_is_told(whence, tmp_path, given):
    # Nor is there an index: that would be told, if work had begun.
    told = complaint(whence("trace", tmp_path, *LOOK, f"--span-tokens={given}"))
    assert told == f"--span-tokens {given}: FROM:TO is expected, such as 3:7, and no --span beside it"


def test_a_span_is_given_one_way(whence, tmp_path):
    told = complaint(whence("trace", tmp_path, *LOOK, "--span-tokens", "1:2", "--span", "e"))
    assert "and no --span beside it" in told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "tracn"], "--method tracn: no such method. Did you mean tracin?"),
        (["--method", "bm25", "--exact"], "--exact belongs to the methods that compare gradients as they are"),
        (["--span", "maybe"], "--span 'maybe' does not occur in the completion ' yes</s>'"),
        (["--span-tokens", "4:9"], "--span-tokens 4:9: the completion has the tokens 0:5"),
        (["--completion", ""], "nothing to trace for prompt '5 and 3?': the completion has no token"),
        (["--completion", "c" * 96], "the model's context is 96"),
        (["--temperature", "-1"], "--temperature -1.0: 0 (greedy) or a number above it"),
        (["--objective", "los"], "--objective los: choose one of loss, margin"),
        (["--controls", "/no/such/file.jsonl"], "/no/such/file.jsonl: no such file"),
        (["--model", "/no/such/model"], "/no/such/model: the model of this index"),
    ],
)
def test_a_question_that_cannot_be_answered_is_told_in_one_line(whence, wide_index, flags, told):
    assert told in complaint(whence("trace", wide_index, *LOOK, *flags))


def test_text_rows_are_shown_as_text(whence, tiny_llama, tmp_path):
    rows = [{"id": f"{number}\ud800", "text": f"[bold]{number}\ud800"} for number in range(4)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    assert (
        whence("index", tiny_llama, corpus, "-o", tmp_path / "index", "--projection", "two_sided", "--width", 4).code
        == 0
    )
    asked = ("trace", tmp_path / "index", "--prompt", "1", "--completion", "2", "--top", 1)
    ran = whence(*asked, "--json")
    assert list(ran.json()["rows"][0]) == [*COLUMNS[:6], "text"]
    plain = whence(*asked)
    assert plain.code == 0
    assert "[bold]" in plain.out
    for ending in ("jsonl", "csv", "parquet"):
        assert whence(*asked, "-o", tmp_path / f"rows.{ending}").code == 0


def test_append_prints_what_the_index_holds_then(whence, tiny_index, tmp_path):
    out = shutil.copytree(tiny_index, tmp_path / "index")
    more = write_jsonl(tmp_path / "more.jsonl", corpus_rows(3, first=20))
    assert whence("append", out, more, "--json").json()["rows"] == 23
    clash = write_jsonl(tmp_path / "clash.jsonl", corpus_rows(3, first=22))
    assert "the index has a row with the id 'row-22' already" in complaint(whence("append", out, clash))


def test_verify_exits_1_while_something_is_wrong(whence, tiny_index, tmp_path):
    out = shutil.copytree(tiny_index, tmp_path / "index")
    asked = f"whence trace {out} --prompt '0 and 0?'"
    assert whence("verify", out) == Ran(0, f"Every file of the index is as it was written. Next: {asked}\n", "")
    shard = out / "checkpoint-000" / "shard-00000.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    told = whence("verify", out)
    assert told.code == 1
    assert told.out.splitlines() == [
        "checkpoint-000/shard-00000.safetensors: wrong checksum",
        f"1 file of the index is wrong. Next: whence verify {out} --repair",
    ]
    ran = whence("verify", out, "--json")
    assert (ran.code, ran.json()["repairs"]) == (1, [])
    assert ran.json()["rows"] == [{"file": "checkpoint-000/shard-00000.safetensors", "what": "wrong checksum"}]
    mended = whence("verify", out, "--repair")
    assert mended.code == 0
    assert "recomputed, the same bytes as before" in mended.out
    assert shard.read_bytes() == before
    (out / "manifest.json").write_text("{}")
    broken = whence("verify", out, "--repair")
    assert (broken.code, "manifest.json" in broken.out) == (1, True)
    assert broken.out.splitlines()[-1].endswith(f"Next: whence index MODEL CORPUS -o {out} --restart")


def test_verify_exits_1_where_repair_cannot_mend(whence, tiny_llama, tmp_path):
    corpus, out = write_jsonl(tmp_path / "corpus.jsonl", corpus_rows(5)), tmp_path / "index"
    whence("index", tiny_llama, corpus, "-o", out, "--projection", "two_sided", "--width", 4)
    corpus.unlink()
    (out / "corpus" / "part-00000.parquet").write_bytes(b"")
    ran = whence("verify", out, "--repair", "--json")
    assert ran.code == 1
    assert ran.json()["left"] == ["corpus/part-00000.parquet"]
    assert "cannot be read again from the corpus" in ran.json()["repairs"][0]


def test_bench_prints_the_promised_keys(whence, tiny_llama, tiny_corpus, monkeypatch):
    module = importlib.import_module("whence.indexing.speed")
    monkeypatch.setattr(module, "_peak", lambda kind, *rest: {"index": 2, "step": 3}[kind])
    sizes = ("--length", 16, "--batch-size", 2, "--batches", 2)
    found = whence("bench", tiny_llama, tiny_corpus, *sizes, "--json").json()
    assert {
        "step_seconds",
        "index_seconds",
        "ratio",
        "examples_per_second",
        "tokens_per_second",
        "peak_bytes",
        "bytes_per_example",
    } <= set(found)
    assert "of a training step" in whence("bench", tiny_llama, tiny_corpus, *sizes).out


@pytest.mark.usefixtures("answered_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_is_told_with_how_to_go_on(whence, tiny_llama, tiny_corpus, tmp_path, monkeypatch, number):
    handlers = [signal.getsignal(each) for each in signal.Signals]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add_shard", lambda *args: os.kill(os.getpid(), number))
        ran = whence(
            "index", tiny_llama, tiny_corpus, "-o", tmp_path / "index", "--projection", "two_sided", "--width", 4
        )
    assert ran.code == 128 + number
    assert "the same command goes on from there" in ran.err
    assert [signal.getsignal(each) for each in signal.Signals] == handlers


def test_two_models_are_traced_apart(whence, tiny_index, tmp_path):
    other = save_tiny_llama(tmp_path / "other", seed=3)
    told = complaint(whence("trace", tiny_index, "--prompt", "a", "--model", other))
    assert "its weights and configuration have digest" in told
