"""A choice under another budget, against choosing again."""

import random

import pytest
import torch

from whence import catalogue
from whence.selection.budget import Budget
from whence.selection.choice import Candidates, choose
from whence.selection.other_budgets import full_order, steps
from whence.selection.pipeline import select


def candidates(rows=60, targets=3, seed=0):
    """Rows of three sources, some without a score, some that may not be chosen, some of equal texts and scores."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(targets, rows, generator=draw).mul(4).round().div(4)
    scores[:, ::17] = float("nan")
    texts = [f"some words of the text number {number - number % 2}" for number in range(rows)]
    sources = [("a", "b", None)[number % 3] for number in range(rows)]
    tokens = torch.randint(1, 30, (rows,), generator=draw)
    return Candidates(scores, [f"t{n}" for n in range(targets)], tokens, sources, texts, {5: "refused"})


@pytest.mark.parametrize("selector", [*catalogue.SELECTORS])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("budget", [Budget(count=7), Budget(fraction=0.5), Budget(tokens=200)])
def test_a_step_is_the_choice_of_so_many_rows(selector, temperature, budget):
    rows, made = candidates(), catalogue.selector(selector)(temperature=temperature, seed=3)
    chosen = choose(rows, made, budget)
    order = full_order(rows, made, chosen)
    assert [pick.row for pick in order][: len(chosen.rows)] == chosen.rows
    assert len(order) == int(rows.rankable().sum())
    told = steps(rows, order, ["a", "b", None], len(chosen.rows))
    assert len(chosen.rows) in [step.rows for step in told]
    for step in told:
        again = choose(rows, made, Budget(count=step.rows))
        assert (len(again.rows), again.tokens, again.scores[-1]) == (step.rows, step.tokens, step.score)
        for place, source in enumerate(("a", "b", None)):
            own = [row for row in again.rows if rows.sources[row] == source]
            assert step.by_source[place] == len(own)
            assert step.tokens_by_source[place] == int(rows.tokens[own].sum())


@pytest.mark.parametrize("selector", [*catalogue.SELECTORS])
def test_a_smaller_choice_without_duplicates_is_the_beginning_of_a_larger_one(selector):
    rows, made = candidates(), catalogue.selector(selector)(temperature=0.0, seed=0)
    chosen = choose(rows, made, Budget(count=40), duplicates=1.0)
    assert chosen.tally()["duplicate"]
    order = [pick.row for pick in full_order(rows, made, chosen)]
    for count in range(1, 41):
        assert order[:count] == choose(rows, made, Budget(count=count), duplicates=1.0).rows


def test_with_limits_of_sources_there_is_no_other_budget():
    pool = [{"text": f"word {random.Random(n).random()}", "source": "ab"[n % 2]} for n in range(20)]
    with_caps = select(pool, [{"text": "word"}], method="bm25", count=4, caps={"a": 1})
    assert with_caps.order == []
    plain = select(pool, [{"text": "word"}], method="bm25", count=4)
    assert [pick.row for pick in plain.order[:4]] == plain.selection.rows and len(plain.order) == 20
