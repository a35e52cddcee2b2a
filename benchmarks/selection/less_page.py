"""Write the measured parts of docs/results/selection.md, and its plot, from benchmarks/selection/results/less.json."""

import json
from pathlib import Path

from benchmarks.marked import filled
from benchmarks.selection.less import OLD

from whence.evaluation.choices import EVERYTHING, RANDOM
from whence.evaluation.selection import NOTHING, Line, SelectionTable
from whence.reports.evaluate_tables import evaluate_plot

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/selection/results/less.json"
PAGE, PLOT = ROOT / "docs/results/selection.md", ROOT / "docs/pictures/selection.svg"


def main() -> None:
    """Put tables between the page's marks; in the plot, methods that read an index have the default one."""
    document = json.loads(RESULTS.read_text())
    old, default = document[f"seed 0{OLD}"], document.get("seed 0", {"table 0.05": {"lines": []}})
    parts = [table(old[name], name) for name in sorted(name for name in old if name.startswith("table"))]
    page = filled(PAGE.read_text(), "measured", "\n".join(parts))
    if "seed 0" in document:
        page = filled(page, "both indexes", both_indexes(old, default))
    PAGE.write_text(page)
    lines = [line_of(row) for row in default["table 0.05"]["lines"]]
    lines += [line_of(row | {"method": label(row["method"])}) for row in old["table 0.05"]["lines"]
              if row["method"] not in {line.method for line in lines}]  # fmt: skip
    PLOT.write_text(evaluate_plot(SelectionTable(lines, {})))


def both_indexes(old: dict, default: dict) -> str:
    """Each method that was trained on by both indexes, at each budget: two lines, the old index first."""
    tasks = list(dict.fromkeys(row["task"] for row in default["table 0.05"]["lines"]))
    out = ["| budget | method | index | " + " | ".join(f"{task}: loss | gain over random" for task in tasks) + " |",
           "|---|---|---|" + "---|" * (2 * len(tasks))]  # fmt: skip
    for name in sorted(name for name in default if name.startswith("table")):
        for method in dict.fromkeys(row["method"] for row in default[name]["lines"]):
            for index, found in (("old", old[name]), ("default", default[name])):
                by = {(row["method"], row["task"]): line_of(row) for row in found["lines"]}
                cells = [cell for task in tasks for cell in shown(by[method, task])[:2]]
                out.append(f"| {float(name.split()[1]):.0%} | {method} | {index} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def line_of(row: dict) -> Line:
    """As it was before it was written."""
    interval = row["gain_interval"]
    return Line(**row | {"gain_interval": None if interval is None else tuple(interval)})


def table(found: dict, name: str) -> str:
    """A budget's table, best mean gain first."""
    lines = [line_of(row) for row in found["lines"]]
    tasks = list(dict.fromkeys(line.task for line in lines))
    by = {(line.method, line.task): line for line in lines}
    methods = sorted(dict.fromkeys(line.method for line in lines), key=lambda m: sum(by[m, t].loss for t in tasks))
    seeds = max(line.seeds for line in lines)
    share = f"{float(name.split()[1]):.0%} of the pool's tokens"
    out = [f"\n**{share}** ({found['tokens_budget']:,}), {seeds} trainings a cell\n",
           "| method | " + " | ".join(f"{task}: loss | gain over random | exact" for task in tasks) + " | choice |",
           "|---|" + "---|" * (3 * len(tasks) + 1)]  # fmt: skip
    for method in methods:
        cells = [part for task in tasks for part in shown(by[method, task])]
        own = [by[method, task].select_seconds for task in tasks]
        seconds = "-" if method in (NOTHING, EVERYTHING) else f"{max(own):,.0f} s"
        named = f"**{RANDOM}**" if method == RANDOM else label(method)
        out.append(f"| {named} | " + " | ".join(cells) + f" | {seconds} |")
    return "\n".join(out) + "\n"


def label(method: str) -> str:
    """Without its options."""
    return "dsir, as published" if "length_normalised=false" in method else method.split(":")[0]


def shown(line: Line) -> list[str]:
    """Loss, gain with its interval, exact answers."""
    gain = "-"
    if line.gain is not None and line.gain_interval is not None:
        low, high = line.gain_interval
        gain = f"{line.gain:+.2f} ({low:+.2f} to {high:+.2f})"
        gain = f"**{gain}**" if low > 0 else gain
    return [f"{line.loss:.3f}", gain, f"{line.exact:.1%}"]


if __name__ == "__main__":
    main()
