"""Joint matching: which examples' gradients, added up, make a target vector.

The target is T = theta_0 - theta_f, what training took off the weights (to first order the sum of step sizes times
gradients), so that an example that was trained on has a POSITIVE inner product with it. Atoms are the gradients g_i of
the candidates, not normalised. Scoring each atom alone cannot tell a member from what resembles the members; here atoms
compete to explain T. With s the sum of the atoms taken so far and R = T - sum of w_i g_i what is left:

cosine    argmax over i of (<s, T> + <g_i, T>) / |s + g_i|, the cosine of the sum with T if i is added. Has no scale and
          no weights. The greedy of SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553.
matching  argmax over i of 2 alpha <g_i, R> - alpha^2 |g_i|^2, how far i takes |R|^2 down at the constant step alpha;
          each atom once. Matching pursuit: Mallat and Zhang 1993, https://doi.org/10.1109/78.258082.
nnls      min over w >= 0 of |T - sum of w_i g_i|^2 / 2 + l1 |T| sum of w_i |g_i|. Non-negative least squares: Lawson
          and Hanson 1974, Solving Least Squares Problems, chapter 23. Solved by FISTA, Beck and Teboulle 2009,
          https://doi.org/10.1137/080716542, on unit atoms, restarted by the gradient rule of O'Donoghue and Candes
          2015, https://arxiv.org/abs/1204.3982. Equal atoms get equal weights.
mixture   the same fit with one atom for each source.

Without a count the greedy methods stop where no atom is left to gain by. A member takes more off |R|^2 than its own
norm puts on; an atom at random does not, unless the space is too small for the number of atoms. (In our toy,
benchmarks/recovery/toy.py, they stop at about the true number under SGD, and at twice that under Adam.) Without a count
nnls takes all rows of positive weight, most of them by little.

A greedy step costs n numbers with `problems.Gram` and a pass over the vectors with `Atoms`, a step of nnls two over the
rows that have or would grow a weight, of which it holds a copy. Vectors of k numbers cannot tell single members apart
where k is far below 2 m ln(n / m), m of n being members; then only their kind is found.

Letters: `r` further directions, `s` sources; otherwise those of docs/reference/numbers.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from whence.errors import SettingError
from whence.numerics import generator
from whence.recovery.atoms import Problem, nonnegative

_DRAWS = 32  # of a bootstrap at a time
_ROUND = 200  # steps of FISTA before rows join or leave


@dataclass(frozen=True)
class Pursuit:
    """What a method makes of a problem."""

    rows: list[int]
    """Taken, in rank order."""
    weights: Float32[Tensor, " n"]
    """Of each atom in the sum that explains the target: about its step size times its visits. 0 where not taken."""
    scores: Float32[Tensor, " n"]
    """Larger: more likely a member. Ranks all rows; -inf where an atom is not usable. Of the greedy methods, for rows
    taken their place from the end plus 1, for others what one more step would gain by them, at most 1; of nnls the
    weight or the part in the fit to all rows, or for rows without one their cosine with R (as long as T), at most 0."""
    residual: float
    """|R| / |T|."""
    cosine: float
    """Of the weighted sum with T; 0 where nothing is taken."""
    steps: int
    stopped: str
    """Why."""


def cosine(problem: Problem, *, count: int | None = None) -> Pursuit:
    """The greedy of SELECT: add what gives the running sum the greatest cosine with the target.

    Args:
        problem: Atoms and target.
        count: Rows to take, all if there are fewer; None: while the cosine grows, and by the module's rule.

    Returns:
        Weights are equal: the one that fits the sum to the target.

    >>> from whence.recovery.atoms import gram
    >>> cosine(gram(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.tensor([2.0, 1.0])), count=2).rows
    [1, 0]
    """
    length = problem.square**0.5

    def gain(total: _Sum) -> Float64[Tensor, " n"]:
        lengths = (total.square + 2 * total.along + problem.squares).clamp(min=0).sqrt() * length
        before = total.linear / (total.square**0.5 * length) if total.square > 0 else 0.0
        return (total.linear + problem.linear) / lengths.clamp(min=1e-300) - before

    return _greedy(problem, count, gain, None)


def matching(problem: Problem, *, count: int | None = None, alpha: float | None = None) -> Pursuit:
    """Matching pursuit at a constant step: add what takes the most off |T - alpha s|^2, each atom once.

    Args:
        problem: Atoms and target.
        count: Rows to take, all if there are fewer; None: while there is something to gain, and by the module's rule.
        alpha: Step size times visits of an atom; None: the one that fits the sum of `cosine`'s choice to the target.
    """
    if alpha is None:
        fitted = cosine(problem, count=count)
        alpha = float(fitted.weights.max())
        if not alpha:
            return fitted  # the target points away from all
    if not 0 < alpha < math.inf:
        raise SettingError(f"alpha {alpha} of matching: a number above 0 is expected")
    step = alpha

    def gain(total: _Sum) -> Float64[Tensor, " n"]:
        return (2 * step * (problem.linear - step * total.along) - step**2 * problem.squares) / problem.square

    return _greedy(problem, count, gain, step)


def nnls(
    problem: Problem,
    *,
    count: int | None = None,
    l1: float = 0.0,
    by: str = "weight",
    start: Float[Tensor, " n"] | None = None,
    tolerance: float = 1e-4,
    limit: int = 2000,
) -> Pursuit:
    """Non-negative least squares over all atoms; rows are ranked by weight.

    Args:
        problem: Atoms and target.
        count: Rows to take, all if there are fewer: those of greatest weight, to which alone the weights are then
            fitted again; None: those of positive weight.
        l1: From 0 to 1: the cosine with the target that an atom must exceed to be taken first. Where the target is not
            quite a sum of gradients (Adam), the fit without it chases what is none.
        by: Rank rows by their "weight", which is the step size of a member and 0 of others where all fits; or by their
            "part", weight times norm, the length of what a row adds to the sum: where much is left unexplained, rows
            of small norm grow large weights by chance.
        start: Weights to begin with.
        tolerance: At the optimum no usable atom has an inner product with R above l1 |g_i| |T|, and those of positive
            weight have just that. The fit stops when this holds to so many |g_i| |T|, weights of lesser parts aside.
        limit: Most steps; `stopped` says where they did not do.
    """
    able = _able(problem, count)
    if not 0 <= l1 < 1:
        raise SettingError(f"l1 {l1} of nnls: a number from 0 to below 1 is expected")
    if by not in ("weight", "part"):
        raise SettingError(f"by {by!r} of nnls: choose weight or part")
    begin = torch.zeros_like(problem.linear) if start is None else start.double().clamp(min=0).where(able, 0.0)
    found = _fit(problem, begin, l1, tolerance, limit)
    steps, weights, positive = found.steps, found.weights, int((found.weights > 0).sum())
    lengths = (problem.squares * problem.square).sqrt()
    worth = weights * problem.squares.where(able, 0.0).sqrt() if by == "part" else weights
    scores = worth.where(weights > 0, (found.downhill / lengths).clamp(max=0)).where(able, -math.inf)
    rows = scores.argsort(descending=True, stable=True)[: positive if count is None else min(count, int(able.sum()))]
    if len(rows) < positive:
        found = _fit(problem.restricted(rows), weights[rows], l1, tolerance, limit)
        weights = torch.zeros_like(weights).index_copy(0, rows, found.weights)
    stopped = "converged" if found.violation <= tolerance else f"{limit} steps, {found.violation:.1e} from the optimum"
    return _result(problem, rows.tolist(), weights, scores, steps, stopped)


@dataclass(frozen=True)
class Mixture:
    """How much of the target each source explains."""

    sources: list[str]
    shares: list[float]
    """Not negative, summing to 1."""
    intervals: list[tuple[float, float]]
    """95%, of each share."""
    rows: float
    """How many different rows of equal step size would leave as much as is left; low where the pool is small."""
    residual: float
    """|R| / |T|."""
    draws: Float64[Tensor, "r s"] = field(compare=False, repr=False)
    """Shares of the resamples that the intervals are of."""


def mixture(problem: Problem, sources: Sequence[str], *, seed: int = 0, resamples: int = 400) -> Mixture:
    """Share of each source in what the model was trained on.

    T = sum over sources of v_s (mean gradient of s) + R is fitted with v >= 0. If training took steps of the same size
    on all its rows, v_s is that step times the visits of rows of s: shares v_s / sum of v are shares of visited rows,
    whatever the number of rows of each source in the pool. Assumed: equal step sizes (where a batch's loss is the mean
    over its tokens, a row's step is as long as its tokens, and shares are of tokens), rows in the pool like those
    trained on, and no source that is missing. A source that is missing goes to its likes and into R.

    Intervals are of the bootstrap, over rows within sources: each time the pool's rows are drawn anew, and so are those
    trained on, of which there are as many as R betrays: what single rows have beside their source's mean adds up to
    |R|^2 = step * sum over sources of v_s (mean |g_i|^2 - |mean g_i|^2). What a fit cannot explain widens them.

    Args:
        problem: Atoms and target.
        sources: Of each row. Rows that are not usable are left out.
        seed: Same seed, same intervals.
        resamples: Their number.
    """
    able = _able(problem, None)
    names = sorted({name for name, is_able in zip(sources, able.tolist(), strict=True) if is_able})
    members = [torch.tensor([name == source for source in sources], device=able.device) & able for name in names]
    pools = [member.nonzero()[:, 0] for member in members]
    means = torch.stack([member.double() / member.sum() for member in members])
    small = problem.combined(means)
    v = nonnegative(small.gram.double(), small.linear)
    if not v.any():
        raise SettingError("no source explains any of the target: one whose mean gradient points along it is expected")
    rest = max(0.0, small.square - float(v @ (2 * small.linear - small.gram.double() @ v)))
    spread = means @ problem.squares.where(able, 0.0) - small.squares
    visits = v * (v @ spread) / max(rest, 1e-300)
    trained = [min(len(pool), math.ceil(count)) for pool, count in zip(pools, visits.tolist(), strict=True)]
    rng = generator(seed, "mixture")
    parts = [min(_DRAWS, resamples - done) for done in range(0, resamples, _DRAWS)]
    shares = torch.cat([_resampled(problem, pools, trained, rng, part) for part in parts])
    low, high = shares.quantile(shares.new_tensor([0.025, 0.975]), 0).tolist()
    intervals = list(zip(low, high, strict=True))
    left = (rest / small.square) ** 0.5
    return Mixture(names, (v / v.sum()).tolist(), intervals, float(visits.sum()), left, shares)


def _resampled(
    problem: Problem, pools: list[Int64[Tensor, " _"]], trained: list[int], rng: torch.Generator, resamples: int
) -> Float64[Tensor, "r s"]:
    """Shares of a target that is the sum of so many rows drawn from each source, by means of its rows drawn anew."""
    sources, shares = len(pools), []
    weights = problem.linear.new_zeros(resamples, sources + 1, len(problem.linear))
    for resample in weights:
        for number, (pool, count) in enumerate(zip(pools, trained, strict=True)):
            for row, size, share in ((number, len(pool), 1 / len(pool)), (sources, count, 1.0)):
                drawn = pool[torch.randint(len(pool), (size,), generator=rng).to(pool.device)]
                resample[row] += share * torch.bincount(drawn, minlength=resample.shape[1])
    products = problem.combined(weights.flatten(0, 1)).gram.unflatten(0, (resamples, -1)).unflatten(2, (resamples, -1))
    for number in range(resamples):
        block = products[number, :, number]
        v = nonnegative(block[:sources, :sources], block[:sources, sources])
        shares.append(v / v.sum().clamp(min=1e-300))
    return torch.stack(shares)


@dataclass
class _Sum:
    """What a greedy method knows of the sum s of the atoms it has taken."""

    along: Float64[Tensor, " n"]
    """<g_i, s>."""
    linear: float = 0.0
    """<s, T>."""
    square: float = 0.0
    """|s|^2."""

    def add(self, problem: Problem, row: int) -> None:
        self.linear += float(problem.linear[row])
        self.square += float(2 * self.along[row] + problem.squares[row])
        self.along = self.along + problem.column(row)

    def fitted(self) -> float:
        """The step at which s is nearest to T."""
        return max(0.0, self.linear / self.square) if self.square > 0 else 0.0


def _greedy(
    problem: Problem, count: int | None, gain: Callable[[_Sum], Float64[Tensor, " n"]], step: float | None
) -> Pursuit:
    """Take the atom of greatest gain, again and again; at a constant step, or at the one that fits in the end."""
    able = _able(problem, count)
    free, total, rows = able.clone(), _Sum(torch.zeros_like(problem.linear)), []
    limit = min(count or len(able), int(able.sum()))
    while True:
        gains = gain(total).where(free, -math.inf)
        if len(rows) == limit or (count is None and gains.max() <= 0):
            break
        row = int(gains.argmax())  # the first of equal ones
        total.add(problem, row)
        free[row] = False
        rows.append(row)
    weights = torch.zeros_like(gains)
    weights[rows] = total.fitted() if step is None else step
    scores = gains.clamp(max=1)
    scores[rows] = torch.arange(len(rows), 0, -1).to(scores) + 1
    stopped = "nothing to gain" if len(rows) < limit else "count" if len(rows) == count else "no more rows"
    return _result(problem, rows, weights, scores, len(rows), stopped)


def _result(
    problem: Problem,
    rows: list[int],
    weights: Float64[Tensor, " n"],
    scores: Float64[Tensor, " n"],
    steps: int,
    stopped: str,
) -> Pursuit:
    _, left = problem.remaining(weights)
    linear = float(weights[rows] @ problem.linear[rows])
    length = max(0.0, left - problem.square + 2 * linear) ** 0.5  # of the weighted sum
    cosine = linear / (length * problem.square**0.5) if length else 0.0
    return Pursuit(rows, weights.float(), scores.float(), (left / problem.square) ** 0.5, cosine, steps, stopped)


@dataclass(frozen=True)
class _Fit:
    weights: Float64[Tensor, " n"]
    downhill: Float64[Tensor, " n"]
    """<g_i, R> less the l1 term: minus the slope."""
    violation: float
    """Of the conditions of the optimum: the longest step of unit curvature on a unit atom, in parts of |T|."""
    steps: int


def _fit(problem: Problem, weights: Float64[Tensor, " n"], l1: float, tolerance: float, limit: int) -> _Fit:
    """Rounds of FISTA on the rows that have a weight or would grow one: most others stay at 0 all the way."""
    steps = 0
    while True:
        found = _Fit(weights, *_conditions(problem, weights, l1), steps)
        if found.violation <= tolerance or steps >= limit:
            return found
        rows = ((weights > 0) | (found.downhill > 0)).nonzero()[:, 0]
        part = _fista(problem.restricted(rows), weights[rows], l1, tolerance / 2, min(_ROUND, limit - steps))
        weights = torch.zeros_like(weights).index_copy(0, rows, part.weights)
        steps += max(1, part.steps)


def _fista(problem: Problem, weights: Float64[Tensor, " n"], l1: float, tolerance: float, limit: int) -> _Fit:
    """In steps of 1 / curvature on unit atoms; the curvature, at most n, grows where a step shows it to be larger."""
    last = _Fit(weights, *_conditions(problem, weights, l1), 0)
    ahead, downhill, momentum, curvature = last.weights, last.downhill, 1.0, 1.0
    for step in range(1, limit + 1):
        if last.violation <= tolerance:
            break
        moved_to = (ahead + downhill / (curvature * problem.squares)).clamp(min=0)
        new = _Fit(moved_to, *_conditions(problem, moved_to, l1), step)
        moved = new.weights - ahead
        measured = moved @ (downhill - new.downhill) / (problem.squares @ moved.square()).clamp(min=1e-300)
        if measured > curvature * (1 + 1e-6) and curvature < len(weights):  # too long: again from the last good ones
            curvature = min(1.25 * float(measured), len(weights))
            ahead, downhill, momentum = last.weights, last.downhill, 1.0
            continue
        if (problem.squares * moved) @ (new.weights - last.weights) < 0:
            momentum = 1.0
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        lead, momentum = (momentum - 1) / grown, grown
        ahead = new.weights + lead * (new.weights - last.weights)
        downhill = new.downhill + lead * (new.downhill - last.downhill)
        last = new
    return last


def _conditions(problem: Problem, weights: Float64[Tensor, " n"], l1: float) -> tuple[Float64[Tensor, " n"], float]:
    """The way down, 0 for what is not usable, and how far the weights are from the optimum."""
    squares = problem.squares.where(problem.usable, 1.0)
    lengths = (squares * problem.square).sqrt()
    downhill = (problem.remaining(weights)[0] - l1 * lengths).where(problem.usable, 0.0)
    step = (weights + downhill / squares).clamp(min=0) - weights
    return downhill, float((step * squares / lengths).abs().max())


def _able(problem: Problem, count: int | None) -> Bool[Tensor, " n"]:
    """Usable atoms, if there is anything to do."""
    if count is not None and count < 1:
        raise SettingError(f"count {count}: 1 or more rows are expected")
    if not math.isfinite(problem.square):
        raise SettingError("the target is not finite: a difference of weights without NaN and infinities is expected")
    if not problem.square > 0:
        raise SettingError("the target is zero, so that there is nothing to find: weights that moved are expected")
    able = problem.usable
    if not able.any():
        raise SettingError(f"none of {len(able):,} atoms is finite and other than zero: at least one is expected")
    return able
