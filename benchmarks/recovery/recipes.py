"""Does `recover` tell how many rows a model was trained on, where it guesses the recipe wrong?

    python -m benchmarks.recovery.recipes [--data ../shared/data] [--model ../shared/models/base-6m] [--work DIR]
        [--rows 1500] [--members 150] [--longest 128] [--seeds 0 1 2] [--recipes ...] [--page]

Models are fine-tuned on MEMBERS rows of alpaca by RECIPES and hidden among ROWS. `recover` is given neither count nor
recipe. Beside it stand two that take 2 epochs of batch 16 for granted: `before` tells the shadow's own probabilities
(commit 6f2dbbd), `fitted` those fitted to the corpus. A cell that has a result is left out, so that the same command
goes on; --page writes the table of docs/results/recovery.md and runs nothing.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from benchmarks.marked import filled
from torch import Tensor

from whence import recover
from whence.corpus.reading import open_corpus
from whence.indexing.ingest import fingerprint_of
from whence.numerics import auroc
from whence.recovery.case import open_case
from whence.recovery.membership import features, logit
from whence.recovery.points import gather_evidence, with_points_of
from whence.recovery.settings import RecoverSettings
from whence.recovery.shadow_calibration import SHADOW_DIFFERENCE, build_calibration_set
from whence.storage import Place
from whence.training.trainer import train

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks/recovery/results/recipes.json", ROOT / "docs/results/recovery.md"
RECIPES = {
    "adamw 3e-4, 2 epochs, batch 16": {"optimizer": "adamw", "lr": 3e-4, "epochs": 2, "batch_size": 16},
    "adamw 2e-4, 5 epochs, batch 4": {"optimizer": "adamw", "lr": 2e-4, "epochs": 5, "batch_size": 4},
    "adamw 5e-4, 1 epoch, batch 4": {"optimizer": "adamw", "lr": 5e-4, "epochs": 1, "batch_size": 4},
    "sgd 0.08, 4 epochs, batch 8": {"optimizer": "sgd", "lr": 0.08, "epochs": 4, "batch_size": 8},
    "adamw 4e-4, 3 epochs, batch 8": {"optimizer": "adamw", "lr": 4e-4, "epochs": 3, "batch_size": 8},
}
"""The last two are not among those that a shadow tries (`shadow_model.EPOCHS`)."""
USUAL = {"epochs": 2.0, "batch_size": 16}
"""What was taken for granted before."""
WHEN = ("before", "fitted", "now")


def main() -> None:
    """Run the cells that have no result, or fill in the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--work", type=Path, default=Path("/tmp/recover-recipes"))
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--members", type=int, default=150)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.page:
        PAGE.write_text(filled(PAGE.read_text(), "recipes", table(document)))
        return
    size = f"{options.members} of {options.rows}, {options.longest} tokens"
    for seed in options.seeds:
        for name in options.recipes:
            cells = document.setdefault(size, {})
            if f"{name}, seed {seed}" not in cells:
                cells[f"{name}, seed {seed}"] = cell = measured(options, name, seed)
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(document, indent=1) + "\n")
                print(name, seed, json.dumps(cell), flush=True)


def measured(options: argparse.Namespace, name: str, seed: int) -> dict[str, object]:
    """One model: what is told, before and now, beside what is true."""
    lines = (options.data / "instruct" / "alpaca.jsonl").read_text().strip().split("\n")
    rng = random.Random(f"recipes {seed}")
    rows = [json.loads(line) | {"id": f"row-{number}"} for number, line in enumerate(rng.sample(lines, options.rows))]
    members = sorted(random.Random(f"recipes {name} {seed}").sample(range(options.rows), options.members))
    is_member = torch.zeros(options.rows, dtype=torch.bool).index_fill_(0, torch.tensor(members), True)
    slug = "".join(sign if sign.isalnum() else "-" for sign in f"{name} {seed} {options.rows}")
    work, base = options.work / slug, str(Path(options.model).resolve())
    start = time.perf_counter()
    model = train(base, [rows[number] for number in members], work / "run", max_tokens=options.longest, checkpoints=1,
                  seed=seed + 100, progress=False, **RECIPES[name])  # fmt: skip
    trained = time.perf_counter() - start
    given = {"progress": False, "mixture": "none", "max_tokens": options.longest, "seed": seed}
    start = time.perf_counter()
    found = recover(base, model, rows, work=work / "guessed", **given)
    seconds = time.perf_counter() - start
    usual = recover(base, model, rows, work=work / "usual", **given, **USUAL)
    assert found.learned is not None and found.members is not None and usual.members is not None
    recipe = found.learned.shadow.recipe
    return {
        "true": options.members,
        "auroc": auroc(found.scores, is_member),
        "precision at true": precision(found.scores, is_member),
        "precision before": precision(usual.scores, is_member),
        "now": marks(found.scores, is_member) | {"low": found.members[1], "high": found.members[2]},
        "fitted": marks(usual.scores, is_member) | {"low": usual.members[1], "high": usual.members[2]},
        "before": marks(as_before(options, usual, rows, str(model), work / "usual", seed), is_member),
        "others with p at most 0.01": float((found.p_values[~is_member] <= 0.01).float().mean()),
        "shadow": {"optimizer": recipe.optimizer, "lr": recipe.lr, "epochs": recipe.epochs,
                   "batch_size": recipe.batch_size, "norm": found.learned.shadow.norm,
                   "distance": found.learned.shadow.distance},
        "seconds": {"training": trained, "recover": seconds},
    }  # fmt: skip


def precision(scores: Tensor, is_member: Tensor) -> float:
    """Share of members among as many rows as there are members."""
    return float(is_member[scores.topk(int(is_member.sum())).indices].float().mean())


def marks(p: Tensor, is_member: Tensor) -> dict[str, float]:
    """Rows more likely members than not, expected members, and how many of each are."""
    chosen, between = p >= 0.5, (p >= 0.5) & (p < 0.9)
    return {
        "told": int(chosen.sum()),
        "true of told": int(is_member[chosen].sum()),
        "expected": float(p.clamp_min(0).double().sum()),
        "rows of .5 to .9": int(between.sum()),
        "true of these": int(is_member[between].sum()),
    }


def as_before(options: argparse.Namespace, found, rows: list[dict], model: str, work: Path, seed: int) -> Tensor:
    """The shadow's own probabilities, shifted to the share of members that equals their mean."""
    settings = RecoverSettings(max_tokens=options.longest, seed=seed, mixture="none", **USUAL)
    case, corpus = open_case(str(Path(options.model).resolve()), model, settings), open_corpus(rows)
    known = build_calibration_set(case, corpus, settings, work, count=options.rows // 10, rows=options.rows)
    place, others = Place.at(work / "evidence"), {SHADOW_DIFFERENCE: known.case}
    evidence = gather_evidence(
        with_points_of(case, known.case), corpus, place, fingerprint_of(corpus), others=others, progress=False
    )
    calibration = found.learned.calibration
    odds, share = calibration.log_odds(features(evidence)), calibration.share
    for _ in range(100):
        share = float((odds + logit(share) - logit(calibration.share)).sigmoid().mean())
    return (odds + logit(share) - logit(calibration.share)).sigmoid()


def table(document: dict) -> str:
    """A line a model, and how many numbers were within 10%."""
    lines = []
    for size, cells in document.items():
        lines += [f"{size}:", "", "| trained by | seed | shadow's recipe | before | fitted | now | expected (95%) | "
                  "precision at true, before and now |", "|---" * 8 + "|"]  # fmt: skip
        for name, cell in cells.items():
            recipe, _, seed = name.rpartition(", seed ")
            shadow, now = cell["shadow"], cell["now"]
            counts = " | ".join(f"{cell[when]['told']}, {cell[when]['true of told']}" for when in WHEN)
            guessed = f"{shadow['optimizer']} {shadow['lr']:.2g}, {shadow['epochs']:g}, {shadow['batch_size']}"
            lines.append(
                f"| {recipe} | {seed} | {guessed} | {counts} | {now['expected']:.0f} ({now['low']:.0f} to "
                f"{now['high']:.0f}) | {cell['precision before']:.2f}, {cell['precision at true']:.2f} |"
            )
        lines += ["", "| | before | fitted | now |", "|---|---|---|---|"]
        near = [sum(abs(cell[when]["told"] / cell["true"] - 1) <= 0.1 for cell in cells.values()) for when in WHEN]
        lines.append(f"| told within 10% of true, of {len(cells)} | " + " | ".join(map(str, near)) + " |")
        inside = [sum(cell[when]["low"] <= cell["true"] <= cell[when]["high"] for cell in cells.values())
                  for when in WHEN[1:]]  # fmt: skip
        lines.append(
            f"| intervals that hold the true number, of {len(cells)} | - | " + " | ".join(map(str, inside)) + " |"
        )
        between = [" of ".join(str(sum(cell[when][mark] for cell in cells.values()))
                               for mark in ("true of these", "rows of .5 to .9")) for when in WHEN]  # fmt: skip
        lines += ["| rows with a probability of .5 to .9 that are true | " + " | ".join(between) + " |", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
