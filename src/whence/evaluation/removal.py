"""What the rows at the top of a method's list do, by trainings without them (removal) and on them alone (addition).

For a method, the k = share of n rows that it ranks highest leave the training of a bank's run, or all others do:

    removal     loss of a query after a training without the k rows - loss after a training on all rows
    addition    loss of a query before training - loss after a training on the k rows alone

Both in nats a token: larger says that the rows help more. They stand beside as many random rows, and every line is
trained with several seeds (order of rows, dropout, start of adapters), the same for all: seed s of a method is compared
with seed s of all rows, and with the s-th draw of random rows. The first seed is the run's own.

Where rows leave by adding nothing (`leave_out` zero), a training on k rows alone has as many steps as one on all rows,
most of them without a row: AdamW then moves by its moments. The random rows beside it are trained in the same way.

By default a method ranks rows by the mean of its scores over the queries, so that one training serves all of them; by
`each_query` every query has a list and trainings of its own, q times as many.

Every training is a member of the bank, by its rows and seed: it is made once, whatever asks for it.

Source: removal is the test of Koh and Liang 2017, https://arxiv.org/abs/1703.04730, and of later work on attribution;
both ways side by side are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from scipy.stats import t as student_t
from torch import Tensor

from whence.counts import number_of
from whence.errors import SettingError
from whence.evaluation.bank_pipeline import train_members
from whence.evaluation.bank_scores import bank_scores, run_of
from whence.evaluation.bank_spread import measured, with_loss
from whence.evaluation.bank_store import FULL, Bank, Member, open_bank, read_members
from whence.evaluation.estimates import Estimate, mean_over_queries, query_draws
from whence.evaluation.left_out import MemberPlan, full_plan, rows_plan
from whence.evaluation.member_training import MemberTraining, encoded_queries, forget_work
from whence.evaluation.method_scores import RANDOM, MethodScores, check_methods, kept_note
from whence.numerics import crossed_bootstrap_interval, generator
from whence.paths import writing_to
from whence.runner import EngineOption, ProgressOption, check_engine, shown_as
from whence.training.recipe import LARGEST_SEED
from whence.training.repetition import Repeatable, repeatable

MOST_SEEDS = 100
FEWEST_DRAWN = 8
"""Seeds and queries from which on an interval is by drawing them anew."""
FEWEST_WEIGHED = 2
"""Seeds or queries up to which degrees of freedom are the fewest there can be: two say too little of a variance."""
Way = Literal["removal", "addition"]


@dataclass(frozen=True)
class RemovalMarks:
    """What one method's top rows do."""

    method: str
    effect: Estimate
    """Removal: how much their absence raises the loss. Addition: how much they alone lower it. Nats a token, mean over
    seeds and queries."""
    over_random: Estimate
    """How much more that is than by random rows."""
    by_query: list[float]
    """Effect on each query, mean over seeds; NaN where the query has no loss."""
    by_seed: list[float]
    """Mean over queries of each seed's effect."""
    below_best: Estimate
    """How much less that is than the best method's, paired over seeds and queries."""
    seconds: float | None = None
    """What the method's scores took; None where nobody knows."""


@dataclass(frozen=True)
class RemovalTable:
    """Methods side by side, best first; random rows among them."""

    marks: list[RemovalMarks]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """The methods with their effects, and how to go on."""
        lines = [f"  {marks.method}: {marks.effect.value:+.4f} nats a token" for marks in self.marks]
        head = f"RemovalTable({self.settings['way']} of {number_of(self.settings['rows'], 'row')})"
        return "\n".join([head, *lines, "  More: .rows(), .marks, .settings"])

    def rows(self) -> list[dict[str, Any]]:
        """Plain rows, best first."""
        shared = {name: self.settings[name] for name in ("way", "rows", "share", "seeds", "queries")}
        return [
            {"rank": rank, "method": marks.method, **marks.effect.columns("effect"),
             **marks.over_random.columns("over_random"), **marks.below_best.columns("below_best"), **shared,
             "seconds": marks.seconds}
            for rank, marks in enumerate(self.marks, start=1)
        ]  # fmt: skip


def evaluate_removal(bank: str | Path | Bank, methods: Sequence[str] = (), **settings: Any) -> RemovalTable:
    """Leave out the rows that each method ranks highest, train, and compare with leaving out random rows.

    Args:
        bank: A bank of `whence bank`, in which the trainings are kept.
        methods: Names in `catalogue.GRADED`; random rows are always among them.
        **settings: Arguments of `graded_by_training` by name: `share`, `seeds`, `each_query`, and those of
            `evaluate_lds` for scores.

    Raises:
        SettingError: A share that is no row or all rows, no method, or one that cannot score the bank's rows.
        ManifestMismatchError: The run has changed since the bank was made.
        MissingBankError: There is no bank.
    """
    return graded_by_training(bank, methods, "removal", **settings)


def evaluate_addition(bank: str | Path | Bank, methods: Sequence[str] = (), **settings: Any) -> RemovalTable:
    """Train on the rows alone that each method ranks highest, and compare with random rows; see `evaluate_removal`."""
    return graded_by_training(bank, methods, "addition", **settings)


def graded_by_training(
    bank: str | Path | Bank,
    methods: Sequence[str],
    way: Way,
    *,
    share: float = 0.01,
    seeds: int = 3,
    each_query: bool = False,
    run: str | Path | None = None,
    model: str | Path | None = None,
    engine: EngineOption = "local",
    seed: int = 0,
    progress: ProgressOption = False,
    **scoring: Any,
) -> RemovalTable:
    """Grade methods by trainings without the rows that they rank highest (`evaluate_removal`), or on them alone.

    Args:
        bank: See `evaluate_removal`.
        methods: See there.
        way: "removal" or "addition".
        share: Share of the training's rows.
        seeds: Trainings of each line.
        each_query: Rank rows for each query, and train for each.
        run: Where the bank's run is, if it has moved.
        model: Where the model is that the run was trained from, or that of an index of another model, if it has moved.
        engine: Engine that members are trained on; see `runner`.
        seed: Seed of the random rows, of methods that draw, and of intervals.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).
        **scoring: `index`, `scores`, `costs` and `index_seconds`, as `evaluate_lds` takes them.

    Returns:
        Methods and random rows, best first, with intervals over seeds and queries.

    Raises:
        SettingError: See `evaluate_removal`.
        ManifestMismatchError: The run or its model is not there, or has changed since the bank was made.
        MissingBankError: There is no bank.
    """
    opened = bank if isinstance(bank, Bank) else open_bank(bank)
    check_engine(engine)
    if not 1 <= seeds <= MOST_SEEDS:
        raise SettingError(f"--seeds {seeds}: a number from 1 to {MOST_SEEDS} is expected")
    count = _rows_of_share(share, len(opened.rows))
    names, files = [name for name in methods if name != RANDOM], scoring.get("scores") or {}
    check_methods([*methods], files, reserved=[RANDOM, FULL])
    scored: list[MethodScores] = []
    training = repeatable(run_of(opened, run), opened.corpus_rows, model=model, is_sampled=True)
    if names or files:
        with shown_as(progress, "Scoring"):
            scored = bank_scores(opened, names, run=run, model=model, seed=seed, **scoring)
    graded = [replace(method, scores=method.scores[measured(opened)]) for method in scored]
    lists = {method.name: top_rows(method, count, each_query=each_query) for method in graded}
    whole, plans = _plans(lists, opened, way, count, training.opened.settings.seed, seeds, seed)
    every = [*whole, *(plan for line in plans.values() for of_seed in line for plan in of_seed)]
    members = _trained(opened, training, every, engine, progress)
    effects = {name: _effects(line, whole, members, opened, way) for name, line in plans.items()}
    costs = {method.name: method.seconds for method in scored}
    settings = {"bank": opened.place.root, "run": str(run or opened.protocol.run), "way": way,
                "rows": count, "share": share, "seeds": seeds,
                "queries": int(with_loss(opened).sum()), "each_query": each_query, "seed": seed,
                "training_seconds": opened.training_seconds}  # fmt: skip
    table = _table(effects, costs, settings, opened, seed)
    table.notes.extend(kept_note(scored, opened.place.root))
    return table


def _rows_of_share(share: float, n: int) -> int:
    count = round(share * n) if 0 < share < 1 else 0
    if not 0 < count < n:
        raise SettingError(
            f"--share {share}: of {number_of(n, 'row')} that is {count:,}; a share of one row or more, and not of all, "
            "is expected"
        )
    return count


def top_rows(method: MethodScores, count: int, *, each_query: bool) -> list[tuple[int, ...]]:
    """The rows that a method ranks highest, a list for each query or one by the mean over queries.

    Scores that are not finite do not count; a row without any is never among them, and equal scores go by row number.

    Raises:
        SettingError: Fewer rows have a score.
    """
    scores = method.scores.double()
    scores = torch.where(scores.isfinite(), scores, torch.nan)
    lines = scores if each_query else scores.nanmean(0, keepdim=True)
    lists = []
    for number, line in enumerate(lines):
        ranked = [row for row, value in enumerate(line.tolist()) if math.isfinite(value)]
        if len(ranked) < count:
            which = f"query {number + 1}" if each_query else "any query"
            raise SettingError(
                f"{method.name}: {number_of(len(ranked), 'row')} of {len(line):,} have a score for {which}, and "
                f"{count:,} are wanted. Lower --share."
            )
        lists.append(tuple(sorted(sorted(ranked, key=lambda row: (-float(line[row]), row))[:count])))
    return lists


Plans = dict[str, list[list[MemberPlan]]]
"""Trainings by method, seed, and list of rows."""


def _plans(
    lists: Mapping[str, list[tuple[int, ...]]], bank: Bank, way: Way, count: int, first: int, seeds: int, seed: int
) -> tuple[list[MemberPlan], Plans]:
    """All trainings of a table: those on all rows by seed, which addition does not need, and those of methods."""
    n, whole, plans = len(bank.rows), list[MemberPlan](), Plans()
    for number in range(seeds):
        training_seed = (first + number) % (LARGEST_SEED + 1)
        drawn = torch.randperm(n, generator=generator(seed, "removal", str(number)))[:count].tolist()
        if way == "removal":
            full = full_plan(training_seed)
            whole.append(replace(full, name=f"{FULL}-{training_seed}") if number else full)
        for name, of_method in {RANDOM: [tuple(drawn)], **lists}.items():
            line = [_plan(way, name, rows, n, training_seed) for rows in of_method]
            plans.setdefault(name, []).append(line)
    return whole, plans


def _plan(way: Way, method: str, rows: Sequence[int], n: int, seed: int) -> MemberPlan:
    left_out = rows if way == "removal" else {*range(n)} - {*rows}
    plan = rows_plan("", left_out, n, seed)
    return replace(plan, name=f"{way}-{plan.name.removeprefix('rows-')}", kind=way, label=method)


def _trained(
    bank: Bank, training: Repeatable, plans: Sequence[MemberPlan], engine: EngineOption, progress: ProgressOption
) -> dict[str, Member]:
    """Make the trainings that the bank lacks; all its members."""
    member_training = MemberTraining(
        place=bank.place,
        training=training,
        leave_out=bank.protocol.leave_out,
        keep_weights=bank.protocol.keep_weights,
        queries=encoded_queries(training, bank.queries),
    )
    with bank.place.locked(), writing_to(bank.place.scratch):
        forget_work(bank.place)
        there = read_members(bank.place, bank.description)
        todo = [plan for plan in {plan.name: plan for plan in plans}.values() if plan.name not in there]
        train_members(member_training, bank.description, todo, engine, progress)
        return read_members(bank.place, bank.description)


def _effects(
    line: list[list[MemberPlan]], whole: Sequence[MemberPlan], members: Mapping[str, Member], bank: Bank, way: Way
) -> Float64[Tensor, "s q"]:
    """Effect by seed and query; not finite for a query without a loss, which has no list of rows of its own."""
    lists, rows = (measured(bank).cumsum(0) - 1).clamp_min(0).tolist(), []
    for number, of_seed in enumerate(line):
        losses = [members[plan.name].losses for plan in of_seed]
        after = [losses[place if len(losses) > 1 else 0][query] for query, place in enumerate(lists)]
        if way == "removal":
            before = members[whole[number].name].losses
            rows.append([value - start for value, start in zip(after, before, strict=True)])
        else:
            rows.append([start - value for value, start in zip(after, bank.parent.losses, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def _table(
    effects: Mapping[str, Float64[Tensor, "s q"]],
    costs: Mapping[str, float | None],
    settings: dict[str, Any],
    bank: Bank,
    seed: int,
) -> RemovalTable:
    present = torch.stack([values.isfinite().all(0) for values in effects.values()]).all(0)
    measured_effects = {name: values[:, present] for name, values in effects.items()}
    chance, marks, notes = measured_effects[RANDOM], [], []
    best = max(measured_effects, key=lambda name: _or_least(float(measured_effects[name].mean())))
    for name, kept in measured_effects.items():
        over, below = (
            Estimate(0.0, None) if name == other else estimate_of(difference, seed)
            for other, difference in ((RANDOM, kept - chance), (best, measured_effects[best] - kept))
        )
        marks.append(
            RemovalMarks(name, estimate_of(kept, seed), over, effects[name].mean(0).tolist(), kept.mean(1).tolist(),
                         below, costs.get(name))
        )  # fmt: skip
    marks.sort(key=lambda line: -line.effect.value if math.isfinite(line.effect.value) else math.inf)
    if lost := [id for id, is_there in zip(bank.query_ids, present.tolist(), strict=True) if not is_there]:
        some = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        notes.append(f"Left out, for their loss is not finite somewhere: {some}.")
    if settings["seeds"] == 1:
        notes.append("One seed: intervals are over queries alone, and say nothing of another training.")
    return RemovalTable(marks, settings, notes)


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def estimate_of(values: Float[Tensor, "s q"], seed: int) -> Estimate:
    """Mean over seeds and queries, with a 95% interval over both, or over queries alone where there is one seed.

    From `FEWEST_DRAWN` of each on both are drawn anew. Fewer trainings would be drawn too much alike, and the interval
    would be too narrow: then it is Student's t of the standard error

        sqrt(a + b)    a = variance of the seeds' means / s, b = variance of the queries' means / q

    which is a little too large where seeds and queries interact, with (a + b)^2 / (a^2 / (s - 1) + b^2 / (q - 1))
    degrees of freedom, or 1 where either is 2. In simulations of 3 seeds it holds the mean in 92 to 99 of 100 cases
    (docs/LOG.md). Source: Owen 2007, https://doi.org/10.1214/07-AOAS122, for the variance; Satterthwaite 1946,
    https://doi.org/10.2307/3002019, for the degrees of freedom; Student 1908 for the interval.

    >>> estimate_of(torch.tensor([[1.0, 3.0], [1.0, 3.0]]), 0).value
    2.0
    """
    s, q = values.shape
    if not q:
        return Estimate(math.nan, None)
    if 1 < min(s, q) < FEWEST_DRAWN:
        known, mean = values.double(), float(values.double().mean())
        of_seeds, of_queries = float(known.mean(1).var() / s), float(known.mean(0).var() / q)
        squares = of_seeds**2 / (s - 1) + of_queries**2 / (q - 1)
        freedom = (of_seeds + of_queries) ** 2 / squares if squares and min(s, q) > FEWEST_WEIGHED else min(s, q) - 1
        half = float(student_t.ppf(0.975, freedom)) * math.sqrt(of_seeds + of_queries)
        return Estimate(mean, (mean - half, mean + half))
    if s > 1 and q > 1:
        return Estimate(float(values.mean()), crossed_bootstrap_interval(values, seed=seed))
    return mean_over_queries(values.double().mean(0), query_draws(q, seed))
