"""Tables and plot of docs/results/recovery.md, from benchmarks/recovery/results/recover.json. Needs matplotlib.

    python -m benchmarks.recovery.recover_page

Text between `<!-- NAME -->` and `<!-- /NAME -->` is replaced; everything else of the page is written by hand.

Intervals are 95% of Student's t over the seeds, of a mean or of the mean of paired differences; over several kinds of
training, each seed of each kind is one difference.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from benchmarks.marked import filled
from scipy import stats

ROOT = Path(__file__).parents[2]
PAGE, PLOT = ROOT / "docs/results/recovery.md", ROOT / "docs/pictures/recover.svg"
RESULTS = ROOT / "benchmarks/recovery/results/recover.json"
OURS, SELECT = "calibrated", "cosine"
KINDS = {"sgd": "SGD", "adamw": "AdamW", "sgd-lora": "SGD, LoRA", "adamw-lora": "AdamW, LoRA"}
LABELS = {"calibrated": "**`calibrated`**", "calibrated, balanced": "**`calibrated`, balanced**",
          "cosine": "`cosine` (SELECT)", "ghost": "`ghost` (top-k)"}  # fmt: skip
MARKS = {"precision": "Precision at 500", "auroc": "auROC",
         "tpr at 1e-3": "Members found at a false positive rate of 1e-3"}  # fmt: skip
EXPERT, START = "expert", "theta_0"


def main() -> None:
    """Fill in the page and draw the plot."""
    found, text = json.loads(RESULTS.read_text()), PAGE.read_text()
    if planted := next((cells for name, cells in found.items() if name.startswith("planted")), None):
        text = filled(text, "planted", planted_tables(planted))
        plot(planted)
    if "mixture" in found:
        text = filled(text, "mixture", mixture_table(found["mixture"]))
    if "distribution" in found:
        text = filled(text, "distribution", distribution_tables(found["distribution"]))
    PAGE.write_text(text)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its interval."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def told(values: Sequence[float], form: str = ".3f") -> str:
    """A mean with what it may be off by; of one value or two themselves."""
    if len(values) < 3:
        return ", ".join(f"{value:{form}}" for value in values)
    mean, _, high = interval(values)
    return f"{mean:{form}} ± {high - mean:{form.lstrip('+')}}"


def by_cell(cells: dict) -> dict[str, dict[int, dict]]:
    """By what comes before the seed, and by seed."""
    found: dict[str, dict[int, dict]] = {}
    for name, cell in cells.items():
        kind, _, seed = name.rpartition(", seed ")
        found.setdefault(kind, {})[int(seed)] = cell
    return found


# -- planted


def planted_tables(cells: dict) -> str:
    """A table of precision, one of the other marks, and differences from ours."""
    kinds = {kind: seeds for kind in KINDS if (seeds := by_cell(cells).get(kind))}
    some = next(iter(next(iter(kinds.values())).values()))["methods"]

    def values(kind: str, method: str, mark: str) -> list[float]:
        return [cell["methods"][method][mark] for _, cell in sorted(kinds[kind].items())]

    order = sorted(some, key=lambda m: -np.mean([np.mean(values(kind, m, "precision")) for kind in kinds]))
    lines = []
    heads = " | ".join(f"{KINDS[kind]} ({len(kinds[kind])})" for kind in kinds)
    for mark, said in MARKS.items():
        lines += [f"{said}, mean over seeds (their number) and 95% interval:", "", f"| | {heads} |"]
        lines.append("|---" * (1 + len(kinds)) + "|")
        for method in order:
            row = [told(values(kind, method, mark)) for kind in kinds]
            lines.append(f"| {LABELS.get(method, f'`{method}`')} | {' | '.join(row)} |")
        lines.append("")
    lines += ["Precision of `calibrated` above that of others, paired by seed:", "",
              "| | best single score, of each seed | SELECT's `cosine` |", "|---|---|---|"]  # fmt: skip
    every: dict[str, list[float]] = {"best": [], SELECT: []}
    for kind in kinds:
        ours, others = np.array(values(kind, OURS, "precision")), [m for m in some if m != OURS]
        best = np.max([values(kind, method, "precision") for method in others], axis=0)
        gaps = {"best": list(ours - best), SELECT: list(ours - np.array(values(kind, SELECT, "precision")))}
        for name, gap in gaps.items():
            every[name] += gap
        lines.append(f"| {KINDS[kind]} | {told(gaps['best'], '+.3f')} | {told(gaps[SELECT], '+.3f')} |")
    lines.append(f"| all {len(every['best'])} | {told(every['best'], '+.3f')} | {told(every[SELECT], '+.3f')} |")
    right = [cell["guessed"]["optimizer"] == kind.partition("-")[0] for kind in kinds for cell in kinds[kind].values()]
    expected = [cell["expected members"] for kind in kinds for cell in kinds[kind].values()]
    rare = [cell["others with p at most 0.01"] for kind in kinds for cell in kinds[kind].values()]
    lines += ["", f"The shadow's optimizer was guessed right in {sum(right)} of {len(right)}. Members expected by the "
              f"probabilities: {min(expected):.0f} to {max(expected):.0f}, where there are 500. Others with a p-value "
              f"of at most .01: {min(rare):.1%} to {max(rare):.1%}."]  # fmt: skip
    return "\n".join(lines)


def plot(cells: dict) -> None:
    """Precision by method and kind, a dot each seed."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "whence", "font.family": "sans-serif", "font.size": 10}
    import matplotlib.pyplot as plt

    kinds = {kind: seeds for kind in KINDS if (seeds := by_cell(cells).get(kind))}
    some = list(next(iter(next(iter(kinds.values())).values()))["methods"])
    cells_of = [cell for seeds in kinds.values() for cell in seeds.values()]
    order = sorted(some, key=lambda method: np.mean([cell["methods"][method]["precision"] for cell in cells_of]))
    figure, panels = plt.subplots(1, len(kinds), figsize=(2.4 * len(kinds) + 1.6, 3.4), sharey=True, squeeze=False)
    for panel, (kind, seeds) in zip(panels[0], kinds.items(), strict=True):
        for place, method in enumerate(order):
            own = [cell["methods"][method]["precision"] for cell in seeds.values()]
            colour = "#0b6e99" if method == OURS else "#c2571a" if method == SELECT else "#6b7280"
            panel.plot([0, float(np.mean(own))], [place, place], color=colour, linewidth=2, alpha=0.35, zorder=1)
            panel.scatter(own, [place] * len(own), color=colour, s=18, zorder=2, linewidths=0)
        panel.axvline(0.05, color="#9aa1ab", linewidth=0.8, linestyle=":")
        panel.set_title(KINDS[kind], fontsize=11)
        panel.set_xlim(0, 1)
        panel.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
        panel.set_yticks(range(len(order)), [name.replace("_", " ") for name in order])
        panel.tick_params(length=0)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    figure.supxlabel("precision at 500 of 10,000 (dots: seeds; dotted: chance)", fontsize=10)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


# -- mixture


def mixture_table(cells: dict) -> str:
    """Shares of tokens beside the truth, by both ways."""
    ways = ("by runs", "by gradients")
    lines = ["| | source | true share of tokens | by runs (95%) | by gradients (95%) |", "|---|---|---|---|---|"]
    off: dict[str, list[float]] = {way: [] for way in ways}
    inside = dict.fromkeys(ways, 0)
    for name, cell in cells.items():
        for number, (source, true) in enumerate(sorted(cell["tokens"].items())):
            shown = []
            for way in ways:
                row = next(row for row in cell[way] if row["source"] == source)
                low, high = row["tokens_low"], row["tokens_high"]
                off[way].append(abs(row["tokens"] - true))
                inside[way] += low <= true <= high
                shown.append(
                    f"{row['tokens']:.2f} ({low:.2f} to {high:.2f}{'' if low <= true <= high else ': misses'})"
                )
            lines.append(f"| {name if not number else ''} | {source} | {true:.2f} | {' | '.join(shown)} |")
    lines.append("")
    for way in ways:
        lines.append(f"- {way}: of tokens {_within(off[way], inside[way])}; of rows {_of_rows(cells, way)}.")
    return "\n".join(lines)


def _within(off: Sequence[float], inside: int) -> str:
    near = f"{sum(one <= 0.1 for one in off)} of {len(off)} shares within 10 points"
    return f"{near} (farthest {max(off):.2f}, mean {np.mean(off):.3f}), {inside} inside their interval"


def _of_rows(cells: dict, way: str) -> str:
    """The same of shares of rows."""
    pairs = [(row, cell["rows"][row["source"]]) for cell in cells.values() for row in cell[way]]
    inside = sum(row["low"] <= true <= row["high"] for row, true in pairs)
    return _within([abs(row["share"] - true) for row, true in pairs], inside)


# -- distribution


def distribution_tables(cells: dict) -> str:
    """A table each task: mark and share of the gap that is closed."""
    tasks: dict[str, dict[str, dict[int, float]]] = {}
    for name, cell in cells.items():
        head, _, seed = name.rpartition(", seed ")
        task, _, method = head.partition(", ")
        tasks.setdefault(task, {}).setdefault(method, {})[int(seed)] = cell["mark"]
    lines = []
    for task, by_method in tasks.items():
        seeds = sorted(set.intersection(*(set(marks) for marks in by_method.values())))
        unit = "perplexity of answers, less is better" if task == "answers" else "accuracy"
        lines += [f"`{task}`, {unit}, seeds: {len(seeds)}", "",
                  "| trained on | mark | share of the gap from random to expert closed | better than SELECT's `cosine` "
                  f"by {'nats' if task == 'answers' else 'accuracy'} |",
                  "|---|---|---|---|"]  # fmt: skip
        sign = -1 if task == "answers" else 1
        value = {m: np.array([marks[seed] for seed in seeds]) for m, marks in by_method.items()}
        value = {m: np.log(v) if task == "answers" else v for m, v in value.items()}
        gap = {m: (v - value["random"]) / (value[EXPERT] - value["random"]) for m, v in value.items()}
        for method in sorted(by_method, key=lambda m: -sign * float(np.mean(value[m]))):
            marks = [by_method[method][seed] for seed in seeds]
            closed = "-" if method in (START, EXPERT, "random") else told(list(gap[method]), ".2f")
            better = sign * (value[method] - value[SELECT])
            above = "-" if method in (START, EXPERT, SELECT) else told(list(better), "+.3f")
            label = {EXPERT: "its own data (expert)", START: "nothing (theta_0)"}.get(method, method)
            mark = told(marks, ".2f" if task == "answers" else ".3f")
            lines.append(f"| {LABELS.get(label, label)} | {mark} | {closed} | {above} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
