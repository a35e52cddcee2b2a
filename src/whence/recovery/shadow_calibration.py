"""What membership looks like, learned on a shadow: rows whose membership in its training is known.

A random part of the corpus is split off (`shadow_split`), the base is trained on it as the model in question seems to
have been (`shadow_model`), the evidence of the rows against the shadow's own difference is gathered (`points`), and a
logistic model is fitted (`membership.calibrate`). Rows that the shadow was not trained on give the null of p-values.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from whence.brief import brief
from whence.corpus.reading import Corpus, open_corpus
from whence.errors import SettingError
from whence.indexing.ingest import fingerprint_of
from whence.models.difference import weight_difference
from whence.models.local_copies import local_directory
from whence.models.rounding import stored_dtype
from whence.models.runs import open_run
from whence.recovery.case import Case, foreign_tokenizer, with_scale
from whence.recovery.evidence import PointEvidence
from whence.recovery.membership import FOLDS, Calibration, calibrate, features
from whence.recovery.points import gather_evidence
from whence.recovery.settings import RecoverSettings
from whence.recovery.shadow_model import BATCH_SIZES, EPOCHS, Recipe, Shadow, trained_shadow
from whence.runner import EngineOption, ProgressOption
from whence.storage import Place

SHADOW_DIFFERENCE = "shadow"
"""Name of the shadow's difference in the evidence at theta_0."""
SHADOW_ROWS = 10_000
"""Rows of the corpus that a shadow is calibrated on, at most."""


def shadow_split(rows: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows that a shadow is trained on, and of those that it is calibrated on, both ascending.

    It is calibrated on at most `SHADOW_ROWS` rows, of which at most half were trained on.
    """
    rng = random.Random(f"shadow {seed}")
    members = rng.sample(range(rows), min(count, rows // 2))
    known_members = members[: max(1, min(SHADOW_ROWS, rows) // 2)]
    others = sorted({*range(rows)} - {*members})
    room = min(SHADOW_ROWS, rows) - len(known_members)
    known_others = others if room >= len(others) else rng.sample(others, room)
    return sorted(members), sorted([*known_members, *known_others])


@dataclass(frozen=True)
class Learned:
    """A shadow, and the calibration that was learned on it."""

    __repr__ = brief

    shadow: Shadow
    calibration: Calibration
    members: int
    """Rows of the calibration that the shadow was trained on."""
    kept: float
    """Share of them that the shadow's short list held; 1 where all rows were matched jointly."""
    others: Float32[Tensor, " m"]
    """Log odds of rows that the shadow was not trained on: the null that p-values are taken from."""
    member_odds: Float32[Tensor, " k"]
    """Log odds of rows that the shadow was trained on."""


def recipe_of(case: Case, settings: RecoverSettings, rows: int) -> Recipe:
    """How the model was trained on so many rows, as far as is known, and where it is not the first to try."""
    return Recipe(
        rows=rows,
        epochs=EPOCHS[0] if settings.epochs is None else settings.epochs,
        batch_size=BATCH_SIZES[0] if settings.batch_size is None else settings.batch_size,
        optimizer=settings.optimizer,
        lr=settings.lr,
        max_tokens=settings.max_tokens,
        tokenizer=foreign_tokenizer(case),
        lora=case.lora,
        stored=stored_dtype(case.final),
    )


@dataclass(frozen=True)
class CalibrationSet:
    """A shadow, and rows of which it is known whether it was trained on them."""

    __repr__ = brief

    shadow: Shadow
    case: Case
    """The shadow and its base."""
    rows: Corpus
    numbers: Int64[Tensor, " m"]
    """Numbers of these rows in the whole corpus."""
    is_member: Bool[Tensor, " m"]
    """Whether the shadow was trained on them."""


def build_calibration_set(
    case: Case, corpus: Corpus, settings: RecoverSettings, work: Path, *, count: int, rows: int
) -> CalibrationSet:
    """Train a shadow on a random part of the corpus, or go on doing so."""
    members, calibrated = shadow_split(rows, count, settings.seed)
    inside, graded = {*members}, {*calibrated}
    known = len(inside & graded), len(graded - inside)
    if min(known) < 2 * FOLDS:
        raise SettingError(
            f"{corpus.name}: of {rows:,} rows a shadow would know {known[0]:,} that it was trained on and {known[1]:,} "
            f"others; {2 * FOLDS} of each are the least to calibrate on. Give more rows or another --count, or take "
            "--no-calibrate"
        )
    numbered = [(number, example.row) for number, example in enumerate(corpus) if number in inside | graded]
    graded_rows = [pair for pair in numbered if pair[0] in graded]
    recipe = replace(recipe_of(case, settings, len(members)), checkpoints=len(case.between) + 1)
    member_rows = [row for number, row in numbered if number in inside]
    shadow = trained_shadow(
        case.base, member_rows, case.difference, recipe, work / "shadow",
        epochs=EPOCHS if settings.epochs is None else (),
        batch_sizes=BATCH_SIZES if settings.batch_size is None else (),
        seed=settings.seed,
    )  # fmt: skip
    # Room for all its members, and for the share of others that a list of the corpus has room for: its members are
    # canaries, which show how many members such a list loses.
    size = case.short_list
    if rows > case.short_list:
        size = max(2, known[0] + round(known[1] * max(0, case.short_list - len(members)) / (rows - len(members))))
    which = "all" if case.between else "last"
    *between, final = (
        local_directory(checkpoint.path) for checkpoint in open_run(shadow.path, which=which).checkpoints
    )
    moved = weight_difference(case.base, final)
    shadow_case = replace(case, short_list=size, final=final, between=tuple(between), difference=moved)
    if settings.undo == "moments":
        shadow_case = with_scale(shadow_case, settings.undo, corpus, rows)
    is_member = torch.tensor([number in inside for number, _ in graded_rows])
    numbers = torch.tensor([number for number, _ in graded_rows])
    return CalibrationSet(shadow, shadow_case, open_corpus([row for _, row in graded_rows]), numbers, is_member)


def calibrate_on_shadow(
    known: CalibrationSet,
    settings: RecoverSettings,
    work: Place,
    *,
    base: PointEvidence | None = None,
    engine: EngineOption = "local",
    progress: ProgressOption = True,
) -> Learned:
    """Gather the evidence of rows whose membership is known, and fit membership to it.

    Args:
        known: The shadow, and the rows to calibrate on.
        settings: Points and seed.
        work: Directory of the evidence.
        base: Evidence of these rows at theta_0 against the shadow's difference, if it is known.
        engine: Where rows are read; see `runner`.
        progress: Show a bar.
    """
    fingerprint, place = fingerprint_of(known.rows), work.below("shadow", "evidence")
    evidence = gather_evidence(known.case, known.rows, place, fingerprint, points=settings.points, base=base,
               engine=engine, label="Reading for the shadow", progress=progress)  # fmt: skip
    calibration = calibrate(features(evidence), known.is_member, seed=settings.seed)
    is_listed = torch.zeros(fingerprint.rows, dtype=torch.bool).index_fill_(0, evidence.short_list, True)
    listed_share = float(is_listed[known.is_member].float().mean())
    is_usable = calibration.held_out.isfinite()
    others, member_odds = (
        calibration.held_out[is_usable & part].float() for part in (~known.is_member, known.is_member)
    )
    return Learned(known.shadow, calibration, int(known.is_member.sum()), listed_share, others, member_odds)
