"""What a person reads of an ablation: mixtures on every evaluation set, the best of each, how well proxies rank."""

import math
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whence.ablation.pipeline import Ablation
from whence.counts import number_of
from whence.reports.tables import plain_table
from whence.reports.text import visible
from whence.reports.wide_table import WideTable

SHOWN = 24
"""Mixtures listed."""


def ablate_tables(ablation: Ablation, *, bits: bool = False) -> RenderableType:
    """Notes, losses, agreement, cost.

    Args:
        ablation: What to show.
        bits: Bits per byte in place of perplexities.
    """
    parts: list[RenderableType] = [Text(visible(note), "yellow") for note in ablation.notes]
    parts.append(_losses(ablation, bits=bits))
    if ablation.agreements:
        parts += [Text(""), _agreements(ablation)]
    parts.append(Text(f"\n{cost_sentence(ablation.cost)}", "dim"))
    return Group(*parts)


def ablate_answer(ablation: Ablation) -> str:
    """Which mixture is best, by how much, and whether a real training agrees, in a sentence."""
    gained, true = ablation.gained(), ablation.gained("truth")
    best, among = (
        next(iter(gained)),
        f"{number_of(len(gained), 'mixture')} over {number_of(len(ablation.best()), 'evaluation set')}",
    )
    answer = f"The best of {among} is {visible(best)}, {_against_parent(gained[best])}"
    if not true:
        return f"{answer}, by averages: none was trained."
    first = next(iter(true))
    if first == best:
        return f"{answer}; of those really trained it is the best too."
    lost = true[best] - true[first]
    return f"{answer}; of those really trained the best is {visible(first)}, and this one worse by {lost:.3f}."


def _against_parent(change: float) -> str:
    return f"{abs(change):.3f} nats a token {'below' if change <= 0 else 'above'} the parent"


def cost_sentence(cost: Mapping[str, float]) -> str:
    """What reading mixtures took beside training them, as a sentence."""
    return (
        f"{number_of(cost['candidates'], 'mixture was', 'mixtures were')} read in {cost['reading seconds']:,.0f} "
        f"s; the pool took {cost['pool tokens']:,.0f} tokens of training, all mixtures would take "
        f"{cost['tokens of training every candidate']:,.0f}: the pool is cheaper from "
        f"{number_of(math.ceil(cost['break-even candidates']), 'mixture')} on."
    )


def _losses(ablation: Ablation, *, bits: bool) -> WideTable:
    """A row each mixture; the best of a set in green, truth beside where there is one."""
    sets, best = list(dict.fromkeys(cell.set for cell in ablation.cells)), ablation.best()
    by = {(cell.mixture, cell.set): cell for cell in ablation.cells}
    title = f"{'Bits per byte' if bits else 'Perplexity'} of the merged model, which ranks mixtures"
    if not bits and any(cell.truth is not None for cell in ablation.cells):
        title += " (of the one really trained)"
    table = WideTable(title, "mixture", sets)
    order = list(ablation.gained())
    for mixture in order[:SHOWN]:
        cells = [by[mixture, name] for name in sets]
        shown = [Text(_value(cell.merged, cell.bits_per_byte, bits=bits),
                      "bold green" if best[cell.set] == mixture else "") for cell in cells]  # fmt: skip
        for text, cell in zip(shown, cells, strict=True):
            if cell.truth is not None and not bits:
                text.append(f" ({math.exp(min(cell.truth, 700)):.1f})", "dim")
        table.add_row(Text(visible(mixture)), shown)
    if len(order) > SHOWN:
        table.add_row(Text(f"... {len(order) - SHOWN} more: -o FILE", "dim"), [""] * len(sets))
    parent = [Text(_value(by[order[0], name].parent, None, bits=bits), "dim") for name in sets]
    table.add_row(Text("the parent", "dim"), parent)
    return table


def _value(loss: float, bits_per_byte: float | None, *, bits: bool) -> str:
    if bits:
        return "-" if bits_per_byte is None else f"{bits_per_byte:.3f}"
    return f"{math.exp(min(loss, 700.0)):.1f}"


PROXIES = ("mean", "midpoint", "best", "ngram")
"""Proxies compared with the merged model; `mean_ppl` ranks as `mean` does, but for rounding."""


def _agreements(ablation: Ablation) -> Table:
    """Spearman's correlation with the truth by set and group of candidates; the regret of choosing by the merge."""
    table = plain_table("Rank correlation with really trained models")
    table.add_column("evaluation set", no_wrap=True)
    for name in ("n", "merged", "95%", "regret", *PROXIES):
        table.add_column(name, justify="right", no_wrap=True)
    for evaluated, by_group in ablation.agreements.items():
        for group, by_proxy in by_group.items():
            merged = by_proxy.get("merged")
            if merged is None:
                continue
            low, high = merged.spearman_interval
            others = [f"{by_proxy[name].spearman:.2f}" if name in by_proxy else "-" for name in PROXIES]
            label = evaluated if group == "all" else f"  {group}"
            table.add_row(Text(visible(label)), f"{merged.candidates}", f"{merged.spearman:.2f}",
                          f"{low:.2f} to {high:.2f}", f"{merged.regret:.3f}", *others)  # fmt: skip
    table.caption = "regret: nats lost by choosing the mixture that the merge ranks first"
    table.caption_justify = "left"
    return table
