"""The verb `curvature` as a user types it, and what its directory is good for."""

import json

import pytest

from conftest import corpus_rows, write_jsonl
from whence.indexing import memory


@pytest.fixture(scope="module")
def measured(tiny_index, tmp_path_factory):
    from whence.second_order.pipeline import curvature

    return curvature(tiny_index, tmp_path_factory.mktemp("verb") / "curvature", progress=False).place.root


def test_it_is_planned_measured_and_shown(command, tiny_index, tmp_path):
    out = tmp_path / "curvature"
    code, text, _ = command("curvature", tiny_index, "-o", out, "--dry-run")
    assert code == 0 and "EK-FAC of 20 rows" in text and "eigenbases" in text and "It fits" in text
    assert not out.exists(), "a plan writes nothing"
    code, planned, _ = command("curvature", tiny_index, "-o", out, "--dry-run", "--json")
    code, text, err = command("curvature", tiny_index, "-o", out)
    assert code == 0, err
    assert "EK-FAC of 20 rows and" in text and f"--prompt TEXT --curvature {out}" in " ".join(text.split())
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    disk = json.loads(planned)["disk"]
    assert abs(disk["eigenbases"] + disk["eigenvalues"] - size) < 0.1 * size
    code, shown, _ = command("info", out, "--json")
    facts = json.loads(shown)
    assert (facts["kind"], facts["measured_rows"], facts["bytes"]) == ("ekfac", 20, size)
    assert all(row["mean"] > 0 and 0 < row["directions"] <= 1 for row in facts["rows"])
    code, text, _ = command("verify", out)
    assert code == 0 and "This is curvature, of which" in text


def test_trace_select_and_evaluate_take_it(command, tiny_index, measured, tmp_path):
    row = corpus_rows(20)[7]
    asked = {"prompt": row["prompt"], "completion": row["completion"]}
    with_it = "--method", "ekfac", "--curvature", measured
    code, out, err = command(
        "trace", tiny_index, "--prompt", asked["prompt"], "--completion", asked["completion"], *with_it, "--json"
    )
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert next(hit["id"] for hit in rows if hit["rank"] == 1) == row["id"]
    tasks = write_jsonl(tmp_path / "tasks.jsonl", [asked])
    chosen = tmp_path / "chosen.jsonl"
    words = "select", tiny_index, "--tasks", tasks, "--method", "ekfac", "--count", "3", "-o", chosen
    code, _, err = command(*words, "--set", f"curvature={measured}")
    assert code == 0, err
    assert json.loads(chosen.read_text().splitlines()[0])["id"] == row["id"]
    relevant = write_jsonl(tmp_path / "graded.jsonl", [asked | {"id": "q", "source": row.get("source", "a")}])
    code, out, err = command(
        "evaluate", "retrieval", relevant, tiny_index, "--relevant", "source", "--methods",
        f"ekfac:curvature={measured},random", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert {line["method"] for line in json.loads(out)["rows"]} >= {f"ekfac:curvature={measured}", "random"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kind", "fisher"), r"--kind fisher: there is no such kind. Known: ekfac, kfac"),
        (("--rows", "0"), r"--rows 0: at least 1 is expected"),
        (("--layers", "nothing"), r"--layers nothing: no linear layer has such a name"),
    ],
)
def test_mistakes_are_named(command, tiny_index, tmp_path, words, message):
    code, out, err = command("curvature", tiny_index, "-o", tmp_path / "out", *words)
    assert (code, out) == (2, "") and message in err
    assert not (tmp_path / "out").exists()


def test_a_directory_without_curvature_and_a_method_without_use_of_it(command, tiny_index, measured, tmp_path):
    words = "trace", tiny_index, "--prompt", "What?"
    code, _, err = command(*words, "--method", "ekfac", "--curvature", tmp_path)
    assert code == 2 and "no curvature here (no curvature.json). Measure it: whence curvature INDEX -o" in err
    code, _, err = command(*words, "--method", "cosine", "--curvature", measured)
    assert code == 2 and "--curvature belongs to --method ekfac, not to --method cosine" in err
    code, _, err = command(*words, "--set", "damping=1")
    assert code == 2 and "--set damping: --method cosine has no such option. It has none." in err


def test_curvature_is_asked_where_it_is_given(command, tiny_index, measured, tmp_path):
    """With the method's options."""
    words = "trace", tiny_index, "--prompt", "What?", "--completion", "yes", "--curvature", measured, "--json"
    found = [json.loads(command(*words, *more)[1])
             for more in ([], ["--method", "ekfac"], ["--set", "damping=100"])]  # fmt: skip
    page = tmp_path / "page.html"
    assert command(*words[:-1], "-o", page)[0] == 0
    assert '"isInfluence":true' in page.read_text(), "training on a row, not likeness"
    assert found[0]["method"] == "ekfac" and found[0]["rows"] == found[1]["rows"] != found[2]["rows"]


def test_too_little_memory_names_the_layers_to_leave_out(command, tiny_index, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1)
    monkeypatch.setattr("whence.second_order.dry_run.free_memory", lambda: 1)
    code, text, _ = command("curvature", tiny_index, "-o", tmp_path / "out", "--dry-run")
    assert code == 0 and "It does not fit: memory is the limit" in text and "--layers '!*" in text
