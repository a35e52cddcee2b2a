"""Measures of a ranking: by hand, and against the mean over all orders of equal scores."""

import itertools

import pytest
import torch

from whence.evaluation.ranking import hits_at, measures, reciprocal_rank
from whence.numerics import generator


def all_orders(scores, relevant, measure):
    """Mean of a measure over all orders in which equal scores can stand."""
    values = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[one] >= scores[other] for one, other in itertools.pairwise(order)):
            values.append(measure([bool(relevant[place]) for place in order]))
    return sum(values) / len(values)


def test_by_hand():
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, -torch.inf])
    relevant = torch.tensor([False, True, False, True, False])
    found = measures(scores, relevant, [1, 2, 4, 9])
    assert found == pytest.approx({
        "auroc": 3 / 6, "auprc": (1 / 2 + 2 / 4) / 2, "mrr": 1 / 2, "recall@1": 0, "precision@1": 0, "recall@2": 1 / 2,
        "precision@2": 1 / 2, "recall@4": 1, "precision@4": 1 / 2, "recall@9": 1, "precision@9": 2 / 5,
    })  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_ties_are_ranked_in_every_order(seed):
    rng = generator(seed, "ties")
    scores = torch.randint(3, (6,), generator=rng).double()
    relevant = torch.randint(2, (6,), generator=rng).bool()
    relevant[0], relevant[1] = True, False
    first = all_orders(scores, relevant, lambda order: 1 / (1 + order.index(True)))
    assert reciprocal_rank(scores, relevant) == pytest.approx(first)
    for k in (1, 2, 3, 5, 6):
        expected = all_orders(scores, relevant, lambda order, k=k: sum(order[:k]))
        assert hits_at(scores, relevant, k) == pytest.approx(expected)


def test_constant_scores_are_chance():
    relevant = torch.tensor([True, False, False, False])
    found = measures(torch.zeros(4), relevant, [2])
    assert found["auroc"] == 0.5 and found["recall@2"] == 0.5 and found["mrr"] == pytest.approx(25 / 12 / 4)


def test_rows_without_a_score_come_last():
    scores = torch.tensor([torch.nan, -5.0, -torch.inf, torch.inf])
    relevant = torch.tensor([False, True, False, False])
    assert measures(scores, relevant, [1])["mrr"] == 1


def test_nothing_relevant_is_refused():
    with pytest.raises(ValueError, match="none is relevant"):
        reciprocal_rank(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="some of both"):
        measures(torch.zeros(3), torch.ones(3, dtype=torch.bool), [1])
