"""A selection as one HTML file that can be sent to a colleague: it runs nothing, loads nothing and needs no server.

What was chosen stands beside the pool that it was chosen from, by source, by length and by score; then the rows at both
ends of the choice and just below it, and what was left out and why. Corpus text is untrusted: it is escaped, and the
page's policy allows no script and no address at all.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from string import Template

import torch
from jaxtyping import Float
from torch import Tensor

from whence.answers import shown_text
from whence.corpus import Row
from whence.page import content_policy, packaged
from whence.report import visible
from whence.report_select import told_nearness
from whence.selection import Chosen, composition, lengths, nearness
from whence.selectors.choice import BELOW

FIRST, LAST, NEAREST = 10, 5, 5
"""Rows that are shown of the best of the choice, of its last, and of the best below it."""
TARGETS = 12
"""Targets that are listed."""
LONGEST = 600
"""Characters of a row that are shown."""
BINS = 36
"""Of a histogram."""


def selection_page(chosen: Chosen, overlaps: Mapping[str, float] | None = None) -> str:
    """A selection as a self-contained HTML document, to be written as UTF-8.

    Args:
        chosen: What to show.
        overlaps: Of other methods' choices under the same budget, by name; see `selection.overlap`.
    """
    selection, settings = chosen.selection, chosen.settings
    tokens = f", {selection.tokens:,} tokens" if selection.tokens else ""
    lead = f"{len(selection.rows):,} of {len(selection.reasons):,} rows{tokens}"
    body = [
        f'<p class="lead">{_text(lead)}</p><p class="how">by {_text(settings["method"])}, '
        f"{_text(settings['selector'])}</p>",
        *(f'<p class="note">{_text(note)}</p>' for note in selection.notes),
        _sources(chosen),
        _distributions(chosen),
        _targets(chosen),
        _overlaps(overlaps or {}),
        _rows(chosen),
        _left_out(chosen),
        _section("How this was made", f"<dl>{''.join(_fact(*fact) for fact in settings.items())}</dl>"),
    ]
    style = packaged("page.css") + packaged("page_select.css")
    return Template(packaged("page_select.html")).substitute(
        policy=content_policy(style),
        title=_text(f"Whence: {lead}, by {settings['method']}"),
        style=style,
        body="\n".join(part for part in body if part),
    )


def _text(text: str) -> str:
    return escape(visible(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")))


def _section(title: str, inner: str, more: str = "") -> str:
    return f"<section><h2>{title}{more}</h2>{inner}</section>"


def _fact(name: str, value: str) -> str:
    return f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>"


_KEY = '<span class="key"><i></i>chosen<i class="pool"></i>the pool</span>'


def _sources(chosen: Chosen) -> str:
    total, lines = len(chosen.selection.reasons), composition(chosen)
    largest = max(max(line["share"], line["pool_rows"] / total) for line in lines)
    rows = []
    for line in lines:
        pool = line["pool_rows"] / total
        bars = _bars(line["share"] / largest, pool / largest)
        cells = [f"{line['rows']:,}", f"{line['share']:.1%}", f"{pool:.1%}", f"{line['lift']:.2f}"]
        cells += [f"{line['tokens']:,}"] if chosen.selection.tokens else []
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows.append(f'<tr><td>{_text(line["source"] or "-")}</td><td class="wide">{bars}</td>{numbers}</tr>')
    names = ["rows", "share", "of the pool", "lift"] + (["tokens"] if chosen.selection.tokens else [])
    head = "<th>source</th><th></th>" + "".join(f'<th class="n">{name}</th>' for name in names)
    return _section("Where the rows come from", _table(head, rows), _KEY)


def _bars(*shares: float) -> str:
    """The chosen's share over the pool's. Widths come as attributes of SVG, for the policy allows no inline style."""
    kinds = ("chosen", "pool")
    bars = "".join(
        f'<rect class="{kind}" x="0" y="{10 * number}" width="{max(0.3, 100 * share):.2f}" height="7"/>'
        for number, (kind, share) in enumerate(zip(kinds, shares, strict=False))
    )
    kind = "two" if len(shares) > 1 else "one"
    height = 10 * len(shares) - 3
    return f'<svg class="{kind}" viewBox="0 0 100 {height}" preserveAspectRatio="none" aria-hidden="true">{bars}</svg>'


def _table(head: str, rows: Sequence[str]) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


# -- lengths and scores


def _distributions(chosen: Chosen) -> str:
    able, rows = chosen.candidates.rankable(), chosen.selection.rows
    parts = []
    if chosen.selection.tokens:
        size, tokens = lengths(chosen), chosen.candidates.tokens.double()
        told = f"Median {size['median_tokens']:,.0f} tokens; in the pool {size['pool_median_tokens']:,.0f}."
        drawn = _histogram(tokens[able].log2(), tokens[rows].log2(), lambda value: f"{2**value:,.0f}")
        parts.append(_section("Length in tokens", f'{drawn}<p class="say">{told}</p>', _KEY))
    scores = chosen.candidates.scores.double().masked_fill(~chosen.candidates.scores.isfinite(), -math.inf).amax(0)
    several = "each row's best over the targets" if len(chosen.candidates.targets) > 1 else "of the target"
    drawn = _histogram(scores[able], scores[rows], lambda value: f"{value:.3g}")
    told = f"Score, {several}; larger is more helpful. Bars are shares of each side."
    if (nearer := nearness(chosen)) is not None:
        told += f" {told_nearness(nearer)}."
    parts.append(_section("Score", f'{drawn}<p class="say">{told}</p>', _KEY))
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
    ticks = "".join(
        f'<text x="{width * place:.0f}" y="{height + 16}" text-anchor="{anchor}">'
        f"{escape(named(low + (high - low) * place))}</text>"
        for place, anchor in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end"))
    )
    axis = f'<line x1="0" x2="{width:.0f}" y1="{height:.0f}" y2="{height:.0f}"/>'
    return f'<svg viewBox="0 0 {width:.0f} {height + 20:.0f}" role="img">{"".join(drawn)}{axis}{ticks}</svg>'


# -- targets, other methods


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
        f'<tr><td>{_text(name)}</td><td class="wide">{_bars(taken[name] / most)}</td>'
        f'<td class="n">{taken[name]:,}</td></tr>'
        for name in order[:TARGETS]
    ]
    rest = sum(1 for name in order if not taken[name])
    more = f'<p class="say">{len(order) - TARGETS:,} more targets.</p>' if len(order) > TARGETS else ""
    if rest:
        more += f'<p class="say">{rest:,} of {len(order):,} targets have no row of their own.</p>'
    head = '<th>target</th><th></th><th class="n">rows taken for it</th>'
    return _section("What the rows were taken for", _table(head, rows) + more)


def _overlaps(overlaps: Mapping[str, float]) -> str:
    if not overlaps:
        return ""
    rows = [
        f'<tr><td>{_text(name)}</td><td class="wide">{_bars(share)}</td><td class="n">{share:.0%}</td></tr>'
        for name, share in sorted(overlaps.items(), key=lambda item: -item[1])
    ]
    head = '<th>method</th><th></th><th class="n">rows in common</th>'
    say = '<p class="say">Choices under the same budget; a share of the smaller one.</p>'
    return _section("Other methods", _table(head, rows) + say)


# -- rows


def _rows(chosen: Chosen) -> str:
    selection, count = chosen.selection, len(chosen.rows)
    best, last = range(min(FIRST, count)), range(max(FIRST, count - LAST), count)
    parts = [_section("Chosen first", "".join(_chosen_row(chosen, place) for place in best))]
    if last:
        parts.append(_section("Chosen last", "".join(_chosen_row(chosen, place) for place in last)))
    below = [number for number, reason in enumerate(selection.reasons) if reason == BELOW]
    scores = chosen.candidates.scores[:, below].amax(0)
    nearest = [below[place] for place in scores.topk(min(NEAREST, len(below))).indices.tolist()] if below else []
    if nearest:
        inner = "".join(_other_row(chosen, number) for number in nearest)
        parts.append(_section("Best of those below the budget", inner))
    return "\n".join(parts)


def _chosen_row(chosen: Chosen, place: int) -> str:
    selection = chosen.selection
    facts = [f"<b>{selection.scores[place]:.4g}</b>"]
    source, target = chosen.candidates.sources[selection.rows[place]], selection.targets[place]
    facts += [_text(source)] if source else []
    facts += [f"for {_text(target)}"] if target and len(chosen.candidates.targets) > 1 else []
    return _row(str(place + 1), _shown(chosen.rows[place]), facts)


def _shown(row: Row) -> str:
    """Prompt and completion, in different ink."""
    text = shown_text(row)
    if "text" in text:
        return f"<div>{_cut(text['text'])}</div>"
    return f'<div class="prompt">{_cut(text.get("prompt"))}</div><div>{_cut(text.get("completion"))}</div>'


def _other_row(chosen: Chosen, number: int) -> str:
    source = chosen.candidates.sources[number]
    facts = [f"<b>{float(chosen.candidates.scores[:, number].amax()):.4g}</b>"] + ([_text(source)] if source else [])
    return _row("", f"<div>{_cut(chosen.candidates.texts[number])}</div>", facts)


def _row(rank: str, text: str, facts: Iterable[str]) -> str:
    told = "".join(f"<div>{fact}</div>" for fact in facts)
    return f'<div class="pick"><div>{rank}</div><div class="text">{text}</div><div class="about">{told}</div></div>'


def _cut(text: str | None) -> str:
    whole = (text or "").strip()
    if len(whole) <= LONGEST:
        return _text(whole)
    return f'{_text(whole[:LONGEST])}<span class="rest"> … {len(whole) - LONGEST:,} more characters</span>'


def _left_out(chosen: Chosen) -> str:
    """Reasons, with how many rows each kept out and one of them."""
    reasons = chosen.selection.reasons
    rows = []
    for kind, count in chosen.selection.tally().items():
        number = next(n for n, reason in enumerate(reasons) if reason is not None and reason.startswith(kind))
        text = " ".join(chosen.candidates.texts[number].split())[:160]
        example = f"row {number + 1}{': ' + text if text else ''}"
        rows.append(f'<tr><td>{_text(kind)}</td><td class="n">{count:,}</td><td>{_text(example)}</td></tr>')
    if not rows:
        return ""
    return _section("Left out", _table('<th>why</th><th class="n">rows</th><th>one of them</th>', rows))
