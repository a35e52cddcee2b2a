"""What methods score a bank's rows by: its own rows, its queries as they were measured, its run wherever that is."""

import pytest
import torch
from graded_bank import QUERIES, ROWS, make_bank, write_bank

from conftest import corpus_rows, save_tiny_llama, write_jsonl
from whence import catalogue
from whence.corpus.tokens import encode
from whence.errors import ManifestMismatchError, SettingError
from whence.evaluation.bank_pipeline import bank as train_bank
from whence.evaluation.bank_scores import bank_scores, evaluate_lds
from whence.evaluation.bank_store import open_bank
from whence.evaluation.method_scores import query_targets, score_methods
from whence.evaluation.removal import evaluate_removal
from whence.evaluation.retrieval import evaluate_retrieval
from whence.evaluation.tail_patch import evaluate_tail_patch
from whence.indexing.build import index as build_index
from whence.selection.pipeline import open_view
from whence.selection.run_view import RunView
from whence.training.trainer import train

SILENT = {"id": "silent", "prompt": "x", "completion": None}
"""A query without a supervised token: a bank keeps it, and its losses are NaN."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("bank_scores"))


def test_queries_without_a_loss_have_no_scores_and_spoil_no_others(made, tmp_path):
    bank, index, model = made
    losses = torch.cat([open_bank(bank).losses(), torch.full((12, 1), torch.nan)], 1)[:, [0, 3, 1, 2]]
    included = open_bank(bank).included()
    write_bank(tmp_path / "bank", model, included, losses, queries=[QUERIES[0], SILENT, *QUERIES[1:]])
    found = {method.name: method.scores
             for method in bank_scores(open_bank(tmp_path / "bank"), ["exact-dot", "bm25"], index=index)}  # fmt: skip
    expected = {method.name: method.scores for method in bank_scores(open_bank(bank), ["exact-dot", "bm25"],
                                                                     index=index)}  # fmt: skip
    for name, scores in found.items():
        assert scores[1].isnan().all() and torch.equal(scores[[0, 2, 3]], expected[name])
    graded, whole = (evaluate_lds(one, ["exact-dot"], index=index, resamples=50) for one in (tmp_path / "bank", bank))
    assert graded.table.marks[0].spearman.value == pytest.approx(whole.table.marks[0].spearman.value)
    assert graded.table.marks[0].left_out == {"losses not finite": 1}
    assert not [note for note in graded.table.notes if "no score" in note]


def test_a_run_is_replayed_wherever_it_is_now_without_its_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in corpus_rows(6)]  # without ids
    save_tiny_llama(tmp_path / "model", scale=0.02)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    train(tmp_path / "model", "rows.jsonl", "run", batch_size=3, epochs=1, lr=1e-3, replayable=True, progress=False)
    queries = corpus_rows(2, first=40)
    train_bank("run", "rows.jsonl", "bank", queries=queries, subsets=2, progress=False)
    build_index("run", "rows.jsonl", "index", projection="identity", progress=False)
    methods = ["replay", "less", "exact-dot"]
    expected = [method.scores for method in bank_scores(open_bank("bank"), methods, index="index")]
    direct = score_methods(["replay"], queries, RunView.of("run"), run=RunView.of("run"))[0].scores
    torch.testing.assert_close(expected[0], direct)
    ids = list(RunView.of("run").ids())
    asked = [{**query, "relevant": [ids[0]]} for query in queries]
    assert {marks.method for marks in evaluate_retrieval(asked, "rows.jsonl", ["replay"], run="run").marks} >= {
        "replay"
    }
    for source in ("rows.jsonl", "index"):
        table = evaluate_tail_patch("run", queries, source, ["replay"], top=2)
        assert {marks.method for marks in table.marks} == {"replay", "random"}
    with pytest.raises(SettingError, match="and none is given: add --run RUN"):
        evaluate_retrieval(asked, "rows.jsonl", ["replay"])
    (tmp_path / "elsewhere").mkdir()
    for name in ("run", "model", "bank", "index"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    (tmp_path / "rows.jsonl").unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = bank_scores(open_bank("bank"), methods, index="index", run="run", model="model")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.scores, other)
    alone = bank_scores(open_bank("bank"), ["exact-dot"], run="run")[0].scores
    torch.testing.assert_close(alone, expected[2], rtol=1e-3, atol=1e-5)
    with pytest.raises(ManifestMismatchError, match=r"run: no run is there that .*bank is the bank of\. Name"):
        bank_scores(open_bank("bank"), ["replay"])
    with pytest.raises(ManifestMismatchError, match=r"model: it has other weights than the run that .*bank is"):
        bank_scores(open_bank("bank"), ["exact-dot"], run="model")
    table = evaluate_removal("bank", ["replay"], share=0.2, seeds=1, run="run", model="model")
    assert {marks.method for marks in table.marks} == {"replay", "random"} and table.settings["run"] == "run"


def test_queries_are_cut_as_the_bank_measured_them(made, tmp_path):
    bank, _, model = made
    long = {"id": "long", "prompt": "a?", "completion": " one two three four five six seven"}
    view = open_view(ROWS, "loss", model=model)
    cut = query_targets([long], view, 12)[0].queries[0].encoded
    assert cut == encode(long, view.model().tokenizer, 12) and len(cut.ids) == 12
    assert len(query_targets([long], view)[0].queries[0].encoded.ids) > 12
    included = open_bank(bank).included()
    write_bank(tmp_path / "bank", model, included, torch.ones(12, 1), queries=[long], max_tokens=12)
    opened = open_bank(tmp_path / "bank")
    found = bank_scores(opened, ["exact-dot"])[0].scores
    rows = open_view([{**row, "prompt": row["prompt"]} for row in ROWS], "loss", model=model)
    whole = score_methods(["exact-dot"], [long], rows, opened.row_ids)[0].scores
    assert not torch.allclose(found, whole, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"methods": ["bm25"], "scores": {"x": "none.jsonl"}}, "none.jsonl"),
        ({"methods": ["bm25"], "costs": {"other": 3.0}}, "--cost other: of no method that is graded; these are bm25"),
        ({"methods": ["bm25", "less@adam"]}, "no --index has the name adam"),
        ({"methods": ["bm25", "exact-dot:a=b"]}, "exact-dot has no options"),
    ],
)
def test_what_cannot_be_graded_is_refused_before_anything_is_scored(made, settings, words, monkeypatch):
    def scored(*_):
        raise AssertionError("scored")

    monkeypatch.setattr(catalogue.graded_entry("bm25").load(), "__call__", scored)
    with pytest.raises(SettingError, match=words):
        evaluate_lds(made[0], **settings)
    asked = [{**QUERIES[0], "relevant": ["a0"]}]
    with pytest.raises(SettingError, match=words):
        evaluate_retrieval(asked, ROWS, model=made[2], **settings)


def test_rows_of_one_id_are_not_told_apart(made):
    view = open_view([*ROWS, {**ROWS[0], "completion": " other"}], "bm25")
    with pytest.raises(SettingError, match="the id 'a0' is given twice, and rows are found by it"):
        score_methods(["bm25"], QUERIES, view, [row["id"] for row in ROWS])
    with pytest.raises(SettingError, match="the id 'a0' is given twice"):
        evaluate_retrieval([{**QUERIES[0], "relevant": ["a0"]}], [*ROWS, ROWS[0]], ["bm25"])
