"""Recover: two models and a corpus in, the rows that the second was trained on out.

The weight difference theta_0 - theta_f (`models.difference`) is to first order a positive sum of the gradients of the
rows trained on. Every row's evidence against it is gathered in one stream a point (`points`): at theta_0, at theta_f,
and at points between them if any are set. A method turns the evidence into one score a row; `calibrated`, the default,
learns on a shadow what membership looks like (`shadow_calibration`), fits it to the corpus (`recalibration`), since the
model may have been trained otherwise than its shadow, and gives a probability.

The larger a row's score, the more likely it is a member. A row without a supervised token or without finite evidence
is never chosen.

Source: SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553. How this differs: docs/results/recovery.md.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from whence import outlets
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.templates import date_of, prepare, written_by
from whence.counts import number_of
from whence.errors import SettingError
from whence.indexing.ingest import fingerprint_of
from whence.models.loading import load_tokenizer
from whence.models.training_state import date_of_training, supervision_of_training, warn_of_another_day
from whence.outputs import refuse_inputs
from whence.paths import writing_to
from whence.recovery.case import (
    Case,
    labelled,
    only_moved,
    open_case,
    refuse_uninformative,
    with_scale,
)
from whence.recovery.evidence import PointEvidence
from whence.recovery.membership import CorpusEvidence, features, matched
from whence.recovery.points import DIFFERENCE, gather_evidence, with_points_of
from whence.recovery.recalibration import Recalibrated, recalibrated
from whence.recovery.relinearisation import Round, relinearised
from whence.recovery.scores import method_scores
from whence.recovery.settings import RecoverSettings, check_count
from whence.recovery.shadow_calibration import (
    SHADOW_DIFFERENCE,
    CalibrationSet,
    Learned,
    build_calibration_set,
    calibrate_on_shadow,
    recipe_of,
)
from whence.recovery.shares import rows_of, shares_of_sources
from whence.runner import LOCAL, EngineOption, ProgressOption, check_engine, workers_kept
from whence.storage import Place


@dataclass(frozen=True)
class Recovered:
    """What a recover job found."""

    rows: list[Row]
    """The chosen rows as the corpus has them, in rank order, with `whence_score`, `whence_p`, and for `calibrated` and
    `nnls` `whence_weight`: the row's coefficient in the sum of unit gradients that matches the difference."""
    numbers: list[int]
    """Numbers of the chosen rows in the corpus."""
    scores: Float32[Tensor, " n"]
    """One score a row; for `calibrated` the probability of membership; -inf for rows without evidence."""
    p_values: Float32[Tensor, " n"]
    """Share of non-members that score as high: for `calibrated` among the shadow's non-members, moved and scaled as the
    corpus' are; else among all rows of the corpus, members included, which makes it too large by their share at most.
    """
    mixture: list[dict[str, Any]]
    """By source: its share of the rows trained on and of their supervised tokens, with the ends of 95% intervals; see
    `shares.mixture_of`. Empty for a single source."""
    layers: list[dict[str, Any]]
    """How every parameter moved, see `models.difference`."""
    notes: list[str]
    settings: dict[str, str]
    learned: Learned | None = field(default=None, repr=False)
    null: Float32[Tensor, " m"] | None = field(default=None, repr=False)
    """Log odds of rows known not to be members, moved and scaled as the corpus' are; `calibrated` only."""
    members: tuple[float, float, float] | None = None
    """Expected number of members in the corpus, and the ends of its 95% interval; `calibrated` only."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Names that Whence reads, and the rows' own in their place, under which they are written; see `corpus.columns`."""

    to_arrow = outlets.to_arrow
    to_pandas = outlets.to_pandas
    save = outlets.save
    _repr_html_ = outlets.as_html

    def __repr__(self) -> str:
        """How many rows, of how many expected, and how to go on."""
        lines = [f"Recovered({len(self.rows):,} of {number_of(len(self.scores), 'row')}, by {self.settings['method']})"]
        if self.members is not None:
            lines.append("  trained on about {:,.0f} of the corpus' rows ({:,.0f} to {:,.0f})".format(*self.members))
        if self.mixture:
            most = max(self.mixture, key=lambda line: line["share"])
            lines.append(f"  mostly from {most['source']}: {most['share']:.0%}")
        return "\n".join(
            [*lines, "  More: .rows in rank order; .mixture, .scores, .p_values, .layers, .notes, .settings"]
        )


def recover(
    base: str | Path,
    final: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    *,
    count: int | None = None,
    work: str | Path = "whence-recover.work",
    engine: EngineOption = LOCAL,
    progress: ProgressOption = True,
    **settings: Any,
) -> Recovered:
    """Find the rows of a corpus that a model was fine-tuned on, from its weights and those it began with.

    Args:
        base: theta_0: directory of a model or a Trainer, or a Hub name.
        final: theta_f: the same, or an adapter on theta_0.
        corpus: Anything that `open_corpus` takes.
        count: Rows to choose, and about the number that the model was trained on. None: the rows more likely members
            than not; the shadow is trained on a tenth of the corpus.
        work: Directory of the evidence and the shadow; the same call goes on from there.
        engine: Where rows are read; see `runner`. Models are trained in this process.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).
        settings: Fields of `RecoverSettings` by name, such as `method="nnls"`.

    Returns:
        Ranked rows, the mixture of their sources, and what the weights say of themselves.

    Raises:
        ModelError: The models cannot be compared, are the same, or differ where no layer is traced.
        SettingError: A method without probabilities has no count.
        ManifestMismatchError: `work` holds evidence of other models or another corpus.
    """
    chosen = RecoverSettings(**settings)
    check_count(count, chosen)
    check_engine(engine)
    refuse_inputs(work, [base, final, corpus, chosen.tokenizer], flag="--work", is_directory=True)
    case, place = open_case(str(base), str(final), chosen), Place.at(work)
    tokenizer = load_tokenizer(case.tokenizer or case.final, case.base, False)
    prepare(tokenizer, chosen.chat_template)
    date = date_of(place, tokenizer, chosen.date, date_of_training(case.final))
    warn_of_another_day(case.final, date)
    supervised = chosen.supervise or supervision_of_training(case.final)
    with written_by(chosen.chat_template, date, supervised), writing_to(place.scratch), workers_kept(engine):
        return _recovered(case, open_corpus(corpus), chosen, count=count, place=place, engine=engine,
                          progress=progress)  # fmt: skip


def _recovered(
    case: Case,
    opened: Corpus,
    chosen: RecoverSettings,
    *,
    count: int | None,
    place: Place,
    engine: EngineOption,
    progress: ProgressOption,
) -> Recovered:
    """As `recover`, of two models that have been compared."""
    fingerprint = fingerprint_of(opened)
    refuse_uninformative(case, opened)
    case, unmoved_note = only_moved(case)
    with place.locked():
        place.scratch.mkdir(parents=True, exist_ok=True)
        if chosen.choices:
            opened = labelled(case, opened, place.below("labels"), fingerprint, chosen, progress=progress)
            fingerprint = fingerprint_of(opened)
        case = with_scale(case, chosen.undo, opened, fingerprint.rows)
        trained_on = min(count or max(1, fingerprint.rows // 10), max(1, fingerprint.rows // 2))
        known, others, learned = None, {}, None
        if chosen.method == "calibrated":
            known = build_calibration_set(case, opened, chosen, place.scratch, count=trained_on, rows=fingerprint.rows)
            others = {SHADOW_DIFFERENCE: known.case}
            case = with_points_of(case, known.case)
        evidence = gather_evidence(case, opened, place.below("evidence"), fingerprint, points=chosen.points,
                                   others=others, engine=engine, progress=progress)  # fmt: skip
        if not evidence.usable.any():
            raise SettingError(f"{opened.name}: none of its {fingerprint.rows:,} rows has evidence to score")
        if known is not None:
            learned = calibrate_on_shadow(
                known, chosen, place, base=_shadow_at_base(evidence, known), engine=engine, progress=progress
            )
        sources, labels = _columns(opened)
        recipe = learned.shadow.recipe if learned is not None else None
        mixture = shares_of_sources(case, opened, evidence, sources, recipe, place.scratch / "mixture",
                                    how=chosen.mixture, count=trained_on, seed=chosen.seed,
                                    progress=progress)  # fmt: skip
        rounds: list[Round] = []
        if chosen.rounds:
            listed = rows_of(opened, evidence.short_list.tolist())
            recipe = recipe_of(case, chosen, trained_on)
            evidence, rounds = relinearised(case, evidence, listed, recipe, place.scratch, rounds=chosen.rounds,
                                            seed=chosen.seed)  # fmt: skip
    scores, p_values, weights, membership = _scores(
        evidence, chosen, learned, trained_on, is_count_known=count is not None
    )
    usable = int(evidence.usable.sum())
    ranking = scores if membership is None else membership.log_odds
    order = ranking.argsort(descending=True, stable=True)[:usable].tolist()
    size = min(count, usable) if count is not None else int((scores >= 0.5).sum())
    is_even = bool(chosen.choices and count is not None) if chosen.balanced is None else chosen.balanced
    numbers = evenly(order, labels, size) if is_even else order[:size]
    notes = _notes(case, evidence, unmoved_note, learned, rounds, count)
    columns = {"whence_score": scores, "whence_p": p_values} | ({} if weights is None else {"whence_weight": weights})
    rows = [
        row | {name: float(column[number]) for name, column in columns.items()}
        for number, row in zip(numbers, rows_of(opened, numbers), strict=True)
    ]
    return Recovered(
        rows=rows,
        numbers=numbers,
        scores=scores,
        p_values=p_values,
        mixture=mixture,
        layers=case.difference.rows(),
        notes=notes,
        settings=_settings_lines(case, chosen, learned, opened, is_even=is_even),
        learned=learned,
        null=None if membership is None else membership.null_log_odds.float(),
        members=None if membership is None else (membership.members, membership.low, membership.high),
        columns=opened.columns,
    )


def _notes(
    case: Case,
    evidence: CorpusEvidence,
    unmoved_note: str | None,
    learned: Learned | None,
    rounds: Sequence[Round],
    count: int | None,
) -> list[str]:
    """Limits of the result that a reader has to know, one sentence each."""
    usable = int(evidence.usable.sum())
    notes = [*case.notes, *case.difference.notes, *([unmoved_note] if unmoved_note else [])]
    if learned is not None and not math.isfinite(learned.shadow.distance):
        notes.append("The shadow and the final moved no matrix in common: its optimizer is a guess without evidence.")
    if count is not None and count > usable:
        notes.append(f"{count:,} rows were asked for, and {usable:,} have evidence.")
    if unusable := len(evidence.usable) - usable:
        notes.append(f"Left out, for want of a supervised token or of finite evidence: {number_of(unusable, 'row')}.")
    if usable > case.short_list:
        note = f"Of {number_of(usable, 'row')} {len(evidence.short_list):,} were matched jointly (--short-list)"
        notes.append(f"{note}; of the shadow's members such a list held {learned.kept:.0%}." if learned else f"{note}.")
    for number, training in enumerate(rounds, 1):
        notes.append(
            f"Round {number}: trained on what was chosen, the base ends {training.remaining:.2f} of its distance away "
            f"from the final (cosine {training.cosine:.2f})."
        )
    return notes


def _shadow_at_base(evidence: CorpusEvidence, known: CalibrationSet) -> PointEvidence | None:
    """The shadow's evidence at theta_0, if the pass over the corpus served the shadow too; else None."""
    base = evidence.points["base"]
    return base.subset(known.numbers, {DIFFERENCE: SHADOW_DIFFERENCE}) if SHADOW_DIFFERENCE in base.dots else None


def _scores(
    evidence: CorpusEvidence,
    settings: RecoverSettings,
    learned: Learned | None,
    trained_on: int,
    *,
    is_count_known: bool,
) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"], Float32[Tensor, " n"] | None, Recalibrated | None]:
    """Scores, p-values, coefficients in the sum that matches T, and for `calibrated` log odds of all rows."""
    if learned is None:
        scores = method_scores(evidence, settings.method, count=trained_on, seed=settings.seed)
        weights = None
        if settings.method == "nnls":
            weights = torch.zeros(len(scores)).index_copy_(0, evidence.short_list, matched(evidence)[0])
        return scores, p_values_of(scores, scores[evidence.usable]), weights, None
    table = features(evidence)
    odds = learned.calibration.log_odds(table)
    membership = recalibrated(
        odds[table.usable],
        learned.others,
        learned.member_odds,
        share=trained_on / len(evidence.usable),
        is_share_known=is_count_known,
        distance=learned.shadow.distance,
        seed=settings.seed,
    )
    p_values = p_values_of(odds, membership.null)
    log_odds = torch.full_like(odds, -torch.inf).masked_scatter_(table.usable, membership.log_odds)
    scores = torch.where(table.usable, log_odds.sigmoid(), -torch.inf).float()
    weights = table.values[:, table.names.index("part")].float()
    return scores, p_values, weights, replace(membership, log_odds=log_odds)


def p_values_of(scores: Float[Tensor, " n"], null: Float[Tensor, " m"]) -> Float32[Tensor, " n"]:
    """(1 + number of null values as high as the score) / (1 + number of null values)."""
    ordered = null.sort().values
    below = torch.searchsorted(ordered, scores.contiguous())
    return (1 + len(ordered) - below) / (1 + len(ordered))


def evenly(order: Sequence[int], labels: Sequence[str | None], count: int) -> list[int]:
    """The first rows of an order, as many of each label as of any other; a label that runs out is replaced by others.

    >>> evenly([4, 3, 2, 1, 0], ["a", "b", "b", "b", "b"], 3)
    [4, 3, 0]
    """
    rows_before: Counter[str | None] = Counter()
    places = []
    for place, row in enumerate(order):
        places.append((rows_before[labels[row]], place))
        rows_before[labels[row]] += 1
    return [order[place] for place in sorted(place for _, place in sorted(places)[:count])]


def _columns(corpus: Corpus) -> tuple[list[str | None], list[str | None]]:
    """Source and label of every row."""
    pairs = [(example.row.get("source"), example.row.get("label")) for example in corpus]
    sources, labels = (
        [None if value is None else str(value) for value in column] for column in zip(*pairs, strict=True)
    )
    return sources, labels


def _settings_lines(
    case: Case, settings: RecoverSettings, learned: Learned | None, corpus: Corpus, *, is_even: bool
) -> dict[str, str]:
    """Settings as a report shows them."""
    lines = {"method": settings.method, "base": case.base, "final": case.final, "corpus": corpus.name,
            "layers": case.settings.space.layers or "linear layers of the blocks"}  # fmt: skip
    if settings.undo != "none":
        lines["undone on the target"] = f"AdamW's scaling, by {settings.undo}"
    if settings.remove_decay:
        lines["removed from the target"] = "weight decay"
    if settings.choices:
        lines["labels"] = f"{settings.labels}, of {', '.join(settings.choices)}"
    if is_even:
        lines["chosen"] = "as many rows of every label, as far as there are"
    if learned is not None:
        recipe = learned.shadow.recipe
        lines["shadow"] = (
            f"{number_of(learned.members, 'row')}, {number_of(recipe.epochs, 'epoch')} of batch {recipe.batch_size}, "
            f"{recipe.optimizer} at {recipe.lr:.2g}; it moved "
            f"{learned.shadow.norm:.2f} times as far"
        )
    return lines
