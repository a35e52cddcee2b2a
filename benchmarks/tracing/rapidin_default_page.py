"""Tables of the default index in docs/results/tracing.md, from benchmarks/tracing/results/rapidin_default.json.

    python -m benchmarks.tracing.rapidin_default_page

Text between `<!-- NAME -->` and `<!-- /NAME -->` is replaced; everything else of the page is written by hand.
"""

import json
from pathlib import Path

from benchmarks.marked import filled
from benchmarks.tracing.rapidin import DEPTHS
from benchmarks.tracing.rapidin_default import RESULTS, SKETCHES

PAGE = Path(__file__).parents[2] / "docs/results/tracing.md"
TITLES = {
    "short": "The smaller training",
    "full": "All weights, trained as for the tables above",
    "lora": "LoRA, trained as for the tables above",
}
TOLD = {"swap": "Error tracing", "howdy": "Backdoor", "shouting": "Trigger-free backdoor"}
METHODS = {
    "two_sided": "cosine, `two_sided` 16, bfloat16 (the default of old)",
    "tensor_sketch": "cosine, `tensor_sketch` 43,008, one bit, as the index ranks",
    "default": "**the same, re-ranked: what `trace` shows**",
    "exact": "cosine, uncompressed",
    "two_sided, magnitude": "`two_sided`, by magnitude",
    "tensor_sketch, magnitude": "`tensor_sketch`, by magnitude",
    "exact, magnitude": "uncompressed, by magnitude",
}


def main() -> None:
    """Put the tables of each training between the page's marks."""
    document, text = json.loads(RESULTS.read_text()), PAGE.read_text()
    text = filled(text, "default shares", shares(document))
    for training, found in document.items():
        reach = found.get("reach", {})
        tables = {poison: page_table(found[poison], reach.get(poison, {})) for poison in TOLD if poison in found}
        body = "\n\n".join(f"{TOLD[poison]}:\n\n{table}" for poison, table in tables.items())
        text = filled(text, f"default {training}", f"### {TITLES[training]}\n\n{body}")
    PAGE.write_text(text)


def shares(document: dict) -> str:
    """Share of the first ten by training, poison and method."""
    lines = ["| training | share of the first 10 | backdoor | trigger-free | error tracing |", "|---" * 5 + "|"]
    for training in (name for name in ("full", "lora", "short") if name in document):
        for name in ("two_sided", "tensor_sketch", "default", "exact"):
            rows = [document[training][poison]["methods"][name] for poison in ("howdy", "shouting", "swap")]
            first = [row["precision@10"] for row in rows]
            cells = [f"{one['mean']:.0%} ({one['interval'][0]:.0%} to {one['interval'][1]:.0%})" for one in first]
            lines.append(f"| {training} | {METHODS[name]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(verdict(name, document[name]["swap"]) for name in document)])


def verdict(training: str, found: dict) -> str:
    """Error tracing by the default against exact gradients and the default of old, query by query."""
    exact, old = (found["default less"][name]["precision@10"] for name in ("exact", "two_sided"))
    told = [f"{one['mean']:+.0%} ({one['interval'][0]:+.0%} to {one['interval'][1]:+.0%})" for one in (exact, old)]
    bar = "met" if exact["mean"] >= -0.05 else "missed"
    rows, deep = round(found["poisoned"]), [round(side) for side in found["depth"]]
    return (
        f"- Error tracing, `{training}`, {found['queries']} queries with {rows} rows to be found each on average: the "
        f"default's first ten less exact gradients' {told[0]} (bar of issue 22, -5%: **{bar}**), less those of old "
        f"{told[1]}. {deep[0]} rows were re-ranked on the helpful side and {deep[1]} on the other."
    )


def page_table(found: dict, reach: dict) -> str:
    """A line a method: the first ten, auROC / auPRC at every depth, the exact first ten found."""
    heads = ["method", "of the first 10", *(f"@{d}" for d in (*DEPTHS, "all")), "exact first 10 found"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    overlaps = found["exact first ten found"]
    reached = {f"`--method reach`, `{name}`": reach[name] for name in SKETCHES if name in reach}
    for name, row in ({name: found["methods"][name] for name in METHODS} | reached).items():
        first = row["precision@10"]
        cells = [
            METHODS.get(name, name),
            f"{first['mean']:.0%} ({first['interval'][0]:.0%} to {first['interval'][1]:.0%})",
        ]
        cells += [f"{row[f'auroc@{d}']['mean']:.3f} / {row[f'auprc@{d}']['mean']:.3f}" for d in (*DEPTHS, "all")]
        lines.append(f"| {' | '.join(cells)} | {overlaps[name]['mean']:.0%} |" if name in overlaps
                     else f"| {' | '.join(cells)} | |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
