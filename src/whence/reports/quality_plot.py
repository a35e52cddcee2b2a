"""A plot of methods: quality upward with intervals, cost across on a scale of powers of ten; light or dark.

Names stand at the right of their dots, at the left where the frame ends, and never over another name or a dot.

A method whose cost nobody knows stands in a column of its own, at the right.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from whence.reports.svg import COLOURS, Scale, document, dot, number, text

LEFT, TOP, WIDTH, HEIGHT = 56.0, 44.0, 470.0, 320.0
UNKNOWN = 70.0
"""Width of the column of unknown costs."""
LABELS = 170.0
"""Room for the names of that column."""
MARGIN = 16.0
"""Room at the right where there is no such column."""
MANY = (*COLOURS, "#64748b", "#b04fb5")
"""Colours of methods, of which there are a dozen."""
DOT = 4.0
"""Radius of a dot."""
CHARACTER = 7.0
"""Width of a letter of a name, at most."""
LINE = 14.0
"""Height of a name."""


@dataclass(frozen=True)
class Point:
    """One method."""

    name: str
    value: float
    """Its quality; a method without one is not drawn."""
    interval: tuple[float, float] | None
    cost: float | None
    """Above 0; None where nobody knows it."""


def quality_plot(points: Sequence[Point], title: str, *, upward: str, across: str, chance: float | None = None) -> str:
    """One SVG.

    Args:
        points: Methods.
        title: For those who do not see it, and above the plot.
        upward: Name of the quality.
        across: Name of the cost.
        chance: Quality of chance, a dashed line.
    """
    drawn = [point for point in points if math.isfinite(point.value)]
    ends = [end for point in drawn for end in (point.value, *(point.interval or ()))]
    ends += [] if chance is None else [chance]
    rise = Scale.spanning(ends, TOP + HEIGHT, TOP)
    known = [math.log10(point.cost) for point in drawn if point.cost]
    low, high = (math.floor(min(known)), math.ceil(max(known))) if known else (-1, 0)
    run = Scale(float(low), float(max(high, low + 1)), LEFT + 12, LEFT + WIDTH - 12)
    parts = [*_frame(rise, run, any(not point.cost for point in drawn)), text(16.0, 22.0, title, "title")]
    if chance is not None:
        right, place = LEFT + WIDTH, rise(chance)
        parts.append(f'<line class="zero" x1="{LEFT:g}" x2="{right:g}" y1="{place:.1f}" y2="{place:.1f}"/>')
    parts += _methods(drawn, rise, run)
    parts.append(text(LEFT, TOP - 6, upward, "axis"))
    parts.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 32, across, "axis", "middle"))
    right = UNKNOWN + LABELS if any(not point.cost for point in drawn) else MARGIN
    return document(title, LEFT + WIDTH + right, TOP + HEIGHT + 44, parts, style=".span{stroke-width:2}")


def _frame(rise: Scale, run: Scale, has_unknown: bool) -> list[str]:
    parts = [f'<rect class="frame" x="{LEFT:g}" y="{TOP:g}" width="{WIDTH:g}" height="{HEIGHT:g}"/>']
    for value, name in rise.ticks(6).items():
        y = rise(value)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{LEFT + WIDTH:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 6, y + 4, name, "axis", "end"))
    for power in range(int(run.low), int(run.high) + 1):
        x = run(float(power))
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:g}" y2="{TOP + HEIGHT:g}"/>')
        parts.append(text(x, TOP + HEIGHT + 16, f"{10.0**power:g}", "axis", "middle"))
    if has_unknown:
        parts.append(text(LEFT + WIDTH + UNKNOWN / 2, TOP + HEIGHT + 16, "not known", "axis", "middle"))
    return parts


def _methods(points: Sequence[Point], rise: Scale, run: Scale) -> list[str]:
    """Intervals, on them the dots, and on these the names."""
    spans, dots, names, taken = list[str](), list[str](), list[str](), list[tuple[float, float, float]]()
    unknown = [point.name for point in points if not point.cost]
    gap = UNKNOWN / (len(unknown) + 1)
    xs = [run(math.log10(point.cost)) if point.cost else LEFT + WIDTH + gap * (1 + unknown.index(point.name))
          for point in points]  # fmt: skip
    places = [(x, rise(point.value)) for x, point in zip(xs, points, strict=True)]
    taken += [(x - DOT, y, 2 * DOT) for x, y in places]
    for point, (x, y), colour in zip(points, places, itertools.cycle(MANY), strict=False):
        words = f"{point.name}: {number(point.value, '.3f')}"
        if point.interval is not None:
            low, high = (rise(end) for end in point.interval)
            spans.append(
                f'<line class="span" stroke="{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            )
            words += f" ({number(point.interval[0], '.3f')} to {number(point.interval[1], '.3f')})"
        dots.append(dot(x, y, words, fill=colour))
        width = CHARACTER * len(point.name) + 4
        is_left = bool(point.cost) and x + 2 * DOT + width > LEFT + WIDTH
        start = x - 2 * DOT - width if is_left else x + 2 * DOT
        place = _free(start, y, width, taken)
        taken.append((start, place, width))
        names.append(
            text(start + width if is_left else start, place + 4, point.name, "name", "end" if is_left else "start")
        )
    return spans + dots + names


def _free(x: float, y: float, width: float, taken: Sequence[tuple[float, float, float]]) -> float:
    """Nearest height at which a name does not lie over another, or over a dot of another."""
    near = [place for left, place, wide in taken if left < x + width and x < left + wide]
    steps = (sign * LINE / 2 * count for count in range(60) for sign in (1, -1))
    return next((y + step for step in steps if all(abs(y + step - place) >= LINE for place in near)), y)
