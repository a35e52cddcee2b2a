"""Averages of models in place of models trained on mixtures: how well do they rank?

    python -m benchmarks.ablation.pool STAGE... [--data ../shared/data] [--model ../shared/models/base-6m] [--work DIR]
                                  [--tokens 98304] [--steps 48] [--seed 0]

Stages, in order (`all` runs them all); each goes on where it was stopped:

    data        a tenth of each of the 8 sets of domains (30 rows at most) is held out; gsm8k_test and BBH as text
    pool        a member for each set, equal tokens
    pairs       all 28 pairs and 12 triples: averages, proxies and real runs; agreement by evaluation set
    dirichlet   12 random mixtures of real-valued weights, with real runs of three budgets
    scales      the mixtures of `pairs` again, with members' moves times 1.5 (task arithmetic), on wikitext, gsm8k and
                BBH; needs `pairs`
    others      21 pairs without wikitext, read on what none of them contains: wikitext, gsm8k, BBH. For other settings
                of the training: --lr 1e-4 or --seed 1, with a --work of its own; rows are split as with seed 0
    cost        100 mixtures in memory against their evaluation alone
    memory      of a merge to disk; alone
    join        scores of an index of 256 rows a set, summed by set, against leaving a set out of the pool
    replay      the same of 64 rows a set, cut to 128 tokens: scores of a replay of one training on all of them, beside
                those of an index of the same rows

Results go to benchmarks/ablation/results/pool.json. Losses of real runs, two hours of one core, are kept beside it as
they come, in ablation_truth.json: on another machine, too, the stages go on from there.
"""

import argparse
import itertools
import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from whence.ablation.heldout_losses import measure, read_sets
from whence.ablation.member_training import train_pool
from whence.ablation.merged_files import write_merged
from whence.ablation.mixed_model import MixedModel, mixed_model
from whence.ablation.pipeline import Ablation, ablate
from whence.ablation.pool import open_pool
from whence.ablation.rank_agreement import agreement
from whence.evaluation.joining import METHODS, Join, join
from whence.indexing.build import index
from whence.reports.join_tables import join_plot
from whence.training.trainer import train

RESULTS = Path(__file__).parent / "results" / "pool.json"
TRUTH = RESULTS.with_name("truth.json")
HELD_OUT, MOST = 0.1, 30
"""Share of a set's rows that is held out, and the most of them."""
SPLIT = 0
"""Seed of what is held out: the same for all trainings."""
SCALES = (1.5,)
UNSEEN = ("wikitext", "gsm8k", "bbh")
"""Evaluation sets of `others` and `scales`."""
TRIPLES, RANDOM, CONCENTRATION = 12, 12, 1.0
EVERY = 60
"""Seconds between collections."""
MEASURED = 100
"""Mixtures of `cost`."""
READ = ("code", "stories")
"""Evaluation sets of `cost`, 46 rows: the fewer are read, the more weighs becoming a mixture."""
REPLAYED = 64
"""Rows of a set in the training of `replay`."""
RECIPE = {"epochs": 3, "batch_size": 16, "max_tokens": 128, "checkpoints": 1}
"""Of that training, at the members' rate."""
INDEXED = 256
"""Rows of a set in the index of `join`, at most: of a longer set a random part, whose scores count for the whole."""


def main() -> None:
    """Run stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--work", type=Path, default=Path("/tmp/ablation"))
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if "all" in options.stages else options.stages:
        STAGES[stage](options)


def keep(options: argparse.Namespace, name: str, found: object) -> None:
    """Put a result into the committed file."""
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document.setdefault(settings_of(options), {})[name] = found
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def settings_of(options: argparse.Namespace) -> str:
    """Name of a training's results."""
    return f"seed {options.seed}, lr {options.lr:g}"


def stage_data(options: argparse.Namespace) -> None:
    """Training rows in one file; held-out rows in a file each."""
    held = options.work / "held"
    held.mkdir(exist_ok=True)
    with (options.work / "train.jsonl").open("w") as train:
        for file in sorted((options.data / "domains").glob("*.jsonl")):
            lines = file.read_text().strip().split("\n")
            random.Random(f"{file.stem} {SPLIT}").shuffle(lines)
            count = round(HELD_OUT * len(lines))
            (held / file.name).write_text("".join(f"{line}\n" for line in lines[: min(count, MOST)]))
            train.writelines(f"{line}\n" for line in lines[count:])
    for name, source in (("gsm8k", "instruct/gsm8k_test"), ("bbh", "tasks/bbh")):
        rows = [json.loads(line) for line in (options.data / f"{source}.jsonl").read_text().strip().split("\n")]
        drawn = random.Random(f"{name} {SPLIT}").sample(rows, 2 * MOST)
        texts = [{"id": row["id"], "source": name, "text": f"{row['prompt']} {row['completion']}"} for row in drawn]
        (held / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in texts))


def stage_pool(options: argparse.Namespace) -> None:
    """Members."""
    start = time.perf_counter()
    made = train_pool(options.model, options.work / "train.jsonl", options.work / "pool", tokens=options.tokens,
                      steps=options.steps, lr=options.lr, seed=options.seed)  # fmt: skip
    members = {name: {"rows": member.rows, "tokens": member.tokens, "loss": member.loss, "bytes": member.bytes}
               for name, member in made.members.items()}  # fmt: skip
    keep(options, "pool", {"seconds": time.perf_counter() - start, "members": members, "recipe": dict(made.recipe)})


def stage_pairs(options: argparse.Namespace) -> None:
    """All pairs, and triples drawn without preference."""
    names = open_pool(options.work / "pool").partitions
    triples = random.Random(f"triples {options.seed}").sample([*itertools.combinations(names, 3)], TRIPLES)
    kept(options, "pairs", graded(options, alike([*itertools.combinations(names, 2), *triples])))


def alike(chosen: Iterable[tuple[str, ...]]) -> list[dict]:
    """Mixtures of sets with one weight for each."""
    return [{"name": " + ".join(some), "weights": dict.fromkeys(some, 1 / len(some))} for some in chosen]


def stage_dirichlet(options: argparse.Namespace) -> None:
    """Real-valued weights."""
    names = open_pool(options.work / "pool").partitions
    drawn = np.random.default_rng(options.seed).dirichlet([CONCENTRATION] * len(names), RANDOM)
    rows = [{"name": f"random {number}", "budgets": 3, "weights": dict(zip(names, map(float, weights), strict=True))}
            for number, weights in enumerate(drawn)]  # fmt: skip
    kept(options, "dirichlet", graded(options, rows))


def stage_scales(options: argparse.Namespace) -> None:
    """How well a longer step along the members' mean ranks; real losses are those of `pairs`."""
    document = json.loads(RESULTS.read_text())[settings_of(options)]
    truth = {(cell["mixture"], cell["set"]): cell for cell in document["pairs"]["cells"]}
    mixtures = alike(dict.fromkeys(tuple(name.split(" + ")) for name, _ in truth))
    found = {}
    for scale in SCALES:
        held = [options.work / "held" / f"{name}.jsonl" for name in UNSEEN]
        made = ablate(options.work / "pool", held, mixtures=mixtures, scale=scale, seed=options.seed)
        by_set: dict[str, dict[str, list[dict]]] = {}
        for cell in made.cells:
            real = truth[cell.mixture, cell.set]
            line = {"mixture": cell.mixture, "merged": cell.merged, "truth": real["truth"]}
            group = "contained" if real["contained"] else "not contained"
            by_set.setdefault(cell.set, {}).setdefault(group, []).append(line)
        found[f"{scale:g}"] = {
            name: {group: own.row() | {"pairs": lines} for group, lines in groups.items()
                   if (own := agreement([line["merged"] for line in lines], [line["truth"] for line in lines]))}
            for name, groups in by_set.items()
        }  # fmt: skip
    keep(options, "scales", found)


def stage_others(options: argparse.Namespace) -> None:
    """Pairs without wikitext, on what they do not contain."""
    names = [name for name in open_pool(options.work / "pool").partitions if name not in UNSEEN]
    held = [options.work / "held" / f"{name}.jsonl" for name in UNSEEN]
    kept(options, "others", graded(options, alike(itertools.combinations(names, 2)), held))


def graded(options: argparse.Namespace, rows: list[dict], held: list[Path] | None = None) -> Ablation:
    """With truth, whose losses are collected as they come."""
    restore(options)
    is_done = threading.Event()

    def collecting() -> None:
        while not is_done.wait(EVERY):
            try:
                collect(options)
            except (OSError, ValueError) as error:
                print(f"not collected: {error}", flush=True)

    thread = threading.Thread(target=collecting, daemon=True)
    thread.start()
    try:
        return ablate(options.work / "pool", held or options.work / "held", mixtures=rows, truth=True,
                      corpus=options.work / "train.jsonl", seed=options.seed)  # fmt: skip
    finally:
        is_done.set()
        thread.join()
        collect(options)


def restore(options: argparse.Namespace) -> None:
    """Losses of real runs into the pool, as it keeps them: their names say all that they depend on."""
    place = options.work / "pool" / "losses"
    place.mkdir(exist_ok=True)
    for name, text in (json.loads(TRUTH.read_text()) if TRUTH.exists() else {}).items():
        if not (place / name).exists():
            making = place / f"{name}.making"
            making.write_text(text)
            making.replace(place / name)


def collect(options: argparse.Namespace) -> None:
    """Losses of real runs out of the pool."""
    found = json.loads(TRUTH.read_text()) if TRUTH.exists() else {}
    for file in sorted((options.work / "pool" / "losses").glob("*.json")):
        if file.name not in found and json.loads(text := file.read_text())["key"][0] == "truth":
            found[file.name] = text
    making = TRUTH.with_suffix(".making")
    making.write_text(json.dumps(found, indent=0) + "\n")
    making.replace(TRUTH)


def kept(options: argparse.Namespace, name: str, found: Ablation) -> None:
    """Cells and agreement."""
    agreements = {one: {group: {proxy: made.row() for proxy, made in by.items()} for group, by in groups.items()}
                  for one, groups in found.agreements.items()}  # fmt: skip
    keep(options, name, {"cells": [cell.row() for cell in found.cells], "agreements": agreements, "cost": found.cost})
    for one, groups in agreements.items():
        print(
            one,
            {group: {proxy: round(made["spearman"], 2) for proxy, made in by.items()} for group, by in groups.items()},
        )


def stage_cost(options: argparse.Namespace) -> None:
    """Time of becoming a mixture against that of being read, and memory of a merge to disk."""
    pool = open_pool(options.work / "pool")
    sets = read_sets(options.work / "held" / f"{name}.jsonl" for name in READ)
    drawn = np.random.default_rng(1).dirichlet([1.0] * len(pool.members), MEASURED)
    made: MixedModel = mixed_model(pool)
    becoming = reading = 0.0
    for weights in drawn:
        start = time.perf_counter()
        model = made.become(dict(zip(pool.partitions, map(float, weights), strict=True)))
        middle = time.perf_counter()
        for one in sets:
            measure(model, one, max_tokens=128)
        becoming, reading = becoming + middle - start, reading + time.perf_counter() - middle
    found = {"mixtures": MEASURED, "becoming seconds": becoming, "reading seconds": reading,
             "ratio": (becoming + reading) / reading}  # fmt: skip
    keep(options, "cost", found)
    print(found)


def stage_memory(options: argparse.Namespace) -> None:
    """Of a merge to disk; in a process of its own, for memory that was freed before hides what is taken again."""
    pool = open_pool(options.work / "pool")
    start = pool.start()
    sizes = [4 * math.prod(start.shape(name)) for name in start.files]
    alike = dict.fromkeys(pool.partitions, 1 / len(pool.members))
    held = held_by(lambda: write_merged(pool, alike, options.work / "merged"))
    found = {"members": len(pool.members), "bytes of the model": sum(sizes),
             "bytes of its largest tensor": max(sizes), "bytes held by a merge": held}  # fmt: skip
    keep(options, "memory", found)
    print(found)


def held_by(work: Callable[[], object]) -> int:
    """Largest private memory while something is done, over what it was before; looked at every millisecond."""
    most, is_done, before = [0], threading.Event(), private_bytes()

    def looking() -> None:
        while not is_done.wait(0.001):
            most[0] = max(most[0], private_bytes())

    thread = threading.Thread(target=looking, daemon=True)
    thread.start()
    try:
        work()
    finally:
        is_done.set()
        thread.join()
    return max(most[0] - before, 0)


def private_bytes() -> int:
    """Of this process; mapped files, which the kernel drops when it likes, do not count."""
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def some_of_each(options: argparse.Namespace, count: int) -> list[dict]:
    """So many rows of each set at random, or all there are."""
    by_set: dict[str, list[dict]] = {}
    for line in (options.work / "train.jsonl").read_text().strip().split("\n"):
        row = json.loads(line)
        by_set.setdefault(row["source"], []).append(row)
    return [row for name, own in by_set.items()
            for row in random.Random(f"join {name} {options.seed}").sample(own, min(count, len(own)))]  # fmt: skip


def stage_join(options: argparse.Namespace) -> None:
    """Summed scores against leaving out; the plot is in the work directory."""
    rows = some_of_each(options, INDEXED)
    index(options.model, rows, options.work / "index", seed=options.seed)
    found = join(options.work / "index", options.work / "pool", options.work / "held", seed=options.seed)
    kept_join(options, "join", found, len(rows))


def stage_replay(options: argparse.Namespace) -> None:
    """The same with scores of a replay, and those of an index of the same rows."""
    work, file = options.work, options.work / "replayed.jsonl"
    rows = some_of_each(options, REPLAYED)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    train(options.model, file, work / "run", lr=options.lr, seed=options.seed, replayable=True, **RECIPE)
    if not (work / "index-replayed").exists():
        index(options.model, file, work / "index-replayed", seed=options.seed, max_tokens=RECIPE["max_tokens"])
    found = join(work / "index-replayed", work / "pool", work / "held", methods=("replay", *METHODS), run=work / "run",
                 seed=options.seed)  # fmt: skip
    kept_join(options, "join by replay", found, len(rows))


def kept_join(options: argparse.Namespace, name: str, found: Join, rows: int) -> None:
    """Write a join down, and print it."""
    keep(options, name, {"rows": rows, "correlations": found.correlations, "points": found.points})
    (options.work / f"{name}.svg").write_text(join_plot(found))
    for method, told in found.correlations.items():
        by = {name: round(value, 2) for name, value in told["by set"].items()}
        print(f"{method} {told['spearman']:.2f} ({told['low']:.2f} to {told['high']:.2f}) {by}")


STAGES = {
    "data": stage_data,
    "pool": stage_pool,
    "pairs": stage_pairs,
    "dirichlet": stage_dirichlet,
    "scales": stage_scales,
    "others": stage_others,
    "cost": stage_cost,
    "memory": stage_memory,
    "join": stage_join,
    "replay": stage_replay,
}

if __name__ == "__main__":
    main()
