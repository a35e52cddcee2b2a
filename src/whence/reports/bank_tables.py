"""A bank of retrainings in the terminal: what `bank` and `info` print of it."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whence.counts import duration, number_of
from whence.evaluation.bank_spread import Spread, fall_of_loss, spreads, without_loss
from whence.evaluation.bank_store import Bank
from whence.reports.tables import pairs_table, plain_table

KINDS = {
    "random": "random subsets",
    "group": "each group left out",
    "rows": "listed rows left out",
    "removal": "top rows left out",
    "addition": "top rows alone",
    "full": "all rows, other seeds",
}
"""Kinds of members in words."""


def bank_tables(bank: Bank) -> RenderableType:
    """What a bank is of, and a line each kind of member."""
    protocol, description = bank.protocol, bank.description
    before, after = fall_of_loss(bank)
    silent = len(without_loss(bank))
    ways = {
        "zero": "rows keep their places in the batches and add nothing",
        "drop": "trainings on the other rows alone",
    }
    lines = {
        "bank": bank.place.root,
        "run": f"{protocol.run}, of {protocol.model}",
        "rows": f"{number_of(len(bank.rows), 'row')} of {protocol.corpus}",
        "queries": number_of(len(bank.queries), "query", "queries")
        + (f", of which {silent} without a loss in some member are left out of what follows" if silent else ""),
        "left out by": f"{protocol.leave_out}: {ways[protocol.leave_out]}",
        "weights": "kept" if protocol.keep_weights else "not kept",
        "all rows again": _repetition(bank),
    }
    if description.subsets is not None:
        lines["subsets"] = f"{description.subsets.fraction:g} of the rows, seed {description.subsets.seed}"
    table = plain_table("Loss of the queries, nats a token")
    table.add_column("trainings", no_wrap=True)
    for name in ("members", "rows", "loss", "sd of mean", "sd of query"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("before training", "", "0", f"{before:.4f}", "", "")
    table.add_row("all rows", "1", f"{len(bank.rows):,}", f"{after:.4f}", "", "")
    for spread in spreads(bank):
        _add(table, spread)
    notes = [Text(note, "yellow") for note in description.notes]
    foot = Text("sd: standard deviation over members, of the queries' mean loss, and of a query's (their mean).", "dim")
    return Group(pairs_table(lines), Text(""), table, foot, *notes)


def _add(table: Table, spread: Spread) -> None:
    table.add_row(
        KINDS.get(spread.kind, spread.kind),
        f"{spread.members:,}",
        f"{spread.kept:,.0f}",
        f"{spread.loss:.4f}",
        *(f"{value:.4f}" if math.isfinite(value) else "" for value in (spread.of_mean, spread.of_query)),
    )


def _repetition(bank: Bank) -> str:
    found = bank.description.repetition
    if found is None:
        return "not compared with the run"
    if not found.largest:
        return "the run's weights, bit for bit"
    return (
        f"the change of weights has cosine {found.cosine:.4f} with the run's; the largest difference is "
        f"{found.largest:.2g} of the largest change"
    )


def bank_answer(bank: Bank, trained: int | None = None) -> str:
    """How many trainings there are, what they took, and how much they differ, in a sentence or two.

    Args:
        bank: A bank.
        trained: Trainings that were just made; 0 says that nothing was to be done, None says nothing of it.
    """
    seconds = [member.seconds for member in (bank.full, *bank.members)]
    total = math.fsum(seconds)
    head = f"The bank has {number_of(len(bank.members), 'retraining')} beside the one on all rows"
    if trained is not None:
        made = f"{number_of(trained, 'training')} made" if trained else "Nothing was to be done"
        head = f"{made}: {head[0].lower()}{head[1:]}"
    head += f", {duration(total)} in all, {duration(total / len(seconds))} each"
    found = spreads(bank)
    if not found:
        return f"{head}; none leaves rows out yet."
    spread = max(found, key=lambda item: item.members)
    before, after = fall_of_loss(bank)
    fall = before - after
    if not math.isfinite(spread.of_query):
        return f"{head}; training took {fall:.3f} nats off the queries' mean loss."
    share = f", {spread.of_query / fall:.1%} of the {fall:.3f} nats that training took off" if fall > 0 else ""
    return (
        f"{head}; between {KINDS.get(spread.kind, spread.kind)} a query's loss differs by {spread.of_query:.4f} nats "
        f"(standard deviation){share}."
    )


def bank_rows_of(bank: Bank) -> list[dict[str, Any]]:
    """A row for each member and query: what a training without some rows made of its loss."""
    members = (bank.parent, bank.full, *bank.members)
    return [
        {"member": member.name, "kind": member.kind, "label": member.label, "query": query, "loss": loss,
         "left_out": len(member.left_out), "seed": member.seed, "seconds": member.seconds}
        for member in members for query, loss in zip(bank.query_ids, member.losses, strict=True)
    ]  # fmt: skip
