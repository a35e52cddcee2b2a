"""Shares of four sources in what a model was trained on: estimated from its weights, against what they were.

A model is fine-tuned on 600 rows of a known mixture; the candidates are 500 rows of each source, among them those that
were trained on. Token counts differ by source, so that shares of rows and of tokens are different things. Estimated in
both ways, `runs` by the recipe that a shadow guesses, as `whence recover` does it.
"""

import argparse
import json
import random
import time
from pathlib import Path

from whence.corpus.reading import open_corpus
from whence.indexing.ingest import fingerprint_of
from whence.recovery.case import open_case
from whence.recovery.points import gather_evidence
from whence.recovery.settings import RecoverSettings
from whence.recovery.shadow_calibration import build_calibration_set
from whence.recovery.shares import mixture_of, shares_of_sources
from whence.storage import Place
from whence.training.trainer import train

FILES = {"alpaca": "instruct/alpaca", "dolly": "instruct/dolly", "gsm8k": "instruct/gsm8k_train", "p3": "instruct/p3"}
SHARES = (0.5, 0.25, 0.15, 0.1)
TRAINED, EACH, LONGEST = 600, 500, 128
KINDS = {"sgd": {"optimizer": "sgd", "lr": 0.05}, "adamw": {"optimizer": "adamw", "lr": 3e-4}}


def run(options: argparse.Namespace, keep, kept: dict[str, object]) -> None:
    """All cells that have no result yet."""
    for seed in options.seeds:
        for kind in options.kinds:
            name = f"{kind}, seed {seed}"
            if kind in KINDS and name not in kept:
                found = measured(options, kind, seed)
                keep(name, found)
                print(name, json.dumps(found), flush=True)


def drawn_rows(options: argparse.Namespace, seed: int) -> tuple[dict[str, float], list[dict], list[dict]]:
    """Shares by source, the rows trained on, all candidates."""
    rng = random.Random(f"mixture {seed}")
    shares = dict(zip(rng.sample(list(FILES), len(FILES)), SHARES, strict=True))
    trained, pool = [], []
    for source, share in shares.items():
        lines = (options.data / f"{FILES[source]}.jsonl").read_text().strip().split("\n")
        rows = [json.loads(line) | {"source": source} for line in rng.sample(lines, EACH)]
        rows = [{name: value for name, value in row.items() if name != "id"} for row in rows]
        trained += rows[: round(share * TRAINED)]
        pool += rows
    rng.shuffle(pool)
    return shares, trained, [row | {"id": f"row-{number}"} for number, row in enumerate(pool)]


def measured(options: argparse.Namespace, kind: str, seed: int) -> dict[str, object]:
    """The estimate beside the truth."""
    shares, trained, pool = drawn_rows(options, seed)
    base, work = str(Path(options.model).resolve()), options.work / f"mixture-{kind}-{seed}"
    model = train(base, trained, work / "run", epochs=2, batch_size=16, max_tokens=LONGEST, checkpoints=1, seed=seed,
                  progress=False, **KINDS[kind])  # fmt: skip
    case, corpus = open_case(base, str(model), RecoverSettings(max_tokens=LONGEST, seed=seed)), open_corpus(pool)
    seen = gather_evidence(case, corpus, Place.at(work / "evidence"), fingerprint_of(corpus), progress=False)
    sources = [row["source"] for row in pool]
    numbers, tokens = {json.dumps(row, sort_keys=True) for row in trained}, dict.fromkeys(shares, 0)
    for row, count in zip(pool, seen.points["final"].tokens.tolist(), strict=True):
        own = {name: value for name, value in row.items() if name != "id"}
        tokens[row["source"]] += count * (json.dumps(own, sort_keys=True) in numbers)
    told = {"rows": shares, "tokens": {name: count / sum(tokens.values()) for name, count in tokens.items()},
            "by gradients": mixture_of(seen, sources, seed=seed)}  # fmt: skip
    settings = RecoverSettings(max_tokens=LONGEST, seed=seed + 10)
    calibration_set = build_calibration_set(case, corpus, settings, work, count=TRAINED, rows=len(pool))
    start = time.perf_counter()
    found = shares_of_sources(case, corpus, seen, sources, calibration_set.shadow.recipe, work / "sources", how="runs",
                              count=TRAINED, seed=seed, progress=False)  # fmt: skip
    optimizer = calibration_set.shadow.recipe.optimizer
    return told | {"by runs": found, "seconds": time.perf_counter() - start, "optimizer": optimizer}
