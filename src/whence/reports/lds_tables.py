"""What a person sees of `evaluate lds`: methods in the terminal, and a plot of quality against cost."""

from rich.console import Group, RenderableType
from rich.text import Text

from whence.counts import number_of
from whence.evaluation.bank_scores import LdsResult
from whence.evaluation.estimates import Estimate
from whence.evaluation.lds import LdsMarks
from whence.reports.quality_plot import Point, quality_plot
from whence.reports.svg import number
from whence.reports.text import visible
from whence.reports.wide_table import WideTable

TITLE = "Linear datamodeling score against cost"


def lds_tables(result: LdsResult) -> RenderableType:
    """Methods side by side, best first, then what was left out."""
    table = result.table
    heads = ["LDS", "95%", "below the best", "mean loss", "95% ", "Pearson", "queries", "trainings"]
    title = "Do summed scores say how retrainings end?"
    drawn, best = WideTable(title, "method", heads), table.marks[0].method
    for marks in table.marks:
        gap = table.difference(best, marks.method)
        colour = "" if marks.spearman.interval is None else "green" if marks.spearman.is_above_zero else "dim"
        cost = result.costs.get(marks.method)
        drawn.add_row(
            Text(visible(marks.method), "bold" if marks.method == best else ""),
            [
                Text(number(marks.spearman.value, ".3f"), colour),
                interval_text(marks.spearman),
                "" if marks.method == best else f"{number(gap.value, '.3f')} ({interval_text(gap)})",
                number(marks.of_mean.value, ".3f"),
                interval_text(marks.of_mean),
                number(marks.pearson.value, ".3f"),
                f"{marks.queries:,}",
                number(cost, ".3g"),
            ],
        )
    lines = [*_left_out(table.marks), *table.notes]
    about = (
        f"Spearman's correlation of summed scores with the losses of {number_of(table.members, 'retraining')}, mean "
        "over queries; of their mean loss; cost in trainings. Green: its interval is above 0, which is chance. "
        "Intervals are of other subsets and other queries; the difference from the best is of the same ones."
    )
    return Group(drawn, Text(""), *(Text(visible(line)) for line in lines), Text(about, "dim"))


def interval_text(estimate: Estimate, kind: str = ".3f", missing: str = "-") -> str:
    """An interval in words, each end as a format says, or what stands where there is none."""
    if estimate.interval is None:
        return missing
    low, high = (number(end, kind) for end in estimate.interval)
    return f"{low} to {high}"


def _left_out(marks: list[LdsMarks]) -> list[str]:
    return [
        f"{line.method}: left out {number_of(count, 'query', 'queries')} ({reason})."
        for line in marks
        for reason, count in line.left_out.items()
    ]


def lds_answer(result: LdsResult) -> str:
    """Which method predicts retrainings best, how well, and whether that is more than the next one, in a sentence."""
    marks = result.table.marks
    best = marks[0]
    if not best.queries:
        return "No method has a score: none says anything of any member."
    name = visible(best.method)
    cost = result.costs.get(best.method)
    price = "" if cost is None else f", at the cost of {number(cost, '.3g')} trainings"
    answer = f"{name} predicts retrainings best: LDS {number(best.spearman.value, '.2f')}"
    if best.spearman.interval is None:
        return f"{answer}{price}; more subsets would tell how sure that is."
    answer += f" (95%: {interval_text(best.spearman, '.2f', 'no interval')}){price}"
    if best.spearman.interval[0] <= 0:
        return f"{answer}, which may be chance; more subsets would tell."
    others = [line.method for line in marks[1:] if line.queries]
    if not others:
        return f"{answer}."
    level = [other for other in others if not result.table.difference(best.method, other).is_above_zero]
    gap = result.table.difference(best.method, others[0])
    second = f"{number(gap.value, '.2f')} above {visible(others[0])} ({interval_text(gap, '.2f', 'no interval')})"
    if not level:
        return f"{answer}, surely above each other method, {second}."
    return f"{answer}, {second}; it is not surely above {', '.join(map(visible, level))}."


def lds_plot(result: LdsResult) -> str:
    """Quality upward, cost across: one SVG, light or dark as the page is."""
    points = [
        Point(marks.method, marks.spearman.value, marks.spearman.interval, result.costs.get(marks.method))
        for marks in result.table.marks
    ]
    return quality_plot(
        points, TITLE, upward="LDS, mean over queries, with 95% intervals", across="cost, in trainings", chance=0.0
    )
