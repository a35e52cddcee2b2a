"""What Python shows of a result is a few lines: what it is, the best of it, how to go on."""

from collections.abc import Mapping
from dataclasses import make_dataclass

import pytest
import torch
from test_ablate_page import ablated
from test_mix_page import fitted
from test_recover_page import recovered
from test_trace_page import hit, matrix, small_trace

import whence
from conftest import corpus_rows
from whence.ablation.suggestion import Suggestion
from whence.brief import brief
from whence.evaluation.joining import Join
from whence.evaluation.selection import Line, SelectionTable
from whence.tracing.results import Answer, Null, Trace

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


def parts_of(value, depth=5):
    """Every object of Whence's that is reachable from one by its public attributes."""
    if isinstance(value, Mapping | list | tuple) and value and depth:
        yield from parts_of(next(iter(value.values())) if isinstance(value, Mapping) else value[0], depth - 1)
    if type(value).__module__.startswith("whence."):
        yield value
        for name, part in vars(value).items() if depth and hasattr(value, "__dict__") else ():
            yield from () if name.startswith("_") else parts_of(part, depth - 1)


def test_every_part_of_a_result_is_shown_in_a_few_lines(tiny_llama, tiny_index):
    long = [row | {"prompt": "x" * 5_000, "more": "y" * 50_000} for row in corpus_rows(50)]
    results = [make() for make, _ in RESULTS.values()]
    results += [
        whence.load_model(tiny_llama),
        whence.open_index(tiny_index),
        whence.open_corpus(long),
        whence.Query("x" * 9_000),
    ]
    results += [next(iter(whence.open_corpus(long))), whence.IndexSettings(), whence.MixOptions()]
    results += [hit(1, 0.5, long[0]), Answer("x" * 5_000, "y" * 5_000, True, ["t"] * 999, [0.5] * 999, [True] * 999)]
    for part in (part for result in results for part in parts_of(result)):
        assert len(repr(part)) <= 500 and repr(part).count("\n") < 12, f"{type(part).__name__}: {len(repr(part))}"


def test_a_hit_is_shown_without_its_matrix_and_its_null():
    shown = repr(hit(1, 0.5, {"text": "t"}, tokens=matrix(torch.zeros(50, 200).tolist(), ["q"] * 50, ["t"] * 200),
                     null=Null([0.123] * 128, 0.0, 1.0, 50.0, False)))  # fmt: skip
    assert len(shown) < 400 and "0.123" not in shown
    assert len(repr(Trace([], [], "dot", 0))) < 200


def test_a_tensor_of_one_number_is_shown_and_has_no_length():
    held = make_dataclass("Held", ["value"], namespace={"__repr__": brief})
    assert repr(held(torch.tensor(3.0))) == "Held(value=tensor(3.))"
