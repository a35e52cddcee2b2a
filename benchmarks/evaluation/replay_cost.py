"""What a replay costs, in trainings: by differences of gradients and by second derivatives, for one task and for more.

    python -m benchmarks.evaluation.replay_cost RUN QUERIES --name NAME [--steps 40] [--repeat 3]

The first stored states of a run are a training too, of some `--steps`. It is replayed for the mean loss of all queries,
and for four of them one by one, in turn by each way, with the training's own steps between: a forward and backward pass
of each batch with logits of every token, clipping, and torch's AdamW. Seconds of the processor on one thread, medians
over `--repeat`. The scores by differences are held against those by second derivatives: Pearson over rows, the least of
the queries, and the length of their difference. Written to results/replay_cost.json beside this file, by the run's
name.
"""

import argparse
import json
import os
import resource
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from whence.corpus.tokens import collate, encode
from whence.gradients.exact import sequences_of
from whence.training.replay import replay
from whence.training.replayed_run import ReplayableRun, open_replayable
from whence.training.step_derivatives import Target
from whence.training.step_log import StepLog
from whence.training.update_rules import put

RESULTS = Path(__file__).parent / "results" / "replay_cost.json"
WAYS = {
    "differences": {},
    "second derivatives": {"differences": False},
    "without Hessians": {"hessian": False},
}
SEVERAL = 4


def main() -> None:
    """Time each way in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("queries", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--name", required=True, help="of the run, in the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = open_replayable(options.run)
    log = beginning(run.log, options.steps)
    queries = [encode(json.loads(line), run.model.tokenizer) for line in options.queries.open()]
    asked: dict[str, list[Target]] = {
        "one task": [[sequences_of(query) for query in queries]],
        f"{SEVERAL} queries": [[sequences_of(query)] for query in queries[:SEVERAL]],
    }
    seconds: dict[str, list[float]] = {"training": []}
    scores, load = {}, os.getloadavg()[0]
    for _ in range(options.repeat):
        seconds["training"].append(training(run, log))
        for what, targets in asked.items():
            for way, settings in WAYS.items():
                start = time.process_time()
                scores[what, way] = replay(run.losses, log, targets, progress=False, **settings)
                seconds.setdefault(f"{what}, {way}", []).append(time.process_time() - start)
                print(what, way, seconds[f"{what}, {way}"][-1], flush=True)
    trainings = {
        name: statistics.median(each) / statistics.median(seconds["training"]) for name, each in seconds.items()
    }
    found = {
        "trainings": {name: round(each, 3) for name, each in trainings.items()},
        "each further query": {
            way: round((trainings[f"{SEVERAL} queries, {way}"] - trainings[f"one task, {way}"]) / (SEVERAL - 1), 3)
            for way in WAYS
        },
        "processor seconds": {name: [round(one, 1) for one in each] for name, each in seconds.items()},
        "differences and second derivatives": {what: apart(scores, what) for what in asked},
        "steps": len(log.steps), "rows a step": len(log.steps[0].rows), "load": load, "date": time.strftime("%Y-%m-%d"),
        "largest memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }  # fmt: skip
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(document | {options.name: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def beginning(log: StepLog, steps: int) -> StepLog:
    """The log of a training's first steps, as many as end with a stored state."""
    end = min(number for number in log.stored if number >= min(steps, log.stored[-1]))
    return replace(log, steps=log.steps[:end], stored=tuple(number for number in log.stored if number <= end))


def training(run: ReplayableRun, log: StepLog) -> float:
    """Processor seconds of the same steps, as a Trainer takes them."""
    weights = dict(run.losses.weights)
    settings = {"betas": (log.optimizer.beta1, log.optimizer.beta2), "eps": log.optimizer.eps, "weight_decay": 0.0}
    with run.losses.thawed():
        put(log.state(0).weights, weights)
        optimizer = torch.optim.AdamW(weights.values(), lr=0.0, **settings)
        start = time.process_time()
        for step in log.steps:
            optimizer.param_groups[0]["lr"] = step.rate
            optimizer.zero_grad()
            for rows in step.passes:
                batch = collate([run.losses.rows[row] for row in rows])
                logits = run.model.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
                labels = torch.where(batch.supervised, batch.ids, -100)[:, 1:]
                F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten()).backward()
            if log.optimizer.clip:
                torch.nn.utils.clip_grad_norm_(list(weights.values()), log.optimizer.clip)
            optimizer.step()
        took = time.process_time() - start
        optimizer.zero_grad()
    return took


def apart(scores: dict, what: str) -> dict[str, float]:
    """How far the scores by differences are from the others."""
    found, exact = scores[what, "differences"], scores[what, "second derivatives"].scores
    pearson = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(found.scores, exact, strict=True)]
    length = ((found.scores - exact).norm(dim=1) / exact.norm(dim=1)).max()
    return {"least Pearson": round(min(pearson), 6), "largest difference": round(float(length), 5),
            "products, at the steps looked at": round(found.error, 5)}  # fmt: skip


if __name__ == "__main__":
    main()
