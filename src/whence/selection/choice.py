"""A selection: an order over rows, then filters, then a budget.

A selector offers rows best first; each is taken unless its source is at its cap, it is a duplicate of a row taken
before, or the budget has no room for it, in that order. Rows that never could be taken (no tokens, no finite score) are
not offered. Every row that is not taken has a reason.
"""

import math
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from whence.corpus.layouts import Row, row_text
from whence.errors import SettingError
from whence.selection.budget import Budget, Ledger, Limits
from whence.selection.duplicates import KeptTexts
from whence.selection.protocols import Pick, Selector, Target, View

EMPTY, UNSUPERVISED, NO_SCORE = "empty", "no supervised token", "no finite score"
AT_CAP, DUPLICATE, BELOW = "source at its cap", "duplicate", "below the budget"


@dataclass(frozen=True)
class Candidates:
    """Rows that could be chosen, and what is known of each."""

    scores: Float32[Tensor, "s n"]
    """Larger is more helpful; what is not finite is no score."""
    targets: Sequence[str]
    """Their names."""
    tokens: Int64[Tensor, " n"]
    """Prompt and completion; 0 where nobody has counted them."""
    sources: Sequence[str | None]
    texts: Sequence[str]
    """For duplicates."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Rows that may not be chosen whatever they score, and why."""

    def __post_init__(self):
        assert self.scores.shape == (len(self.targets), len(self.tokens)), "a score for each target and row"
        assert len(self.sources) == len(self.texts) == len(self.tokens), "a source and a text for each row"

    @classmethod
    def of(cls, view: View, targets: Sequence[Target], scores: Float32[Tensor, "s n"]) -> "Candidates":
        """Rows of a view, which is read once as text and once as tokens."""
        found = cls.of_texts(view.examples(), targets, scores)
        tokens, unsupervised = [], {}
        for number, encoded in enumerate(view.encoded()):
            tokens.append(len(encoded.ids))
            if not encoded.targets:
                unsupervised[number] = UNSUPERVISED
        return replace(found, tokens=torch.tensor(tokens), refused=unsupervised | dict(found.refused))

    @classmethod
    def of_texts(cls, rows: Iterable[Row], targets: Sequence[Target], scores: Float32[Tensor, "s n"]) -> "Candidates":
        """Rows of a corpus that nobody can count the tokens of, for there is no tokenizer."""
        texts, sources = [], []
        for row in rows:
            texts.append(row_text(row))
            sources.append(None if row.get("source") is None else str(row["source"]))
        empty = {number: EMPTY for number, text in enumerate(texts) if not text.strip()}
        names = [target.name for target in targets]
        return cls(scores, names, torch.zeros(len(texts), dtype=torch.int64), sources, texts, empty)

    def of_targets(self, some: slice) -> "Candidates":
        """The same rows, scored for some of the targets alone."""
        return replace(self, scores=self.scores[some], targets=self.targets[some])

    def rankable(self) -> Bool[Tensor, " n"]:
        """Rows that are not refused and have a finite score for some target."""
        able = torch.isfinite(self.scores).any(0)
        able[list(self.refused)] = False
        return able


@dataclass(frozen=True)
class Selection:
    """Rows that were chosen, and why the others were not."""

    rows: list[int]
    """Numbers, in rank order."""
    scores: list[float]
    """Of each, by what it was ranked; noise is left out."""
    targets: list[str | None]
    """Name of the target that each was taken for; None where no single one was."""
    reasons: list[str | None]
    """For every row of the pool: None for the chosen, else what kept it out."""
    tokens: int
    """Of the chosen rows together."""
    notes: list[str]
    """What else a person should know."""

    def tally(self) -> dict[str, int]:
        """Rows left out by kind of reason, most first; which row a duplicate repeats does not matter here."""
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
        candidates: In the pool's order.
        selector: Which rows come first.
        budget: How much is chosen.
        limits: Caps and floors of sources.
        duplicates: Leave out rows whose texts are, by this Jaccard similarity of their shingles or more, like one that
            is chosen; 1 for texts equal but for spaces and capitals; None takes duplicates too.

    Raises:
        SettingError: No row can be chosen, or a limit cannot be kept.
    """
    able = candidates.rankable()
    reasons: list[str | None] = [BELOW if is_able else NO_SCORE for is_able in able.tolist()]
    for row, why in candidates.refused.items():
        reasons[row] = why
    if not able.any():
        raise SettingError(f"none of {len(reasons):,} rows can be chosen: {_counted(reasons)}")
    tokens = candidates.tokens.tolist()
    pool = able.nonzero()[:, 0].tolist()
    ledger = Ledger(budget, limits or Limits(), sources=candidates.sources, tokens=tokens, pool=pool)
    desk = _Desk(candidates, ledger, None if duplicates is None else KeptTexts(duplicates), reasons)
    _offer(selector(candidates.scores.masked_fill(~able, -math.inf)), desk)
    picks = [pick for _, pick in sorted(desk.taken)]
    if not picks:
        raise SettingError(f"{budget}: nothing can be chosen. {_counted(reasons)}. {_shortest(budget, tokens, pool)}")
    notes = list(ledger.notes)
    if ledger.spent < ledger.size and not desk.is_stopped:
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


class _Desk:
    """Takes rows or refuses them."""

    def __init__(self, candidates: Candidates, ledger: Ledger, kept: KeptTexts | None, reasons: list[str | None]):
        self.candidates = candidates
        self.ledger = ledger
        self.kept = kept
        self.reasons = reasons
        self.taken: list[tuple[int, Pick]] = []
        """With the number of each in the order."""
        self.passed: list[tuple[int, Pick]] = []
        """Refused for want of room alone."""
        self.is_stopped = False
        """By the budget, not by the end of the order."""

    def consider(self, place: int, pick: Pick) -> bool:
        """Whether a row is taken."""
        row = pick.row
        if not self.ledger.is_open(row):
            self.passed.append((place, pick))
            return False
        if self.ledger.is_capped(row):
            self.reasons[row] = AT_CAP
            return False
        known = None if self.kept is None else self.kept.print_of(self.candidates.texts[row])
        if self.kept is not None and known is not None:
            twin = self.kept.twin(known)
            if twin is not None:
                self.reasons[row] = f"{DUPLICATE} of row {twin}"
                return False
        if not self.ledger.fits(row):
            self.passed.append((place, pick))
            return False
        if self.kept is not None and known is not None:
            self.kept.keep(row, known)
        self.ledger.take(row)
        self.reasons[row] = None
        self.taken.append((place, pick))
        return True


def _offer(order: Generator[Pick, bool, None], desk: _Desk) -> None:
    """Go through the order until the budget is spent; then let what was reserved in vain go to rows passed over."""
    place, answer = 0, None
    while not desk.ledger.is_full:
        try:
            pick = next(order) if answer is None else order.send(answer)
        except StopIteration:
            break
        answer = desk.consider(place, pick)
        place += 1
    order.close()
    if desk.ledger.release():
        waiting, desk.passed = desk.passed, []
        for place, pick in waiting:
            if desk.ledger.is_full:
                break
            desk.consider(place, pick)
    desk.is_stopped = desk.ledger.is_full


def _ties(candidates: Candidates, last: Pick, reasons: Sequence[str | None]) -> list[str]:
    """What a person should know where the budget ends among equals, as all rows are that share no word with a task."""
    below = [row for row, reason in enumerate(reasons) if reason == BELOW]
    scores = candidates.scores if last.target is None else candidates.scores[last.target]
    tied = int((scores[..., below] == last.score).sum()) if last.target is not None or len(scores) == 1 else 0
    if not tied:
        return []
    same = f"{tied:,} more rows score {last.score:.4g} as the last one chosen does"
    return [f"{same}: of equals the first in the pool are taken."]


def _tally(reasons: Sequence[str | None]) -> dict[str, int]:
    kinds = Counter(reason.partition(" of row ")[0] for reason in reasons if reason is not None)
    return dict(kinds.most_common())


def _counted(reasons: Sequence[str | None]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in _tally(reasons).items())


def _shortest(budget: Budget, tokens: Sequence[int], pool: Sequence[int]) -> str:
    if budget.tokens is None:
        return "Raise the caps."
    return f"The shortest row that can be ranked has {min(tokens[row] for row in pool):,} tokens."
