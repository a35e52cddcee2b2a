"""The notebooks under docs/notebooks run from top to bottom on a small demo, and are committed with what they show."""

import importlib
import re
import sys
import types

import huggingface_hub
import jaxtyping
import make_notebooks as notebooks
import nbformat
import pytest

SOURCES = ("json", "email", "mailbox", "tkinter")
ROWS = [
    {"id": f"{source}.{name}", "prompt": f"What does {source}.{name} do?", "source": source,
     "completion": f" It {name}s {n} times, for {source}."}
    for source in SOURCES for n, name in enumerate(("dump", "dumps", *(f"f{n}" for n in range(13))))
]  # fmt: skip


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A directory with a demo of few docstrings, a smaller model, and no training to speak of."""
    folder = tmp_path_factory.mktemp("gallery")
    demonstration = importlib.import_module("whence.cli.demonstration")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.setattr(demonstration, "docstring_rows", lambda *_, **__: ROWS)
        patch.setattr(demonstration, "ROWS", len(ROWS))
        patch.setattr(demonstration, "grade", lambda *_: {})
        patch.setattr(demonstration, "grade_table", lambda *_: "")
        for name, value in {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}.items():
            patch.setitem(demonstration.SHAPE, name, value)
        patch.setitem(demonstration.RECIPE, "epochs", 1)
        demonstration.demo(folder / "whence-demo", say=lambda *_: None)
    return folder


def forms(notebook):
    """The forms of what each cell shows, such as stdout, and HTML beside text."""
    return [
        [[output.output_type, *sorted(output.get("data", ()))] for output in cell.outputs]
        for cell in notebooks.code_cells(notebook)
    ]


@pytest.mark.parametrize("file", notebooks.NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_from_top_to_bottom(file, gallery, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr("accelerate.utils.memory.gc", types.SimpleNamespace(collect=lambda: 0))
    monkeypatch.chdir(gallery)
    committed, notebook = notebooks.read(file), notebooks.read(file)
    main, hook = sys.modules["__main__"], sys.displayhook
    notebooks.execute(notebook)
    assert (sys.modules["__main__"], sys.displayhook) == (main, hook), "the shell leaves the process as it was"
    assert forms(notebook) == forms(committed), "run docs/make_notebooks.py: cells do not show what they showed"


@pytest.mark.parametrize("file", notebooks.NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_as_it_is_written(file):
    notebook = notebooks.read(file)
    assert notebooks.faults(notebook) == []
    notebooks.tidy(notebook)
    assert nbformat.writes(notebook) + "\n" == file.read_text(), "run docs/make_notebooks.py"
    assert "## What now" in notebook.cells[-1].source
    for cell in notebook.cells:
        for link in re.findall(r"\]\(([^)\s#:]+)[)#]", cell.source if cell.cell_type == "markdown" else ""):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_every_notebook_is_listed():
    assert {*notebooks.NOTEBOOKS} == {*notebooks.FOLDER.glob("*.ipynb")}
    text = (notebooks.FOLDER / "index.md").read_text()
    assert all(f"({file.name})" in text for file in notebooks.NOTEBOOKS)
