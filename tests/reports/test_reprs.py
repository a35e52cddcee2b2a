"""What Python shows of a result is a few lines: what it is, the best of it, how to go on."""

import pytest
import torch
from test_ablate_page import ablated
from test_mix_page import fitted
from test_recover_page import recovered
from test_trace_page import hit, matrix, small_trace

import whence
from conftest import corpus_rows
from whence.ablation.suggestion import Suggestion
from whence.evaluation.joining import Join
from whence.evaluation.selection import Line, SelectionTable
from whence.tracing.results import Null, Trace

MARKS = {"spearman": 0.5, "low": 0.1, "high": 0.8, "by set": {}, "pairs": 500}
POINTS = [{"method": "bm25", "partition": "p" * 50, "set": "s", "score": 0.1, "change": 0.2}] * 500
LINES = [Line("bm25", f"t{number}", 3, 9.0, 9.0, 2.0, 0.1, 1.0, 1.0, 0.1, (0.0, 0.2)) for number in range(100)]
RESULTS = {
    "trace": (small_trace, "id1 first, score +0.5"),
    "chosen": (lambda: whence.select(corpus_rows(400), method="random", count=100), "100 of 400 rows"),
    "recovered": (recovered, "20 of 200 rows"),
    "ablation": (ablated, "10 mixtures on 2 evaluation sets"),
    "suggestion": (
        lambda: Suggestion({"a": 1.0}, {"s": 1.0}, {"s": 1.0}, {"s": 1.0}, "a", {"s": 1.0}, (0.1, 0.0, 0.2),
                           [{"loss": 1.0, "mixture": {"a": 1.0}}] * 500), "+0.100 nats a token",
    ),
    "mix law": (fitted, "24 mixtures of 3 domains"),
    "join": (lambda: Join(POINTS, {"bm25": MARKS}), "bm25: Spearman 0.50 (0.10 to 0.80)"),
    "selection table": (lambda: SelectionTable(LINES, {}), "92 more"),
}  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_shown_in_a_few_lines(name):
    make, words = RESULTS[name]
    shown = repr(make())
    assert words in shown and "More: " in shown
    assert len(shown) < 900 and shown.count("\n") < 12 and max(map(len, shown.splitlines())) <= 140


def test_a_hit_is_shown_without_its_matrix_and_its_null():
    shown = repr(hit(1, 0.5, {"text": "t"}, tokens=matrix(torch.zeros(50, 200).tolist(), ["q"] * 50, ["t"] * 200),
                     null=Null([0.123] * 128, 0.0, 1.0, 50.0, False)))  # fmt: skip
    assert len(shown) < 400 and "0.123" not in shown
    assert len(repr(Trace([], [], "dot", 0))) < 200
