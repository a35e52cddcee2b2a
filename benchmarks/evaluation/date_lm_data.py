"""DATE-LM's data and scores as files, and who is relevant to what.

A task is a data set of two splits, `train` and `ref`, whose rows have `prompt` and `response`. What is to be found
among the training rows for a reference row is told by further columns:

    counterfact   training rows with the reference row's `counterfactual_entity` and `true_entity`
    ftrace        training rows among whose `facts` is the first of the reference row's
    toxicity      training rows whose `type` is "Unsafe", whatever the reference row: homogeneous and heterogeneous
                  settings are two data sets of this form (names end in -Hom and -Het)
    selection     nothing: a choice is judged by training on it

Scores are JSON: a list of one list a reference row for the first two, in the order of `ref`, each with a number a
training row, in the order of `train`; for toxicity a list with a number a training row, the mean over reference rows;
for selection a list, or a .npy of float32, one number a training row. Larger ranks higher.

Read here from a directory that holds train and ref as .jsonl, .csv or .parquet, as `datasets` saves them.

Source: https://github.com/DataAttributionEval/DATE-LM at commit 95c9a6db8edd4e450b3e9fe018413bbc4f50bb45:
Applications.md, finetune_data_selection.md, datamodules/load_data.py, methods/dattri.py, methods/select_data.py,
evaluation/evaluate_application.py (read for formats and definitions alone; Jiao et al. 2025,
https://arxiv.org/abs/2507.09424). The data sets themselves are on the Hub and were not read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from whence.corpus.reading import rows_with_place
from whence.errors import CorpusError, SettingError

TASKS = ("counterfact", "ftrace", "toxicity", "selection")
ENDINGS = (".parquet", ".jsonl", ".csv")
UNSAFE = "Unsafe"


@dataclass(frozen=True)
class Task:
    """One data set of one task."""

    kind: str
    """One of `TASKS`; a selection needs no reference rows."""
    name: str
    train: list[dict[str, Any]]
    ref: list[dict[str, Any]]


def read_task(kind: str, directory: str | Path) -> Task:
    """Read train and ref of a task.

    Raises:
        SettingError: No such task, or the directory lacks a split.
        CorpusError: A row lacks a column.
    """
    if kind not in TASKS:
        raise SettingError(f"{kind}: no task of DATE-LM; there are {', '.join(TASKS)}")
    train = _split(Path(directory), "train")
    ref = [] if kind == "selection" else _split(Path(directory), "ref")
    needed = {"counterfact": ("counterfactual_entity", "true_entity"), "ftrace": ("facts",)}.get(kind, ())
    for name, rows in (("train", train), ("ref", ref)):
        columns = ("prompt", "response", *needed, *(("type",) if kind == "toxicity" and name == "train" else ()))
        for number, row in enumerate(rows):
            if lacking := [column for column in columns if row.get(column) is None]:
                raise CorpusError(f"{directory}: row {number} of {name} lacks {', '.join(lacking)}")
    return Task(kind, Path(directory).name, train, ref)


def _split(directory: Path, name: str) -> list[dict[str, Any]]:
    file = next((directory / f"{name}{ending}" for ending in ENDINGS if (directory / f"{name}{ending}").exists()), None)
    if file is None:
        raise SettingError(f"{directory}: no {name}.parquet, {name}.jsonl or {name}.csv")
    return [row for _, row in rows_with_place(str(file))]


def relevant(task: Task) -> Bool[Tensor, "q n"]:
    """Which training rows are to be found for each reference row; for toxicity one line, of all."""
    if task.kind == "toxicity":
        return torch.tensor([[row["type"] == UNSAFE for row in task.train]])
    if task.kind == "ftrace":
        facts = [_facts(row) for row in task.train]
        return torch.tensor([[bool(wanted := _facts(row)) and wanted[0] in of_row for of_row in facts]
                             for row in task.ref])  # fmt: skip
    keys = [(row["counterfactual_entity"], row["true_entity"]) for row in task.train]
    return torch.tensor([[key == (row["counterfactual_entity"], row["true_entity"]) for key in keys]
                         for row in task.ref])  # fmt: skip


def _facts(row: dict[str, Any]) -> list[str]:
    facts = row["facts"]
    return json.loads(facts) if isinstance(facts, str) and facts.startswith("[") else list(facts)


def read_scores(task: Task, path: str | Path) -> Float32[Tensor, "q n"]:
    """Scores in the task's format; one line for toxicity and selection.

    Raises:
        SettingError: They cannot be read, or are of other rows.
    """
    try:
        if Path(path).suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = np.array(json.loads(Path(path).read_text()), dtype=np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise SettingError(f"{path}: scores cannot be read ({' '.join(str(error).split())[:120]})") from None
    expected = (len(task.train),) if task.kind in ("toxicity", "selection") else (len(task.ref), len(task.train))
    if values.shape != expected:
        shapes = " x ".join(map(str, values.shape)), " x ".join(map(str, expected))
        raise SettingError(f"{path}: {shapes[0]} scores, where {shapes[1]} are expected for {task.kind}")
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, len(task.train))


def scores_json(task: Task, scores: Float32[Tensor, "q n"]) -> list[Any]:
    """Scores of every training row for every reference row, as the task's file has them."""
    if task.kind in ("toxicity", "selection"):
        return scores.double().mean(0).tolist()
    return scores.tolist()


def chat_row(row: dict[str, Any], place: str) -> dict[str, Any]:
    """A row with the marks of roles that DATE-LM's models were trained with; the answer alone is supervised."""
    prompt = f"<|user|>\n{str(row['prompt']).strip()}\n<|assistant|>\n"
    return {"id": place, "prompt": prompt, "completion": str(row["response"]).strip()}


def chosen(scores: Sequence[float], count: int, temperature: float, seed: int = 42) -> list[int]:
    """Places of the rows that a selection takes: the highest of (z-score / temperature + Gumbel noise), ascending.

    At temperature 0 there is no noise. DATE-LM's own choice is at 0.5, with seed 42.

    >>> chosen([1.0, 3.0, 2.0], 2, 0.0)
    [1, 2]
    """
    values = np.asarray(scores, dtype=np.float64)
    if not 0 < count <= len(values):
        raise SettingError(f"--count {count}: from 1 to {len(values):,}, the rows to choose from, is expected")
    if temperature > 0:
        spread = values.std()
        values = (values - values.mean()) / (spread if spread > 0 else 1.0) / temperature
        values = values + np.random.default_rng(seed).gumbel(size=len(values))
    return sorted(np.argsort(-values, kind="stable")[:count].tolist())
