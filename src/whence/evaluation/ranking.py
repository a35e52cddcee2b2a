"""Measures of one ranking, given which rows are relevant: what of them stands at the top, and how soon the first comes.

    recall at k       relevant rows among the first k, as a share of all relevant rows
    precision at k    the same, as a share of k; of all rows, where there are fewer than k
    reciprocal rank   1 over the rank of the first relevant row; its mean over queries is the MRR

Rows of equal score are ranked in every order at once: each measure is its mean over those orders, so that none depends
on the order in which rows happen to stand. A row without a score (not finite) comes last. `numerics` has the areas:
`auroc` and `average_precision`.

Source: the mean over orders of a tie is that of McSherry and Najork 2008,
https://doi.org/10.1007/978-3-540-78646-7_38.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whence.numerics import auroc, average_precision


def measures(scores: Float[Tensor, " n"], relevant: Bool[Tensor, " n"], depths: Sequence[int]) -> dict[str, float]:
    """All measures of a ranking, by name.

    Args:
        scores: Larger is ranked higher.
        relevant: Some of both kinds.
        depths: Depths k of recall and precision.

    Raises:
        ValueError: No row is relevant, or all are.
    """
    ranked = torch.where(scores.isfinite(), scores, -torch.inf).double()
    out = {"auroc": auroc(ranked, relevant), "auprc": average_precision(ranked, relevant),
           "mrr": reciprocal_rank(ranked, relevant)}  # fmt: skip
    for k in depths:
        hits = hits_at(ranked, relevant, k)
        out |= {f"recall@{k}": hits / int(relevant.sum()), f"precision@{k}": hits / min(k, len(ranked))}
    return out


def hits_at(scores: Float[Tensor, " n"], relevant: Bool[Tensor, " n"], k: int) -> float:
    """Relevant rows among the first k.

    >>> hits_at(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([True, True, False]), 2)  # the second is one of a tie
    1.5
    """
    if k >= len(scores):
        return float(relevant.sum())
    last = scores.topk(k).values[-1]
    above, level = scores > last, scores == last
    share = (k - int(above.sum())) / int(level.sum())
    return int(relevant[above].sum()) + share * int(relevant[level].sum())


def reciprocal_rank(scores: Float[Tensor, " n"], relevant: Bool[Tensor, " n"]) -> float:
    """1 over the rank of the first relevant row.

    Among t rows of equal score of which h are relevant, the first relevant one stands at place j with a chance that
    falls by (t - j - h + 1) / (t - j) from place to place.

    Raises:
        ValueError: No row is relevant.

    >>> round(reciprocal_rank(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([False, True, False])), 4)  # second or third
    0.4167
    """
    if not relevant.any():
        raise ValueError(f"reciprocal rank of {len(relevant)} rows of which none is relevant")
    best = scores[relevant].max()
    before, level = int((scores > best).sum()), scores == best
    size, hits = int(level.sum()), int(relevant[level].sum())
    chance, mean = hits / size, 0.0
    for place in range(1, size - hits + 2):
        mean += chance / (before + place)
        if place <= size - hits:
            chance *= (size - place - hits + 1) / (size - place)
    return mean
