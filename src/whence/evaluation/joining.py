"""The join: do scores of examples, summed by partition, say what leaving that partition out does?

For a partition u and an evaluation set e, over the rows x of u and the first rows q of e,

    score     mean over q of the sum over x of visits(u) * score(q, x), visits(u) = budget / tokens of u: how often the
              member's training read each of its rows; of a row that was cut between two units, the share of its tokens
    change    L_e(merge of all members but u) - L_e(merge of all), in nats: above 0, u was needed

and their rank correlation: over all pairs with each set's own means taken off both (its interval: partitions drawn
anew, each with all of its sets), and within each set. Attribution
sees single rows and no training; the pool sees trainings and no rows. Where both agree, each vouches for the other.

Source: section 12 of the project's notes on ablation; ours.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from whence.ablation.heldout_losses import EvalSet, read_sets
from whence.ablation.member_training import pool_partitions
from whence.ablation.pipeline import ablate
from whence.ablation.pool import Pool, open_pool
from whence.ablation.rank_agreement import centred, rank_correlation, spearman_of
from whence.corpus.layouts import Row
from whence.corpus.partitions import FILE
from whence.corpus.reading import Corpus
from whence.errors import SettingError
from whence.indexing.build import Index
from whence.selection.pipeline import made_scorer, open_view, targets_of
from whence.selection.views import CorpusView, IndexView

METHODS = ("influence", "bm25", "rds+")
Units = Mapping[str, Mapping[str, float]]
"""By partition and a row's id, the share of the row's tokens that is in it."""


@dataclass(frozen=True)
class Join:
    """Scores beside changes."""

    points: list[dict[str, Any]]
    """A row each method, partition and evaluation set: `score` and `change`."""
    correlations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By method: Spearman over all pairs with its 95% interval, and by evaluation set."""
    notes: list[str] = field(default_factory=list)


def join(
    source: str | Path | Index,
    pool: str | Path | Pool,
    evaluated: str | Path | Sequence[str | Path] | Sequence[EvalSet],
    *,
    methods: Sequence[str] = METHODS,
    queries: int = 16,
    model: str | None = None,
    corpus: str | Path | Corpus | Iterable[Row] | None = None,
    seed: int = 0,
    shown: bool = True,
) -> Join:
    """Compare scores of an index with a pool's leave-one-partition-out changes.

    Args:
        source: Index of the pool's corpus, whose rows have the partitioning column; under the pool's parent, as a rule.
        pool: Of `train_pool`.
        evaluated: Files or directories of held-out rows, one set each.
        methods: Names of scorers.
        queries: Rows of each set that are asked for, the first ones.
        model: Of the index, where it has moved.
        corpus: That the pool was trained on, of which its units are counted off; None: where the pool remembers it.
        seed: Of scorers and intervals.
        shown: Show bars.

    Raises:
        SettingError: Fewer than three members, no partition of the pool in the index, or no row of one; of a pool of
            units, no corpus that says which rows went into each.
    """
    own = pool if isinstance(pool, Pool) else open_pool(pool)
    if len(own.members) < 3:
        raise SettingError(
            f"{own.place.root}: {len(own.members)} members; to leave one out, three or more are expected"
        )
    given = [evaluated] if isinstance(evaluated, str | Path) else list(evaluated)
    sets = [one for one in given if isinstance(one, EvalSet)] or read_sets(str(one) for one in given)
    units = _shares_of_units(own, corpus)
    changes = _changes(own, sets, shown=shown)
    points: list[dict[str, Any]] = []
    for method in methods:
        summed = _scores(source, own, sets, method, queries, model, seed, units)
        points += [{"method": method, "partition": name, "set": one.name, "score": summed[one.name][name],
                    "change": changes[one.name][name]} for one in sets for name in own.partitions]  # fmt: skip
    found = {method: _correlation([row for row in points if row["method"] == method], seed) for method in methods}
    return Join(points, found)


def _changes(pool: Pool, sets: Sequence[EvalSet], *, shown: bool) -> dict[str, dict[str, float]]:
    """By set and partition."""
    names = pool.partitions
    rows: list[dict[str, Any]] = [{"name": "all", "weights": dict.fromkeys(names, 1 / len(names))}]
    for left in names:
        rest = [name for name in names if name != left]
        rows.append({"name": f"without {left}", "weights": dict.fromkeys(rest, 1 / len(rest))})
    found = {(cell.mixture, cell.set): cell.merged for cell in ablate(pool, sets, mixtures=rows, shown=shown).cells}
    return {one.name: {name: found[f"without {name}", one.name] - found["all", one.name] for name in names}
            for one in sets}  # fmt: skip


def _scores(
    source: str | Path | Index,
    pool: Pool,
    sets: Sequence[EvalSet],
    method: str,
    queries: int,
    model: str | None,
    seed: int,
    units: Units | None,
) -> dict[str, dict[str, float]]:
    """Summed by set and partition; the rows are read once for all sets."""
    view = open_view(source, method, model=model)
    lengths = torch.tensor([len(encoded.ids) for encoded in view.encoded()], dtype=torch.float64)
    members, out = _members(pool, view, units), {}
    targets = [[replace(target, name=f"{one.name}: {target.name}")
                for target in targets_of(list(one.rows[:queries]), view)[0]] for one in sets]  # fmt: skip
    found = made_scorer(method, seed, {})(view, [target for own in targets for target in own]).double()
    for one, own in zip(sets, found.split([len(own) for own in targets]), strict=True):
        scores = own.mean(0)
        scores = torch.where(scores.isfinite(), scores, 0.0)
        out[one.name] = {
            name: float((scores * share).sum() * pool.members[name].tokens / (lengths * share).sum())
            for name, share in members.items()
        }
    return out


def _members(pool: Pool, view: IndexView | CorpusView, units: Units | None) -> dict[str, Float64[Tensor, " n"]]:
    """By partition, how much of every row went into it: all or nothing, but for rows that were cut into units."""
    column = str(pool.recipe.get("by", "source"))
    if units is None:
        owners = [str(row.get(column)) for row in view.examples()]
        found = {name: torch.tensor([float(owner == name) for owner in owners]) for name in pool.partitions}
    else:
        ids = list(view.ids())
        found = {name: torch.tensor([units[name].get(id, 0.0) for id in ids]) for name in pool.partitions}
    if empty := [name for name, share in found.items() if not share.any()]:
        raise SettingError(
            f"the index has no row of the partition {empty[0]} (column {column!r}): index the pool's corpus"
        )
    return {name: share.double() for name, share in found.items()}


def _shares_of_units(pool: Pool, corpus: str | Path | Corpus | Iterable[Row] | None) -> Units | None:
    """Of a pool that was cut into units or by files, the share of each row's tokens in each; None of any other pool."""
    if pool.recipe.get("unit_tokens") is None and pool.recipe.get("by") != FILE:
        return None
    parts = pool_partitions(pool, corpus, pool.partitions)
    counts = {name: Counter[str]() for name in parts}
    for name, part in parts.items():
        for piece in part.pieces:
            counts[name][str(piece.row["id"]).rpartition("#")[0]] += piece.tokens
    whole = sum(counts.values(), Counter[str]())
    return {name: {id: tokens / whole[id] for id, tokens in own.items()} for name, own in counts.items()}


def _correlation(points: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    sets = list(dict.fromkeys(row["set"] for row in points))
    by_set = {name: [row for row in points if row["set"] == name] for name in sets}
    ranks = {name: standard([row["score"] for row in rows]) for name, rows in by_set.items()}
    changes = {name: standard([row["change"] for row in rows]) for name, rows in by_set.items()}
    x, y = (torch.tensor(centred(values), dtype=torch.float64) for values in (ranks, changes))
    whole, (low, high) = rank_correlation(x, y, sets=len(sets), seed=seed)
    own = {name: spearman_of(torch.tensor([[*zip(ranks[name], changes[name], strict=True)]], dtype=torch.float64))
           for name in sets}  # fmt: skip
    return {"spearman": whole, "low": low, "high": high, "by set": own, "pairs": len(x)}


def standard(values: Sequence[float]) -> list[float]:
    """Over their standard deviation, so that sets of large losses do not decide alone."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return ((tensor - tensor.mean()) / tensor.std().clamp_min(1e-30)).tolist()
