"""A bank keeps scores: those that scoring gives, found again by all that they depend on, and by nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from graded_bank import make_bank

from whence.corpus.reading import open_corpus
from whence.errors import StorageError
from whence.evaluation.bank_scores import bank_scores, evaluate_lds
from whence.evaluation.bank_store import open_bank
from whence.evaluation.kept_scores import FOLDER, KeptScores
from whence.evaluation.method_scores import MethodName
from whence.indexing.build import index as build_index
from whence.indexing.directories import verified
from whence.models.loading import load_model
from whence.second_order.pipeline import curvature
from whence.selection.views import CorpusView
from whence.storage import Place

METHODS = ["exact-dot", "dot", "bm25"]


@pytest.fixture
def made(tmp_path):
    bank, index, model = make_bank(tmp_path)
    return bank, str(index), model


def scored(made, methods=METHODS, **settings):
    return {method.name: method for method in bank_scores(open_bank(made[0]), methods, index=made[1], **settings)}


def documents(made):
    return sorted((Path(made[0]) / FOLDER).glob("*.json"))


def rows_of(opened, first=0):
    return open_corpus(opened.corpus_rows[first:])


def refuse(*args, **kwargs):
    raise AssertionError("it scores again")


def test_scores_are_kept_with_their_cost_and_taken_without_scoring(made, monkeypatch):
    first = scored(made)
    monkeypatch.setattr(MethodName, "scorer", lambda self, seed: refuse)
    again = scored(made)
    for name, method in first.items():
        assert torch.equal(again[name].scores, method.scores) and again[name].seconds == method.seconds
        assert (again[name].origin, again[name].is_signed) == (method.origin, method.is_signed)
    assert scored(made, index_seconds=100.0)["dot"].seconds == first["dot"].seconds + 100
    with pytest.raises(AssertionError, match="scores again"):
        scored(made, seed=1)


def test_what_was_scored_before_a_stop_is_kept(made, monkeypatch):
    real = MethodName.scorer
    monkeypatch.setattr(MethodName, "scorer", lambda self, seed: real(self, seed) if self.base == "bm25" else refuse)
    with pytest.raises(AssertionError, match="scores again"):
        scored(made, ["bm25", "exact-dot"])
    assert [json.loads(file.read_text())["method"] for file in documents(made)] == ["bm25"]


def test_a_key_is_of_all_that_scores_depend_on(made):
    opened = open_bank(made[0])
    view = CorpusView(rows_of(opened), None)
    queries, ids = list(opened.queries), opened.row_ids

    def key(method="bm25", options=None, read=view, seed=0, asked=queries, rows=ids, longest=None):
        return KeptScores(opened.place, asked, rows, longest).key(method, options or {}, read, seed)

    other = CorpusView(rows_of(opened, 1), None)
    keys = [key(), key("rds+"), key(options={"k1": "2"}), key(read=other), key(seed=1), key(asked=queries[:-1]),
            key(rows=ids[:-1]), key(longest=9), key(read=CorpusView(rows_of(opened), None, 9))]  # fmt: skip
    assert len({*keys}) == len(keys)
    assert key() == key(read=CorpusView(rows_of(opened), None))
    loaded = CorpusView(rows_of(opened), load_model(made[2]))
    assert key() == key(read=loaded) and key("loss") != key("loss", read=loaded)


def test_another_index_has_scores_of_its_own(made, tmp_path):
    first = scored(made, ["cosine"])["cosine"].scores
    other = tmp_path / "other"
    build_index(made[2], open_bank(made[0]).corpus_rows, other, width=64, projection="count_sketch", progress=False)
    assert not torch.equal(scored((made[0], str(other), made[2]), ["cosine"])["cosine"].scores, first)
    assert torch.equal(scored(made, ["cosine"])["cosine"].scores, first)


def test_a_damaged_file_is_found_out_and_not_used(made, caplog):
    first = scored(made, ["bm25"])["bm25"].scores
    file = documents(made)[0].with_suffix(".safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    problems = [problem.file for problem in verified(made[0]).problems]
    assert problems == [f"{FOLDER}/{file.name}"]
    assert torch.equal(scored(made, ["bm25"])["bm25"].scores, first) and "The method scores anew" in caplog.text
    assert not verified(made[0]).problems


def test_a_bank_that_cannot_be_written_to_is_graded(made, monkeypatch):
    expected = scored(made, ["bm25"])["bm25"].scores
    shutil.rmtree(documents(made)[0].parent)

    def full(*args, **kwargs):
        raise StorageError("no room")

    monkeypatch.setattr(Place, "write", full)
    assert torch.equal(scored(made, ["bm25"])["bm25"].scores, expected) and not documents(made)


def test_tables_say_what_was_kept(made):
    first, again = (evaluate_lds(made[0], METHODS, index=made[1], resamples=20) for _ in range(2))
    assert not [note for note in first.table.notes if "kept" in note] and first.rows() == again.rows()
    note = f"Scored before and kept by the bank: exact-dot, dot, bm25. To score anew: rm -r {made[0]}/{FOLDER}"
    assert note in again.table.notes


def test_scores_by_stored_curvature_are_of_what_is_in_its_directory_and_cost_what_it_took(made, tmp_path, monkeypatch):
    out = tmp_path / "curvature"
    store = curvature(made[1], out, progress=False)
    name = f"ekfac:curvature={out}"
    first = scored(made, [name, "ekfac"])
    assert torch.allclose(first[name].scores, first["ekfac"].scores, rtol=1e-3, atol=1e-6)
    assert first[name].seconds >= store.description.seconds > 0
    monkeypatch.setattr(MethodName, "scorer", lambda self, seed: refuse)
    again = scored(made, [name])
    assert torch.equal(again[name].scores, first[name].scores) and again[name].is_kept and again[name].is_signed
    monkeypatch.undo()
    curvature(made[1], out, seed=1, restart=True, progress=False)
    assert not scored(made, [name])[name].is_kept
