"""The linear datamodeling score: against slow loops, by hand, in a linear world, and where it has no value."""

import math

import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr

from whence.errors import SettingError
from whence.evaluation.lds import (
    NOT_FINITE,
    SAME_LOSS,
    SAME_SCORE,
    lds,
    mean_ranks,
    predicted_losses,
    weighted_pearson,
)
from whence.numerics import generator


def world(members=40, rows=60, queries=8, noise=0.0, seed=0):
    """Scores of which every loss is the sum over the rows that a member did not have, and noise."""
    rng = generator(seed, "world")
    scores = torch.randn(queries, rows, generator=rng)
    included = torch.rand(members, rows, generator=rng) < 0.5
    losses = 3 - included.float() @ scores.T + noise * torch.randn(members, queries, generator=rng)
    return scores, included, losses


def test_three_subsets_by_hand():
    included = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
    scores = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])  # sums 3, 5, 6: losses should fall in this order
    losses = torch.tensor([[0.9, 0.5], [0.7, 0.9], [0.2, 0.7]])  # the first does; the second's ranks are 1, 3, 2
    marks = lds({"m": scores}, included, losses).marks[0]
    assert marks.by_query == pytest.approx([1.0, -0.5])
    assert marks.spearman.value == pytest.approx(0.25)
    predicted = [-3.0, -5.0, -6.0]
    by_hand = [pearsonr(predicted, losses[:, query].tolist())[0] for query in range(2)]
    assert marks.pearson.value == pytest.approx(sum(by_hand) / 2)
    assert marks.of_mean.value == pytest.approx(0.5)  # mean losses .70, .80, .45: ranks 2, 3, 1 beside 3, 2, 1
    assert marks.spearman.interval is None  # three subsets are too few for one


def test_correlations_equal_slow_loops():
    scores, included, losses = world(members=12, rows=15, queries=4, noise=3.0)
    scores, losses = (scores * 2).round(), losses.round()  # ties on both sides
    marks = lds({"m": scores}, included, losses).marks[0]
    predicted = [[-sum(float(s) for s, is_in in zip(line, member, strict=True) if is_in) for line in scores]
                 for member in included]  # fmt: skip
    slow = []
    for query in range(4):
        slow.append(spearmanr([line[query] for line in predicted], losses[:, query].tolist())[0])
    assert marks.by_query == pytest.approx(slow)
    assert marks.spearman.value == pytest.approx(sum(slow) / 4)
    means = [sum(line) / 4 for line in predicted]
    assert marks.of_mean.value == pytest.approx(spearmanr(means, losses.mean(1).tolist())[0])


def test_weighted_ranks_and_correlations_are_those_of_repeated_values():
    rng = generator(1, "weights")
    x, y = torch.randint(5, (9,), generator=rng).double(), torch.randn(9, generator=rng).double()
    weights = torch.randint(3, (6, 9), generator=rng).double()
    ranks = mean_ranks(x, weights)
    assert torch.equal(ranks, mean_ranks(x.expand(6, 9), weights))
    for sample, counts in enumerate(weights.long()):
        places = torch.arange(9).repeat_interleave(counts)
        by_place = dict(zip(places.tolist(), rankdata(x[places].numpy()), strict=True))
        assert [ranks[sample, place].item() for place in by_place] == pytest.approx(list(by_place.values()))
        correlation = weighted_pearson(ranks, mean_ranks(y, weights), weights)[sample].item()
        assert correlation == pytest.approx(spearmanr(x[places].numpy(), y[places].numpy())[0])


def test_a_linear_world_is_predicted_and_chance_is_not():
    scores, included, losses = world()
    other = torch.randn(scores.shape, generator=generator(9, "other"))
    table = lds({"chance": other, "truth": scores}, included, losses)
    assert [marks.method for marks in table.marks] == ["truth", "chance"]
    truth, chance = table.marks
    assert [truth.spearman.value, truth.pearson.value, truth.of_mean.value] == pytest.approx([1, 1, 1])
    assert truth.spearman.interval == pytest.approx((1, 1))
    low, high = chance.spearman.interval
    assert low < 0 < high
    assert table.difference("truth", "chance").is_above_zero
    assert table.difference("truth", "chance", of_mean=True).is_above_zero
    assert not table.difference("chance", "truth").is_above_zero
    assert lds({"against": -scores}, included, losses).marks[0].spearman.value == pytest.approx(-1)


def test_intervals_are_those_of_resampled_subsets_and_queries():
    """The same by loops over resamples: members and queries are repeated, and correlated by scipy."""
    from whence.evaluation.lds import _draw

    scores, included, losses = world(members=8, rows=10, queries=3, noise=3.0)
    table = lds({"m": scores, "half": scores.relu()}, included, losses, seed=4, resamples=40)
    counts, draws = _draw(8, 3, 4, 40)
    means, gaps, of_mean = [], [], []
    predictions = {name: predicted_losses(values, included).numpy()
                   for name, values in (("m", scores), ("half", scores.relu()))}  # fmt: skip
    for weights, queries in zip(counts.long(), draws.tolist(), strict=True):
        members = torch.arange(8).repeat_interleave(weights).numpy()
        by_method = {name: [spearmanr(predicted[members, query], losses[members, query].numpy())[0]
                            for query in queries] for name, predicted in predictions.items()}  # fmt: skip
        means.append(sum(by_method["m"]) / 3)
        gaps.append(means[-1] - sum(by_method["half"]) / 3)
        mixed = predictions["m"][:, queries].mean(1)[members], losses[:, queries].double().mean(1)[members].numpy()
        of_mean.append(spearmanr(*mixed)[0])
    tails = torch.tensor([0.025, 0.975]).double()
    marks = next(marks for marks in table.marks if marks.method == "m")
    assert marks.spearman.interval == pytest.approx(torch.tensor(means).double().quantile(tails).tolist())
    assert marks.of_mean.interval == pytest.approx(torch.tensor(of_mean).double().quantile(tails).tolist())
    paired = table.difference("m", "half").interval
    assert paired == pytest.approx(torch.tensor(gaps).double().quantile(tails).tolist())


def test_what_has_no_value_is_left_out_and_counted():
    scores, included, losses = world(queries=4)
    included[:, :30], included[:, 30:] = True, False
    included[torch.arange(40), 30 + torch.arange(40) % 30] = True  # all subsets of one size
    losses = 3 - included.float() @ scores.T
    losses[3, 0], losses[:, 1], scores[2] = torch.nan, 0.5, 0.1
    losses[7] = torch.nan
    scores[3, 5] = -torch.inf
    table = lds({"m": scores}, included, losses)
    marks = table.marks[0]
    assert (table.members, table.queries, marks.queries) == (39, 4, 1)
    assert marks.left_out == {NOT_FINITE: 1, SAME_LOSS: 1, SAME_SCORE: 1}
    assert [math.isnan(value) for value in marks.by_query] == [True, True, True, False]
    assert marks.spearman.value == marks.by_query[3] != 0
    assert table.notes == ["Left out, for none of their losses is finite: 1 subset.",
                           "m has no score for 1 row, counted as 0 in sums."]  # fmt: skip


def test_constant_scores_are_nan_and_last_and_differ_by_nan():
    scores, included, losses = world(noise=5.0)
    table = lds({"same": torch.zeros_like(scores), "m": scores}, included, losses)
    assert [marks.method for marks in table.marks] == ["m", "same"]
    same = table.marks[1]
    assert math.isnan(same.spearman.value) and same.spearman.interval is None and same.queries == 0
    gap = table.difference("m", "same")
    assert math.isnan(gap.value) and gap.interval is None and not gap.is_above_zero
    row = table.rows(cost={"m": 2.0})[1]
    assert math.isnan(row["lds"]) and row["lds_low"] is None and row["cost"] is None
    assert row["left_out"] == {SAME_SCORE: 8}


@pytest.mark.parametrize("members", [0, 1])
def test_fewer_than_two_subsets_are_refused_in_a_line(members):
    scores, included, losses = world(members=members)
    with pytest.raises(SettingError, match=f"2 at least: {members} of {members} subset.* whence bank$"):
        lds({"m": scores}, included, losses)


def test_two_subsets_have_a_value_and_no_interval():
    scores, included, losses = world(members=2)
    table = lds({"m": scores}, included, losses)
    assert table.marks[0].spearman.value == 1
    assert "take 4 subsets" in table.notes[0]
    assert table.difference("m", "m").interval is None


def test_nothing_to_grade_is_refused_in_a_line():
    scores, included, losses = world()
    with pytest.raises(SettingError, match="none of 8 queries can be graded: losses all alike"):
        lds({"m": scores}, included, torch.ones_like(losses))


def test_intervals_cover_the_mean_of_other_banks():
    """Of banks drawn from one world, nearly all intervals hold the mean over many."""
    values, held = [], []
    for seed in range(40):
        scores, included, losses = world(members=30, rows=40, queries=10, noise=6.0, seed=seed)
        estimate = lds({"m": scores}, included, losses, resamples=200, seed=seed).marks[0].spearman
        values.append(estimate.value)
        held.append(estimate.interval)
    mean = sum(values) / len(values)
    assert sum(low < mean < high for low, high in held) >= 34  # 95% of 40 is 38
