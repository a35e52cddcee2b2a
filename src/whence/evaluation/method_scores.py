"""Scores of some rows for some queries by many methods, each with what it cost: what every grading begins with.

A method is a scorer of `catalogue.GRADED` (`bm25`, `less:within=mean_cosine`), read from an index or from the rows
themselves. Another tool's, or a method that is no scorer, comes as a file (`score_files`). Larger is more helpful. Each
query is a target of its own; a task's mean loss is graded by the mean of its queries' scores.

The cost is the wall time of scoring. The time that an index took is told by whoever made it, and is added for methods
that read its vectors; a model that is loaded first is not counted.
"""

import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence import catalogue
from whence.corpus.layouts import Row
from whence.counts import number_of
from whence.errors import SettingError
from whence.evaluation.kept_scores import FOLDER, KeptScores
from whence.selection.pipeline import build_scorer, targets_of
from whence.selection.protocols import Scorer, Target
from whence.selection.views import CorpusView, IndexView, refuse_contrasts
from whence.storage import Place

if TYPE_CHECKING:
    from whence.selection.run_view import RunView  # which brings the Trainer

AT = "@"
"""Between a method's name and that of the index that it reads, where there are several."""
RANDOM = "random"
"""Name of the random rows that stand beside methods, in tables that add them."""


@dataclass(frozen=True)
class MethodScores:
    """One method's scores of n rows for q queries."""

    name: str
    scores: Float32[Tensor, "q n"] = field(repr=False)
    """Larger is more helpful; not finite where a row has no score."""
    seconds: float | None = None
    """What they cost; None where nobody knows."""
    origin: str = ""
    """Where they come from, in words."""
    is_signed: bool = False
    """Whether the sign says helpful or harmful, as of gradients; only then is a magnitude of use."""
    is_kept: bool = False
    """Whether a bank had them from an evaluation before."""


@dataclass(frozen=True)
class MethodName:
    """A method as it is asked for: NAME, NAME:OPTION=VALUE,... or NAME@INDEX.

    >>> MethodName.of("less:within=mean_cosine@adam")
    MethodName(text='less:within=mean_cosine@adam', base='less', options={'within': 'mean_cosine'}, index='adam')
    """

    text: str
    base: str
    options: dict[str, str]
    index: str = ""

    @staticmethod
    def of(text: str) -> "MethodName":
        """A method's parts.

        Raises:
            UnknownNameError: There is no such method.
            SettingError: An option is not OPTION=VALUE.
        """
        whole, _, index = text.partition(AT)
        base, _, options = whole.partition(":")
        catalogue.graded_entry(base)
        pairs = [option.partition("=") for option in options.split(",") if option]
        if bad := [name for name, equals, _ in pairs if not equals]:
            raise SettingError(f"--methods {text}: {bad[0]} is no option; OPTION=VALUE is expected")
        return MethodName(text, base, {name: value for name, _, value in pairs}, index)

    @property
    def entry(self) -> catalogue.ScorerEntry:
        """What it needs."""
        return catalogue.graded_entry(self.base)

    def scorer(self, seed: int) -> Scorer:
        """Build its scorer.

        Raises:
            SettingError: It has no such option.
        """
        known = {entry.implementation: name for name, entry in catalogue.SCORERS.items()}
        if (name := known.get(self.entry.implementation)) is not None:
            return build_scorer(name, seed, self.options)
        if self.options:
            raise SettingError(f"--methods {self.text}: {self.base} has no options")
        return self.entry.load()(seed=seed)


def score_methods(
    methods: Sequence[str],
    queries: Sequence[Row],
    view: IndexView | CorpusView,
    row_ids: Sequence[str] | None = None,
    *,
    indexes: Mapping[str, IndexView] | None = None,
    run: "RunView | None" = None,
    index_seconds: float | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    place: Place | None = None,
) -> list[MethodScores]:
    """Score rows for queries, one method after another, once it is known that all of them can be scored.

    Args:
        methods: Methods, as `MethodName` has them.
        queries: Corpus rows; each is scored for by itself, so each needs a supervised token.
        view: The rows, or an index of them and perhaps of others.
        row_ids: Ids of the rows to score, in the order of the columns; None: the view's rows in their order.
        indexes: Other indexes of the same rows, for methods that name one: `less@adam`.
        run: The run that was trained on just these rows, in their order, for methods that replay it.
        index_seconds: What an index took to make, added to the cost of methods that read its vectors.
        max_tokens: Where longer queries are cut; None: at the model's context.
        seed: Seed of the methods that draw.
        place: A bank, which keeps each method's scores when they are known, and has those that it kept before.

    Raises:
        SettingError: A method needs what the view lacks, a row is not in the index, or a query cannot be scored for.
    """
    todo = [
        _Task(method := MethodName.of(text), _view_of(method, view, indexes or {}, run), method.scorer(seed))
        for text in dict.fromkeys(methods)
    ]
    targets, columns = dict[int, list[Target]](), dict[int, Tensor | None]()
    for task in todo:
        key, reads_all = id(task.view), row_ids is None and task.view is not run
        if not task.method.entry.contrasts:
            reason = f"{task.method.text} reads one answer of a row"
            refuse_contrasts(task.view, reason, "Give another index, or leave it out.")
        if key not in columns:
            columns[key] = None if reads_all else _columns(task.view, row_ids or [*view.ids()])
            targets[key] = query_targets(queries, task.view, max_tokens)
    kept = None if place is None else KeptScores(place, queries, row_ids or [*view.ids()], max_tokens)
    scored = []
    for task in todo:
        key = "" if kept is None else kept.key(task.method.base, task.method.options, task.view, seed)
        known = None if kept is None else kept.load(key)
        scores, seconds = known or task.scores(targets[id(task.view)], columns[id(task.view)])
        if kept is not None and known is None:
            kept.save(key, task.method.text, scores, seconds)
        seconds += (index_seconds or 0.0) * task.method.entry.needs_index
        text, is_kept = task.method.text, known is not None
        scored.append(MethodScores(text, scores, seconds, task.origin, task.is_signed, is_kept))
    return scored


def kept_note(scored: Sequence[MethodScores], bank: str) -> list[str]:
    """A sentence on scores that a bank had, and how to have them anew; none if there are none."""
    names = [method.name for method in scored if method.is_kept]
    if not names:
        return []
    where = shlex.quote(f"{bank}/{FOLDER}")
    return [f"Scored before and kept by the bank: {', '.join(names)}. To score anew: rm -r {where}"]


@dataclass(frozen=True)
class _Task:
    """A method, and what it reads."""

    method: MethodName
    view: IndexView | CorpusView
    scorer: Scorer

    @property
    def origin(self) -> str:
        """Where its scores come from, in words."""
        if self.method.entry.needs_run:
            return "the run"
        return "an index" if isinstance(self.view, IndexView) else "the rows"

    @property
    def is_signed(self) -> bool:
        """Whether the sign says helpful or harmful."""
        return self.method.entry.is_signed

    def scores(
        self, targets: list[Target], columns: Int64[Tensor, " n"] | None
    ) -> tuple[Float32[Tensor, "q n"], float]:
        """Its scores for targets, of some columns or all, and the seconds that they took."""
        if self.method.entry.needs_model or self.method.entry.needs_index:
            self.view.model()  # loading is not scoring
        start = time.perf_counter()
        found = self.scorer(self.view, targets)
        seconds = time.perf_counter() - start
        seconds += getattr(self.scorer, "seconds_before", 0.0)  # of a call that was stopped, and gone on with
        return found if columns is None else found[:, columns], seconds


def check_methods(methods: Sequence[str], scores: Mapping[str, str], *, reserved: Sequence[str] = ()) -> None:
    """Refuse to grade nothing, or two methods of one name.

    Args:
        methods: Methods, as `MethodName` has them.
        scores: Files of scores by the name of the method.
        reserved: Names of lines that the table has anyway, which no file can have.

    Raises:
        SettingError: Either.
    """
    if not methods and not scores:
        raise SettingError("no method to grade: name some with --methods, or files with --scores NAME=FILE")
    if taken := [name for name in scores if name in reserved]:
        raise SettingError(f"--scores {taken[0]}: the table has a line of that name already; give the file's another")
    if twice := [name for name in methods if name in scores]:
        raise SettingError(f"--scores {twice[0]}: --methods has that name too; give the file's another")


def check_costs(costs: Mapping[str, float], names: Sequence[str]) -> None:
    """Refuse costs of what is not graded, before it is.

    Raises:
        SettingError: A cost is of none of these methods.
    """
    if unknown := [name for name in costs if name not in names]:
        raise SettingError(f"--cost {unknown[0]}: of no method that is graded; these are {', '.join(names)}")


def with_costs(scored: Sequence[MethodScores], costs: Mapping[str, float]) -> list[MethodScores]:
    """The same, with seconds that someone else measured.

    Raises:
        SettingError: A cost is of no method that is graded.
    """
    check_costs(costs, [method.name for method in scored])
    return [replace(method, seconds=costs.get(method.name, method.seconds)) for method in scored]


def query_targets(queries: Sequence[Row], view: IndexView | CorpusView, max_tokens: int | None = None) -> list[Target]:
    """Every query as a target of its own; for `max_tokens` see `score_methods`.

    Raises:
        SettingError: A query has no supervised token.
    """
    targets, _ = targets_of(list(queries), view, by="example", max_tokens=max_tokens)
    if len(targets) < len(queries):
        short = len(queries) - len(targets)
        raise SettingError(
            f"queries without a supervised token: {short:,} of {len(queries):,}. No row can be scored for them: mend "
            "them, or leave them out"
        )
    return targets


def refuse_twice(ids: Sequence[str], name: str) -> None:
    """Refuse rows that no id tells apart.

    Raises:
        SettingError: Two have one id.
    """
    if len(set(ids)) < len(ids):
        twice = next(id for id, times in Counter(ids).items() if times > 1)
        raise SettingError(f"{name}: the id {twice!r} is given twice, and rows are found by it. Make ids unique.")


def _view_of(
    method: MethodName, view: IndexView | CorpusView, indexes: Mapping[str, IndexView], run: "RunView | None"
) -> IndexView | CorpusView:
    if method.entry.needs_run:
        if run is None:
            raise SettingError(
                f"--methods {method.text}: it reads a run of `whence train --replayable`, and none is given: add "
                "--run RUN"
            )
        return run
    if method.index:
        if method.index not in indexes:
            known = ", ".join(indexes) or "none"
            raise SettingError(f"--methods {method.text}: no --index has the name {method.index}; named are {known}")
        return indexes[method.index]
    if method.entry.needs_index and not isinstance(view, IndexView):
        raise SettingError(
            f"--methods {method.text}: it reads the vectors of an index. Make one with: whence index MODEL CORPUS "
            "-o INDEX, and add --index INDEX"
        )
    return view


def _columns(view: IndexView | CorpusView, row_ids: Sequence[str]) -> Tensor:
    """Places of rows in a view.

    Raises:
        SettingError: It lacks one of them, or has several rows of one id.
    """
    ids, wanted = [*view.ids()], {*row_ids}
    places = {id: place for place, id in enumerate(ids)}
    name = view.index.store.place.root if isinstance(view, IndexView) else view.corpus.name
    refuse_twice([id for id in ids if id in wanted], name)
    if missing := [id for id in row_ids if id not in places]:
        raise SettingError(
            f"{name}: it lacks {number_of(len(missing), 'row')} of {len(row_ids):,}, such as {missing[0]}: give an "
            "index of the same corpus"
        )
    return torch.tensor([places[id] for id in row_ids], dtype=torch.int64)
