"""The pool and the tasks of `less.py`: which rows may be chosen, what they are chosen for, and what grades the choice.

    pool        12,000 rows: alpaca 5,000, p3 3,000, dolly 2,000, gsm8k_train 2,000, drawn by seed
    gsm8k       16 examples of gsm8k_train that are not in the pool; graded on gsm8k_test
    bbh         27 tasks of 3 examples; graded on rows of the rest
    mmlu        57 subjects of 5 examples (dev); graded on rows of test

Graded rows are drawn by seed, the same for every method, so many of each task that a loss has a narrow interval and
an evaluation takes seconds. No pool row and no task example is among them.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

POOL = {"alpaca": 5000, "p3": 3000, "dolly": 2000, "gsm8k_train": 2000}
TASKS = ("gsm8k", "bbh", "mmlu")
GSM8K_EXAMPLES, BBH_EXAMPLES = 16, 3
GRADED = {"gsm8k": 300, "bbh": 540, "mmlu": 570}

Row = dict[str, str]


@dataclass(frozen=True)
class Data:
    """What a table is made of."""

    pool: list[Row]
    tasks: dict[str, list[Row]]
    """Examples to choose by; `task` names the subtask."""
    graded: dict[str, list[Row]]


def load(data: Path, seed: int) -> Data:
    """Everything, from the shared folder."""
    drawn = random.Random(seed)
    pool: list[Row] = []
    files = {name: rows(data / "instruct" / f"{name}.jsonl") for name in POOL}
    for name, count in POOL.items():
        drawn.shuffle(files[name])
        pool += files[name][:count]
    drawn.shuffle(pool)
    gsm8k = [row | {"task": "gsm8k"} for row in files["gsm8k_train"][POOL["gsm8k_train"] :][:GSM8K_EXAMPLES]]
    bbh, bbh_rest = firsts(rows(data / "tasks" / "bbh.jsonl"), BBH_EXAMPLES, drawn)
    tasks = {"gsm8k": gsm8k, "bbh": bbh, "mmlu": rows(data / "tasks" / "mmlu_dev.jsonl")}
    rest = {
        "gsm8k": rows(data / "instruct" / "gsm8k_test.jsonl"),
        "bbh": bbh_rest,
        "mmlu": rows(data / "tasks" / "mmlu_test.jsonl"),
    }
    return Data(pool, tasks, {task: evenly(found, GRADED[task], drawn) for task, found in rest.items()})


def rows(file: Path) -> list[Row]:
    """Of a jsonl file."""
    with file.open() as lines:  # splitlines() would also split at U+2028, inside a row
        return [json.loads(line) for line in lines]


def firsts(found: list[Row], count: int, drawn: random.Random) -> tuple[list[Row], list[Row]]:
    """So many rows of each task, and the rest."""
    chosen, rest = [], []
    for task in sorted({row["task"] for row in found}):
        of_task = [row for row in found if row["task"] == task]
        drawn.shuffle(of_task)
        chosen += of_task[:count]
        rest += of_task[count:]
    return chosen, rest


def evenly(found: list[Row], count: int, drawn: random.Random) -> list[Row]:
    """So many rows, as many of each task as of the others where it has them."""
    tasks = sorted({row.get("task", "") for row in found})
    each = [[row for row in found if row.get("task", "") == task] for task in tasks]
    for of_task in each:
        drawn.shuffle(of_task)
    mixed = [of_task[place] for place in range(max(map(len, each))) for of_task in each if place < len(of_task)]
    return mixed[:count]
