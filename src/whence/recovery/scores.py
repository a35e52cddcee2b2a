"""Ways to score rows by their evidence of a weight difference, without a shadow; `calibrated` is compared with them.

Each takes the evidence of a corpus, the number of rows that are sought, and a seed. The larger a score, the more likely
the row is a member.

Source: SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553, for `greedy_cosine`, `p_min` and `ghost` (there
with sketched gradients of the head); sources of the others stand with them.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.numerics import generator
from whence.recovery import pursuit
from whence.recovery.membership import CorpusEvidence, cosine, matched


def random_scores(evidence: CorpusEvidence, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Uniform random scores: chance."""
    return torch.rand(len(evidence.usable), generator=generator(seed, "recover", "random"))


def p_min(evidence: CorpusEvidence, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Minus the loss under theta_f: rows that the model finds likely."""
    return -evidence.points["final"].loss


def loss_drop(evidence: CorpusEvidence, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Fall of the loss: the score of all parameters over the whole path from theta_0 to theta_f."""
    return evidence.points["base"].loss - evidence.points["final"].loss


def relative_loss_drop(evidence: CorpusEvidence, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Fall of the loss as a share of the loss under theta_0."""
    before = evidence.points["base"].loss
    return (before - evidence.points["final"].loss) / before.clamp_min(1e-6)


def ghost(evidence: CorpusEvidence, count: int, seed: int) -> Float32[Tensor, " n"]:
    """<g, T>, the mean over points: SELECT's top-k without the cosine, exact."""
    return torch.stack([point.dots[evidence.direction].sum(0) for point in evidence.points.values()]).mean(0)


def row_cosine(evidence: CorpusEvidence, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Cosine of a row's gradient at theta_f with T, exact."""
    return cosine(evidence, "final")


def greedy_cosine(evidence: CorpusEvidence, count: int, seed: int) -> Float32[Tensor, " n"]:
    """SELECT: the greedy that grows the cosine of the chosen rows' summed gradients at theta_f with T."""
    return _ranked_first(evidence, pursuit.cosine(evidence.gradients(), count=count).scores)


def matching(evidence: CorpusEvidence, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Matching pursuit of T by the gradients at theta_f."""
    return _ranked_first(evidence, pursuit.matching(evidence.gradients(), count=count).scores)


def nnls(evidence: CorpusEvidence, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Coefficient of a row in the non-negative sum of unit gradients that matches T, their mean direction removed."""
    return _ranked_first(evidence, matched(evidence)[1])


def _ranked_first(evidence: CorpusEvidence, scores: Float32[Tensor, " m"]) -> Float32[Tensor, " n"]:
    """Scores of the short list; all other rows rank below them, by their cosine."""
    finite = scores[scores.isfinite()]
    lowest = float(finite.min()) if len(finite) else 0.0
    return (cosine(evidence, "final") + (lowest - 2)).index_copy(0, evidence.short_list, scores)


SCORES: dict[str, Callable[[CorpusEvidence, int, int], Float32[Tensor, " n"]]] = {
    "nnls": nnls,
    "matching": matching,
    "cosine": greedy_cosine,
    "row_cosine": row_cosine,
    "ghost": ghost,
    "loss_drop": loss_drop,
    "relative_loss_drop": relative_loss_drop,
    "p_min": p_min,
    "random": random_scores,
}


def method_scores(evidence: CorpusEvidence, method: str, *, count: int, seed: int = 0) -> Float32[Tensor, " n"]:
    """Scores of a method that needs no shadow; -inf for rows without evidence."""
    scores = SCORES[method](evidence, count, seed)
    return torch.where(evidence.usable & scores.isfinite(), scores, -torch.inf)
