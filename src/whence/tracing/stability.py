"""How firm a ranking is: what would stand by exact gradients, with another sketch, with other checkpoints of the run.

The scores s of an index are exact ones plus noise of a known deviation sigma (`depth.Noise`). The best of many are too
high, by how much their own density tells (Tweedie's formula):

    E[exact | s] = s + sigma^2 d/ds log f(s)         Var[exact | s] = sigma^2 (1 + sigma^2 d^2/ds^2 log f(s))

with f the density of the candidates' scores, smoothed by half a sigma. Exact scores are drawn from normal distributions
of these moments, those of another sketch with sigma^2 more, and the first m of each draw are held against the first m
that are shown. In simulations over normal and heavy-tailed scores, 500 and 2,000 rows, the first 3, 10 and 20, the
share of another sketch's first m came out within .05 wherever a tenth or more stood, and that of the exact ones too
(docs/LOG.md).

Checkpoints are drawn with replacement, as the run's own would be if it had saved others.

Margins are around scores that were chosen for being high, so that intervals of 95% each would hold fewer exact ones.
Those of a level 1 - .05 R / n, for the R rows shown of n, hold 95 of 100: the expected share of the R that miss (the
false coverage rate) is at most .05. In simulations they held 94 to 100 of 100 (docs/LOG.md).

Sources: Efron 2011, Tweedie's formula and selection bias, https://doi.org/10.1198/jasa.2011.tm11181; Benjamini and
Yekutieli 2005, False discovery rate-adjusted multiple confidence intervals for selected parameters, definition 1,
https://doi.org/10.1198/016214504000001907.
"""

from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.numerics import generator

DRAWS = 400
BANDWIDTH = 0.5
"""Of the scores' density, in standard deviations of their noise."""
MISSES = 0.05
"""Share of intervals that may miss what they are of."""
LEAST_VARIANCE = 0.2
"""Of an exact score, in variances of the noise: the density's curvature is not known well enough for less."""


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Shares of the examples shown that would be shown again; None where it is not known."""

    exact: float | None = None
    """By exact gradients, where the index alone ranks."""
    sketch: float | None = None
    """By an index of another seed, likewise."""
    checkpoints: float | None = None
    """With checkpoints drawn anew, where there are several and exact scores rank."""


def moments(
    scores: Float32[Tensor, " n"], noise: Float32[Tensor, " n"]
) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"]]:
    """Mean and variance of the exact scores behind an index' scores; see the module's text."""
    width = BANDWIDTH * noise.median().clamp(min=1e-30)
    apart = (scores[:, None] - scores) / width
    weights = torch.exp(-apart.square() / 2)
    total = weights.sum(1)
    slope = -(apart * weights).sum(1) / total / width
    bend = ((apart.square() - 1) * weights).sum(1) / total / width.square() - slope.square()
    variance = noise.square()
    return scores + variance * slope, variance * (1 + variance * bend).clamp(LEAST_VARIANCE, 1.0)


def under_noise(scores: Float32[Tensor, " n"], noise: Float32[Tensor, " n"], m: int) -> Stability:
    """Stability of the first m of an index' ranking.

    Args:
        scores: Of the index, best first, and larger is better: of `depth.candidates` rows, or of all there are.
        noise: Standard deviation of each.
        m: Rows that are shown.
    """
    m = min(m, len(scores))
    if not m or not float(noise.median()) > 0:
        return Stability() if not m else Stability(exact=1.0, sketch=1.0)
    mean, variance = moments(scores, noise)
    draws = torch.empty(DRAWS, len(scores))
    draws.normal_(generator=generator(0, "stability"))
    shares = [
        float((mean + draws * deviation).topk(m, dim=1).indices.lt(m).float().mean())
        for deviation in (variance.sqrt(), (variance + noise.square()).sqrt())
    ]
    return Stability(exact=max(shares), sketch=shares[1])  # where noise rules, neither is known to a twentieth


def under_checkpoints(scores: Float32[Tensor, "c n"], m: int) -> Stability:
    """Stability of the first m by the sum over checkpoints.

    Args:
        scores: Each checkpoint's weighted scores; larger is better.
        m: Rows that are shown.
    """
    count, n = scores.shape
    m = min(m, n)
    if count < 2 or not m:
        return Stability()
    shown = torch.zeros(n, dtype=torch.bool)
    shown[scores.sum(0).topk(m).indices] = True
    drawn = torch.randint(count, (DRAWS, count), generator=generator(0, "stability", "checkpoints"))
    times = torch.nn.functional.one_hot(drawn, count).sum(1).float()
    return Stability(checkpoints=float(shown[(times @ scores).topk(m, dim=1).indices].float().mean()))


def margins(noise: Float32[Tensor, " n"], shown: int, rows: int) -> Float32[Tensor, " n"]:
    """Half-widths, in units of the scores, of intervals around those of rows that are shown, which hold exact ones.

    Args:
        noise: Standard deviation of each row's score.
        shown: Rows that are shown, on both sides.
        rows: Rows that they were chosen from.
    """
    return noise * NormalDist().inv_cdf(1 - MISSES * min(1.0, shown / rows) / 2)
