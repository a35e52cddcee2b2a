"""bergson's MAGIC beside replay: the same training step by step, the same queries, the same bank.

    python -m benchmarks.evaluation.magic RUN QUERIES --python PYTHON [--bank BANK] [--work DIR] [--queries 5]

RUN is one of `whence train --replayable`; PYTHON is that of an environment with bergson 2.5.1. `bergson magic` makes
the training itself, from RUN's parent, with RUN's rows in RUN's order (`magic_worker.py`), in its batches (a short one
is filled up with rows without a label), by its rates, betas, eps, decay and clipping. Then both score every row for the
first N queries, each in a process of its own with one thread. Written to benchmarks/evaluation/results/magic.json:

    agreement   Pearson and Spearman correlation of both tools' scores over rows, by query, and of their lengths
    lds         both against BANK, for the same queries, with intervals
    cost        seconds of the processor and on the clock (bergson's with its training; replay's training stands beside
                it), largest memory

A stage whose result is in DIR is not done again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from benchmarks.indexing.speed import machine

from whence.corpus.reading import open_corpus
from whence.corpus.tokens import Encoded, encode
from whence.evaluation.bank_scores import evaluate_lds
from whence.evaluation.bank_store import Bank, Member, open_bank
from whence.gradients.exact import sequences_of
from whence.numerics import spearman
from whence.training.repetition import read_recipe
from whence.training.replay import replay
from whence.training.replayed_run import ReplayableRun, open_replayable

RESULTS = Path(__file__).parent / "results" / "magic.json"
SEED = 42
EPS_ROOT = 1e-17
"""bergson's default. With 0, as torch has it, its scores are all NaN: the root of a moment of 0 has no slope."""


def main() -> None:
    """Score by both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("rows_asked", metavar="queries", type=Path)
    parser.add_argument("--python", required=True, help="of an environment with bergson")
    parser.add_argument("--bank", help="a bank of RUN with these queries")
    parser.add_argument("--work", type=Path, default=Path("/tmp/magic"))
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument("--save-mode", default="sqrt", choices=["all", "sqrt", "log"], help="bergson's checkpoints")
    parser.add_argument("--name", default="bank", help="of the results in the file")
    parser.add_argument("--stage", choices=["replay"], help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.stage == "replay":
        score_by_replay(options)
        return
    costs = {tool: costs_of(options, tool) for tool in ("replay", "bergson")}
    scores = {tool: np.load(options.work / f"{tool}.npy")[: options.queries] for tool in costs}
    found: dict[str, Any] = {
        "machine": machine(), "versions": json.loads((options.work / "versions.json").read_text()),
        "date": time.strftime("%Y-%m-%d"), "run": str(options.run), "save_mode": options.save_mode, "cost": costs,
        "agreement": agreement(scores["replay"], scores["bergson"]),
    }  # fmt: skip
    if options.bank:
        found["lds"] = against_bank(options, scores)
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(document | {options.name: found}, indent=1) + "\n")
    print(json.dumps({name: found[name] for name in ("cost", "agreement", "lds") if name in found}, indent=1))


def costs_of(options: argparse.Namespace, tool: str) -> dict[str, float]:
    """Score by a tool unless it is done; what it took."""
    file = options.work / f"{tool}.cost.json"
    if not file.exists():
        (score_by_bergson if tool == "bergson" else run_replay)(options, file)
    return json.loads(file.read_text())


def run_replay(options: argparse.Namespace, file: Path) -> None:
    """Replay in a process of its own."""
    words = [str(options.run), str(options.rows_asked), "--python", options.python, "--work", str(options.work)]
    measured([sys.executable, "-m", "benchmarks.evaluation.magic", *words, "--queries", str(options.queries),
              "--stage", "replay"], options.work / "replay.txt", file)  # fmt: skip


def score_by_replay(options: argparse.Namespace) -> None:
    """Every row's score for every query."""
    opened = open_replayable(options.run)
    found = replay(opened.losses, opened.log, [[sequences_of(query)] for query in asked(options, opened)])
    np.save(options.work / "replay.npy", found.scores.numpy())


def score_by_bergson(options: argparse.Namespace, file: Path) -> None:
    """The same by `bergson magic`: derivatives of the loss, so with the other sign."""
    opened = open_replayable(options.run)
    log, work = opened.log, options.work
    if any(len(step.passes) > 1 for step in log.steps):
        raise SystemExit(f"{options.run}: several passes a step; this benchmark takes runs without accumulation")
    batch, count = max(len(step.rows) for step in log.steps), len(opened.losses.rows)
    blank = {"input_ids": opened.losses.rows[0].ids[:2], "labels": [-100, -100]}
    rows = [labelled(row) for row in opened.losses.rows] + [blank]
    order = {"rows": rows, "queries": [labelled(row) for row in asked(options, opened)], "seed": SEED,
             "sequence": [row for step in log.steps for row in (step.rows + [count] * batch)[:batch]]}  # fmt: skip
    (work / "order.json").write_text(json.dumps(order))
    subprocess.run([options.python, str(Path(__file__).with_name("magic_worker.py")), str(work)], check=True)
    recipe, optimizer, settings = read_recipe(options.run), log.optimizer, opened.settings
    if any(optimizer.decays.values()):
        raise SystemExit(f"{options.run}: this benchmark takes runs without weight decay")
    flags: dict[str, object] = {
        "model": recipe["model"], "precision": "fp32", "batch_size": batch, "num_epochs": 1, "seed": SEED,
        "data.dataset": work / "train", "query.dataset": work / "queries", "aggregation": "none",
        "adam_beta1": optimizer.beta1, "adam_beta2": optimizer.beta2, "adam_eps": optimizer.eps, "eps_root": EPS_ROOT,
        "weight_decay": 0.0, "lr": settings.lr, "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup, "save_mode": options.save_mode, "save_models": True,
    }  # fmt: skip
    flags |= {"max_grad_norm": optimizer.clip} if optimizer.clip else {}
    words = [options.python, "-m", "bergson", "magic", str(work / "bergson"), "--overwrite", "true",
             *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]  # fmt: skip
    if not (work / "bergson.measured.json").exists():
        measured(words, work / "bergson.txt", work / "bergson.measured.json")
    parts = [torch.load(work / "bergson" / "per_query" / f"q{k}.pt", weights_only=True) for k in range(options.queries)]
    laid = torch.tensor(json.loads((work / "laid.json").read_text()))
    by_row = torch.zeros(len(parts), count + 1, dtype=torch.float64)  # the last: of blank rows
    by_row.index_add_(1, laid, torch.stack(parts)[:, : len(laid)].double())
    np.save(work / "bergson.npy", -by_row[:, :count].numpy())
    wanted = [options.python, "-c", "import importlib.metadata as m; print(m.version('bergson'), m.version('torch'))"]
    bergson, torch_version = subprocess.run(wanted, check=True, capture_output=True, text=True).stdout.split()
    versions = {"bergson": bergson, "its torch": torch_version, "torch": version("torch")}
    (work / "versions.json").write_text(json.dumps(versions))
    weights = relative_difference(work / "bergson" / "retrained" / "base", opened)
    cost = json.loads((work / "bergson.measured.json").read_text())
    file.write_text(json.dumps(cost | {"its weights less ours, relative to what these moved": weights}))


def asked(options: argparse.Namespace, opened: ReplayableRun) -> list[Encoded]:
    """The queries."""
    rows = [example.row for example in open_corpus(str(options.rows_asked))]
    return [encode(row, opened.model.tokenizer) for row in rows[: options.queries]]


def labelled(row: Encoded) -> dict[str, list[int]]:
    """A row as bergson takes it."""
    labels = [one if counts else -100 for one, counts in zip(row.ids, row.supervised, strict=True)]
    return {"input_ids": list(row.ids), "labels": labels}


def measured(words: list[str], log: Path, file: Path) -> None:
    """Run a command in one thread; write down what it took."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as out:
        subprocess.run(words, check=True, stdout=out, stderr=subprocess.STDOUT,
                       env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    file.write_text(json.dumps({"seconds": time.perf_counter() - start, "processor seconds": cpu,
                                "largest memory, GB": after.ru_maxrss / 1e6}))  # fmt: skip


def relative_difference(model: Path, opened: ReplayableRun) -> float:
    """How far the weights of a model are from those that a run ended with, by the length of what these moved."""
    from transformers import AutoModelForCausalLM

    other = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
    first, last = opened.log.state(0).weights, opened.log.state(len(opened.log.steps)).weights
    apart = sum(float((other[name].detach() - weight).square().sum()) for name, weight in last.items())
    moved = sum(float((first[name] - weight).square().sum()) for name, weight in last.items())
    return (apart / moved) ** 0.5


def agreement(ours: np.ndarray, theirs: np.ndarray) -> list[dict[str, float]]:
    """Of scores [q n] of two tools."""
    return [{"pearson": float(np.corrcoef(a, b)[0, 1]),
             "spearman": spearman(torch.tensor(a), torch.tensor(b)),
             "their length over ours": float(np.linalg.norm(b) / np.linalg.norm(a))}
            for a, b in zip(ours, theirs, strict=True)]  # fmt: skip


def against_bank(options: argparse.Namespace, scores: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Both tools' LDS, over the same queries."""
    return against_scores(open_bank(options.bank), open_replayable(options.run).ids, scores, options.work)


def of_first_queries(bank: Bank, count: int) -> Bank:
    """A bank as if it had been asked so many of its queries alone."""

    def cut(member: Member) -> Member:
        return replace(member, losses=member.losses[:count])

    members = tuple(cut(member) for member in bank.members)
    return replace(bank, queries=bank.queries[:count], full=cut(bank.full), parent=cut(bank.parent), members=members)


def against_scores(bank: Bank, ids: Sequence[str], scores: dict[str, np.ndarray], work: Path) -> list[dict[str, Any]]:
    """The LDS of tools' scores [q n] for the first queries of a bank."""
    bank, files = of_first_queries(bank, len(next(iter(scores.values())))), {}
    for tool, matrix in scores.items():
        columns = {"query": [name for name in bank.query_ids[: len(matrix)] for _ in ids],
                   "id": list(ids) * len(matrix), "score": matrix.ravel().tolist()}  # fmt: skip
        files[tool] = str(work / f"{tool}.parquet")
        pyarrow.parquet.write_table(pyarrow.table(columns), files[tool])
    return evaluate_lds(bank, [], scores=files, progress=False).rows()


if __name__ == "__main__":
    main()
