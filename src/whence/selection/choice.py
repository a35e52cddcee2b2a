"""A selection: an order over rows, then filters, then a budget.

A selector offers rows best first; each is taken unless its source is at its cap, it is a duplicate of a row taken
before, or the budget has no room for it, in that order. Rows that cannot be chosen (no tokens, no finite score) are not
offered. Every row that is not taken has a reason.
"""

import math
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from whence.corpus.layouts import Row, row_text
from whence.counts import number_of
from whence.errors import SettingError
from whence.selection.budget import Budget, Ledger, Limits
from whence.selection.duplicates import ChosenTexts
from whence.selection.protocols import Pick, Selector, Target, View

EMPTY, UNSUPERVISED, NO_SCORE = "empty", "no supervised token", "no finite score"
AT_CAP, DUPLICATE, BELOW = "source at its cap", "duplicate", "below the budget"


@dataclass(frozen=True)
class Candidates:
    """Rows to choose from, with their scores, lengths, sources and texts."""

    scores: Float32[Tensor, "s n"]
    """Larger is more helpful; a value that is not finite is no score."""
    targets: Sequence[str]
    """Names of the targets."""
    tokens: Int64[Tensor, " n"]
    """Number of tokens in prompt and completion; 0 where there is no tokenizer to count them."""
    sources: Sequence[str | None]
    texts: Sequence[str]
    """Texts by which duplicates are found."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Rows that may not be chosen whatever their scores, with the reason."""

    def __repr__(self) -> str:
        return f"Candidates({number_of(len(self.texts), 'row')}, {number_of(len(self.targets), 'target')})"

    def __post_init__(self):
        assert self.scores.shape == (len(self.targets), len(self.tokens)), "a score for each target and row"
        assert len(self.sources) == len(self.texts) == len(self.tokens), "a source and a text for each row"

    @classmethod
    def of(cls, view: View, targets: Sequence[Target], scores: Float32[Tensor, "s n"]) -> "Candidates":
        """Rows of a view, which is read once as text and once as tokens."""
        uncounted = cls.of_texts(view.examples(), targets, scores)
        tokens, unsupervised = [], {}
        for number, encoded in enumerate(view.encoded()):
            tokens.append(len(encoded.ids) + (0 if encoded.rejected is None else len(encoded.rejected.ids)))
            if not encoded.supervised_count:
                unsupervised[number] = UNSUPERVISED
        return replace(uncounted, tokens=torch.tensor(tokens), refused=unsupervised | dict(uncounted.refused))

    @classmethod
    def of_texts(cls, rows: Iterable[Row], targets: Sequence[Target], scores: Float32[Tensor, "s n"]) -> "Candidates":
        """Rows of a corpus whose tokens cannot be counted, because there is no tokenizer."""
        texts, sources = [], []
        for row in rows:
            texts.append(row_text(row))
            sources.append(None if row.get("source") is None else str(row["source"]))
        empty = {number: EMPTY for number, text in enumerate(texts) if not text.strip()}
        names = [target.name for target in targets]
        return cls(scores, names, torch.zeros(len(texts), dtype=torch.int64), sources, texts, empty)

    def of_targets(self, numbers: slice) -> "Candidates":
        """The same rows, scored for some of the targets alone."""
        return replace(self, scores=self.scores[numbers], targets=self.targets[numbers])

    def rankable(self) -> Bool[Tensor, " n"]:
        """Rows that are not refused and have a finite score for some target."""
        is_rankable = torch.isfinite(self.scores).any(0)
        is_rankable[list(self.refused)] = False
        return is_rankable


@dataclass(frozen=True)
class Selection:
    """Rows that were chosen, and why the others were not."""

    rows: list[int]
    """Numbers, in rank order."""
    scores: list[float]
    """The score that each row was ranked by, without noise."""
    targets: list[str | None]
    """Name of the target that each row was taken for; None where it was for no single one."""
    reasons: list[str | None]
    """Why each row of the corpus was left out; None for a chosen row."""
    tokens: int
    """Number of tokens of the chosen rows together."""
    notes: list[str]
    """What else a person should know."""

    def __repr__(self) -> str:
        rows, tokens = number_of(len(self.reasons), "row"), number_of(self.tokens, "token")
        return f"Selection({len(self.rows):,} of {rows}, {tokens}, .tally())"

    def tally(self) -> dict[str, int]:
        """Number of rows left out for each kind of reason, most first; all duplicates are one kind."""
        return _tally(self.reasons)


def choose(
    candidates: Candidates,
    selector: Selector,
    budget: Budget,
    *,
    limits: Limits | None = None,
    duplicates: float | None = None,
) -> Selection:
    """Choose rows.

    Args:
        candidates: Rows to choose from, in the order of the corpus.
        selector: It says which rows come first.
        budget: How much is chosen.
        limits: Caps and floors of sources.
        duplicates: Jaccard similarity of shingles from which a row's text is a duplicate of a chosen one, and is left
            out; 1 for texts equal but for spaces and capitals; None takes duplicates too.

    Raises:
        SettingError: No row can be chosen, or a limit cannot be kept.
    """
    is_rankable = candidates.rankable()
    reasons: list[str | None] = [BELOW if can_rank else NO_SCORE for can_rank in is_rankable.tolist()]
    for row, reason in candidates.refused.items():
        reasons[row] = reason
    if not is_rankable.any():
        raise SettingError(f"none of {number_of(len(reasons), 'row')} can be chosen: {_tally_line(reasons)}")
    tokens = candidates.tokens.tolist()
    rankable = is_rankable.nonzero()[:, 0].tolist()
    ledger = Ledger(budget, limits or Limits(), sources=candidates.sources, tokens=tokens, rankable=rankable)
    intake = _Intake(candidates, ledger, None if duplicates is None else ChosenTexts(duplicates), reasons)
    _offer(selector(candidates.scores.masked_fill(~is_rankable, -math.inf)), intake)
    picks = [pick for _, pick in sorted(intake.picks)]
    if not picks:
        raise SettingError(
            f"{budget}: nothing can be chosen. {_tally_line(reasons)}. {_remedy(budget, tokens, rankable)}"
        )
    notes = list(ledger.notes)
    if ledger.spent < ledger.size and not intake.is_stopped:
        unit = "tokens" if ledger.is_in_tokens else "rows"
        notes.append(f"{budget}: {ledger.spent:,} of {ledger.size:,} {unit} are chosen, for no more rows may be.")
    notes += _ties(candidates, picks[-1], reasons)
    return Selection(
        rows=[pick.row for pick in picks],
        scores=[pick.score for pick in picks],
        targets=[None if pick.target is None else candidates.targets[pick.target] for pick in picks],
        reasons=reasons,
        tokens=sum(tokens[pick.row] for pick in picks),
        notes=notes,
    )


class _Intake:
    """Takes rows or refuses them, by caps, duplicates and budget."""

    def __init__(self, candidates: Candidates, ledger: Ledger, texts: ChosenTexts | None, reasons: list[str | None]):
        self.candidates = candidates
        self.ledger = ledger
        self.texts = texts
        self.reasons = reasons
        self.picks: list[tuple[int, Pick]] = []
        """Picks that were taken, each with its place in the order."""
        self.passed_over: list[tuple[int, Pick]] = []
        """Picks that were refused for want of room alone."""
        self.is_stopped = False
        """Whether the budget ended the choice, not the end of the order."""

    def consider(self, place: int, pick: Pick) -> bool:
        """Take a row or refuse it, and return whether it was taken."""
        row = pick.row
        if not self.ledger.is_open(row):
            self.passed_over.append((place, pick))
            return False
        if self.ledger.is_capped(row):
            self.reasons[row] = AT_CAP
            return False
        fingerprint = None if self.texts is None else self.texts.fingerprint(self.candidates.texts[row])
        if self.texts is not None and fingerprint is not None:
            twin = self.texts.twin(fingerprint)
            if twin is not None:
                self.reasons[row] = f"{DUPLICATE} of row {twin}"
                return False
        if not self.ledger.fits(row):
            self.passed_over.append((place, pick))
            return False
        if self.texts is not None and fingerprint is not None:
            self.texts.add(row, fingerprint)
        self.ledger.take(row)
        self.reasons[row] = None
        self.picks.append((place, pick))
        return True


def _offer(order: Generator[Pick, bool, None], intake: _Intake) -> None:
    """Go through the order until the budget is spent; then offer what was reserved in vain to rows passed over."""
    place, is_taken = 0, None
    while not intake.ledger.is_full:
        try:
            pick = next(order) if is_taken is None else order.send(is_taken)
        except StopIteration:
            break
        is_taken = intake.consider(place, pick)
        place += 1
    order.close()
    if intake.ledger.release():
        passed_over, intake.passed_over = intake.passed_over, []
        for place, pick in passed_over:
            if intake.ledger.is_full:
                break
            intake.consider(place, pick)
    intake.is_stopped = intake.ledger.is_full


def _ties(candidates: Candidates, last: Pick, reasons: Sequence[str | None]) -> list[str]:
    """A note where the budget ends among rows of equal scores, such as those that share no word with a task."""
    below = [row for row, reason in enumerate(reasons) if reason == BELOW]
    scores = candidates.scores if last.target is None else candidates.scores[last.target]
    tied = int((scores[..., below] == last.score).sum()) if last.target is not None or len(scores) == 1 else 0
    if not tied:
        return []
    equals = f"{number_of(tied, 'more row scores', 'more rows score')} {last.score:.4g} as the last one chosen does"
    return [f"{equals}: of equals the first in the pool are taken."]


def _tally(reasons: Sequence[str | None]) -> dict[str, int]:
    kinds = Counter(reason.partition(" of row ")[0] for reason in reasons if reason is not None)
    return dict(kinds.most_common())


def _tally_line(reasons: Sequence[str | None]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in _tally(reasons).items())


def _remedy(budget: Budget, tokens: Sequence[int], rankable: Sequence[int]) -> str:
    if budget.tokens is None:
        return "Raise the caps."
    return f"The shortest row that can be ranked has {min(tokens[row] for row in rankable):,} tokens."
