"""The ablate job: the loss that any mixture of a pool's partitions would have given, without training on it.

Every candidate mixture gets, on every evaluation set, proxies of the loss of a model trained on the mixture:

    merged      loss of the members' weighted mean (`merging`), which is claimed to rank candidates
    mean        weighted mean of the members' own losses, in nats (the log of a geometric mean of perplexities)
    midpoint    mean of these two, which err differently: a merged model forgets less than its members do
    mean_ppl    log of the weighted mean of their perplexities
    best        the smallest of the members' losses
    ngram       KL divergence of the set's hashed n-grams from the mixture's: it needs no model
    parent      loss of theta_0, the same for all candidates: it ranks nothing

and with `truth` the loss of a model really trained on the mixture, and how well each proxy ranks (`rank_agreement`).
A merged loss ranks candidates; its level is off, since a mean of K members has moved 1 / sqrt(K) as far as one
member, whereas the real model has taken K times the steps.

Losses are stored in the pool by content, so that the same candidates are never measured twice.

Source: Na et al. 2024, https://arxiv.org/abs/2410.15661.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whence import outlets, runner
from whence.ablation.averages import ALPHA, RegMean
from whence.ablation.candidates import Candidate, read_candidates
from whence.ablation.gram_matrices import averaging
from whence.ablation.heldout_losses import EvalSet, Losses, content_name, measure, read_sets, stored_losses
from whence.ablation.member_training import (
    PoolSettings,
    pool_place,
    read_partitions,
    recipe_of,
    refuse_other_rows,
    slug,
    true_model,
)
from whence.ablation.mixed_model import mixed_model
from whence.ablation.pool import Pool, date_in, open_pool
from whence.ablation.rank_agreement import Agreement, agreement, centred, groups
from whence.corpus.layouts import Row, row_text
from whence.corpus.partitions import Partition
from whence.corpus.reading import Corpus, open_corpus
from whence.counts import number_of
from whence.errors import ManifestMismatchError, SettingError
from whence.local_files import remove_directory
from whence.models.loading import load_model
from whence.paths import may_exist
from whence.selection.scorers.lexical import gram_divergence, mixture_divergence

PROXIES = ("merged", "mean", "midpoint", "mean_ppl", "best", "ngram", "parent")


@dataclass(frozen=True)
class Cell:
    """A candidate on an evaluation set, in nats a token."""

    mixture: str
    set: str
    contained: bool
    """Whether the set's own partition is in the mixture."""
    merged: float
    low: float
    """Lower end of the 95% interval of `merged`, over the set's rows."""
    high: float
    """Upper end of it."""
    bits_per_byte: float
    """Bits per byte of the merged model."""
    mean: float
    mean_ppl: float
    best: float
    ngram: float | None
    parent: float
    truth: float | None = None

    @property
    def midpoint(self) -> float:
        """Mean of the merged model's loss and the mean of the members' losses."""
        return (self.merged + self.mean) / 2

    def row(self) -> dict[str, Any]:
        """The cell as plain values, with the merged model's perplexity."""
        return dict(self.__dict__) | {"midpoint": self.midpoint, "perplexity": math.exp(min(self.merged, 700.0))}


@dataclass(frozen=True)
class Ablation:
    """The result of an ablate job."""

    cells: list[Cell]
    candidates: list[Candidate]
    agreements: dict[str, dict[str, dict[str, Agreement]]] = field(default_factory=dict)
    """Agreement with the truth, if it was trained: by evaluation set (and "all sets", centred), group and proxy."""
    cost: dict[str, float] = field(default_factory=dict)
    """Tokens trained for the pool and for the truth, seconds of both, and the number of candidates above which the pool
    is cheaper."""
    notes: list[str] = field(default_factory=list)

    to_arrow = outlets.to_arrow
    to_pandas = outlets.to_pandas
    save = outlets.save
    _repr_html_ = outlets.as_html

    def __repr__(self) -> str:
        """How much was read, the best mixture, and how to go on."""
        gained = self.gained()
        lines = [f"Ablation({number_of(len(gained), 'mixture')} on {number_of(len(self.best()), 'evaluation set')})"]
        if gained:
            name, change = next(iter(gained.items()))
            lines.append(f"  best: {name}, {change:+.3f} nats a token against the parent, mean over sets")
        return "\n".join([*lines, "  More: .rows() as a table, .best() by set, .gained(), .agreements, .cost, .notes"])

    def best(self) -> dict[str, str]:
        """The mixture with the smallest merged loss, by set."""
        sets = dict.fromkeys(cell.set for cell in self.cells)
        return {name: min((cell for cell in self.cells if cell.set == name), key=lambda cell: cell.merged).mixture
                for name in sets}  # fmt: skip

    def gained(self, by: str = "merged") -> dict[str, float]:
        """Merged or true loss less the parent's, in nats, the mean over sets, by mixture; the best comes first.

        Mixtures without such a loss, such as the true one of what was not trained, are left out.
        """
        changes: dict[str, list[float]] = {}
        for cell in self.cells:
            if (loss := getattr(cell, by)) is not None:
                changes.setdefault(cell.mixture, []).append(loss - cell.parent)
        means = {name: math.fsum(differences) / len(differences) for name, differences in changes.items()}
        return dict(sorted(means.items(), key=lambda pair: pair[1]))

    def rows(self) -> list[Row]:
        """Cells as plain values, each with its mixture's shares as `mixture/NAME`: a table that `mix law` reads."""
        names = list(dict.fromkeys(name for candidate in self.candidates for name in candidate.weights))
        shares = {candidate.name: {f"mixture/{name}": candidate.weights.get(name, 0.0) for name in names}
                  for candidate in self.candidates}  # fmt: skip
        return [cell.row() | shares[cell.mixture] for cell in self.cells]


def ablate(
    pool: str | Path | Pool,
    evaluated: str | Path | Sequence[str | Path] | Sequence[EvalSet],
    *,
    mixtures: str | Path | Sequence[Mapping[str, Any]] | None = None,
    truth: bool = False,
    corpus: str | Path | Corpus | Iterable[Row] | None = None,
    scale: float = 1.0,
    method: str = "mean",
    alpha: float = ALPHA,
    max_tokens: int | None = None,
    tokens_per_batch: int = 4096,
    seed: int = 0,
    progress: runner.ProgressOption = True,
) -> Ablation:
    """Losses of mixtures on evaluation sets.

    Args:
        pool: A pool of `train_pool`.
        evaluated: Files or directories of held-out rows; each file is one set.
        mixtures: A file or rows, each with partitions as columns or with `weights`, and where given a `name` and
            `budgets`. None: every partition alone, all pairs, and all together.
        truth: Also train a model on every candidate.
        corpus: Corpus that the pool was trained on, for `truth`, n-grams and RegMean; None: the address that the pool
            stores.
        scale: Factor of the members' moves; see `merging`.
        method: How members are averaged: "mean", or "regmean", which collects inputs once; see `gram_matrices`.
        alpha: RegMean's factor of off-diagonals.
        max_tokens: Windows of evaluation texts, in tokens; None: as members were trained.
        tokens_per_batch: Tokens of an evaluation's pass.
        seed: Seed of intervals.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).

    Raises:
        SettingError: A mixture names an unknown partition or does not sum to 1; `truth` has no corpus.
        CorpusError: An evaluation set has no text.
    """
    opened = pool if isinstance(pool, Pool) else open_pool(pool)
    if len(opened.members) < 2:
        raise SettingError(f"{opened.place.root}: {len(opened.members)} member; two or more are expected, to be mixed")
    sets = _sets(evaluated)
    candidates = read_candidates(opened, mixtures)
    settings = recipe_of(opened)
    corpus = None if corpus is None else open_corpus(corpus)  # read twice, which a stream of rows cannot be
    regmean = averaging(opened, method, alpha=alpha, corpus=corpus, progress=progress)
    evaluator = _Evaluator(opened, sets, max_tokens or settings.max_tokens, tokens_per_batch, scale, regmean)
    start = time.perf_counter()
    merged = evaluator.merged(candidates, progress=progress)
    merged_seconds = time.perf_counter() - start
    partitions, partition_notes = _partitions(opened, corpus, settings, is_needed=truth or corpus is not None)
    if truth and partitions is None:
        raise SettingError(f"--truth: {opened.place.root} does not know its corpus any more; give it with --corpus")
    missing = _missing_partitions(opened, candidates, partitions)
    if truth and missing:
        raise SettingError(
            f"--truth: the corpus has no row of the partition {missing[0]}; give one with all as --corpus"
        )
    true: dict[str, dict[str, Losses]] = {}
    if truth and partitions is not None:
        start = time.perf_counter()
        true = evaluator.truths(candidates, partitions, progress=progress)
    truth_seconds = time.perf_counter() - start if truth else 0.0
    cells = [
        cell
        for evaluated_set in sets
        for cell in _cells(opened, evaluated_set, candidates, merged, true, partitions, seed)
    ]
    return Ablation(
        cells=cells,
        candidates=candidates,
        agreements=_agreements(cells, seed) if truth else {},
        cost=_cost(opened, settings, candidates, merged_seconds, truth_seconds, truth=truth),
        notes=[*_notes(cells, candidates, opened, missing), *partition_notes, *_regmean_notes(regmean)],
    )


# -- losses


@dataclass(frozen=True)
class _Evaluator:
    """Measures the losses of models on all sets, of each model once."""

    pool: Pool
    sets: Sequence[EvalSet]
    max_tokens: int
    tokens_per_batch: int
    scale: float
    regmean: RegMean | None = None

    def merged(
        self, candidates: Sequence[Candidate], *, progress: runner.ProgressOption
    ) -> dict[str, dict[str, Losses]]:
        """Losses of merged models by candidate and set; also of single members, and of the parent under the name ""."""
        self.pool.check()  # losses are stored by members' checksums: so the members must have them
        mixed = mixed_model(self.pool, scale=self.scale, regmean=self.regmean)
        mixtures: dict[str, Mapping[str, float] | None] = {"": None}
        mixtures |= {_member_name(name): {name: 1.0} for name in self.pool.members}
        mixtures |= {candidate.name: candidate.weights for candidate in candidates}
        by_name: dict[str, dict[str, Losses]] = {}
        with runner.progress("Reading mixtures", len(mixtures), unit="mixtures", shown=progress) as tick:
            for name, weights in mixtures.items():
                key = None if weights is None else {partition: [self.pool.members[partition].sha256, weight]
                                                    for partition, weight in weights.items()}  # fmt: skip
                by_name[name] = {
                    evaluated.name: stored_losses(
                        pool_place(self.pool, "losses"),
                        ["merged", self.pool.parent_digest, key, self.scale, evaluated.digest, self.max_tokens,
                         *self._method(weights)],
                        lambda evaluated=evaluated, weights=weights: measure(
                            mixed.become(weights), evaluated, max_tokens=self.max_tokens,
                            tokens_per_batch=self.tokens_per_batch),
                    )
                    for evaluated in self.sets
                }  # fmt: skip
                tick(1, sum(int(losses.tokens.sum()) for losses in by_name[name].values()))
        return by_name

    def _method(self, weights: Mapping[str, float] | None) -> list[Any]:
        """The key of RegMean, on which a merged loss depends; empty for the mean, and for a single member."""
        if self.regmean is None or weights is None or len(weights) == 1:
            return []
        return ["regmean", self.regmean.alpha, {name: self.regmean.digests[name] for name in weights}]

    def truths(
        self, candidates: Sequence[Candidate], partitions: Mapping[str, Partition], *, progress: runner.ProgressOption
    ) -> dict[str, dict[str, Losses]]:
        """Losses of models really trained, by candidate and set; an interrupted training is done again."""
        by_name: dict[str, dict[str, Losses]] = {}
        digests = {name: partition.digest for name, partition in partitions.items()}
        with runner.progress("Training on mixtures", len(candidates), unit="mixtures", shown=progress) as tick:

            def work(candidate: Candidate, report: runner.Tick) -> dict[str, Losses]:
                key = ["truth", self.pool.parent_digest, dict(self.pool.recipe), dict(candidate.weights),
                       candidate.budgets, {name: digests[name] for name in candidate.weights}]  # fmt: skip
                training = _TrueModel(self.pool, partitions, candidate, content_name(key))
                place = pool_place(self.pool, "losses")
                losses = {
                    evaluated.name: stored_losses(
                        place,
                        [*key, evaluated.digest, self.max_tokens],
                        lambda evaluated=evaluated: measure(
                            load_model(training.path(), dtype="float32", date=date_in(self.pool)),
                            evaluated, max_tokens=self.max_tokens, tokens_per_batch=self.tokens_per_batch),
                    )
                    for evaluated in self.sets
                }  # fmt: skip
                training.remove()
                report(1, 0)
                return losses

            for candidate, losses in runner.map(work, candidates, on_tick=tick):
                by_name[candidate.name] = losses
        return by_name


@dataclass
class _TrueModel:
    """A model really trained on a candidate; the training starts at the first use."""

    pool: Pool
    partitions: Mapping[str, Partition]
    candidate: Candidate
    content: str
    """Digest of all that its training depends on."""
    trained: Path | None = None

    @property
    def directory(self) -> Path:
        """Directory of its training, inside the pool."""
        return self.pool.place.scratch / "truth" / f"{slug(self.candidate.name)}-{self.content[:12]}"

    def path(self) -> Path:
        """Directory of the model, which is trained if it is not there."""
        if self.trained is None:
            weights, budgets = self.candidate.weights, self.candidate.budgets
            self.trained = true_model(self.pool, self.partitions, weights, self.directory, budgets=budgets)
        return self.trained

    def remove(self) -> None:
        """Remove the model, also that of a run which was stopped before it came to that; its losses are stored."""
        remove_directory(self.directory)
        with suppress(OSError):  # others are being trained there, or none was
            self.directory.parent.rmdir()


def _member_name(name: str) -> str:
    """Name of a single member among the models; no candidate can have it."""
    return f"\0{name}"


def _cells(
    pool: Pool,
    evaluated: EvalSet,
    candidates: Sequence[Candidate],
    merged: Mapping[str, Mapping[str, Losses]],
    true: Mapping[str, Mapping[str, Losses]],
    partitions: Mapping[str, Partition] | None,
    seed: int,
) -> Iterable[Cell]:
    """All candidates on one set."""
    set_partitions = own_partitions(pool, evaluated)
    members = {name: merged[_member_name(name)][evaluated.name].loss for name in pool.members}
    grams = None
    if partitions is not None and all(name in partitions for name in pool.members):
        texts = {name: (row_text(piece.row) for piece in partitions[name].pieces) for name in pool.members}
        grams = gram_divergence((row_text(row) for row in evaluated.rows), texts)
    for candidate in candidates:
        losses = merged[candidate.name][evaluated.name]
        low, high = losses.interval(seed=seed)
        weights = candidate.weights
        shares = [weights.get(name, 0.0) for name in pool.members]
        yield Cell(
            mixture=candidate.name,
            set=evaluated.name,
            contained=any(weights.get(name) for name in set_partitions),
            merged=losses.loss,
            low=low,
            high=high,
            bits_per_byte=losses.bits_per_byte,
            mean=math.fsum(weight * members[name] for name, weight in weights.items()),
            mean_ppl=math.log(math.fsum(weight * math.exp(members[name]) for name, weight in weights.items())),
            best=min(members[name] for name in weights),
            ngram=None if grams is None else mixture_divergence(*grams, shares),
            parent=merged[""][evaluated.name].loss,
            truth=true[candidate.name][evaluated.name].loss if true else None,
        )


def own_partitions(pool: Pool, evaluated: EvalSet) -> list[str]:
    """Partitions that a set belongs to: by its name, also as units, or by its rows' value in the partition column."""
    column = str(pool.recipe.get("by", "source"))
    values = {str(row.get(column)) for row in evaluated.rows}
    names = {evaluated.name} | (values if len(values) == 1 else set())
    return [name for name in pool.members if name in names or name.rpartition("/")[0] in names]


def _agreements(cells: Sequence[Cell], seed: int) -> dict[str, dict[str, dict[str, Agreement]]]:
    """Agreement by set, group of candidates, and proxy."""
    agreements: dict[str, dict[str, dict[str, Agreement]]] = {}
    sets = list(dict.fromkeys(cell.set for cell in cells))
    for name in sets:
        set_cells = [cell for cell in cells if cell.set == name]
        contained = {cell.mixture for cell in set_cells if cell.contained}
        for group, places in groups([cell.mixture for cell in set_cells], contained.__contains__).items():
            group_cells = [set_cells[place] for place in places]
            for proxy in PROXIES:
                values = [getattr(cell, proxy) for cell in group_cells]
                if None in values:
                    continue
                truths = [cell.truth for cell in group_cells if cell.truth is not None]
                of_group = agreement(values, truths, seed=seed)
                if of_group is not None:
                    agreements.setdefault(name, {}).setdefault(group, {})[proxy] = of_group
    for proxy in PROXIES:
        by_set = {name: [cell for cell in cells if cell.set == name] for name in sets}
        if any(getattr(cell, proxy) is None for cell in cells):
            continue
        values = centred({name: [getattr(cell, proxy) for cell in by_set[name]] for name in sets})
        truths = centred({name: [cell.truth for cell in by_set[name] if cell.truth is not None] for name in sets})
        of_all = agreement(values, truths, seed=seed, sets=len(sets))
        if of_all is not None:
            agreements.setdefault("all sets", {}).setdefault("all", {})[proxy] = of_all
    return agreements


def _cost(
    pool: Pool, settings: PoolSettings, candidates: Sequence[Candidate], reading: float, training: float, *, truth: bool
) -> dict[str, float]:
    """Cost of the pool, and of training on every candidate."""
    mean_budgets = math.fsum(candidate.budgets for candidate in candidates) / len(candidates)
    cost = {
        "pool tokens": float(sum(member.tokens for member in pool.members.values())),
        "candidates": float(len(candidates)),
        "tokens of training every candidate": mean_budgets * len(candidates) * settings.tokens,
        "break-even candidates": len(pool.members) / mean_budgets,
        "reading seconds": reading,
    }
    return cost | ({"truth seconds": training} if truth else {})


def _notes(cells: Sequence[Cell], candidates: Sequence[Candidate], pool: Pool, missing: Sequence[str]) -> list[str]:
    """Limits of the result that a reader has to know, one sentence each."""
    notes = ["Losses of averages say which mixture is better, not what loss a model trained on it has."]
    if any(len({*candidate.weights.values()}) > 1 for candidate in candidates):
        notes.append(
            "Weights that are not uniform are Whence's extension of the method: docs/results/ablation.md measures it."
        )
    worse = [name for name in dict.fromkeys(cell.set for cell in cells)
             if all(cell.merged > cell.parent for cell in cells if cell.set == name)]  # fmt: skip
    if worse:
        notes.append(f"On {', '.join(worse)} every mixture is worse than the parent: training only forgets it.")
    if missing:
        notes.append(f"The corpus has no row of the partition {missing[0]}: no n-gram similarity is told.")
    if any(member.kind == "delta" for member in pool.members.values()):
        notes.append("Members are stored in bfloat16: to 2^-9 of each weight's move.")
    return notes


def _regmean_notes(regmean: RegMean | None) -> list[str]:
    return [] if regmean is None else [f"Linear layers are averaged by RegMean, alpha {regmean.alpha:g}."]


def _sets(evaluated: str | Path | Sequence[str | Path] | Sequence[EvalSet]) -> list[EvalSet]:
    if isinstance(evaluated, str | Path):
        return read_sets([evaluated])
    entries = list(evaluated)
    sets = [entry for entry in entries if isinstance(entry, EvalSet)]
    return sets if sets else read_sets(str(entry) for entry in entries)


def _partitions(
    pool: Pool, corpus: str | Path | Corpus | Iterable[Row] | None, settings: PoolSettings, *, is_needed: bool
) -> tuple[dict[str, Partition] | None, list[str]]:
    """Partitions of the given corpus, or of the one at the address that the pool stores; and notes.

    A corpus that has changed is refused if it is needed, and else not used.
    """
    origin = corpus if corpus is not None else pool.corpus
    if origin is None or (corpus is None and not may_exist(str(origin))):
        return None, []
    opened = open_corpus(origin)
    partitions = read_partitions(pool.parent, opened, settings, date=date_in(pool))
    try:
        for partition in partitions.values():
            refuse_other_rows(pool, partition, opened.name)
    except ManifestMismatchError:
        if is_needed:
            raise
        return None, [f"{opened.name} has other rows than members were trained on: no n-gram similarity is told."]
    return partitions, []


def _missing_partitions(
    pool: Pool, candidates: Sequence[Candidate], partitions: Mapping[str, Partition] | None
) -> list[str]:
    """Partitions of candidates that the corpus does not have."""
    used = {name for candidate in candidates for name in candidate.weights}
    return [] if partitions is None else [name for name in pool.partitions if name in used and name not in partitions]
