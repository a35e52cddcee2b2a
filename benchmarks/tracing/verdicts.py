"""Does the verdict keep its promise on text that is unlike the corpus, and does it see what was taught?

    python -m benchmarks.tracing.verdicts NAME=INDEX... [--method cosine|trak] [--data ../shared/data]
        [--queries 201] [--planted 50]

For each index, queries of four kinds, of 8, 24 and 60 tokens in turn, under prompts of dolly: completions of uniformly
random tokens; dolly's answers with their letters shuffled; dolly's answers to other questions; and rows of the index
itself, whole, which the model was taught. Counted is how many have an example that the verdict calls more than chance:
at most one in twenty of the first three is promised, and as many as can be of the last. The corpus must not be dolly's.
Indexes that the results have are not measured again, by another method under NAME, METHOD; intervals are Wilson's.
"""

import argparse
import json
import random
from pathlib import Path

from scipy.stats import binomtest

from whence.corpus.layouts import shown_text
from whence.indexing.opening import Index, open_index
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query

RESULTS = Path(__file__).parent / "results" / "verdicts.json"
LENGTHS = (8, 24, 60)
AT_ONCE = 10
"""Queries of a trace: of few, as a user asks, short lists are ranked by exact gradients."""
COSINE = "cosine"
KINDS = ("random tokens", "letters shuffled", "other answers")


def main() -> None:
    """Measure each index that the results lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("indexes", nargs="+", metavar="NAME=INDEX")
    parser.add_argument("--method", default=COSINE)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--queries", type=int, default=201)
    parser.add_argument("--planted", type=int, default=50)
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for text in options.indexes:
        name, _, path = text.partition("=")
        name += "" if options.method == COSINE else f", {options.method}"
        if name not in found:
            found[name] = measured(open_index(path), options)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(name, json.dumps(found[name]["table"]))


def measured(index: Index, options: argparse.Namespace) -> dict:
    """All kinds, and the first three together."""
    rng = random.Random(0)
    queries = {kind: unrelated(index, kind, options, rng) for kind in KINDS}
    rows = index.store.rankable().tolist()
    drawn = index.store.read_rows(sorted(rng.sample(rows, min(len(rows), options.planted))))
    shown = [shown_text(index.shown_row(row)) for row in drawn]
    queries["rows of the index"] = [Query(str(text["prompt"]), str(text["completion"])) for text in shown]
    best, table = {}, {}
    for kind, asked in queries.items():
        best[kind] = []
        for first in range(0, len(asked), AT_ONCE):
            traced = trace(index, queries=asked[first : first + AT_ONCE], method=options.method)
            best[kind] += [
                [round(max(hit.null.z for hit in traced.of(number)), 3), round(traced.levels[number], 3)]
                for number in range(len(traced.answers))
            ]
        table[kind] = share(best[kind])
        print(kind, table[kind], flush=True)
    table["unrelated"] = share([pair for kind in KINDS for pair in best[kind]])
    return {"rows": index.store.rows, "table": table, "best z and level": best}


def share(pairs: list) -> dict:
    """How many pass, with an interval."""
    passed = sum(z > level for z, level in pairs)
    low, high = binomtest(passed, len(pairs)).proportion_ci(method="wilson")
    return {
        "queries": len(pairs),
        "passed": round(passed / len(pairs), 3),
        "interval": [round(float(low), 3), round(float(high), 3)],
    }


def unrelated(index: Index, kind: str, options: argparse.Namespace, rng: random.Random) -> list[Query]:
    """Queries that no row of the corpus has taught."""
    tokenizer = index.model().tokenizer
    rows = [json.loads(line) for line in (options.data / "instruct" / "dolly.jsonl").open()]
    rng.shuffle(rows)
    texts = [(row["instruction"], row["output"]) for row in rows]
    allowed = sorted({*range(len(tokenizer))} - {*tokenizer.all_special_ids})
    count, queries = options.queries // len(KINDS), []
    for number in range(count):
        length, prompt = LENGTHS[number % len(LENGTHS)], texts[number][0][:100]
        answer = next(text for _, text in texts[count + number :] if len(text) > 8 * length)
        texts.remove(next(pair for pair in texts if pair[1] == answer))
        if kind == "random tokens":
            answer = tokenizer.decode(rng.choices(allowed, k=2 * length))
        elif kind == "letters shuffled":
            letters = [*answer]
            rng.shuffle(letters)
            answer = "".join(letters)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"][:length]
        queries.append(Query(prompt, tokenizer.decode(ids)))
    return queries


if __name__ == "__main__":
    main()
