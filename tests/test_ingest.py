"""A corpus' rows come into an index whole and as they were checked, wherever the index lies and whatever changes."""

import json

import pytest

from conftest import contents, corpus_rows, cut_short, write_jsonl
from whence.corpus import open_corpus
from whence.errors import CorpusError
from whence.index import append, index

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
