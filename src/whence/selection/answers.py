"""The answers of the rows chosen beside those of the task's examples: does a choice keep what the task tells apart?

A choice can have all of its rows from the task's own source and still ruin a classifier, if they all have one label:
the mean of the examples' gradients mostly points to what their labels share and to the commonest label, and a model
trained on one label forgets the others. An answer is a row's completion, but for capitals and spaces; a label is an
answer that at least two of the task's examples have. Free text repeats no answer and has no labels.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

ENOUGH = 10
"""Rows from which on their shares say something."""
LEAST_PART = 0.25
"""A label is missed if its share of the rows chosen is below this part of its share of the task's examples."""
DOMINANT = 0.5
"""Share of the rows chosen from which one answer is most of them, if that is twice its share of the examples."""
LONGEST = 40
"""Characters of an answer in a sentence."""


class AnswerShare(NamedTuple):
    """How often an answer occurs."""

    answer: str
    task_share: float
    """Of the task's examples."""
    share: float
    """Of the rows chosen."""
    rows: int
    """Rows chosen that have it."""


def answer_shares(chosen: Sequence[str | None], examples: Sequence[str]) -> list[AnswerShare]:
    """The labels of the task, and any answer that most of the chosen rows have; the commonest of the task's first.

    >>> answer_shares(["Yes", "yes "] + ["No"] * 2, ["yes", "Yes", "No", "no"])[0]
    AnswerShare(answer='yes', task_share=0.5, share=0.5, rows=2)
    >>> answer_shares(["a", "b"], ["c", "d"])
    []

    Without examples there is nothing to compare with:

    >>> answer_shares(["a", "a"], [])
    []
    """
    if not examples:
        return []
    theirs = Counter(_normal(answer) for answer in examples)
    ours = Counter(_normal(answer) for answer in chosen if answer is not None)
    names = [name for name, count in theirs.most_common() if count > 1]
    most = [name for name, count in ours.most_common(1) if count >= max(2, DOMINANT * len(chosen))]
    names += [name for name in most if name not in names]
    return [
        AnswerShare(name, theirs[name] / len(examples), ours[name] / len(chosen), ours[name]) for name in names if name
    ]


def collapse(shares: Sequence[AnswerShare], rows: int, *, takes_turns: bool) -> str | None:
    """A warning that one answer crowds out others, with the remedy; None where none does.

    Args:
        shares: Of `answer_shares`.
        rows: Number of rows chosen.
        takes_turns: Whether each example of the task had its turn already.
    """
    labels = [share for share in shares if share.task_share]
    matched, whole = sum(share.rows for share in labels), sum(share.task_share for share in labels)
    missed = [
        share for share in labels if matched >= ENOUGH and share.rows / matched < LEAST_PART * share.task_share / whole
    ]
    crowding = [share for share in shares if rows >= ENOUGH and share.share >= max(DOMINANT, 2 * share.task_share)]
    if not missed and not crowding:
        return None
    most = max(shares, key=lambda share: share.rows)
    listed = "".join(f"; {_told(share)}" for share in missed if share is not most)
    remedy = "try --by example --selector round_robin"
    if takes_turns:
        remedy = "give more examples, or compare with --method bm25"
    return (
        f"The answers chosen are not the task's: {_told(most)}{listed}. A model trained on them may unlearn the other "
        f"answers, however well the rows score: {remedy}."
    )


def _told(share: AnswerShare) -> str:
    name = share.answer if len(share.answer) <= LONGEST else share.answer[:LONGEST] + "..."
    return f"{name!r} is {share.share:.0%} of the rows and {share.task_share:.0%} of the task's examples"


def _normal(answer: str) -> str:
    return " ".join(answer.casefold().split())
