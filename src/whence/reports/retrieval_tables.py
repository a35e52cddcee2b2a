"""What a person sees of `evaluate retrieval`: methods in the terminal, and a plot of quality against cost."""

from rich.console import Group, RenderableType
from rich.text import Text

from whence.counts import number_of
from whence.evaluation.retrieval import MAIN, RetrievalMarks, RetrievalTable
from whence.reports.lds_tables import interval_text
from whence.reports.quality_plot import Point, quality_plot
from whence.reports.svg import number
from whence.reports.text import visible
from whence.reports.wide_table import WideTable

TITLE = "Finding rows that are known to be behind an answer"
HEADS = {"auroc": "auROC", "auprc": "auPRC", "mrr": "MRR"}


def retrieval_tables(table: RetrievalTable) -> RenderableType:
    """Methods side by side, best first."""
    best = table.marks[0]
    others = [name for name in best.estimates if name != MAIN]
    heads = ["auPRC", "95%", "below the best", *(HEADS.get(name, name) for name in others), "seconds"]
    drawn = WideTable("Are the rows found that are known to be behind an answer?", "method", heads)
    for marks in table.marks:
        main, gap = marks.estimates[MAIN], marks.below_best
        cells = [Text(number(main.value, ".3f"), "green" if gap is best.below_best else ""), interval_text(main)]
        cells.append("" if marks is best else f"{number(gap.value, '.3f')} ({interval_text(gap)})")
        cells += [number(marks.estimates[name].value, ".3f") for name in others]
        cells.append(number(marks.seconds, ".3g"))
        drawn.add_row(Text(visible(marks.method), "bold" if marks is best else ""), cells)
    share = table.relevant / table.candidates
    about = (
        f"Means over {number_of(table.queries, 'query', 'queries')}; {table.relevant:,.1f} of {table.candidates:,} "
        f"rows are relevant to one, so that chance has an auPRC of about {share:.3f} and an auROC of 0.5. Intervals "
        "are over queries. |method| ranks by magnitude, whatever the sign."
    )
    return Group(drawn, Text(""), *(Text(visible(note)) for note in table.notes), Text(about, "dim"))


def retrieval_answer(table: RetrievalTable) -> str:
    """Which method finds the relevant rows best, and whether surely better than the next one, in a sentence."""
    best, *rest = table.marks
    main, mrr = best.estimates[MAIN], best.estimates["mrr"]
    answer = f"{visible(best.method)} finds the rows best: auPRC {number(main.value, '.2f')}"
    answer += f" ({interval_text(main)})" if main.interval is not None else ""
    answer += f", MRR {number(mrr.value, '.2f')}"
    if not rest:
        return f"{answer}."
    level = [marks.method for marks in rest if not marks.below_best.is_above_zero]
    if not level:
        return f"{answer}, surely above each other method."
    return f"{answer}; it is not surely above {', '.join(map(visible, level))}."


def retrieval_plot(table: RetrievalTable) -> str:
    """Quality upward, cost across: one SVG, light or dark as the page is."""
    points = [_point(marks) for marks in table.marks]
    upward, chance = "auPRC, mean over queries, with 95% intervals", table.relevant / table.candidates
    return quality_plot(points, TITLE, upward=upward, across="cost, in seconds", chance=chance)


def _point(marks: RetrievalMarks) -> Point:
    main = marks.estimates[MAIN]
    return Point(marks.method, main.value, main.interval, marks.seconds)
