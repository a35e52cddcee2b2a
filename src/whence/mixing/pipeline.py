"""`whence mix law`: a table of mixtures and losses -> a law, its held-out error, and the mixture that it suggests.

A law is graded by cross-validation: rows are dealt to folds at random (rows of the same mixture to the same fold), and
each fold's losses are predicted by a law fitted to the others. So the error is that of a law with somewhat fewer rows,
on mixtures drawn as the table's were. It says nothing about mixtures unlike those, nor about larger models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from whence import catalogue
from whence.corpus.layouts import Row
from whence.counts import number_of
from whence.errors import SettingError
from whence.mixing.protocols import FitMixingLaw, MixingLaw
from whence.mixing.simplex import (
    CriticalRatio,
    Optimum,
    cap_vector,
    critical_ratio,
    optimum,
    share_outside,
    weight_vector,
)
from whence.mixing.tables import ROUNDING, MixtureTable, named_amounts, read_mixture_table
from whence.numerics import bootstrap_interval, mean_spearman, mixed_seed, order_codes

RESAMPLES = 1000
ROWS_PER_DOMAIN = 3
"""A table with fewer rows than this for each domain gets a note."""
SHARE_OUTSIDE = 0.01
"""A suggested mixture with more than this share outside the table's hull gets a note."""
TRIED = "from the least to the most tried"
"""Bounds of a suggested share, unless the law may extrapolate."""
LARGEST_GAP = 1e-3
"""A Frank-Wolfe gap above this, in the losses' unit, gets a note."""


@dataclass(frozen=True)
class Grade:
    """How good held-out predictions are, with 95% bootstrap intervals over mixtures."""

    error: float
    """Mean absolute difference, in the table's unit."""
    error_interval: tuple[float, float]
    spearman: float | None
    """Rank correlation of predicted and true losses; None where one of them is the same everywhere."""
    spearman_interval: tuple[float, float] | None


@dataclass(frozen=True)
class HeldOut:
    """A table's losses, each predicted by a law that was fitted without its mixture."""

    table: MixtureTable
    predicted: Float64[np.ndarray, "n E"]
    folds: int
    seed: int

    def __repr__(self) -> str:
        return f"HeldOut({self.table!r}, {number_of(self.folds, 'fold')})"

    @cached_property
    def sets(self) -> dict[str, Grade]:
        """The grade of each evaluation set, by name."""
        return {name: self._grade([place]) for place, name in enumerate(self.table.sets)}

    @cached_property
    def overall(self) -> Grade:
        """Mean error and mean rank correlation, over the sets that have a rank correlation."""
        ranked = [grade.spearman is not None for grade in self.sets.values()]
        return self._grade(np.flatnonzero(ranked).tolist())

    def _grade(self, places: list[int]) -> Grade:
        columns = places or list(range(len(self.table.sets)))
        errors = torch.from_numpy(np.abs(self.predicted - self.table.losses)[:, columns]).mean(1)
        error_interval = bootstrap_interval(errors, seed=self.seed, resamples=RESAMPLES)
        pairs = np.stack([self.predicted, self.table.losses], -1)[:, columns]  # n e 2
        if not places or (pairs == pairs[0]).all(0).any():
            return Grade(float(errors.mean()), error_interval, None, None)
        codes = order_codes(torch.from_numpy(pairs))
        interval = bootstrap_interval(codes, seed=self.seed, resamples=RESAMPLES, statistic=mean_spearman)
        return Grade(float(errors.mean()), error_interval, float(mean_spearman(codes)), interval)


def cross_validated(table: MixtureTable, law: FitMixingLaw | str = "exp", *, folds: int = 10, seed: int = 0) -> HeldOut:
    """Predict every row of a table by a law fitted without it.

    Args:
        table: Mixtures and losses.
        law: A law's class, or its name in `catalogue.MIXING_LAWS`.
        folds: Number of folds; at most one for each different mixture.
        seed: Seeds the dealing to folds, the law and the intervals.

    Raises:
        SettingError: There are fewer than two folds, or too few rows for the law outside one of them.
    """
    law_class = catalogue.mixing_law(law) if isinstance(law, str) else law
    _, group = np.unique(table.mixtures.round(12), axis=0, return_inverse=True)
    groups = int(group.max()) + 1
    if folds < 2 or groups < 2:
        raise SettingError(f"--folds {folds}: two at least, and two different mixtures, of which there are {groups}")
    folds = min(folds, groups)
    fold_of_group = np.random.default_rng(mixed_seed(seed, "folds")).permutation(groups) % folds
    fold = fold_of_group[group.reshape(-1)]
    rows_to_fit, least = table.n - int(np.bincount(fold).max()), law_class.least_rows(len(table.domains))
    if rows_to_fit < least:
        raise SettingError(
            f"{number_of(table.n, 'mixture')} of {len(table.domains)} domains: this law needs {least}, and {folds} "
            f"folds leave {rows_to_fit} to fit by; give more mixtures, or put domains together"
        )
    predicted = np.empty_like(table.losses)
    for number in range(folds):
        is_held_out = fold == number
        fitted = law_class.fit(table.rows(np.flatnonzero(~is_held_out)), seed=seed)
        predicted[is_held_out] = fitted.predict(table.mixtures[is_held_out])
    return HeldOut(table, predicted, folds, seed)


@dataclass(frozen=True)
class MixLaw:
    """The result of `mix_law`."""

    table: MixtureTable
    law: MixingLaw
    held_out: HeldOut
    weights: Float64[np.ndarray, " E"]
    """Weights of the evaluation sets in the objective; they sum to 1."""
    caps: Mapping[str, float]
    best: Optimum
    critical: dict[str, dict[str, CriticalRatio]]
    """By evaluation set whose loss before was given, and by domain."""
    settings: dict[str, Any]
    notes: list[str]

    def __repr__(self) -> str:
        """The law, what it is worth, what it suggests, and how to go on."""
        suggested = sorted(zip(self.best.mixture, self.table.domains, strict=True), reverse=True)[:4]
        shares = ", ".join(f"{name} {share:.0%}" for share, name in suggested)
        lines = [f"MixLaw({self.settings['law']}, {self.table!r})"]
        lines.append(
            f"  suggests {shares}: {self.best.objective:.4g}, held-out error {self.held_out.overall.error:.3g}"
        )
        return "\n".join(
            [*lines, "  More: .law.predict(MIXTURES), .rows, .set_rows, .held_out.overall, .critical, .notes"]
        )

    @property
    def mean(self) -> Float64[np.ndarray, " K"]:
        """The mean of the table's mixtures."""
        return self.table.mixtures.mean(0)

    @property
    def best_row(self) -> int:
        """Number of the table's mixture of least true objective, among those within the caps where there are any."""
        largest = named_amounts(self.caps, self.table.domains, "--cap", "domain", 1.0)
        allowed = (self.table.mixtures <= largest + ROUNDING).all(1)
        losses = self.table.losses @ self.weights
        return int(np.argmin(np.where(allowed, losses, np.inf) if allowed.any() else losses))

    @property
    def rows(self) -> list[Row]:
        """One row for each domain: the suggested share beside the shares that were tried."""
        tried = self.table.mixtures
        return [
            {
                "domain": name,
                "suggested": float(self.best.mixture[place]),
                "mean": float(self.mean[place]),
                "best_tried": float(tried[self.best_row, place]),
                "least_tried": float(tried[:, place].min()),
                "most_tried": float(tried[:, place].max()),
                "cap": float(self.caps.get(name, 1.0)),
            }
            for place, name in enumerate(self.table.domains)
        ]

    @property
    def set_rows(self) -> list[Row]:
        """One row for each evaluation set: its grade, and the losses predicted for it."""
        at_mean = self.law.predict(self.mean[None])[0]
        return [
            {"set": name, "weight": float(self.weights[place]), **grade_columns(self.held_out.sets[name])}
            | {"suggested": float(self.best.predicted[place]), "mean": float(at_mean[place])}
            | {"best_tried": float(self.table.losses[self.best_row, place])}
            for place, name in enumerate(self.table.sets)
        ]

    def document(self) -> dict[str, Any]:
        """The whole result as a JSON document."""
        critical = {
            name: {domain: vars(ratio) for domain, ratio in ratios.items()} for name, ratios in self.critical.items()
        }
        return {
            "settings": self.settings,
            "notes": self.notes,
            "overall": grade_columns(self.held_out.overall),
            "objective": self.best.objective,
            "gap": self.best.gap,
            "sets": self.set_rows,
            "critical": critical,
            "rows": self.rows,
        }


def grade_columns(grade: Grade) -> Row:
    """A grade as columns of a row."""
    low, high = grade.error_interval
    below, above = grade.spearman_interval or (None, None)
    return {
        "error": grade.error,
        "error_low": low,
        "error_high": high,
        "spearman": grade.spearman,
        "spearman_low": below,
        "spearman_high": above,
    }


def mix_law(
    mixtures: str | Path | list[Row] | MixtureTable,
    losses: str | Path | list[Row] | None = None,
    *,
    law: str = "exp",
    targets: Mapping[str, float] | None = None,
    caps: Mapping[str, float] | None = None,
    before: Mapping[str, float] | None = None,
    within: bool = True,
    folds: int = 10,
    seed: int = 0,
    mixture_prefix: str | None = None,
    loss_prefix: str | None = None,
) -> MixLaw:
    """Fit a mixing law to a table, grade it by cross-validation, and find its best mixture.

    Args:
        mixtures: Shares, or shares and losses; see `tables.read_mixture_table`.
        losses: Losses, where they are in another file.
        law: Name in `catalogue.MIXING_LAWS`.
        targets: Weights of evaluation sets in the objective by name; all alike unless given.
        caps: Largest share of a domain by name; see `simplex.availability_caps`.
        before: The parent's losses on evaluation sets by name: the result says at what share of each domain they stay.
        within: Ask the law only of shares that were tried: of each domain, from the least to the most that a mixture of
            the table has, or up to its cap where that is less. False: of any share.
        folds: Number of folds of the cross-validation.
        seed: Seeds everything drawn.
        mixture_prefix: How the columns of shares begin.
        loss_prefix: How the columns of losses begin.

    Raises:
        SettingError: The table cannot be used, a name or number does not fit it, or the law predicts a loss below 0.
        UnknownNameError: There is no such law.
        MissingExtraError: The law needs a package that is not installed.
    """
    law_class = catalogue.mixing_law(law)
    if isinstance(mixtures, MixtureTable):
        table = mixtures
    else:
        table = read_mixture_table(mixtures, losses, mixture_prefix=mixture_prefix, loss_prefix=loss_prefix)
    losses_before = before or {}
    named_amounts(losses_before, table.sets, "--before", "evaluation set", 0.0)
    weights = weight_vector(table.sets, targets)
    largest = dict(caps or {})
    cap_vector(table.domains, largest)
    least, most = _bounds(table, largest, within)
    held_out = cross_validated(table, law_class, folds=folds, seed=seed)
    fitted = law_class.fit(table, seed=seed)
    mean = table.mixtures.mean(0)
    best = optimum(
        fitted, targets, caps=dict(zip(table.domains, most.tolist(), strict=True)), floors=least, prior=mean, seed=seed
    )
    _refuse_negative(fitted, table, best.mixture, law, within)
    tried = (table.mixtures.min(0), table.mixtures.max(0)) if within else (np.zeros_like(mean), np.ones_like(mean))
    critical = {
        name: {
            domain: critical_ratio(fitted, name, domain, loss, others=mean, between=(float(low), float(high)))
            for domain, low, high in zip(table.domains, *tried, strict=True)
        }
        for name, loss in losses_before.items()
    }
    settings = {"law": law, "targets": dict(targets or {}), "caps": largest, "before": dict(losses_before)}
    settings |= {"bounds": TRIED if within else "none", "mixtures": table.n, "folds": held_out.folds, "seed": seed}
    result = MixLaw(table, fitted, held_out, weights, largest, best, critical, settings, [])
    result.notes.extend(_notes(result))
    return result


def _bounds(
    table: MixtureTable, caps: Mapping[str, float], within: bool
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """Least and largest share of each domain that may be suggested."""
    largest = named_amounts(caps, table.domains, "--cap", "domain", 1.0)
    if not within:
        return np.zeros_like(largest), largest
    most = np.minimum(largest, table.mixtures.max(0))
    if most.sum() < 1 - 1e-12:
        raise SettingError(
            f"--cap: with the most that was tried of the other domains, the caps sum to {most.sum():.4g}, and shares "
            "must sum to 1; raise a cap, or add --extrapolate"
        )
    return np.minimum(most, table.mixtures.min(0)), most


def _refuse_negative(
    law: MixingLaw, table: MixtureTable, mixture: Float64[np.ndarray, " K"], name: str, within: bool
) -> None:
    """Refuse a law that expects of its best mixture what no training can give."""
    predicted = np.where((table.losses >= 0).all(0), law.predict(mixture[None])[0], 0.0)
    lowest = int(predicted.argmin())
    if predicted[lowest] < 0:
        largest = int(mixture.argmax())
        share, tried = mixture[largest], table.mixtures[:, largest]
        mend = "give it more mixtures, cap a domain, or take another --law" if within else "leave out --extrapolate"
        raise SettingError(
            f"the {name} law predicts a loss of {predicted[lowest]:.4g} on {table.sets[lowest]} for its best mixture "
            f"({share:.0%} of {table.domains[largest]}, tried from {tried.min():.0%} to {tried.max():.0%}), and no "
            f"loss can be below 0, as none of the table is: it is not fit to choose by; {mend}"
        )


def _notes(result: MixLaw) -> list[str]:
    """Reasons to doubt the result."""
    table, best, notes = result.table, result.best, []
    if table.n < (enough := ROWS_PER_DOMAIN * len(table.domains)):
        notes.append(
            f"few mixtures: {table.n}, of {len(table.domains)} domains; about {enough} are needed before a law "
            "ranks well"
        )
    if table.column == "merged":
        notes.append(
            "the losses are of merged models, which were not trained: they say which mixture is better, not what loss "
            "it has"
        )
    outside = share_outside(table, best.mixture)
    if outside > SHARE_OUTSIDE:
        mend = "" if result.settings["bounds"] == TRIED else ", or leave out --extrapolate"
        notes.append(
            f"the suggested mixture is outside what was tried: {outside:.0%} of it would have to move for it to be a "
            f"mean of mixtures in the table. The law is extrapolating: train on it before trusting it{mend}"
        )
    tried = result.table.losses[result.best_row] @ result.weights
    error = float(np.abs((result.held_out.predicted - table.losses) @ result.weights).mean())
    if best.objective >= tried:
        notes.append(
            f"the law expects {best.objective:.4g} of its best mixture, and one of the table had {tried:.4g}: it knows "
            "of none better than those tried"
        )
    elif tried - best.objective < error:
        notes.append(
            f"the law expects {best.objective:.4g} of its best mixture, and one of the table had {tried:.4g}: the "
            f"difference is within the law's own held-out error of {error:.2g}"
        )
    if best.gap is not None and best.gap > LARGEST_GAP:
        notes.append(f"the search stopped early: a mixture within the caps may be better by up to {best.gap:.2g}")
    without_rank = [name for name, grade in result.held_out.sets.items() if grade.spearman is None]
    if without_rank:
        notes.append(
            f"no rank correlation on {', '.join(without_rank)}: true or predicted losses are the same everywhere"
        )
    return notes
