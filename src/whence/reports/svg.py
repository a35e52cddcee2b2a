"""Pieces of pictures: scales, ticks, dots, the frame of a scatter.

Names come from files: all text is escaped here. `COLOURS` tell kinds apart; they are of middle lightness, so that they
stand out from light paper and from dark. Everything else is coloured by the style that a picture stands under.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from whence.reports.text import encodable, visible

COLOURS = ("#4a7fd6", "#cf7420", "#3d9a62", "#c94f7c", "#8a6cc4", "#2398a0", "#a68a12", "#c5534a", "#6f8f3a", "#8c6d5a")
"""Colours of evaluation sets or partitions, in order."""
REST = "#868e99"
"""Colour of what has none of its own."""
MINUS = "\N{MINUS SIGN}"
SIDE, LEFT, TOP, RIGHT, BOTTOM = 200.0, 34.0, 14.0, 6.0, 34.0
"""Side of a scatter's square, and its margins, in px."""


def escaped(text: str) -> str:
    """Text as HTML that shows it: escaped, its control characters visible, lone surrogates replaced."""
    return escape(visible(encodable(text)))


def number(value: float | None, form: str) -> str:
    """A number in some form, with a minus sign as wide as a plus and none before zeros; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    formatted = format(value, form)
    return formatted.replace("-", MINUS if formatted.strip("-+0.,%") else "")


@dataclass(frozen=True)
class Scale:
    """Numbers as places on a line.

    >>> Scale(2.0, 4.0, 100.0, 0.0)(2.5)
    75.0
    """

    low: float
    high: float
    start: float
    """Place of `low`."""
    end: float

    @classmethod
    def spanning(cls, values: Iterable[float], start: float, end: float, margin: float = 0.06) -> "Scale":
        """A scale from the least of some finite values to the largest, and a little more on either side."""
        known = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(known), max(known)
        if high - low <= 1e-9 * max(1.0, abs(low)):
            low, high = low - 0.5, high + 0.5
        room = margin * (high - low)
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        """Place of a number."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 4) -> dict[float, str]:
        """Round numbers on the line with their names, about `most`.

        >>> Scale(-0.31, 0.5, 0.0, 1.0).ticks()
        {-0.25: '−0.25', 0.0: '0.00', 0.25: '0.25', 0.5: '0.50'}
        """  # noqa: RUF002
        rough = (self.high - self.low) / most
        power = math.floor(math.log10(rough))
        factor = next(factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * 10.0**power >= rough * (1 - 1e-9))
        step = factor * 10.0**power
        digits = max(0, -power + (factor == 2.5) - (factor == 10.0))
        counts = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return {count * step: number(count * step, f".{digits}f") for count in counts}


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words at a place."""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(words)}</text>'


def dot(x: float, y: float, tooltip: str = "", *, kind: str = "", fill: str = "", radius: float = 4.0) -> str:
    """A circle, with what is said of it on hovering."""
    inner = f"<title>{escaped(tooltip)}</title>" if tooltip else ""
    how = "".join(f' {name}="{value}"' for name, value in (("class", kind), ("fill", fill)) if value)
    return f'<circle{how} cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">{inner}</circle>'


def picture(kind: str, width: float, height: float, title: str, drawn: Iterable[str]) -> str:
    """A picture with a title, for those who do not see it."""
    size = f'viewBox="0 0 {width:g} {height:g}"'
    return f'<svg class="{kind}" {size} role="img"><title>{escaped(title)}</title>{"".join(drawn)}</svg>'


PAPER = (
    "svg{font:13px system-ui,sans-serif;background:#fff;max-width:100%;height:auto}text{fill:#1c2024}"
    ".title{font-weight:600;font-size:15px}.axis{fill:#6b7280;font-size:11px}.frame{fill:none;stroke:#d5d9de}"
    ".grid{stroke:#eceff2}.zero{stroke:#9aa1ab;stroke-dasharray:3 3}"
    ".name{font-size:12px;paint-order:stroke;stroke:#fff;stroke-width:4px;stroke-linejoin:round}"
)
INK = (
    "svg{background:#14171a}text{fill:#e6e8ea}.axis{fill:#9aa1ab}.frame{stroke:#3a4048}.grid{stroke:#23282e}"
    ".name{stroke:#14171a}"
)
"""The style of a picture that stands alone, on light paper and on dark."""


def document(title: str, width: float, height: float, drawn: Iterable[str], *, style: str = "", dark: str = "") -> str:
    """A picture in a file of its own, light or dark as its reader's pages are, and no wider than the window.

    Args:
        title: For those who do not see it.
        width: In px, where there is room.
        height: In px.
        drawn: What is in it.
        style: Rules beside `PAPER`.
        dark: Rules beside `INK`.
    """
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    rules = f"{PAPER}{style}@media(prefers-color-scheme:dark){{{INK}{dark}}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escaped(title)}</title>'
        f"<style>{rules}</style>{''.join(drawn)}</svg>\n"
    )


def scales(across: Sequence[float], upward: Sequence[float]) -> tuple[Scale, Scale]:
    """The two scales of a scatter."""
    return Scale.spanning(across, LEFT, LEFT + SIDE), Scale.spanning(upward, TOP + SIDE, TOP)


def scatter(title: str, across: Scale, upward: Scale, names: tuple[str, str], drawn: Iterable[str]) -> str:
    """A square with round numbers on both axes and the axes' names, and what is drawn in it."""
    right, foot = LEFT + SIDE, TOP + SIDE
    parts = [
        f'<line class="grid" x1="{across(value):.1f}" x2="{across(value):.1f}" y1="{TOP:g}" y2="{foot:g}"/>'
        + text(across(value), foot + 14, name, anchor="middle")
        for value, name in across.ticks().items()
    ]
    parts += [
        f'<line class="grid" x1="{LEFT:g}" x2="{right:g}" y1="{upward(value):.1f}" y2="{upward(value):.1f}"/>'
        + text(LEFT - 5, upward(value) + 4, name, anchor="end")
        for value, name in upward.ticks().items()
    ]
    parts.append(text(right, foot + 29, names[0], "name", "end"))
    parts.append(text(LEFT, TOP - 4, names[1], "name"))
    return picture("scatter", LEFT + SIDE + RIGHT, TOP + SIDE + BOTTOM, title, [*parts, *drawn])


LONGEST_LABEL = 18
"""Characters of a corner's name."""
CORNERS = ((30.0, 196.0), (230.0, 196.0), (130.0, 23.0))
"""Corners of the triangle, in px."""


def inside_triangle(shares: Sequence[float]) -> tuple[float, float]:
    """Place of a mixture of three in their triangle: the mean of its corners, weighted by shares."""
    x, y = (math.fsum(share * corner[axis] for share, corner in zip(shares, CORNERS, strict=True)) for axis in (0, 1))
    return x, y


def triangle(title: str, corners: Mapping[str, str], drawn: Iterable[str]) -> str:
    """A triangle with lines of equal share at its quarters, its corners named, each in its colour."""
    parts = []
    for first in range(3):
        for share in (0.0, 0.25, 0.5, 0.75):
            ends = []
            for other in ((first + 1) % 3, (first + 2) % 3):
                shares = [0.0, 0.0, 0.0]
                shares[first], shares[other] = share, 1 - share
                ends.append(inside_triangle(shares))
            (x1, y1), (x2, y2) = ends
            kind = "grid" if share else "edge"
            parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    patches, places = ((17.0, 204.0), (243.0, 204.0), (130.0, 9.0)), ((6.0, "start"), (254.0, "end"), (140.0, "start"))
    for (name, colour), (cx, cy), (x, anchor) in zip(corners.items(), patches, places, strict=True):
        label = name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"
        parts.append(dot(cx, cy, fill=colour, radius=5.0))
        parts.append(text(x, cy + (4 if cy < 100 else 19), label, "corner", anchor))
    return picture("triangle", 260.0, 226.0, title, [*parts, *drawn])


def swatch(colour: str) -> str:
    """A patch of colour in a line of text."""
    patch = f'<rect width="10" height="10" fill="{colour}"/>'
    return f'<svg class="swatch" viewBox="0 0 10 10" aria-hidden="true">{patch}</svg>'


def stack(shares: Mapping[str, float], colours: Mapping[str, str]) -> str:
    """Shares of 1 as one bar, in the order of `colours`; those without one stand last, as one."""
    parts = [(f"{name} {shares[name]:.1%}", shares[name], colour) for name, colour in colours.items() if name in shares]
    rest = math.fsum(share for name, share in shares.items() if name not in colours)
    parts += [(f"others {rest:.1%}", rest, REST)] if rest > 0 else []
    drawn, x = [], 0.0
    for tooltip, share, colour in parts:
        if share > 0:
            place = f'x="{100 * x:.2f}" y="0" width="{100 * share:.2f}" height="10"'
            drawn.append(f'<rect {place} fill="{colour}"><title>{escaped(tooltip)}</title></rect>')
        x += share
    title = f"<title>{escaped(', '.join(tooltip for tooltip, share, _ in parts if share > 0))}</title>"
    size = 'viewBox="0 0 100 10" preserveAspectRatio="none"'
    return f'<svg class="stack" {size} role="img">{title}{"".join(drawn)}</svg>'
