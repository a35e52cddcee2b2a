"""Selection for a classification task from a small pool: do the rows chosen keep the task's answers, and do they help?

    python -m benchmarks.selection.classification STAGE... [--data ../shared/data] [--model ../shared/models/base-6m]

    choose      for each seed: a pool of 800 rows (AG News 160 of three topics, alpaca 240, dolly 200, gsm8k 200), 16
                examples of the three topics, a warm-up and an index for each of WARM_UPS, and 40 rows by each way
    table       a training on each choice with equal steps, graded on 150 rows of AG News' test set
    page        the table of docs/results/selection.md from the results

A seed draws the pool, the examples, the warm-up and the training; graded rows are the same for all. Stages go on where
they were stopped, in WORK. Results go to benchmarks/selection/results/classification.json.
"""

import argparse
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.selection.less_data import Row, rows

from whence import index, select, train
from whence.evaluation.choices import RANDOM, Choice, Method
from whence.evaluation.selection import Recipe, evaluate_selection

LABELS = ("World", "Sports", "Business")
POOL = {"agnews": 160, "alpaca": 240, "dolly": 200, "gsm8k_train": 200}
EXAMPLES, GRADED, COUNT = 16, 150, 40
RECIPE = Recipe(steps=40, batch_size=8, lr=5e-4, max_tokens=96, schedule="linear")
SMALL = {"lora_rank": 8, "lora_alpha": 32, "max_tokens": 96}
"""Adapters of a 16th of LESS's rank at the same scale, and short rows: the experiment runs on one core."""
WARM_UPS: dict[str, dict[str, Any]] = {
    "4 steps": {"preset": "less", "batch_size": 128, **SMALL},
    "preset": {"preset": "less", **SMALL},
    "strong": {"preset": "less", "fraction": 0.25, "lr": 2e-3, **SMALL},
}
"""LESS's recipe, which makes 4 steps of 40 rows; the preset's 100 steps; these on 200 rows at 100 times the rate."""


@dataclass(frozen=True)
class Way:
    """A way to choose rows."""

    method: str
    warm_up: str | None = None
    """None: it reads text alone."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in the table."""
        shown = [self.method, *(str(value) for value in self.settings.values())]
        return " ".join(shown) + (f" ({self.warm_up})" if self.warm_up else "")


TURNS = {"by": "example", "selector": "round_robin"}
BEST = {"by": "example", "selector": "max"}
MEAN = {"by": "task", "selector": "max"}
"""The default since 28 Nov 2026; the best over examples; and LESS as published."""
WAYS = [
    Way(RANDOM),
    Way("bm25"),
    Way("dsir"),
    *(Way("less", warm_up, how) for warm_up in WARM_UPS for how in (MEAN, TURNS)),
    *(Way(method, "preset", how) for method, how in (("less", BEST), ("influence", MEAN), ("influence", TURNS))),
]
UNTRAINED = (Way("less", "preset", BEST), Way("influence", "preset", MEAN))
"""Ways of which the choice is kept, and no training is made."""
RESULTS = Path(__file__).parent / "results" / "classification.json"
PAGE = Path(__file__).parents[2] / "docs/results/selection.md"
BEGIN, END = "<!-- classification -->\n", "<!-- /classification -->\n"


def classification(row: Row) -> Row:
    """A row of AG News as a question and its answer."""
    return {"source": "agnews", "prompt": f"{row['text']}\nTopic:", "completion": f" {row['label']}"}


def news(data: Path, name: str) -> list[Row]:
    """Rows of the three topics."""
    return [classification(row) for row in rows(data / "classify" / name) if row["label"] in LABELS]


def drawn(data: Path, seed: int) -> tuple[list[Row], list[Row]]:
    """The pool, and the task's examples: as many of each topic as of the others, or one more."""
    rng = random.Random(seed)
    headlines = news(data, "agnews_train.jsonl")
    rng.shuffle(headlines)
    pool = headlines[: POOL["agnews"]]
    by_label = {
        label: [row for row in headlines[POOL["agnews"] :] if row["completion"] == f" {label}"] for label in LABELS
    }
    examples = [by_label[LABELS[n % len(LABELS)]][n] for n in range(EXAMPLES)]
    for name in ("alpaca", "dolly", "gsm8k_train"):
        pool += rng.sample(rows(data / "instruct" / f"{name}.jsonl"), POOL[name])
    rng.shuffle(pool)
    return pool, examples


def graded(data: Path) -> list[Row]:
    """The same for every seed."""
    return random.Random(0).sample(news(data, "agnews_test.jsonl"), GRADED)


def index_of(options: argparse.Namespace, seed: int, warm_up: str, pool: list[Row]) -> Any:
    """An index of the pool, after a warm-up."""
    place = options.work / f"seed-{seed}-{warm_up.replace(' ', '-')}"
    run = train(options.model, pool, place / "run", seed=seed, progress=False, **WARM_UPS[warm_up])
    built: dict[str, Any] = {"view": "adam", "width": 2048, "max_tokens": 96, "progress": False}
    return index(run, pool, place / "index", seed=seed, **built)


def stage_choose(options: argparse.Namespace) -> None:
    """Choices as files."""
    for seed in options.seeds:
        pool, examples = drawn(options.data, seed)
        indexes: dict[str | None, Any] = {None: pool}
        for way in WAYS:
            file = choice_file(options, way, seed)
            if file.exists():
                continue
            if way.warm_up not in indexes:
                indexes[way.warm_up] = index_of(options, seed, way.warm_up or "", pool)
            tasks = None if way.method == RANDOM else examples
            source = indexes[way.warm_up]
            chosen = select(source, tasks, method=way.method, count=COUNT, seed=seed, **way.settings)
            file.write_text(json.dumps(chosen.rows))
            print(seed, way.name, *shares(chosen.rows).values(), flush=True)


def choice_file(options: argparse.Namespace, way: Way, seed: int) -> Path:
    """A choice's rows."""
    return options.work / f"choice-{way.name.replace(' ', '_')}-{seed}.json"


def shares(chosen: list[Row]) -> dict[str, dict[str, int]]:
    """Rows by source, and those of the task's source by answer."""
    answers = Counter(row["completion"].strip() for row in chosen if row.get("source") == "agnews")
    return {"sources": Counter(str(row.get("source")) for row in chosen), "answers": answers}


def stage_table(options: argparse.Namespace) -> None:
    """Train and grade."""
    ways = {way.name: way for way in WAYS}
    trained = {name: way for name, way in ways.items() if way not in UNTRAINED}

    def chooser(way: Way) -> Method:
        return Method(lambda task, seed: Choice(json.loads(choice_file(options, way, seed).read_text())))

    table = evaluate_selection(
        str(Path(options.model).resolve()),
        {name: chooser(way) for name, way in trained.items()},
        {"agnews": graded(options.data)},
        work=options.work / "cells",
        recipe=RECIPE,
        seeds=options.seeds,
        say=lambda line: print(line, flush=True),
    )
    chosen = {
        name: [shares(json.loads(choice_file(options, way, seed).read_text())) for seed in options.seeds]
        for name, way in ways.items()
    }
    document = {"recipe": asdict(RECIPE), "seeds": options.seeds, "lines": table.rows(), "chosen": chosen}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def stage_page(options: argparse.Namespace) -> None:
    """Put the table between the page's marks."""
    document = json.loads(RESULTS.read_text())
    out = [
        "| chosen by | loss | gain over random | rows of AG News | World, Sports, Business |",
        "|---|---|---|---|---|",
    ]
    for line in sorted(document["lines"], key=lambda line: line["loss"]):
        gain = "-"
        if line["gain"] is not None:
            low, high = line["gain_interval"]
            gain = f"{line['gain']:+.2f} ({low:+.2f} to {high:+.2f})"
            gain = f"**{gain}**" if low > 0 else gain
        chosen = document["chosen"].get(line["method"], [])
        rows_of_news = ", ".join(str(seed["sources"].get("agnews", 0)) for seed in chosen) or "-"
        answers = "; ".join(", ".join(str(seed["answers"].get(label, 0)) for label in LABELS) for seed in chosen) or "-"
        out.append(f"| {line['method']} | {line['loss']:.3f} | {gain} | {rows_of_news} | {answers} |")
    for way in UNTRAINED:
        chosen = document["chosen"][way.name]
        answers = "; ".join(", ".join(str(seed["answers"].get(label, 0)) for label in LABELS) for seed in chosen)
        rows_of_news = ", ".join(str(seed["sources"].get("agnews", 0)) for seed in chosen)
        out.append(f"| {way.name} | not trained | - | {rows_of_news} | {answers} |")
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(out) + "\n\n" + END + rest.partition(END)[2])


STAGES = {"choose": stage_choose, "table": stage_table, "page": stage_page}


def main() -> None:
    """Run stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--work", type=Path, default=Path("/tmp/classification"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in options.stages:
        STAGES[stage](options)


if __name__ == "__main__":
    main()
