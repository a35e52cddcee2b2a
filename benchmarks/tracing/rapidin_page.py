"""Tables and plot of docs/results/tracing.md, from benchmarks/tracing/results/rapidin.json. Needs matplotlib.

    python -m benchmarks.tracing.rapidin_page

Text between `<!-- NAME -->` and `<!-- /NAME -->` is replaced; everything else of the page is written by hand.
"""

import json
from pathlib import Path

from benchmarks.marked import filled

ROOT = Path(__file__).parents[2]
PAGE, PLOT = ROOT / "docs/results/tracing.md", ROOT / "docs/pictures/compression.svg"
DEPTHS = (5, 10, 50, 100, 500, 1000, "all")
METHODS = {
    "reach": "**Whence: `--method reach`**, two_sided 16, bfloat16",
    "ours": "Whence: cosine, two_sided 16, bfloat16",
    "ours_margin": "the same, margin of the query",
    "rapidin": "RapidIn: shuffle_sum 65,536, float16",
    "tracin": "TracIn: uncompressed dot",
    "tracin_layer": "TracIn, layers normalised, uncompressed",
    "tracin_cosine": "cosine, uncompressed",
    "ours, magnitude": "Whence, by magnitude",
    "ours_margin, magnitude": "Whence with the margin, by magnitude",
    "rapidin, magnitude": "RapidIn, by magnitude",
    "tracin, magnitude": "TracIn, by magnitude",
    "tracin_layer, magnitude": "TracIn, layers normalised, by magnitude",
    "tracin_cosine, magnitude": "cosine, uncompressed, by magnitude",
    "embedding": "the model's own hidden states",
    "minilm": "sentence embedding (MiniLM, uncased)",
    "bm25": "BM25",
    "random": "random",
}
COLOURS = {"two_sided": "#0b6e99", "sjlt": "#c2571a", "count_sketch": "#5b8c2a", "shuffle_sum": "#8a4fa3"}


def main() -> None:
    """Fill in the page and draw the plot."""
    found = json.loads((ROOT / "benchmarks/tracing/results/rapidin.json").read_text())
    text = PAGE.read_text()
    for seed, results in found.items():
        for name in results:
            if name.endswith(" retrieval"):
                kind = name.split()[0]
                for poison, table in results[name].items():
                    text = filled(text, f"{kind} {poison}", retrieval_table(table, seed))
        if "compression" in results:
            text = filled(text, "compression", compression_table(results["compression"]))
            plot(results["compression"])
        if "speed" in results:
            text = filled(text, "speed", speed_table(results["speed"]))
    nulls = json.loads((ROOT / "benchmarks/tracing/results/nulls.json").read_text())
    PAGE.write_text(filled(text, "nulls", nulls_table(nulls)))


def speed_table(found: dict) -> str:
    """Retrieval and sketching."""
    lines = [
        f"One query over {found['rows']:,} rows: from the index {found['index seconds a query']:.3f} s, by making "
        f"every row's uncompressed gradient again {found['uncompressed seconds a query']:,.0f} s (timed on "
        f"{found['uncompressed was timed on rows']} rows): **{found['times faster']:,.0f} times faster**. "
        "(RapidIn claims 6,326 for its own corpus, models and GPU.)",
        "",
        "| projection, 16 examples to about 65,536 numbers | seconds, median | least to most |",
        "|---|---|---|",
    ]
    for name, row in found["sketching 16 examples to 65,536 numbers, seconds"].items():
        lines.append(f"| {name} | {row['median']:.3f} | {row['spread'][0]:.3f} to {row['spread'][1]:.3f} |")
    return "\n".join(lines)


def nulls_table(found: dict) -> str:
    """A line a kind of query and method."""
    lines = ["| query, method | above the null | best z, median | needed z |", "|---|---|---|---|"]
    for name, row in found["kinds"].items():
        low, high = row["interval"]
        lines.append(
            f"| {name} | {row['passed']:.0%} ({low:.0%} to {high:.0%}) "
            f"| {row['best z']['median']} | {row['needed z']} |"
        )
    return "\n".join(lines)


def retrieval_table(table: dict, seed: str) -> str:
    """AuROC / auPRC at every depth."""
    lines = [
        f"{table['queries']} queries, {table['poisoned']:,} poisoned of {table['rows']:,} rows, {seed}; "
        "auROC / auPRC, and below the 95% interval of auROC",
        "",
        "| method | " + " | ".join(f"@{depth}" for depth in DEPTHS) + " | of the first 10 |",
        "|---|" + "---|" * (len(DEPTHS) + 1),
    ]
    for method, label in METHODS.items():
        if method in table:
            row = table[method]
            cells = [
                f"{row[f'auroc@{d}']['mean']:.3f} / {row[f'auprc@{d}']['mean']:.3f}<br>"
                f"<sub>{row[f'auroc@{d}']['interval'][0]:.3f} to {row[f'auroc@{d}']['interval'][1]:.3f}</sub>"
                for d in DEPTHS
            ]
            lines.append(f"| {label} | " + " | ".join(cells) + f" | {row['precision@10']['mean']:.0%} |")
    return "\n".join(lines)


def compression_table(found: dict) -> str:
    """A line a projection, width and codec."""
    lines = [
        f"{found['rows']:,} rows, {found['queries']} queries; uncompressed {found['uncompressed bytes']:,} bytes an "
        f"example, whose auPRC is {found['exact auprc']['mean']:.3f}",
        "",
        "| projection | width | codec | bytes | times smaller | overlap of top 100 | auPRC |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["methods"].values():
        (low, high), precision = row["overlap of top 100"]["interval"], row["auprc"]
        lines.append(
            f"| {row['projection']} | {row['width']:,} | {row['codec']} | {row['bytes']:,} | {row['times smaller']:,} "
            f"| {row['overlap of top 100']['mean']:.3f} ({low:.3f} to {high:.3f}) | {precision['mean']:.3f} "
            f"({precision['interval'][0]:.3f} to {precision['interval'][1]:.3f}) |"
        )
    return "\n".join(lines)


def plot(found: dict) -> None:
    """Overlap against bytes: a line a projection in float32, points for the codecs of two_sided 16."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "whence", "font.family": "sans-serif", "axes.spines.top": False}
    mpl.rcParams |= {"axes.spines.right": False}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    rows = list(found["methods"].values())
    for name, colour in COLOURS.items():
        some = [row for row in rows if row["projection"] == name and row["codec"] == "float32"]
        x, y = [row["bytes"] for row in some], [row["overlap of top 100"]["mean"] for row in some]
        axes.plot(x, y, "o-", color=colour, label=name, lw=1.6, ms=4)
        edges = list(zip(*(row["overlap of top 100"]["interval"] for row in some), strict=True))
        axes.fill_between(x, *edges, color=colour, alpha=0.12, lw=0)
    coded = [row for row in rows if row["projection"] == "two_sided" and row["width"] == 10752]
    axes.plot(
        [row["bytes"] for row in coded],
        [row["overlap of top 100"]["mean"] for row in coded],
        "s--", color="#222", ms=4, lw=0.8, label="two_sided 16, by codec",
    )  # fmt: skip
    for row in coded:
        if row["codec"] == "float16":
            continue  # as many bytes as bfloat16
        axes.annotate(
            row["codec"].replace("bfloat16", "bfloat16, float16"),
            (row["bytes"], row["overlap of top 100"]["mean"]), fontsize=7, xytext=(3, -10),
            textcoords="offset points",
        )  # fmt: skip
    axes.set(xscale="log", xlabel="bytes an example", ylabel="overlap of the top 100 with exact cosine", ylim=(0, 1))
    axes.grid(alpha=0.25, lw=0.5)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
