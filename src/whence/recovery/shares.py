"""Shares of sources in what a model was trained on: which of two ways to estimate them, and the quicker one.

runs        the base is trained on each source, and the weight difference fitted by what that does (`source_runs`):
some trainings, and right under any optimizer
gradients   the difference is fitted by the mean gradients of the sources (`selectors.pursuit.mixture`), which are
known from the evidence: no training, and right under plain SGD only (docs/recover.md)
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus
from whence.errors import SettingError
from whence.numerics import generator
from whence.recovery import pursuit
from whence.recovery.atoms import Atoms
from whence.recovery.comparison import Case
from whence.recovery.membership import Seen
from whence.recovery.shadow_model import Recipe
from whence.recovery.source_models import MOST, adapter_at_start, mixture_by_runs, of_rows, rows_to_train
from whence.runner import progress

MIXTURE_ROWS = 8_000
"""Rows, drawn evenly from all, that means of sources are taken from."""
MOST_FITTED = 256
"""Sources whose means are fitted: a thousand would not be told apart by so many rows."""


def shares_of_sources(
    case: Case,
    corpus: Corpus,
    seen: Seen,
    sources: Sequence[str | None],
    recipe: Recipe | None,
    work: Path,
    *,
    how: str | None = None,
    count: int,
    seed: int = 0,
    shown: bool = True,
) -> list[dict[str, Any]]:
    """Share of every source in the rows trained on and in their supervised tokens, with 95% intervals.

    Args:
        case: Two models.
        corpus: Rows like those trained on.
        seen: Evidence of them.
        sources: Of each row.
        recipe: Of the training, as far as a shadow has told; None: none was trained.
        work: Directory of trainings.
        how: "runs", "gradients" or "none"; None: runs where there is a recipe and sources are few enough.
        count: Rows that the model was trained on, about.
        seed: Of rows, trainings and intervals.
        shown: Show a bar.

    Returns:
        See `source_runs.mixture_by_runs`; empty where there is but one source.
    """
    if how == "none":
        return []
    able = torch.tensor([source is not None for source in sources]) & seen.usable
    names = {sources[number] for number in able.nonzero()[:, 0].tolist()}
    if recipe is None or how == "gradients" or (how is None and not 2 <= len(names) <= MOST):
        return mixture_of(seen, sources, seed=seed)
    numbers = _some(able.nonzero()[:, 0], seed)
    rows, own = rows_of(corpus, numbers.tolist()), [str(sources[number]) for number in numbers.tolist()]
    tokens, known = seen.points["final"].tokens[numbers], replace(recipe, rows=count, checkpoints=1, lora=None)
    start = None if case.lora is None else adapter_at_start(case.final, work / "start")
    with progress("Training on each source", rows_to_train(len(names), count), shown=shown) as tick:
        return mixture_by_runs(case.base, rows, own, tokens, case.difference, known, work, start=start, seed=seed,
                               tick=tick)  # fmt: skip


def mixture_of(seen: Seen, sources: Sequence[str | None], *, seed: int = 0) -> list[dict[str, Any]]:
    """Share of every source in what the model was trained on, with 95% intervals; see `pursuit.mixture`.

    Of supervised tokens, `tokens`, and of rows, `share`. The loss is taken for a mean over a batch's tokens, as a
    Trainer's, so that a row counts by its tokens, and the fit's shares are of tokens; over a source's mean number of
    them they are of rows. Where that number varies much, as of answers of a word or a page, so do shares of rows.

    Empty for a corpus of one source, of more than `MOST_FITTED`, and where the mean gradient of none points along the
    difference.
    """
    rows = seen.usable.nonzero()[:, 0]
    if not 2 <= len({sources[row] for row in rows.tolist()}) <= MOST_FITTED:
        return []
    rows = _some(rows, seed)
    names, tokens = [str(sources[row]) for row in rows.tolist()], seen.points["final"].tokens[rows].double()
    try:
        found = pursuit.mixture(Atoms(seen.points["final"].vectors(rows), seen.sketch), names, seed=seed)
    except SettingError:
        return []
    each = torch.stack([tokens[torch.tensor([own == name for own in names])].mean() for name in found.sources])
    counted = of_rows(torch.cat([torch.tensor([found.shares], dtype=torch.float64), found.draws]), each)
    low, high = counted[1:].quantile(counted.new_tensor([0.025, 0.975]), 0).tolist()
    return [
        {"source": name, "share": counted[0, place].item(), "low": low[place], "high": high[place],
         "tokens": found.shares[place], "tokens_low": ends[0], "tokens_high": ends[1]}
        for place, (name, ends) in enumerate(zip(found.sources, found.intervals, strict=True))
    ]  # fmt: skip


def _some(rows: Int64[Tensor, " m"], seed: int) -> Int64[Tensor, " k"]:
    drawn = torch.randperm(len(rows), generator=generator(seed, "recover", "mixture"))[:MIXTURE_ROWS]
    return rows[drawn].sort().values


def rows_of(corpus: Corpus, numbers: Sequence[int]) -> list[Row]:
    """Some rows of a corpus, in the order asked."""
    wanted = {*numbers}
    kept = {number: example.row for number, example in enumerate(corpus) if number in wanted}
    return [kept[number] for number in numbers]
