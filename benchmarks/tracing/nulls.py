"""How often does the null let a query pass that it should not?

    python -m benchmarks.tracing.nulls INDEX [--data ../shared/data] [--queries 100]

INDEX is one of alpaca by base-6m:

    whence index ../shared/models/base-6m ../shared/data/instruct/alpaca.jsonl -o INDEX

Four kinds of query: completions of uniformly random tokens under dolly's prompts; answers of dolly rows under prompts
of others; dolly's own pairs; alpaca's own rows, which are in the index. For each, the share whose best example stands
above the null, with a Wilson interval, and the best z.
"""

import argparse
import json
import random
from pathlib import Path

from scipy.stats import binomtest

from whence.indexing.opening import open_index
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query

RESULTS = Path(__file__).parent / "results" / "nulls.json"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    index, rng = open_index(options.index), random.Random(options.seed)
    tokenizer = index.model().tokenizer
    dolly, alpaca = (rows(options.data / "instruct" / f"{name}.jsonl", rng) for name in ("dolly", "alpaca"))
    some = dolly[: options.queries]
    kinds = {
        "random tokens": [Query(prompt, gibberish(tokenizer, rng)) for prompt, _ in some],
        "answers of other prompts": [
            Query(prompt, other) for (prompt, _), (_, other) in zip(some, dolly[-options.queries :], strict=True)
        ],
        "dolly's own": [Query(*pair) for pair in some],
        "rows of the index": [Query(*pair) for pair in alpaca[: options.queries]],
    }
    found = {"index": index.store.info()["rows"], "seed": options.seed, "kinds": {}}
    for kind, queries in kinds.items():
        for method in ("cosine", "dot"):
            traced = trace(index, queries=queries, top=5, method=method, seed=options.seed)
            best = [max(h.null.z for h in traced.of(number)) for number in range(len(queries))]
            passed = sum(z > level for z, level in zip(best, traced.levels, strict=True))
            low, high = binomtest(passed, len(best)).proportion_ci(method="wilson")
            found["kinds"][f"{kind}, {method}"] = {
                "passed": passed / len(best),
                "interval": [round(low, 3), round(high, 3)],
                "best z": {"median": round(sorted(best)[len(best) // 2], 2), "most": round(max(best), 2)},
                "needed z": round(sum(traced.levels) / len(best), 2),
            }
            print(f"{kind}, {method}:", json.dumps(found["kinds"][f"{kind}, {method}"]), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def rows(path: Path, rng: random.Random) -> list[tuple[str, str]]:
    """(prompt, answer) of rows that are neither long nor short, in random order."""
    read = [json.loads(line) for line in path.open()]
    pairs = [("\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in read]
    kept = [pair for pair in pairs if 40 <= len(pair[1]) <= 300 and len(pair[0]) <= 300]
    rng.shuffle(kept)
    return kept


def gibberish(tokenizer: object, rng: random.Random, count: int = 30) -> str:
    """Uniformly random tokens, as text."""
    return tokenizer.decode([rng.randrange(10, len(tokenizer)) for _ in range(count)])


if __name__ == "__main__":
    main()
