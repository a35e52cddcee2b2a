"""The table of `evaluate selection` in the terminal, and its plot: the gain of every method over chance."""

import math
from collections.abc import Callable
from html import escape

from rich.console import Group, RenderableType
from rich.text import Text

from whence.counts import number_of
from whence.evaluation.choices import EVERYTHING, RANDOM
from whence.evaluation.selection import NOTHING, Line, SelectionTable
from whence.reports.svg import document
from whence.reports.tables import plain_table
from whence.reports.text import visible

TITLE = "Gain in held-out loss over random selection, in nats a token"
BARS = (
    ".value{fill:#6b7280;font-size:11px}.better{stroke:#1a7f4b;fill:#1a7f4b}.worse{stroke:#c0392b;fill:#c0392b}"
    ".level{stroke:#6b7280;fill:#6b7280}line{stroke-width:2}"
)
DARK_BARS = ".value{fill:#9aa1ab}.better{stroke:#4cc38a;fill:#4cc38a}.worse{stroke:#ff8b7e;fill:#ff8b7e}"
"""Colours of methods that are above chance, below it, or neither."""


def evaluate_tables(table: SelectionTable) -> RenderableType:
    """One table a task: loss, gain over chance with its interval, exact match, cost."""
    parts: list[RenderableType] = []
    for task in dict.fromkeys(line.task for line in table.lines):
        drawn = plain_table(visible(task))
        drawn.add_column("method", no_wrap=True, max_width=20, overflow="ellipsis")
        for name in ("loss", "gain", "95%", "exact", "rows", "choice"):
            drawn.add_column(name, justify="right", no_wrap=True)
        for line in sorted((line for line in table.lines if line.task == task), key=lambda line: line.loss):
            drawn.add_row(
                Text(visible(line.method), "bold" if line.method == RANDOM else ""),
                f"{line.loss:.3f}",
                "" if line.gain is None else Text(f"{line.gain:+.3f}", _colour(line)),
                "" if line.gain_interval is None else f"{line.gain_interval[0]:+.3f} to {line.gain_interval[1]:+.3f}",
                f"{line.exact:.1%}",
                f"{line.rows:,.0f}",
                f"{line.select_seconds:.1f} s",
            )
        parts += [drawn, Text("")]
    seeds = len(table.settings.get("seeds", []))
    parts.append(
        Text(f"Loss in nats a token on held-out rows, mean of {seeds} trainings. Gain: how much lower it is than for "
             "random rows. Green: its interval is above chance; red: below.", "dim")
    )  # fmt: skip
    return Group(*parts)


def evaluate_answer(table: SelectionTable) -> str:
    """Which method chose best for how many tasks, and whether that is more than chance, in a sentence."""
    best = best_method(table)
    tasks = list(dict.fromkeys(line.task for line in table.lines))
    if best is None:
        return "Only chance's choice was graded."
    above = [line.task for line in table.lines if line.method == best and (line.gain_interval or (0.0,))[0] > 0]
    gains = [line.gain or 0.0 for line in table.lines if line.method == best]
    mean = math.fsum(gains) / len(gains)
    answer = f"Of the methods, {visible(best)} chose best: {mean:+.3f} nats a token against random rows"
    if above:
        return f"{answer}, surely on {len(above)} of {number_of(len(tasks), 'task')}."
    return f"{answer}, which may be chance; more --seeds would tell."


def best_method(table: SelectionTable) -> str | None:
    """The method of the highest mean gain over chance; None where only chance and the ends of the scale are there."""
    gains: dict[str, list[float]] = {}
    for line in table.lines:
        if line.gain is not None and line.method not in (NOTHING, EVERYTHING):
            gains.setdefault(line.method, []).append(line.gain)
    return max(gains, key=lambda name: math.fsum(gains[name]) / len(gains[name]), default=None)


def _colour(line: Line) -> str:
    low, high = line.gain_interval or (0.0, 0.0)
    return "green" if low > 0 else "red" if high < 0 else ""


def evaluate_plot(table: SelectionTable) -> str:
    """Gain over chance of every method, a panel a task, with intervals: one SVG, light or dark as the page is."""
    tasks = list(dict.fromkeys(line.task for line in table.lines))
    panels: list[str] = []
    top = 34.0
    left = 30 + 7.6 * max(len(visible(line.method)) for line in table.lines)
    for task in tasks:
        lines = [line for line in table.lines if line.task == task and line.gain is not None and line.method != NOTHING]
        lines.sort(key=lambda line: -(line.gain or 0.0))
        ends = [end for line in lines for end in line.gain_interval or ()] + [0.0]
        scale = _scale(min(ends), max(ends), left)
        panels.append(_text(16.0, top, task, "title"))
        for number, line in enumerate(lines):
            panels += _bar(line, top + 24.0 + 22.0 * number, scale, left)
        zero = scale(0.0)
        bottom = top + 24 + 22 * len(lines)
        panels.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{top + 8}" y2="{bottom - 8}"/>')
        panels.append(_text(zero, bottom + 6, "chance", "axis", "middle"))
        top = bottom + 44
    panels.append(_text(16.0, top - 6, "gain in held-out loss over random rows, nats a token; 95% intervals", "axis"))
    return document(TITLE, float(round(left + 530)), float(round(top + 8)), panels, style=BARS, dark=DARK_BARS)


def _scale(low: float, high: float, left: float) -> Callable[[float], float]:
    """From a gain to its place across."""
    return lambda value: left + 14 + 430 * (value - low) / ((high - low) or 1.0)


def _bar(line: Line, y: float, x: Callable[[float], float], left: float) -> list[str]:
    gain, (low, high) = line.gain or 0.0, line.gain_interval or (0.0, 0.0)
    kind = "better" if low > 0 else "worse" if high < 0 else "level"
    return [
        _text(left, y + 4, line.method, "", "end"),
        f'<line class="{kind}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}"/>',
        f'<circle class="{kind}" cx="{x(gain):.1f}" cy="{y}" r="4"/>',
        _text(left + 464, y + 4, f"{gain:+.3f}", "value"),
    ]


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(visible(text))}</text>'
