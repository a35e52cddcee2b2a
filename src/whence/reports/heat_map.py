"""A heat map of a page: cells from blue, below 0, to orange, above; its head, and what the colours mean."""

import math
from collections.abc import Iterable

from whence.reports.svg import escaped, number

STRENGTHS = 10
"""Strengths of a heat map's colours on either side of 0."""


def heat_head(names: Iterable[str], *first: str) -> str:
    """Names of a heat map's columns, as text; those upright in `first`, the others on end, for they are many."""
    upright = "".join(f"<th>{escaped(name)}</th>" for name in first)
    return upright + "".join(f'<th class="end"><span>{escaped(name)}</span></th>' for name in names)


def heat_cell(value: float, largest: float, text: str, tooltip: str, *, is_best: bool = False) -> str:
    """A cell in blue below 0 and in orange above, as strong as the square root of the value's share of the largest.

    Args:
        value: What the colour tells.
        largest: The magnitude of full strength.
        text: What stands in the cell.
        tooltip: What hovering says.
        is_best: Whether it is the best of its column.
    """
    best = " best" if is_best else ""
    return f'<td class="{_heat(value, largest)}{best}" title="{escaped(tooltip)}">{escaped(text)}</td>'


def _heat(value: float, largest: float) -> str:
    """Classes of a colour."""
    if not (math.isfinite(value) and largest > 0):
        return "n"
    strength = round(STRENGTHS * math.sqrt(min(1.0, abs(value) / largest)))
    return f"n {'below' if value < 0 else 'above'} s{strength}" if strength else "n"


def ramp(largest: float, unit: str) -> str:
    """What colours of a heat map mean."""
    strengths = [step / STRENGTHS for step in range(-STRENGTHS, STRENGTHS + 1)]
    drawn = "".join(
        f'<rect class="{_heat(strength * abs(strength), 1.0)}" x="{10 * place}" y="0" width="10" height="10"/>'
        for place, strength in enumerate(strengths)
    )
    form = "+.2g" if largest < 10 else "+.3g"
    ends = [number(share * largest, form) for share in (-1.0, -0.25, 0.25, 1.0)]
    names = "".join(
        f'<text x="{x}" y="23" text-anchor="middle">{name}</text>'
        for x, name in zip((5, 55, 155, 205), ends, strict=True)
    )
    middle = '<text x="105" y="23" text-anchor="middle">0</text>'
    title = f"<title>Colours, from {ends[0]} to {ends[-1]} {escaped(unit)}</title>"
    size = 'viewBox="-16 0 242 26"'
    return f'<svg class="ramp-of" {size} role="img">{title}{drawn}{names}{middle}</svg>'
