"""A mixing law as one HTML file that can be sent to a colleague: it runs nothing, loads nothing and needs no server.

First the mixture that the law suggests, beside what was tried and what there is, and a triangle of others
(`mix_triangle`); then, for each evaluation set, the
table's losses against those that a law predicted which had not seen them; last the numbers of the law, where it has
some that can be read. Names are untrusted: see `page`.
"""

from typing import Any

import numpy as np

from whence.counts import number_of
from whence.mixing.pipeline import Grade, MixLaw
from whence.mixing.protocols import MixingLaw, Term
from whence.reports.heat_map import heat_cell, heat_head, ramp
from whence.reports.mix_tables import bounds
from whence.reports.mix_triangle import grids, triangle_data, triangle_section
from whence.reports.page import document, escaped, fact_list, panel, panels, section, sentence, stretched, table
from whence.reports.svg import LEFT, SIDE, TOP, Scale, dot, number, scatter

POINTS = 600
"""Points of a panel, at most, chosen evenly from the table's rows."""
LABELLED_POINTS = 100
"""Most mixtures for which every point says its row on hovering."""

CENTRED = (
    ", whose mean over domains is 0. Blue: a domain that lowers the loss on the set more than the average domain does; "
    "orange: one that raises it."
)
"""What the numbers and colours of a centred term mean."""


def mix_page(result: MixLaw, command: str | None = None) -> str:
    """A mixing law as a self-contained HTML document, to be written as UTF-8.

    Args:
        result: What to show.
        command: The command that made it, where there is one.
    """
    size = f"{number_of(result.table.n, 'mixture')} of {len(result.table.domains)} domains"
    lead = f"{result.settings['law']} law of {size}"
    sets = number_of(len(result.table.sets), "evaluation set")
    how = f"Graded on {result.settings['folds']} held-out folds, on {sets}: "
    how += f"{'; '.join(_head(result.held_out.overall))}."
    body = [
        f'<p class="lead">{escaped(lead)}</p>',
        f'<p class="how">{escaped(how)}</p>',
        *(f'<p class="note">{escaped(note)}</p>' for note in result.notes),
        _mixture(result),
        triangle_section(result),
        _fits(result),
        _losses(result),
        *_constants(result),
        *_critical(result),
        section("How this was made", fact_list(_facts(result, command))),
    ]
    styles = ("plots.css", "mix_page.css")
    script = {"script": "mix_page.js", "data": triangle_data(result)} if grids(result) else {}
    return document("which mixture to train on", f"Whence: {lead}", body, *styles, **script)


def _facts(result: MixLaw, command: str | None) -> dict[str, str]:
    facts = {name: _plain(value) for name, value in result.settings.items() if value not in ({}, None)}
    facts["objective"] = number(result.best.objective, ".4g")
    if result.best.gap is not None:
        facts["gap"] = f"{result.best.gap:.2g}: the most that any mixture within the caps could be better, to the law"
    return facts if command is None else facts | {"command": command}


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in value.items()) if isinstance(value, dict) else str(value)


def _cells(*cells: str) -> str:
    return "".join(f'<td class="n">{cell}</td>' for cell in cells)


def _heads(first: str, *names: str, drawn: bool = False) -> str:
    numbers = "".join(f'<th class="n">{name}</th>' for name in names)
    return f"<th>{first}</th>{'<th></th>' if drawn else ''}{numbers}"


def _mixture(result: MixLaw) -> str:
    """Bars of the suggested shares over those of the best mixture tried, with what was tried and what there is."""
    lines = sorted(result.rows, key=lambda line: -line["suggested"])
    largest = max(line[name] for line in lines for name in ("suggested", "best_tried", "mean")) or 1.0
    has_caps = any(line["cap"] < 1 for line in lines)
    rows = []
    for line in lines:
        cells = [f"{line[name]:.1%}" for name in ("suggested", "best_tried", "mean")]
        cells.append(f"{line['least_tried']:.0%} to {line['most_tried']:.0%}")
        cells += [f"{line['cap']:.1%}" if line["cap"] < 1 else ""] if has_caps else []
        name = f'<td class="name">{escaped(line["domain"])}</td>'
        rows.append(f'<tr>{name}<td class="wide">{_bars(line, largest)}</td>{_cells(*cells)}</tr>')
    names = ["suggested", "best tried", "mean tried", "tried", *(["cap"] if has_caps else [])]
    key = '<i></i>suggested<i class="pool"></i>best of those tried'
    key += '<i class="cap"></i>cap' if has_caps else ""
    tried = number(float(result.table.losses[result.best_row] @ result.weights), ".4g")
    caption = (
        f"The law expects a mean loss of {number(result.best.objective, '.4g')} of the suggested mixture; the best of "
        f"the table's had {tried} ({result.table.row_names[result.best_row].rpartition('/')[2]}). {bounds(result)}"
    )
    drawn = f'<div class="shares">{table(_heads("domain", *names, drawn=True), rows)}</div>'
    return section("The mixture that it suggests", drawn + sentence(caption), f'<span class="key">{key}</span>')


def _bars(line: dict[str, Any], largest: float) -> str:
    """Bars of a domain's shares, and its cap, unless that lies beyond the picture's end."""
    suggested, tried, cap = (100 * line[name] / largest for name in ("suggested", "best_tried", "cap"))
    drawn = f'<rect class="chosen" x="0" y="0" width="{max(0.3, suggested):.2f}" height="8"/>'
    drawn += f'<rect class="pool" x="0" y="10" width="{max(0.3, tried):.2f}" height="6"/>'
    if line["cap"] < 1 and cap <= 100:
        drawn += f'<path class="cap" d="M{cap:.2f} -2V18"/>'
    return stretched("domain", 16, drawn)


def _fits(result: MixLaw) -> str:
    """The held-out prediction across, the table's loss upward, a panel each set."""
    which = np.unique(np.linspace(0, result.table.n - 1, min(POINTS, result.table.n)).round().astype(int))
    drawn = [
        panel(name, _head(result.held_out.sets[name]), _fit(result, place, which.tolist()))
        for place, name in enumerate(result.table.sets)
    ]
    caption = (
        "Across: the loss that a law predicted which was fitted without the mixture. Upward: the table's own. On the "
        "diagonal they are the same. Spearman's correlation and the mean absolute error, with 95% intervals."
    )
    if len(which) < result.table.n:
        caption += f" {len(which):,} of {result.table.n:,} mixtures are drawn."
    return section("What it predicts of mixtures that it has not seen", panels(drawn) + sentence(caption))


def _head(grade: Grade) -> list[str]:
    low, high = (number(end, ".3f") for end in grade.error_interval)
    error = f"error {number(grade.error, '.3f')} ({low} to {high})"
    if grade.spearman is None or grade.spearman_interval is None:
        return ["no rank correlation", error]
    below, above = (number(end, ".2f") for end in grade.spearman_interval)
    return [f"Spearman {number(grade.spearman, '.2f')} ({below} to {above})", error]


def _fit(result: MixLaw, place: int, which: list[int]) -> str:
    table = result.table
    pairs = [(float(result.held_out.predicted[row, place]), float(table.losses[row, place])) for row in which]
    across = Scale.spanning([value for pair in pairs for value in pair], LEFT, LEFT + SIDE)
    upward = Scale(across.low, across.high, TOP + SIDE, TOP)
    drawn = [
        f'<line class="diagonal" x1="{across.start:g}" y1="{upward.start:g}" x2="{across.end:g}" y2="{upward.end:g}"/>'
    ]
    for row, (predicted, true) in zip(which, pairs, strict=True):
        where = table.row_names[row].rpartition("/")[2]
        title_of_point = f"{where}: predicted {number(predicted, '.3f')}, measured {number(true, '.3f')}"
        drawn.append(
            dot(
                across(predicted),
                upward(true),
                title_of_point if table.n <= LABELLED_POINTS else "",
                radius=_radius(len(which)),
            )
        )
    title = f"Predicted and measured losses on {table.sets[place]}"
    return scatter(title, across, upward, ("predicted", "measured"), [*drawn])


def _radius(count: int) -> float:
    return 3.5 if count <= LABELLED_POINTS else 2.0


def _losses(result: MixLaw) -> str:
    """Losses on each set of the suggested mixture, the mean mixture and the best of the table."""
    rows = []
    for line in result.set_rows:
        kind = "" if line["weight"] else ' class="unasked"'
        losses = (number(line[name], ".3f") for name in ("suggested", "mean", "best_tried"))
        cells = _cells(*losses, f"{line['weight']:.0%}")
        rows.append(f'<tr{kind}><td class="name">{escaped(line["set"])}</td>{cells}</tr>')
    head = _heads("evaluation set", "suggested, predicted", "mean tried, predicted", "best tried", "in the objective")
    return section("Losses on each set", f'<div class="numbers">{table(head, rows)}</div>')


def _constants(result: MixLaw) -> list[str]:
    """A heat map for each kind of number in the law's formula; none for a law whose numbers nobody could read."""
    law, title = result.law, "The law's constants"
    return [_heat_map(law, term, f"{title} {term.symbol}" if len(law.terms) > 1 else title) for term in law.terms]


def _heat_map(law: MixingLaw, term: Term, title: str) -> str:
    """Sets by domains, with the numbers that a set has once before them."""
    largest, rows = float(np.abs(term.values).max()), []
    form = ".2f" if largest < 10 else ".1f"
    for place, name in enumerate(law.sets):
        constants = _cells(*(number(float(column[place]), ".3g") for column in term.constants.values()))
        cells = "".join(
            heat_cell(value, largest, number(value, form), f"{domain} on {name}: {number(value, '.4g')}")
            for domain, value in zip(law.domains, term.values[place].tolist(), strict=True)
        )
        rows.append(f'<tr><td class="name" title="{escaped(name)}">{escaped(name)}</td>{constants}{cells}</tr>')
    legend = f'<div class="legends">{ramp(largest, "as the table has it")}</div>' if largest > 0 else ""
    head = heat_head(law.domains, "evaluation set", *term.constants)
    caption = f"{law.formula}; the numbers are {term.symbol}{CENTRED if term.is_centred else '.'}"
    return section(title, f'{legend}<div class="heat">{table(head, rows, stacks=False)}</div>{sentence(caption)}')


def _critical(result: MixLaw) -> list[str]:
    """The share of each domain at which a set's loss is what it was before."""
    parts = []
    for name, by_domain in result.critical.items():
        rows = []
        for domain, ratio in by_domain.items():
            share = "none" if ratio.share is None else f"{ratio.side} {ratio.share:.1%}"
            cells = f'<td>{escaped(share)}</td><td class="more">{escaped(ratio.reason)}</td>'
            rows.append(f'<tr><td class="name">{escaped(domain)}</td>{cells}</tr>')
        caption = "The other domains as in the table's mean mixture."
        head = '<th>domain</th><th>share</th><th class="more"></th>'
        drawn = f'<div class="numbers">{table(head, rows)}</div>'
        title = f"Loss on {escaped(name)} stays at {result.settings['before'][name]:g} or below"
        parts.append(section(title, drawn + sentence(caption)))
    return parts
