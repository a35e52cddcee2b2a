"""Rows of alpaca that a model was fine-tuned on, planted among others of the same kind: who finds them?

One set of candidates; for every kind of training and seed other members, another rate, another order. Rates are drawn,
so that the shadow's first guess is no better than a stranger's. theta_0 is the same for all, so that one pass over the
candidates takes the inner products with all full models' differences, and one with all adapters'.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whence.corpus.reading import Corpus, open_corpus
from whence.indexing.ingest import fingerprint_of
from whence.models.loading import load_model
from whence.numerics import auroc
from whence.recovery.adapters import adapter_start, gather_adapters
from whence.recovery.case import ADAPTER_LAYERS, Case, at_point, open_case
from whence.recovery.evidence import PointEvidence, gather_point
from whence.recovery.membership import features
from whence.recovery.pipeline import p_values_of
from whence.recovery.points import DIFFERENCE, gather_evidence
from whence.recovery.scores import SCORES, method_scores
from whence.recovery.settings import RecoverSettings
from whence.recovery.shadow_calibration import CalibrationSet, build_calibration_set, calibrate_on_shadow
from whence.storage import Place
from whence.training.trainer import train

KINDS = {
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "adamw": {"optimizer": "adamw", "lr": 3e-4},
    "sgd-lora": {"optimizer": "sgd", "lr": 0.5, "lora_rank": 8},
    "adamw-lora": {"optimizer": "adamw", "lr": 3e-3, "lora_rank": 8},
}
"""How the models are trained, which the shadow has to guess: optimizer and rate, here the middle of what is drawn."""
LONGEST = 128
EPOCHS, BATCH = 2, 16


@dataclass(frozen=True)
class Cell:
    """A model, and its shadow."""

    name: str
    work: Path
    is_member: Tensor
    case: Case
    calibration_set: CalibrationSet
    settings: RecoverSettings


def run(options: argparse.Namespace, keep, kept: dict[str, object]) -> None:
    """All cells that have no result yet."""
    lines = (options.data / "instruct" / "alpaca.jsonl").read_text().strip().split("\n")
    drawn = random.Random("planted").sample(lines, options.rows)
    rows = [json.loads(line) | {"id": f"row-{number}"} for number, line in enumerate(drawn)]
    corpus = open_corpus(rows)
    todo = [(seed, kind) for seed in options.seeds for kind in options.kinds if f"{kind}, seed {seed}" not in kept]
    cells = [trained(options, rows, corpus, kind, seed) for seed, kind in todo]
    bases = {lora: at_base(options, corpus, [cell for cell in cells if bool(cell.case.lora) is lora])
             for lora in (False, True)}  # fmt: skip
    for cell in cells:
        found = measured(options, corpus, cell, bases[bool(cell.case.lora)])
        keep(cell.name, found)
        told = {name: round(marks["precision"], 3) for name, marks in found["methods"].items()}
        print(cell.name, told, found["guessed"], flush=True)


def trained(options: argparse.Namespace, rows: list[dict], corpus: Corpus, kind: str, seed: int) -> Cell:
    """The model in question and its shadow, which is told the number of rows and of epochs."""
    drawn, recipe = random.Random(f"planted {kind} {seed}"), dict(KINDS[kind])
    members = sorted(drawn.sample(range(options.rows), options.planted))
    recipe["lr"] = float(f"{recipe['lr'] * 2 ** drawn.uniform(-1, 1):.3g}")
    is_member = torch.zeros(options.rows, dtype=torch.bool)
    is_member[members] = True
    work = options.work / f"planted-{options.planted}-of-{options.rows}" / f"{kind}-{seed}"
    base = str(Path(options.model).resolve())
    part = [rows[number] for number in members]
    model = train(base, part, work / "run", epochs=EPOCHS, batch_size=BATCH, max_tokens=LONGEST, checkpoints=1,
                  seed=seed + 100, progress=False, **recipe)  # fmt: skip
    settings = RecoverSettings(max_tokens=LONGEST, epochs=EPOCHS, batch_size=BATCH, seed=seed)
    case = open_case(base, str(model), settings)
    calibration_set = build_calibration_set(case, corpus, settings, work, count=options.planted, rows=options.rows)
    shadow = calibration_set.shadow
    told = (recipe, shadow.recipe.optimizer, shadow.recipe.lr, round(shadow.norm, 3))
    print(f"{kind}, seed {seed}: trained with {told[0]}; guessed {told[1:]}", flush=True)
    return Cell(f"{kind}, seed {seed}", work, is_member, case, calibration_set, settings)


def at_base(options: argparse.Namespace, corpus: Corpus, cells: list[Cell]) -> PointEvidence | None:
    """Evidence at theta_0 against all models and shadows at once."""
    if not cells:
        return None
    names = {f"{cell.name}, {part}": case for cell in cells
             for part, case in (("model", cell.case), ("shadow", cell.calibration_set.case))}  # fmt: skip
    work = Place.at(options.work / f"planted-{options.planted}-of-{options.rows}" / "-".join(
        ["base", *(cell.name.replace(", seed ", "") for cell in cells)]))  # fmt: skip
    settings = cells[0].case.settings
    if cells[0].case.lora:
        starts = {}
        for name, case in names.items():
            with at_point(case, 1.0) as model:
                start = adapter_start(model, case.direction(model, model.layers(settings.space.layers)))
                assert start is not None
                starts[name] = start
        base = load_model(cells[0].case.base, dtype="float32")
        return gather_adapters(base, corpus, starts, rows=options.rows, work=work, settings=settings, provenance={})
    with at_point(cells[0].case, 0.0) as model:
        layers = model.layers(None)
        targets = {name: case.direction(model, layers) for name, case in names.items()}
        return gather_point(
            model, corpus, targets, rows=options.rows, work=work, settings=settings, provenance={}, sketched=False
        )


def measured(options: argparse.Namespace, corpus: Corpus, cell: Cell, bases: PointEvidence | None) -> dict[str, object]:
    """Every method's marks."""
    start, everything = time.perf_counter(), torch.arange(options.rows)

    def known(part: str) -> PointEvidence | None:
        return None if bases is None else bases.subset(everything, {DIFFERENCE: f"{cell.name}, {part}"})

    seen = gather_evidence(cell.case, corpus, Place.at(cell.work / "evidence"), fingerprint_of(corpus),
                           base=known("model"), progress=False)  # fmt: skip
    looked = time.perf_counter() - start
    found = {name: marks(method_scores(seen, name, count=options.planted, seed=cell.settings.seed), cell.is_member)
             for name in SCORES}  # fmt: skip
    start = time.perf_counter()
    learned = calibrate_on_shadow(
        cell.calibration_set, cell.settings, Place.at(cell.work), base=known("shadow"), progress=False
    )
    table = features(seen)
    odds = learned.calibration.log_odds(table, share=options.planted / options.rows)
    p_values = p_values_of(learned.calibration.log_odds(table).float(), learned.others)
    found["calibrated"] = marks(odds.float(), cell.is_member)
    recipe = learned.shadow.recipe
    return {
        "methods": found,
        "norm": cell.case.difference.norm(),
        "guessed": {"optimizer": recipe.optimizer, "lr": recipe.lr, "norm": learned.shadow.norm},
        "weights": dict(zip(learned.calibration.names, learned.calibration.weights.tolist(), strict=True)),
        "expected members": float(odds.sigmoid().sum()),
        "others with p at most 0.01": float((p_values[~cell.is_member] <= 0.01).float().mean()),
        "seconds": {"evidence": looked, "shadow": time.perf_counter() - start},
        "layers": ADAPTER_LAYERS if cell.case.lora else "linear layers of the blocks",
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
