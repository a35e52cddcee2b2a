"""Tail-patch: does one more step on the rows that a method retrieved make the answer more likely?

For query q and each of the k rows that a method ranks highest for it, one row alone, from the run's final weights:

    sgd      theta' = theta - lr g                                    g: gradient of the row's mean loss
    adamw    theta' = theta - lr (n1 / (1 - b1^(t+1))) / (sqrt(n2 / (1 - b2^(t+1))) + eps)
             with n1 = b1 m1 + (1 - b1) g, n2 = b2 m2 + (1 - b2) g^2 of the run's own moments after its t steps

    change   mean over the answer's tokens of log p under theta' less that under theta, in nats a token: above 0, the
             step made the answer more likely

averaged over the k rows, then over queries. Beside the methods stand k random rows, for a step of any row may help. The
step of AdamW has momentum, which is the same for every row: only the difference from random rows is a method's own, and
its interval is over queries, each paired with itself. Weight decay and clipping have no part in it. Plain SGD measures
little more than the inner product of the two gradients, to which its change is equal for a small rate; where there are
moments, AdamW's step is taken.

Rate: the mean rate of the interval that the last checkpoint closes, unless given. A row that several queries have in
common takes one step. Cost: for each different row a backward pass, and a forward pass over the queries it is for.

Source: after the tail-patch of Chang et al. 2024 (TrackStar), https://arxiv.org/abs/2410.17413; what is measured here
is what stands above, and its rate and k are ours: no figure of theirs can be set beside it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus
from whence.corpus.tokens import Encoded
from whence.counts import number_of
from whence.errors import ModelError, SettingError
from whence.evaluation.estimates import Estimate, mean_over_queries, query_draws
from whence.evaluation.method_scores import RANDOM, MethodScores, check_methods, query_targets
from whence.evaluation.retrieval import asked_corpus, row_scores, rows_view
from whence.gradients.forward_passes import losses
from whence.gradients.hessian import LossDerivatives
from whence.indexing.manifest import MANIFEST
from whence.indexing.opening import Index
from whence.models.loading import LoadedModel, load_model, tokenizer_digest
from whence.models.moments import ParameterMoments, optimizer_file, parameter_moments
from whence.models.runs import open_run
from whence.runner import ProgressOption, counting, shown_as
from whence.storage import Place
from whence.turns import one_at_a_time

STEPS = ("adamw", "sgd")
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class TailPatchMarks:
    """What steps on one method's rows do."""

    method: str
    change: Estimate
    """Mean change of the answers' log probability, in nats a token."""
    over_random: Estimate
    """How much more that is than by random rows."""
    helped: float
    """Share of all steps after which the answer was more likely."""
    by_query: list[float]
    """Change of each query's answer, mean over its rows; NaN where its loss is not finite."""
    seconds: float | None = None


@dataclass(frozen=True)
class TailPatchTable:
    """Methods side by side, best first; random rows among them."""

    marks: list[TailPatchMarks]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """The methods with their changes, and how to go on."""
        lines = [f"  {marks.method}: {marks.change.value:+.4g} nats a token" for marks in self.marks]
        head = f"TailPatchTable({self.settings['queries']} queries, {self.settings['top']} rows each)"
        return "\n".join([head, *lines, "  More: .rows(), .marks, .settings"])

    def rows(self) -> list[dict[str, Any]]:
        """Plain rows, best first."""
        rows = []
        for rank, marks in enumerate(self.marks, start=1):
            row: dict[str, Any] = {"rank": rank, "method": marks.method, **marks.change.columns("change")}
            row |= {**marks.over_random.columns("over_random"), "helped": marks.helped}
            rows.append(row | {name: self.settings[name] for name in ("queries", "top", "step", "lr")}
                        | {"seconds": marks.seconds})  # fmt: skip
        return rows


def evaluate_tail_patch(
    run: str | Path,
    queries: str | Path | Corpus | Iterable[Row],
    source: str | Path | Index | Corpus | Iterable[Row],
    methods: Sequence[str] = (),
    *,
    top: int = 10,
    lr: float | None = None,
    step: str | None = None,
    index: Mapping[str, str] | None = None,
    scores: Mapping[str, str] | None = None,
    costs: Mapping[str, float] | None = None,
    index_seconds: float | None = None,
    parent: str | Path | None = None,
    seed: int = 0,
    progress: ProgressOption = False,
) -> TailPatchTable:
    """Grade methods by a step on each of the rows that they retrieve.

    Args:
        run: The run, or a model; steps start from its last weights. Methods on a corpus read this model too, and
            replay goes back through this run.
        queries: Corpus rows, whose answers' probabilities are measured.
        source: An index of the rows, or a corpus for methods that need none.
        methods: Names in `catalogue.GRADED`; random rows are added.
        top: Rows of each query and method.
        lr: Learning rate; None: that of the run.
        step: One of `STEPS`; None: AdamW's where the run has its moments, else SGD's.
        index: Further indexes of the same rows, by name.
        scores: Files of scores by the name of the method; see `score_files`.
        costs: Seconds by method, where they were measured elsewhere.
        index_seconds: What making an index took, added for methods that read its vectors.
        parent: The model that the run was trained from, if that has moved, for methods that replay the run.
        seed: Seed of the random rows, of methods that draw, and of the intervals.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).

    Raises:
        SettingError: No method, one that cannot score the rows, no learning rate, or an index of another tokenizer.
        ModelError: The run cannot be loaded, or lacks the moments that were asked for.
    """
    names = [*dict.fromkeys((*methods, RANDOM))]
    check_methods([*methods], scores or {}, reserved=[RANDOM])
    if top < 1:
        raise SettingError(f"--top {top}: a number of rows from 1 on is expected")
    with shown_as(progress, "Scoring"):
        is_index = isinstance(source, Index) or (isinstance(source, str | Path) and Place.at(source).exists(MANIFEST))
        view = rows_view(source, names, None if is_index else str(run))
        rows_asked = [example.row | {"id": example.id} for example in asked_corpus(queries, view)]
        ids = [str(row["id"]) for row in rows_asked]
        targets = [target.queries[0].encoded for target in query_targets(rows_asked, view)]
        rows = list(view.encoded())
        patch = patcher(run, lr=lr, step=step)
        _require_same_tokens(view.model(), patch.model)
        scored = row_scores(names, rows_asked, view, ids, index=index, scores=scores, costs=costs,
                            index_seconds=index_seconds, run=run, parent=parent, seed=seed)  # fmt: skip
        changes = _changes(patch, scored, targets, rows, top)
    return _table(scored, changes, patch, top, seed)


@dataclass(frozen=True)
class Patcher:
    """A model that takes one step on one row, and is put back."""

    model: LoadedModel
    weights: Mapping[str, Tensor]
    """The trained weights by name."""
    moments: dict[str, ParameterMoments] | None
    """AdamW's; None for a step of SGD."""
    lr: float

    @property
    def step(self) -> str:
        """Name of the step."""
        return "sgd" if self.moments is None else "adamw"

    def update(self, row: Encoded) -> dict[str, Tensor]:
        """What a step on a row adds to the weights."""
        for weight in self.weights.values():
            weight.requires_grad_(True)
        try:
            gradient = LossDerivatives(self.model, self.weights, 1).derivatives([row]).gradient
        finally:
            for weight in self.weights.values():
                weight.requires_grad_(False)
        if self.moments is None:
            return {name: -self.lr * slope for name, slope in gradient.items()}
        return {name: -self.lr * _adamw(slope, self.moments[name]) for name, slope in gradient.items()}

    @contextmanager
    def stepped(self, row: Encoded) -> Iterator[None]:
        """The model after a step on a row; the weights are the very same afterwards."""
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        update = self.update(row)
        try:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight += update[name].to(weight)
            yield
        finally:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(before[name])

    def losses(self, queries: Sequence[Encoded]) -> Float64[Tensor, " q"]:
        """Mean loss of each query's answer, in nats a token."""
        out = torch.full((len(queries),), torch.nan, dtype=torch.float64)
        for numbers, some in losses(self.model, queries, TOKENS_PER_BATCH, len(queries)):
            out[numbers] = some.double()
        return out


def _adamw(gradient: Tensor, moments: ParameterMoments) -> Tensor:
    """The direction of AdamW's next step, without weight decay."""
    first, second = moments.betas
    m1, m2 = moments.m1.to(gradient), moments.m2.to(gradient)
    n1, n2 = first * m1 + (1 - first) * gradient, second * m2 + (1 - second) * gradient.square()
    correction1, correction2 = 1 - first ** (moments.step + 1), 1 - second ** (moments.step + 1)
    return n1 / correction1 / ((n2 / correction2).sqrt() + moments.eps)


def patcher(run: str | Path, *, lr: float | None = None, step: str | None = None) -> Patcher:
    """Load a run's last model to take steps from; for the arguments and errors see `evaluate_tail_patch`."""
    if step not in (None, *STEPS):
        raise SettingError(f"--step {step}: choose {' or '.join(STEPS)}")
    checkpoint = open_run(run).checkpoints[-1]
    rate = checkpoint.learning_rate if lr is None else lr
    if rate is None or not (math.isfinite(rate) and rate > 0):
        found = "no file of it says a learning rate" if rate is None else f"a learning rate of {rate}"
        raise SettingError(f"{run}: {found}; name one above 0 with --lr")
    model = load_model(checkpoint.path, dtype="float32")
    weights = {name: weight for name, weight in model.model.named_parameters() if model.is_trained(name)}
    moments = None
    if step == "adamw" or (step is None and _has_moments(checkpoint.path)):
        moments = parameter_moments(model, weights, remedy="--step sgd needs no optimizer file.")
    return Patcher(model, weights, moments, rate)


def _has_moments(path: str) -> bool:
    try:
        optimizer_file(path)
    except ModelError:
        return False
    return True


def _require_same_tokens(read: LoadedModel, stepped: LoadedModel) -> None:
    """Refuse tokens of one model for steps of another.

    Raises:
        SettingError: The tokenizers are not the same.
    """
    if tokenizer_digest(read.tokenizer) != tokenizer_digest(stepped.tokenizer):
        raise SettingError(
            f"{stepped.path}: its tokenizer is not that of {read.path}, whose tokens the rows of the index are. Give "
            "the run that the index was made of, or the corpus in place of the index."
        )


def best_rows(scores: Float32[Tensor, "q n"], usable: Sequence[int], top: int) -> list[list[int]]:
    """Numbers of each query's highest rows, of those that a step can be taken on; equal scores go by row number.

    >>> best_rows(torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]), [0, 2, 3], 5)
    [[2, 0]]
    """
    numbers, lists = torch.tensor(sorted(usable), dtype=torch.int64), list[list[int]]()
    for line in scores:
        known = numbers[line[numbers].isfinite()]
        lists.append(known[line[known].argsort(descending=True, stable=True)][:top].tolist())
    return lists


@one_at_a_time
def _changes(
    patch: Patcher, scored: Sequence[MethodScores], queries: Sequence[Encoded], rows: Sequence[Encoded], top: int
) -> dict[str, list[list[float]]]:
    """Change of each query's answer by each of its rows, in nats a token, by method."""
    usable = [number for number, row in enumerate(rows) if row.supervised_count]
    lists = {method.name: best_rows(method.scores, usable, top) for method in scored}
    asked: dict[int, set[int]] = {}
    for by_query in lists.values():
        for query, numbers in enumerate(by_query):
            for row in numbers:
                asked.setdefault(row, set()).add(query)
    before, change = patch.losses(queries), dict[tuple[int, int], float]()
    with counting("Steps", len(asked), "steps") as tick:
        for row, of_row in sorted(asked.items()):
            numbers = sorted(of_row)
            with patch.stepped(rows[row]):
                after = patch.losses([queries[query] for query in numbers])
            change |= {(row, query): float(before[query] - value) for query, value in zip(numbers, after, strict=True)}
            tick(1, rows[row].positions)
    return {name: [[change[row, query] for row in numbers] for query, numbers in enumerate(by_query)]
            for name, by_query in lists.items()}  # fmt: skip


def _table(
    scored: Sequence[MethodScores], changes: Mapping[str, list[list[float]]], patch: Patcher, top: int, seed: int
) -> TailPatchTable:
    means = {name: torch.tensor([sum(line) / len(line) if line else math.nan for line in lines], dtype=torch.float64)
             for name, lines in changes.items()}  # fmt: skip
    queries = len(means[RANDOM])
    draws, notes = query_draws(queries, seed), []
    marks = [_marks(method, changes[method.name], means, draws) for method in scored]
    marks.sort(key=lambda line: -line.change.value if math.isfinite(line.change.value) else math.inf)
    for name, values in means.items():
        if lost := int((~values.isfinite()).sum()):
            notes.append(f"{name}: left out, for no row has a score or a loss is not finite: "
                         f"{number_of(lost, 'query', 'queries')}.")  # fmt: skip
    settings = {"queries": queries, "top": top, "step": patch.step, "lr": patch.lr, "seed": seed,
                "model": patch.model.path}  # fmt: skip
    return TailPatchTable(marks, settings, notes)


def _marks(
    method: MethodScores, changes: list[list[float]], means: Mapping[str, Float64[Tensor, " q"]],
    draws: Int64[Tensor, "r q"],
) -> TailPatchMarks:  # fmt: skip
    values = torch.where(means[method.name].isfinite(), means[method.name], torch.nan)
    against = torch.where(means[RANDOM].isfinite(), means[RANDOM], torch.nan)
    steps = [change for line in changes for change in line]
    helped = sum(change > 0 for change in steps) / len(steps) if steps else math.nan
    return TailPatchMarks(method.name, mean_over_queries(values, draws), mean_over_queries(values - against, draws),
                          helped, values.tolist(), method.seconds)  # fmt: skip
