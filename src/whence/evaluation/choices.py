"""What each method of `select` would train on: choices from one corpus under one budget of tokens.

A choice is made when it is first asked for, once for all tasks, and stored: it may take longer than the trainings that
grade it (`selection`). A random choice and the whole corpus are beside the methods.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from whence import catalogue
from whence.checksums import is_sealed
from whence.corpus.layouts import Row
from whence.corpus.reading import open_corpus
from whence.errors import SettingError
from whence.evaluation.cells import Costs, Seconds, add_costs
from whence.indexing.ingest import fingerprint_of
from whence.indexing.manifest import MANIFEST
from whence.indexing.opening import Index
from whence.models.loading import directory_digest
from whence.models.runs import open_run
from whence.records import MisfitError, fitting, read_record, unlike_written
from whence.selection.pipeline import open_view, select, select_each
from whence.selection.run_view import RunView
from whence.selection.views import CorpusView, IndexView, refuse_contrasts
from whence.storage import AGAIN, Place

RANDOM, EVERYTHING = "random", "full pool"
"""Choices that are no method's: a random one, and the whole corpus."""


@dataclass(frozen=True)
class Choice:
    """The rows that a method chose, and the wall time that it took."""

    rows: Sequence[Row]
    seconds: float = 0.0


Chooser = Callable[[str, int], Choice]
"""From `(task, seed)` to a method's choice for the task; a method without randomness ignores the seed."""


@dataclass(frozen=True)
class Method:
    """A way to choose, one row of a table."""

    choose: Chooser
    per_task: bool = True
    """Whether the choice depends on the task; else one training is graded on all of them."""


def selection_methods(
    names: Sequence[str],
    source: str | Path | Index,
    tasks: Mapping[str, Any],
    *,
    fraction: float,
    model: str | None = None,
    work: str | Path | None = None,
    run: str | Path | None = None,
    parent: str | Path | None = None,
    **settings: Any,
) -> tuple[dict[str, Method], int]:
    """Methods of `select` as rows of a table, all under one budget of tokens; `random` and the whole corpus among them.

    Each scores the corpus once for all tasks when its first choice is needed, and stores the choices; a method that
    draws does so for each seed.

    Args:
        names: Names in `catalogue.SCORERS`; `name:option=value` sets an option, such as `less:within=mean_cosine`.
        source: An index, or a corpus for methods that need no index.
        tasks: The examples of each task, by its name.
        fraction: Share of the tokens of the rows that can be trained on.
        model: The model that token counts and methods on a corpus need; for an index, where its model has moved.
        work: Directory that stores the choices, which may take longer than the trainings; None: they are not stored.
        run: A run of `train --replayable` on these rows, for methods that go back through one.
        parent: The model that the run was trained from, if that has moved.
        settings: Settings of `select`, the same for every method, such as caps.

    Returns:
        The methods, and the budget in tokens.
    """
    if not 0 < fraction <= 1:
        raise SettingError(f"--fraction {fraction}: a share above 0 and up to 1 is expected")
    view = open_view(source, RANDOM, model=model)
    refuse_contrasts(view, "the models that grade a choice are trained on the chosen answers alone")
    everything = select(view, None, method=RANDOM, fraction=1.0, duplicates=None)
    budget = max(1, round(fraction * everything.selection.tokens))
    store = (
        None
        if work is None
        else _ChoiceStore(Place.at(work), {"budget": budget, **settings, **_origins(view, tasks, model)})
    )
    run_view = _run_on_rows(names, run, parent, view)
    shuffled = everything.selection.rows  # in a random order
    rows = [everything.rows[place] for place in sorted(range(len(shuffled)), key=shuffled.__getitem__)]

    def method(name: str) -> Method:
        base, _, options = name.partition(":")
        values = dict(option.split("=", 1) for option in options.split(",") if option)
        entry = catalogue.scorer_entry(base)
        method_tasks = tasks if entry.reads_tasks else {"": None}
        draws = entry.draws or settings.get("temperature", 0.0) > 0
        read, kept = view, store
        if entry.needs_run and run_view is not None:
            read, kept = run_view, store and store.of_run(run_view.run.log.digest)

        @cache
        def choices(seed: int) -> dict[str, Choice]:
            if kept is not None and (by_task := kept.read(name, seed)) is not None:
                return by_task
            start = time.perf_counter()
            chosen_by_task = select_each(
                read, method_tasks, method=base, options=values, tokens_budget=budget, seed=seed, **settings
            )
            seconds = time.perf_counter() - start
            by_task = {task: Choice(chosen.rows, seconds) for task, chosen in chosen_by_task.items()}
            if kept is not None:
                kept.write(name, seed, by_task)
            return by_task

        def choose(task: str, seed: int) -> Choice:
            return choices(seed if draws else 0)[task if entry.reads_tasks else ""]

        return Method(choose, per_task=entry.reads_tasks)

    methods = {name: method(name) for name in dict.fromkeys((RANDOM, *names))}
    return methods | {EVERYTHING: Method(lambda task, seed: Choice(rows), per_task=False)}, budget


@dataclass(frozen=True)
class _ChoiceStore:
    """Choices as files, for an evaluation that is stopped and goes on."""

    place: Place
    settings: dict[str, Any]
    """What the choices depend on besides method and seed."""

    def of_run(self, digest: str) -> "_ChoiceStore":
        """For choices that depend on a run too."""
        return _ChoiceStore(self.place, {**self.settings, "run": digest})

    def _name(self, method: str, seed: int) -> str:
        key = json.dumps([method, seed, self.settings], sort_keys=True, default=str)
        return f"choice-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    def read(self, method: str, seed: int) -> dict[str, Choice] | None:
        """The choice for each task; None where it is not stored."""
        name = self._name(method, seed)
        if not self.place.exists(name):
            return None
        data, where = self.place.read(name), self.place.path(name)
        document = read_record(dict[str, Any], data, where, AGAIN)
        by_task = document.get("choices") if is_sealed(data) else document
        try:
            choices = fitting(dict[str, Choice], by_task)
        except MisfitError as error:
            raise unlike_written(where, error, AGAIN) from None
        seconds = Costs.read(self.place).of(name).select
        return {task: Choice(choice.rows, seconds or choice.seconds) for task, choice in choices.items()}

    def write(self, method: str, seed: int, choices: dict[str, Choice]) -> None:
        """Write the choices for all tasks, and beside them the time that they took."""
        name = self._name(method, seed)
        add_costs(self.place, {name: Seconds(select=max(choice.seconds for choice in choices.values()))})
        by_task = {task: {"rows": choice.rows} for task, choice in choices.items()}
        self.place.write_document(name, {"method": method, "seed": seed, "choices": by_task})


def _run_on_rows(
    names: Sequence[str], run: str | Path | None, parent: str | Path | None, view: IndexView | CorpusView
) -> RunView | None:
    """The run that methods go back through, where one of them does."""
    replaying = [name for name in names if catalogue.scorer_entry(name.partition(":")[0]).needs_run]
    if not replaying:
        return None
    if run is None:
        raise SettingError(
            f"--methods {replaying[0]}: it reads a run of `whence train --replayable`, and none is given: add --run RUN"
        )
    opened = RunView.of(run, model=parent, flag="--parent")
    if [*opened.ids()] != [*view.ids()]:
        raise SettingError(
            f"--run {run}: it was trained on {opened.corpus.name}, whose rows are not those that are chosen from. "
            "Train on these: whence train MODEL CORPUS --replayable -o RUN"
        )
    return opened


def _origins(view: IndexView | CorpusView, tasks: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """Digests of the rows to choose from, of the tasks, and of the model by which they are read."""
    if isinstance(view, CorpusView):
        weights = None if model is None else directory_digest(open_run(model).checkpoints[-1].path)
        source = [fingerprint_of(view.corpus).digest, weights]
    else:
        source = [hashlib.sha256(view.index.store.place.read(MANIFEST)).hexdigest()]
    return {"source": source, "tasks": {name: fingerprint_of(open_corpus(task)).digest for name, task in tasks.items()}}
