"""What a person sees of `evaluate removal` and `addition`: methods in the terminal, and a plot against their cost."""

from rich.console import Group, RenderableType
from rich.text import Text

from whence.counts import number_of
from whence.evaluation.method_scores import RANDOM
from whence.evaluation.removal import RemovalMarks, RemovalTable
from whence.reports.lds_tables import interval_text
from whence.reports.quality_plot import Point, quality_plot
from whence.reports.svg import number
from whence.reports.text import visible
from whence.reports.wide_table import WideTable

TITLES = {
    "removal": "How much does leaving the top rows out raise the loss?",
    "addition": "How much do the top rows alone lower the loss?",
}


def removal_tables(table: RemovalTable) -> RenderableType:
    """Methods side by side, best first."""
    how = table.settings
    seeds = [f"seed {seed}" for seed in range(1, how["seeds"] + 1)] if how["seeds"] > 1 else []
    drawn = WideTable(
        TITLES[how["way"]], "method", ["effect", "95%", "over random", "95% ", "below best", "95%  ", *seeds, "seconds"]
    )
    for marks in table.marks:
        is_random = marks.method == RANDOM
        colour = "green" if marks.over_random.is_above_zero else ""
        cells = [
            number(marks.effect.value, "+.4f"),
            interval_text(marks.effect, "+.4f"),
            "" if is_random else Text(number(marks.over_random.value, "+.4f"), colour),
            "" if is_random else interval_text(marks.over_random, "+.4f"),
            "" if marks is table.marks[0] else number(marks.below_best.value, ".4f"),
            "" if marks is table.marks[0] else interval_text(marks.below_best, ".4f"),
            *(number(value, "+.4f") for value in (marks.by_seed if seeds else ())),
            number(marks.seconds, ".3g"),
        ]
        drawn.add_row(Text(visible(marks.method), "bold" if is_random else ""), cells)
    what = "without the rows less with all" if how["way"] == "removal" else "before training less after it"
    lists = "each query's own" if how["each_query"] else "those of the mean score over queries"
    about = (
        f"Loss {what}, in nats a token, mean of {number_of(how['queries'], 'query', 'queries')} and "
        f"{number_of(how['seeds'], 'seed')}; top {number_of(how['rows'], 'row')}: {lists}. Green: the whole "
        "interval is above as many random rows."
    )
    return Group(drawn, Text(""), *(Text(visible(note)) for note in table.notes), Text(about, "dim"))


def removal_answer(table: RemovalTable) -> str:
    """Which method's top rows matter most, and whether that may be chance, in a sentence."""
    methods = [marks for marks in table.marks if marks.method != RANDOM]
    how = table.settings
    if not methods:
        return f"Only random rows were graded: {number(table.marks[0].effect.value, '+.3g')} nats a token."
    best, rows = methods[0], number_of(how["rows"], "row")
    verb = "Leaving out" if how["way"] == "removal" else "Training on"
    does = "raises the loss" if how["way"] == "removal" else "alone lowers the loss"
    answer = (
        f"{verb} the top {rows} of {visible(best.method)} {does} most: by {number(best.effect.value, '.3g')} nats a "
        f"token, {number(best.over_random.value, '+.3g')} against random rows "
        f"(95%: {interval_text(best.over_random, '+.4f')})"
    )
    if not best.over_random.is_above_zero:
        return f"{answer}, which may be chance."
    return f"{answer}." if how["seeds"] > 1 else f"{answer}; one training each says nothing of another."


def removal_plot(table: RemovalTable) -> str:
    """Quality upward, cost across: one SVG, light or dark as the page is."""
    training = table.settings["training_seconds"]
    points = [_point(marks, training) for marks in table.marks if marks.method != RANDOM]
    upward = "nats a token over random rows, with 95% intervals"
    return quality_plot(
        points, TITLES[table.settings["way"]], upward=upward, across="cost, in trainings of the run", chance=0.0
    )


def _point(marks: RemovalMarks, training: float) -> Point:
    cost = None if marks.seconds is None or not training else marks.seconds / training
    return Point(marks.method, marks.over_random.value, marks.over_random.interval, cost)
