"""What a person reads of a recovery: rows with their confidence, the mixture of sources, what the weights say."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whence.corpus.layouts import shown_text
from whence.recovery.pipeline import Recovered
from whence.reports.tables import visible

SHOWN = 10
"""Rows."""
LONGEST = 96
"""Characters of a row."""
LAYERS = 5
"""That moved the most."""


def recovery_report(found: Recovered) -> RenderableType:
    """Notes, mixture, first and last rows, layers."""
    settings = found.settings
    parts: list[RenderableType] = [Text(visible(note), "yellow") for note in found.notes]
    head = f"{len(found.rows):,} of {len(found.scores):,} rows, by {settings['method']}"
    parts.append(Text(head, "bold"))
    if found.learned is not None:
        expected = float(found.scores[found.scores.isfinite()].sum())
        parts.append(Text(f"Shadow: {settings['shadow']}. Expected members in all: {expected:,.0f}.", "dim"))
    if found.mixture:
        parts.append(_mixture(found))
    if found.rows:
        parts.append(_rows(found))
    parts.append(_layers(found))
    return Group(*parts)


def _mixture(found: Recovered) -> Table:
    table = Table(title="What it was trained on, by source", title_justify="left", box=None, pad_edge=False,
                  header_style="bold dim")  # fmt: skip
    table.add_column("source")
    for name in ("of rows", "95%", "of tokens", "95%"):
        table.add_column(name, justify="right")
    for line in sorted(found.mixture, key=lambda line: -line["share"]):
        rows, tokens = (f"{line[low]:.0%} to {line[high]:.0%}" for low, high in
                        (("low", "high"), ("tokens_low", "tokens_high")))  # fmt: skip
        table.add_row(Text(visible(line["source"])), f"{line['share']:.0%}", rows, f"{line['tokens']:.0%}", tokens)
    return table


def _rows(found: Recovered) -> Table:
    """The first rows and the last."""
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    is_probability = found.learned is not None
    for name in ("rank", "probability" if is_probability else "score", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("row", overflow="ellipsis")
    count = len(found.rows)
    for place in sorted({*range(min(SHOWN, count)), *range(max(0, count - 2), count)}):
        row = found.rows[place]
        text = " ".join(part for part in shown_text(row).values() if part)
        cut = text[:LONGEST] + ("..." if len(text) > LONGEST else "")
        score = f"{row['whence_score']:.0%}" if is_probability else f"{row['whence_score']:.4g}"
        table.add_row(str(place + 1), score, f"{row['whence_p']:.2g}", Text(visible(" ".join(cut.split()))))
    return table


def _layers(found: Recovered) -> Table:
    """Those that moved the most against the rounding of their files."""
    table = Table(title="What moved the most", title_justify="left", box=None, pad_edge=False, header_style="bold dim")
    table.add_column("parameter")
    for name in ("moved by", "over rounding", "unchanged"):
        table.add_column(name, justify="right")
    moved = sorted(found.layers, key=lambda line: -line["norm"])[:LAYERS]
    for line in moved:
        signal = line.get("signal")
        table.add_row(
            Text(visible(line["name"])),
            f"{line['norm']:.3g}",
            "-" if signal is None else f"{signal:,.0f} times",
            f"{line['unchanged']:.0%}",
        )
    return table
