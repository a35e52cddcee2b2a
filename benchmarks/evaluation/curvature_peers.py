"""EK-FAC by kronfluence and bergson, TRAK by dattri, beside ours: the same model, rows, queries and bank.

    python -m benchmarks.evaluation.curvature_peers INDEX QUERIES [--kronfluence PYTHON] [--bergson PYTHON]
        [--dattri PYTHON] [--bank BANK] [--work DIR] [--queries 20] [--batch 16]

A PYTHON is that of an environment with kronfluence 1.0.1, whose public functions do the work (`kronfluence_worker.py`),
or with bergson 2.5.1, whose public command does (`bergson_worker.py`), in batches of rows of like length; ours are
those of the index. All take labels drawn from the model, a damping of a tenth of a layer's mean eigenvalue, and the
layers of INDEX, and measure all of its rows; once more ours measures as many as `whence curvature` does unless told.
With dattri 0.3.0 (`dattri_worker.py`) it is TRAK, beside ours by an index made anew, and what dattri's EK-FAC says.
Each tool in a process of its own, on one thread. Written to benchmarks/evaluation/results/curvature_peers.json:

    agreement   Pearson and Spearman correlation of each tool's scores with ours of the method over rows, by query
    lds         all against BANK, for the same queries, with intervals
    cost        seconds of the processor for factors and for scores (bergson's: for all), and of one pass forward and
                backward over all rows; largest memory of each process

A stage whose result is in DIR is not done again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.evaluation.magic import against_scores, agreement, labelled
from benchmarks.indexing.speed import machine

from whence.corpus.tokens import Encoded, encode
from whence.evaluation.bank_store import open_bank
from whence.gradients.capture import backward
from whence.gradients.exact import batches
from whence.indexing.build import index
from whence.indexing.memory import peak_resident
from whence.indexing.opening import Index, open_index
from whence.second_order.pipeline import curvature
from whence.selection.protocols import QueryText, Target
from whence.selection.scorers.ekfac import EKFAC
from whence.selection.scorers.second_moment import TRAK
from whence.selection.views import IndexView

RESULTS = Path(__file__).parent / "results" / "curvature_peers.json"
PEERS = ("kronfluence", "bergson", "dattri")
TRAK_HERE, SAMPLED = "whence trak", "whence, some rows"


def main() -> None:
    """Score by both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("rows_asked", metavar="queries", type=Path)
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"of an environment with {peer}")
    parser.add_argument("--bank", help="a bank with these queries, of the rows of the index")
    parser.add_argument("--work", type=Path, default=Path("/tmp/curvature-peers"))
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="rows of kronfluence's passes")
    parser.add_argument("--name", default="bank", help="of the results in the file")
    parser.add_argument("--stage", choices=[*STAGES], help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.stage:
        STAGES[options.stage](options)
        return
    write_order(options)
    here = ["--work", str(options.work), "--queries", str(options.queries)]
    ours = [sys.executable, "-m", "benchmarks.evaluation.curvature_peers", options.index, str(options.rows_asked)]
    cost = {"whence": measured(options, "whence", [*ours, *here, "--stage", "whence"])}
    cost[SAMPLED] = measured(options, SAMPLED, [*ours, *here, "--stage", SAMPLED])
    if options.dattri:
        cost[TRAK_HERE] = measured(options, TRAK_HERE, [*ours, *here, "--stage", TRAK_HERE])
    for peer in PEERS:
        if python := getattr(options, peer):
            worker = str(Path(__file__).with_name(f"{peer}_worker.py"))
            cost[peer] = measured(options, peer, [python, worker, str(options.work)])
    scores = {tool: np.load(options.work / f"{tool}.npy") for tool in cost}
    found: dict[str, Any] = {
        "machine": machine(), "date": time.strftime("%Y-%m-%d"), "queries": options.queries,
        "rows": scores["whence"].shape[1], "cost": cost,
        "agreement": {peer: agreement(scores[TRAK_HERE if peer == "dattri" else "whence"], scores[peer])
                      for peer in (SAMPLED, *PEERS) if peer in scores},
    }  # fmt: skip
    if options.bank:
        bank = open_bank(options.bank)
        found["lds"] = against_scores(bank, bank.row_ids, scores, options.work)
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(document | {options.name: found}, indent=1) + "\n")
    print(json.dumps({name: found[name] for name in ("cost", "agreement", "lds") if name in found}, indent=1))


def asked(options: argparse.Namespace, opened: Index) -> list[Encoded]:
    """The first queries."""
    rows = [json.loads(line) for line in options.rows_asked.open()][: options.queries]
    return [encode(row, opened.model().tokenizer) for row in rows]


def write_order(options: argparse.Namespace) -> None:
    """What the peers read, as token ids."""
    opened = open_index(options.index, device="cpu")
    rows, model = list(IndexView(opened).encoded()), opened.model()
    order = {"model": str(model.path), "layers": list(opened.layers(model)), "batch": options.batch,
             "damping": None, "rows": [labelled(row) for row in rows],
             "queries": [labelled(row) for row in asked(options, opened)]}  # fmt: skip
    (options.work / "order.json").write_text(json.dumps(order))


def score_all(options: argparse.Namespace) -> None:
    """Curvature of all rows."""
    score(options, "whence", sys.maxsize)


def score_sampled(options: argparse.Namespace) -> None:
    """Curvature of the rows that it needs."""
    score(options, SAMPLED, None)


def score(options: argparse.Namespace, tool: str, most: int | None) -> None:
    """Our factors and scores, and a plain pass over all rows to hold all tools to."""
    opened = open_index(options.index, device="cpu")
    view, model = IndexView(opened), opened.model()
    layers, rows = opened.layers(model), list(view.encoded())
    start = time.process_time()
    for _, batch in batches(rows, opened.tokens_per_batch):
        backward(model, layers, batch, lambda captured: None, whole=True)
    one_pass, start = time.process_time() - start, time.process_time()
    store = curvature(opened, options.work / f"curvature {tool}", rows=most, restart=True, progress=False)
    factors, start = time.process_time() - start, time.process_time()
    found = EKFAC(curvature=store.place.root)(view, targets(options, opened))
    scores = time.process_time() - start
    np.save(options.work / f"{tool}.npy", found.numpy())
    result = {"one pass": one_pass, "factors": factors, "scores": scores, "memory": peak_resident(),
              "measured rows": store.measured.rows}  # fmt: skip
    (options.work / f"{tool}.json").write_text(json.dumps(result))


def score_trak(options: argparse.Namespace) -> None:
    """TRAK by the default index, whose making counts among the factors."""
    given = open_index(options.index, device="cpu")
    start = time.process_time()
    rows = [json.loads(each["row"]) for each in given.store.read_rows(range(given.store.rows))]
    made = index(given.model().path, rows, options.work / "index", progress=False)
    factors, start = time.process_time() - start, time.process_time()
    found = TRAK()(IndexView(made), targets(options, made))
    result = {"factors": factors, "scores": time.process_time() - start, "memory": peak_resident()}
    np.save(options.work / f"{TRAK_HERE}.npy", found.numpy())
    (options.work / f"{TRAK_HERE}.json").write_text(json.dumps(result))


def targets(options: argparse.Namespace, opened: Index) -> list[Target]:
    """A target for each query."""
    return [Target(str(number), [QueryText("", "", query)]) for number, query in enumerate(asked(options, opened))]


STAGES = {"whence": score_all, SAMPLED: score_sampled, TRAK_HERE: score_trak}


def measured(options: argparse.Namespace, tool: str, command: list[str]) -> dict[str, float]:
    """Run a tool unless it is done; its own seconds, and the largest memory of its process."""
    cost = options.work / f"{tool}.cost.json"
    if not cost.exists():
        start = time.perf_counter()
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
        own = json.loads((options.work / f"{tool}.json").read_text())
        cost.write_text(json.dumps(own | {"clock": time.perf_counter() - start}))
    return json.loads(cost.read_text())


if __name__ == "__main__":
    main()
