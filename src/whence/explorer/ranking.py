"""The best and the worst rows of some scores: among those that pass a filter, duplicates folded.

Equal scores rank by the lower row number, at either end. No sort of all rows is needed: the m-th best score is found
first, and only rows that reach it are sorted.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor


@dataclass(frozen=True)
class Ranked:
    """One end of a ranking, best first."""

    rows: list[int]
    scores: list[float]
    """In the unit of what was ranked; larger is more helpful, at either end."""
    copies: list[int]
    """How many rows stand for each: itself, and those of the same text."""


def ranked(
    scores: Float32[Tensor, " n"],
    passes: Bool[Tensor, " n"],
    groups: Int64[Tensor, " n"] | None,
    m: int,
    *,
    opposing: bool = False,
) -> Ranked:
    """The first m rows.

    Args:
        scores: Larger is more helpful; rows of -inf, inf or NaN are not ranked.
        passes: Rows that may be ranked.
        groups: Number of each row's text, by which duplicates are folded into the first of them; None: none are.
        m: Rows that are wanted.
        opposing: Rank from the lowest score on.
    """
    allowed = (passes & scores.isfinite()).nonzero()[:, 0]
    values = -scores[allowed] if opposing else scores[allowed]
    counts = None if groups is None else torch.bincount(groups[allowed])
    reach = min(len(allowed), m)
    while True:
        rows = _first(allowed, values, reach)
        if groups is not None:
            rows = rows[_is_first(groups[rows])]
        if len(rows) >= m or reach == len(allowed):
            break
        reach = min(len(allowed), 4 * reach)
    rows = rows[:m]
    copies = [1] * len(rows) if groups is None or counts is None else counts[groups[rows]].tolist()
    return Ranked(rows.tolist(), scores[rows].tolist(), copies)


def _first(allowed: Int64[Tensor, " a"], values: Float32[Tensor, " a"], m: int) -> Int64[Tensor, " b"]:
    """The m rows of the highest values, and those that equal the last of them."""
    if not m:
        return allowed[:0]
    reached = values >= values.topk(m).values[-1]
    order = values[reached].argsort(descending=True, stable=True)
    return allowed[reached][order]


def _is_first(groups: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Whether a row is the first of its group."""
    out = torch.zeros(len(groups), dtype=torch.bool)
    seen: set[int] = set()
    for place, group in enumerate(groups.tolist()):
        out[place] = group not in seen
        seen.add(group)
    return out
