"""A seeded sample of `benchmarks/reliability/fuzz.py`: every call answers, or refuses in one plain line."""

import random
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("benchmarks.reliability.fuzz")

from benchmarks.reliability import fuzz, inputs
from benchmarks.reliability.calls import whence

# A corpus as `source` of select is left to the script: beartype looks at all of a View, and so reads a bad one itself.


@pytest.fixture
def tiny(tiny_llama, tiny_index, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict.fromkeys(("pool", "held_out", "final"), tmp_path / "none")
    return SimpleNamespace(base=tiny_llama, index=tiny_index, corpus=tiny_corpus, task=tiny_corpus, **names)


def test_mutated_files_are_read_or_refused_in_one_line(tiny, tmp_path):
    readers = ("tasks", "queries", "mix law", "index")
    for number in range(28):
        folder = tmp_path / str(number)
        folder.mkdir()
        what, ending = fuzz.files(tiny, folder, random.Random(f"ci {number}"), readers)
        assert not ending.is_fault, (number, what, ending)


def test_strange_values_of_flags_are_refused_in_one_line(tiny, tmp_path):
    parameters = inputs.command_parameters()
    verbs = ("select", "info", "verify")
    tiny.parameters = {verb: [item for item in parameters[verb] if item.name != "source"] for verb in verbs}
    tiny.words = lambda verb, values: inputs.Inputs.words(tiny, verb, values)
    for number in range(48):
        folder = tmp_path / str(number)
        folder.mkdir()
        what, ending = fuzz.flags(tiny, folder, random.Random(f"ci {number}"), number)
        assert not ending.is_fault, (number, what, ending)


def test_edited_manifests_are_refused_in_one_line(tiny, tmp_path):
    for number in range(12):
        copy = shutil.copytree(tiny.index, tmp_path / str(number))
        what = inputs.edit_json(copy, random.Random(f"ci {number}"))
        for words in (("info", copy), ("verify", copy)):
            ending = whence(*words)
            assert not ending.is_fault, (number, what, ending)


def test_an_error_that_nobody_foresaw_is_one_line_and_counts(tiny, monkeypatch):
    def fail(*arguments):
        raise KeyError("a\nb")

    monkeypatch.setattr("whence.indexing.store.Store.open", fail)
    ending = whence("info", tiny.index)
    assert ending.outcome == "traceback" and ending.text.startswith("error unexpected KeyError (")
    assert "--traceback" in ending.text and not ending.lines
    assert "test_fuzz.py" in whence("--traceback", "info", tiny.index).text
