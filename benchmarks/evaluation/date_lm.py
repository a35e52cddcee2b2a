"""DATE-LM's tasks with Whence's methods, and with scores that other tools wrote for them.

    python -m benchmarks.evaluation.date_lm score TASK DATA --model MODEL --methods bm25,exact-cosine -o SCORES
    python -m benchmarks.evaluation.date_lm grade TASK DATA SCORES/*.json [-o results.json]
    python -m benchmarks.evaluation.date_lm select DATA SCORES/bm25.json --count 10000 -o chosen.jsonl

TASK is counterfact, ftrace, toxicity or selection; DATA a directory of train and ref (`date_lm_data` says what is in
them). `score` writes a file a method in DATE-LM's own format, so that its scripts can grade it too; `grade` reads such
files, whoever wrote them; `select` writes the chosen rows, to train on and to grade by `whence evaluate selection`.

    factual attribution   Recall@50 and MRR, means over reference rows, with 95% intervals over them
    toxicity, bias        AUPRC of the unsafe rows in the mean score over reference rows: by the trapezoidal rule, as
                          DATE-LM does, and as average precision, which does not interpolate. There is one ranking a
                          data set, so that there is no interval

Equal scores are ranked in every order at once (DATE-LM takes the order of an unstable sort). Methods see each row as
DATE-LM's models do: with the marks of roles, the answer supervised. A reference row without a relevant row is left out
and counted; DATE-LM's script divides by zero there.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.evaluation.date_lm_data import (
    TASKS,
    Task,
    chat_row,
    chosen,
    read_scores,
    read_task,
    relevant,
    scores_json,
)
from jaxtyping import Bool, Float
from torch import Tensor

from whence.errors import WhenceError
from whence.evaluation.estimates import mean_over_queries, query_draws
from whence.evaluation.method_scores import score_methods
from whence.evaluation.ranking import hits_at, reciprocal_rank
from whence.evaluation.retrieval import rows_view
from whence.numerics import average_precision

DEPTH = 50
SCORES = ".json"


def main(words: list[str] | None = None) -> int:
    """Do one of the three stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    score = stages.add_parser("score", help="write the scores of methods")
    grade = stages.add_parser("grade", help="grade files of scores")
    for stage in (score, grade):
        stage.add_argument("task", choices=TASKS)
        stage.add_argument("data")
    score.add_argument("--model", help="the trained model, or its adapter")
    score.add_argument("--methods", default="bm25")
    score.add_argument("-o", "--out", required=True, help="directory")
    grade.add_argument("scores", nargs="+")
    grade.add_argument("-o", "--out", help=".json")
    select = stages.add_parser("select", help="write the rows that scores choose")
    select.add_argument("data")
    select.add_argument("scores")
    select.add_argument("--count", type=int, required=True)
    select.add_argument("--temperature", type=float, default=0.5)
    select.add_argument("-o", "--out", required=True, help=".jsonl")
    arguments = parser.parse_args(words)
    try:
        {"score": _score, "grade": _grade, "select": _select}[arguments.stage](arguments)
    except WhenceError as error:
        print(f"error {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _score(arguments: argparse.Namespace) -> None:
    task, out = read_task(arguments.task, arguments.data), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, (scores, seconds) in task_scores(task, arguments.methods.split(","), arguments.model).items():
        file = out / f"{name.replace(':', '_').replace('=', '-')}{SCORES}"
        file.write_text(json.dumps(scores_json(task, scores)))
        print(f"{file}: {len(scores):,} x {scores.shape[1]:,} scores in {seconds:.1f} s")


def task_scores(task: Task, methods: list[str], model: str | None) -> dict[str, tuple[Tensor, float]]:
    """Scores of all training rows for each reference row, by method, and the seconds that they took."""
    rows = [chat_row(row, f"train-{number}") for number, row in enumerate(task.train)]
    queries = [chat_row(row, f"ref-{number}") for number, row in enumerate(task.ref)]
    scored = score_methods(methods, queries, rows_view(rows, methods, model))
    return {method.name: (method.scores, method.seconds or 0.0) for method in scored}


def _grade(arguments: argparse.Namespace) -> None:
    task = read_task(arguments.task, arguments.data)
    results = {Path(path).stem: graded(task, read_scores(task, path)) for path in arguments.scores}
    for name, marks in results.items():
        print(f"{task.name}  {name:24} " + "  ".join(f"{key} {_shown(value)}" for key, value in marks.items()))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({"task": task.kind, "data": task.name, "methods": results}, indent=1))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"({value[0]:.4f} to {value[1]:.4f})"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def graded(task: Task, scores: Float[Tensor, "q n"]) -> dict[str, Any]:
    """A task's metrics of one file of scores.

    Raises:
        SystemExit: The task's metric is a training's.
    """
    if task.kind == "selection":
        raise SystemExit("selection is graded by training: choose with `select`, then see `whence evaluate selection`")
    truth = relevant(task)
    if task.kind == "toxicity":
        line = torch.where(scores[0].isfinite(), scores[0], -torch.inf).double()
        return {"auprc": trapezoidal_auprc(line, truth[0]), "average_precision": average_precision(line, truth[0]),
                "unsafe": int(truth.sum()), "rows": truth.shape[1]}  # fmt: skip
    usable = truth.any(1)
    ranked = torch.where(scores.isfinite(), scores, -torch.inf).double()[usable]
    pairs = list(zip(ranked, truth[usable], strict=True))
    recall = torch.tensor([hits_at(line, own, DEPTH) / int(own.sum()) for line, own in pairs], dtype=torch.float64)
    ranks = torch.tensor([reciprocal_rank(line, own) for line, own in pairs], dtype=torch.float64)
    draws, out = query_draws(len(pairs), 0), dict[str, Any]()
    for name, values in ((f"recall@{DEPTH}", recall), ("mrr", ranks)):
        estimate = mean_over_queries(values, draws)
        out |= {name: estimate.value, f"{name}_interval": list(estimate.interval or (float("nan"), float("nan")))}
    return out | {"references": len(pairs), "left_out": int((~usable).sum())}


def trapezoidal_auprc(scores: Float[Tensor, " n"], relevant: Bool[Tensor, " n"]) -> float:
    """Area under precision against recall by the trapezoidal rule, a point a different score, and (0, 1) before them.

    >>> round(trapezoidal_auprc(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True])), 4)
    0.7917
    """
    order = scores.argsort(descending=True, stable=True)
    hits, count = relevant[order].double().cumsum(0), torch.arange(1, len(order) + 1, dtype=torch.float64)
    is_last = torch.cat([scores[order].diff() != 0, torch.tensor([True])])  # of a run of equal scores
    precision = torch.cat([torch.ones(1, dtype=torch.float64), (hits / count)[is_last]])
    recall = torch.cat([torch.zeros(1, dtype=torch.float64), (hits / hits[-1])[is_last]])
    return float(torch.trapezoid(precision, recall))


def _select(arguments: argparse.Namespace) -> None:
    task = read_task("selection", arguments.data)
    scores = read_scores(task, arguments.scores)[0]
    places = chosen(scores.tolist(), arguments.count, arguments.temperature)
    rows = [{**chat_row(task.train[place], f"train-{place}"), "whence_score": float(scores[place])} for place in places]
    out = arguments.out
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{out}: {len(rows):,} of {len(task.train):,} rows. Train on them: whence train MODEL {out} -o RUN")


if __name__ == "__main__":
    sys.exit(main())
