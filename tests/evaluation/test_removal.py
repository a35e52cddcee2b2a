"""Removal and addition on a tiny bank: effects are differences of real losses, and no training is made twice."""

import math

import pytest
import torch
from scipy.stats import t

from conftest import corpus_rows, save_tiny_llama, write_jsonl
from whence.errors import ManifestMismatchError, SettingError
from whence.evaluation.bank_pipeline import bank
from whence.evaluation.bank_store import open_bank
from whence.evaluation.member_training import MemberTraining, encoded_queries, query_losses
from whence.evaluation.method_scores import RANDOM, MethodScores
from whence.evaluation.removal import estimate_of, evaluate_addition, evaluate_removal, top_rows
from whence.numerics import generator
from whence.training.repetition import repeatable, train_again
from whence.training.trainer import train

ROWS = corpus_rows(10)
QUERIES = corpus_rows(3, first=50)
RECIPE = {"batch_size": 4, "epochs": 2, "lr": 5e-3, "max_tokens": 32, "checkpoints": 1, "progress": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run, a bank of it, and scores of rows 2 and 7 for all queries, but for the last, whose top is 4 and 5."""
    folder = tmp_path_factory.mktemp("removal")
    train(save_tiny_llama(folder / "model"), ROWS, folder / "run", **RECIPE)
    bank(folder / "run", ROWS, folder / "bank", queries=QUERIES, subsets=2, progress=False)
    scores = [{"query": f"row-{query}", "id": f"row-{row}", "score": 1.0 * (row in top)}
              for query, top in ((50, (2, 7)), (51, (2, 7)), (52, (4, 5))) for row in range(10)]  # fmt: skip
    write_jsonl(folder / "scores.jsonl", scores)
    return folder


def losses_without(files, left_out, seed):
    training = repeatable(files / "run", ROWS)
    trained = train_again(training, files / "empty", left_out=left_out, seed=seed)
    return torch.tensor(query_losses(trained.model, encoded_queries(training, QUERIES))).double()


def marks_of(table, name):
    return next(marks for marks in table.marks if marks.method == name)


def test_removal_is_the_loss_without_the_top_rows_less_the_loss_with_all(files):
    table = evaluate_removal(files / "bank", share=0.2, seeds=2, scores={"mine": str(files / "scores.jsonl")})
    by_seed = [losses_without(files, (2, 7), seed) - losses_without(files, (), seed) for seed in (0, 1)]
    expected = torch.stack(by_seed)
    mine, chance = marks_of(table, "mine"), marks_of(table, RANDOM)
    assert mine.by_query == pytest.approx(expected.mean(0).tolist(), abs=1e-6)
    assert mine.by_seed == pytest.approx(expected.mean(1).tolist(), abs=1e-6)
    assert mine.effect.value == pytest.approx(float(expected.mean()), abs=1e-6)
    assert mine.over_random.value == pytest.approx(mine.effect.value - chance.effect.value, abs=1e-9)
    assert mine.effect.interval[0] <= mine.effect.value <= mine.effect.interval[1]
    members = open_bank(files / "bank").of_kind("removal")
    assert sorted((member.label, member.seed) for member in members) == [
        ("mine", 0), ("mine", 1), (RANDOM, 0), (RANDOM, 1)
    ]  # fmt: skip
    assert all(len(member.left_out) == 2 for member in members)
    rows = table.rows()
    assert [row["rank"] for row in rows] == [1, 2] and rows[0]["effect"] >= rows[1]["effect"] and rows[0]["rows"] == 2


def test_no_training_is_made_twice(files, monkeypatch):
    words = {"share": 0.2, "seeds": 2, "scores": {"mine": str(files / "scores.jsonl")}}
    first = evaluate_removal(files / "bank", **words)
    monkeypatch.setattr(MemberTraining, "__call__", None)
    again = evaluate_removal(files / "bank", **words)
    assert [marks.effect for marks in again.marks] == [marks.effect for marks in first.marks]
    other = evaluate_removal(files / "bank", **words | {"scores": {"renamed": str(files / "scores.jsonl")}})
    assert marks_of(other, "renamed").effect == marks_of(first, "mine").effect


def test_each_query_has_its_own_trainings(files):
    table = evaluate_removal(files / "bank", share=0.2, seeds=1, each_query=True,
                             scores={"mine": str(files / "scores.jsonl")})  # fmt: skip
    whole = losses_without(files, (), 0)
    shared, last = losses_without(files, (2, 7), 0) - whole, losses_without(files, (4, 5), 0) - whole
    assert marks_of(table, "mine").by_query == pytest.approx([*shared[:2].tolist(), float(last[2])], abs=1e-6)
    assert table.notes == ["One seed: intervals are over queries alone, and say nothing of another training."]


def test_a_query_without_a_loss_has_no_list_of_its_own(files, tmp_path):
    silent = {"id": "silent", "prompt": "x", "completion": None}
    bank(files / "run", ROWS, tmp_path / "bank", queries=[QUERIES[0], silent, QUERIES[2]], subsets=2, progress=False)
    scores = [{"query": query, "id": f"row-{row}", "score": 1.0 * (row in top) if top else None}
              for query, top in (("row-50", (2, 7)), ("silent", ()), ("row-52", (4, 5)))
              for row in range(10)]  # fmt: skip
    write_jsonl(tmp_path / "scores.jsonl", scores)
    table = evaluate_removal(tmp_path / "bank", ["loss"], share=0.2, seeds=1, each_query=True,
                             scores={"mine": str(tmp_path / "scores.jsonl")})  # fmt: skip
    whole = losses_without(files, (), 0)
    first, last = losses_without(files, (2, 7), 0) - whole, losses_without(files, (4, 5), 0) - whole
    found = marks_of(table, "mine").by_query
    assert [found[0], found[2]] == pytest.approx([float(first[0]), float(last[2])], abs=1e-6) and math.isnan(found[1])
    assert table.settings["queries"] == 2 and "Left out, for their loss is not finite somewhere: silent." in table.notes


def test_addition_is_the_fall_of_loss_by_the_top_rows_alone(files):
    table = evaluate_addition(files / "bank", ["bm25"], share=0.2, seeds=1,
                              scores={"mine": str(files / "scores.jsonl")})  # fmt: skip
    before = torch.tensor(open_bank(files / "bank").parent.losses).double()
    after = losses_without(files, {*range(10)} - {2, 7}, 0)
    assert marks_of(table, "mine").by_query == pytest.approx((before - after).tolist(), abs=1e-6)
    assert {marks.method for marks in table.marks} == {"bm25", "mine", RANDOM}
    assert repr(table).startswith("RemovalTable(addition of 2 rows)")


def test_random_rows_alone_can_be_graded(files):
    table = evaluate_removal(files / "bank", [RANDOM], share=0.2, seeds=2)
    assert [marks.method for marks in table.marks] == [RANDOM] and table.marks[0].over_random == (0.0, None)


def test_top_rows_by_hand():
    scores = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [5.0, 0.0, 0.5, torch.nan]])
    method = MethodScores("m", scores, None, "hand")
    assert top_rows(method, 2, each_query=True) == [(1, 2), (0, 2)]
    assert top_rows(method, 2, each_query=False) == [(0, 2)]  # means 3, 1.5, 1.75
    with pytest.raises(SettingError, match="m: 3 rows of 4 have a score for query 1, and 4 are wanted"):
        top_rows(method, 4, each_query=True)


def test_intervals():
    values = torch.tensor([[1.0, 3.0], [2.0, 4.0]])
    estimate = estimate_of(values, 0)
    # means of seeds 2 and 3, of queries 1.5 and 3.5: error sqrt(0.5 / 2 + 2 / 2), and t of one degree of freedom
    half = 12.7062047 * math.sqrt(1.25)
    assert estimate.value == 2.5 and estimate.interval == pytest.approx((2.5 - half, 2.5 + half))
    assert estimate_of(values[:1], 0).interval == (1.0, 3.0)
    assert estimate_of(values[:, :1], 0).interval is None and math.isnan(estimate_of(values[:, :0], 0).value)


def test_degrees_of_freedom_are_weighed():
    values = torch.tensor([[0.0, 1.0, 2.0, 5.0], [0.3, 1.3, 2.3, 5.3], [0.6, 1.6, 2.6, 5.6]])  # no interaction
    seeds, queries = 0.09 / 3, (14 / 3) / 4
    freedom = (seeds + queries) ** 2 / (seeds**2 / 2 + queries**2 / 3)
    half = float(t.ppf(0.975, freedom)) * math.sqrt(seeds + queries)
    assert 3 < freedom < 3.2
    assert estimate_of(values, 0).interval == pytest.approx((2.3 - half, 2.3 + half))
    assert estimate_of(torch.ones(3, 4), 0).interval == (1.0, 1.0)


def test_every_method_is_held_against_the_best_one(files):
    table = evaluate_removal(files / "bank", ["bm25"], share=0.2, seeds=2, scores={"mine": str(files / "scores.jsonl")})
    best, *others = table.marks
    assert best.below_best == (0.0, None)
    for marks in others:
        assert marks.below_best.value == pytest.approx(best.effect.value - marks.effect.value)
        low, high = marks.below_best.interval
        assert low < marks.below_best.value < high
    assert {"below_best", "below_best_low", "below_best_high"} <= {*table.rows()[0]}


@pytest.mark.parametrize("way", [(1.0, 0.1), (0.3, 1.0), (0.1, 1.0)])
def test_an_interval_of_three_trainings_holds_whatever_varies_more(way):
    rng = generator(3, "few trainings")
    tables = [
        way[0] * torch.randn(3, 1, generator=rng) + way[1] * torch.randn(1, 20, generator=rng) for _ in range(300)
    ]
    covered = sum(low <= 0 <= high for low, high in (estimate_of(table, 0).interval for table in tables)) / len(tables)
    assert 0.91 < covered < 0.98, covered


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_interval_of_few_trainings_has_what_is_true_in_it_as_often_as_it_says(seeds):
    rng = generator(seeds, "few trainings")
    tables = [torch.randn(seeds, 1, generator=rng) + 0.1 * torch.randn(1, 20, generator=rng) for _ in range(200)]
    intervals = [estimate_of(table, 0).interval for table in tables]
    covered = sum(low <= 0 <= high for low, high in intervals) / len(tables)
    assert covered > 0.9, covered  # drawing seeds anew: 0.5 to 0.8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 0.01}, "--share 0.01: of 10 rows that is 0"),
        ({"share": 1.0}, "--share 1.0: of 10 rows that is 0"),
        ({"share": 0.2, "seeds": 0}, "--seeds 0"),
        ({"share": 0.2, "engine": "slurm"}, "--engine slurm"),
        ({"share": 0.2, "scores": {"full": "x.jsonl"}}, "--scores full: the table has a line of that name already"),
        ({"share": 0.2, "scores": {"random": "x.jsonl"}}, "--scores random: the table has a line of that name"),
    ],
)
def test_what_cannot_work_is_refused(files, settings, words):
    with pytest.raises(SettingError, match=words):
        evaluate_removal(files / "bank", ["bm25"], **settings)


def test_a_run_that_has_changed_is_refused(files, tmp_path):
    other = train(files / "model", ROWS, tmp_path / "run", **RECIPE | {"lr": 1e-3})
    with pytest.raises(ManifestMismatchError, match=r"other weights than the run that .* is the bank of"):
        evaluate_removal(files / "bank", ["bm25"], share=0.2, run=other)
