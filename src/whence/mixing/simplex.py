"""The best mixture under a law, and how far it can be trusted.

Minimised is the weighted mean over evaluation sets of the predicted losses, over the mixtures with 0 <= r_j <= cap_j.
A cap is what there is: a domain of N tokens, seen at most `epochs` times in a run of D, cannot be more than
epochs N / D of it.

A law with slopes is descended (SLSQP) from its prior and from the best of a random search; where the law is convex the
result is checked: the linear function that touches it there has its own least value in closed form (fill the domains of
least slope to their caps), and no mixture can be better by more than the difference, the Frank-Wolfe gap. A law without
slopes (trees) is searched: the mean of the best 128 of 100,000 random mixtures, as RegMix does. Random mixtures are
Dirichlet around the prior, dense and sparse ones in turn; what exceeds a cap is given to the others in proportion.

Sources: Jaggi 2013, Revisiting Frank-Wolfe, https://proceedings.mlr.press/v28/jaggi13.html, for the gap; Liu et al.
2025, RegMix, https://arxiv.org/abs/2407.01492, for the search; Ye et al. 2025, https://arxiv.org/abs/2403.16952, for
the critical ratio.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.optimize import brentq, linprog, minimize

from whence.errors import SettingError
from whence.mixing.tables import MixingLaw, MixtureTable, named_amounts, place_of
from whence.numerics import mixed_seed

DRAWS = 100_000
BEST = 128
"""Whose mean is taken, of a law without slopes."""
STARTS = 4
"""Of the descent, beside the prior."""
STRENGTHS = (0.5, 50.0)
"""Least and most sum of a Dirichlet's parameters."""
BLOCK = 10_000
"""Mixtures predicted at once."""
GRID = 1001
"""Shares at which a crossing is looked for."""


@dataclass(frozen=True)
class Optimum:
    """What a law takes for the best mixture."""

    mixture: Float64[np.ndarray, " K"]
    predicted: Float64[np.ndarray, " E"]
    """Its losses."""
    objective: float
    """Their weighted mean."""
    gap: float | None
    """No mixture within the caps is predicted to be better by more; None where the law is not convex."""


def optimum(
    law: MixingLaw,
    targets: Mapping[str, float] | None = None,
    *,
    caps: Mapping[str, float] | None = None,
    prior: Float64[np.ndarray, " K"] | None = None,
    seed: int = 0,
) -> Optimum:
    """Find the mixture of least predicted loss.

    Args:
        law: What predicts.
        targets: Weights of evaluation sets by name, in any proportion; sets not named count nothing. None: all alike.
        caps: Most of a domain by name, as a share.
        prior: Around which mixtures are drawn, and where the descent begins; uniform unless given.
        seed: Of the drawn mixtures.

    Raises:
        SettingError: An unknown name, a weight or cap that cannot be, weights that are all 0, or caps that leave less
            than a whole mixture.
    """
    most = cap_vector(law.domains, caps or {})
    weights = target_vector(law.sets, targets)
    centre = np.full(len(most), 1 / len(most)) if prior is None else prior
    found, values = _searched(law, weights, most, centre, seed)
    order = np.argsort(values, kind="stable")
    gap = None
    if law.slopes(centre) is None:
        best = capped(found[order[:BEST]].mean(0, keepdims=True), most)[0]
    else:
        starts = [capped(centre[None], most)[0], *found[order[:STARTS]]]
        ends = np.stack([_descended(law, weights, most, start) for start in starts])
        best = ends[np.argmin(law.predict(ends) @ weights)]
        gap = _gap(law, weights, most, best) if law.is_convex else None
    predicted = law.predict(best[None])[0]
    return Optimum(best, predicted, float(predicted @ weights), gap)


def target_vector(sets: tuple[str, ...], targets: Mapping[str, float] | None) -> Float64[np.ndarray, " E"]:
    """Weights of evaluation sets, summing to 1; all alike unless given."""
    weights = np.ones(len(sets)) if not targets else named_amounts(targets, sets, "--target", "evaluation set", 0.0)
    if not weights.sum():
        raise SettingError("--target: all weights are 0; give one set a weight above 0")
    return weights / weights.sum()


def cap_vector(domains: tuple[str, ...], caps: Mapping[str, float]) -> Float64[np.ndarray, " K"]:
    """Most of each domain; 1 unless given.

    Raises:
        SettingError: An unknown name, a cap outside 0 to 1, or caps that sum to less than 1.
    """
    most = named_amounts(caps, domains, "--cap", "domain", 1.0)
    for name in caps:
        if caps[name] > 1:
            raise SettingError(f"--cap {name}={caps[name]:g}: a share from 0 to 1 is expected")
    if most.sum() < 1 - 1e-12:
        raise SettingError(
            f"--cap: the caps of all {len(domains)} domains sum to {most.sum():.4g}, and shares must sum to 1; raise "
            "one, or leave one out"
        )
    return most


def availability_caps(tokens: Mapping[str, float], target_tokens: float, *, epochs: float = 4.0) -> dict[str, float]:
    """Caps of domains by the tokens that there are.

    Args:
        tokens: Of each domain.
        target_tokens: Of the training that the mixture is for.
        epochs: How often a token may be seen. Up to about four cost little: https://arxiv.org/abs/2305.16264.

    >>> availability_caps({"code": 1e9, "web": 1e12}, 2e10)
    {'code': 0.2, 'web': 1.0}
    """
    if target_tokens <= 0 or epochs <= 0 or any(count < 0 for count in tokens.values()):
        raise SettingError(f"caps for {target_tokens:g} tokens of at most {epochs:g} epochs: numbers above 0 do")
    return {name: min(1.0, epochs * count / target_tokens) for name, count in tokens.items()}


def capped(mixtures: Float64[np.ndarray, "n K"], caps: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "n K"]:
    """Mixtures within caps: what exceeds one is given to the other domains in proportion to their shares.

    Where all others have no share, in proportion to what their caps leave. Caps must sum to 1 at least.

    >>> capped(np.array([[0.8, 0.1, 0.1]]), np.array([0.5, 0.2, 1.0])).round(6).tolist()
    [[0.5, 0.2, 0.3]]
    """
    full = np.zeros(mixtures.shape, dtype=bool)
    out = mixtures
    for _ in range(len(caps)):
        full = full | (out >= caps)
        left = 1 - np.where(full, caps, 0.0).sum(1, keepdims=True)
        free = np.where(full, 0.0, mixtures)
        total = free.sum(1, keepdims=True)
        # Where nobody with a share has room, a cap's own size decides.
        free = np.where(total > 0, free, np.where(full, 0.0, caps))
        total = free.sum(1, keepdims=True)
        out = np.where(full, caps, free * np.divide(left, total, out=np.zeros_like(left), where=total > 0))
        if (out <= caps).all():
            break
    out = np.clip(out, 0.0, caps)
    room = np.where(out.sum(1, keepdims=True) < 1, caps - out, out)  # rounding, spread where it does no harm
    missing = 1 - out.sum(1, keepdims=True)
    return out + missing * room / np.maximum(room.sum(1, keepdims=True), np.finfo(float).tiny)


def _searched(
    law: MixingLaw,
    weights: Float64[np.ndarray, " E"],
    caps: Float64[np.ndarray, " K"],
    prior: Float64[np.ndarray, " K"],
    seed: int,
) -> tuple[Float64[np.ndarray, "draws K"], Float64[np.ndarray, " draws"]]:
    """Random mixtures within caps, and their objectives."""
    rng = np.random.default_rng(mixed_seed(seed, "simplex"))
    count = DRAWS if law.slopes(prior) is None else BLOCK
    usable = np.where(caps > 0, np.maximum(prior, 1e-3 / len(prior)), 0.0)  # every domain gets a chance
    strengths = np.geomspace(*STRENGTHS, 10)
    found = []
    for _block in range(count // BLOCK):
        for strength in strengths:
            drawn = np.zeros((BLOCK // len(strengths), len(prior)))
            drawn[:, caps > 0] = rng.dirichlet(strength * usable[caps > 0] / usable.sum(), len(drawn))
            found.append(capped(drawn, caps))
    mixtures = np.concatenate(found)
    values = [law.predict(mixtures[first : first + BLOCK]) @ weights for first in range(0, len(mixtures), BLOCK)]
    return mixtures, np.concatenate(values)


def _descended(
    law: MixingLaw,
    weights: Float64[np.ndarray, " E"],
    caps: Float64[np.ndarray, " K"],
    start: Float64[np.ndarray, " K"],
) -> Float64[np.ndarray, " K"]:
    """Where SLSQP comes to from a start."""

    def slope(mixture: np.ndarray) -> np.ndarray:
        slopes = law.slopes(mixture)
        assert slopes is not None
        return weights @ slopes

    found = minimize(
        lambda mixture: float(law.predict(mixture[None])[0] @ weights),
        start,
        jac=slope,
        method="SLSQP",
        bounds=[(0.0, float(cap)) for cap in caps],
        constraints={"type": "eq", "fun": lambda mixture: mixture.sum() - 1, "jac": lambda mixture: np.ones(len(caps))},
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    end = capped(np.clip(found.x, 0.0, caps)[None], caps)[0]
    both = np.stack([start, end])
    return both[np.argmin(law.predict(both) @ weights)]  # never worse than it began


def _gap(
    law: MixingLaw,
    weights: Float64[np.ndarray, " E"],
    caps: Float64[np.ndarray, " K"],
    mixture: Float64[np.ndarray, " K"],
) -> float:
    """Frank-Wolfe gap: how much lower the tangent at a mixture gets within the caps."""
    slopes = law.slopes(mixture)
    assert slopes is not None
    slope = weights @ slopes
    order = np.argsort(slope)
    before = np.concatenate([[0.0], caps[order].cumsum()[:-1]])
    lowest = np.clip(1 - before, 0.0, caps[order])
    return max(0.0, float(slope @ mixture - slope[order] @ lowest))


def share_outside(table: MixtureTable, mixture: Float64[np.ndarray, " K"]) -> float:
    """How far a mixture is from the convex hull of a table's: the share of it that would have to move to get in.

    0 is inside: the mixture is itself a mean of those tried. (Half the L1 distance, by linear programming.)
    """
    n, domains = table.mixtures.shape
    cost = np.concatenate([np.zeros(n), np.full(2 * domains, 0.5)])
    sides = np.hstack([table.mixtures.T, np.eye(domains), -np.eye(domains)])
    every = np.concatenate([np.ones(n), np.zeros(2 * domains)])
    found = linprog(cost, A_eq=np.vstack([sides, every]), b_eq=np.append(mixture, 1.0), method="highs")
    assert found.status == 0, found.message  # always feasible, and bounded by 0
    return max(0.0, float(found.fun))


@dataclass(frozen=True)
class CriticalRatio:
    """At what share of a domain a loss is what it was before."""

    share: float | None
    """None: at none, and `reason` says why."""
    side: str
    """Where the loss is not higher than before: "from" the share on, or "up to" it."""
    reason: str
    """For a person; "" where there is a share."""


def critical_ratio(
    law: MixingLaw,
    evaluation_set: str,
    domain: str,
    loss_before: float,
    *,
    others: Float64[np.ndarray, " K"] | None = None,
) -> CriticalRatio:
    """Forgetting-critical share of continued pretraining: where the predicted loss equals the parent's.

    Of the domain that a parent was trained on (replay), it is the least share that keeps what the parent could; of the
    new one the most that can be had without forgetting. Where a law crosses more than once, the share nearest to 0 is
    given.

    Args:
        law: What predicts.
        evaluation_set: On which nothing is to be forgotten.
        domain: Whose share is sought.
        loss_before: Of the parent, on the set, in the law's unit.
        others: Shares of the other domains, in any proportion; uniform unless given.

    Raises:
        SettingError: An unknown name, a loss that is not finite, or others without a share.
    """
    row = place_of(evaluation_set, law.sets, "--before", "evaluation set")
    column = place_of(domain, law.domains, "critical_ratio", "domain")
    rest = np.ones(len(law.domains)) if others is None else np.array(others)
    rest[column] = 0.0
    if not np.isfinite(loss_before) or rest.sum() <= 0:
        raise SettingError(f"--before {evaluation_set}={loss_before:g}: a loss, and other domains, are needed")
    alone, rest = np.eye(len(rest))[column], rest / rest.sum()

    def excess(shares: np.ndarray) -> np.ndarray:
        return law.predict(np.outer(shares, alone) + np.outer(1 - shares, rest))[:, row] - loss_before

    shares = np.linspace(0.0, 1.0, GRID)
    over = excess(shares)
    exact = np.flatnonzero(over == 0)
    crossings = np.flatnonzero(over[:-1] * over[1:] < 0)
    if not len(exact) and not len(crossings):
        low, high = over.min() + loss_before, over.max() + loss_before
        which = "always higher" if low > loss_before else "never higher"
        return CriticalRatio(None, "", f"{which}: {low:.4g} to {high:.4g} is predicted, whatever the share")
    if len(crossings) and (not len(exact) or crossings[0] < exact[0]):
        first = crossings[0]
        share = brentq(lambda x: float(excess(np.array([x]))[0]), shares[first], shares[first + 1], xtol=1e-12)
        assert isinstance(share, float)
        falls = over[first] > 0
    else:
        share = float(shares[exact[0]])
        falls = over[-1] < over[0]
    return CriticalRatio(share, "from" if falls else "up to", "")
