"""Do methods find the rows that are known to be behind an answer? Queries with relevant ids grade every ranking.

What is known was planted (`planting`), or is a column that query and rows have in common. Every method scores all rows
for each query, and its ranking is measured by `ranking`: auROC, auPRC, recall and precision at k, MRR; means over
queries with 95% bootstrap intervals, and of the difference in auPRC from the best method in the same resamples.

A score of gradients has a sign, and a row that taught half of an answer and untaught the other half may oppose it: such
methods are ranked a second time by magnitude, under the name `|method|`.

That a method finds planted rows says that it knows where an answer was learnt; whether the score is right is told by
retrainings alone (`lds`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from whence.corpus.columns import current
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.counts import number_of
from whence.errors import SettingError
from whence.evaluation.estimates import Estimate, mean_over_queries, query_draws
from whence.evaluation.method_scores import (
    MethodName,
    MethodScores,
    check_costs,
    check_methods,
    refuse_twice,
    score_methods,
    with_costs,
)
from whence.evaluation.planting import RELEVANT
from whence.evaluation.ranking import measures
from whence.evaluation.score_files import scores_from_file
from whence.indexing.opening import Index
from whence.runner import ProgressOption, shown_as
from whence.selection.pipeline import open_view
from whence.selection.views import CorpusView, IndexView

DEPTHS = (10, 50)
MAIN = "auprc"
"""The measure by which methods are ordered and compared."""


@dataclass(frozen=True)
class RetrievalMarks:
    """How well one method finds the relevant rows."""

    method: str
    by_query: dict[str, Float64[Tensor, " q"]] = field(repr=False)
    """Every measure of every graded query."""
    estimates: dict[str, Estimate]
    """Every measure's mean over queries."""
    below_best: Estimate
    """How far its auPRC is below the best method's, over the same resamples of queries."""
    seconds: float | None = None


@dataclass(frozen=True)
class RetrievalTable:
    """Methods side by side, best first."""

    marks: list[RetrievalMarks]
    queries: int
    """Queries that are graded."""
    candidates: int
    """Rows that are ranked."""
    relevant: float
    """Relevant rows of a query, on average."""
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """The methods with their auPRC, and how to go on."""
        lines = [f"  {marks.method}: auPRC {marks.estimates[MAIN].value:.3f}" for marks in self.marks]
        head = f"RetrievalTable({number_of(self.queries, 'query', 'queries')}, {number_of(self.candidates, 'row')})"
        return "\n".join([head, *lines, "  More: .rows(), .marks, .notes"])

    def rows(self) -> list[dict[str, Any]]:
        """Plain rows, best first."""
        rows = []
        for rank, marks in enumerate(self.marks, start=1):
            row: dict[str, Any] = {"rank": rank, "method": marks.method}
            for name, estimate in marks.estimates.items():
                row |= estimate.columns(name)
            row |= marks.below_best.columns("below_best")
            row |= {"queries": self.queries, "candidates": self.candidates, "seconds": marks.seconds}
            rows.append(row)
        return rows


def evaluate_retrieval(
    queries: str | Path | Corpus | Iterable[Row],
    source: str | Path | Index | Corpus | Iterable[Row],
    methods: Sequence[str] = (),
    *,
    relevant: str | None = None,
    index: Mapping[str, str] | None = None,
    scores: Mapping[str, str] | None = None,
    costs: Mapping[str, float] | None = None,
    index_seconds: float | None = None,
    run: str | Path | None = None,
    parent: str | Path | None = None,
    model: str | None = None,
    depths: Sequence[int] = DEPTHS,
    seed: int = 0,
    progress: ProgressOption = False,
) -> RetrievalTable:
    """Grade methods by the relevant rows of queries.

    Args:
        queries: Corpus rows, each with the ids of its `relevant` rows as a list.
        source: An index, or a corpus for methods that need none.
        methods: Names in `catalogue.GRADED`, with options (`less:within=mean_cosine`) or an index (`less@adam`).
        relevant: A column: rows that have the query's value there are relevant, in place of ids.
        index: Further indexes of the same rows, by name.
        scores: Files of scores by the name of the method; see `score_files`.
        costs: Seconds by method, where they were measured elsewhere.
        index_seconds: What making an index took, added for methods that read its vectors.
        run: The run of `whence train --replayable` that methods replay; it was trained on the corpus that is given, or
            its record says where that is.
        parent: The model that the run was trained from, if that has moved.
        model: For a corpus the model that methods read; for an index, where its model has moved.
        depths: Depths of recall and precision.
        seed: Seed of methods that draw, and of the intervals.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).

    Raises:
        SettingError: A query's relevant rows are not known, no method, or one that cannot score the rows.
    """
    names = [*dict.fromkeys(methods)]
    check_methods(names, scores or {})
    if bad := [k for k in depths if k < 1]:
        raise SettingError(f"--k {bad[0]}: a number of rows from 1 on is expected")
    with shown_as(progress, "Scoring"):
        view = rows_view(source, names, model)
        asked, truths = _queries(asked_corpus(queries, view), relevant)
        ids = list(view.ids())
        masks = _masks(asked, truths, ids, view, relevant)
        usable = masks.any(1) & ~masks.all(1)
        if not usable.any():
            raise SettingError(
                f"none of {number_of(len(asked), 'query', 'queries')} has a relevant row and another: rows to find are "
                f"named in the column {relevant or RELEVANT}"
            )
        scored = row_scores(names, asked, view, [str(row["id"]) for row in asked], index=index, scores=scores,
                            costs=costs, index_seconds=index_seconds, run=run, parent=parent, model=model,
                            seed=seed)  # fmt: skip
    usable_scores = [replace(method, scores=method.scores[usable]) for method in scored]
    table = graded(usable_scores, masks[usable], depths=depths, seed=seed)
    if left := int((~usable).sum()):
        table.notes.append(
            f"Left out, for no row is relevant to them, or all are: {number_of(left, 'query', 'queries')}."
        )
    return table


def graded(
    scored: Sequence[MethodScores], relevant: Bool[Tensor, "q n"], *, depths: Sequence[int] = DEPTHS, seed: int = 0
) -> RetrievalTable:
    """Grade scores by which rows are relevant to each query: some, and not all.

    Args:
        scored: Scores of methods.
        relevant: Relevant rows.
        depths: Depths of recall and precision.
        seed: Seed of the intervals.
    """
    draws, lines = query_draws(len(relevant), seed), list[tuple[str, dict[str, Tensor], float | None]]()
    for method in scored:
        for name, values in _both_ways(method):
            by_query = [measures(one, other, depths) for one, other in zip(values, relevant, strict=True)]
            columns = {key: torch.tensor([line[key] for line in by_query], dtype=torch.float64) for key in by_query[0]}
            lines.append((name, columns, method.seconds))
    lines.sort(key=lambda line: -float(line[1][MAIN].mean()))
    best = lines[0][1][MAIN]
    marks = [_marks(name, columns, seconds, best, draws) for name, columns, seconds in lines]
    return RetrievalTable(marks, len(relevant), relevant.shape[1], float(relevant.double().sum(1).mean()))


def _marks(
    name: str,
    columns: dict[str, Float64[Tensor, " q"]],
    seconds: float | None,
    best: Float64[Tensor, " q"],
    draws: Int64[Tensor, "r q"],
) -> RetrievalMarks:
    estimates = {key: mean_over_queries(values, draws) for key, values in columns.items()}
    return RetrievalMarks(name, columns, estimates, mean_over_queries(best - columns[MAIN], draws), seconds)


def _both_ways(method: MethodScores) -> list[tuple[str, Float32[Tensor, "q n"]]]:
    """Scores as they are; and by magnitude, where they are of gradients and have both signs."""
    known = method.scores[method.scores.isfinite()]
    ways = [(method.name, method.scores)]
    if method.is_signed and bool((known < 0).any()) and bool((known > 0).any()):
        magnitudes = torch.where(method.scores.isfinite(), method.scores.abs(), -torch.inf)
        ways.append((f"|{method.name}|", magnitudes))
    return ways


def asked_corpus(queries: str | Path | Corpus | Iterable[Row], view: IndexView | CorpusView) -> Corpus:
    """Queries, with the names of columns that the index' rows have, unless told otherwise."""
    if isinstance(queries, Corpus) or current() or isinstance(view, CorpusView):
        return open_corpus(queries)
    return open_corpus(queries, columns=view.columns)


def _queries(corpus: Corpus, column: str | None) -> tuple[list[Row], list[list[str] | str]]:
    """Queries without what is relevant to them, each with its id, and that: ids, or a value of the column.

    Raises:
        SettingError: A query lacks it.
    """
    asked, truths = list[Row](), list[list[str] | str]()
    for number, example in enumerate(corpus):
        value = example.row.get(column or RELEVANT)
        if column is None and isinstance(value, str):  # a .csv has no lists
            value = _listed(value)
        if value is None or (column is None and not isinstance(value, list)):
            raise SettingError(
                f"{corpus.name}: query {number} has no {column or RELEVANT}; "
                + ("ids of the rows to find, as a list, are expected" if column is None else "a value is expected")
            )
        asked.append({name: cell for name, cell in example.row.items() if name != RELEVANT} | {"id": example.id})
        truths.append([str(id) for id in value] if isinstance(value, list) and column is None else str(value))
    return asked, truths


def _listed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def rows_view(source: Any, methods: Sequence[str], model: str | None) -> IndexView | CorpusView:
    """The rows as the method that needs most reads them.

    Args:
        source: An index, or a corpus.
        methods: Methods, as `MethodName` has them.
        model: For a corpus the model that methods read; for an index, where its model has moved.

    Raises:
        SettingError: A method reads a model, and there is none.
    """
    entries = {name: MethodName.of(name).entry for name in methods}
    needs_model = [name for name, entry in entries.items() if entry.needs_model]
    view = open_view(source, "random", model=model)
    if needs_model and isinstance(view, CorpusView) and view.loaded is None:
        raise SettingError(f"--methods {needs_model[0]} reads a model, and a corpus has none: add --model MODEL")
    return view


def row_scores(
    names: Sequence[str],
    queries: Sequence[Row],
    view: IndexView | CorpusView,
    query_ids: Sequence[str],
    *,
    index: Mapping[str, str] | None = None,
    scores: Mapping[str, str] | None = None,
    costs: Mapping[str, float] | None = None,
    index_seconds: float | None = None,
    run: str | Path | None = None,
    parent: str | Path | None = None,
    model: str | None = None,
    seed: int = 0,
) -> list[MethodScores]:
    """Scores of all rows of a view by methods and files; for the arguments and errors see `evaluate_retrieval`.

    Rows that another index has in another order are put into the view's.
    """
    ids = list(view.ids())
    check_costs(costs or {}, [*names, *(scores or {})])
    read = [scores_from_file(name, path, ids, query_ids) for name, path in (scores or {}).items()]
    others = {name: open_view(path, "random", model=model) for name, path in (index or {}).items()}
    indexes = {name: other for name, other in others.items() if isinstance(other, IndexView)}
    if missing := [name for name in others if name not in indexes]:
        raise SettingError(f"--index {(index or {})[missing[0]]}: there is no index")
    replays = any(MethodName.of(name).entry.needs_run for name in names)
    replayed = None
    if run is not None and replays:
        from whence.selection.run_view import RunView  # which brings the Trainer

        replayed = RunView.of(run, view.corpus if isinstance(view, CorpusView) else None, model=parent, flag="--parent")
    order = ids if indexes or replayed is not None else None
    scored = score_methods(names, queries, view, order, indexes=indexes, run=replayed, index_seconds=index_seconds,
                           seed=seed)  # fmt: skip
    return with_costs([*scored, *read], costs or {})


def _masks(
    queries: Sequence[Row],
    truths: Sequence[list[str] | str],
    ids: Sequence[str],
    view: IndexView | CorpusView,
    column: str | None,
) -> Bool[Tensor, "q n"]:
    """Which rows are relevant to each query; a query that is itself a row is not.

    Raises:
        SettingError: An id is of no row, or of several, or no row has the column.
    """
    refuse_twice(ids, view.index.store.place.root if isinstance(view, IndexView) else view.corpus.name)
    masks = torch.zeros(len(queries), len(ids), dtype=torch.bool)
    places = {id: place for place, id in enumerate(ids)}
    if column is not None:
        values = [row.get(column) for row in view.examples()]
        if all(value is None for value in values):
            raise SettingError(f"--relevant {column}: no row has this column")
        by_value: dict[str, list[int]] = {}
        for place, value in enumerate(values):
            by_value.setdefault(str(value), []).append(place)
        for mask, query, value in zip(masks, queries, truths, strict=True):
            mask[by_value.get(str(value), [])] = True
            if (own := places.get(str(query["id"]))) is not None:
                mask[own] = False
        return masks
    for mask, query, wanted in zip(masks, queries, truths, strict=True):
        if unknown := [id for id in wanted if id not in places]:
            raise SettingError(
                f"query {query['id']}: its relevant row {unknown[0]} is none of the {len(ids):,} that are ranked "
                f"({number_of(len(unknown), 'id')} of {len(wanted):,})"
            )
        mask[[places[id] for id in wanted]] = True
    return masks
