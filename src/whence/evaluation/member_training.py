"""Train one member of a bank and measure the queries on it; and how far a repeated training is from its run.

A query's loss is the mean over its supervised tokens, in nats, of the trained model without dropout; it is tokenised
as the training's rows are, and cut to the same length.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence import runner
from whence.corpus.layouts import Row
from whence.corpus.tokens import Encoded, encode
from whence.counts import number_of
from whence.errors import CorpusError
from whence.evaluation.bank_store import FULL, MEMBERS, Member, Repetition
from whence.evaluation.left_out import MemberPlan
from whence.gradients.forward_passes import losses
from whence.local_files import temporary_directory
from whence.models.loading import LoadedModel, load_model
from whence.models.runs import open_run
from whence.models.saved_files import list_files, store_directory
from whence.storage import Place
from whence.training.recipe import LeaveOut
from whence.training.repetition import Repeatable, Trained, train_again
from whence.training.trainer import quiet_saving
from whence.training.training_rows import longest_row

WORK = "training-"
"""Prefix of the directory of a training that is going on."""
TOKENS_PER_BATCH = 8192


@dataclass(frozen=True, kw_only=True)
class MemberTraining:
    """What the trainings of all members of a bank have in common."""

    place: Place
    """The bank's directory."""
    training: Repeatable
    leave_out: LeaveOut
    keep_weights: bool
    queries: Sequence[Encoded]

    def __call__(self, plan: MemberPlan, tick: runner.Tick) -> tuple[Member, Repetition | None]:
        """Train a member and measure the queries on it; its weights are stored where they are kept.

        Returns:
            The member; of the training on all rows also how far it ended from the run.
        """
        self.place.scratch.mkdir(parents=True, exist_ok=True)
        with temporary_directory(self.place.scratch, WORK) as folder:
            trained = train_again(
                self.training,
                Path(folder),
                left_out=plan.left_out,
                leave_out=self.leave_out,
                seed=plan.seed,
                tick=tick,
            )
            weights = self._stored_weights(plan.name, trained.model, Path(folder)) if self.keep_weights else None
        member = Member(
            name=plan.name, kind=plan.kind, label=plan.label, left_out=plan.left_out, seed=plan.seed,
            losses=query_losses(trained.model, self.queries), steps=trained.steps, seconds=trained.seconds,
            weights=weights,
        )  # fmt: skip
        return member, repetition_of(self.training, trained) if plan.name == FULL else None

    def _stored_weights(self, name: str, model: LoadedModel, folder: Path) -> str:
        """Store a model as a directory of the bank: by a rename, or in a store file by file."""
        draft, kept = folder / "weights", f"{MEMBERS}/{name}/weights"
        with quiet_saving():
            model.model.save_pretrained(draft)  # type: ignore[operator]
        model.tokenizer.save_pretrained(draft)
        list_files(draft)
        if not self.place.is_local:
            store_directory(draft, self.place, kept)
            return kept
        target = Path(self.place.path(kept))
        if target.exists():  # of a process that was killed before it wrote the member, or of another worker
            target.rename(folder / "before")
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(target)
        return kept


def encoded_queries(training: Repeatable, queries: Sequence[Row]) -> list[Encoded]:
    """Queries as the rows of the training are tokenised."""
    loaded, settings = training.opened.loaded, training.opened.settings
    longest = longest_row(loaded, settings)
    return [encode(query, loaded.tokenizer, longest) for query in queries]


def require_measurable(queries: Sequence[Encoded], name: str) -> None:
    """Refuse queries of which none has a supervised token."""
    if not any(query.supervised_count for query in queries):
        raise CorpusError(
            f"{name}: of {number_of(len(queries), 'query', 'queries')} none has a supervised token, so none has a loss."
        )


def query_losses(model: LoadedModel, queries: Sequence[Encoded]) -> tuple[float, ...]:
    """Mean loss over each query's supervised tokens, in nats; NaN where it has none, or where it is not finite."""
    out = torch.full((len(queries),), torch.nan, dtype=torch.float64)
    for numbers, means in losses(model, queries, TOKENS_PER_BATCH):
        out[numbers] = means.double()
    return tuple(out.where(out.isfinite(), torch.nan).tolist())


def losses_of_weights(training: Repeatable, directory: Path, queries: Sequence[Encoded]) -> tuple[float, ...]:
    """The same of a stored model.

    Raises:
        ChecksumError: A file of it is damaged.
    """
    return query_losses(_loaded_like(training, directory), queries)


def repetition_of(training: Repeatable, trained: Trained) -> Repetition:
    """How far the training on all rows, made again, ended from the run's last checkpoint."""
    run = _loaded_like(training, Path(open_run(training.run).checkpoints[-1].path))
    return compared(dict(trained.model.model.named_parameters()), dict(run.model.named_parameters()), trained.start)


def compared(again: Mapping[str, Any], run: Mapping[str, Any], start: Mapping[str, Tensor]) -> Repetition:
    """Two ends of a training from one start, by the weights that it trained; see `Repetition`.

    >>> start = {"w": torch.zeros(2)}
    >>> compared({"w": torch.tensor([4.0, 3.0])}, {"w": torch.tensor([4.0, 0.0])}, start)
    Repetition(largest=0.75, cosine=0.8)
    """
    farthest = longest = 0.0
    product = squares = run_squares = 0.0
    for name, before in start.items():
        ours, theirs = (ends[name].detach().cpu().double() for ends in (again, run))
        moved, run_moved = ours - before.double(), theirs - before.double()
        farthest, longest = (
            max(farthest, float((ours - theirs).abs().max())),
            max(longest, float(run_moved.abs().max())),
        )
        product += float((moved * run_moved).sum())
        squares, run_squares = squares + float(moved.square().sum()), run_squares + float(run_moved.square().sum())
    if not farthest:
        return Repetition(largest=0.0, cosine=1.0)
    scale = (squares * run_squares) ** 0.5
    return Repetition(largest=farthest / longest if longest else float("inf"), cosine=product / scale if scale else 0.0)


def _loaded_like(training: Repeatable, directory: Path) -> LoadedModel:
    """A stored end of the training, in the precision of training."""
    settings = training.opened.settings
    return load_model(
        directory,
        tokenizer=settings.tokenizer,
        chat_template=settings.chat_template,
        date=settings.date,
        supervise=settings.supervise,
        dtype=None if settings.lora_rank else "float32",
    )


def forget_work(place: Place) -> None:
    """Remove what trainings of killed processes have left."""
    for leftover in place.scratch.glob(f"{WORK}*"):
        shutil.rmtree(leftover, ignore_errors=True)
