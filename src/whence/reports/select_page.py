"""A selection as one HTML file that can be sent to a colleague: it loads nothing, sends nothing and needs no server.

What was chosen stands beside the pool that it was chosen from, by source, by length and by score; then the rows at both
ends of the choice and just below it, and what was left out and why. A slider shows the sources under another budget
(`selection.other_budgets`). Corpus text is untrusted: it is escaped, the one script reads numbers alone, and the page's
policy allows no other script and no address at all.
"""

import math
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whence.counts import number_of
from whence.reports.page import axis, bars, cut, document, escaped, fact_list, pick, row_html, section, table
from whence.reports.select_tables import nearness_sentence
from whence.selection.choice import BELOW
from whence.selection.description import composition, lengths, nearness
from whence.selection.other_budgets import steps
from whence.selection.pipeline import Chosen

FIRST, LAST, NEAREST = 10, 5, 5
"""Rows that are shown of the best of the choice, of its last, and of the best below it."""
TARGETS = 12
"""Targets that are listed."""
BINS = 36
"""Bins of a histogram."""


def select_page(chosen: Chosen, overlaps: Mapping[str, float] | None = None) -> str:
    """A selection as a self-contained HTML document, to be written as UTF-8.

    Args:
        chosen: What to show.
        overlaps: Overlaps with other methods' choices under the same budget, by name; see `description.overlap`.
    """
    selection, settings = chosen.selection, chosen.settings
    tokens = f", {number_of(selection.tokens, 'token')}" if selection.tokens else ""
    lines = composition(chosen)
    budgets = _budgets(chosen, lines)
    lead = f"{len(selection.rows):,} of {number_of(len(selection.reasons), 'row')}{tokens}"
    body = [
        f'<p class="lead">{escaped(lead)}</p><p class="how">by {escaped(settings["method"])}, '
        f"{escaped(settings['selector'])}</p>",
        *(f'<p class="note">{escaped(note)}</p>' for note in selection.notes),
        _sources(chosen, lines, budgets),
        _answers(chosen),
        _distributions(chosen),
        _targets(chosen),
        _overlaps(overlaps or {}),
        _rows(chosen),
        _left_out(chosen),
        section("How this was made", fact_list(settings)),
    ]
    title = f"Whence: {lead}, by {settings['method']}"
    script = None if budgets is None else "select_page.js"
    return document("the rows to train on", title, body, "select_page.css", script=script, data=budgets)


_KEY = '<span class="key"><i></i>chosen<i class="pool"></i>the pool</span>'


def _budgets(chosen: Chosen, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What `select_page.js` reads; None where there is no other budget to see."""
    choices = steps(chosen.candidates, chosen.order, [line["source"] for line in lines], len(chosen.rows))
    if len(choices) < 2:
        return None
    largest = max(count / step.rows for step in choices for count in step.by_source)
    total = len(chosen.selection.reasons)
    return {
        "steps": [[step.rows, step.tokens, step.score, step.by_source, step.tokens_by_source] for step in choices],
        "chosen": len(chosen.rows),
        "pool": [line["pool_rows"] for line in lines],
        "largest": max(largest, *(line["pool_rows"] / total for line in lines)),
        "rankable": len(chosen.order),
    }


_SLIDER = (
    '<div class="budget" id="budget" hidden><label for="size">Another budget</label>'
    '<input id="size" type="range" min="0" step="1"><output for="size"></output><p class="say"></p></div>'
)


def _sources(chosen: Chosen, lines: list[dict[str, Any]], budgets: dict[str, Any] | None) -> str:
    total = len(chosen.selection.reasons)
    largest = budgets["largest"] if budgets else max(max(line["share"], line["pool_rows"] / total) for line in lines)
    rows = []
    for line in lines:
        pool = line["pool_rows"] / total
        drawn = bars(line["share"] / largest, pool / largest)
        cells = [f"{line['rows']:,}", f"{line['share']:.1%}", f"{pool:.1%}", f"{line['lift']:.2f}"]
        cells += [f"{line['tokens']:,}"] if chosen.selection.tokens else []
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows.append(f'<tr><td>{escaped(line["source"] or "-")}</td><td class="wide">{drawn}</td>{numbers}</tr>')
    names = ["rows", "share", "of the pool", "times the pool's"] + (["tokens"] if chosen.selection.tokens else [])
    head = "<th>source</th><th></th>" + "".join(f'<th class="n">{name}</th>' for name in names)
    drawn = f'<div id="sources">{table(head, rows)}</div>'
    return section("Where the rows come from", (_SLIDER if budgets else "") + drawn, _KEY)


def _answers(chosen: Chosen) -> str:
    """The task's labels among the chosen rows, beside the task's examples."""
    if not chosen.answers:
        return ""
    largest = max(max(share, task_share) for _, task_share, share, _ in chosen.answers)
    rows = [
        f'<tr><td>{cut(answer)}</td><td class="wide">{bars(share / largest, task_share / largest)}</td>'
        f'<td class="n">{count:,}</td><td class="n">{share:.1%}</td><td class="n">{task_share:.1%}</td></tr>'
        for answer, task_share, share, count in chosen.answers[:TARGETS]
    ]
    more = len(chosen.answers) - TARGETS
    say = f'<p class="say">{number_of(more, "more answer")}.</p>' if more > 0 else ""
    names = "".join(f'<th class="n">{name}</th>' for name in ("rows", "share", "of the task"))
    key = '<span class="key"><i></i>chosen<i class="pool"></i>the task\'s examples</span>'
    return section("What the rows answer", table(f"<th>answer</th><th></th>{names}", rows) + say, key)


def _distributions(chosen: Chosen) -> str:
    rankable, rows = chosen.candidates.rankable(), chosen.selection.rows
    parts = []
    if chosen.selection.tokens:
        size, tokens = lengths(chosen), chosen.candidates.tokens.double()
        caption = f"Median {size['median_tokens']:,.0f} tokens; in the pool {size['pool_median_tokens']:,.0f}."
        drawn = _histogram(tokens[rankable].log2(), tokens[rows].log2(), lambda value: f"{2**value:,.0f}")
        parts.append(section("Length in tokens", f'{drawn}<p class="say">{caption}</p>', _KEY))
    scores = chosen.candidates.scores.double().masked_fill(~chosen.candidates.scores.isfinite(), -math.inf).amax(0)
    several = "each row's best over the targets" if len(chosen.candidates.targets) > 1 else "of the target"
    drawn = _histogram(scores[rankable], scores[rows], lambda value: f"{value:.3g}")
    caption = f"Score, {several}; larger is more helpful. Bars are shares of each side."
    if (nearer := nearness(chosen)) is not None:
        caption += f" {nearness_sentence(nearer)}."
    parts.append(section("Score", f'{drawn}<p class="say">{caption}</p>', _KEY))
    return f'<div class="pair">{"".join(parts)}</div>'


def _histogram(pool: Float[Tensor, " n"], chosen: Float[Tensor, " m"], named: Callable[[float], str]) -> str:
    """Shares of either in equal bins between the pool's ends, as one SVG."""
    low, high = float(pool.min()), float(pool.max())
    if high <= low:
        return f'<p class="say">All are {escape(named(low))}.</p>'
    sides = [torch.histc(values, BINS, low, high) / max(1, len(values)) for values in (pool, chosen)]
    top, width, height = max(float(side.max()) for side in sides), 400.0, 120.0
    step, drawn = width / BINS, []
    for kind, side, inset in (("pool", sides[0], 0.5), ("chosen", sides[1], step / 4)):
        drawn += [
            f'<rect class="{kind}" x="{number * step + inset:.1f}" y="{height * (1 - share / top):.1f}" '
            f'width="{step - 2 * inset:.1f}" height="{height * share / top:.1f}"/>'
            for number, share in enumerate(side.tolist())
            if share
        ]
    places = (0.0, 0.25, 0.5, 0.75, 1.0)
    ticks = axis(width, height, {place: named(low + (high - low) * place) for place in places})
    return f'<svg viewBox="0 0 {width:.0f} {height + 20:.0f}" role="img">{"".join(drawn)}{ticks}</svg>'


def _targets(chosen: Chosen) -> str:
    """How many rows were taken for each target, where there are several."""
    taken: dict[str, int] = dict.fromkeys(chosen.candidates.targets, 0)
    for target in chosen.selection.targets:
        if target is not None:
            taken[target] += 1
    if len(taken) < 2 or not any(taken.values()):
        return ""
    order = sorted(taken, key=lambda name: -taken[name])
    most = taken[order[0]]
    rows = [
        f'<tr><td>{escaped(name)}</td><td class="wide">{bars(taken[name] / most)}</td>'
        f'<td class="n">{taken[name]:,}</td></tr>'
        for name in order[:TARGETS]
    ]
    rest = sum(1 for name in order if not taken[name])
    more = f'<p class="say">{len(order) - TARGETS:,} more targets.</p>' if len(order) > TARGETS else ""
    if rest:
        more += f'<p class="say">{rest:,} of {len(order):,} targets have no row of their own.</p>'
    head = '<th>target</th><th></th><th class="n">rows taken for it</th>'
    return section("What the rows were taken for", table(head, rows) + more)


def _overlaps(overlaps: Mapping[str, float]) -> str:
    if not overlaps:
        return ""
    rows = [
        f'<tr><td>{escaped(name)}</td><td class="wide">{bars(share)}</td><td class="n">{share:.0%}</td></tr>'
        for name, share in sorted(overlaps.items(), key=lambda item: -item[1])
    ]
    head = '<th>method</th><th></th><th class="n">rows in common</th>'
    say = '<p class="say">Choices under the same budget; a share of the smaller one.</p>'
    return section("Other methods", table(head, rows) + say)


def _rows(chosen: Chosen) -> str:
    selection, count = chosen.selection, len(chosen.rows)
    best, last = range(min(FIRST, count)), range(max(FIRST, count - LAST), count)
    parts = [section("Chosen first", "".join(_chosen_row(chosen, place) for place in best))]
    if last:
        parts.append(section("Chosen last", "".join(_chosen_row(chosen, place) for place in last)))
    below = [number for number, reason in enumerate(selection.reasons) if reason == BELOW]
    scores = chosen.candidates.scores[:, below].amax(0)
    nearest = [below[place] for place in scores.topk(min(NEAREST, len(below))).indices.tolist()] if below else []
    if nearest:
        inner = "".join(_other_row(chosen, number) for number in nearest)
        parts.append(section("Best of those below the budget", inner))
    return "\n".join(parts)


def _chosen_row(chosen: Chosen, place: int) -> str:
    selection = chosen.selection
    facts = [f"<b>{selection.scores[place]:.4g}</b>"]
    source, target = chosen.candidates.sources[selection.rows[place]], selection.targets[place]
    facts += [escaped(source)] if source else []
    facts += [f"for {escaped(target)}"] if target and len(chosen.candidates.targets) > 1 else []
    return pick(str(place + 1), row_html(chosen.rows[place]), facts)


def _other_row(chosen: Chosen, number: int) -> str:
    source = chosen.candidates.sources[number]
    facts = [f"<b>{float(chosen.candidates.scores[:, number].amax()):.4g}</b>"] + ([escaped(source)] if source else [])
    return pick("", f"<div>{cut(chosen.candidates.texts[number])}</div>", facts)


def _left_out(chosen: Chosen) -> str:
    """Reasons, with how many rows each kept out and one of them."""
    reasons = chosen.selection.reasons
    rows = []
    for kind, count in chosen.selection.tally().items():
        number = next(n for n, reason in enumerate(reasons) if reason is not None and reason.startswith(kind))
        text = " ".join(chosen.candidates.texts[number].split())[:160]
        example = f"row {number + 1}{': ' + text if text else ''}"
        rows.append(
            f'<tr><td>{escaped(kind)}</td><td class="n">{count:,}</td><td class="more">{escaped(example)}</td></tr>'
        )
    if not rows:
        return ""
    return section("Left out", table('<th>why</th><th class="n">rows</th><th class="more">one of them</th>', rows))
