"""A selection in the terminal: its composition, the rows at both ends, what was left out and why."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whence.corpus.layouts import shown_text
from whence.counts import number_of
from whence.reports.tables import plain_table, unbroken
from whence.reports.text import visible
from whence.selection.description import composition, lengths, nearness
from whence.selection.pipeline import Chosen

SHOWN = 3
"""Examples from either end of a selection."""

ANSWERS = 8
"""Answers that are listed."""

LONGEST = 96
"""Characters of an example."""


def select_tables(chosen: Chosen, overlaps: Mapping[str, float] | None = None) -> RenderableType:
    """Composition, length, the first and last rows, what was left out, and overlap with other methods' choices."""
    selection = chosen.selection
    parts: list[RenderableType] = [Text(visible(note), "yellow") for note in selection.notes]
    tokens = (
        f", {number_of(selection.tokens, 'token')}" if selection.tokens else ""
    )  # none are counted without a tokenizer
    head = f"{len(selection.rows):,} of {number_of(len(selection.reasons), 'row')}{tokens}, by "
    parts += [Text(head + chosen.settings["method"] + ", " + chosen.settings["selector"], "bold"), _composition(chosen)]
    parts += [_answers(chosen)] if chosen.answers else []
    size = lengths(chosen)
    before, now = size["pool_median_tokens"], size["median_tokens"]
    if selection.tokens:
        parts.append(Text(f"Median length {now:,.0f} tokens, in the pool {before:,.0f}: {_bias(now, before)}.", "dim"))
    if chosen.settings["method"] == "dsir" and (nearer := nearness(chosen)) is not None:
        parts.append(Text(f"{nearness_sentence(nearer)}.", "dim"))
    parts.append(_examples(chosen))
    if tally := selection.tally():
        listed = ", ".join(f"{count:,} {reason}" for reason, count in tally.items())
        parts.append(Text(f"Left out: {listed}.", "dim"))
    if overlaps:
        listed = ", ".join(f"{name} {share:.0%}" for name, share in overlaps.items())
        parts.append(Text(f"Rows in common with: {listed}.", "dim"))
    elif evidence := chosen.settings.get("evidence"):
        parts.append(unbroken(evidence, "dim"))
    return Group(*parts)


FEW_IN_COMMON = 0.05
"""Share of rows in common from which on two choices are called different."""


def select_answer(chosen: Chosen, overlaps: Mapping[str, float] | None = None) -> str:
    """How many rows are chosen, and of which source most, in a sentence; and what differs from them."""
    lines, count, total = composition(chosen), len(chosen.rows), len(chosen.selection.reasons)
    answer = f"{count:,} of {number_of(total, 'row')} {'is' if count == 1 else 'are'} chosen"
    if len(lines) > 1:
        most = lines[0]
        answer += f", {most['share']:.0%} of them from {most['source'] or 'no source'}"
        answer += f" (in the pool {most['pool_rows'] / total:.0%})"
    if others := [name for name, share in (overlaps or {}).items() if share < FEW_IN_COMMON]:
        return f"{answer}; {' and '.join(others)} would choose other rows, and only training says which are better."
    return f"{answer}."


def nearness_sentence(nats: float) -> str:
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
    table = plain_table()
    table.add_column("source")
    counted = ["tokens"] if chosen.selection.tokens else []  # none are without a tokenizer
    for name in ("rows", "share", "of the pool", "times the pool's", *counted):
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


def _answers(chosen: Chosen) -> Table:
    """The task's labels among the chosen rows, beside the task's examples."""
    table = plain_table()
    table.add_column("answer", overflow="ellipsis", no_wrap=True)
    for name in ("rows", "share", "of the task's examples"):
        table.add_column(name, justify="right")
    for answer, task_share, share, rows in chosen.answers[:ANSWERS]:
        table.add_row(Text(visible(answer)), f"{rows:,}", f"{share:.1%}", f"{task_share:.1%}")
    if len(chosen.answers) > ANSWERS:
        table.add_row(Text(f"{len(chosen.answers) - ANSWERS:,} more", "dim"), "", "", "")
    return table


def _examples(chosen: Chosen) -> Table:
    """The first and the last rows of the choice."""
    table = plain_table()
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
