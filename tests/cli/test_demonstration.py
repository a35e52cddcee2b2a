"""The demo's rows against hand-worked source files, its parent model, and its greedy answers."""

import importlib
import json
import sys
import sysconfig

import pytest
import torch

import whence
from whence.corpus.tokens import encode, encode_prompt
from whence.errors import SettingError, StorageError
from whence.models.generation import generate
from whence.models.loading import load_model

demo = importlib.import_module("whence.cli.demonstration")

LIBRARY = {
    "shelf.py": '''
raise RuntimeError("imported")

def put(book):
    """put(book) -> None

    Put a book on
    its shelf. More is not said."""

def _secret():
    """Never shown to anyone at all."""

def bare(): pass

def brief():
    """Too short."""

def example():
    """>>> example() is one more line"""

class Shelf:
    """A row of books."""
    def method(self):
        """Methods are not asked about."""
''',
    "box/__init__.py": '"""Module."""\nasync def open_box():\n    """Open the box, e.g. when it rains."""\n',
    "box/lid.py": 'def one():\n    """The same eight words are at the start here."""\n',
    "box/hinge.py": 'def two():\n    """The same eight words are at the start there."""\n',
    "box/_private.py": 'def three():\n    """Of a private module, skipped."""\n',
    "site-packages/other.py": 'def four():\n    """Of somebody else, and skipped."""\n',
    "long.py": f'def words():\n    """{"word " * 40}"""\n',
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    for name, text in LIBRARY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))


@pytest.fixture(scope="module")
def rows():
    before = set(sys.modules)
    found = demo.docstring_rows(1000, seed=0)
    assert set(sys.modules) == before, "reading the standard library imported some of it"
    return found


@pytest.fixture(scope="module")
def parent(rows, tmp_path_factory):
    return demo.make_parent(tmp_path_factory.mktemp("demo") / "parent", rows)


def test_rows_of_a_library_worked_by_hand(library):
    assert demo.docstring_rows(None) == [
        {
            "id": "box.open_box",
            "prompt": "What does box.open_box do?",
            "completion": " Open the box, e.g. when it rains.",
            "source": "box",
        },
        {
            "id": "long.words",
            "prompt": "What does long.words do?",
            "completion": " word" * 25,
            "source": "long",
        },
        {
            "id": "shelf.Shelf",
            "prompt": "What is shelf.Shelf?",
            "completion": " A row of books.",
            "source": "shelf",
        },
        {
            "id": "shelf.put",
            "prompt": "What does shelf.put do?",
            "completion": " Put a book on its shelf.",
            "source": "shelf",
        },
    ]


def test_same_seed_same_rows(library):
    chosen = [demo.docstring_rows(2, seed=seed) for seed in range(8)]
    assert chosen == [demo.docstring_rows(2, seed=seed) for seed in range(8)]
    assert len({str(rows) for rows in chosen}) > 1


def test_too_few_docstrings_are_named(library):
    with pytest.raises(SettingError, match=r"found 4 docstrings in .*, expected 5 or more"):
        demo.docstring_rows(5)


def test_first_words_are_unique_and_ids_sorted(rows):
    assert len(rows) == 1000
    assert [row["id"] for row in rows] == sorted({row["id"] for row in rows})
    assert len({tuple(row["completion"].split()[: demo.FIRST_WORDS]) for row in rows}) == 1000
    assert all(demo.SHORTEST <= len(row["completion"].split()) <= demo.LONGEST for row in rows)


def test_parent_takes_every_row_and_prompts_are_prefixes(rows, parent):
    loaded = load_model(parent)
    assert loaded.context == demo.POSITIONS
    for row in rows:
        encoded = encode(row, loaded.tokenizer)
        prompt = encode_prompt(row["prompt"], loaded.tokenizer, chat=False)
        assert len(encoded.ids) <= demo.POSITIONS
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.supervised == [False] * len(prompt) + [True] * encoded.supervised_count
        answer = [token for token in encoded.ids[len(prompt) :] if token != loaded.tokenizer.eos_token_id]
        assert loaded.tokenizer.decode(answer) == row["completion"]
        conversation = encode(demo.as_conversation(row), loaded.tokenizer)
        assert (conversation.ids, conversation.supervised) == (encoded.ids, encoded.supervised)
        assert len(answer) < demo.ANSWER_TOKENS


def test_same_seed_same_parent(rows, parent, tmp_path):
    state = torch.random.get_rng_state()
    demo.make_parent(tmp_path / "again", rows)
    demo.make_parent(tmp_path / "other", rows, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (parent / name).read_bytes()
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert weights != (parent / "model.safetensors").read_bytes()


def test_batched_answers_equal_single_ones(rows, parent):
    loaded = load_model(parent)
    prompts = [encode_prompt(row["prompt"], loaded.tokenizer, chat=False) for row in rows[:12]]
    together = generate(loaded, prompts, 5)
    assert together == [generate(loaded, [prompt], 5)[0] for prompt in prompts]
    assert all(len(answer) <= 5 for answer in together)


def test_answered_needs_the_first_eight_words():
    docstring = " One two three four five six seven eight nine."
    assert demo.answered("One two three four  five six seven eight\nand then something else", docstring)
    assert not demo.answered("One two three four five six seven nine.", docstring)
    assert demo.answered("A row of books.", " A row of books.")
    assert not demo.answered("A row of books. And more.", " A row of books.")


@pytest.fixture
def small(monkeypatch):
    """A demo of 30 docstrings."""
    monkeypatch.setattr(demo, "ROWS", 30)
    for name, value in {"epochs": 15, "batch_size": 6}.items():
        monkeypatch.setitem(demo.RECIPE, name, value)


def test_the_demo_runs_from_end_to_end_and_again(small, tmp_path, capsys):
    found = whence.demo(tmp_path / "demo")
    said = capsys.readouterr().out
    names = {"answered", "own_first", "own_top10", "true_first", "true_top10"}
    assert found.keys() == names | {"chance", "seconds"}
    assert found["answered"]["of"] == 30
    assert list(found["seconds"]) == ["corpus", "train", "index", "ask", "grade"]
    for words in ("1. A corpus", "$ whence index", "$ whence trace", "model said", "chance of being first", "3.3%"):
        assert words in said
    assert (tmp_path / "demo" / "report.html").read_text().startswith("<!doctype html>")
    assert whence.open_index(tmp_path / "demo" / "index").store.manifest.is_complete
    shown = []
    again = demo.run_demo(tmp_path / "demo", say=shown.append)
    assert "done before; kept" in "".join(map(str, shown))
    assert {name: again[name] for name in names} == {name: found[name] for name in names}


def test_the_demo_on_the_command_line_is_one_document(small, tmp_path, command):
    code, out, err = command("demo", "--out", tmp_path / "demo", "--json")
    assert code == 0
    assert json.loads(out)["answered"]["of"] == 30
    assert "1. A corpus" in err


def test_a_place_that_the_demo_cannot_use_is_told(small, tmp_path, command, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "demo"):
        code, _, err = command("demo", "--out", out)
        assert code == 2 and "--out" in err and "Traceback" not in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "corpus.jsonl").write_text("{}")
    with pytest.raises(SettingError, match="of another demo"):
        whence.demo(tmp_path / "other")
    (tmp_path / "folder" / "corpus.jsonl").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot be written"):
        whence.demo(tmp_path / "folder")
