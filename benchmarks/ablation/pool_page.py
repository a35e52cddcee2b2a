"""Tables and plot of docs/results/ablation.md, from benchmarks/ablation/results/pool.json. Needs matplotlib.

    python -m benchmarks.ablation.pool_page

Text between `<!-- NAME -->` and `<!-- /NAME -->` is replaced; everything else of the page is written by hand. Marks of
agreement that the results file does not have (of some mixtures only) are computed here from its cells.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from benchmarks.marked import filled

from whence.ablation.rank_agreement import FEWEST, Agreement, agreement, regret
from whence.numerics import spearman

ROOT = Path(__file__).parents[2]
PAGE, PLOT = ROOT / "docs/results/ablation.md", ROOT / "docs/pictures/ablate.svg"
RESULTS = ROOT / "benchmarks/ablation/results/pool.json"
MAIN = "seed 0, lr 0.0003"
GROUPS = {"contained": True, "not contained": False}
SAID = {
    "all": "All mixtures:",
    "contained": "Only mixtures that contain the evaluation set's own partition:",
    "not contained": "Only mixtures that do not contain it:",
}
PROXIES = ("merged", "mean", "midpoint", "best", "ngram")
DOTS = ((True, "#0b6e99", "#0b6e99", "contains the set's partition"), (False, "none", "#8a929c", "does not"))
Cells = list[dict]


def main() -> None:
    """Fill in the page and draw the plot."""
    found, text = json.loads(RESULTS.read_text()), PAGE.read_text()
    for run in found.values():
        for part in run.values():
            for cell in part.get("cells", []):
                cell["midpoint"] = (cell["merged"] + cell["mean"]) / 2
    own = found[MAIN]
    if "pairs" in own:
        cells = own["pairs"]["cells"]
        text = filled(text, "pairs", "\n\n".join((by_group(cells), by_size(cells))))
        plot(cells)
    if "dirichlet" in own:
        text = filled(text, "dirichlet", by_set(own["dirichlet"]["cells"]))
    if "pairs" in own and any("others" in run for run in found.values()):
        text = filled(text, "others", others(found))
    if "scales" in own:
        text = filled(text, "scales", scales(own))
    if "join" in own:
        text = filled(text, "join", join_table(own["join"]))
    PAGE.write_text(text)


# -- agreement


def agreed(cells: Cells, proxy: str) -> Agreement | None:
    """Of a proxy with real losses on one set."""
    return agreement([cell[proxy] for cell in cells], [cell["truth"] for cell in cells])


def correlation(cells: Cells, proxy: str) -> float | None:
    """Spearman's, on one set, without an interval; None where a proxy says nothing, or the same of all."""
    x, y = ([cell[key] for cell in cells] for key in (proxy, "truth"))
    if None in x or len({*x}) < 2 or len(x) < FEWEST:
        return None
    return spearman(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))


def each(cells: Cells, proxy: str) -> list[float | None]:
    """Of a proxy, on every evaluation set."""
    return [correlation([cell for cell in cells if cell["set"] == name], proxy) for name in names_of(cells)]


def names_of(cells: Cells) -> list[str]:
    """Evaluation sets."""
    return list(dict.fromkeys(cell["set"] for cell in cells))


def rank(found: Agreement | None) -> str:
    """Spearman's correlation and its interval."""
    if found is None:
        return "-"
    low, high = found.spearman_interval
    return f"{found.spearman:.2f} ({low:.2f} to {high:.2f})"


def short(found: float | None) -> str:
    """Spearman's correlation."""
    return "-" if found is None else f"{found:.2f}"


def mean_rank(found: Iterable[float | None]) -> str:
    """Mean over sets."""
    values = [one for one in found if one is not None]
    return f"{np.mean(values):.3f}" if values else "-"


# -- tables


def by_group(cells: Cells) -> str:
    """A table over all mixtures, one over those that contain a set's own partition, one over those that do not."""
    lines, sets = [], names_of(cells)
    for group, said in SAID.items():
        some = [cell for cell in cells if group == "all" or cell["contained"] == GROUPS[group]]
        lines += [said, "",
                  "| evaluation set | mixtures | merged, Spearman (95%) | Pearson | mean of members | midpoint | best "
                  "member | n-grams | regret, nats: merged / mean / range | parent's loss, real losses |",
                  "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        lines += [agreement_line(some, name) for name in sets if name in names_of(some)]
        seen = {cell["set"] for cell in cells if cell["contained"]}
        kinds = {" of the pool": seen, " of none": {*sets} - seen} if group == "all" else {"": {*sets}}
        for kind, names in kinds.items():
            merged, *rest = (
                mean_rank(each([cell for cell in some if cell["set"] in names], proxy)) for proxy in PROXIES
            )
            lines.append(f"| **mean over sets{kind}** | | **{merged}** | | {' | '.join(rest)} | | |")
        lines.append("")
    return "\n".join(lines)


def lost(cells: Cells, proxy: str) -> float:
    """Regret of choosing by a proxy."""
    x, y = (torch.tensor([cell[key] for cell in cells], dtype=torch.float64) for key in (proxy, "truth"))
    return regret(x, y)


def agreement_line(cells: Cells, name: str) -> str:
    """A row of the table."""
    own = [cell for cell in cells if cell["set"] == name]
    merged = agreed(own, "merged")
    assert merged is not None
    truths = [cell["truth"] for cell in own]
    return (
        f"| {name} | {merged.candidates} | {rank(merged)} | {merged.pearson:.2f} | "
        f"{' | '.join(short(correlation(own, proxy)) for proxy in PROXIES[1:])} | {merged.regret:.3f} / "
        f"{lost(own, 'mean'):.3f} / {merged.spread:.2f} | {own[0]['parent']:.2f}, {min(truths):.2f} to "
        f"{max(truths):.2f} |"
    )


def by_size(cells: Cells) -> str:
    """Pairs and triples apart: a merge does not know that a triple is trained for longer."""
    sizes = {"pairs": 1, "triples": 2}
    lines = ["Mixtures of one size alone, mean over sets of Spearman's correlation, merged / mean of members / "
             "midpoint:", "",
             "| | contained | not contained |", "|---|---|---|"]  # fmt: skip
    for size, plus in sizes.items():
        told = []
        for contained in GROUPS.values():
            some = [cell for cell in cells if cell["contained"] == contained and cell["mixture"].count(" + ") == plus]
            told.append(" / ".join(mean_rank(each(some, proxy)) for proxy in ("merged", "mean", "midpoint")))
        lines.append(f"| {size} | {' | '.join(told)} |")
    return "\n".join(lines)


def by_set(cells: Cells) -> str:
    """Mixtures of real-valued weights."""
    lines = ["| evaluation set | merged, Spearman (95%) | Pearson | mean of members | midpoint | best member | n-grams "
             "| regret, nats: merged / mean / range |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in names_of(cells):
        own = [cell for cell in cells if cell["set"] == name]
        merged = agreed(own, "merged")
        assert merged is not None
        rest = " | ".join(short(correlation(own, proxy)) for proxy in PROXIES[1:])
        lines.append(f"| {name} | {rank(merged)} | {merged.pearson:.2f} | {rest} | "
                     f"{merged.regret:.3f} / {lost(own, 'mean'):.3f} / {merged.spread:.2f} |")  # fmt: skip
    seen = {cell["set"] for cell in cells if cell["contained"]}
    for kind, names in {" of the pool": seen, " of none": {*names_of(cells)} - seen}.items():
        own = [cell for cell in cells if cell["set"] in names]
        means = [mean_rank(each(own, proxy)) for proxy in PROXIES]
        lines.append(f"| **mean over sets{kind}** | **{means[0]}** | | {' | '.join(means[1:])} | |")
    return "\n".join(lines)


def others(found: dict) -> str:
    """What no mixture contains, under other settings of the training; the real runs of two seeds beside each other."""
    main = [cell for cell in found[MAIN]["pairs"]["cells"] if cell["mixture"].count(" + ") == 1]
    runs = {MAIN: main} | {name: run["others"]["cells"] for name, run in found.items() if "others" in run}
    sets = names_of(next(run["others"]["cells"] for run in found.values() if "others" in run))
    mixtures = {cell["mixture"] for run in list(runs.values())[1:] for cell in run}
    lines = ["| training | evaluation set | merged, Spearman (95%) | mean of members | midpoint | n-grams | parent's "
             "loss, real losses | real runs of the first, Spearman |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    first = {(cell["mixture"], cell["set"]): cell["truth"] for cell in main}
    for run, cells in runs.items():
        for name in sets:
            own = [cell for cell in cells if cell["set"] == name and cell["mixture"] in mixtures]
            truths = [cell["truth"] for cell in own]
            again = [cell | {"merged": first[cell["mixture"], name]} for cell in own]
            lines.append(f"| {run} | {name} | {rank(agreed(own, 'merged'))} | {short(correlation(own, 'mean'))} | "
                         f"{short(correlation(own, 'midpoint'))} | "
                         f"{short(correlation(own, 'ngram'))} | {own[0]['parent']:.2f}, {min(truths):.2f} to "
                         f"{max(truths):.2f} | {'-' if run == MAIN else rank(agreed(again, 'merged'))} |")  # fmt: skip
    return "\n".join(lines)


def scales(own: dict) -> str:
    """Longer steps along the mean, on what mixtures do not contain."""
    cells = [cell for cell in own["pairs"]["cells"] if not cell["contained"]]
    names = list(next(iter(own["scales"].values())))
    lines = [f"| | {' | '.join(f'scale {scale}' for scale in ('1', *own['scales']))} | midpoint |",
             "|---" * (3 + len(own["scales"])) + "|"]  # fmt: skip
    for name in names:
        some = [cell for cell in cells if cell["set"] == name]
        longer = (f"{by[name]['not contained']['spearman']:.2f}" for by in own["scales"].values())
        told = [short(correlation(some, "merged")), *longer, short(correlation(some, "midpoint"))]
        lines.append(f"| {name} | {' | '.join(told)} |")
    return "\n".join(lines)


def join_table(found: dict) -> str:
    """Correlations of summed scores with leaving out."""
    sets = list(next(iter(found["correlations"].values()))["by set"])
    lines = [f"| method | all pairs, Spearman (95%) | {' | '.join(sets)} |", "|---" * (2 + len(sets)) + "|"]
    for method, told in found["correlations"].items():
        by = " | ".join(f"{told['by set'][name]:.2f}" for name in sets)
        lines.append(f"| `{method}` | {told['spearman']:.2f} ({told['low']:.2f} to {told['high']:.2f}) | {by} |")
    return "\n".join(lines)


# -- plot


def plot(cells: Cells) -> None:
    """Merged against real losses, a panel each set."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "whence", "font.family": "sans-serif", "font.size": 9}
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 5, figsize=(10.5, 4.6))
    for panel, name in zip(panels.flat, names_of(cells), strict=True):
        own = [cell for cell in cells if cell["set"] == name]
        for contained, fill, edge, said in DOTS:
            some = [cell for cell in own if cell["contained"] == contained]
            panel.scatter([cell["merged"] for cell in some], [cell["truth"] for cell in some], s=16, label=said,
                          facecolors=fill, edgecolors=edge, linewidths=0.8)  # fmt: skip
        panel.axhline(own[0]["parent"], color="#c2571a", linewidth=0.8, linestyle=":", label="the parent")
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.tick_params(length=2, labelsize=8)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel("merged loss, nats a token", fontsize=9, x=0.3)
    figure.supylabel("loss of the real run", fontsize=9)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
