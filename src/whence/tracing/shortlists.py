"""A method that reads rows' gradients, for a short list alone: the index proposes, the method decides the order.

EK-FAC's scores take a gradient of every row that they are of. But which rows are high under the loss' curvature is seen
in the index' sketches too, by TRAK, whose curvature is the second moment of these: on two banks the first 200 of its
ranking held .92 of EK-FAC's first ten, of 1,000 and of 2,000 rows, and nine in ten of them were among its first 92 to
173 whatever part of the rows was taken. Larger corpora were not tried. The last ten are found less often, for they
stand out less (docs/results/evaluation.md).

An example's z is that of its TRAK score, and so is the verdict: whether any of TRAK's best stands above what TRAK's
best for meaningless completions reach. A contrast is left out of both, as it is of the method.

Where one pass for all queries takes no more gradients than their lists, all rows are scored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from whence import catalogue
from whence.counts import number_of
from whence.gradients.corpus_scores import groups_that_fit
from whence.indexing.opening import Index
from whence.selection.pipeline import build_scorer
from whence.selection.views import IndexView
from whence.tracing.baselines import targets_of
from whence.tracing.queries import EncodedQuery
from whence.tracing.results import Trace
from whence.tracing.retrieval import Retrieval, TraceSettings

LISTED = 200
"""Rows on each side that are scored, unless told otherwise."""
MOST_SCORES = 2**26
"""Scores of all rows for all queries that are held at once, at most."""


def takes_list(settings: TraceSettings, options: Mapping[str, Any]) -> bool:
    """Whether a method scores what the index lists."""
    entry = catalogue.trace_method(settings.method)
    if entry.listed_by is None or entry.scorer is None:
        return False
    return not build_scorer(entry.scorer, settings.seed, options).sketched


def list_length(settings: TraceSettings, rankable: int, queries: int, passes: int) -> int:
    """Rows of a short list on each side; all rows, where a pass over these costs no more.

    Args:
        settings: How a trace is made.
        rankable: All rows.
        queries: How many are asked.
        passes: Over all rows, that so many queries take.
    """
    listed = max(settings.top, settings.shortlist or LISTED)
    of_all = 2 * listed * queries >= rankable * passes and queries * rankable <= MOST_SCORES
    return rankable if of_all else min(listed, rankable)


def shortlisted_trace(
    index: Index,
    queries: list[EncodedQuery],
    settings: TraceSettings,
    control_queries: list[EncodedQuery] | None,
    options: Mapping[str, Any],
) -> Trace:
    """A trace by a method whose entry in the catalogue says by which other its rows are listed (`listed_by`).

    Args:
        index: An open index.
        queries: What is asked.
        settings: How; `shortlist` is the length of a list.
        control_queries: The user's; None: rows of the index.
        options: Of the method's scorer.
    """
    entry = catalogue.trace_method(settings.method)
    assert entry.listed_by is not None and entry.scorer is not None, "the catalogue says so"
    scorer, rankable = build_scorer(entry.scorer, settings.seed, options), len(index.store.rankable())
    passes = len(groups_that_fit(index.layers(index.model()), len(queries), copies=scorer.copies))
    m = list_length(settings, rankable, len(queries), passes)

    def scores(asked: list[EncodedQuery], lists: list[list[int]]) -> list[Tensor]:
        if m < rankable:
            return scorer.of_lists(IndexView(index), targets_of(asked), lists)
        whole = scorer(IndexView(index), targets_of(asked))
        return [line[rows] for line, rows in zip(whole, lists, strict=True)]

    listing = replace(settings, method=entry.listed_by, shortlist=m)
    controls = None if control_queries is None else _without_contrasts(control_queries)
    traced = Retrieval(index, _without_contrasts(queries), listing, controls, list_scorer=scores).trace()
    return replace(traced, method=settings.method, listed=None if m == rankable else m)


def _without_contrasts(queries: Sequence[EncodedQuery]) -> list[EncodedQuery]:
    return [replace(query, sequences=query.sequences[:1]) for query in queries]


def list_words(traced: Trace, rankable: int) -> str:
    """Which rows were scored, in words."""
    if traced.listed is None:
        return f"all {number_of(rankable, 'row')}"
    listed_by = catalogue.trace_method(traced.method).listed_by
    return f"the first {traced.listed:,} and the last {traced.listed:,} rows as {listed_by} ranks them by the index"


def list_note(traced: Trace, words: str) -> str:
    """What a person should know of it."""
    listed_by = catalogue.trace_method(traced.method).listed_by
    of_null = f"; z and the verdict are of {listed_by}'s scores" if traced.levels else ""
    return f"{traced.method} scored {words}{of_null}."
