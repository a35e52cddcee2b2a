"""A plot of methods: quality upward with intervals, cost across on a scale of powers of ten; light or dark.

A method whose cost nobody knows stands in a column of its own, at the right.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from whence.reports.svg import COLOURS, Scale, dot, escaped, number, text

LEFT, TOP, WIDTH, HEIGHT = 56.0, 44.0, 470.0, 320.0
UNKNOWN = 70.0
"""Width of the column of unknown costs."""
LABELS = 170.0
"""Room for names at the right."""
LINE = 14.0
"""Height of a name."""
STYLE = (
    "svg{font:13px system-ui,sans-serif;background:#fff}text{fill:#1c2024}.title{font-weight:600;font-size:15px}"
    ".axis{fill:#6b7280;font-size:11px}.name{font-size:12px}.frame{fill:none;stroke:#d5d9de}.grid{stroke:#eceff2}"
    ".zero{stroke:#9aa1ab;stroke-dasharray:3 3}.span{stroke-width:2}"
    "@media(prefers-color-scheme:dark){svg{background:#14171a}text{fill:#e6e8ea}.axis{fill:#9aa1ab}"
    ".frame{stroke:#3a4048}.grid{stroke:#23282e}}"
)


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
    width, height = LEFT + WIDTH + UNKNOWN + LABELS, TOP + HEIGHT + 44
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escaped(title)}</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


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
    parts, taken = [], list[tuple[float, float, float]]()
    for point, colour in zip(points, itertools.cycle(COLOURS), strict=False):
        x = run(math.log10(point.cost)) if point.cost else LEFT + WIDTH + UNKNOWN / 2
        y = rise(point.value)
        words = f"{point.name}: {number(point.value, '.3f')}"
        if point.interval is not None:
            low, high = (rise(end) for end in point.interval)
            parts.append(
                f'<line class="span" stroke="{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            )
            words += f" ({number(point.interval[0], '.3f')} to {number(point.interval[1], '.3f')})"
        parts.append(dot(x, y, words, fill=colour))
        width = 7.0 * len(point.name) + 10
        place = _free(x, y, width, taken)
        taken.append((x, place, width))
        parts.append(text(x + 8, place + 4, point.name, "name"))
    return parts


def _free(x: float, y: float, width: float, taken: Sequence[tuple[float, float, float]]) -> float:
    """Nearest height at which a name does not lie over another."""
    near = [place for left, place, wide in taken if left < x + width and x < left + wide]
    steps = (sign * LINE / 2 * count for count in range(60) for sign in (1, -1))
    return next((y + step for step in steps if all(abs(y + step - place) >= LINE for place in near)), y)
