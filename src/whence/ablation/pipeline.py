"""The ablate job: what any mixture of a pool's partitions would have given, without training it.

For every candidate mixture and evaluation set, proxies of the loss that a model trained on the mixture would have:

    merged      of the members' weighted mean, `merging`; what is claimed to rank candidates
    mean        weighted mean of the members' own losses, in nats (the log of a geometric mean of perplexities)
    midpoint    of the two, which err differently: an average forgets less of what it was not trained on than members do
    mean_ppl    log of the weighted mean of their perplexities
    best        smallest of the members' losses
    ngram       KL of the set's hashed n-grams from the mixture's: no model at all
    parent      of theta_0: the same for all, it ranks nothing

and with `truth` the loss of the model that is really trained on it, and how well each proxy ranked (`agreement`).
A merged loss ranks candidates; its level is off, for a mean of K members has moved 1 / sqrt(K) as far as one, where the
real model has taken K times the steps.

What is measured is kept in the pool by content, so that the same candidates are never measured twice.

Source: Na et al. 2024, https://arxiv.org/abs/2410.15661.
"""

import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whence import runner
from whence.ablation.candidates import Candidate, read_candidates
from whence.ablation.gram_matrices import averaging
from whence.ablation.heldout_losses import EvalSet, Losses, content_name, kept, measure, read_sets
from whence.ablation.member_training import (
    PoolSettings,
    pool_place,
    read_partitions,
    refuse_other_rows,
    slug,
    true_model,
)
from whence.ablation.merging import ALPHA, RegMean, mixed
from whence.ablation.pool import Pool, open_pool
from whence.ablation.rank_agreement import Agreement, agreement, centred, groups
from whence.corpus.layouts import Row, row_text
from whence.corpus.partitions import Partition
from whence.corpus.reading import Corpus, open_corpus
from whence.errors import ManifestMismatchError, SettingError
from whence.models.loading import load_model
from whence.selection.scorers.lexical import gram_divergence, mixture_divergence

PROXIES = ("merged", "mean", "midpoint", "mean_ppl", "best", "ngram", "parent")


@dataclass(frozen=True)
class Cell:
    """A candidate on an evaluation set, in nats a token."""

    mixture: str
    set: str
    contained: bool
    """The set's own partition is in the mixture."""
    merged: float
    low: float
    """95% of `merged`, over the set's rows."""
    high: float
    bits_per_byte: float
    """Of the merged model."""
    mean: float
    mean_ppl: float
    best: float
    ngram: float | None
    parent: float
    truth: float | None = None

    @property
    def midpoint(self) -> float:
        """Between the loss of the average and the average of the losses."""
        return (self.merged + self.mean) / 2

    def row(self) -> dict[str, Any]:
        """As plain values, with the merged model's perplexity."""
        return dict(self.__dict__) | {"midpoint": self.midpoint, "perplexity": math.exp(min(self.merged, 700.0))}


@dataclass(frozen=True)
class Ablation:
    """What an ablate job found."""

    cells: list[Cell]
    candidates: list[Candidate]
    agreements: dict[str, dict[str, dict[str, Agreement]]] = field(default_factory=dict)
    """With truth: by evaluation set (and "all sets", centred), group of candidates, and proxy."""
    cost: dict[str, float] = field(default_factory=dict)
    """Tokens trained for the pool and for the truth, seconds of both, and the number of candidates from which on the
    pool is the cheaper way."""
    notes: list[str] = field(default_factory=list)

    def best(self) -> dict[str, str]:
        """Of every set, the mixture with the smallest merged loss."""
        sets = dict.fromkeys(cell.set for cell in self.cells)
        return {name: min((cell for cell in self.cells if cell.set == name), key=lambda cell: cell.merged).mixture
                for name in sets}  # fmt: skip

    def gained(self) -> dict[str, float]:
        """Of every mixture, the best first, its merged loss less the parent's, in nats: the mean over sets."""
        of: dict[str, list[float]] = {}
        for cell in self.cells:
            of.setdefault(cell.mixture, []).append(cell.merged - cell.parent)
        means = {name: math.fsum(differences) / len(differences) for name, differences in of.items()}
        return dict(sorted(means.items(), key=lambda pair: pair[1]))

    def rows(self) -> list[Row]:
        """Cells as plain values, each with its mixture's shares as `mixture/NAME`: a table that `mix law` reads."""
        names = list(dict.fromkeys(name for candidate in self.candidates for name in candidate.weights))
        shares = {one.name: {f"mixture/{name}": one.weights.get(name, 0.0) for name in names}
                  for one in self.candidates}  # fmt: skip
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
    shown: bool = True,
) -> Ablation:
    """Losses of mixtures on evaluation sets.

    Args:
        pool: Of `train_pool`.
        evaluated: Files or directories of held-out rows, one set each.
        mixtures: A file or rows, each with partitions as columns or with `weights`, and where given a `name` and
            `budgets`. None: every partition alone, all pairs, and all together.
        truth: Train every candidate for real too.
        corpus: That the pool was trained on, for `truth`, n-grams and RegMean; None: where the pool remembers it.
        scale: Of the members' moves; see `merging`.
        method: How members are averaged: "mean" or "regmean", for which inputs are collected once; see `grams`.
        alpha: Of RegMean.
        max_tokens: Windows that evaluation texts are read in; None: those that members were trained on.
        tokens_per_batch: Of evaluation.
        seed: Of intervals.
        shown: Show bars on stderr.

    Raises:
        SettingError: A mixture names what is not there or does not sum to 1; `truth` without the corpus.
        CorpusError: An evaluation set without text.
    """
    own = pool if isinstance(pool, Pool) else open_pool(pool)
    if len(own.members) < 2:
        raise SettingError(f"{own.place.root}: {len(own.members)} member; two or more are expected, to be mixed")
    sets = _sets(evaluated)
    candidates = read_candidates(own, mixtures)
    settings = PoolSettings(**own.recipe)
    corpus = None if corpus is None else open_corpus(corpus)  # rows that come once are read twice
    regmean = averaging(own, method, alpha=alpha, corpus=corpus, shown=shown)
    reader = _Reader(own, sets, max_tokens or settings.max_tokens, tokens_per_batch, scale, regmean)
    start = time.perf_counter()
    measured = reader.merged(candidates, shown=shown)
    seconds = time.perf_counter() - start
    parts, changed = _partitions(own, corpus, settings, is_needed=truth or corpus is not None)
    if truth and parts is None:
        raise SettingError(f"--truth: {own.place.root} does not know its corpus any more; give it with --corpus")
    lost = _lost(own, candidates, parts)
    if truth and lost:
        raise SettingError(f"--truth: the corpus has no row of the partition {lost[0]}; give one with all as --corpus")
    real: dict[str, dict[str, Losses]] = {}
    if truth and parts is not None:
        start = time.perf_counter()
        real = reader.truths(candidates, parts, shown=shown)
    spent = time.perf_counter() - start if truth else 0.0
    cells = [
        cell for evaluated_set in sets for cell in _cells(own, evaluated_set, candidates, measured, real, parts, seed)
    ]
    found = Ablation(
        cells=cells,
        candidates=candidates,
        agreements=_agreements(cells, seed) if truth else {},
        cost=_cost(own, settings, candidates, seconds, spent, truth=truth),
        notes=[*_notes(cells, candidates, own, lost), *changed, *_averaged(regmean)],
    )
    return found


# -- losses


@dataclass(frozen=True)
class _Reader:
    """Measures models on all sets, each model once."""

    pool: Pool
    sets: Sequence[EvalSet]
    max_tokens: int
    tokens_per_batch: int
    scale: float
    regmean: RegMean | None = None

    def merged(self, candidates: Sequence[Candidate], *, shown: bool) -> dict[str, dict[str, Losses]]:
        """By candidate and set; members alone and the parent, called "", among them."""
        own = mixed(self.pool, scale=self.scale, regmean=self.regmean)
        wanted: dict[str, Mapping[str, float] | None] = {"": None}
        wanted |= {_alone(name): {name: 1.0} for name in self.pool.members}
        wanted |= {candidate.name: candidate.weights for candidate in candidates}
        found: dict[str, dict[str, Losses]] = {}
        with runner.progress("Reading mixtures", len(wanted), shown=shown) as tick:
            for name, weights in wanted.items():
                key = None if weights is None else {part: [self.pool.members[part].sha256, weight]
                                                    for part, weight in weights.items()}  # fmt: skip
                found[name] = {
                    evaluated.name: kept(
                        pool_place(self.pool, "losses"),
                        ["merged", self.pool.parent_digest, key, self.scale, evaluated.digest, self.max_tokens,
                         *self._method(weights)],
                        lambda evaluated=evaluated, weights=weights: measure(
                            own.become(weights), evaluated, max_tokens=self.max_tokens,
                            tokens_per_batch=self.tokens_per_batch),
                    )
                    for evaluated in self.sets
                }  # fmt: skip
                tick(1, sum(int(losses.tokens.sum()) for losses in found[name].values()))
        return found

    def _method(self, weights: Mapping[str, float] | None) -> list[Any]:
        """What a merged loss depends on beside the mean's; nothing where a mixture is one member alone."""
        if self.regmean is None or weights is None or len(weights) == 1:
            return []
        return ["regmean", self.regmean.alpha, {name: self.regmean.digests[name] for name in weights}]

    def truths(
        self, candidates: Sequence[Candidate], parts: Mapping[str, Partition], *, shown: bool
    ) -> dict[str, dict[str, Losses]]:
        """The same of models that are really trained; one that was interrupted is trained again."""
        found: dict[str, dict[str, Losses]] = {}
        digests = {name: part.digest for name, part in parts.items()}
        with runner.progress("Training the truth", len(candidates), shown=shown) as tick:

            def work(candidate: Candidate, report: runner.Tick) -> dict[str, Losses]:
                key = ["truth", self.pool.parent_digest, dict(self.pool.recipe), dict(candidate.weights),
                       candidate.budgets, {name: digests[name] for name in candidate.weights}]  # fmt: skip
                made = _Once(self.pool, parts, candidate, content_name(key))
                place = pool_place(self.pool, "losses")
                losses = {
                    evaluated.name: kept(
                        place,
                        [*key, evaluated.digest, self.max_tokens],
                        lambda evaluated=evaluated: measure(
                            load_model(made.model(), dtype="float32"), evaluated, max_tokens=self.max_tokens,
                            tokens_per_batch=self.tokens_per_batch),
                    )
                    for evaluated in self.sets
                }  # fmt: skip
                made.forget()
                report(1, 0)
                return losses

            for candidate, losses in runner.map(work, candidates, on_tick=tick):
                found[candidate.name] = losses
        return found


@dataclass
class _Once:
    """A real model that is trained when it is first asked for."""

    pool: Pool
    parts: Mapping[str, Partition]
    candidate: Candidate
    content: str
    """Name of all that its training depends on."""
    path: Path | None = None

    @property
    def place(self) -> Path:
        return Path(self.pool.place.root) / "truth" / f"{slug(self.candidate.name)}-{self.content[:12]}"

    def model(self) -> Path:
        """Its directory."""
        if self.path is None:
            weights, budgets = self.candidate.weights, self.candidate.budgets
            self.path = true_model(self.pool, self.parts, weights, self.place, budgets=budgets)
        return self.path

    def forget(self) -> None:
        """Remove its weights: the losses are what is kept."""
        if self.path is not None:
            shutil.rmtree(self.place, ignore_errors=True)


def _alone(name: str) -> str:
    """What a member alone is called among the models; no candidate can be called so."""
    return f"\0{name}"


def _cells(
    pool: Pool,
    evaluated: EvalSet,
    candidates: Sequence[Candidate],
    measured: Mapping[str, Mapping[str, Losses]],
    real: Mapping[str, Mapping[str, Losses]],
    parts: Mapping[str, Partition] | None,
    seed: int,
) -> Iterable[Cell]:
    own = own_partitions(pool, evaluated)
    alone = {name: measured[_alone(name)][evaluated.name].loss for name in pool.members}
    grams = None
    if parts is not None and all(name in parts for name in pool.members):
        texts = {name: (row_text(piece.row) for piece in parts[name].pieces) for name in pool.members}
        grams = gram_divergence((row_text(row) for row in evaluated.rows), texts)
    for candidate in candidates:
        losses = measured[candidate.name][evaluated.name]
        low, high = losses.interval(seed=seed)
        weights = candidate.weights
        shares = [weights.get(name, 0.0) for name in pool.members]
        yield Cell(
            mixture=candidate.name,
            set=evaluated.name,
            contained=any(weights.get(name) for name in own),
            merged=losses.loss,
            low=low,
            high=high,
            bits_per_byte=losses.bits_per_byte,
            mean=math.fsum(weight * alone[name] for name, weight in weights.items()),
            mean_ppl=math.log(math.fsum(weight * math.exp(alone[name]) for name, weight in weights.items())),
            best=min(alone[name] for name in weights),
            ngram=None if grams is None else mixture_divergence(*grams, shares),
            parent=measured[""][evaluated.name].loss,
            truth=real[candidate.name][evaluated.name].loss if real else None,
        )


def own_partitions(pool: Pool, evaluated: EvalSet) -> list[str]:
    """Members of the set's own kind: of its name, of its units, or of its rows' value in the partitioning column."""
    column = str(pool.recipe.get("by", "source"))
    values = {str(row.get(column)) for row in evaluated.rows}
    names = {evaluated.name} | (values if len(values) == 1 else set())
    return [name for name in pool.members if name in names or name.rpartition("/")[0] in names]


def _agreements(cells: Sequence[Cell], seed: int) -> dict[str, dict[str, dict[str, Agreement]]]:
    """By set, group of candidates, and proxy."""
    found: dict[str, dict[str, dict[str, Agreement]]] = {}
    sets = list(dict.fromkeys(cell.set for cell in cells))
    for name in sets:
        own = [cell for cell in cells if cell.set == name]
        inside = {cell.mixture for cell in own if cell.contained}
        for group, places in groups([cell.mixture for cell in own], inside.__contains__).items():
            some = [own[place] for place in places]
            for proxy in PROXIES:
                values = [getattr(cell, proxy) for cell in some]
                if None in values:
                    continue
                made = agreement(values, [cell.truth for cell in some if cell.truth is not None], seed=seed)
                if made is not None:
                    found.setdefault(name, {}).setdefault(group, {})[proxy] = made
    for proxy in PROXIES:
        by_set = {name: [cell for cell in cells if cell.set == name] for name in sets}
        if any(getattr(cell, proxy) is None for cell in cells):
            continue
        pooled = centred({name: [getattr(cell, proxy) for cell in own] for name, own in by_set.items()})
        true = centred({name: [cell.truth for cell in own if cell.truth is not None] for name, own in by_set.items()})
        made = agreement(pooled, true, seed=seed, sets=len(sets))
        if made is not None:
            found.setdefault("all sets", {}).setdefault("all", {})[proxy] = made
    return found


def _cost(
    pool: Pool, settings: PoolSettings, candidates: Sequence[Candidate], reading: float, training: float, *, truth: bool
) -> dict[str, float]:
    """Both routes."""
    each = math.fsum(candidate.budgets for candidate in candidates) / len(candidates)
    found = {
        "pool tokens": float(sum(member.tokens for member in pool.members.values())),
        "candidates": float(len(candidates)),
        "tokens of training every candidate": each * len(candidates) * settings.tokens,
        "break-even candidates": len(pool.members) / each,
        "reading seconds": reading,
    }
    return found | ({"truth seconds": training} if truth else {})


def _notes(cells: Sequence[Cell], candidates: Sequence[Candidate], pool: Pool, lost: Sequence[str]) -> list[str]:
    notes = ["Merged losses rank mixtures; their level is not that of a model trained on the mixture."]
    if any(len({*candidate.weights.values()}) > 1 for candidate in candidates):
        notes.append(
            "Weights that are not uniform are Whence's extension of the method: docs/results/ablation.md measures it."
        )
    worse = [name for name in dict.fromkeys(cell.set for cell in cells)
             if all(cell.merged > cell.parent for cell in cells if cell.set == name)]  # fmt: skip
    if worse:
        notes.append(f"On {', '.join(worse)} every mixture is worse than the parent: training only forgets it.")
    if lost:
        notes.append(f"The corpus has no row of the partition {lost[0]}: no n-gram similarity is told.")
    if any(member.kind == "delta" for member in pool.members.values()):
        notes.append("Members are stored in bfloat16: to 2^-9 of each weight's move.")
    return notes


def _averaged(regmean: RegMean | None) -> list[str]:
    return [] if regmean is None else [f"Linear layers are averaged by RegMean, alpha {regmean.alpha:g}."]


def _sets(evaluated: str | Path | Sequence[str | Path] | Sequence[EvalSet]) -> list[EvalSet]:
    if isinstance(evaluated, str | Path):
        return read_sets([evaluated])
    given = list(evaluated)
    sets = [one for one in given if isinstance(one, EvalSet)]
    return sets if sets else read_sets(str(one) for one in given)


def _partitions(
    pool: Pool, corpus: str | Path | Corpus | Iterable[Row] | None, settings: PoolSettings, *, is_needed: bool
) -> tuple[dict[str, Partition] | None, list[str]]:
    """Of the corpus given, or of the one that the pool remembers if it is still there; and notes.

    A remembered corpus that has changed is refused where it is needed, and else not read.
    """
    origin = corpus if corpus is not None else pool.corpus
    if origin is None or (corpus is None and not Path(str(origin)).exists()):
        return None, []
    opened = open_corpus(origin)
    found = read_partitions(pool.parent, opened, settings)
    try:
        for part in found.values():
            refuse_other_rows(pool, part, opened.name)
    except ManifestMismatchError:
        if is_needed:
            raise
        return None, [f"{opened.name} has other rows than members were trained on: no n-gram similarity is told."]
    return found, []


def _lost(pool: Pool, candidates: Sequence[Candidate], parts: Mapping[str, Partition] | None) -> list[str]:
    """Partitions of candidates that the corpus does not have."""
    wanted = {name for candidate in candidates for name in candidate.weights}
    return [] if parts is None else [name for name in pool.partitions if name in wanted and name not in parts]
