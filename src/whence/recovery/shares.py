"""Shares of sources in what a model was trained on: two ways to estimate them, and the quicker one.

runs        the base is trained on each source, and the weight difference is fitted by the differences of these
models (`source_models`): it costs trainings, and is right under any optimizer
gradients   the difference is fitted by the mean gradients of the sources (`pursuit.mixture`), which the evidence
has: it costs no training, and is right under plain SGD only (docs/results/recovery.md)
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from whence import runner
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus
from whence.errors import SettingError
from whence.numerics import generator
from whence.recovery import pursuit
from whence.recovery.case import Case
from whence.recovery.matching_problem import VectorProblem
from whence.recovery.membership import CorpusEvidence
from whence.recovery.shadow_model import Recipe
from whence.recovery.source_models import MOST_SOURCES, adapter_at_start, mixture_by_runs, rows_to_train, shares_of_rows

MIXTURE_ROWS = 8_000
"""Rows, drawn evenly from all, in the means of sources."""
MOST_FITTED_SOURCES = 256
"""Sources that are fitted by means, at most: so few rows do not tell a thousand apart."""


def shares_of_sources(
    case: Case,
    corpus: Corpus,
    evidence: CorpusEvidence,
    sources: Sequence[str | None],
    recipe: Recipe | None,
    work: Path,
    *,
    how: str | None = None,
    count: int,
    seed: int = 0,
    progress: runner.ProgressOption = True,
) -> list[dict[str, Any]]:
    """Share of every source in the rows trained on and in their supervised tokens, with 95% intervals.

    Args:
        case: Two models.
        corpus: Rows like those trained on.
        evidence: Evidence of these rows.
        sources: Source of each row.
        recipe: Recipe of the training, as a shadow found it; None: no shadow was trained.
        work: Directory of trainings.
        how: "runs", "gradients" or "none"; None: runs where there is a recipe and sources are few enough.
        count: Rows that the model was trained on, about.
        seed: Seed of rows, trainings and intervals.
        progress: Show a bar.

    Returns:
        See `source_models.mixture_by_runs`; empty for a single source.
    """
    if how == "none":
        return []
    usable = torch.tensor([source is not None for source in sources]) & evidence.usable
    names = {sources[number] for number in usable.nonzero()[:, 0].tolist()}
    if recipe is None or how == "gradients" or (how is None and not 2 <= len(names) <= MOST_SOURCES):
        return mixture_of(evidence, sources, seed=seed)
    numbers = _sampled(usable.nonzero()[:, 0], seed)
    rows, names_of_rows = rows_of(corpus, numbers.tolist()), [str(sources[number]) for number in numbers.tolist()]
    tokens, known_recipe = (
        evidence.points["final"].tokens[numbers],
        replace(recipe, rows=count, checkpoints=1, lora=None),
    )
    start = None if case.lora is None else adapter_at_start(case.final, work / "start")
    with runner.progress("Training on each source", rows_to_train(len(names), count), shown=progress) as tick:
        return mixture_by_runs(case.base, rows, names_of_rows, tokens, case.difference, known_recipe, work,
                               start=start, seed=seed, tick=tick)  # fmt: skip


def mixture_of(evidence: CorpusEvidence, sources: Sequence[str | None], *, seed: int = 0) -> list[dict[str, Any]]:
    """Share of every source in what the model was trained on, with 95% intervals; see `pursuit.mixture`.

    Shares are of supervised tokens (`tokens`) and of rows (`share`). The loss is assumed to be a mean over a batch's
    tokens, as a Trainer's, so that a row counts by its tokens, and the fit's shares are of tokens; divided by a
    source's mean number of tokens they are of rows. Where that number varies much, as from a word to a page, so do
    shares of rows.

    The list is empty for a corpus of one source or of more than `MOST_FITTED_SOURCES`, and where no source's mean
    gradient points along the difference.
    """
    rows = evidence.usable.nonzero()[:, 0]
    if not 2 <= len({sources[row] for row in rows.tolist()}) <= MOST_FITTED_SOURCES:
        return []
    rows = _sampled(rows, seed)
    names, tokens = [str(sources[row]) for row in rows.tolist()], evidence.points["final"].tokens[rows].double()
    try:
        problem = VectorProblem(evidence.points["final"].vectors(rows), evidence.sketch)
        fit = pursuit.mixture(problem, names, seed=seed)
    except SettingError:
        return []
    tokens_per_row = torch.stack(
        [tokens[torch.tensor([name == source for name in names])].mean() for source in fit.sources]
    )
    row_shares = shares_of_rows(torch.cat([torch.tensor([fit.shares], dtype=torch.float64), fit.draws]), tokens_per_row)
    low, high = row_shares[1:].quantile(row_shares.new_tensor([0.025, 0.975]), 0).tolist()
    return [
        {"source": name, "share": row_shares[0, place].item(), "low": low[place], "high": high[place],
         "tokens": fit.shares[place], "tokens_low": ends[0], "tokens_high": ends[1]}
        for place, (name, ends) in enumerate(zip(fit.sources, fit.intervals, strict=True))
    ]  # fmt: skip


def _sampled(rows: Int64[Tensor, " m"], seed: int) -> Int64[Tensor, " k"]:
    """At most `MIXTURE_ROWS` of the rows, drawn evenly, ascending."""
    drawn = torch.randperm(len(rows), generator=generator(seed, "recover", "mixture"))[:MIXTURE_ROWS]
    return rows[drawn].sort().values


def rows_of(corpus: Corpus, numbers: Sequence[int]) -> list[Row]:
    """Some rows of a corpus, in the order of `numbers`."""
    selected = {*numbers}
    rows = {number: example.row for number, example in enumerate(corpus) if number in selected}
    return [rows[number] for number in numbers]
