"""An ablation as one HTML file that can be sent to a colleague: it runs nothing, loads nothing and needs no server.

First a heat map, mixtures by evaluation sets, coloured by how far the merged model's loss is from the parent's; of
mixtures of three partitions also the triangle of them. Where mixtures were really trained, a scatter of merged losses
against real ones for each set, and how well every proxy ranked. Names are untrusted: see `page`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from whence.ablation.candidates import Candidate
from whence.ablation.pipeline import Ablation, Cell
from whence.ablation.rank_agreement import Agreement
from whence.counts import number_of
from whence.reports.ablate_tables import PROXIES, cost_sentence
from whence.reports.heat_map import STRENGTHS, heat_cell, heat_head, ramp
from whence.reports.page import document, escaped, fact_list, panel, panels, section, sentence, stretched, table
from whence.reports.svg import COLOURS, REST, dot, inside_triangle, number, scales, scatter, stack, swatch, triangle

ROWS = 40
"""Mixtures of the heat map, beside those that are the best of some set."""


def ablate_page(ablation: Ablation, command: str | None = None, *, bits: bool = False) -> str:
    """An ablation as a self-contained HTML document, to be written as UTF-8.

    Args:
        ablation: What to show.
        command: The command that made it, where there is one.
        bits: Bits per byte in the cells, in place of perplexities.
    """
    grid = _Grid(ablation, bits)
    lead = f"{number_of(len(ablation.candidates), 'mixture')} on {number_of(len(grid.sets), 'evaluation set')}"
    body = [
        f'<p class="lead">{lead}</p>',
        f'<p class="how">{escaped(_how(ablation, has_truth=grid.has_truth))}</p>',
        *(f'<p class="note">{escaped(note)}</p>' for note in ablation.notes),
        _triangles(grid),
        _heat_map(grid),
        _scatters(grid),
        _agreements(ablation),
        section("How this was made", fact_list(_facts(grid, command))),
    ]
    return document("what another mixture would have given", f"Whence: {lead}", body, "plots.css", "ablate_page.css")


@dataclass(frozen=True)
class _Grid:
    """An ablation, by mixture and set."""

    ablation: Ablation
    bits: bool

    @cached_property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(cell.set for cell in self.ablation.cells))

    @cached_property
    def cells(self) -> Mapping[tuple[str, str], Cell]:
        return {(cell.mixture, cell.set): cell for cell in self.ablation.cells}

    @cached_property
    def best(self) -> Mapping[str, str]:
        """The mixture with the smallest merged loss on every set."""
        return self.ablation.best()

    @cached_property
    def order(self) -> list[Candidate]:
        """Mixtures, the best first, by the mean over sets."""
        return sorted(self.ablation.candidates, key=lambda candidate: self.gained[candidate.name])

    @cached_property
    def gained(self) -> Mapping[str, float]:
        """The merged loss less the parent's, as a mean over sets, for every mixture."""
        return self.ablation.gained()

    @cached_property
    def colours(self) -> dict[str, str]:
        """Colours of partitions; where there are too few, of the partitions with most weight."""
        total: dict[str, float] = {}
        for candidate in self.ablation.candidates:
            for name, weight in candidate.weights.items():
                total[name] = total.get(name, 0.0) + weight
        most = len(COLOURS) if len(total) <= len(COLOURS) else len(COLOURS) - 1
        coloured = {*sorted(total, key=lambda name: -total[name])[:most]}
        return dict(zip((name for name in total if name in coloured), COLOURS, strict=False))

    @cached_property
    def partitions(self) -> list[str]:
        """Partitions of which some mixture has a share."""
        return list(
            dict.fromkeys(
                name for candidate in self.ablation.candidates for name, w in candidate.weights.items() if w > 0
            )
        )

    @property
    def has_truth(self) -> bool:
        return any(cell.truth is not None for cell in self.ablation.cells)


def _how(ablation: Ablation, *, has_truth: bool) -> str:
    about = "Losses are of weighted means of the pool's members" + ("; every mixture was trained for real, too." if
           has_truth else ": no mixture was trained.")  # fmt: skip
    return f"{about} {cost_sentence(ablation.cost)}" if "break-even candidates" in ablation.cost else about


def _facts(grid: _Grid, command: str | None) -> dict[str, str]:
    facts = {"partitions": ", ".join(grid.partitions), "evaluation sets": ", ".join(grid.sets)}
    facts |= {name: f"{value:,.1f}".removesuffix(".0") for name, value in grid.ablation.cost.items()}
    return facts if command is None else facts | {"command": command}


def _value(loss: float, bits_per_byte: float | None, *, bits: bool) -> str:
    """A loss as a person reads it: perplexity, or bits per byte."""
    return number(bits_per_byte, ".3f") if bits else _perplexity(loss)


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700.0))
    return number(value, ".1f" if value < 1e5 else ".2g")


def _heat_map(grid: _Grid) -> str:
    """A row each mixture, the best first; then the parent."""
    first = {candidate.name for candidate in grid.order[:ROWS]} | {*grid.best.values()}
    rows = [candidate for candidate in grid.order if candidate.name in first]
    largest = max(
        (abs(cell.merged - cell.parent) for cell in grid.ablation.cells if math.isfinite(cell.merged)), default=0
    )
    lines = [_line(grid, candidate, float(largest)) for candidate in rows]
    of_parent = [grid.cells[grid.order[0].name, name].parent for name in grid.sets]
    cells = "".join(f'<td class="n">{_value(loss, None, bits=grid.bits)}</td>' for loss in of_parent)
    lines.append(f'<tr class="parent"><td class="name">the parent</td><td></td>{cells}<td></td></tr>')
    unit = "Bits per byte" if grid.bits else "Perplexity"
    caption = (
        f"{unit} of the merged model. Blue is below the parent's loss, orange above, in nats a token; framed is the "
        "best of each column. Ordered by the mean difference, at the right."
    )
    if rest := len(grid.order) - len(rows):
        more = number_of(rest, "more mixture of larger mean loss is", "more mixtures of larger mean loss are")
        caption += f" {more} not shown."
        caption += " -o FILE writes all."
    head = heat_head([*grid.sets, "mean, nats"], "mixture", "shares")
    drawn = f'<div class="heat">{table(head, lines, stacks=False)}</div>'
    scale = ramp(float(largest), "nats from the parent") if largest > 0 else ""
    legend = "" if len(grid.partitions) == 3 else _legend(grid)
    return section("Mixtures, the best first", f'<div class="legends">{legend}{scale}</div>{drawn}{sentence(caption)}')


def _legend(grid: _Grid) -> str:
    names = [f"<span>{swatch(colour)}{escaped(name)}</span>" for name, colour in grid.colours.items()]
    if rest := len(grid.partitions) - len(grid.colours):
        names.append(f"<span>{swatch(REST)}{number_of(rest, 'other')}</span>")
    return f'<p class="legend-of">{"".join(names)}</p>'


def _line(grid: _Grid, candidate: Candidate, largest: float) -> str:
    cells = [grid.cells[candidate.name, name] for name in grid.sets]
    inner = "".join(
        heat_cell(
            cell.merged - cell.parent,
            largest,
            _value(cell.merged, cell.bits_per_byte, bits=grid.bits),
            _cell_title(cell),
            is_best=grid.best[cell.set] == candidate.name,
        )
        for cell in cells
    )
    name = f'<td class="name" title="{escaped(_shares(candidate))}">{escaped(candidate.name)}</td>'
    mean = f'<td class="n mean">{number(grid.gained[candidate.name], "+.3f")}</td>'
    return f"<tr>{name}<td>{stack(candidate.weights, grid.colours)}</td>{inner}{mean}</tr>"


def _shares(candidate: Candidate) -> str:
    """A mixture's name, and what it is made of."""
    return f"{candidate.name}: {', '.join(f'{name} {weight:.1%}' for name, weight in candidate.weights.items())}"


def _cell_title(cell: Cell) -> str:
    """All numbers of a cell, shown on hovering."""
    text = (
        f"{cell.mixture} on {cell.set}: {number(cell.merged, '.3f')} nats a token ({number(cell.low, '.3f')} to "
        f"{number(cell.high, '.3f')}), the parent {number(cell.parent, '.3f')}, difference "
        f"{number(cell.merged - cell.parent, '+.3f')}; perplexity {_perplexity(cell.merged)}"
    )
    return text if cell.truth is None else f"{text}; trained for real {number(cell.truth, '.3f')} nats"


def _triangles(grid: _Grid) -> str:
    """A triangle for each set, where there are three partitions: a mixture is nearer to the corners it has more of."""
    if len(grid.partitions) != 3:
        return ""
    drawn = []
    for name in grid.sets:
        cells = sorted((cell for cell in grid.ablation.cells if cell.set == name), key=lambda cell: -cell.merged)
        ends = f"perplexity {_perplexity(cells[-1].merged)} to {_perplexity(cells[0].merged)}"
        drawn.append(panel(name, [f"best {cells[-1].mixture}", ends], _triangle(grid, name, cells)))
    caption = (
        "A corner is a partition alone, the middle all three alike. The bluer a point, the lower the merged loss, from "
        "the set's worst to its best, which has the ring."
    )
    return section("The triangle of mixtures", panels(drawn) + sentence(caption))


def _triangle(grid: _Grid, name: str, cells: list[Cell]) -> str:
    """The points of one set in the triangle; the worst are drawn first, so that better ones lie over them."""
    weights = {candidate.name: candidate.weights for candidate in grid.ablation.candidates}
    losses = [cell.merged for cell in cells if math.isfinite(cell.merged)]
    low, high = min(losses, default=0.0), max(losses, default=0.0)
    drawn, corners = [], {partition: grid.colours[partition] for partition in grid.partitions}
    for cell in cells:
        x, y = inside_triangle([weights[cell.mixture].get(partition, 0.0) for partition in corners])
        share = (high - cell.merged) / (high - low) if high > low and math.isfinite(cell.merged) else 0.0
        kind = f"point below s{max(1, round(STRENGTHS * share))}"
        drawn.append(dot(x, y, _cell_title(cell), kind=kind, radius=6.0))
        if cell.mixture == grid.best[name]:
            drawn.append(dot(x, y, kind="ring", radius=9.0))
    return triangle(f"Mixtures of {', '.join(corners)} on {name}", corners, drawn)


def _scatters(grid: _Grid) -> str:
    """The merged loss across, the real one upward, a panel each set."""
    if not grid.has_truth:
        return ""
    drawn = []
    for name in grid.sets:
        by_proxy = grid.ablation.agreements.get(name, {}).get("all", {})
        drawn.append(panel(name, _panel_facts(by_proxy), _scatter(grid, name)))
    key = '<span class="key"><i></i>has the set\'s own partition<i class="outside"></i>has not</span>'
    caption = (
        "Losses in nats a token: across of the merged model, upward of the model that was really trained. The ring is "
        "the mixture that the merge ranks first; the dashed line is the least real loss, and the way between them the "
        "regret. Spearman's correlation with its 95% interval; mean: that of the mean of the members' losses."
    )
    return section("Do merged losses rank as real ones do?", panels(drawn) + sentence(caption), key)


def _panel_facts(by_proxy: Mapping[str, Agreement]) -> list[str]:
    """Facts above a panel: how well the merge ranks, what it costs, and how well the mean of members does."""
    merged, mean = by_proxy.get("merged"), by_proxy.get("mean")
    if merged is None:
        return ["too few mixtures for a correlation"]
    low, high = (number(end, ".2f") for end in merged.spearman_interval)
    facts = [f"Spearman {number(merged.spearman, '.2f')} ({low} to {high})"]
    other = [] if mean is None else [f"mean {number(mean.spearman, '.2f')}"]
    return [*facts, " · ".join([f"regret {number(merged.regret, '.3f')}", *other])]


def _scatter(grid: _Grid, name: str) -> str:
    cells = [cell for cell in grid.ablation.cells if cell.set == name]
    points = [(cell.merged, cell.truth, cell) for cell in cells if cell.truth is not None]
    points = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
    across, upward = scales([x for x, _, _ in points], [y for _, y, _ in points])
    drawn = []
    if points:
        y = upward(min(y for _, y, _ in points))
        drawn.append(f'<line class="least" x1="{across.start:g}" x2="{across.end:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
    drawn += [
        dot(across(x), upward(y), _cell_title(cell), kind="inside" if cell.contained else "outside")
        for x, y, cell in sorted(points, key=lambda point: point[2].contained)
    ]
    if points:
        x, y, _ = min(points, key=lambda point: point[0])
        drawn.append(dot(across(x), upward(y), kind="ring", radius=7.0))
    return scatter(f"Merged against real losses on {name}", across, upward, ("merged", "trained"), drawn)


def _agreements(ablation: Ablation) -> str:
    """By set and group of mixtures: the merge's correlation with its interval, drawn and in numbers; others' beside."""
    rows = []
    for name, by_group in ablation.agreements.items():
        measured = {group: by_proxy for group, by_proxy in by_group.items() if "merged" in by_proxy}
        counts = {group: by_proxy["merged"].candidates for group, by_proxy in measured.items()}
        groups = [group for group in measured if group == "all" or counts[group] < counts.get("all", math.inf)]
        rows += [_agreement(name, group, measured[group]) for group in groups]
    if not rows:
        return ""
    names = ("n", "merged", "95%", *PROXIES, "Pearson", "Kendall", "regret", "spread")
    head = "<th>evaluation set</th><th></th>" + "".join(f'<th class="n">{name}</th>' for name in names)
    caption = (
        "Spearman's correlation of a proxy with the losses of really trained models, over mixtures. Regret: nats lost "
        "by choosing the mixture that the merge ranks first; spread: from the best real loss to the worst. Contained: "
        "mixtures with the set's own partition. That they are better on it is easy to see; their order is not."
    )
    key = '<span class="key"><i class="round"></i>merged, 95%<i class="tick"></i>mean of members; from 0 to 1</span>'
    return section(
        "Agreement with really trained models", f'<div class="agree">{table(head, rows)}</div>{sentence(caption)}', key
    )


def _agreement(name: str, group: str, by_proxy: Mapping[str, Agreement]) -> str:
    merged = by_proxy["merged"]
    low, high = (number(end, ".2f") for end in merged.spearman_interval)
    others = (by_proxy[proxy].spearman if proxy in by_proxy else None for proxy in PROXIES)
    cells = [f"{merged.candidates}", number(merged.spearman, ".2f"), f"{low} to {high}"]
    cells += [number(value, ".2f") for value in (*others, merged.pearson, merged.kendall)]
    cells += [number(value, ".3f") for value in (merged.regret, merged.spread)]
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    is_whole = group == "all"
    label = f'<td class="{"name" if is_whole else "part"}">{escaped(name if is_whole else group)}</td>'
    drawn = f'<td class="forest">{_whiskers(merged, by_proxy.get("mean"))}</td>'
    return f'<tr class="{"of-set" if is_whole else "of-group"}">{label}{drawn}{numbers}</tr>'


def _whiskers(merged: Agreement, mean: Agreement | None) -> str:
    """A correlation from 0 to 1, cut at 0: a dot with its interval, and a tick for the mean of members."""
    place, low, high = (100 * min(1.0, max(0.0, value)) for value in (merged.spearman, *merged.spearman_interval))
    drawn = '<path class="zero" d="M0 1V15M50 1V15M100 1V15"/>'
    drawn += f'<path class="whisker" d="M{low:.2f} 8H{high:.2f}"/>'
    if mean is not None:
        drawn += f'<path class="tick" d="M{100 * min(1.0, max(0.0, mean.spearman)):.2f} 2V14"/>'
    return stretched("whiskers", 16, f'{drawn}<path class="place" d="M{place:.2f} 8h0"/>')
