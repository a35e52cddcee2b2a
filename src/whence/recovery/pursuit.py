"""Joint matching: which examples' gradients, added up, make a given vector.

That vector, the signal, is T = theta_0 - theta_f, what training took off the weights (to first order the sum of step
sizes times gradients), so that an example that was trained on has a POSITIVE inner product with it. Atoms are the
gradients g_i of the candidates, not normalised. A score of each atom alone cannot tell a member from a row that
resembles members; here atoms compete to explain T. With s the sum of the atoms chosen so far and the residual
R = T - sum of w_i g_i:

cosine    argmax over i of (<s, T> + <g_i, T>) / |s + g_i|, the cosine of the sum with T if i is added. It has no scale
          and no weights. The greedy of SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553.
matching  argmax over i of 2 alpha <g_i, R> - alpha^2 |g_i|^2, how far i reduces |R|^2 at the constant step alpha;
          each atom once. Matching pursuit: Mallat and Zhang 1993, https://doi.org/10.1109/78.258082.
nnls      min over w >= 0 of |T - sum of w_i g_i|^2 / 2 + l1 |T| sum of w_i |g_i|. Non-negative least squares: Lawson
          and Hanson 1974, Solving Least Squares Problems, chapter 23. Solved by FISTA, Beck and Teboulle 2009,
          https://doi.org/10.1137/080716542, on unit atoms, restarted by the gradient rule of O'Donoghue and Candes
          2015, https://arxiv.org/abs/1204.3982. Equal atoms get equal weights.
mixture   the same fit with one atom for each source.

Without a count the greedy methods stop where no atom improves the match. A member takes more off |R|^2 than its own
norm adds; a random atom does not, unless the space is too small for the number of atoms. (In our toy,
benchmarks/recovery/toy.py, they stop at about the true number under SGD, and at twice that under Adam.) Without a count
nnls chooses all rows of positive weight, most of which is small.

A greedy step costs n numbers with `GramProblem` and a pass over the vectors with `VectorProblem`; a step of nnls costs
two passes over the rows that have or would gain a weight, of which it holds a copy. Vectors of k numbers cannot tell
single members apart where k is far below 2 m ln(n / m), m of n being members; then only the members' kind is found.

Letters: `r` resamples or weighted sums, `s` sources; otherwise those of docs/reference/numbers.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from whence.errors import SettingError
from whence.numerics import generator
from whence.recovery.matching_problem import Problem, nonnegative

_RESAMPLES_AT_A_TIME = 32
_STEPS_PER_ROUND = 200  # of FISTA, before rows join or leave


@dataclass(frozen=True)
class Pursuit:
    """The rows that a method chose, and how well they explain the signal."""

    rows: list[int]
    """Chosen rows, in rank order."""
    weights: Float32[Tensor, " n"]
    """Weight of each atom in the sum that explains T: about its step size times its visits; 0 if not chosen."""
    scores: Float32[Tensor, " n"]
    """One score a row, larger: more likely a member; -inf for an atom that is not usable. Greedy methods give a chosen
    row its place from the end plus 1, and another row the gain of one more step by it, at most 1. nnls gives the weight
    or the contribution in the fit to all rows; a row without one gets its cosine with R (over |T|), at most 0."""
    residual: float
    """|R| / |T|."""
    cosine: float
    """Cosine of the weighted sum with T; 0 if no row is chosen."""
    steps: int
    stopped: str
    """Reason for stopping."""


def cosine(problem: Problem, *, count: int | None = None) -> Pursuit:
    """The greedy of SELECT: add the atom that gives the running sum the greatest cosine with T.

    Args:
        problem: Atoms and T.
        count: Rows to choose, all if there are fewer; None: while the cosine grows.

    Returns:
        Equal weights: the step at which the sum is nearest to T.

    >>> from whence.recovery.matching_problem import gram_problem
    >>> cosine(gram_problem(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.tensor([2.0, 1.0])), count=2).rows
    [1, 0]
    """
    length = problem.square**0.5

    def gain(total: _Sum) -> Float64[Tensor, " n"]:
        lengths = (total.square + 2 * total.along + problem.squares).clamp(min=0).sqrt() * length
        before = total.linear / (total.square**0.5 * length) if total.square > 0 else 0.0
        return (total.linear + problem.linear) / lengths.clamp(min=1e-300) - before

    return _greedy(problem, count, gain, None)


def matching(problem: Problem, *, count: int | None = None, alpha: float | None = None) -> Pursuit:
    """Matching pursuit at a constant step: add the atom that reduces |T - alpha s|^2 most, each atom once.

    Args:
        problem: Atoms and T.
        count: Rows to choose, all if there are fewer; None: while |T - alpha s| falls.
        alpha: Step size times visits of an atom; None: the one that fits the sum of `cosine`'s choice to T.
    """
    if alpha is None:
        fitted = cosine(problem, count=count)
        alpha = float(fitted.weights.max())
        if not alpha:
            return fitted  # T points away from all atoms
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
        problem: Atoms and T.
        count: Rows to choose, all if there are fewer: those of greatest weight, to which alone the weights are then
            fitted again; None: those of positive weight.
        l1: From 0 to 1: the cosine with T that an atom must exceed to be chosen first. Where T is not quite a sum of
            gradients (Adam), the fit without l1 also fits the rest of T.
        by: Rank rows by "weight", which in an exact fit is a member's step size and 0 for others; or by "contribution",
            weight times norm, the length that a row adds to the sum: where much stays unexplained, rows of small norm
            get large weights by chance.
        start: Initial weights.
        tolerance: At the optimum no usable atom has an inner product with R above l1 |g_i| |T|, and those of positive
            weight have just that. The fit stops when this holds to within tolerance |g_i| |T|; for an atom of positive
            weight that would fall to 0, to within its contribution.
        limit: Steps, at most; `stopped` says if they did not suffice.
    """
    usable = _usable(problem, count)
    if not 0 <= l1 < 1:
        raise SettingError(f"l1 {l1} of nnls: a number from 0 to below 1 is expected")
    if by not in ("weight", "contribution"):
        raise SettingError(f"by {by!r} of nnls: choose weight or contribution")
    begin = torch.zeros_like(problem.linear) if start is None else start.double().clamp(min=0).where(usable, 0.0)
    fit = _fit(problem, begin, l1, tolerance, limit)
    steps, weights, positive = fit.steps, fit.weights, int((fit.weights > 0).sum())
    lengths = (problem.squares * problem.square).sqrt()
    ranking = weights * problem.squares.where(usable, 0.0).sqrt() if by == "contribution" else weights
    scores = ranking.where(weights > 0, (fit.downhill / lengths).clamp(max=0)).where(usable, -math.inf)
    rows = scores.argsort(descending=True, stable=True)[: positive if count is None else min(count, int(usable.sum()))]
    if len(rows) < positive:
        fit = _fit(problem.restricted(rows), weights[rows], l1, tolerance, limit)
        weights = torch.zeros_like(weights).index_copy(0, rows, fit.weights)
    stopped = "converged" if fit.violation <= tolerance else f"{limit} steps, {fit.violation:.1e} from the optimum"
    return _result(problem, rows.tolist(), weights, scores, steps, stopped)


@dataclass(frozen=True)
class Mixture:
    """How much of T each source explains."""

    sources: list[str]
    shares: list[float]
    """Not negative, summing to 1."""
    intervals: list[tuple[float, float]]
    """95% interval of each share."""
    rows: float
    """Number of different rows of equal step size that would leave as large a residual; too low for few candidates."""
    residual: float
    """|R| / |T|."""
    draws: Float64[Tensor, "r s"] = field(compare=False, repr=False)
    """Shares of the resamples, from which the intervals are."""


def mixture(problem: Problem, sources: Sequence[str], *, seed: int = 0, resamples: int = 400) -> Mixture:
    """Share of each source in what the model was trained on.

    T = sum over sources of v_s (mean gradient of s) + R is fitted with v >= 0. If training took steps of the same size
    on all its rows, v_s is that step times the visits of rows of s: shares v_s / sum of v are shares of visited rows,
    whatever the number of candidate rows of each source. This assumes equal step sizes (where a batch's loss is the
    mean over its tokens, a row's step grows with its tokens, and shares are of tokens), candidates like the rows
    trained on, and no missing source. What a missing source did goes to similar sources and into R.

    Intervals are bootstrapped over rows within sources: each resample draws the candidates anew, and also the rows
    trained on. Their number follows from R, since the deviations of single rows from their source's mean add up to
    |R|^2 = step * sum over sources of v_s (mean |g_i|^2 - |mean g_i|^2). An unexplained rest widens the intervals.

    Args:
        problem: Atoms and T.
        sources: Source of each row; rows that are not usable are left out.
        seed: Seed of the intervals.
        resamples: Number of resamples.
    """
    usable = _usable(problem, None)
    names = sorted({name for name, is_usable in zip(sources, usable.tolist(), strict=True) if is_usable})
    masks = [torch.tensor([name == source for source in sources], device=usable.device) & usable for name in names]
    rows_by_source = [mask.nonzero()[:, 0] for mask in masks]
    means = torch.stack([mask.double() / mask.sum() for mask in masks])
    of_means = problem.combined(means)
    v = nonnegative(of_means.gram.double(), of_means.linear)
    if not v.any():
        raise SettingError(
            "no source explains any of the weight difference: one whose mean gradient points along it is expected"
        )
    unexplained = max(0.0, of_means.square - float(v @ (2 * of_means.linear - of_means.gram.double() @ v)))
    spread = means @ problem.squares.where(usable, 0.0) - of_means.squares
    visits = v * (v @ spread) / max(unexplained, 1e-300)
    counts = [min(len(rows), math.ceil(count)) for rows, count in zip(rows_by_source, visits.tolist(), strict=True)]
    rng = generator(seed, "mixture")
    sizes = [min(_RESAMPLES_AT_A_TIME, resamples - done) for done in range(0, resamples, _RESAMPLES_AT_A_TIME)]
    shares = torch.cat([_resampled(problem, rows_by_source, counts, rng, size) for size in sizes])
    low, high = shares.quantile(shares.new_tensor([0.025, 0.975]), 0).tolist()
    intervals = list(zip(low, high, strict=True))
    residual = (unexplained / of_means.square) ** 0.5
    return Mixture(names, (v / v.sum()).tolist(), intervals, float(visits.sum()), residual, shares)


def _resampled(
    problem: Problem, rows_by_source: list[Int64[Tensor, " _"]], counts: list[int], rng: torch.Generator, resamples: int
) -> Float64[Tensor, "r s"]:
    """Shares fitted to sums of `counts` rows drawn from each source, by means of that source's rows drawn anew."""
    sources, shares = len(rows_by_source), []
    weights = problem.linear.new_zeros(resamples, sources + 1, len(problem.linear))
    for resample in weights:
        for number, (rows, count) in enumerate(zip(rows_by_source, counts, strict=True)):
            for row, size, share in ((number, len(rows), 1 / len(rows)), (sources, count, 1.0)):
                drawn = rows[torch.randint(len(rows), (size,), generator=rng).to(rows.device)]
                resample[row] += share * torch.bincount(drawn, minlength=resample.shape[1])
    products = problem.combined(weights.flatten(0, 1)).gram.unflatten(0, (resamples, -1)).unflatten(2, (resamples, -1))
    for number in range(resamples):
        block = products[number, :, number]
        v = nonnegative(block[:sources, :sources], block[:sources, sources])
        shares.append(v / v.sum().clamp(min=1e-300))
    return torch.stack(shares)


@dataclass
class _Sum:
    """The sum s of the atoms that a greedy method has chosen, by its inner products."""

    along: Float64[Tensor, " n"]
    """<g_i, s>."""
    linear: float = 0.0
    """<s, T>."""
    square: float = 0.0
    """|s|^2."""

    def add(self, problem: Problem, row: int) -> None:
        """Add an atom to s."""
        self.linear += float(problem.linear[row])
        self.square += float(2 * self.along[row] + problem.squares[row])
        self.along = self.along + problem.column(row)

    def fitted(self) -> float:
        """The step at which s is nearest to T."""
        return max(0.0, self.linear / self.square) if self.square > 0 else 0.0


def _greedy(
    problem: Problem, count: int | None, gain: Callable[[_Sum], Float64[Tensor, " n"]], step: float | None
) -> Pursuit:
    """Choose the atom of greatest gain again and again; `step` None: the step at which the sum is nearest to T."""
    usable = _usable(problem, count)
    free, total, rows = usable.clone(), _Sum(torch.zeros_like(problem.linear)), []
    limit = min(count or len(usable), int(usable.sum()))
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
    _, residual = problem.remaining(weights)  # its squared norm
    linear = float(weights[rows] @ problem.linear[rows])
    length = max(0.0, residual - problem.square + 2 * linear) ** 0.5  # of the weighted sum
    cosine = linear / (length * problem.square**0.5) if length else 0.0
    return Pursuit(rows, weights.float(), scores.float(), (residual / problem.square) ** 0.5, cosine, steps, stopped)


@dataclass(frozen=True)
class _Fit:
    """A non-negative fit, and how far it is from the optimum."""

    weights: Float64[Tensor, " n"]
    downhill: Float64[Tensor, " n"]
    """<g_i, R> less the l1 term, which is minus the slope of the objective."""
    violation: float
    """Violation of the conditions of the optimum: the longest step of unit curvature on a unit atom, over |T|."""
    steps: int


def _fit(problem: Problem, weights: Float64[Tensor, " n"], l1: float, tolerance: float, limit: int) -> _Fit:
    """Rounds of FISTA on the rows that have a weight or would gain one: most others stay at 0 throughout."""
    steps = 0
    while True:
        fit = _Fit(weights, *_conditions(problem, weights, l1), steps)
        if fit.violation <= tolerance or steps >= limit:
            return fit
        rows = ((weights > 0) | (fit.downhill > 0)).nonzero()[:, 0]
        restricted = _fista(
            problem.restricted(rows), weights[rows], l1, tolerance / 2, min(_STEPS_PER_ROUND, limit - steps)
        )
        weights = torch.zeros_like(weights).index_copy(0, rows, restricted.weights)
        steps += max(1, restricted.steps)


def _fista(problem: Problem, weights: Float64[Tensor, " n"], l1: float, tolerance: float, limit: int) -> _Fit:
    """FISTA in steps of 1 / curvature on unit atoms; the curvature, at most n, grows where a step shows it larger."""
    last = _Fit(weights, *_conditions(problem, weights, l1), 0)
    ahead, downhill, momentum, curvature = last.weights, last.downhill, 1.0, 1.0
    for step in range(1, limit + 1):
        if last.violation <= tolerance:
            break
        stepped = (ahead + downhill / (curvature * problem.squares)).clamp(min=0)
        new = _Fit(stepped, *_conditions(problem, stepped, l1), step)
        change = new.weights - ahead
        measured = change @ (downhill - new.downhill) / (problem.squares @ change.square()).clamp(min=1e-300)
        if measured > curvature * (1 + 1e-6) and curvature < len(
            weights
        ):  # too long a step: again from the last good weights
            curvature = min(1.25 * float(measured), len(weights))
            ahead, downhill, momentum = last.weights, last.downhill, 1.0
            continue
        if (problem.squares * change) @ (new.weights - last.weights) < 0:
            momentum = 1.0
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        lead, momentum = (momentum - 1) / grown, grown
        ahead = new.weights + lead * (new.weights - last.weights)
        downhill = new.downhill + lead * (new.downhill - last.downhill)
        last = new
    return last


def _conditions(problem: Problem, weights: Float64[Tensor, " n"], l1: float) -> tuple[Float64[Tensor, " n"], float]:
    """Minus the slope, 0 for atoms that are not usable, and how far the weights are from the optimum."""
    squares = problem.squares.where(problem.usable, 1.0)
    lengths = (squares * problem.square).sqrt()
    downhill = (problem.remaining(weights)[0] - l1 * lengths).where(problem.usable, 0.0)
    step = (weights + downhill / squares).clamp(min=0) - weights
    return downhill, float((step * squares / lengths).abs().max())


def _usable(problem: Problem, count: int | None) -> Bool[Tensor, " n"]:
    """Whether each atom is usable; an error if there is nothing to match, or nothing to match it by."""
    if count is not None and count < 1:
        raise SettingError(f"count {count}: 1 or more rows are expected")
    if not math.isfinite(problem.square):
        raise SettingError("the weight difference is not finite: one without NaN and infinities is expected")
    if not problem.square > 0:
        raise SettingError(
            "the weight difference is zero, so that there is nothing to find: weights that moved are expected"
        )
    usable = problem.usable
    if not usable.any():
        raise SettingError(f"none of {len(usable):,} atoms is finite and other than zero: at least one is expected")
    return usable
