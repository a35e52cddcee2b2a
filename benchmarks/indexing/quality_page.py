"""Table and plot of docs/results/indexing.md, "Sketches", from benchmarks/indexing/results/quality.json.

Needs matplotlib. Prints the table; the plot goes to docs/pictures/sketches.svg: what a sketch keeps of the exact first
ten by cosine against its bytes a row, a panel a corpus, coloured by what it adds to the time of forward and backward.

    python -m benchmarks.indexing.quality_page
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quality.json"
PLOT = Path(__file__).parents[2] / "docs/pictures/sketches.svg"
MARKERS = {"tensor_sketch": "o", "count_sketch": "s", "two_sided": "^"}
BAR_BYTES, BAR = 6000, 0.85
"""Issue 22's bar: so much of the exact first ten, in so many bytes."""


def main() -> None:
    """Print the table and draw the plot."""
    document = json.loads(RESULTS.read_text())
    corpora = {name: by_sketch(entry["sketches"]) for name, entry in document.items() if name != "machine"}
    print(table(corpora))
    plot(corpora)


def by_sketch(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The seeds of each sketch."""
    out: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: (entry["bytes"], entry["sketch"], entry["seed"])):
        out.setdefault(entry["sketch"], []).append(entry)
    return out


def table(corpora: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """A line a corpus and sketch, with a number a seed."""
    lines = [
        "| corpus | sketch | bytes a row | first ten, cosine | Spearman | after the re-rank | rows re-ranked | "
        "first ten, inner product | Spearman | after the re-rank |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for corpus, sketches in corpora.items():
        for sketch, seeds in sketches.items():
            cells = [corpus, words(sketch), f"{seeds[0]['bytes']:,}"]
            for score in ("cosine", "dot"):
                measured = [seed[score] for seed in seeds]
                cells += [numbers(measured, "top10", 2), numbers(measured, "spearman", 3)]
                cells.append(numbers(measured, "reranked", 3) if "reranked" in measured[0] else "")
                if score == "cosine":
                    depths = [one["depth"] for one in measured if "depth" in one]
                    cells.append(f"{depths[0][0]} + {depths[0][2]}" if depths else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def words(sketch: str) -> str:
    """A sketch as the page names it."""
    projection, width, codec = sketch.split(":")
    side = f" {int(width):,}" if width else ""
    return f"`{projection}`{side}, {'one bit' if codec == 'onebit' else codec}"


def numbers(measured: list[dict[str, Any]], name: str, digits: int) -> str:
    """The mean over queries of each seed, without the zero before the point."""
    return " ".join(f"{one[name][0]:.{digits}f}".removeprefix("0") for one in measured)


def plot(corpora: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """First ten kept against bytes, coloured by time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "whence", "font.family": "sans-serif", "axes.spines.top": False}
    mpl.rcParams |= {"axes.spines.right": False}
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, panels = pyplot.subplots(
        1, len(corpora), figsize=(2.6 * len(corpora) + 1.2, 3.4), sharey=True, layout="constrained"
    )
    times = mpl.colors.Normalize(0, 0.45)
    for axes, (corpus, sketches) in zip(panels, corpora.items(), strict=True):
        axes.axhline(BAR, color="#999", lw=0.8, ls=":")
        axes.axvline(BAR_BYTES, color="#999", lw=0.8, ls=":")
        for sketch, seeds in sketches.items():
            kept = [seed["cosine"]["top10"] for seed in seeds]
            mean = fmean(one[0] for one in kept)
            low, high = fmean(one[1] for one in kept), fmean(one[2] for one in kept)
            colour = mpl.colormaps["viridis"](times(fmean(seed["seconds_to_pass"] for seed in seeds)))
            axes.errorbar(
                seeds[0]["bytes"], mean, yerr=[[mean - low], [high - mean]], marker=MARKERS[sketch.split(":")[0]],
                color=colour, ms=7, lw=1,
            )  # fmt: skip
        axes.set(title=corpus, xscale="log", xlabel="bytes a row", ylim=(0, 1), xlim=(800, 300_000))
        axes.grid(alpha=0.25, lw=0.5)
    panels[0].set_ylabel("share of the exact first ten")
    shapes = [Line2D([], [], color="#444", marker=marker, ls="", label=name) for name, marker in MARKERS.items()]
    panels[-1].legend(handles=shapes, frameon=False, fontsize=8, loc="lower right")
    scale = mpl.cm.ScalarMappable(times, "viridis")
    figure.colorbar(scale, ax=panels, label="time over forward + backward", fraction=0.03)
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
