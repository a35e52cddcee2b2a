"""A trace by replay: the rows of a training that moved an answer's loss, through every step between.

It reads a run of `whence train --replayable` in place of an index. A score is by about how many nats a token the loss
of the answer would rise if the row had been left out: the training's own counterfactual, to first order. With a
contrast the loss is that of the answer less that of the other.

Sources: Ilyas and Engstrom 2025, MAGIC, https://arxiv.org/abs/2504.16430, see `training.replay`; Bae et al. 2024,
SOURCE, https://arxiv.org/abs/2405.12186, see `selection.scorers.source`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from whence.corpus.layouts import layout
from whence.corpus.reading import Corpus, Example
from whence.corpus.tokens import with_text
from whence.evidence import trace_evidence
from whence.gradients.exact import SignedSequence
from whence.runner import ProgressOption, shown_as
from whence.second_order.fisher import TOKENS_PER_BATCH
from whence.selection.pipeline import build_scorer
from whence.tracing.own_answers import notes_on
from whence.tracing.queries import Query, Sampling, encode_queries
from whence.tracing.results import Hit, Trace
from whence.training.replay import instability, replay
from whence.training.replayed_run import ReplayableRun, open_replayable
from whence.training.step_differences import LARGEST_ERROR

METHOD = "replay"
AS_MEASURED = {"differences"}
"""Options with which replay predicts retrainings as well: docs/results/evaluation.md."""


def replayed_trace(
    run: str | Path | ReplayableRun,
    queries: Sequence[Query],
    *,
    method: str = METHOD,
    top: int,
    sampling: Sampling,
    corpus: str | Path | Corpus | None = None,
    model: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: ProgressOption = False,
) -> Trace:
    """Rows of a training behind some answers.

    Args:
        run: A finished run, as a path or open.
        queries: Prompts, with completions or without.
        method: "replay", or "source", which goes through a few segments of the training in place of its steps.
        top: Rows on each side.
        sampling: How open prompts are completed.
        corpus: What the run was trained on, where that is not where it was.
        model: What it was trained from, where that is not where it was.
        options: Of the method's scorer, by the names of its fields.
        progress: Show a bar on stderr; or a function to call with (done, total, what is being done).

    Raises:
        MissingLogError: The run has no log of its steps.
        SettingError: A query that cannot be asked, an option that the method does not have.
    """
    build_scorer(method, sampling.seed, options or {})  # what an option cannot be is said before anything is loaded
    opened = run if isinstance(run, ReplayableRun) else open_replayable(run, corpus, model=model)
    first = next(iter(opened.corpus))
    encoded = encode_queries(queries, opened.model, kind=layout(first.row), sampling=sampling)
    notes = notes_on([query.answer for query in encoded], opened.model, greedy=sampling.temperature == 0)
    described = _described(opened, method, options or {})
    asked = [query.sequences for query in encoded]
    found = scores_of_run(opened, asked, method, seed=sampling.seed, options=options, progress=progress)
    if found.losses:
        described["loss of the answers, nats a token"] = ", ".join(f"{loss:.3f}" for loss in found.losses[:10])
    if found.error is not None:
        described["derivatives of steps"] = (
            f"differences, up to {found.error:.2g} off where second derivatives were taken"
        )
    return Trace([query.answer for query in encoded], _hits(opened, found.scores, top), method, len(opened.ids),
                 notes=notes + found.notes, settings=described)  # fmt: skip


@dataclass(frozen=True)
class RunScores:
    """What a method says of the rows of a run."""

    scores: Float64[Tensor, "q n"]
    """Larger is more helpful; rows in the order of their numbers in the training."""
    notes: list[str]
    losses: Sequence[float] = ()
    """Of the answers, in nats a token, where the method measures them."""
    error: float | None = None
    """See `training.replay.Replayed`."""


def scores_of_run(
    run: ReplayableRun,
    asked: Sequence[Sequence[SignedSequence]],
    method: str,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    is_resumable: bool = True,
    progress: ProgressOption = False,
) -> RunScores:
    """Scores of all rows of a training for some answers.

    Args:
        run: An open run.
        asked: Each answer's tokens, and with a minus those of its contrast.
        method: "replay" or "source".
        seed: Of what the method draws.
        options: Of the method's scorer, by the names of its fields.
        is_resumable: Write down how far a replay is, and go on from there when it was stopped.
        progress: Show a bar on stderr; or a function to call with (done, total, what is being done).
    """
    scorer = build_scorer(method, seed, options or {})
    if method != METHOD:
        with shown_as(progress, "Tracing"):
            return RunScores(scorer.of_run(run, asked, tokens_per_batch=TOKENS_PER_BATCH).double(), [])
    replayed = replay(run.losses, run.log, [[sequences] for sequences in asked], hessian=scorer.hessian,
                      differences=scorer.differences, is_resumable=is_resumable, progress=progress)  # fmt: skip
    notes = instability(replayed, len(run.model.tokenizer))
    if replayed.error is not None and replayed.error > LARGEST_ERROR:
        notes.append(
            f"Differences of gradients were {replayed.error:.0%} off second derivatives at a step: from there back "
            "these were taken, in twice the time."
        )
    return RunScores(replayed.scores, notes, replayed.losses, replayed.error)


def _hits(run: ReplayableRun, scores: Float64[Tensor, "q n"], top: int) -> list[Hit]:
    """The first and the last rows of each query."""
    top = min(top, scores.shape[1])
    order = scores.argsort(dim=1, descending=True, stable=True)
    sides = ((1, order[:, :top]), (-1, order.flip(1)[:, :top]))
    shown = _examples(run, torch.cat([numbers for _, numbers in sides], 1).unique())
    hits = []
    for query in range(len(scores)):
        for sign, numbers in sides:
            for rank, number in enumerate(numbers[query].tolist(), start=1):
                example = shown[number]
                row = example.row
                row = with_text(row, run.model.tokenizer) if layout(row) == "tokens" else row
                score = float(scores[query, number])
                hits.append(Hit(query, sign * rank, example.id, score, example.source, row))
    return hits


def _examples(run: ReplayableRun, numbers: Int64[Tensor, " m"]) -> dict[int, Example]:
    """Rows of the corpus by their number in the training."""
    places = dict(zip(run.places[numbers].tolist(), numbers.tolist(), strict=True))
    return {places[place]: example for place, example in enumerate(run.corpus) if place in places}


def _described(run: ReplayableRun, method: str, options: Mapping[str, Any]) -> dict[str, str]:
    """How a trace was made, for a person."""
    optimizer = run.log.optimizer
    return {
        "run": run.model.path,
        "corpus": run.corpus.name,
        "method": method,
        "steps": f"{len(run.log.steps):,} of {optimizer.name}",
        "evidence": trace_evidence(method, run.model.path, is_as_measured=set(options) <= AS_MEASURED),
    } | ({"options": ", ".join(f"{name}={value}" for name, value in options.items())} if options else {})
