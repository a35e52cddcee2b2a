"""A corpus' rows come into an index whole and as they were checked, wherever the index lies and whatever changes."""

import importlib
import json

import pytest

from conftest import contents, corpus_rows, cut_short, save_tiny_llama, write_jsonl
from whence.corpus.reading import Corpus, open_corpus
from whence.errors import CorpusError, ManifestMismatchError
from whence.indexing.build import append, index, verify
from whence.indexing.ingest import copy_rows
from whence.indexing.store import Store
from whence.storage import Place

QUIET = {"width": 4, "progress": False}


# -- an index in its corpus' own directory


def test_index_inside_its_corpus_directory_is_built_resumed_and_appended_to(
    tiny_llama, tmp_path, small_parts, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", corpus_rows(30))
    index(tiny_llama, ".", tmp_path.parent / f"{tmp_path.name}-whole", **QUIET)
    for name, calls in (("write_part", 1), ("add_shard", 1)):
        with monkeypatch.context() as patch:
            cut_short(patch, name, calls)
            with pytest.raises(KeyboardInterrupt):
                index(tiny_llama, ".", "index", **QUIET)
    built = index(tiny_llama, ".", "index", **QUIET)
    assert built.store.rows == 30
    assert contents(tmp_path / "index") == contents(tmp_path.parent / f"{tmp_path.name}-whole")
    write_jsonl(tmp_path / "a.jsonl", corpus_rows(5, first=30))
    assert append("index", ".", progress=False).store.rows == 35


def test_an_index_is_no_corpus_but_another_manifest_is(tiny_index, tmp_path):
    with pytest.raises(CorpusError, match="an index of Whence, not a corpus"):
        list(open_corpus(tiny_index))
    (tmp_path / "manifest.json").write_text(json.dumps({"text": "a", "format_version": 1}))
    assert [example.row["text"] for example in open_corpus(tmp_path)] == ["a"]


# -- a corpus that changes


@pytest.fixture
def changing(monkeypatch):
    """Let a file change once its rows are checked: `changing(path, rows)`, where rows may be text too."""
    module = importlib.import_module("whence.indexing.build")

    def change(path, rows):
        def late(store, corpus, *, after):
            monkeypatch.setattr(module, "copy_rows", copy_rows)
            path.write_text(rows) if isinstance(rows, str) else write_jsonl(path, rows)
            copy_rows(store, corpus, after=after)

        monkeypatch.setattr(module, "copy_rows", late)

    return change


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (corpus_rows(20, first=100), r"20 rows of digest \w{12} were checked, and 20 of digest \w{12} were copied"),
        (corpus_rows(7), "20 rows of digest .* were checked, and 7 of"),
        (corpus_rows(40), "20 rows of digest .* were checked, and 40 of"),
        ([*corpus_rows(7), {"id": "x", "response": "y"}], "columns are id, response"),
        ("", "no rows"),
    ],
    ids=["others", "fewer", "more", "unreadable", "none"],
)
def test_rows_that_change_before_they_are_copied_never_become_an_index(
    tiny_llama, tmp_path, small_parts, changing, changed, message
):
    corpus, out = write_jsonl(tmp_path / "a.jsonl", corpus_rows(20)), tmp_path / "index"
    changing(corpus, changed)
    with pytest.raises(CorpusError, match=message):
        index(tiny_llama, corpus, out, **QUIET)
    assert not Store.open(out).manifest.is_complete
    assert contents(out).keys() == {"manifest.json"}
    write_jsonl(corpus, corpus_rows(22))
    with pytest.raises(ManifestMismatchError, match=r"the corpus is .*digest.*--restart"):
        index(tiny_llama, corpus, out, **QUIET)
    assert index(tiny_llama, corpus, out, restart=True, **QUIET).store.rows == 22


def test_rows_copied_before_a_kill_are_held_to_what_was_checked(
    tiny_llama, tmp_path, small_parts, changing, monkeypatch
):
    corpus, out = write_jsonl(tmp_path / "a.jsonl", corpus_rows(20)), tmp_path / "index"
    changing(corpus, corpus_rows(20, first=100))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_short(patch, "write_part", 1)
        index(tiny_llama, corpus, out, **QUIET)
    assert Store.open(out).rows == 16
    write_jsonl(corpus, corpus_rows(20))
    with pytest.raises(CorpusError, match="the corpus has changed meanwhile"):
        index(tiny_llama, corpus, out, **QUIET)
    index(tiny_llama, corpus, out, **QUIET)
    index(tiny_llama, corpus, tmp_path / "whole", **QUIET)
    assert contents(out) == contents(tmp_path / "whole")


def test_rows_whose_removal_is_killed_are_removed_by_the_next_build(
    tiny_llama, tmp_path, small_parts, changing, monkeypatch
):
    def stop(place, name):
        raise KeyboardInterrupt

    corpus, out = write_jsonl(tmp_path / "a.jsonl", corpus_rows(20)), tmp_path / "index"
    changing(corpus, corpus_rows(60, first=100))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Place, "remove", stop)
        index(tiny_llama, corpus, out, **QUIET)
    assert (Store.open(out).rows, len(contents(out))) == (0, 1 + 4)
    write_jsonl(corpus, corpus_rows(20))
    index(tiny_llama, corpus, out, **QUIET)
    assert verify(out) == ([], [])


def test_rows_that_change_while_they_join_leave_the_index_as_it_was(tiny_llama, tmp_path, small_parts, changing):
    out, more = tmp_path / "index", write_jsonl(tmp_path / "more.jsonl", corpus_rows(20, first=50))
    index(tiny_llama, corpus_rows(20), out, **QUIET)
    before = contents(out)
    changing(more, corpus_rows(30, first=60))
    with pytest.raises(CorpusError, match=r"20 rows of digest .* 30 of digest .* changed meanwhile"):
        append(out, more, progress=False)
    assert contents(out) == before
    assert append(out, more, progress=False).store.rows == 50
    assert verify(out) == ([], [])


# -- how often a corpus is read

ROWS = {
    "text": {"text": "a"},
    "prompt": {"prompt": "a", "completion": "b"},
    "instruction": {"instruction": "a", "output": "b"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


@pytest.mark.parametrize(
    ("kinds", "chat", "readings"),
    [
        (["text", "prompt"], True, 2),
        (["text", "prompt", "instruction"], False, 2),
        (["text", "prompt", "instruction"], True, 3),
        (["text", "messages"], True, 3),
    ],
)
def test_a_corpus_is_read_a_third_time_only_where_rows_become_conversations(
    tmp_path, monkeypatch, kinds, chat, readings
):
    model, made, real = save_tiny_llama(tmp_path / "model", chat=chat), [], Corpus.__iter__
    monkeypatch.setattr(Corpus, "__iter__", lambda self: made.append(self) or real(self))
    opened = index(model, [ROWS[kind] for kind in kinds], tmp_path / "index", **QUIET)
    begun = 1  # up to the first row with a supervised token
    assert (len(made), opened.layout) == (readings + begun, kinds[0])
    append(tmp_path / "index", [ROWS[kind] for kind in kinds], progress=False)
    assert len(made) == 2 * (readings + begun) + 1, "an append looks for ids that are there too"


# -- rows that no chat template takes


@pytest.mark.parametrize("kind", ["instruction", "messages"])
def test_row_that_the_chat_template_refuses_is_found_before_anything_is_written(tmp_path, kind):
    model, out = save_tiny_llama(tmp_path / "model", chat=True), tmp_path / "index"
    template = (model / "chat_template.jinja").read_text()
    refuses = "{% if 'rude' in messages[0]['content'] %}{{ raise_exception('be polite') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refuses + template)
    rows = [{"id": word, "instruction": f"a {word} word", "output": "yes"} for word in ("kind", "rude")]
    if kind == "messages":
        names = {"instruction": "user", "output": "assistant"}
        said = [[{"role": role, "content": row[name]} for name, role in names.items()] for row in rows]
        rows = [{"id": row["id"], "messages": messages} for row, messages in zip(rows, said, strict=True)]
    with pytest.raises(CorpusError, match=r"row rude: the tokenizer's chat template refuses .* be polite"):
        index(model, rows, out, **QUIET)
    assert not out.exists()
    index(model, rows[:1], out, **QUIET)
    with pytest.raises(CorpusError, match=r"row rude: the tokenizer's chat template refuses .* be polite"):
        append(out, rows[1:], progress=False)
    assert Store.open(out).manifest.is_complete
