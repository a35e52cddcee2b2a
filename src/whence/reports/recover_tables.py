"""What a person reads of a recovery: rows with their confidence, the mixture of sources, what the weights say."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whence.corpus.layouts import shown_text
from whence.counts import number_of
from whence.recovery.pipeline import Recovered
from whence.reports.tables import plain_table
from whence.reports.text import visible

SHOWN = 10
"""Rows."""
LONGEST = 96
"""Characters of a row."""
LAYERS = 5
"""Layers listed, those that moved the most."""


def recover_tables(recovery: Recovered) -> RenderableType:
    """Notes, mixture, first and last rows, layers."""
    settings = recovery.settings
    parts: list[RenderableType] = [Text(visible(note), "yellow") for note in recovery.notes]
    head = f"{len(recovery.rows):,} of {number_of(len(recovery.scores), 'row')}, by {settings['method']}"
    parts.append(Text(head, "bold"))
    if recovery.learned is not None:
        shadow = f"Probabilities are from a shadow, a model trained here on known rows: {settings['shadow']}."
        parts.append(Text(f"{shadow} Rows trained on, in all: about {members_text(recovery)}.", "dim"))
    if recovery.mixture:
        parts.append(_mixture(recovery))
    if recovery.rows:
        parts.append(_rows(recovery))
    parts.append(_layers(recovery))
    return Group(*parts)


def recover_answer(recovery: Recovered) -> str:
    """How many rows the model was trained on, and from where most of them come, in a sentence."""
    count, total = len(recovery.rows), len(recovery.scores)
    if recovery.learned is not None:
        listed = number_of(count, "is listed", "are listed")
        answer = f"The model was trained on about {members_text(recovery)} of {number_of(total, 'row')}; {listed}"
    else:
        fit = "fits" if count == 1 else "fit"
        answer = f"{count:,} of {number_of(total, 'row')} {fit} best what training did to the weights"
    if recovery.mixture:
        most = max(recovery.mixture, key=lambda line: line["share"])
        source = f"{visible(most['source'])}, {most['share']:.0%} ({most['low']:.0%} to {most['high']:.0%})"
        answer += f"; most were from {source}"
    return f"{answer}."


def members_text(recovery: Recovered) -> str:
    """The expected number of members, with its 95% interval."""
    if recovery.members is None:
        return f"{float(recovery.scores[recovery.scores.isfinite()].double().sum()):,.0f}"
    expected, low, high = recovery.members
    return f"{expected:,.0f} ({low:,.0f} to {high:,.0f})"


def _mixture(recovery: Recovered) -> Table:
    table = plain_table("What it was trained on, by source")
    table.add_column("source")
    for name in ("of rows", "95%", "of tokens", "95%"):
        table.add_column(name, justify="right")
    for line in sorted(recovery.mixture, key=lambda line: -line["share"]):
        rows, tokens = (f"{line[low]:.0%} to {line[high]:.0%}" for low, high in
                        (("low", "high"), ("tokens_low", "tokens_high")))  # fmt: skip
        table.add_row(Text(visible(line["source"])), f"{line['share']:.0%}", rows, f"{line['tokens']:.0%}", tokens)
    return table


def _rows(recovery: Recovered) -> Table:
    """The first rows and the last."""
    table = plain_table()
    is_probability = recovery.learned is not None
    for name in ("rank", "probability" if is_probability else "score", "p-value"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("row", overflow="ellipsis")
    count = len(recovery.rows)
    for place in sorted({*range(min(SHOWN, count)), *range(max(0, count - 2), count)}):
        row = recovery.rows[place]
        text = " ".join(part for part in shown_text(row).values() if part)
        cut = text[:LONGEST] + ("..." if len(text) > LONGEST else "")
        score = f"{row['whence_score']:.0%}" if is_probability else f"{row['whence_score']:.4g}"
        table.add_row(str(place + 1), score, f"{row['whence_p']:.2g}", Text(visible(" ".join(cut.split()))))
    return table


def _layers(recovery: Recovered) -> Table:
    """The layers that moved the most against the rounding of their files."""
    table = plain_table("What moved the most")
    table.add_column("parameter")
    for name in ("moved by", "over rounding", "unchanged"):
        table.add_column(name, justify="right")
    moved = sorted(recovery.layers, key=lambda line: -line["norm"])[:LAYERS]
    for line in moved:
        signal = line.get("signal")
        table.add_row(
            Text(visible(line["name"])),
            f"{line['norm']:.3g}",
            "-" if signal is None else f"{signal:,.0f} times",
            f"{line['unchanged']:.0%}",
        )
    return table
