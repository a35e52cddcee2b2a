"""A method that reads rows' gradients, for a short list alone: the index proposes, the method decides the order.

EK-FAC's scores take a gradient of every row that they are of. But which rows are high under the loss' curvature is seen
in the index' sketches too, by TRAK, whose curvature is the second moment of these: on two banks the first 200 of its
ranking held nine in ten of EK-FAC's first ten, and no more were needed of 2,000 rows than of 250, for the best of more
rows stand out more (docs/results/evaluation.md). The last ten are found less often, for they stand out less.

An example's z is that of its TRAK score, and so is the verdict: whether any of TRAK's best stands above what TRAK's
best for meaningless completions reach.

Where the lists together are as long as the corpus, all rows are scored, which costs no more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from whence import catalogue
from whence.counts import number_of
from whence.indexing.opening import Index
from whence.selection.pipeline import build_scorer
from whence.selection.protocols import QueryText, Target
from whence.selection.views import IndexView
from whence.tracing import nulls
from whence.tracing.depth import Noise
from whence.tracing.queries import EncodedQuery
from whence.tracing.results import Hit, Trace
from whence.tracing.retrieval import MOST_QUERIES, QueryResult, Retrieval, Side, TraceSettings

LISTED = 200
"""Rows on each side that are scored, unless told otherwise."""


def takes_list(settings: TraceSettings, options: Mapping[str, Any]) -> bool:
    """Whether a method scores what the index lists."""
    entry = catalogue.trace_method(settings.method)
    if entry.listed_by is None or entry.scorer is None:
        return False
    return not build_scorer(entry.scorer, settings.seed, options).sketched


def list_length(settings: TraceSettings, rankable: int, queries: int) -> int:
    """Rows of a short list on each side; of all rows, where these cost no more."""
    listed = max(settings.top, settings.shortlist or LISTED)
    of_all = 2 * listed * queries >= rankable and queries <= MOST_QUERIES
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
    m = list_length(settings, len(index.store.rankable()), len(queries))
    listing = replace(settings, method=entry.listed_by, shortlist=m)
    scorer = build_scorer(entry.scorer, settings.seed, options)
    traced = _ShortlistRetrieval(index, queries, listing, control_queries, scorer=scorer).trace()
    return replace(traced, method=settings.method)


@dataclass
class _ShortlistRetrieval(Retrieval):
    """One trace by an index' vectors, in the order of a scorer that is given only what these list."""

    scorer: Any = None
    listed: dict[int, list[Side]] = field(default_factory=dict)
    """The lists as the index has them, by the identity of what is known of a query."""

    @property
    def is_exact(self) -> bool:
        """Scores of another kind than the index' decide the order."""
        return True

    @property
    def _length(self) -> int:
        assert self.settings.shortlist is not None, "it is set"
        return self.settings.shortlist

    def _shorten(self, result: QueryResult, noise: Noise | None) -> None:
        """The lists are as long as they were asked for."""
        self.listed[id(result)] = result.sides

    def _rerank(self, results: list[QueryResult]) -> None:
        texts = [QueryText(query.answer.prompt, query.answer.completion, query.sequences[0].encoded)
                 for query in self.queries]  # fmt: skip
        targets = [Target(f"query {number}", [text]) for number, text in enumerate(texts)]
        view, lists = IndexView(self.index), [result.rows for result in results]
        if self._length < len(self.index.store.rankable()):
            found = self.scorer.of_lists(view, targets, lists)
        else:
            found = [line[rows] for line, rows in zip(self.scorer(view, targets), lists, strict=True)]
        for result, rows, scores in zip(results, lists, found, strict=True):
            own = {row: score for row, score in zip(rows, scores.tolist(), strict=True) if score > -torch.inf}
            result.sides = []
            for sign in (1, -1):
                order = sorted(own, key=lambda row, own=own, sign=sign: (-sign * own[row], row))
                result.sides.append(Side(sign, order, [own[row] for row in order]))

    def _best_z(self, result: QueryResult, hits: Sequence[Hit], controls: nulls.Controls) -> float | None:
        """Of the index' own best, as the level is."""
        side = self.listed[id(result)][0].cut(self.settings.top)
        return super()._among(result, side, controls, nulls.best_z) if side.rows else None

    def _among(self, result: QueryResult, side: Side, controls: nulls.Controls, measure: Callable[..., Any]) -> Any:
        """By the index' scores."""
        if id(result) in self.listed:
            own = {row: score for listed in self.listed[id(result)]
                   for row, score in zip(listed.rows, listed.scores, strict=True)}  # fmt: skip
            side = Side(side.sign, side.rows, [own[row] for row in side.rows])
        return super()._among(result, side, controls, measure)


def list_words(settings: TraceSettings, rankable: int, queries: int) -> str:
    """Which rows were scored, in words."""
    m = list_length(settings, rankable, queries)
    if m == rankable:
        return f"all {number_of(rankable, 'row')}"
    listed_by = catalogue.trace_method(settings.method).listed_by
    return f"the first {m:,} and the last {m:,} rows as {listed_by} ranks them by the index"


def list_note(settings: TraceSettings, words: str, *, has_null: bool) -> str:
    """What a person should know of it."""
    listed_by = catalogue.trace_method(settings.method).listed_by
    of_null = f"; z and the verdict are of {listed_by}'s scores" if has_null else ""
    return f"{settings.method} scored {words}{of_null}."
