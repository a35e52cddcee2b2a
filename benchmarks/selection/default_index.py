"""What LESS chooses by the default index, by that of old, and by whole gradients: the rows that choices share.

    python -m benchmarks.selection.default_index [--data ../shared/data] [--model ../shared/models/base-6m] [--work DIR]

A warm-up of LoRA adapters on the pool; an index of the pool for each view (`sgd`, the plain gradient; `adam`, LESS's)
and each of three stores: whole gradients in fp32, the default of old, the default since 2026-11-29. From each LESS
chooses FRACTION of the rows for two tasks, as published (one order for all of a task's examples) and by turns. The pool
is a part of `less.py`'s, so that whole gradients fit; nothing is trained on the choices. Results go to
benchmarks/selection/results/default_index.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.selection.less_data import load

from whence import index, select, train
from whence.selection.description import overlap

ROWS, FRACTION, MAX_TOKENS, SEED = 600, 0.05, 96, 0
TASKS = ("gsm8k", "bbh")
WARM_UP: dict[str, Any] = {
    "fraction": 0.25,
    "epochs": 2,
    "lora_rank": 8,
    "lr": 2e-3,
    "max_tokens": MAX_TOKENS,
    "checkpoints": 1,
}
WHOLE: dict[str, Any] = {"projection": "identity", "codec": "float32"}
STORES: dict[str, dict[str, dict[str, Any]]] = {
    "sgd": {"whole": WHOLE, "old": {"projection": "two_sided", "width": 16, "codec": "bfloat16"}, "default": {}},
    "adam": {"whole": WHOLE, "old": {"projection": "count_sketch", "width": 8192, "codec": "bfloat16"}, "default": {}},
}
HOW: dict[str, dict[str, Any]] = {
    "one order": {"by": "task", "selector": "max"},
    "turns": {"by": "example", "selector": "round_robin"},
}
RESULTS = Path(__file__).parent / "results" / "default_index.json"


def main() -> None:
    """Build, choose, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--work", type=Path, default=Path("/tmp/default-index"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    found = load(options.data, SEED)
    pool = found.pool[:ROWS]
    run = train(options.model, pool, options.work / "run", seed=SEED, progress=False, **WARM_UP)
    document: dict = {"rows": len(pool), "fraction": FRACTION, "warm-up": WARM_UP, "views": {}}
    for view, stores in STORES.items():
        chosen, sizes = {}, {}
        for name, settings in stores.items():
            place = options.work / f"{view}-{name}"
            built = index(run, pool, place, view=view, max_tokens=MAX_TOKENS, seed=SEED, progress=False, **settings)
            manifest = built.store.manifest
            sizes[name] = {"projection": built.space.sketch, "numbers": manifest.width, "codec": manifest.codec,
                           "bytes a row": built.store.codec.bytes_per_row(manifest.width)}  # fmt: skip
            for task in TASKS:
                for told, how in HOW.items():
                    rows = select(built, found.tasks[task], method="less", fraction=FRACTION, **how).selection.rows
                    chosen[name, task, told] = rows
            print(view, name, sizes[name], flush=True)
        shares = {
            f"{task}, {told}": {name: overlap(chosen["whole", task, told], chosen[name, task, told])
                                for name in ("old", "default")}
            for task in TASKS for told in HOW
        }  # fmt: skip
        document["views"][view] = {"stores": sizes, "shared with whole gradients": shares}
        print(json.dumps(shares, indent=1), flush=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
