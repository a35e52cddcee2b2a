"""What a person sees of a join: correlations in the terminal, and a scatter of scores against changes."""

import itertools

from rich.console import Group, RenderableType
from rich.text import Text

from whence.evaluation.joining import Join, standard
from whence.reports.svg import COLOURS, dot, text
from whence.reports.tables import visible
from whence.reports.wide_table import Folded

SIZE, LEFT, TOP = 260.0, 64.0, 44.0


def join_report(found: Join) -> RenderableType:
    """Correlations by method, then the partitions that were needed most and least by each set."""
    sets = list(dict.fromkeys(row["set"] for row in found.points))
    title = "Do summed scores say what leaving a partition out does?"
    table = Folded(title, "method", ["Spearman", "95%", *sets])
    for method, told in found.correlations.items():
        own = [f"{told['by set'][name]:.2f}" for name in sets]
        whole = [f"{told['spearman']:.2f}", f"{told['low']:.2f} to {told['high']:.2f}"]
        table.add_row(Text(method), [*whole, *own])
    lines: list[RenderableType] = [table, Text("")]
    first = next(iter(found.correlations))
    for name in sets:
        own = sorted((row for row in found.points if row["set"] == name and row["method"] == first),
                     key=lambda row: -row["change"])  # fmt: skip
        said = f"{name}: most missed {own[0]['partition']} ({own[0]['change']:+.3f} nats without it), least "
        lines.append(Text(visible(f"{said}{own[-1]['partition']} ({own[-1]['change']:+.3f})"), "dim"))
    return Group(*lines)


def join_plot(found: Join) -> str:
    """A panel each method: summed score across, change upward, both standardised in each set; light or dark."""
    methods = list(found.correlations)
    sets = list(dict.fromkeys(row["set"] for row in found.points))
    width, height = LEFT + len(methods) * (SIZE + 40), TOP + SIZE + 60 + 18 * ((len(sets) + 3) // 4)
    colours = dict(zip(sets, itertools.cycle(COLOURS), strict=False))
    parts = []
    for number, method in enumerate(methods):
        x0 = LEFT + number * (SIZE + 40)
        told = found.correlations[method]
        parts.append(text(x0, TOP - 18, method, "title"))
        said = f"Spearman {told['spearman']:.2f} ({told['low']:.2f} to {told['high']:.2f})"
        parts.append(text(x0, TOP - 4, said, "axis"))
        parts.append(f'<rect class="frame" x="{x0}" y="{TOP}" width="{SIZE}" height="{SIZE}"/>')
        for name in sets:
            own = [row for row in found.points if row["method"] == method and row["set"] == name]
            across, upward = (standard([row[key] for row in own]) for key in ("score", "change"))
            for row, x, y in zip(own, across, upward, strict=True):
                cx, cy = (SIZE / 2 * (1 + max(-1.0, min(1.0, value / 3))) for value in (x, -y))
                said = f"{row['partition']} for {name}: {row['change']:+.3f} nats without it"
                parts.append(dot(x0 + cx, TOP + cy, said, fill=colours[name]))
    for place, name in enumerate(sets):
        x, y = LEFT + 160.0 * (place % 4), TOP + SIZE + 44.0 + 18.0 * (place // 4)
        parts.append(dot(x, y - 4, fill=colours[name]))
        parts.append(text(x + 10, y, name, "axis"))
    said = "score, summed over a partition's rows, standardised in each set"
    parts.append(text(LEFT, TOP + SIZE + 20, said, "axis"))
    upward = text(0.0, 0.0, "loss without it", "axis", "middle")
    parts.append(f'<g transform="translate(20 {TOP + SIZE / 2}) rotate(-90)">{upward}</g>')
    style = (
        "svg{font:13px system-ui,sans-serif;background:#fff}text{fill:#1c2024}.title{font-weight:600;font-size:15px}"
        ".axis{fill:#6b7280;font-size:11px}.frame{fill:none;stroke:#d5d9de}circle{fill-opacity:.75}"
        "@media(prefers-color-scheme:dark){svg{background:#14171a}text{fill:#e6e8ea}.axis{fill:#9aa1ab}"
        ".frame{stroke:#3a4048}}"
    )
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f"<title>Scores summed by partition against the loss without that partition</title><style>{style}</style>"
        f"{''.join(parts)}</svg>\n"
    )
