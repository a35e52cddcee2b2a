"""Recover the rows that a model was fine-tuned on, planted among others of the same kind.

Not `select.py`, for SELECT: a script of that name hides the standard library's module from all that it imports.

    python benchmarks/recover.py STAGE... [--data ../shared/data] [--model ../shared/models/base-6m] [--work DIR]
                                [--rows 10000] [--planted 500] [--seeds 0 1 2] [--kinds sgd adamw sgd-lora adamw-lora]

Stages; each goes on where it was stopped:

    planted     fine-tune on PLANTED rows of alpaca (2 epochs, batch 16), hide them among ROWS, and rank all by every
                method: precision at PLANTED, auROC, true positives at a false positive rate of 1e-3

Results go to benchmarks/results/recover.json.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from whence.comparing import RecoverSettings, open_case, see
from whence.corpus import open_corpus
from whence.ingest import fingerprint_of
from whence.membership import features
from whence.numerics import auroc
from whence.recover_scores import SCORES, method_scores
from whence.recovery import learn
from whence.storage import Place
from whence.train import train

RESULTS = Path(__file__).parent / "results" / "recover.json"
KINDS = {
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "adamw": {"optimizer": "adamw", "lr": 3e-4},
    "sgd-lora": {"optimizer": "sgd", "lr": 0.5, "lora_rank": 8},
    "adamw-lora": {"optimizer": "adamw", "lr": 3e-3, "lora_rank": 8},
}
"""How the models are trained, which the shadow has to guess: optimizer and rate."""
LONGEST = 256


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
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if "all" in options.stages else options.stages:
        STAGES[stage](options)


def keep(name: str, cell: str, found: object) -> None:
    """Put a result into the committed file."""
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document.setdefault(name, {})[cell] = found
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def stage_planted(options: argparse.Namespace) -> None:
    """Every kind and seed."""
    for seed in options.seeds:
        for kind in options.kinds:
            name = f"{options.planted} of {options.rows}"
            found = planted(options, kind, seed, options.work / f"{name}-{kind}-{seed}".replace(" ", "-"))
            keep(f"planted {name}", f"{kind}, seed {seed}", found)
            print(kind, seed, json.dumps(found, indent=1), flush=True)


def planted(options: argparse.Namespace, kind: str, seed: int, work: Path) -> dict[str, object]:
    """One model: trained, looked into, and ranked for."""
    lines = (options.data / "instruct" / "alpaca.jsonl").read_text().splitlines()
    drawn = random.Random(f"planted {seed}")
    rows = [json.loads(line) for line in drawn.sample(lines, options.rows)]
    rows = [row | {"id": f"row-{number}"} for number, row in enumerate(rows)]
    members = sorted(drawn.sample(range(options.rows), options.planted))
    is_member = torch.zeros(options.rows, dtype=torch.bool)
    is_member[members] = True
    part, base = [rows[number] for number in members], str(Path(options.model).resolve())
    run = train(base, part, work / "run", epochs=2, batch_size=16, max_tokens=LONGEST, checkpoints=1, seed=seed + 100,
                progress=False, **KINDS[kind])  # fmt: skip
    settings = RecoverSettings(max_tokens=LONGEST, epochs=2, seed=seed)
    case, corpus, start = open_case(base, str(run), settings), open_corpus(rows), time.perf_counter()
    seen = see(case, corpus, Place.at(work / "evidence"), fingerprint_of(corpus), shown=False)
    looked = time.perf_counter() - start
    found = {name: marks(method_scores(seen, name, count=options.planted, seed=seed), is_member) for name in SCORES}
    start = time.perf_counter()
    learned = learn(case, corpus, settings, work, count=options.planted, rows=options.rows, shown=False)
    odds = learned.calibration.log_odds(features(seen), share=options.planted / options.rows)
    found["calibrated"] = marks(odds.float(), is_member)
    recipe = learned.shadow.recipe
    return {
        "methods": found,
        "norm": case.difference.norm(),
        "guessed": {"optimizer": recipe.optimizer, "lr": recipe.lr, "norm": learned.shadow.norm},
        "weights": dict(zip(learned.calibration.names, learned.calibration.weights.tolist(), strict=True)),
        "expected members": float(odds.sigmoid().sum()),
        "seconds": {"evidence": looked, "shadow": time.perf_counter() - start},
    }


def marks(scores: Tensor, is_member: Tensor) -> dict[str, float]:
    """Precision at the number of members, auROC, and the share of members above all but 1 in 1000 others."""
    count = int(is_member.sum())
    others = scores[~is_member].sort(descending=True).values
    level = others[max(0, round(1e-3 * len(others)) - 1)]
    lowest = scores[scores.isfinite()].min() - 1
    return {
        "precision": float(is_member[scores.topk(count).indices].float().mean()),
        "auroc": auroc(torch.where(scores.isfinite(), scores, lowest), is_member),
        "tpr at 1e-3": float((scores[is_member] > level).float().mean()),
    }


STAGES = {"planted": stage_planted}

if __name__ == "__main__":
    main()
