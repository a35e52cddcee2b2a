"""Ways to score rows by their evidence of a weight difference, without a shadow: what `calibrated` is measured by.

All of them take what was `Seen`, the number of rows that are looked for, and a seed; larger is more likely a member.

Source: SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553, for `greedy_cosine`, `p_min` and `ghost` (there
with sketched gradients of the head); the rest is named where it stands.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.numerics import generator
from whence.recovery import pursuit
from whence.recovery.membership import Seen, cosine, matched


def random_scores(seen: Seen, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Chance."""
    return torch.rand(len(seen.usable), generator=generator(seed, "recover", "random"))


def p_min(seen: Seen, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Minus the loss under theta_f: what the model finds likely."""
    return -seen.points["final"].loss


def loss_drop(seen: Seen, count: int, seed: int) -> Float32[Tensor, " n"]:
    """How far the loss fell: the score of all parameters over the whole path from theta_0 to theta_f."""
    return seen.points["base"].loss - seen.points["final"].loss


def relative_loss_drop(seen: Seen, count: int, seed: int) -> Float32[Tensor, " n"]:
    """The same, as a share of the loss under theta_0."""
    before = seen.points["base"].loss
    return (before - seen.points["final"].loss) / before.clamp_min(1e-6)


def ghost(seen: Seen, count: int, seed: int) -> Float32[Tensor, " n"]:
    """<g, T>, the mean over points: SELECT's top-k without the cosine, exact."""
    return torch.stack([point.dots[seen.target].sum(0) for point in seen.points.values()]).mean(0)


def row_cosine(seen: Seen, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Of a row's gradient at theta_f with T, exact."""
    return cosine(seen, "final")


def greedy_cosine(seen: Seen, count: int, seed: int) -> Float32[Tensor, " n"]:
    """SELECT: the greedy that grows the cosine of the chosen rows' summed gradients at theta_f with T."""
    return _jointly(seen, pursuit.cosine(seen.gradients(), count=count).scores)


def matching(seen: Seen, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Residual matching pursuit on the same."""
    return _jointly(seen, pursuit.matching(seen.gradients(), count=count).scores)


def nnls(seen: Seen, count: int, seed: int) -> Float32[Tensor, " n"]:
    """Part of a row in the non-negative sum of unit gradients that matches T, their mean direction removed."""
    return _jointly(seen, matched(seen)[1])


def _jointly(seen: Seen, scores: Float32[Tensor, " m"]) -> Float32[Tensor, " n"]:
    """Scores of the short list; all others stand below them, by their cosine."""
    known = scores[scores.isfinite()]
    lowest = float(known.min()) if len(known) else 0.0
    return (cosine(seen, "final") + (lowest - 2)).index_copy(0, seen.short, scores)


SCORES: dict[str, Callable[[Seen, int, int], Float32[Tensor, " n"]]] = {
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


def method_scores(seen: Seen, method: str, *, count: int, seed: int = 0) -> Float32[Tensor, " n"]:
    """Scores of a method that needs no shadow; -inf for rows without evidence."""
    found = SCORES[method](seen, count, seed)
    return torch.where(seen.usable & found.isfinite(), found, -torch.inf)
