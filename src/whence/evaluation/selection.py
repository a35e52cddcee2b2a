"""Evaluate a selection by training: every method's choice trains a model, and held-out rows grade it.

Every method of `select` chooses from one corpus under one budget of tokens, a model is trained on each choice for the
same number of steps, and graded on rows that no method saw. Beside the methods stand a random choice, the whole corpus,
and the untrained model: a method that does not beat the random choice is of no use.

Lower loss is better. A cell (`cells`) is one training's marks on one task; it is not computed again, so that an
evaluation that was stopped goes on. Intervals are of the difference from random
selection: seeds and graded rows are drawn anew, so that they hold for other trainings and other rows of the same task.

Source: the protocol is that of LESS (Xia et al. 2024, https://arxiv.org/abs/2402.04333, section 5), with budgets in
tokens instead of rows, as Ivison et al. 2025 (https://arxiv.org/abs/2503.01807) show that rows favour long ones.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from whence.claims import claim_directory
from whence.corpus.layouts import Row
from whence.corpus.templates import date_of, stored_date, written_by
from whence.corpus.tokens import Encoded, bucketed, collate, encode
from whence.counts import number_of
from whence.errors import CorpusError, SettingError
from whence.evaluation.cells import Cell, Costs, Seconds, store_cells, stored_cells
from whence.evaluation.choices import RANDOM, Method
from whence.gradients.capture import token_losses
from whence.local_files import remove_directory, temporary_directory
from whence.models.loading import LoadedModel, directory_digest, load_model, tokenizer_digest
from whence.models.runs import open_run
from whence.models.training_state import warn_of_run
from whence.numerics import crossed_bootstrap_interval
from whence.outputs import refuse_inputs
from whence.paths import writing_to
from whence.storage import Place
from whence.training.trainer import train
from whence.turns import one_at_a_time

NOTHING = "nothing"
"""The line of the untrained model."""
TABLE_FILE = "table.json"
TRAINING = "training-"
"""Prefix of a training's directory, which is removed once its model is graded."""


@dataclass(frozen=True)
class Grades:
    """A model's marks on some rows, one of each kind for a row."""

    loss: Float32[Tensor, " n"]
    """Mean loss over a row's supervised tokens, in nats."""
    exact: Bool[Tensor, " n"]
    """Whether every supervised token is the model's first choice: greedy decoding gives just the completion."""


@one_at_a_time
@torch.inference_mode()
def grade(model: LoadedModel, rows: Sequence[Encoded], *, tokens_per_batch: int = 8192) -> Grades:
    """Loss and exact match of rows, by one forward pass each. Rows must have a supervised token."""
    loss, exact = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    for numbers in bucketed([len(row.ids) for row in rows], tokens_per_batch):
        batch = collate([rows[number] for number in numbers]).to(model.device)
        loss[numbers] = token_losses(model, batch).loss.cpu()
        states, head = model.decode(batch.ids, batch.mask)
        owners, positions = batch.supervised[:, 1:].nonzero(as_tuple=True)
        is_first = torch.cat(
            [
                head(states[owners[span], positions[span]]).argmax(-1) == batch.ids[owners[span], positions[span] + 1]
                for span in torch.arange(len(owners)).split(1024)
            ]
        )
        missed = torch.zeros(len(numbers), dtype=torch.int64, device=batch.ids.device)
        exact[numbers] = missed.index_add_(0, owners, (~is_first).long()).eq(0).cpu()
    return Grades(loss, exact)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained on a choice; every method trains the same number of steps, whatever its choice's size."""

    steps: int = 200
    batch_size: int = 16
    lr: float = 2e-4
    lora_rank: int | None = None
    max_tokens: int = 512
    schedule: str = "linear"


@dataclass(frozen=True)
class Line:
    """One method on one task, over seeds."""

    method: str
    task: str
    seeds: int
    rows: float
    tokens: float
    loss: float
    """Mean over graded rows and seeds."""
    exact: float
    """Share of graded rows that greedy decoding gives exactly."""
    train_seconds: float
    """Wall time of one training."""
    select_seconds: float
    """Wall time of one choice, without the index that it needs; a scoring that serves all tasks counts in full."""
    gain: float | None = None
    """Loss of random selection minus this loss: positive is better than chance; None for random itself."""
    gain_interval: tuple[float, float] | None = None
    """95% interval of `gain`, over seeds and graded rows."""


@dataclass(frozen=True)
class SelectionTable:
    """The table of `whence evaluate selection`."""

    lines: list[Line]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """Gains by task and method, the first of them, and how to go on."""
        gains = [line for line in self.lines if line.gain is not None]
        lines = [
            f"  {line.task}, {line.method}: {line.gain:+.3f} nats a token against random rows" for line in gains[:8]
        ]
        more = [f"  ... {len(gains) - 8} more"] if len(gains) > 8 else []
        return "\n".join(
            [
                f"SelectionTable({number_of(len(self.lines), 'line')})",
                *lines,
                *more,
                "  More: .rows(), .settings, .notes",
            ]
        )

    def rows(self) -> list[dict[str, Any]]:
        """The lines as plain rows."""
        return [asdict(line) for line in self.lines]


def evaluate_selection(
    model: str,
    methods: Mapping[str, Method],
    graded: Mapping[str, Sequence[Row]],
    *,
    work: str | Path,
    recipe: Recipe | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    say: Callable[[str], None] = lambda line: None,
) -> SelectionTable:
    """Train a model on each method's choice and grade it.

    Args:
        model: Directory or Hub name; every training starts from it.
        methods: Methods by name, `random` among them, as rows of the table; the untrained model is added.
        graded: Rows of each task that no method saw.
        work: Directory of the cells, of one table alone; an evaluation that was stopped there goes on.
        recipe: How a model is trained on a choice.
        seeds: Seeds of the trainings; at least 2, for the intervals.
        say: Called with a line for each training.

    Returns:
        A line for each method and task, in the methods' order.

    Raises:
        SettingError: Fewer than two seeds, no `random` among the methods, or `work` holds another table.
        CorpusError: A task without a row that can be graded, or a choice without a row that can be trained on.
        ManifestMismatchError: Another process is writing cells there.
    """
    recipe = recipe or Recipe()
    if len({*seeds}) < 2:
        raise SettingError(f"--seeds {list(seeds)}: two or more are expected, as an interval needs trainings that vary")
    if RANDOM not in methods:
        raise SettingError(f"no method {RANDOM!r}: it is what the others are measured against")
    refuse_inputs(work, [model], flag="--work", is_directory=True)
    place = Place.at(work)
    with place.locked():
        settings = {"model": str(model), "recipe": asdict(recipe), "graded": _digests(graded)}
        claim_directory(place, TABLE_FILE, settings, partial(_other_table, place.root))
        for leftover in place.scratch.glob(f"{TRAINING}*"):  # of a killed process
            remove_directory(leftover)
        cells = _all_cells(model, methods, graded, place, recipe, seeds, say)
    costs = Costs.read(place)
    lines = [_line(name, task, cells, costs, seeds[0]) for task in graded for name in (NOTHING, *methods)]
    return SelectionTable(lines, {"model": str(model), **asdict(recipe), "seeds": list(seeds)})


def _all_cells(
    model: str,
    methods: Mapping[str, Method],
    graded: Mapping[str, Sequence[Row]],
    place: Place,
    recipe: Recipe,
    seeds: Sequence[int],
    say: Callable[[str], None],
) -> list[Cell]:
    """Every cell of a table: the untrained model's, and one for each method, task and seed."""
    start = load_model(open_run(model).checkpoints[-1].path, date=stored_date(place))
    warn_of_run(model)
    tasks = {task: _gradable(start, task, rows, recipe) for task, rows in graded.items()}
    parent = directory_digest(start.path) + tokenizer_digest(start.tokenizer)
    cells = _untrained(place, start, parent, tasks)
    with written_by(None, date_of(place, start.tokenizer, start.tokenizer.template_date)):
        for seed in seeds:  # seed by seed, so that a table that is stopped early has every method
            for name, method in methods.items():
                for group in [{task: tasks[task]} for task in tasks] if method.per_task else [tasks]:
                    trained = _cells(place, model, parent, name, method, group, seed, recipe)
                    cells += trained
                    say(", ".join(f"{name} seed {seed} {cell.task}: {_mean(cell.loss):.4f}" for cell in trained))
    return cells


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _other_table(directory: str, difference: str) -> SettingError:
    return SettingError(
        f"--work {directory}: its cells have another {difference}. Name another directory, or remove that one."
    )


def _digests(graded: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    return {
        task: hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=str).encode()).hexdigest()[:16]
        for task, rows in graded.items()
    }


def _gradable(model: LoadedModel, task: str, rows: Sequence[Row], recipe: Recipe) -> list[Encoded]:
    gradable = _encoded(model, rows, recipe)
    if not gradable:
        raise CorpusError(f"{task}: none of its {number_of(len(rows), 'row')} to grade has a supervised token")
    return gradable


def _encoded(model: LoadedModel, rows: Sequence[Row], recipe: Recipe) -> list[Encoded]:
    longest = min(limit for limit in (recipe.max_tokens, model.context) if limit)
    return [row for row in (encode(row, model.tokenizer, longest) for row in rows) if row.supervised_count]


def _untrained(place: Place, model: LoadedModel, parent: str, tasks: Mapping[str, list[Encoded]]) -> list[Cell]:
    inputs = _inputs(parent, ())
    if (cells := stored_cells(place, NOTHING, 0, inputs, tasks)) is not None:
        return cells
    cells = _graded(model, NOTHING, 0, tasks, inputs, rows=0, tokens=0)
    store_cells(place, cells, Seconds())
    return cells


def _inputs(parent: str, rows: Sequence[Row]) -> str:
    """Digest of a model's digest and of the rows that it is trained on, in their order."""
    digest = hashlib.sha256(parent.encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:32]


def _cells(
    place: Place,
    model: str,
    parent: str,
    name: str,
    method: Method,
    tasks: Mapping[str, list[Encoded]],
    seed: int,
    recipe: Recipe,
) -> list[Cell]:
    """One training's cells, one for each of these tasks; it is trained unless they are all stored."""
    choice = method.choose(next(iter(tasks)), seed)
    rows = list(choice.rows)
    inputs = _inputs(parent, rows)
    if (cells := stored_cells(place, name, seed, inputs, tasks)) is not None:
        return cells
    place.scratch.mkdir(parents=True, exist_ok=True)
    with writing_to(place.scratch), temporary_directory(place.scratch, TRAINING) as folder:
        start = time.perf_counter()
        run = train(
            model,
            rows,
            folder,
            max_steps=recipe.steps,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            lora_rank=recipe.lora_rank,
            max_tokens=recipe.max_tokens,
            schedule=recipe.schedule,
            checkpoints=1,
            seed=seed,
            progress=False,
        )
        seconds = time.perf_counter() - start
        trained = load_model(open_run(run).checkpoints[-1].path)
        tokens = sum(len(row.ids) for row in _encoded(trained, rows, recipe))
        cells = _graded(trained, name, seed, tasks, inputs, rows=len(rows), tokens=tokens)
    store_cells(place, cells, Seconds(seconds, choice.seconds))
    return cells


def _graded(
    model: LoadedModel,
    method: str,
    seed: int,
    tasks: Mapping[str, list[Encoded]],
    inputs: str,
    *,
    rows: int,
    tokens: int,
) -> list[Cell]:
    cells = []
    for task, encoded in tasks.items():
        marks = grade(model, encoded)
        exact = marks.exact.float().tolist()
        cells.append(Cell(method, task, seed, rows, tokens, marks.loss.tolist(), exact, inputs))
    return cells


def _line(method: str, task: str, cells: Sequence[Cell], costs: Costs, seed: int) -> Line:
    """One line of the table, from the cells of all methods."""
    line_cells = [cell for cell in cells if (cell.method, cell.task) == (method, task)]
    seconds = [costs.of(cell.file) for cell in line_cells]
    loss = torch.tensor([cell.loss for cell in line_cells])
    line = Line(
        method=method,
        task=task,
        seeds=len(line_cells),
        rows=sum(cell.rows for cell in line_cells) / len(line_cells),
        tokens=sum(cell.tokens for cell in line_cells) / len(line_cells),
        loss=float(loss.mean()),
        exact=float(torch.tensor([cell.exact for cell in line_cells]).mean()),
        train_seconds=sum(cost.train for cost in seconds) / len(seconds),
        select_seconds=sum(cost.select for cost in seconds) / len(seconds),
    )
    if method == RANDOM:
        return line
    chance = torch.tensor([cell.loss for cell in cells if (cell.method, cell.task) == (RANDOM, task)])
    gain = chance - loss  # the untrained model has one cell, against each of chance's
    return replace(line, gain=float(gain.mean()), gain_interval=crossed_bootstrap_interval(gain, seed=seed))
