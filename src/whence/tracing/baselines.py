"""Traces by methods that read the corpus itself, without the index' vectors: unprojected gradients, and scorers.

Each takes a pass over the rows for every trace, as long as indexing them. Larger scores are more helpful. Rows that the
index cannot rank, or that the method gives no finite score, are never ranked.
"""

import json
from dataclasses import replace

import torch
from jaxtyping import Float32
from torch import Tensor

from whence import catalogue
from whence.gradients import exact
from whence.indexing.build import Index
from whence.selection.protocols import QueryText, Target
from whence.selection.views import IndexView
from whence.tracing.queries import Asked
from whence.tracing.results import Hit, Trace


def from_scorer(index: Index, asked: list[Asked], *, method: str, top: int, objective: str, seed: int) -> Trace:
    """A trace by a method that reads the corpus itself."""
    scores = all_scores(index, asked, method=method, objective=objective, seed=seed)
    usable = torch.zeros(scores.shape[1], dtype=torch.bool)
    usable[index.store.rankable()] = True
    scores = scores.masked_fill(~usable | scores.isnan(), -torch.inf)
    top = min(top, int(usable.sum()))
    out = Trace([query.answer for query in asked], [], method, 0)
    for query, row_scores in enumerate(scores):
        order = row_scores.argsort(descending=True, stable=True)
        order = order[row_scores[order] > -torch.inf].tolist()
        scored = row_scores.masked_fill(row_scores == -torch.inf, torch.inf)
        lowest = scored.argsort(stable=True)[: min(top, len(order))].tolist()
        for sign, numbers in ((1, order[:top]), (-1, lowest)):
            for rank, (number, row) in enumerate(zip(numbers, index.store.read_rows(numbers), strict=True), start=1):
                score = float(row_scores[number])
                out.hits.append(Hit(query, sign * rank, row["id"], score, row["source"], json.loads(row["row"])))
    return out


def all_scores(index: Index, asked: list[Asked], *, method: str, objective: str, seed: int) -> Float32[Tensor, "q n"]:
    """Every row's score for every query, by a method that reads the corpus itself."""
    entry, view = catalogue.trace_method(method), IndexView(index)
    if entry.scorer is not None:
        texts = [QueryText(q.answer.prompt, q.answer.completion, q.parts[0].encoded) for q in asked]
        targets = [Target(f"query {number}", [text]) for number, text in enumerate(texts)]
        return catalogue.scorer(entry.scorer)(seed=seed)(view, targets)
    rows = list(view.encoded())
    total = torch.zeros(len(asked), len(rows))
    space = replace(index.space, normalise="layer" if entry.normalise else "none")
    for checkpoint in reversed(range(len(index.weights))):
        model = index.model(checkpoint)
        total += index.weights[checkpoint] * exact.corpus_scores(
            model,
            index.layers(model),
            [query.parts for query in asked],
            rows,
            space,
            cosine=entry.cosine,
            objective=objective,
            tokens_per_batch=view.tokens_per_batch,
        )
    return total
