"""Fine-tuning that keeps what attribution needs, by a Hugging Face Trainer fed with Whence's own tokenisation.

The loop, AdamW, the loss (the mean over a batch's supervised tokens) and the directory are the Trainer's. This module
sees to it that rows are tokenised and masked by `tokens.encode`, as in an index; that checkpoints are evenly spaced and
keep the optimizer's moments; and that learning rates are logged, so that the mean over a checkpoint's interval can be
read from `trainer_state.json`.

Training of all weights is in float32 whatever type they are stored in: a step of AdamW at usual rates is smaller than
the spacing of 16-bit weights and would be rounded away. Adapters are float32, on a base as it is stored.

The corpus is tokenised into memory first, at 5 bytes a token. Rows of like length share a batch.

A training that was stopped goes on when it is run again, and ends with the weights it would have had (`resuming`).

Three followers can join a training: `in_run` measures what each row does to a validation loss and changes no weight;
`online_mixing` chooses the domain that each step's rows come from; `step_log` keeps what `replay` needs. Their states
are in every checkpoint.

Preference tuning, several machines, and packing rows into one sequence (which leaves a row no gradient of its own) are
not supported. Use your own Trainer for these; its directory is a Run too.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from whence import runner
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.templates import ASSISTANT, same_date, supervision, writes_date
from whence.corpus.tokens import Encoded, collate
from whence.errors import CorpusError, ModelError, SettingError
from whence.models.loading import LoadedModel, directory_digest, load_model
from whence.models.loading_errors import FOREIGN, reason_of
from whence.models.runs import open_run
from whence.models.training_state import date_of_training, warn_of_run
from whence.outputs import refuse_inputs
from whence.paths import is_directory, writing_to
from whence.storage import Place
from whence.training.in_run import HEURISTIC, InRun, InRunPlan
from whence.training.left_out_rows import draws_masks, without_rows
from whence.training.likeness import require_likeness
from whence.training.online_mixing import OnlineBatches, domains_of, read_options
from whence.training.recipe import OPTIMIZERS, ORDERS, TrainSettings, settings_of, with_least_steps
from whence.training.resuming import (
    FilesListed,
    OrderKept,
    RowOrder,
    begin,
    finish,
    newest_checkpoint,
    read_order,
    refuse_others,
    step_of,
)
from whence.training.step_log import StepRecorder, default_interval, remove_dropout, require_no_chance
from whence.training.trained_weights import trainable
from whence.training.training_rows import Rows, encoded_rows, training_rows

logger = logging.getLogger(__name__)

LOGGED_STEPS = 1000
"""Each step is logged up to this number; a longer training logs about so many, for every checkpoint repeats the log."""


def train(
    model: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    out: str | Path,
    *,
    preset: str | None = None,
    like: str | Path | None = None,
    progress: runner.ProgressOption = True,
    **settings: Any,
) -> Path:
    """Fine-tune a model on a corpus, into a directory that is a Run; or go on doing so.

    The same settings give the same weights, bit for bit, on the same machine, versions and thread count, whether the
    training was stopped and run again or not.

    Args:
        model: Directory or Hub name. An adapter is trained on, its base untouched.
        corpus: Whatever `corpus.open_corpus` takes. Rows without a supervised token are left out.
        out: Directory of the Run, made where missing: `checkpoint-<step>` as the Trainer writes them, the
            tokenizer in each and beside them, and the settings in `whence_train.json`; with `in_run` also
            `in_run_scores.parquet` and what belongs to it, with `mix` the log `online_mixing.jsonl`.
        preset: Name in `PRESETS`, whose settings hold where `settings` says nothing.
        like: Another Trainer's run, of which this is to be the same training, so that what is asked of this one holds
            for that one; with `replayable`. What `likeness` finds is written into `whence_like.json`.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).
        settings: Fields of `TrainSettings`, such as `epochs=3, lr=1e-4, lora_rank=16`.

    Returns:
        The directory.

    Raises:
        CorpusError: The corpus or the validation rows cannot be read, no row has a supervised token, or rows have no
            domain.
        ModelError: The model cannot be loaded, or `in_run` cannot follow its training; or it is not the training of
            `like`, by how much and from which step on.
        SettingError: A setting has a value that cannot work, or `out` is or holds an input, a model, or another
            training's checkpoints.
        ManifestMismatchError: Another process is training there.
    """
    Place.at(out).require_disk("-o")
    chosen, directory = settings_of(preset, settings), Path(out)
    refuse_inputs(directory, [model, corpus, chosen.in_run, chosen.tokenizer, like], is_directory=True)
    if like is not None and not chosen.replayable:
        raise SettingError("--like needs --replayable, which keeps the weights that the training started from")
    with Place.at(directory).locked():
        _train(model, corpus, directory, chosen, progress)
        if like is not None:
            require_likeness(directory, like)
        return directory


def _train(
    model: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    directory: Path,
    chosen: TrainSettings,
    progress: runner.ProgressOption,
) -> Path:
    """Train in a directory that is locked."""
    opened = open_training(model, corpus, directory, chosen)
    chosen = opened.settings
    with writing_to(directory):  # the Trainer makes it
        trainer = trainer_of(opened, directory)
    record = with_followers(trainer, opened, directory)
    begin(directory, record)
    steps_per_epoch = math.ceil(len(opened.rows) / chosen.batch_size)
    with writing_to(directory):
        _train_from(trainer, newest_checkpoint(directory), steps_per_epoch=steps_per_epoch, progress=progress)
        if trainer.in_run is not None:
            heuristic = HEURISTIC if chosen.optimizer == "adamw" else None
            origin = {"validation": record["in_run"], "optimizer": chosen.optimizer, "heuristic": heuristic}
            trainer.in_run.write(directory, opened.rows.ids, opened.rows.sources, origin)
        if trainer.step_log is not None:
            trainer.step_log.write()
        opened.loaded.tokenizer.save_pretrained(directory)
        finish(directory)
    return directory


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a training starts from."""

    source: str | Path
    """Directory or Hub name of the model."""
    corpus: str
    """Name of the corpus."""
    loaded: LoadedModel
    rows: Rows
    settings: TrainSettings
    """Those that the rows lead to, with what chat templates write."""
    left_out: frozenset[int] = frozenset()
    """Numbers of rows that add nothing to their steps; see `left_out_rows`."""


def open_training(
    model: str | Path, corpus: str | Path | Corpus | Iterable[Row], directory: Path, chosen: TrainSettings
) -> Opened:
    """Load a model and tokenise its rows; nothing is written. For errors see `train`."""
    refuse_others(directory)
    # An adapter's checkpoint names its base by the path it was loaded from: make it one that stays true.
    last = open_run(model).checkpoints[-1].path
    warn_of_run(model)
    source = Path(last).resolve() if is_directory(last) else last
    date = same_date(chosen.date, date_of_training(directory), str(directory))
    loaded = load_model(source, tokenizer=chosen.tokenizer, chat_template=chosen.chat_template, date=date,
                        supervise=chosen.supervise,
                        dtype=None if chosen.lora_rank else "float32")  # fmt: skip
    tokenizer = loaded.tokenizer
    written = {} if chosen.chat_template is None else {"chat_template": tokenizer.chat_template}
    written |= {} if supervision(tokenizer) == ASSISTANT else {"supervise": supervision(tokenizer)}
    chosen = replace(chosen, **written, date=tokenizer.template_date if writes_date(tokenizer) else None)
    texts = open_corpus(corpus)
    rows = training_rows(texts, loaded, chosen)
    chosen = with_least_steps(chosen, len(rows))
    return Opened(source=source, corpus=texts.name, loaded=loaded, rows=rows, settings=chosen)


def with_followers(trainer: "_Trainer", opened: Opened, directory: Path) -> dict[str, Any]:
    """Let the followers that the settings ask for join a training; returns the run's record."""
    rows, chosen = opened.rows, opened.settings
    weights = directory_digest(opened.source)
    record = {"model": str(opened.source), "weights": weights, "corpus": opened.corpus}
    record |= {**rows.record(), **chosen.record()}
    if chosen.in_run is not None:
        trainer.in_run, validation = _in_run(opened.loaded, trainer, rows, chosen)
        record |= validation
    if removed := trainer.removed_dropout:
        logger.warning("%s: --replayable trains without its dropout (%s and others)", opened.loaded.path, removed[0])
    if chosen.replayable:
        trainer.step_log = _step_recorder(trainer, opened, directory)
    if chosen.mix is not None:
        domains = domains_of(rows.domains, rows.ids, by=chosen.by or "source")
        trainer.mixing = OnlineBatches(domains, directory, read_options(chosen.mix_set or {}), seed=chosen.seed)
    return record


def _train_from(
    trainer: "_Trainer", newest: Path | None, *, steps_per_epoch: int, progress: runner.ProgressOption
) -> None:
    """Train from the newest checkpoint, or from the start, unless all steps are done."""
    for follower in trainer.followers():
        follower.load(newest)
    if newest is not None and step_of(newest) >= trainer.args.max_steps:
        return
    is_drawn_again = trainer.mixing is None and trainer.args.train_sampling_strategy == ORDERS["length"]
    if newest is not None and step_of(newest) % steps_per_epoch and is_drawn_again:
        trainer.order.resumed_from = read_order(newest)  # within an epoch, whose order was drawn before
    done = 0 if newest is None else step_of(newest)
    with (
        quiet_saving(),
        runner.progress("Training", trainer.args.max_steps, unit="steps", done=done, shown=progress) as tick,
    ):
        trainer.add_callback(_Ticks(tick))
        try:
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        except FOREIGN as error:  # of a damaged file of a checkpoint
            if newest is None or trainer.has_begun:
                raise
            raise ModelError(
                f"{newest}: the training cannot go on from there ({reason_of(error)}). Remove {newest}: the same "
                "command goes on from an earlier one."
            ) from error


def training_until_its_end(trainer: "_Trainer", tick: runner.Tick) -> None:
    """Make all steps of a training, and count them."""
    trainer.add_callback(_Ticks(tick))
    with quiet_saving():
        trainer.train()


def _in_run(
    loaded: LoadedModel, trainer: "_Trainer", rows: "Rows", settings: TrainSettings
) -> tuple[InRun, dict[str, Any]]:
    """The measurement of contributions, and the entries of the run's record for its validation rows."""
    if trainer.args.n_gpu > 1:
        raise SettingError(f"--in-run follows a training on one device, of {trainer.args.n_gpu} here: hide the others")
    if len(set(rows.ids)) < len(rows.ids):
        twice = next(name for number, name in enumerate(rows.ids) if name in rows.ids[:number])
        raise CorpusError(f"the id {twice!r} is given twice, and --in-run scores rows by their ids: make them unique")
    corpus = open_corpus(settings.in_run)
    encoded = encoded_rows(corpus, loaded, settings)
    if not len(encoded):
        raise CorpusError(f"--in-run {corpus.name}: no row has a supervised token, so there is no loss to follow.")
    plan = InRunPlan(
        order=settings.in_run_order,
        every=settings.in_run_every,
        rows=settings.in_run_rows,
        rows_of_pass=settings.micro_batch or settings.batch_size,
        seed=settings.seed,
        save_steps=int(trainer.args.save_steps),
    )
    net: Any = trainer.model
    model = LoadedModel(net, loaded.tokenizer, loaded.path, loaded.has_adapter or settings.lora_rank is not None)
    validation = [Encoded(row["input_ids"].tolist(), row["supervised"].tolist()) for row in encoded.rows]
    digest = encoded.record()["rows_digest"]
    return InRun(model, validation, len(rows), plan), {"in_run": corpus.name, "in_run_digest": digest}


def _step_recorder(trainer: "_Trainer", opened: Opened, directory: Path) -> StepRecorder:
    """The log of a training that can be replayed, in which nothing is left to chance."""
    if trainer.args.n_gpu > 1:
        raise SettingError(
            f"--replayable follows a training on one device, of {trainer.args.n_gpu} here: hide the others"
        )
    if trainer.args.gradient_accumulation_steps > 1 and not trainer.model_accepts_loss_kwargs:
        raise SettingError(
            f"--micro-batch {opened.settings.micro_batch}: this model takes the mean of each pass by itself, and "
            "--replayable needs one mean over a step's tokens. Leave --micro-batch out"
        )
    net: Any = trainer.model
    batch = trainer.data_collator([opened.rows[0]])
    inputs = {name: batch[name].to(net.device) for name in ("input_ids", "attention_mask")}
    require_no_chance(net, inputs, opened.loaded.path)
    weights = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
    trained = sum(weight.numel() * weight.element_size() for weight in weights.values())
    every = opened.settings.replay_every or default_interval(trained, trainer.args.max_steps)
    return StepRecorder(weights, directory, every, trainer.args.max_grad_norm)


@contextmanager
def quiet_saving() -> Iterator[None]:
    """Hide the bar that transformers shows on stderr for each checkpoint that it writes."""
    was_shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers.logging.enable_progress_bar()


class _Ticks(TrainerCallback):
    """Counts steps for the bar."""

    def __init__(self, tick: runner.Tick):
        self.tick = tick

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is made."""
        self.tick(1, 0)


class _Trainer(Trainer):
    """The Trainer, with an order of rows that can be drawn again, and with the followers of the training."""

    in_run: InRun | None = None
    mixing: OnlineBatches | None = None
    step_log: StepRecorder | None = None
    """The log of the steps, if it is kept."""
    left_out: frozenset[int] = frozenset()
    """Numbers of the rows that add nothing to their steps."""
    draws_masks = False
    """Whether the model's passes draw masks of dropout."""
    removed_dropout: Sequence[str] = ()
    """Names of the dropouts that a replayable training does without."""
    has_begun = False
    """Whether a step has begun in this process."""

    def __init__(self, order: RowOrder, **options: Any):
        self.order = order
        super().__init__(callbacks=[OrderKept(order), FilesListed(), _StepEvents(self)], **options)

    def followers(self) -> list[InRun | OnlineBatches | StepRecorder]:
        """The objects that write a state into each checkpoint."""
        return [follower for follower in (self.in_run, self.mixing, self.step_log) if follower is not None]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        is_own = self.args.train_sampling_strategy == ORDERS["length"]
        return self.order if is_own else super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Batches of a step: the next of the epoch, or rows of the domain that the mixer draws."""
        if self.mixing is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        size, dataset = self.args.per_device_train_batch_size, self.train_dataset
        rows = self.mixing.draw(self.state.global_step, size * num_batches)
        batches = [
            self.data_collator([dataset[row] for row in rows[start : start + size]])  # type: ignore[index]
            for start in range(0, len(rows), size)
        ]
        return batches, self._get_num_items_in_batch(batches, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One pass over a batch; its row numbers are not passed to the model."""
        if self.left_out:
            if num_items_in_batch is None:
                raise ModelError(
                    f"A {type(model).__name__} takes no denominator of its loss, which left-out rows must not change: "
                    "leave rows out by --leave-out drop."
                )
            inputs = without_rows(inputs, self.left_out, keeps_places=self.draws_masks)
        rows = inputs.pop("rows")
        if self.step_log is not None:
            self.step_log.add_pass(rows)
        with nullcontext() if self.in_run is None else self.in_run.watching(inputs, rows):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.mixing is not None:
            self.mixing.add(float(loss))
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights, and the followers' states."""
        super().save_model(output_dir, _internal_call)
        for follower in self.followers():
            follower.save(Path(output_dir or str(self.args.output_dir)))


class _StepEvents(TrainerCallback):
    """Informs the followers of each step."""

    def __init__(self, trainer: _Trainer):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whatever a checkpoint holds is loaded."""
        self.trainer.has_begun = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradient is clipped, and the step not yet made."""
        if self.trainer.in_run is not None:
            self.trainer.in_run.step(self.trainer.optimizer, state.global_step)
        if self.trainer.step_log is not None:
            self.trainer.step_log.step(self.trainer.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is made, and counted."""
        if self.trainer.step_log is not None:
            done, steps = state.global_step, state.max_steps
            self.trainer.step_log.close(self.trainer.optimizer, done, is_last=done == steps)
        if self.trainer.mixing is not None:
            self.trainer.mixing.close(state.global_step - 1)


def trainer_of(opened: Opened, directory: Path) -> _Trainer:
    """The Trainer of a training, before its followers join."""
    loaded, rows, settings = opened.loaded, opened.rows, opened.settings
    set_seed(settings.seed)  # before the adapters draw their start
    trainer = _Trainer(
        RowOrder(settings.batch_size, lengths=[len(row["input_ids"]) for row in rows.rows]),
        model=trainable(loaded, settings),
        args=_arguments(directory, len(rows), settings),
        train_dataset=rows,
        data_collator=_collate_function(loaded.tokenizer.pad_token_id or 0),
        processing_class=loaded.tokenizer,
    )
    trainer.left_out, net = opened.left_out, cast(nn.Module, trainer.model)
    if settings.replayable:  # what a configuration says of dropout is void from now on
        trainer.removed_dropout = remove_dropout(net)
    else:
        trainer.draws_masks = draws_masks(net)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)  # they print every log line to stdout, which is for results
    return trainer


def _collate_function(pad_id: int) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        encoded = [Encoded(row["input_ids"].tolist(), row["supervised"].tolist()) for row in rows]
        batch = collate(encoded, pad_id)
        # Not shifted here: the model's own loss compares its logits at t - 1 with the label at t.
        labels = batch.ids.masked_fill(~batch.supervised, -100)
        numbers = torch.tensor([row["row"] for row in rows])
        return {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "labels": labels, "rows": numbers}

    return collated


def _arguments(directory: Path, rows: int, settings: TrainSettings) -> TrainingArguments:
    steps_per_epoch = math.ceil(rows / settings.batch_size)
    steps = settings.max_steps or math.ceil(settings.epochs * steps_per_epoch)
    interval = math.ceil(steps / settings.checkpoints) if settings.checkpoints else steps_per_epoch
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch or settings.batch_size,
        gradient_accumulation_steps=settings.batch_size // (settings.micro_batch or settings.batch_size),
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        # The rate of the first step of a warm-up is 0: a single step would leave all weights as they were.
        warmup_steps=min(math.ceil(settings.warmup * steps), steps - 1),
        weight_decay=settings.weight_decay,
        optim=OPTIMIZERS[settings.optimizer],
        train_sampling_strategy=ORDERS[settings.order],
        logging_steps=math.ceil(steps / LOGGED_STEPS),
        save_strategy="steps",
        save_steps=interval,
        seed=settings.seed,
        remove_unused_columns=False,  # else columns that are no argument of forward go, such as `supervised`
        dataloader_pin_memory=torch.cuda.is_available(),  # asked for without a GPU, it warns
        report_to="none",
    )
