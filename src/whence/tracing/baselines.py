"""Traces by methods that read the corpus itself, without the index' vectors: unprojected gradients, and scorers.

Every trace takes a pass over the rows, which is as long as indexing them. Larger scores are more helpful. Rows that the
index cannot rank, or that have no finite score, are never ranked.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from whence import catalogue
from whence.gradients.corpus_scores import corpus_scores, groups_that_fit
from whence.indexing.opening import Index
from whence.runner import counting
from whence.selection.pipeline import build_scorer
from whence.selection.protocols import QueryText, Target
from whence.selection.views import IndexView
from whence.tracing.queries import EncodedQuery, query_vectors
from whence.tracing.results import Hit, Trace
from whence.turns import TURN


def from_scorer(
    index: Index, queries: list[EncodedQuery], *, method: str, top: int, objective: str, seed: int,
    options: Mapping[str, Any] | None = None
) -> Trace:  # fmt: skip
    """A trace by a method that reads the corpus itself; for `options` see `all_scores`."""
    scores = all_scores(index, queries, method=method, objective=objective, seed=seed, options=options)
    top = min(top, len(index.store.rankable()))
    out = Trace([query.answer for query in queries], [], method, 0)
    for query, row_scores in enumerate(scores):
        order = row_scores.argsort(descending=True, stable=True)
        order = order[row_scores[order] > -torch.inf].tolist()
        scored = row_scores.masked_fill(row_scores == -torch.inf, torch.inf)
        lowest = scored.argsort(stable=True)[: min(top, len(order))].tolist()
        for sign, numbers in ((1, order[:top]), (-1, lowest)):
            for rank, (number, row) in enumerate(zip(numbers, index.store.read_rows(numbers), strict=True), start=1):
                score = float(row_scores[number])
                out.hits.append(
                    Hit(
                        query,
                        sign * rank,
                        row["id"],
                        score,
                        row["source"],
                        index.shown_row(row),
                        rejected=index.rejected_answer(row),
                    )
                )
    return out


def all_scores(
    index: Index, queries: list[EncodedQuery], *, method: str, objective: str, seed: int,
    options: Mapping[str, Any] | None = None
) -> Float32[Tensor, "q n"]:  # fmt: skip
    """Every row's score for every query, by a method that reads the corpus itself; options are its scorer's.

    Larger is more helpful, in the method's own unit. A row that cannot be ranked, or whose score is NaN, has -inf.
    """
    scores = _scores(index, queries, method=method, objective=objective, seed=seed, options=options or {})
    is_rankable = torch.zeros(scores.shape[1], dtype=torch.bool)
    is_rankable[index.store.rankable()] = True
    return scores.masked_fill(~is_rankable | scores.isnan(), -torch.inf)


def targets_of(queries: list[EncodedQuery]) -> list[Target]:
    """Queries as scorers take them: a target each, of the answer without what it is compared with."""
    texts = [QueryText(q.answer.prompt, q.answer.completion, q.sequences[0].encoded) for q in queries]
    return [Target(f"query {number}", [text]) for number, text in enumerate(texts)]


def _scores(
    index: Index, queries: list[EncodedQuery], *, method: str, objective: str, seed: int, options: Mapping[str, Any]
) -> Float32[Tensor, "q n"]:
    entry, view = catalogue.trace_method(method), IndexView(index)
    if entry.is_solved and entry.scorer is not None:
        vectors = query_vectors(index, [query.sequences for query in queries])
        return view.scores(build_scorer(entry.scorer, seed, options).solved(view, vectors), cosine=False)
    if entry.scorer is not None:
        return build_scorer(entry.scorer, seed, options)(view, targets_of(queries))
    rows = list(view.encoded())
    total = torch.zeros(len(queries), len(rows), dtype=torch.float32)
    space = replace(index.space, normalise="layer" if entry.normalise else "none")
    usable = sum(bool(row.supervised_count) for row in rows)
    passes = len(groups_that_fit(index.layers(index.model()), len(queries))) * len(index.weights)
    with TURN, counting("Scoring examples", usable * passes) as tick:
        for checkpoint in reversed(range(len(index.weights))):
            model = index.model(checkpoint)
            total += index.weights[checkpoint] * corpus_scores(
                model,
                index.layers(model),
                [query.sequences for query in queries],
                rows,
                space,
                cosine=entry.cosine,
                objective=objective,
                tokens_per_batch=view.tokens_per_batch,
                tick=tick,
            )
    return total
