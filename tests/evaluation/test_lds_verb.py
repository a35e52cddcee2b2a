"""`evaluate lds` on a bank that follows exact scores: the library, the command, its table, plot, files and refusals."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from graded_bank import QUERIES, ROWS, make_bank, write_bank

import whence
from conftest import write_jsonl
from whence.cli.grading import command_after
from whence.errors import MissingBankError, SettingError
from whence.evaluation.bank_scores import bank_scores, evaluate_lds
from whence.evaluation.bank_store import open_bank
from whence.evaluation.method_scores import MethodScores
from whence.reports.existing_files import is_written_by_whence
from whence.reports.lds_tables import lds_answer, lds_plot
from whence.reports.quality_plot import LINE, Point, _free, quality_plot


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("lds"))


def test_a_bank_grades_methods(made, tmp_path):
    bank, index, _ = made
    right = bank_scores(open_bank(bank), ["exact-dot"], index=index)[0].scores
    lines = [{"query": query, "id": row["id"], "score": float(right[number, column])}
             for number, query in enumerate(line["id"] for line in QUERIES)
             for column, row in enumerate(ROWS)]  # fmt: skip
    file = tmp_path / "theirs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = whence.evaluate_lds(bank, ["random", "exact-dot"], index=index, scores={"theirs": str(file)},
                                 costs={"theirs": 5.0}, index_seconds=3.0)  # fmt: skip
    rows = {row["method"]: row for row in result.rows()}
    assert rows["exact-dot"]["lds"] == pytest.approx(1) == rows["theirs"]["lds"]
    assert rows["random"]["lds"] < 0.7 and rows["random"]["rank"] == 3
    assert result.training_seconds == 2.0 and result.costs["theirs"] == 2.5 and rows["theirs"]["trainings"] == 2.5
    assert 0 < result.costs["random"] < result.costs["exact-dot"]
    assert result.table.difference("exact-dot", "random").is_above_zero
    assert rows["random"]["below_best_low"] > 0


def test_without_an_index_the_banks_own_rows_are_read(made):
    bank = made[0]
    alone = evaluate_lds(bank, ["exact-dot", "bm25", "loss"])
    assert alone.table.marks[0].method == "exact-dot"
    assert alone.table.marks[0].spearman.value > 0.99
    constant = next(marks for marks in alone.table.marks if marks.method == "loss")
    assert constant.queries == 3  # the same scores for every query still differ by row
    with pytest.raises(SettingError, match="add --index INDEX"):
        evaluate_lds(bank, ["cosine"])


def test_the_cost_of_a_training_is_that_of_one_on_all_rows(made):
    bank = open_bank(made[0])
    mine = MethodScores("mine", torch.randn(3, 18), 4.0)
    given = evaluate_lds(bank, given=[mine])
    assert given.costs == {"mine": 2.0} and given.table.marks[0].method == "mine"
    assert bank.training_seconds == bank.full.seconds == 2.0 == 2 * bank.members[0].seconds
    slow = replace(bank, full=replace(bank.full, seconds=20.0))
    assert slow.training_seconds == 2.0, "what ran beside one training does not count"
    at_full_length = tuple(replace(member, seconds=2.0) for member in bank.members)
    assert replace(bank, members=at_full_length).training_seconds == 2.0, "rows that leave may keep their places"
    few = replace(bank.members[0], left_out=tuple(range(17)), seconds=1.0)
    assert replace(bank, members=(few,)).training_seconds == 2.0, "of few rows a training's time is mostly its start"


def test_methods_and_files_that_make_no_sense_are_refused(made, tmp_path):
    bank = made[0]
    with pytest.raises(SettingError, match="no method to grade: name some with --methods"):
        evaluate_lds(bank)
    with pytest.raises(SettingError, match="--scores bm25: --methods has that name too"):
        evaluate_lds(bank, ["bm25"], scores={"bm25": "x.jsonl"})
    with pytest.raises(MissingBankError):
        evaluate_lds(tmp_path / "none", ["bm25"])
    write_bank(tmp_path / "one", made[2], torch.ones(1, 18, dtype=torch.bool), torch.ones(1, 3))
    with pytest.raises(SettingError, match="1 of 1 subset have losses"):
        evaluate_lds(tmp_path / "one", ["random"])


def test_the_command_prints_a_table_an_answer_and_writes(made, command, tmp_path):
    bank, index, _ = made
    words = ["evaluate", "lds", bank, "--methods", "exact-dot,less:within=mean_cosine,random@own", "--index",
             f"own={index}", "--cost", "random@own=40"]  # fmt: skip
    code, said, complaint = command(*words, "-o", tmp_path / "lds.svg")
    assert code == 0 and "exact-dot" in said, complaint
    assert "predicts retrainings best: LDS 1.00 (95%: 1.00 to 1.00)" in said
    plot = (tmp_path / "lds.svg").read_text()
    assert plot.startswith("<svg") and "exact-dot: 1.000" in plot and is_written_by_whence(str(tmp_path / "lds.svg"))
    for ending in ("jsonl", "csv", "parquet"):
        out = tmp_path / f"lds.{ending}"
        assert command(*words, "-o", out)[0] == 0 and is_written_by_whence(str(out))
    code, said, _ = command(*words, "--json")
    document = json.loads(said)
    assert [row["rank"] for row in document["rows"]] == [1, 2, 3]
    assert {row["method"]: row["trainings"] for row in document["rows"]}["random@own"] == 20
    assert document["settings"]["leave_out"] == "zero" and document["settings"]["subsets"] == 12


def test_the_next_command_reads_what_the_best_method_read():
    indexes = {"adam": "A", "own": "B"}
    after = partial(command_after, indexes=indexes, run="RUN", out="t.svg", name="lds")
    end = ("--tasks", "TASKS.jsonl", "--count", 100, "-o", "chosen.jsonl")
    assert after("replay") == ("whence", "select", "RUN", "--method", "replay", *end)
    assert after("replay:hessian=false")[2:7] == ("RUN", "--method", "replay", "--set", "hessian=false")
    assert after("less:within=mean_cosine@own")[2:7] == ("B", "--method", "less", "--set", "within=mean_cosine")
    assert after("less")[2] == "A" and after("exact-dot")[-2:] == ("-o", "lds.jsonl")
    assert after("bm25", indexes={})[-2:] == ("-o", "lds.jsonl") and after("replay", out=None)[-2:] == ("-o", "lds.svg")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "no method to grade"),
        (["--methods", "cosine"], "add --index INDEX"),
        (["--methods", "bm52"], "no such method"),
        (["--methods", "bm25", "--index", "nowhere"], "nowhere"),
        (["--methods", "bm25", "--scores", "file.jsonl"], "NAME=VALUE is expected"),
        (["--methods", "bm25", "--cost", "bm25=x"], "NAME=NUMBER is expected"),
        (["--methods", "bm25", "--cost", "other=3"], "--cost other: of no method"),
        (["--methods", "bm25", "-o", "x.txt"], "written to .jsonl"),
        (["--methods", "bm25", "--index", "a", "--index", "b"], "there is another of that name"),
    ],
)
def test_the_commands_refusals_are_one_line(made, command, more, words):
    code, said, complaint = command("evaluate", "lds", made[0], *more)
    assert code == 2 and not said and words in complaint


def test_what_is_no_bank_is_refused(command, tmp_path):
    code, _, complaint = command("evaluate", "lds", tmp_path, "--methods", "bm25")
    assert code == 2 and "bank" in complaint


def test_the_answer_says_what_is_not_sure(made):
    bank, index, _ = made
    again = evaluate_lds(bank, ["exact-dot", "exact-dot@own", "random"], index={"own": index})
    assert "it is not surely above exact-dot@own" in lds_answer(again) or "exact-dot," in lds_answer(again)
    chance = evaluate_lds(bank, ["random"])
    assert "which may be chance; more subsets would tell." in lds_answer(chance)
    assert lds_plot(chance).count("<circle") == 1


def test_a_plot_places_costs_by_powers_of_ten_and_names_apart():
    points = [Point(f"m{n}", 0.5, (0.4, 0.6), 10.0**n) for n in (-1, 1)] + [Point("x<y", 0.5, None, None)]
    drawn = quality_plot(points, "Title & more", upward="up", across="across", chance=0.0)
    assert "x&lt;y" in drawn and "<title>Title &amp; more</title>" in drawn and "not known" in drawn
    for name in ("0.1", "1", "10"):
        assert f">{name}</text>" in drawn
    assert drawn.count('class="span"') == 2 and drawn.count("<circle") == 3
    assert abs(_free(0.0, 100.0, 50.0, [(0.0, 100.0, 50.0)]) - 100) >= LINE
    assert _free(0.0, 100.0, 50.0, [(200.0, 100.0, 50.0)]) == 100


def test_constant_scores_are_said_to_have_no_score(made, command, tmp_path):
    write_jsonl(tmp_path / "same.jsonl", [{"id": row["id"], "score": 1.0} for row in ROWS])
    words = ["evaluate", "lds", made[0], "--scores", f"same={tmp_path / 'same.jsonl'}"]
    code, said, complaint = command(*words, "-o", tmp_path / "same.svg")
    assert code == 0 and "No method has a score: none says anything of any member." in said, complaint
    assert "same: left out 3 queries (scores say the same of every member)." in " ".join(said.split())
    assert (tmp_path / "same.svg").read_text().count("<circle") == 0
    row = json.loads(command(*words, "--json")[1])["rows"][0]
    assert row["lds"] is None and row["left_out"] == {"scores say the same of every member": 3}
