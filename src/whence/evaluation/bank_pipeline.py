"""Make a bank of real retrainings, or let members and queries join one: `whence bank`.

    1. the run's recipe, its rows and its model are opened, and compared with what the bank was begun with
    2. the model before training is measured on the queries, then a training on all rows is made again and compared with
       the run's own end, then every member that is asked for and is not there
    3. queries that were added are measured on members whose weights were kept

A member is an idempotent job: a bank that was stopped loses the training that was going on, and no other.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whence import runner
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.counts import number_of
from whence.errors import SettingError
from whence.evaluation.bank_protocol import BankSettings, claimed, require_work
from whence.evaluation.bank_spread import without_loss
from whence.evaluation.bank_store import (
    PARENT,
    Bank,
    Description,
    Member,
    Repetition,
    open_bank,
    read_members,
    read_queries,
    remove_member,
    write_description,
    write_member,
)
from whence.evaluation.left_out import MemberPlan
from whence.evaluation.member_training import (
    MemberTraining,
    encoded_queries,
    forget_work,
    losses_of_weights,
    query_losses,
)
from whence.models.saved_files import directory_here, forget_copy
from whence.outputs import refuse_inputs
from whence.paths import writing_to
from whence.storage import Place
from whence.training.dry_run import steps_of
from whence.training.repetition import repeatable

logger = logging.getLogger(__name__)

SAME = 0.99999
"""Cosine of two trainings' changes from which on they are taken to differ by rounding alone. Measured on 57 steps of
base-6m, from weights that differ in their last bit: 1 - 1.4e-11."""


@dataclass(frozen=True)
class Made:
    """A bank, and what a call added to it."""

    bank: Bank
    trained: tuple[str, ...]
    """Names of the trainings that were made."""
    measured: int
    """Members that queries were measured on without a training."""


def bank(
    run: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    out: str | Path,
    *,
    queries: str | Path | Corpus | Iterable[Row] | None = None,
    model: str | Path | None = None,
    engine: runner.EngineOption = "local",
    progress: runner.ProgressOption = True,
    **settings: Any,
) -> Bank:
    """Repeat a run's training without some of its rows, many times, and keep what that does to the loss of queries.

    Args:
        run: Directory that `whence train` wrote.
        corpus: The corpus that it was trained on.
        out: The bank's directory; the same call goes on from there, and others let members and queries join.
        queries: Held-out rows whose losses are kept; required at the first call.
        model: The model that the run was trained from, if that has moved.
        engine: Engine that members are trained on; see `runner`.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).
        settings: Fields of `BankSettings`, such as `subsets=60, fraction=0.5`.

    Raises:
        CorpusError: Rows or queries cannot be read, have ids that are given twice, or have no loss.
        ManifestMismatchError: The bank there is of another run or protocol, or the corpus has other rows.
        ModelError: The run's model is not there any more.
        SettingError: A setting cannot work, or the run cannot be made again.
    """
    return make_bank(run, corpus, out, queries=queries, model=model, engine=engine, progress=progress, **settings).bank


def make_bank(
    run: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    out: str | Path,
    *,
    queries: str | Path | Corpus | Iterable[Row] | None = None,
    model: str | Path | None = None,
    engine: runner.EngineOption = "local",
    progress: runner.ProgressOption = True,
    **settings: Any,
) -> Made:
    """Make a bank, or let members and queries join one, as `bank` does: for the arguments see there.

    Returns:
        The bank, with what this call added to it.

    Raises:
        CorpusError, ManifestMismatchError, ModelError, SettingError: See `bank`.
    """
    chosen, place = BankSettings(**settings), Place.at(out)
    runner.check_engine(engine)
    refuse_inputs(out, [run, corpus, queries, model, *chosen.rows], is_directory=True)
    require_work(place, chosen, has_queries=queries is not None)
    rows = open_corpus(corpus)
    asked = None if queries is None else open_corpus(queries)
    training = repeatable(run, rows, model=model)
    with place.locked(), writing_to(place.scratch):
        place.scratch.mkdir(parents=True, exist_ok=True)
        forget_work(place)
        description, plans = claimed(place, training, rows, chosen, asked)
        member_training = MemberTraining(
            place=place,
            training=training,
            leave_out=description.protocol.leave_out,
            keep_weights=description.protocol.keep_weights,
            queries=encoded_queries(training, read_queries(place, description)),
        )
        measured = _measure_added(member_training, description, progress)
        there = read_members(place, description)
        todo = [plan for plan in plans if plan.name not in there]
        train_members(member_training, description, todo, engine, progress)
    made = Made(open_bank(out), tuple(plan.name for plan in todo), measured)
    _warn_of_missing_losses(made.bank)
    return made


def _measure_added(training: MemberTraining, description: Description, progress: runner.ProgressOption) -> int:
    """Measure the model before training, and queries that were added on members that are there; how many members.

    Raises:
        SettingError: A member has no weights any more.
    """
    place, members = training.place, read_members(training.place, description)
    if PARENT not in members:
        losses = query_losses(training.training.opened.loaded, training.queries)
        write_member(place, Member(name=PARENT, kind="parent", seed=0, losses=losses, steps=0, seconds=0.0))
    todo = [member for member in members.values() if len(member.losses) < len(training.queries)]
    if not todo:
        return 0
    with runner.progress("Measuring queries", len(todo), unit="members", shown=progress) as tick:
        for member in todo:
            added = training.queries[len(member.losses) :]
            if member.kind == PARENT:
                losses = query_losses(training.training.opened.loaded, added)
            elif member.weights is not None:
                directory = directory_here(place, member.weights, remove_member(member.name))
                losses = losses_of_weights(training.training, directory, added)
                forget_copy(place, member.weights)
            else:
                raise SettingError(
                    f"{place.root}: the weights of {member.name} are not kept, and queries were added since. "
                    f"{remove_member(member.name)}"
                )
            write_member(place, replace(member, losses=(*member.losses, *losses)))
            tick(1, 0)
    return len(todo)


def train_members(
    training: MemberTraining,
    description: Description,
    todo: Sequence[MemberPlan],
    engine: runner.EngineOption,
    progress: runner.ProgressOption,
) -> None:
    """Train members and write each when it is measured."""
    settings, n = training.training.opened.settings, len(training.training.opened.rows)
    drops = training.leave_out == "drop"
    steps = sum(steps_of(settings, n - len(plan.left_out) if drops else n)[0] for plan in todo)
    label = f"Making {number_of(len(todo), 'training')}"
    if not todo:
        return
    with runner.progress(label, steps, unit="steps", shown=progress) as tick:
        advice = "train with a smaller --micro-batch"
        for _, (member, compared) in runner.map(training, todo, engine=engine, on_tick=tick, less_memory=advice):
            if compared is not None:
                write_description(training.place, replace(description, repetition=compared, notes=_notes(compared)))
            write_member(training.place, member)
    forget_work(training.place)  # of workers that were lost


def _notes(repetition: Repetition) -> tuple[str, ...]:
    """What a reader of the bank has to know of the training on all rows."""
    if repetition.cosine >= SAME:
        return ()
    note = (
        f"The training on all rows did not end as the run did: the cosine of the two changes of weights is "
        f"{repetition.cosine:.4f}, and the largest difference of a weight is {repetition.largest:.1%} of the largest "
        "change. Another machine or number of threads rounds otherwise, and this training multiplies it."
    )
    logger.warning("%s", note)
    return (note,)


def _warn_of_missing_losses(made: Bank) -> None:
    """Name queries without a loss."""
    if missing := without_loss(made):
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        logger.warning(
            "%s: %s of %d %s: %s. They are kept, and left out of means.",
            *(made.place.root, len(missing), len(made.queries), "have no loss in some member", some),
        )
