"""Does the verdict keep its promise at every length: does one meaningless completion in twenty pass?

    python -m benchmarks.tracing.levels INDEX [--data ../shared/data] [--queries 100] [--seeds 3]

INDEX is one of some alpaca rows by base-6m:

    head -2000 ../shared/data/instruct/alpaca.jsonl > alpaca.jsonl
    whence index ../shared/models/base-6m alpaca.jsonl -o INDEX

Completions of 8, 24, 60 and 120 uniformly random tokens under dolly's prompts are traced; counted is how often a query
passes the level of its own length, and how often it passes the one that is measured at 24 tokens. A level is measured
on 99 draws, so that the share that passes it differs between draws by two in a hundred: seeds draw anew. Finished cells
are kept, so that a stopped run goes on. The interval is Wilson's over all queries.
"""

import argparse
import json
import random
import time
from pathlib import Path

from benchmarks.tracing.nulls import gibberish, rows
from scipy.stats import binomtest

from whence.indexing.opening import open_index
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query

RESULTS = Path(__file__).parent / "results" / "levels.json"
LENGTHS = (24, 8, 60, 120)
"""24 first: its level is the one that others are compared with."""


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    index = open_index(options.index)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found |= {"rows": index.store.rows, "queries of a cell": options.queries}
    cells = found.setdefault("cells", {})
    for seed in range(options.seeds):
        for length in LENGTHS:
            if (name := f"{length} tokens, seed {seed}") not in cells:
                cells[name] = cell(index, options, length, seed)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
                print(name, cells[name]["level"], flush=True)
    found["table"] = [line(cells, length, options.seeds) for length in sorted(LENGTHS)]
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["table"]:
        print(json.dumps(row))


def cell(index, options: argparse.Namespace, length: int, seed: int) -> dict:
    """The level of one length, and the best z of each query."""
    rng = random.Random(f"{length} {seed}")
    prompts = [prompt for prompt, _ in rows(options.data / "instruct" / "dolly.jsonl", rng)[: options.queries]]
    tokenizer, start = index.model().tokenizer, time.perf_counter()
    queries = [Query(prompt, gibberish(tokenizer, rng, length)) for prompt in prompts]
    best, levels = [], []
    traced = trace(index, queries=queries, top=10, seed=seed)
    for number in range(len(queries)):
        best.append(round(max(hit.null.z for hit in traced.of(number)), 3))
        levels.append(round(traced.levels[number], 3))
    return {"seconds": round(time.perf_counter() - start, 1), "level": sum(levels) / len(levels)} | {
        "best": best,
        "levels": levels,
    }


def line(cells: dict, length: int, seeds: int) -> dict:
    """How many of one length pass, over seeds."""
    own, at_24, total = 0, 0, 0
    for seed in range(seeds):
        made, reference = cells[f"{length} tokens, seed {seed}"], cells[f"24 tokens, seed {seed}"]["level"]
        own += sum(z > level for z, level in zip(made["best"], made["levels"], strict=True))
        at_24 += sum(z > reference for z in made["best"])
        total += len(made["best"])
    low, high = binomtest(own, total).proportion_ci(method="wilson")
    shares = {"passed": own / total, "interval": [round(low, 3), round(high, 3)], "at 24 tokens' level": at_24 / total}
    return {"tokens": length, "queries": total} | shares


if __name__ == "__main__":
    main()
