"""What a person sees of `evaluate tail-patch`: methods in the terminal, and a plot of quality against cost."""

from rich.console import Group, RenderableType
from rich.text import Text

from whence.evaluation.method_scores import RANDOM
from whence.evaluation.tail_patch import TailPatchMarks, TailPatchTable
from whence.reports.lds_tables import interval_text
from whence.reports.quality_plot import Point, quality_plot
from whence.reports.svg import number
from whence.reports.text import visible
from whence.reports.wide_table import WideTable

TITLE = "Change of an answer by a step on retrieved rows"


def tail_patch_tables(table: TailPatchTable) -> RenderableType:
    """Methods side by side, best first."""
    heads = ["change", "95%", "over random", "95% ", "helped", "seconds"]
    drawn = WideTable("Does a step on the retrieved rows make the answer more likely?", "method", heads)
    for marks in table.marks:
        colour = "green" if marks.over_random.is_above_zero else ""
        is_random = marks.method == RANDOM
        cells = [
            number(marks.change.value, "+.4g"),
            interval_text(marks.change, "+.4g"),
            "" if is_random else Text(number(marks.over_random.value, "+.4g"), colour),
            "" if is_random else interval_text(marks.over_random, "+.4g"),
            number(marks.helped, ".0%"),
            number(marks.seconds, ".3g"),
        ]
        drawn.add_row(Text(visible(marks.method), "bold" if is_random else ""), cells)
    how = table.settings
    about = (
        f"One step of {how['step']} at a rate of {how['lr']:.3g} on each of a query's {how['top']} highest rows alone, "
        "from the last weights: change of the answer's log probability in nats a token, mean over rows and queries. "
        "Green: surely above random rows. Helped: share of steps that made the answer more likely."
    )
    return Group(drawn, Text(""), *(Text(visible(note)) for note in table.notes), Text(about, "dim"))


def tail_patch_answer(table: TailPatchTable) -> str:
    """Which method's rows help the answers most, and whether surely more than random rows, in a sentence."""
    methods = [marks for marks in table.marks if marks.method != RANDOM]
    if not methods:
        return "Only random rows were graded."
    best = methods[0]
    answer = f"A step on the rows of {visible(best.method)} helps the answers most: "
    answer += f"{number(best.change.value, '+.3g')} nats a token, {number(best.over_random.value, '+.3g')} more than "
    answer += f"random rows (95%: {interval_text(best.over_random, '+.4g')})"
    return f"{answer}." if best.over_random.is_above_zero else f"{answer}, which may be chance."


def tail_patch_plot(table: TailPatchTable) -> str:
    """Quality upward, cost across: one SVG, light or dark as the page is."""
    points = [_point(marks) for marks in table.marks if marks.method != RANDOM]
    upward = "nats a token over random rows, with 95% intervals"
    return quality_plot(points, TITLE, upward=upward, across="cost, in seconds", chance=0.0)


def _point(marks: TailPatchMarks) -> Point:
    return Point(marks.method, marks.over_random.value, marks.over_random.interval, marks.seconds)
