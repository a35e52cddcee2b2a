"""The join: do scores of examples, summed by partition, predict the effect of leaving that partition out?

For a partition u and an evaluation set e, over the rows x of u and the first rows q of e,

    score     mean over q of the sum over x of visits(u) * score(q, x), visits(u) = budget / tokens of u: how often the
              member's training read each of its rows (1 for replay, whose scores are of all readings of its own run);
              a row that was cut between two units counts by its tokens' share
    change    L_e(merge of all members but u) - L_e(merge of all), in nats: above 0, u was needed

and their rank correlation: over all pairs, with each set's own means subtracted from both (for its interval partitions
are drawn anew, each with all of its sets), and within each set. Attribution sees single rows and no training; the pool
sees trainings and no rows. Where both agree, each vouches for the other.

Source: section 12 of the project's notes on ablation; the method is ours.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from whence import catalogue
from whence.ablation.heldout_losses import EvalSet, read_sets
from whence.ablation.member_training import pool_partitions
from whence.ablation.pipeline import ablate
from whence.ablation.pool import Pool, open_pool
from whence.ablation.rank_agreement import centred, rank_correlation, spearman_of
from whence.corpus.layouts import Row
from whence.corpus.partitions import FILE
from whence.corpus.reading import Corpus
from whence.counts import number_of
from whence.errors import SettingError
from whence.indexing.opening import Index
from whence.runner import ProgressOption
from whence.selection.pipeline import build_scorer, open_view, targets_of
from whence.selection.views import CorpusView, IndexView, refuse_contrasts

METHODS = ("influence", "bm25", "rds+")
Units = Mapping[str, Mapping[str, float]]
"""Share of a row's tokens that is in a partition, by partition and by the row's id."""


@dataclass(frozen=True)
class Join:
    """Scores beside changes of loss."""

    points: list[dict[str, Any]]
    """A row for each method, partition and evaluation set, with `score` and `change`."""
    correlations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each method, Spearman over all pairs with its 95% interval, and by evaluation set."""
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """Correlations by method, and how to go on."""
        lines = [f"  {name}: Spearman {marks['spearman']:.2f} ({marks['low']:.2f} to {marks['high']:.2f})"
                 for name, marks in self.correlations.items()]  # fmt: skip
        more = "  More: .points as rows, .correlations, .notes"
        return "\n".join(
            [f"Join({number_of(len(self.points), 'point')}, {number_of(len(lines), 'method')})", *lines, more]
        )


def join(
    source: str | Path | Index,
    pool: str | Path | Pool,
    evaluated: str | Path | Sequence[str | Path] | Sequence[EvalSet],
    *,
    methods: Sequence[str] = METHODS,
    queries: int = 16,
    model: str | None = None,
    corpus: str | Path | Corpus | Iterable[Row] | None = None,
    run: str | Path | None = None,
    seed: int = 0,
    progress: ProgressOption = True,
) -> Join:
    """Compare scores of an index with a pool's leave-one-partition-out changes.

    Args:
        source: Index of the pool's corpus, whose rows have the partitioning column; under the pool's parent, as a rule.
        pool: A pool of `train_pool`.
        evaluated: Files or directories of held-out rows, one set each.
        methods: Names of scorers.
        queries: Number of rows of each set that scores are for, the first ones.
        model: The index's model, where it has moved.
        corpus: The corpus that the pool was trained on, which tells the rows of its units; None: the one that the pool
            names.
        run: A run of `train --replayable` on the pool's corpus from its parent, for methods that replay it.
        seed: Seed of scorers and intervals.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).

    Raises:
        SettingError: A method that replays a run, and no run; fewer than three members, or a partition of which the
            index has no row; for a pool of units, no corpus that tells which rows went into each.
    """
    opened = pool if isinstance(pool, Pool) else open_pool(pool)
    if len(opened.members) < 3:
        raise SettingError(
            f"{opened.place.root}: {number_of(len(opened.members), 'member')}; to leave one out, three or more are "
            "expected"
        )
    sources = [evaluated] if isinstance(evaluated, str | Path) else list(evaluated)
    sets = [item for item in sources if isinstance(item, EvalSet)] or read_sets(str(item) for item in sources)
    units = _token_shares(opened, corpus)
    changes = _changes(opened, sets, progress=progress)
    points: list[dict[str, Any]] = []
    for method in methods:
        read = run if catalogue.scorer_entry(method).needs_run else source
        if read is None:
            raise SettingError(f"--methods {method}: it reads a run of `whence train --replayable`: add --run RUN")
        sums = _summed_scores(read, opened, sets, method, queries, model, seed, units)
        points += [{"method": method, "partition": name, "set": eval_set.name, "score": sums[eval_set.name][name],
                    "change": changes[eval_set.name][name]}
                   for eval_set in sets for name in opened.partitions]  # fmt: skip
    correlations = {
        method: _correlation([row for row in points if row["method"] == method], seed) for method in methods
    }
    return Join(points, correlations)


def _changes(pool: Pool, sets: Sequence[EvalSet], *, progress: ProgressOption) -> dict[str, dict[str, float]]:
    """Change of loss by set and partition."""
    names = pool.partitions
    rows: list[dict[str, Any]] = [{"name": "all", "weights": dict.fromkeys(names, 1 / len(names))}]
    for omitted in names:
        rest = [name for name in names if name != omitted]
        rows.append({"name": f"without {omitted}", "weights": dict.fromkeys(rest, 1 / len(rest))})
    losses = {
        (cell.mixture, cell.set): cell.merged for cell in ablate(pool, sets, mixtures=rows, progress=progress).cells
    }
    return {eval_set.name: {name: losses[f"without {name}", eval_set.name] - losses["all", eval_set.name]
                            for name in names} for eval_set in sets}  # fmt: skip


def _summed_scores(
    source: str | Path | Index,
    pool: Pool,
    sets: Sequence[EvalSet],
    method: str,
    queries: int,
    model: str | None,
    seed: int,
    units: Units | None,
) -> dict[str, dict[str, float]]:
    """Scores summed by set and partition; the rows are read once for all sets."""
    counts_readings = catalogue.scorer_entry(method).needs_run  # a replay's score is of all of them
    view = open_view(source, method, model=None if counts_readings else model)
    refuse_contrasts(view, "the pool's models are trained on the chosen answers alone")
    lengths = torch.tensor([len(encoded.ids) for encoded in view.encoded()], dtype=torch.float64)
    shares, out = _row_shares(pool, view, units), {}
    targets = [[replace(target, name=f"{eval_set.name}: {target.name}")
                for target in targets_of(list(eval_set.rows[:queries]), view)[0]] for eval_set in sets]  # fmt: skip
    all_scores = build_scorer(method, seed, {})(view, [target for of_set in targets for target in of_set]).double()
    for eval_set, set_scores in zip(sets, all_scores.split([len(of_set) for of_set in targets]), strict=True):
        scores = set_scores.mean(0)
        scores = torch.where(scores.isfinite(), scores, 0.0)
        visits = {
            name: 1.0 if counts_readings else pool.members[name].tokens / float((lengths * share).sum())
            for name, share in shares.items()
        }
        out[eval_set.name] = {name: float((scores * share).sum()) * visits[name] for name, share in shares.items()}
    return out


def _row_shares(pool: Pool, view: IndexView | CorpusView, units: Units | None) -> dict[str, Float64[Tensor, " n"]]:
    """Share of every row that is in a partition, by partition: 0 or 1, except for rows that were cut into units."""
    column = str(pool.recipe.get("by", "source"))
    if units is None:
        owners = [str(row.get(column)) for row in view.examples()]
        shares = {name: torch.tensor([float(owner == name) for owner in owners]) for name in pool.partitions}
    else:
        ids = list(view.ids())
        shares = {name: torch.tensor([units[name].get(id, 0.0) for id in ids]) for name in pool.partitions}
    if empty := [name for name, share in shares.items() if not share.any()]:
        raise SettingError(
            f"the index has no row of the partition {empty[0]} (column {column!r}): index the pool's corpus"
        )
    return {name: share.double() for name, share in shares.items()}


def _token_shares(pool: Pool, corpus: str | Path | Corpus | Iterable[Row] | None) -> Units | None:
    """Share of each row's tokens in each unit or file of a pool that was cut into these; None for any other pool."""
    if pool.recipe.get("unit_tokens") is None and pool.recipe.get("by") != FILE:
        return None
    partitions = pool_partitions(pool, corpus, pool.partitions)
    counts = {name: Counter[str]() for name in partitions}
    for name, partition in partitions.items():
        for piece in partition.pieces:
            counts[name][str(piece.row["id"]).rpartition("#")[0]] += piece.tokens
    whole = sum(counts.values(), Counter[str]())
    return {name: {id: tokens / whole[id] for id, tokens in by_id.items()} for name, by_id in counts.items()}


def _correlation(points: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    sets = list(dict.fromkeys(row["set"] for row in points))
    by_set = {name: [row for row in points if row["set"] == name] for name in sets}
    ranks = {name: standardised([row["score"] for row in rows]) for name, rows in by_set.items()}
    changes = {name: standardised([row["change"] for row in rows]) for name, rows in by_set.items()}
    x, y = (torch.tensor(centred(values), dtype=torch.float64) for values in (ranks, changes))
    whole, (low, high) = rank_correlation(x, y, sets=len(sets), seed=seed)
    by_name = {name: spearman_of(torch.tensor([[*zip(ranks[name], changes[name], strict=True)]], dtype=torch.float64))
               for name in sets}  # fmt: skip
    return {"spearman": whole, "low": low, "high": high, "by set": by_name, "pairs": len(x)}


def standardised(values: Sequence[float]) -> list[float]:
    """Values less their mean, over their standard deviation, so that sets of large losses do not decide alone."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return ((tensor - tensor.mean()) / tensor.std().clamp_min(1e-30)).tolist()
