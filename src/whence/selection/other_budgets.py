"""What a selection would be under another budget: the first rows of its own order, or those and the ones that follow.

A selector's order does not depend on the budget, and neither does whether a row is a duplicate of one that comes before
it. So a smaller choice is the beginning of the larger one, exactly. Rows below the budget were not compared with those
before them, so that a larger choice may leave out some as duplicates. Caps and floors of sources are shares of a
budget: with them another budget is another order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from whence.selection.choice import BELOW, Candidates, Selection
from whence.selection.protocols import Pick, Selector

STEPS = 48
"""Sizes of choices that are looked at."""


@dataclass(frozen=True)
class Step:
    """A choice of so many rows."""

    rows: int
    tokens: int
    """Of these rows together; 0 where they cannot be counted."""
    score: float
    """That the last of them is ranked by, in its method's unit; larger is more helpful."""
    by_source: list[int]
    """Rows of each source."""
    tokens_by_source: list[int]


def full_order(candidates: Candidates, selector: Selector, selection: Selection) -> list[Pick]:
    """All rows that may be chosen, best first; without duplicates of those that were chosen."""
    scores = candidates.scores.masked_fill(~candidates.rankable(), -math.inf)
    order, picks, is_taken = selector(scores), list[Pick](), None
    while True:
        try:
            pick = next(order) if is_taken is None else order.send(is_taken)
        except StopIteration:
            return picks
        is_taken = selection.reasons[pick.row] in (None, BELOW)
        if is_taken:
            picks.append(pick)


def steps(candidates: Candidates, order: Sequence[Pick], sources: Sequence[str | None], chosen: int) -> list[Step]:
    """Choices of about `STEPS` sizes, each about as much larger than the one before; that of `chosen` rows is one.

    Args:
        candidates: The rows.
        order: Of those that may be chosen; see `full_order`.
        sources: Names of the sources, in the order of `Step.by_source`.
        chosen: Rows of a choice that must be among the steps.
    """
    sizes = {round(len(order) ** (number / (STEPS - 1))) for number in range(STEPS)} | {chosen}
    places = {source: place for place, source in enumerate(sources)}
    out, by_source, tokens, lengths = [], [0] * len(sources), [0] * len(sources), candidates.tokens.tolist()
    for count, pick in enumerate(order, start=1):
        place = places[candidates.sources[pick.row]]
        by_source[place] += 1
        tokens[place] += lengths[pick.row]
        if count in sizes:
            out.append(Step(count, sum(tokens), pick.score, list(by_source), list(tokens)))
    return out
