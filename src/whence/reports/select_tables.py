"""What a person reads of a selection: its tables in the terminal, and the plot of `evaluate selection`."""

from collections.abc import Callable, Mapping
from html import escape

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whence.corpus.layouts import shown_text
from whence.evaluation.selection import NOTHING, RANDOM, Line, SelectionTable
from whence.reports.tables import visible
from whence.selection.pipeline import Chosen, composition, lengths, nearness

SHOWN = 3
"""Examples from either end of a selection."""
LONGEST = 96
"""Characters of an example."""


def selection_report(chosen: Chosen, overlaps: Mapping[str, float] | None = None) -> RenderableType:
    """Composition, length, the first and last rows, what was left out, and overlap with other methods' choices."""
    selection = chosen.selection
    parts: list[RenderableType] = [Text(visible(note), "yellow") for note in selection.notes]
    tokens = f", {selection.tokens:,} tokens" if selection.tokens else ""  # none are counted without a tokenizer
    head = f"{len(selection.rows):,} of {len(selection.reasons):,} rows{tokens}, by "
    parts += [Text(head + chosen.settings["method"] + ", " + chosen.settings["selector"], "bold"), _composition(chosen)]
    size = lengths(chosen)
    was, now = size["pool_median_tokens"], size["median_tokens"]
    if selection.tokens:
        parts.append(Text(f"Median length {now:,.0f} tokens, in the pool {was:,.0f}: {_bias(now, was)}.", "dim"))
    if chosen.settings["method"] == "dsir" and (nearer := nearness(chosen)) is not None:
        parts.append(Text(f"{told_nearness(nearer)}.", "dim"))
    parts.append(_examples(chosen))
    if left := selection.tally():
        told = ", ".join(f"{count:,} {reason}" for reason, count in left.items())
        parts.append(Text(f"Left out: {told}.", "dim"))
    if overlaps:
        told = ", ".join(f"{name} {share:.0%}" for name, share in overlaps.items())
        parts.append(Text(f"Rows in common with: {told}.", "dim"))
    return Group(*parts)


def told_nearness(nats: float) -> str:
    """DSIR's KL reduction in words."""
    way = "nearer to" if nats >= 0 else "farther from"
    return f"Words are {abs(nats):.2f} nats {way} the task's than the pool's are (KL reduction of hashed n-grams)"


def _bias(now: float, was: float) -> str:
    if was and now > 1.25 * was:
        return "long rows are favoured, so give budgets in tokens"
    if was and now < 0.8 * was:
        return "short rows are favoured, so give budgets in tokens"
    return "no strong bias by length"


def _composition(chosen: Chosen) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    table.add_column("source")
    counted = ["tokens"] if chosen.selection.tokens else []  # none are without a tokenizer
    for name in ("rows", "share", "of the pool", "lift", *counted):
        table.add_column(name, justify="right")
    total = len(chosen.selection.reasons)
    for line in composition(chosen):
        table.add_row(
            Text(visible(str(line["source"] or "-"))),
            f"{line['rows']:,}",
            f"{line['share']:.1%}",
            f"{line['pool_rows'] / total:.1%}",
            Text(f"{line['lift']:.2f}", "green" if line["lift"] > 1 else "red" if line["lift"] < 1 else ""),
            *(f"{line['tokens']:,}" for _ in counted),
        )
    return table


def _examples(chosen: Chosen) -> Table:
    """The first and the last rows of the choice."""
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    for name in ("rank", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("for", no_wrap=True, overflow="ellipsis")
    table.add_column("row", overflow="ellipsis")
    count = len(chosen.rows)
    for place in sorted({*range(min(SHOWN, count)), *range(max(0, count - SHOWN), count)}):
        text = " ".join(part for part in shown_text(chosen.rows[place]).values() if part)
        cut = text[:LONGEST] + ("..." if len(text) > LONGEST else "")
        target = chosen.selection.targets[place]
        table.add_row(
            str(place + 1),
            f"{chosen.selection.scores[place]:.4g}",
            Text(visible(target or "-")),
            Text(visible(" ".join(cut.split()))),
        )
    return table


def table_of_methods(table: SelectionTable) -> RenderableType:
    """One table a task: loss, gain over chance with its interval, exact match, cost."""
    parts: list[RenderableType] = []
    for task in dict.fromkeys(line.task for line in table.lines):
        drawn = Table(title=visible(task), title_justify="left", box=None, pad_edge=False, header_style="bold dim")
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


def _colour(line: Line) -> str:
    low, high = line.gain_interval or (0.0, 0.0)
    return "green" if low > 0 else "red" if high < 0 else ""


def table_plot(table: SelectionTable) -> str:
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
    style = (
        "svg{font:13px system-ui,sans-serif;background:#fff}text{fill:#1c2024}.title{font-weight:600;font-size:15px}"
        ".axis,.value{fill:#6b7280;font-size:11px}.zero{stroke:#9aa1ab;stroke-dasharray:3 3}.better{stroke:#1a7f4b;"
        "fill:#1a7f4b}.worse{stroke:#c0392b;fill:#c0392b}.level{stroke:#6b7280;fill:#6b7280}line{stroke-width:2}"
        "@media(prefers-color-scheme:dark){svg{background:#14171a}text{fill:#e6e8ea}.axis,.value{fill:#9aa1ab}"
        ".better{stroke:#4cc38a;fill:#4cc38a}.worse{stroke:#ff8b7e;fill:#ff8b7e}}"
    )
    panels.append(_text(16.0, top - 6, "gain in held-out loss over random rows, nats a token; 95% intervals", "axis"))
    size = f'viewBox="0 0 {left + 530:.0f} {top + 8:.0f}" width="{left + 530:.0f}" height="{top + 8:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f"<title>Gain in held-out loss over random selection, in nats a token</title><style>{style}</style>"
        f"{''.join(panels)}</svg>\n"
    )


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
