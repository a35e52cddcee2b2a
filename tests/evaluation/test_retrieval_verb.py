"""`evaluate retrieval`: planted rows are found, by ids or by a column; means, intervals, magnitudes and refusals."""

import json
import math

import pytest
import torch
from graded_bank import QUERIES, ROWS, make_bank

import whence
from conftest import write_jsonl
from whence.corpus.columns import columns_called
from whence.errors import SettingError
from whence.evaluation.method_scores import MethodScores
from whence.evaluation.planting import repeated_facts
from whence.evaluation.ranking import measures
from whence.evaluation.retrieval import evaluate_retrieval, graded
from whence.indexing.build import index as build_index
from whence.numerics import generator
from whence.reports.existing_files import is_written_by_whence
from whence.reports.retrieval_tables import retrieval_answer

ASKED = [{**query, "source": "abc"[number], "relevant": [row["id"] for row in ROWS if row["source"] == "abc"[number]]}
         for number, query in enumerate(QUERIES)]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    write_jsonl(folder / "queries.jsonl", ASKED)
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder, *make_bank(folder)


def test_means_are_those_of_single_queries_and_the_best_comes_first():
    rng = generator(0, "retrieval")
    relevant = torch.rand(5, 30, generator=rng) < 0.2
    relevant[:, 0], relevant[:, 1] = True, False
    good, bad = relevant + torch.rand(5, 30, generator=rng), torch.rand(5, 30, generator=rng)
    table = graded([MethodScores("bad", bad), MethodScores("good", good, 2.0)], relevant, depths=[3])
    assert [marks.method for marks in table.marks] == ["good", "bad"]
    by_query = [measures(one, other, [3]) for one, other in zip(bad, relevant, strict=True)]
    for name, estimate in table.marks[1].estimates.items():
        assert estimate.value == pytest.approx(sum(line[name] for line in by_query) / 5)
        assert estimate.interval[0] <= estimate.value <= estimate.interval[1]
    assert table.marks[0].estimates["auroc"].value == 1 and table.marks[0].below_best.value == 0
    assert table.marks[1].below_best.is_above_zero
    gaps = table.marks[0].by_query["auprc"] - table.marks[1].by_query["auprc"]
    assert table.marks[1].below_best.value == pytest.approx(float(gaps.mean()))
    assert table.relevant == int(relevant.sum()) / 5 and table.rows()[0]["seconds"] == 2.0


def test_signed_scores_are_ranked_by_magnitude_too():
    relevant = torch.tensor([[True, True, False, False]] * 2)
    scores = torch.tensor([[3.0, -4.0, 1.0, -torch.inf]] * 2)
    signed = graded([MethodScores("m", scores, is_signed=True)], relevant)
    assert [marks.method for marks in signed.marks] == ["|m|", "m"]
    assert signed.marks[0].estimates["auroc"].value == 1
    assert [marks.method for marks in graded([MethodScores("m", scores)], relevant).marks] == ["m"]
    plain = graded([MethodScores("m", scores.abs(), is_signed=True)], relevant)
    assert [marks.method for marks in plain.marks] == ["m"]


def test_one_query_has_no_interval():
    table = graded([MethodScores("m", torch.tensor([[1.0, 0.0]]))], torch.tensor([[True, False]]))
    assert table.marks[0].estimates["auprc"] == (1.0, None) and math.isfinite(table.rows()[0]["mrr"])
    assert retrieval_answer(table) == "m finds the rows best: auPRC 1.00, MRR 1.00."


def test_an_index_and_a_corpus_are_graded_alike(made):
    folder, _, index, model = made
    of_index = evaluate_retrieval(ASKED, index, ["bm25", "cosine", "random"], depths=[6])
    assert {marks.method for marks in of_index.marks} >= {"bm25", "cosine", "random"}
    assert of_index.candidates == 19 and of_index.relevant == 6
    by_name = {marks.method: marks.estimates for marks in of_index.marks}
    assert by_name["bm25"]["auroc"].value > 0.8 > by_name["random"]["auroc"].value
    of_rows = evaluate_retrieval(folder / "queries.jsonl", folder / "rows.jsonl", ["bm25", "exact-dot"], model=model)
    assert of_rows.candidates == 18
    by_column = evaluate_retrieval(ASKED, index, ["bm25"], relevant="source", depths=[6])
    assert by_column.marks[0].estimates == by_name["bm25"]


def test_a_query_of_the_corpus_is_not_relevant_to_itself():
    table = evaluate_retrieval(ROWS[:2], ROWS, ["bm25"], relevant="source")
    assert table.relevant == 5


def test_planted_facts_are_found_by_their_words():
    planted = repeated_facts(ROWS, facts=6, wordings=3)
    table = evaluate_retrieval(planted.queries, planted.rows, ["bm25", "random"], depths=[3])
    assert table.marks[0].method == "bm25" and table.marks[0].estimates["mrr"].value > 0.7
    assert table.marks[1].below_best.is_above_zero


def test_files_of_scores_and_costs(made, tmp_path):
    index = made[2]
    lines = [{"query": query["id"], "id": row["id"], "score": float(row["id"] in query["relevant"])}
             for query in ASKED for row in [*ROWS, {"id": "more"}]]  # fmt: skip
    write_jsonl(tmp_path / "truth.jsonl", lines)
    table = evaluate_retrieval(ASKED, index, ["random"], scores={"truth": str(tmp_path / "truth.jsonl")},
                               costs={"truth": 3.0})  # fmt: skip
    assert table.marks[0].method == "truth" and table.marks[0].seconds == 3
    assert table.marks[0].estimates["auprc"].value == 1


def test_queries_that_nothing_is_relevant_to_are_left_out_and_counted():
    queries = [*ASKED, {**ASKED[0], "id": "empty", "relevant": []}]
    table = evaluate_retrieval(queries, ROWS, ["bm25"])
    assert table.queries == 3 and table.notes == ["Left out, for no row is relevant to them, or all are: 1 query."]


@pytest.mark.parametrize(
    ("queries", "settings", "words"),
    [
        (QUERIES, {}, "query 0 has no relevant; ids of the rows to find, as a list"),
        (QUERIES, {"relevant": "topic"}, "query 0 has no topic; a value"),
        ([{**ASKED[0], "relevant": ["zz", "a0"]}], {}, "query qa: its relevant row zz is none of the 18"),
        ([{**ASKED[0], "topic": "x"}], {"relevant": "topic"}, "--relevant topic: no row has this column"),
        ([{**ASKED[0], "relevant": []}], {}, "none of 1 query has a relevant row"),
        (ASKED, {"methods": []}, "no method to grade"),
        (ASKED, {"depths": [0]}, "--k 0: a number"),
        (ASKED, {"methods": ["loss"]}, "--methods loss reads a model"),
    ],
)
def test_refusals(queries, settings, words):
    with pytest.raises(SettingError, match=words):
        evaluate_retrieval(queries, ROWS, **{"methods": ["bm25"], **settings})


def test_the_command(made, command, tmp_path):
    folder, _, index, _ = made
    words = ["evaluate", "retrieval", folder / "queries.jsonl", index, "--methods", "bm25,cosine", "--k", "3,6"]
    code, said, complaint = command(*words, "-o", tmp_path / "r.svg")
    assert code == 0 and " finds the rows best: auPRC " in said, complaint
    assert is_written_by_whence(str(tmp_path / "r.svg"))
    for ending in ("jsonl", "csv", "parquet"):
        assert command(*words, "-o", tmp_path / f"r.{ending}")[0] == 0
        assert is_written_by_whence(str(tmp_path / f"r.{ending}"))
    rows = json.loads(command(*words, "--json")[1])["rows"]
    assert {"bm25", "cosine"} <= {row["method"] for row in rows} and 0 < rows[0]["recall@6"] <= 1
    assert rows[0]["auprc"] > rows[1]["auprc"] and "below_best_low" in rows[1]
    refused = [(["--k", "x"], "--k x: numbers"), (["--methods", "cosine"], "--index INDEX")]
    for more, words in refused:
        code, said, complaint = command("evaluate", "retrieval", folder / "queries.jsonl", folder / "rows.jsonl", *more)
        assert code == 2 and not said and (words in complaint or "no method" in complaint)


def test_it_is_public():
    assert whence.evaluate_retrieval is evaluate_retrieval


def test_queries_have_the_columns_of_the_index(made, tmp_path):
    model = made[3]
    own = [{"id": row["id"], "question": row["prompt"], "reply": row["completion"]} for row in ROWS]
    with columns_called({"prompt": "question", "completion": "reply"}):
        build_index(model, own, tmp_path / "index", max_tokens=32, progress=False)
    asked = [{"id": query["id"], "question": query["prompt"], "reply": query["completion"],
              "relevant": query["relevant"]} for query in ASKED]  # fmt: skip
    renamed = evaluate_retrieval(asked, tmp_path / "index", ["bm25"])
    assert renamed.marks[0].estimates == evaluate_retrieval(ASKED, ROWS, ["bm25"]).marks[0].estimates
