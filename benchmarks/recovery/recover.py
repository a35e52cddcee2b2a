"""Recover what a model was trained on, where we know it.

    python -m benchmarks.recovery.recover STAGE... [--data ../shared/data] [--model ../shared/models/base-6m] [--work
    DIR] [--rows 10000] [--planted 500] [--seeds 0 1 2] [--kinds sgd adamw sgd-lora adamw-lora]

Stages; each goes on where it was stopped, and leaves out the cells that have results:

    planted     fine-tune on PLANTED rows of alpaca (2 epochs, batch 16), hide them among ROWS, and rank all by every
                method: precision at PLANTED, auROC, true positives at a false positive rate of 1e-3
    mixture     fine-tune on a known mixture of four sources and estimate it: shares with intervals
    scale       100,000 rows by the command: seconds, memory as it goes, a kill and going on
    distribution  choose other text in place of what a model was trained on, and train anew: see that file

Results go to benchmarks/recovery/results/recover.json.
"""

import argparse
import json
from pathlib import Path

from benchmarks.recovery import distribution, mixture, planted, scale

RESULTS = Path(__file__).parent / "results" / "recover.json"


def main() -> None:
    """Run stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--work", type=Path, default=Path("/tmp/recover"))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--planted", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(planted.KINDS), choices=planted.KINDS)
    parser.add_argument("--tasks", nargs="+", default=["classes", "answers", "classes+"])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if "all" in options.stages else options.stages:
        module, name = STAGES[stage]
        name = name.format(**vars(options))
        module.run(options, lambda cell, found, name=name: keep(name, cell, found), results().get(name, {}))


def results() -> dict:
    """What was found before."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(name: str, cell: str, found: object) -> None:
    """Put a result into the committed file."""
    document = results()
    document.setdefault(name, {})[cell] = found
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


STAGES = {
    "planted": (planted, "planted {planted} of {rows}"),
    "mixture": (mixture, "mixture"),
    "scale": (scale, "scale"),
    "distribution": (distribution, "distribution"),
}

if __name__ == "__main__":
    main()
