"""What a person sees of a join: correlations in the terminal, and a scatter of scores against changes."""

import itertools
import math

from rich.console import Group, RenderableType
from rich.text import Text

from whence.evaluation.joining import Join, standardised
from whence.reports.svg import COLOURS, document, dot, text
from whence.reports.text import visible
from whence.reports.wide_table import WideTable

SIZE, LEFT, TOP = 260.0, 64.0, 44.0
TITLE = "Scores summed by partition against the loss without that partition"


def join_tables(join: Join) -> RenderableType:
    """Correlations by method, then the partitions that were needed most and least by each set."""
    sets = list(dict.fromkeys(row["set"] for row in join.points))
    title = "Do summed scores say what leaving a partition out does?"
    table = WideTable(title, "method", ["Spearman", "95%", *sets])
    for method, marks in join.correlations.items():
        by_set = [f"{marks['by set'][name]:.2f}" for name in sets]
        whole = [f"{marks['spearman']:.2f}", f"{marks['low']:.2f} to {marks['high']:.2f}"]
        table.add_row(Text(method), [*whole, *by_set])
    lines: list[RenderableType] = [table, Text("")]
    first = next(iter(join.correlations))
    for name in sets:
        by_change = sorted((row for row in join.points if row["set"] == name and row["method"] == first),
                     key=lambda row: -row["change"])  # fmt: skip
        most = (
            f"{name}: most missed {by_change[0]['partition']} ({by_change[0]['change']:+.3f} nats without it), least "
        )
        lines.append(Text(visible(f"{most}{by_change[-1]['partition']} ({by_change[-1]['change']:+.3f})"), "dim"))
    return Group(*lines)


def join_answer(join: Join) -> str:
    """Whether summed scores say what leaving a partition out does, in a sentence."""
    best = max(join.correlations, key=lambda name: _or_lowest(join.correlations[name]["spearman"]))
    marks = join.correlations[best]
    by = f"{best} has Spearman {marks['spearman']:.2f} (95%: {marks['low']:.2f} to {marks['high']:.2f})"
    among = f", the best of {len(join.correlations)}" if len(join.correlations) > 1 else ""
    if marks["low"] > 0:
        return f"Yes, summed scores say in part what leaving a partition out does: {by}{among}."
    if marks["high"] < 0:
        return f"No, summed scores say the opposite of what leaving a partition out does: {by}{among}."
    return f"Not surely: summed scores may say nothing of what leaving a partition out does; {by}{among}."


def _or_lowest(correlation: float) -> float:
    return correlation if math.isfinite(correlation) else -2.0


def join_plot(join: Join) -> str:
    """A panel each method: summed score across, change upward, both standardised in each set; light or dark."""
    methods = list(join.correlations)
    sets = list(dict.fromkeys(row["set"] for row in join.points))
    width, height = LEFT + len(methods) * (SIZE + 40), TOP + SIZE + 60 + 18 * ((len(sets) + 3) // 4)
    colours = dict(zip(sets, itertools.cycle(COLOURS), strict=False))
    parts = []
    for number, method in enumerate(methods):
        x0 = LEFT + number * (SIZE + 40)
        marks = join.correlations[method]
        parts.append(text(x0, TOP - 18, method, "title"))
        words = f"Spearman {marks['spearman']:.2f} ({marks['low']:.2f} to {marks['high']:.2f})"
        parts.append(text(x0, TOP - 4, words, "axis"))
        parts.append(f'<rect class="frame" x="{x0}" y="{TOP}" width="{SIZE}" height="{SIZE}"/>')
        for name in sets:
            rows = [row for row in join.points if row["method"] == method and row["set"] == name]
            across, upward = (standardised([row[key] for row in rows]) for key in ("score", "change"))
            for row, x, y in zip(rows, across, upward, strict=True):
                cx, cy = (SIZE / 2 * (1 + max(-1.0, min(1.0, value / 3))) for value in (x, -y))
                words = f"{row['partition']} for {name}: {row['change']:+.3f} nats without it"
                parts.append(dot(x0 + cx, TOP + cy, words, fill=colours[name]))
    for place, name in enumerate(sets):
        x, y = LEFT + 160.0 * (place % 4), TOP + SIZE + 44.0 + 18.0 * (place // 4)
        parts.append(dot(x, y - 4, fill=colours[name]))
        parts.append(text(x + 10, y, name, "axis"))
    words = "score, summed over a partition's rows, standardised in each set"
    parts.append(text(LEFT, TOP + SIZE + 20, words, "axis"))
    upward = text(0.0, 0.0, "loss without it", "axis", "middle")
    parts.append(f'<g transform="translate(20 {TOP + SIZE / 2}) rotate(-90)">{upward}</g>')
    return document(TITLE, width, height, parts, style="circle{fill-opacity:.75}")
