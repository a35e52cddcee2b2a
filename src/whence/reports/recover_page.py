"""A recovery as one HTML file that can be sent to a colleague: it runs nothing, loads nothing and needs no server.

First the mixture of sources with its intervals, then the rows at both ends of the choice; then what they rest on: the
scores of all rows beside those of rows that are known not to be members, what the calibration went by, and how far each
parameter moved against the rounding of its file. Corpus text is untrusted: see `page`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from whence.counts import number_of
from whence.recovery.pipeline import Recovered
from whence.reports.page import (
    axis,
    bars,
    document,
    escaped,
    fact_list,
    pick,
    row_html,
    section,
    sentence,
    stretched,
    table,
)
from whence.reports.recover_tables import members_text
from whence.reports.svg import number

FIRST, LAST = 10, 5
"""Rows that are shown of the best of the choice, and of its last."""
SOURCES, LAYERS, WEIGHTS = 20, 12, 12
"""Lines of the tables; the rest is counted."""
BINS = 40
"""Bins of a histogram, at most; few rows have fewer."""
FARTHEST = 16.0
"""Log odds beyond which rows stand in the last bin: about where float32 has no probability left but 1."""
TICKS = (0.5, 0.1, 0.9, 0.01, 0.99, 0.001, 0.999, 0.0001, 0.9999, 0.00001, 0.000001)
"""Probabilities that a histogram names, as far as there is room, in order of importance."""
SHARES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)
"""Shares of rows whose heights a histogram names, as far as there is room."""
ROOM = 0.12
"""Least distance between two names below a histogram, as a share of its width."""


def recover_page(recovery: Recovered, command: str | None = None) -> str:
    """A recovery as a self-contained HTML document, to be written as UTF-8.

    Args:
        recovery: What to show.
        command: The command that made it, where there is one.
    """
    lead = f"{len(recovery.rows):,} of {number_of(len(recovery.scores), 'row')}"
    body = [
        f'<p class="lead">{lead}</p>',
        *(f'<p class="how">{escaped(line)}</p>' for line in _how(recovery)),
        *(f'<p class="note">{escaped(note)}</p>' for note in recovery.notes),
        _mixture(recovery),
        *_rows(recovery),
        f'<div class="pair">{_scores(recovery)}{_weights(recovery)}</div>',
        _layers(recovery),
        section("How this was made", fact_list(_facts(recovery, command))),
    ]
    title = f"Whence: {lead}, by {recovery.settings['method']}"
    return document("what this model was trained on", title, body, "recover_page.css")


def _how(recovery: Recovered) -> list[str]:
    about = f"by {recovery.settings['method']}."
    if recovery.learned is None:
        return [about]
    right = _expected(recovery.scores[recovery.numbers])
    about += f" Trained on: about {right} of them, {members_text(recovery)} in all."
    if "shadow" not in recovery.settings:
        return [about]
    shadow = recovery.settings["shadow"]
    return [about, f"Probabilities are from a shadow, a model trained here on known rows: {shadow}."]


def _expected(scores: Tensor) -> str:
    return f"{float(scores[scores.isfinite()].double().sum()):,.0f}"


def _facts(recovery: Recovered, command: str | None) -> dict[str, str]:
    facts = dict(recovery.settings)
    if recovery.learned is not None:
        by = recovery.learned.calibration
        facts["calibration"] = f"{by.share:.1%} of its rows trained on, ridge {by.ridge:g}"
    return facts if command is None else facts | {"command": command}


def _probability(value: float) -> str:
    """A probability as text, never rounded to certainty."""
    if not math.isfinite(value):
        return "-"
    return "over 99.9%" if value >= 0.9995 else "under 0.1%" if value < 0.0005 else f"{value:.1%}"


def _head(*names: str) -> str:
    """Names of columns: the first, one without a name for the bars, numbers."""
    numbers = "".join(f'<th class="n">{name}</th>' for name in names[1:])
    return f"<th>{names[0]}</th><th></th>{numbers}"


def _line(name: str, drawn: str, *cells: str) -> str:
    """A row under `_head`. Cells are text."""
    numbers = [f'<td class="n">{escaped(cell)}</td>' for cell in cells]
    parts = escaped(name).replace(".", ".<wbr>")  # so that a parameter's name can break
    return f'<tr><td class="name">{parts}</td><td class="wide">{drawn}</td>{"".join(numbers)}</tr>'


def _mixture(recovery: Recovered) -> str:
    """Bars with whiskers, and how many of the rows found are of each source."""
    if not recovery.mixture:
        return ""
    lines = sorted(recovery.mixture, key=lambda line: -line["share"])
    ends = [line[name] for line in lines for name in ("share", "high")]
    largest = max((end for end in ends if math.isfinite(end)), default=0.0) or 1.0
    chosen = Counter(str(row.get("source")) for row in recovery.rows)
    rows = []
    for line in lines[:SOURCES]:
        count = chosen[line["source"]]
        share = f"{count:,} ({count / len(recovery.rows):.0%})" if recovery.rows else "0"
        rows.append(_line(line["source"], _whiskers(line, largest), _interval(line), share))
    caption = "Estimated from the weights by source, not by counting the rows found. Whiskers: 95% intervals."
    if rest := lines[SOURCES:]:
        more = number_of(len(rest), "more source has", "more sources have")
        caption += f" {more} {sum(line['share'] for line in rest):.0%} together."
    head = _head("source", "share (95%)", "rows found")
    return section("What it was trained on, by source", table(head, rows) + sentence(caption))


def _interval(line: Mapping[str, Any]) -> str:
    """A share with its interval, such as 61% (57 to 65)."""
    share, low, high = (number(100 * line[name], ".0f") for name in ("share", "low", "high"))
    return f"{share}% ({low} to {high})"


def _whiskers(line: Mapping[str, Any], largest: float) -> str:
    share, low, high = (100 * line[name] / largest for name in ("share", "low", "high"))
    drawn = f'<rect class="share" x="0" y="2" width="{max(0.3, share):.2f}" height="12"/>' if share > 0 else ""
    if math.isfinite(low) and math.isfinite(high):
        ends = f"M{low:.2f} 4V12M{high:.2f} 4V12M{low:.2f} 8H{high:.2f}"
        drawn += f'<path class="whisker" d="{ends}"/>'
    return stretched("share", 16, drawn)


def _rows(recovery: Recovered) -> list[str]:
    count = len(recovery.rows)
    first, last = range(min(FIRST, count)), range(max(FIRST, count - LAST), count)
    parts = [section("First of the rows found", "".join(_row(recovery, place) for place in first))] if count else []
    if last:
        between = last.start - len(first)
        more = f" <small>after {between:,} more</small>" if between else ""
        parts.append(section("Last of them", "".join(_row(recovery, place) for place in last), more))
    return parts


def _row(recovery: Recovered, place: int) -> str:
    row = recovery.rows[place]
    score = row["whence_score"]
    score_text = _probability(score) if recovery.learned is not None else number(score, ".4g")
    numbers = f"p {number(row['whence_p'], '.2g')}"
    if "whence_weight" in row:
        numbers += f" · weight {number(row['whence_weight'], '.2g')}"
    where = f"row {recovery.numbers[place] + 1:,}"
    if row.get("source") is not None:
        where = f"{escaped(str(row['source']))} · {where}"
    return pick(f"{place + 1:,}", row_html(row), [f"<b>{score_text}</b>", numbers, where])


def _scores(recovery: Recovered) -> str:
    """A histogram of all rows' scores, in the calibrated case as log odds, beside those of the null."""
    is_chosen = torch.zeros(len(recovery.scores), dtype=torch.bool)
    is_chosen[recovery.numbers] = True
    known = recovery.scores.isfinite()
    scores, is_chosen = recovery.scores[known].double(), is_chosen[known]
    caption, null = "Heights are shares of the rows with evidence, drawn as their square roots.", None
    key = '<i></i>found<i class="pool"></i>other rows'
    if recovery.learned is not None:
        null = None if recovery.null is None else recovery.null.double().clamp(-FARTHEST, FARTHEST)
        scores = _log_odds(scores)
    if null is not None:
        caption += f" The line: {number_of(len(null), 'row')} that the shadow was not trained on, where this corpus "
        caption += "has such rows."
        key += '<i class="null"></i>known not to be trained on'
    if lost := len(known) - len(scores):
        caption += f" {number_of(lost, 'row is', 'rows are')} without evidence."
    drawn = _histogram(scores, is_chosen, null, is_probability=recovery.learned is not None)
    name = "Probability" if recovery.learned is not None else "Score"
    return section(f"{name} of all rows", drawn + sentence(caption), f'<span class="key">{key}</span>')


def _log_odds(probabilities: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    return probabilities.logit().clamp(-FARTHEST, FARTHEST)


def _histogram(
    scores: Float64[Tensor, " n"], is_chosen: Tensor, null: Float64[Tensor, " m"] | None, *, is_probability: bool
) -> str:
    """Shares in equal bins, the rows found in blue at the foot, the null as a line; and where the choice ends.

    Heights are square roots, for the rows that a model was trained on are few: Tukey's rootogram.
    """
    both = scores if null is None else torch.cat([scores, null])
    if not len(both):
        return sentence("No row has evidence.")
    low, high = float(both.min()), float(both.max())
    if high <= low:
        return sentence(f"All are {_named(low, is_probability)}.")
    count = min(BINS, max(8, 2 * math.isqrt(len(scores))))
    parts = (scores[is_chosen], scores[~is_chosen])
    sides = [torch.histc(part, count, low, high) / max(1, len(scores)) for part in parts]
    line = torch.zeros(count) if null is None else torch.histc(null, count, low, high) / len(null)
    bins = sides[0] + sides[1]
    top, width, height = max(float(bins.max()), float(line.max())), 366.0, 220.0  # heights are named at the right
    step, drawn = width / count, [_grid(top, width, height)]
    for kind, side, under in (("chosen", sides[0], torch.zeros(count)), ("pool", sides[1], sides[0])):
        tall = (bins / top).sqrt() / bins.clamp_min(1e-30) * height
        drawn += [
            f'<rect class="{kind}" x="{number * step + 0.5:.1f}" y="{height - foot - length:.2f}" '
            f'width="{step - 1:.1f}" height="{length:.2f}"/>'
            for number, (foot, length) in enumerate(zip((under * tall).tolist(), (side * tall).tolist(), strict=True))
            if length
        ]
    if null is not None:
        tops = (height * (1 - (line / top).sqrt())).tolist()
        path = "".join(f"V{y:.2f}H{(number + 1) * step:.1f}" for number, y in enumerate(tops))
        drawn.append(f'<path class="null" d="M0 {height:.0f}{path}V{height:.0f}"/>')
    if is_chosen.any():
        cut = float(scores[is_chosen].min())
        words = "found from" if bool(is_chosen[scores >= cut].all()) else "the lowest found is"
        drawn.append(_cut((cut - low) / (high - low), width, height, f"{words} {_named(cut, is_probability)}"))
    ticks = axis(width, height, _ticks(low, high, is_probability))
    return f'<svg class="scores" viewBox="0 -18 400 {height + 38:.0f}" role="img">{"".join(drawn)}{ticks}</svg>'


def _named(value: float, is_probability: bool) -> str:
    return _probability(1 / (1 + math.exp(-value))) if is_probability else number(value, ".3g")


def _grid(top: float, width: float, height: float) -> str:
    """Lines at some shares, with their names."""
    drawn, last = "", height
    for share in SHARES:
        y = height * (1 - math.sqrt(share / top))
        if 0 <= y < last - 16:
            name = f'<text x="{width + 6:.0f}" y="{y + 4:.1f}">{100 * share:g}%</text>'
            drawn += f'<line class="grid" x1="0" x2="{width:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>{name}'
            last = y
    return drawn


def _cut(place: float, width: float, height: float, words: str) -> str:
    """A line where the choice ends."""
    x, anchor = place * width, "end" if place > 0.5 else "start"
    line = f'<line class="cut" x1="{x:.1f}" x2="{x:.1f}" y1="-14" y2="{height:.0f}"/>'
    aside = x - 5 if place > 0.5 else x + 5
    return f'{line}<text class="at" x="{aside:.1f}" y="-6" text-anchor="{anchor}">{escaped(words)}</text>'


def _ticks(low: float, high: float, is_probability: bool) -> dict[float, str]:
    """Places from 0 to 1, with their names."""
    if not is_probability:
        return {place: number(low + (high - low) * place, ".3g") for place in (0.0, 0.25, 0.5, 0.75, 1.0)}
    ticks: dict[float, str] = {}
    for probability in TICKS:
        place = (math.log(probability / (1 - probability)) - low) / (high - low)
        if 0.04 < place < 0.96 and all(abs(place - other) > ROOM for other in ticks):
            ticks[place] = f"{100 * probability:g}%"
    return ticks


def _weights(recovery: Recovered) -> str:
    """The calibration's weights, the largest in magnitude first; bars to the right speak for membership."""
    if recovery.learned is None:
        return ""
    by = recovery.learned.calibration
    order = by.weights.abs().argsort(descending=True, stable=True).tolist()
    largest = float(by.weights.abs().max()) if order else 0.0
    rows = []
    for place in order[:WEIGHTS]:
        weight = float(by.weights[place])
        rows.append(_line(by.names[place], _signed(weight / (largest or 1.0)), number(weight, "+.2f")))
    caption = (
        "Log odds for each robust standard deviation of a kind of evidence; g is a row's gradient. "
        "Kinds overlap: a small weight does not say that one is worthless."
    )
    if rest := order[WEIGHTS:]:
        caption += f" {len(rest):,} more weigh {float(by.weights[rest].abs().max()):.2f} at most."
    key = '<span class="key"><i></i>for<i class="against"></i>against membership</span>'
    inner = f'<div class="weights">{table(_head("evidence", "weight"), rows)}</div>'
    return section("What the calibration went by", inner + sentence(caption), key)


def _signed(share: float) -> str:
    """A bar from the middle; `share` from -1 to 1."""
    length = max(0.3, 50 * abs(share)) if math.isfinite(share) else 0.0
    kind, x = ("chosen", 50.0) if share > 0 else ("against", 50 - length)
    bar = f'<rect class="{kind}" x="{x:.2f}" y="0" width="{length:.2f}" height="7"/>' if length else ""
    return stretched("signed", 7, f'{bar}<line class="zero" x1="50" x2="50" y1="-1" y2="8"/>')


def _layers(recovery: Recovered) -> str:
    """The layers that moved the most, over what rounding alone would give."""
    if not recovery.layers:
        return ""
    moved = sorted((line for line in recovery.layers if line["norm"] > 0), key=lambda line: -line["norm"])
    still = len(recovery.layers) - len(moved)
    weak = sum(1 for line in moved if not line["carries_signal"])
    ends = [line[name] for line in moved for name in ("norm", "noise")]
    largest = max((end for end in ends if math.isfinite(end)), default=0.0) or 1.0
    rows = [
        _line(
            line["name"],
            bars(*(line[name] / largest for name in ("norm", "noise"))),
            number(line["norm"], ".3g"),
            _times(line["signal"]),
            number(line["relative"], ".2%"),
            number(line["unchanged"], ".0%"),
        )
        for line in moved[:LAYERS]
    ]
    caption = (
        f"{still:,} of {number_of(len(recovery.layers), 'parameter')} did not move at all"
        if still
        else "All parameters moved"
    )
    caption += f"; {weak:,} moved no more than rounding does." if weak else "."
    if len(moved) > LAYERS:
        caption += f" {len(moved) - LAYERS:,} more moved less than these."
    key = '<span class="key"><i></i>moved by<i class="pool"></i>by rounding alone</span>'
    head = _head("parameter", "moved by", "over rounding", "of its norm", "unchanged")
    return section("What moved the most", f'<div class="layers">{table(head, rows)}</div>{sentence(caption)}', key)


def _times(signal: float | None) -> str:
    text = number(signal, ",.0f" if signal is not None and signal >= 10 else ".1f")
    return text if text == "-" else f"{text} times"
