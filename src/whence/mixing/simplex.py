"""The best mixture under a law, and how far it can be trusted.

The objective is the weighted mean over evaluation sets of the predicted losses; it is minimised over the mixtures with
floor_j <= r_j <= cap_j. A law knows nothing of shares that no mixture had, so `mix_law` gives the least and the most
that was tried of each domain, unless it is told to extrapolate. A cap also follows from the data at hand: a domain of N
tokens, seen at most `epochs` times in a training of D tokens, cannot be more than epochs N / D of it.

For a law with slopes, descent (SLSQP) starts from the prior and from the best of a random search. Where the law is
convex the result is checked: its tangent there has a least value in closed form (fill the domains of least slope to
their caps), and no mixture can be better by more than the difference, the Frank-Wolfe gap. For a law without slopes
(trees) the optimum is the mean of the best 128 of 100,000 random mixtures, as in RegMix. Random mixtures are Dirichlet
around the prior, dense and sparse ones in turn; a share above its cap is cut, and the excess goes to the others in
proportion.

Sources: Jaggi 2013, Revisiting Frank-Wolfe, https://proceedings.mlr.press/v28/jaggi13.html, for the gap; Liu et al.
2025, RegMix, https://arxiv.org/abs/2407.01492, for the search; Ye et al. 2025, https://arxiv.org/abs/2403.16952, for
the critical ratio.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64
from scipy.optimize import brentq, linprog, minimize

from whence.errors import SettingError
from whence.mixing.protocols import MixingLaw
from whence.mixing.tables import MixtureTable, named_amounts, place_of
from whence.numerics import mixed_seed

DRAWS = 100_000
"""Random mixtures, for a law without slopes."""
BEST = 128
"""How many of the best of them are averaged."""
STARTS = 4
"""Starts of the descent, beside the prior."""
STRENGTHS = (0.5, 50.0)
"""Least and largest sum of a Dirichlet's parameters."""
BLOCK = 10_000
"""Mixtures predicted at once."""
GRID = 1001
"""Shares at which a crossing is looked for."""
NO_ROOM = 1e-9
"""Floors that leave less than this share leave nothing to choose."""


@dataclass(frozen=True)
class Optimum:
    """The mixture that a law expects to be best."""

    mixture: Float64[np.ndarray, " K"]
    predicted: Float64[np.ndarray, " E"]
    """The losses predicted for it."""
    objective: float
    """Their weighted mean."""
    gap: float | None
    """Most by which any mixture within the caps is predicted to be better; None where the law is not convex."""


def optimum(
    law: MixingLaw,
    set_weights: Mapping[str, float] | None = None,
    *,
    caps: Mapping[str, float] | None = None,
    floors: Float64[np.ndarray, " K"] | None = None,
    prior: Float64[np.ndarray, " K"] | None = None,
    seed: int = 0,
) -> Optimum:
    """Find the mixture of least predicted loss.

    Args:
        law: Predicts the losses.
        set_weights: Weights of evaluation sets by name, in any proportion; a set without one counts nothing. None: all
            alike.
        caps: Largest share of a domain by name.
        floors: Least share of each domain, none above its cap; they sum to 1 at most. 0 unless given.
        prior: Mixture around which others are drawn, and a start of the descent; uniform unless given.
        seed: Draws the random mixtures.

    Raises:
        SettingError: A name is unknown, a weight or cap is impossible, all weights are 0, or the caps sum to less than
            a whole mixture.
    """
    largest = cap_vector(law.domains, caps or {})
    weights = weight_vector(law.sets, set_weights)
    centre = np.full(len(largest), 1 / len(largest)) if prior is None else prior
    if floors is not None and floors.any():
        return _above(law, floors, weights, largest, centre, seed)
    return _between(law, weights, largest, centre, seed)


def _above(
    law: MixingLaw,
    floors: Float64[np.ndarray, " K"],
    weights: Float64[np.ndarray, " E"],
    caps: Float64[np.ndarray, " K"],
    prior: Float64[np.ndarray, " K"],
    seed: int,
) -> Optimum:
    """The optimum over mixtures = floors + room x what is shared out."""
    room = 1 - floors.sum()
    if room < NO_ROOM:
        predicted = law.predict(floors[None])[0]
        return Optimum(floors, predicted, float(predicted @ weights), 0.0 if law.is_convex else None)
    above = np.clip(prior - floors, 0.0, None)
    centre = above / above.sum() if above.any() else np.full(len(floors), 1 / len(floors))
    best = _between(_Above(law, floors, room), weights, np.clip((caps - floors) / room, 0.0, 1.0), centre, seed)
    return replace(best, mixture=np.clip(floors + room * best.mixture, floors, caps))


@dataclass(frozen=True)
class _Above:
    """A law of what is shared out above the floors."""

    law: MixingLaw
    floors: Float64[np.ndarray, " K"]
    room: float

    @property
    def is_convex(self) -> bool:
        return self.law.is_convex

    def predict(self, mixtures: Float64[np.ndarray, "n K"]) -> Float64[np.ndarray, "n E"]:
        return self.law.predict(self.floors + self.room * mixtures)

    def slopes(self, mixture: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "E K"] | None:
        slopes = self.law.slopes(self.floors + self.room * mixture)
        return None if slopes is None else self.room * slopes


def _between(
    law: "MixingLaw | _Above",
    weights: Float64[np.ndarray, " E"],
    largest: Float64[np.ndarray, " K"],
    centre: Float64[np.ndarray, " K"],
    seed: int,
) -> Optimum:
    """The optimum over mixtures of shares from 0 to the caps."""
    mixtures, objectives = _random_search(law, weights, largest, centre, seed)
    order = np.argsort(objectives, kind="stable")
    gap = None
    if law.slopes(centre) is None:
        best = capped(mixtures[order[:BEST]].mean(0, keepdims=True), largest)[0]
    else:
        starts = [capped(centre[None], largest)[0], *mixtures[order[:STARTS]]]
        ends = np.stack([_descent(law, weights, largest, start) for start in starts])
        best = ends[np.argmin(law.predict(ends) @ weights)]
        gap = _gap(law, weights, largest, best) if law.is_convex else None
    predicted = law.predict(best[None])[0]
    return Optimum(best, predicted, float(predicted @ weights), gap)


def weight_vector(sets: tuple[str, ...], set_weights: Mapping[str, float] | None) -> Float64[np.ndarray, " E"]:
    """Weights of evaluation sets, summing to 1; all alike unless given."""
    weights = (
        np.ones(len(sets)) if not set_weights else named_amounts(set_weights, sets, "--target", "evaluation set", 0.0)
    )
    if not weights.sum():
        raise SettingError("--target: all weights are 0; give one set a weight above 0")
    return weights / weights.sum()


def cap_vector(domains: tuple[str, ...], caps: Mapping[str, float]) -> Float64[np.ndarray, " K"]:
    """Largest share of each domain; 1 unless given.

    Raises:
        SettingError: A name is unknown, a cap is outside 0 to 1, or the caps sum to less than 1.
    """
    largest = named_amounts(caps, domains, "--cap", "domain", 1.0)
    for name in caps:
        if caps[name] > 1:
            raise SettingError(f"--cap {name}={caps[name]:g}: a share from 0 to 1 is expected")
    if largest.sum() < 1 - 1e-12:
        raise SettingError(
            f"--cap: the caps of all {len(domains)} domains sum to {largest.sum():.4g}, and shares must sum to 1; "
            "raise one, or leave one out"
        )
    return largest


def availability_caps(tokens: Mapping[str, float], training_tokens: float, *, epochs: float = 4.0) -> dict[str, float]:
    """Caps of domains by the number of tokens at hand.

    Args:
        tokens: Number of tokens of each domain.
        training_tokens: Number of tokens of the training that the mixture is for.
        epochs: How often a token may be seen. Up to about four cost little: https://arxiv.org/abs/2305.16264.

    >>> availability_caps({"code": 1e9, "web": 1e12}, 2e10)
    {'code': 0.2, 'web': 1.0}
    """
    if training_tokens <= 0 or epochs <= 0 or any(count < 0 for count in tokens.values()):
        raise SettingError(f"caps for {training_tokens:g} tokens of at most {epochs:g} epochs: numbers above 0 do")
    return {name: min(1.0, epochs * count / training_tokens) for name, count in tokens.items()}


def capped(mixtures: Float64[np.ndarray, "n K"], caps: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "n K"]:
    """Mixtures cut to caps: the excess over a cap goes to the other domains in proportion to their shares.

    Where no other domain has a share, it goes to them in proportion to their caps. Caps must sum to 1 at least.

    >>> capped(np.array([[0.8, 0.1, 0.1]]), np.array([0.5, 0.2, 1.0])).round(6).tolist()
    [[0.5, 0.2, 0.3]]
    """
    full = np.zeros(mixtures.shape, dtype=bool)
    out = mixtures
    for _ in range(len(caps)):
        full = full | (out >= caps)
        remaining = 1 - np.where(full, caps, 0.0).sum(1, keepdims=True)
        free = np.where(full, 0.0, mixtures)
        total = free.sum(1, keepdims=True)
        # where no domain with a share has room, the caps decide
        free = np.where(total > 0, free, np.where(full, 0.0, caps))
        total = free.sum(1, keepdims=True)
        out = np.where(full, caps, free * np.divide(remaining, total, out=np.zeros_like(remaining), where=total > 0))
        if (out <= caps).all():
            break
    out = np.clip(out, 0.0, caps)
    room = np.where(out.sum(1, keepdims=True) < 1, caps - out, out)  # rounding, spread where it does no harm
    missing = 1 - out.sum(1, keepdims=True)
    return out + missing * room / np.maximum(room.sum(1, keepdims=True), np.finfo(float).tiny)


def _random_search(
    law: "MixingLaw | _Above",
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
    blocks = []
    for _block in range(count // BLOCK):
        for strength in strengths:
            drawn = np.zeros((BLOCK // len(strengths), len(prior)))
            drawn[:, caps > 0] = rng.dirichlet(strength * usable[caps > 0] / usable.sum(), len(drawn))
            blocks.append(capped(drawn, caps))
    mixtures = np.concatenate(blocks)
    values = [law.predict(mixtures[first : first + BLOCK]) @ weights for first in range(0, len(mixtures), BLOCK)]
    return mixtures, np.concatenate(values)


def _descent(
    law: "MixingLaw | _Above",
    weights: Float64[np.ndarray, " E"],
    caps: Float64[np.ndarray, " K"],
    start: Float64[np.ndarray, " K"],
) -> Float64[np.ndarray, " K"]:
    """The mixture that SLSQP reaches from a start; the start itself where that is no better."""

    def slope(mixture: np.ndarray) -> np.ndarray:
        slopes = law.slopes(mixture)
        assert slopes is not None
        return weights @ slopes

    solution = minimize(
        lambda mixture: float(law.predict(mixture[None])[0] @ weights),
        start,
        jac=slope,
        method="SLSQP",
        bounds=[(0.0, float(cap)) for cap in caps],
        constraints={"type": "eq", "fun": lambda mixture: mixture.sum() - 1, "jac": lambda mixture: np.ones(len(caps))},
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    end = capped(np.clip(solution.x, 0.0, caps)[None], caps)[0]
    both = np.stack([start, end])
    return both[np.argmin(law.predict(both) @ weights)]


def _gap(
    law: "MixingLaw | _Above",
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
    """How far a mixture is from the convex hull of a table's mixtures: the share that would have to move to get inside.

    0 is inside: the mixture is a mean of those tried. (Half the L1 distance, by linear programming.)
    """
    n, domains = table.mixtures.shape
    cost = np.concatenate([np.zeros(n), np.full(2 * domains, 0.5)])
    sides = np.hstack([table.mixtures.T, np.eye(domains), -np.eye(domains)])
    total = np.concatenate([np.ones(n), np.zeros(2 * domains)])
    solution = linprog(cost, A_eq=np.vstack([sides, total]), b_eq=np.append(mixture, 1.0), method="highs")
    assert solution.status == 0, solution.message  # always feasible, and bounded by 0
    return max(0.0, float(solution.fun))


@dataclass(frozen=True)
class CriticalRatio:
    """The share of a domain at which a loss equals the parent's."""

    share: float | None
    """None where there is no such share; `reason` then says why."""
    side: str
    """On which side the loss is not above the parent's: "from" the share on, or "up to" it."""
    reason: str
    """Text for the user; "" where there is a share."""


def critical_ratio(
    law: MixingLaw,
    evaluation_set: str,
    domain: str,
    loss_before: float,
    *,
    others: Float64[np.ndarray, " K"] | None = None,
    between: tuple[float, float] = (0.0, 1.0),
) -> CriticalRatio:
    """Forgetting-critical share of continued pretraining: where the predicted loss equals the parent's.

    For the domain that the parent was trained on (replay), it is the least share that keeps what the parent could do;
    for a new domain, the largest share without forgetting. If the law crosses more than once, the share nearest to 0
    counts.

    Args:
        law: Predicts the losses.
        evaluation_set: The set on which nothing is to be forgotten.
        domain: The domain whose share is sought.
        loss_before: The parent's loss on the set, in the law's unit.
        others: Shares of the other domains, in any proportion; uniform unless given.
        between: Least and largest share of the domain at which the law is asked.

    Raises:
        SettingError: A name is unknown, the loss is not finite, or the other domains have no share.
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

    shares = np.linspace(*between, GRID)
    excesses = excess(shares)
    exact = np.flatnonzero(excesses == 0)
    crossings = np.flatnonzero(excesses[:-1] * excesses[1:] < 0)
    if not len(exact) and not len(crossings):
        low, high = excesses.min() + loss_before, excesses.max() + loss_before
        verdict = "always higher" if low > loss_before else "never higher"
        where = "whatever the share" if between == (0.0, 1.0) else f"at shares of {between[0]:.1%} to {between[1]:.1%}"
        return CriticalRatio(None, "", f"{verdict}: {low:.3f} to {high:.3f} is predicted, {where}")
    if len(crossings) and (not len(exact) or crossings[0] < exact[0]):
        first = crossings[0]
        share = brentq(lambda x: float(excess(np.array([x]))[0]), shares[first], shares[first + 1], xtol=1e-12)
        assert isinstance(share, float)
        falls = excesses[first] > 0
    else:
        share = float(shares[exact[0]])
        falls = excesses[-1] < excesses[0]
    return CriticalRatio(share, "from" if falls else "up to", "")
