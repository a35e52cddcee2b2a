"""A choice that keeps one of the task's answers alone is told as such, however well it scores."""

import pytest
from rich.console import Console

from whence.reports.select_page import select_page
from whence.reports.select_tables import select_tables
from whence.selection.answers import answer_shares, collapse
from whence.selection.pipeline import select

THREE = ["World"] * 6 + ["Sports"] * 5 + ["Business"] * 5


def warning(chosen, examples=THREE, takes_turns=False):
    return collapse(answer_shares(chosen, examples), len(chosen), takes_turns=takes_turns)


def test_eighty_rows_of_one_label_are_a_collapse():
    text = warning(["Sports "] * 80)
    assert "'sports' is 100% of the rows and 31% of the task's examples" in text
    assert "'world' is 0% of the rows and 38%" in text and "--by example --selector round_robin" in text
    assert "bm25" in warning(["Sports"] * 80, takes_turns=True)


@pytest.mark.parametrize(
    "chosen",
    [
        ["Sports"] * 30 + ["World"] * 28 + ["Business"] * 22,
        ["Sports"] * 38 + ["World"] * 30 + ["Business"] * 12,
        ["Sports"] * 3 + ["other text", "and more", None] * 20,  # too few to say
        [f"text {n}" for n in range(80)],
        ["Sports"] * 4,
    ],
)
def test_choices_that_keep_the_labels_are_none(chosen):
    assert warning(chosen) is None


def test_a_label_that_is_missed_is_named():
    assert "'business' is 0%" in warning(["Sports"] * 20 + ["World"] * 20 + [f"text {n}" for n in range(40)])


def test_one_answer_to_free_questions_is_a_collapse_too():
    assert "'yes' is 75% of the rows and 0%" in warning(["Yes"] * 30 + [f"text {n}" for n in range(10)], ["a b", "c d"])
    assert answer_shares([f"text {n}" for n in range(9)], ["a b", "c d"]) == []


def test_the_screen_the_page_and_the_notes_say_it():
    pool = [{"prompt": f"ball game {n}", "completion": "<b>Sports"} for n in range(20)]
    pool += [{"prompt": f"vote {n}", "completion": "World"} for n in range(20)]
    tasks = [{"prompt": f"ball {n}", "completion": "<b>Sports" if n % 2 else "World"} for n in range(100, 108)]
    chosen = select(pool, tasks, method="bm25", count=15)
    assert [tuple(share) for share in chosen.answers] == [("world", 0.5, 0.0, 0), ("<b>sports", 0.5, 1.0, 15)]
    assert "'<b>sports' is 100% of the rows and 50%" in chosen.selection.notes[-1]
    console = Console(width=200)
    with console.capture() as printed:
        console.print(select_tables(chosen))
    assert "of the task's examples" in printed.get() and "may unlearn" in printed.get()
    page = select_page(chosen)
    assert "What the rows answer" in page and "&lt;b&gt;sports" in page and "<b>sports" not in page
