"""Recover: two models and a corpus in, the rows that the second was trained on out.

The weight difference theta_0 - theta_f (`difference`) is to first order a positive sum of the gradients of the rows
trained on. Every row's evidence of it is gathered in one stream a point (`evidence`), at theta_0, at theta_f, and at
points between them where asked for. A method turns it into one score a row; `calibrated`, the default, fits on a shadow
model what membership looks like (`shadow`, `membership`) and gives a probability.

Larger scores are more likely rows. A row without a supervised token, or without finite evidence, is never chosen.

Source: SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553. What is done otherwise: docs/results/recovery.md.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.errors import SettingError
from whence.indexing.ingest import fingerprint_of
from whence.models.difference import weight_difference
from whence.models.loading import located
from whence.models.rounding import stored_dtype
from whence.models.runs import open_run
from whence.recovery.comparison import (
    TARGET,
    Case,
    RecoverSettings,
    foreign_tokenizer,
    labelled,
    only_moved,
    open_case,
    refuse_what_says_nothing,
    see,
    with_points_of,
    with_scale,
)
from whence.recovery.evidence import Evidence
from whence.recovery.membership import FOLDS, Calibration, Seen, calibrate, features, logit, matched
from whence.recovery.relinearisation import Round, relinearised
from whence.recovery.scores import method_scores
from whence.recovery.shadow_model import Recipe, Shadow, trained_shadow
from whence.recovery.shares import rows_of, shares_of_sources
from whence.storage import Place

SHADOW = "shadow"
"""Name of its difference in the evidence at theta_0."""
SHADOW_ROWS = 10_000
"""Rows of the corpus that a shadow is calibrated on, at most."""


# -- the shadow


def shadow_split(rows: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows that a shadow is trained on, and of all that it is calibrated on, both ascending.

    Of the latter at most `SHADOW_ROWS`, and of these at most half were trained on.
    """
    drawn = random.Random(f"shadow {seed}")
    members = drawn.sample(range(rows), min(count, rows // 2))
    graded = members[: max(1, min(SHADOW_ROWS, rows) // 2)]
    others = sorted({*range(rows)} - {*members})
    room = min(SHADOW_ROWS, rows) - len(graded)
    kept = others if room >= len(others) else drawn.sample(others, room)
    return sorted(members), sorted([*graded, *kept])


@dataclass(frozen=True)
class Learned:
    """What a shadow taught."""

    shadow: Shadow
    calibration: Calibration
    members: int
    kept: float
    """Share of them that the shadow's short list held; 1 where all rows were matched jointly."""
    others: Float32[Tensor, " m"]
    """Log odds of rows that the shadow was not trained on: the null that p-values are taken from."""


def recipe_of(case: Case, settings: RecoverSettings, rows: int) -> Recipe:
    """What is known of how the model was trained on so many rows."""
    return Recipe(
        rows=rows,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=settings.optimizer,
        lr=settings.lr,
        max_tokens=settings.max_tokens,
        tokenizer=foreign_tokenizer(case),
        lora=case.lora,
        stored=stored_dtype(case.final),
    )


@dataclass(frozen=True)
class Cast:
    """A shadow, and what it is to be calibrated on."""

    shadow: Shadow
    case: Case
    """It and its base."""
    pool: Corpus
    numbers: Int64[Tensor, " m"]
    """Of the pool's rows in the corpus."""
    is_member: Bool[Tensor, " m"]
    """Whether the shadow was trained on them."""


def cast_shadow(case: Case, corpus: Corpus, settings: RecoverSettings, work: Path, *, count: int, rows: int) -> Cast:
    """Train a shadow on a random part of the corpus, or go on doing so."""
    members, chosen = shadow_split(rows, count, settings.seed)
    inside, graded = {*members}, {*chosen}
    known = len(inside & graded), len(graded - inside)
    if min(known) < 2 * FOLDS:
        raise SettingError(
            f"{corpus.name}: of {rows:,} rows a shadow would know {known[0]:,} that it was trained on and {known[1]:,} "
            f"others; {2 * FOLDS} of each are the least to calibrate on. Give more rows or another --count, or take "
            "--no-calibrate"
        )
    wanted = [(number, example.row) for number, example in enumerate(corpus) if number in inside | graded]
    kept = [pair for pair in wanted if pair[0] in graded]
    recipe = replace(recipe_of(case, settings, len(members)), checkpoints=len(case.between) + 1)
    part = [row for number, row in wanted if number in inside]
    shadow = trained_shadow(case.base, part, case.difference, recipe, work / "shadow", seed=settings.seed)
    # room for its members, and of others the share that a list of the corpus has room for: its members are canaries,
    # which tell what the list loses
    size = case.short_list
    if rows > case.short_list:
        size = max(2, known[0] + round(known[1] * max(0, case.short_list - len(members)) / (rows - len(members))))
    which = "all" if case.between else "last"
    *between, final = (located(found.path) for found in open_run(shadow.path, which=which).checkpoints)
    moved = weight_difference(case.base, final)
    own = replace(case, short_list=size, final=final, between=tuple(between), difference=moved)
    if settings.undo == "moments":
        own = with_scale(own, settings.undo, corpus, rows)
    is_member = torch.tensor([number in inside for number, _ in kept])
    return Cast(shadow, own, open_corpus([row for _, row in kept]), torch.tensor([n for n, _ in kept]), is_member)


def learn(
    cast: Cast, settings: RecoverSettings, work: Path, *, base: Evidence | None = None, shown: bool = True
) -> Learned:
    """Calibrate on a shadow.

    Args:
        cast: The shadow.
        settings: Points and seed.
        work: Directory of its evidence.
        base: Evidence of the pool at theta_0 against the shadow's difference, where known.
        shown: Show a bar.
    """
    fingerprint, place = fingerprint_of(cast.pool), Place.at(work / "shadow" / "evidence")
    seen = see(cast.case, cast.pool, place, fingerprint, points=settings.points, base=base,
               label="Reading for the shadow", shown=shown)  # fmt: skip
    calibration = calibrate(features(seen), cast.is_member, seed=settings.seed)
    inside_list = torch.zeros(fingerprint.rows, dtype=torch.bool).index_fill_(0, seen.short, True)
    survived = float(inside_list[cast.is_member].float().mean())
    others = calibration.held_out[~cast.is_member & calibration.held_out.isfinite()].float()
    return Learned(cast.shadow, calibration, int(cast.is_member.sum()), survived, others)


# -- the job


@dataclass(frozen=True)
class Recovered:
    """What a recover job found."""

    rows: list[Row]
    """The chosen rows as the corpus has them, in rank order, with `whence_score`, `whence_p`, and of `calibrated` and
    `nnls` `whence_weight`: the row's part in the sum of unit gradients that matches the difference."""
    numbers: list[int]
    """Of the chosen rows in the corpus."""
    scores: Float32[Tensor, " n"]
    """Of every row: of `calibrated` the probability of membership; -inf for rows without evidence."""
    p_values: Float32[Tensor, " n"]
    """Share of non-members that score as high: of the shadow's, for `calibrated`; else of all rows of the corpus, the
    members among them, which is too large by their share at most."""
    mixture: list[dict[str, Any]]
    """By source: its share of the rows trained on and of their supervised tokens, with the ends of 95% intervals; see
    `mixture_of`. Empty where there is but one."""
    layers: list[dict[str, Any]]
    """Of every parameter: how it moved, see `difference`."""
    notes: list[str]
    settings: dict[str, str]
    learned: Learned | None = field(default=None, repr=False)
    null: Float32[Tensor, " m"] | None = field(default=None, repr=False)
    """Log odds of rows known not to be members, at the share of members that `scores` are at; of `calibrated`."""


def recover(
    base: str | Path,
    final: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    *,
    count: int | None = None,
    work: str | Path = "whence-recover.work",
    shown: bool = True,
    **settings: Any,
) -> Recovered:
    """Find the rows of a corpus that a model was fine-tuned on, from its weights and those it began with.

    Args:
        base: theta_0: a model's directory, a Trainer's, or a Hub name.
        final: theta_f: the same, or an adapter on it.
        corpus: Whatever `open_corpus` takes.
        count: Rows to choose, and for the shadow the number that the model was trained on. None: those more likely
            members than not, of a tenth of the corpus.
        work: Directory of the evidence and the shadow; the same call goes on from there.
        shown: Show bars on stderr.
        settings: Fields of `RecoverSettings` by name, such as `method="nnls"`.

    Returns:
        Ranked rows, the mixture of their sources, and what the weights say of themselves.

    Raises:
        ModelError: The models cannot be compared, are the same, or differ where no layer is traced.
        SettingError: A method without probabilities has no count.
        ManifestMismatchError: `work` holds evidence of other models or another corpus.
    """
    chosen = RecoverSettings(**settings)
    if count is None and chosen.method != "calibrated":
        raise SettingError(f"--method {chosen.method} ranks rows and draws no line: add --count N")
    if count is not None and count < 1:
        raise SettingError(f"--count {count}: 1 or more are expected")
    case, opened, place = open_case(str(base), str(final), chosen), open_corpus(corpus), Path(work)
    fingerprint = fingerprint_of(opened)
    refuse_what_says_nothing(case, opened)
    case, still = only_moved(case)
    with Place.at(place).locked():
        if chosen.choices:
            opened = labelled(case, opened, Place.at(place / "labels"), fingerprint, chosen, shown=shown)
            fingerprint = fingerprint_of(opened)
        case = with_scale(case, chosen.undo, opened, fingerprint.rows)
        trained_on = min(count or max(1, fingerprint.rows // 10), max(1, fingerprint.rows // 2))
        cast, others, learned = None, {}, None
        if chosen.method == "calibrated":
            cast = cast_shadow(case, opened, chosen, place, count=trained_on, rows=fingerprint.rows)
            others = {SHADOW: cast.case}
            case = with_points_of(case, cast.case)
        seen = see(case, opened, Place.at(place / "evidence"), fingerprint, points=chosen.points, others=others,
                   shown=shown)  # fmt: skip
        if not seen.usable.any():
            raise SettingError(f"{opened.name}: none of its {fingerprint.rows:,} rows has evidence to score")
        if cast is not None:
            learned = learn(cast, chosen, place, base=_of_shadow(seen, cast), shown=shown)
        sources, labels = _columns(opened)
        recipe = learned.shadow.recipe if learned is not None else None
        mixture = shares_of_sources(case, opened, seen, sources, recipe, place / "mixture", how=chosen.mixture,
                                    count=trained_on, seed=chosen.seed, shown=shown)  # fmt: skip
        rounds: list[Round] = []
        if chosen.rounds:
            listed = rows_of(opened, seen.short.tolist())
            recipe = recipe_of(case, chosen, trained_on)
            seen, rounds = relinearised(case, seen, listed, recipe, place, rounds=chosen.rounds, seed=chosen.seed)
    scores, p_values, weights, null = _scored(seen, chosen, learned, trained_on, known=count is not None)
    able = int(seen.usable.sum())
    order = scores.argsort(descending=True, stable=True)[:able].tolist()
    wanted = min(count, able) if count is not None else int((scores >= 0.5).sum())
    is_even = bool(chosen.choices and count is not None) if chosen.balanced is None else chosen.balanced
    numbers = evenly(order, labels, wanted) if is_even else order[:wanted]
    notes = _notes(case, seen, still, learned, rounds, count)
    rows = rows_of(opened, numbers)
    columns = {"whence_score": scores, "whence_p": p_values} | ({} if weights is None else {"whence_weight": weights})
    made = [
        row | {name: float(column[number]) for name, column in columns.items()}
        for number, row in zip(numbers, rows, strict=True)
    ]
    return Recovered(
        rows=made,
        numbers=numbers,
        scores=scores,
        p_values=p_values,
        mixture=mixture,
        layers=case.difference.rows(),
        notes=notes,
        settings=_told(case, chosen, learned, opened, is_even=is_even),
        learned=learned,
        null=null,
    )


def _notes(
    case: Case, seen: Seen, still: str | None, learned: Learned | None, rounds: Sequence[Round], count: int | None
) -> list[str]:
    """What a reader has to know, one sentence each."""
    able = int(seen.usable.sum())
    notes = [*case.difference.notes, *([still] if still else [])]
    if learned is not None and not math.isfinite(learned.shadow.distance):
        notes.append("The shadow and the final moved no matrix in common: its optimizer is a guess without evidence.")
    if count is not None and count > able:
        notes.append(f"{count:,} rows were asked for, and {able:,} have evidence.")
    if lost := len(seen.usable) - able:
        notes.append(f"{lost:,} rows have no supervised token or no finite evidence, and are left out.")
    if able > case.short_list:
        told = f"Of {able:,} rows {len(seen.short):,} were matched jointly (--short-list)"
        notes.append(f"{told}; of the shadow's members such a list held {learned.kept:.0%}." if learned else f"{told}.")
    for number, made in enumerate(rounds, 1):
        notes.append(
            f"Round {number}: trained on what was chosen, the base ends {made.left:.2f} of its distance away from the "
            f"final (cosine {made.cosine:.2f})."
        )
    return notes


def _of_shadow(seen: Seen, cast: Cast) -> Evidence | None:
    """At theta_0, where the pass over the corpus served the shadow too."""
    base = seen.points["base"]
    return base.some(cast.numbers, {TARGET: SHADOW}) if SHADOW in base.dots else None


def _scored(
    seen: Seen, settings: RecoverSettings, learned: Learned | None, trained_on: int, *, known: bool
) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"], Float32[Tensor, " n"] | None, Float32[Tensor, " m"] | None]:
    """Scores, p-values, parts in the sum that matches the difference, and the null at the same share of members."""
    if learned is None:
        scores = method_scores(seen, settings.method, count=trained_on, seed=settings.seed)
        parts = None
        if settings.method == "nnls":
            parts = torch.zeros(len(scores)).index_copy_(0, seen.short, matched(seen)[0])
        return scores, p_values_of(scores, scores[seen.usable]), parts, None
    share = trained_on / len(seen.usable)
    table = features(seen)
    odds = learned.calibration.log_odds(table)
    p_values = p_values_of(odds.float(), learned.others)
    if not known:
        share = _estimated_share(odds[table.usable], learned.calibration.share)
    moved = learned.calibration.log_odds(table, share=share)
    parts = table.values[:, table.names.index("part")].float()
    null = learned.others + (logit(share) - logit(learned.calibration.share))
    return torch.where(table.usable, moved.sigmoid(), -torch.inf).float(), p_values, parts, null


def p_values_of(scores: Float32[Tensor, " n"], null: Float32[Tensor, " m"]) -> Float32[Tensor, " n"]:
    """(1 + how many of the null are as high) / (1 + their number)."""
    ordered = null.sort().values
    below = torch.searchsorted(ordered, scores.contiguous())
    return (1 + len(ordered) - below) / (1 + len(ordered))


def _estimated_share(odds: Tensor, share: float, rounds: int = 100) -> float:
    """Share of members that agrees with its own probabilities: Saerens et al. 2002, doi 10.1162/089976602753284446."""
    found = share
    for _ in range(rounds):
        found = float((odds + logit(found) - logit(share)).sigmoid().mean())
    return found


def evenly(order: Sequence[int], labels: Sequence[str | None], count: int) -> list[int]:
    """The first rows of an order, as many of each label as of any other, as far as there are; what is left to `count`
    comes from the rest.

    >>> evenly([4, 3, 2, 1, 0], ["a", "b", "b", "b", "b"], 3)
    [4, 3, 0]
    """
    before: Counter[str | None] = Counter()
    places = []
    for place, row in enumerate(order):
        places.append((before[labels[row]], place))
        before[labels[row]] += 1
    return [order[place] for place in sorted(place for _, place in sorted(places)[:count])]


def _columns(corpus: Corpus) -> tuple[list[str | None], list[str | None]]:
    """Source and label of every row."""
    read = [(example.row.get("source"), example.row.get("label")) for example in corpus]
    sources, labels = (
        [None if value is None else str(value) for value in column] for column in zip(*read, strict=True)
    )
    return sources, labels


def _told(
    case: Case, settings: RecoverSettings, learned: Learned | None, corpus: Corpus, *, is_even: bool
) -> dict[str, str]:
    told = {"method": settings.method, "base": case.base, "final": case.final, "corpus": corpus.name,
            "layers": case.settings.space.layers or "linear layers of the blocks"}  # fmt: skip
    if settings.undo != "none":
        told["undone on the target"] = f"AdamW's scaling, by {settings.undo}"
    if settings.remove_decay:
        told["removed from the target"] = "weight decay"
    if settings.choices:
        told["labels"] = f"{settings.labels}, of {', '.join(settings.choices)}"
    if is_even:
        told["chosen"] = "as many rows of every label, as far as there are"
    if learned is not None:
        recipe = learned.shadow.recipe
        told["shadow"] = (
            f"{learned.members:,} rows, {recipe.epochs:g} epochs, {recipe.optimizer} at {recipe.lr:.2g}; it moved "
            f"{learned.shadow.norm:.2f} times as far"
        )
    return told
