"""Of EK-FAC's first ten examples, how many stand in a short list that the index makes, and how long must it be?

    python -m benchmarks.tracing.short_lists [--work /tmp/banks] [--seed 0]

Reads the scores that two banks of `benchmarks.evaluation.banks` keep (stage `lds`): of EK-FAC, refined and not, for all
rows and 30 queries, and of methods that read an index alone or text. For each of these as the one that lists:

    recall      share of the first, and of the last, ten rows by EK-FAC that are among the first, or last, m that it
                lists; mean over queries
    lengths     by TRAK, of random parts of the rows: m with which 50, 80, 90 and 95% of the first ten are listed;
                ten draws

Written to benchmarks/tracing/results/short_lists.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

RESULTS = Path(__file__).parent / "results" / "short_lists.json"
BANKS = ("base-6m", "docstrings")
TARGETS = {"EK-FAC": "ekfac:", "EK-FAC + CG": "ekfac:refine=2,sample=128,"}
LISTING = ("trak", "trackstar", "cosine", "exact-cosine", "bm25")
LENGTHS, FIRST, DRAWS = (50, 100, 200, 400), 10, 10
PARTS, SHARES = (125, 250, 500, 1000, 2000), (0.5, 0.8, 0.9, 0.95)
Scores = NDArray[np.float32]


def kept(bank: Path) -> dict[str, Scores]:
    """Scores [q n] by the method's name, without the directory of its curvature."""
    found = {}
    for file in sorted((bank / "bank" / "scores").glob("*.json")):
        about = json.loads(file.read_text())
        name = about["method"].replace(f"curvature={bank / 'curvature'}", "")
        (found[name],) = load_file(file.with_name(about["file"])).values()
    return found


def ranks(scores: Scores) -> NDArray[np.int64]:
    """Place of each row from the highest score on, by query."""
    return (-scores).argsort(1, kind="stable").argsort(1)


def recall(target: Scores, listing: Scores, length: int) -> float:
    """Share of the target's first that are in the list."""
    is_first, is_listed = ranks(target) < FIRST, ranks(listing) < length
    return float((is_first & is_listed).sum() / is_first.sum())


def lengths(target: Scores, listing: Scores, count: int, rng: np.random.Generator) -> dict[str, int]:
    """Lengths of lists that hold shares of the first, of so many rows."""
    places = []
    for _ in range(DRAWS):
        rows = rng.permutation(target.shape[1])[:count]
        places.append(ranks(listing[:, rows])[ranks(target[:, rows]) < FIRST])
    every = np.sort(np.concatenate(places))
    return {f"{share:g}": int(every[int(np.ceil(share * len(every))) - 1]) + 1 for share in SHARES}


def main() -> None:
    """Read, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/banks"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    document = {}
    for bank in BANKS:
        scores, rng = kept(options.work / bank), np.random.default_rng(options.seed)
        rows, table = scores["trak"].shape[1], []
        for target, kind in TARGETS.items():
            for name in LISTING:
                for length in LENGTHS:
                    table.append({"of": target, "listed by": name, "length": length,
                                  "first": recall(scores[kind], scores[name], length),
                                  "last": recall(-scores[kind], -scores[name], length)})  # fmt: skip
                    print(bank, *table[-1].values())
        by_part = {
            str(count): lengths(scores["ekfac:"], scores["trak"], count, rng) for count in PARTS if count <= rows
        }
        print(bank, by_part)
        document[bank] = {"rows": rows, "recall": table, "lengths": by_part}
    RESULTS.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "banks": document}, indent=1) + "\n")


if __name__ == "__main__":
    main()
