"""Fine-tuning that keeps what attribution needs: a Hugging Face Trainer, fed with Whence's own tokenisation.

The Trainer stays the trainer: its loop, its AdamW, its loss (the mean over a batch's supervised tokens),
its directory. What is set here is that rows are tokenised and masked by `tokens.encode`, as the index does;
that checkpoints are evenly spaced and keep the optimizer's moments; and that learning rates are logged, so
that the mean over a checkpoint's interval can be read from `trainer_state.json`.

Full training is in float32 whatever the weights are stored in: a step of AdamW at usual rates is smaller than
the spacing of 16-bit weights and would be rounded away. Adapters are float32, on a base as it is stored.

The corpus is tokenised into memory first, at 5 bytes a token. Rows of like length share a batch.

A training that was stopped goes on when it is run again, and ends with the weights it would have had (`resuming`).

What it does not do: preference tuning, several machines, or packing rows into one sequence (which leaves a row no
gradient of its own). Train with your own Trainer for these; its directory is a Run too.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ProgressCallback, SchedulerType, Trainer, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback

from whence.checkpoint import open_run
from whence.corpus import Corpus, Example, Row, open_corpus
from whence.errors import CorpusError, SettingError
from whence.model import LoadedModel, load_model
from whence.numerics import mixed_seed
from whence.resuming import Order, OrderKept, begin, finish, newest_checkpoint, read_order, step_of
from whence.tokens import Encoded, collate, encode

LOGGED_STEPS = 1000
"""Up to so many steps each is logged; of a longer run about so many, for every checkpoint repeats the log."""

OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}
"""By Whence's name, the Trainer's."""

PRESETS: dict[str, dict[str, Any]] = {
    # Xia et al. 2024, https://arxiv.org/abs/2402.04333, and its released scripts
    "less": {
        "fraction": 0.05,
        "lora_rank": 128,
        "lora_alpha": 512,
        "lora_dropout": 0.1,
        "lora_targets": "q_proj,k_proj,v_proj,o_proj",
        "epochs": 4,
        "lr": 2e-5,
        "batch_size": 128,
        "schedule": "linear",
        "warmup": 0.03,
        "weight_decay": 0.0,
    }
}
"""Settings by the name of a recipe."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Epochs, learning rate, warm-up and length default to those of LESS (arXiv 2402.04333)."""

    epochs: int | float = 4
    """Passes over the corpus."""
    lr: float = 2e-5
    """Peak learning rate, for the mean loss of a batch's supervised tokens."""
    batch_size: int = 16
    """Rows of a step, on each device."""
    micro_batch: int | None = None
    """Rows of one pass, of which a step adds up several; a divisor of `batch_size`. None: all of them."""
    max_steps: int | None = None
    """Number of steps, in place of `epochs`."""
    max_tokens: int | None = 2048
    """Longest row in tokens, at most the model's context; `tokens.encode` says what a longer one loses."""
    fraction: float = 1.0
    """Share of the corpus to train on, chosen at random."""
    lora_rank: int | None = None
    """Train adapters of this rank; None trains all weights."""
    lora_alpha: int | None = None
    """Adapters' scale times their rank; None: twice the rank."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that are dropped in training."""
    lora_targets: str | None = None
    """Ends of the names of layers that get an adapter, with commas between; None: every linear layer of the blocks."""
    checkpoints: int | None = None
    """Checkpoints to keep at most, evenly spaced, the last step among them; None keeps one an epoch."""
    schedule: str = "linear"
    """How the learning rate falls after its warm-up: a schedule's name in transformers, such as `cosine`."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """For each step and unit of learning rate."""
    optimizer: str = "adamw"
    """"adamw", or "sgd", plain, without momentum."""
    seed: int = 0
    """Seed of the chosen rows, their order, dropout and the adapters' start."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train, by the name of their flag."""
        counts = ("batch_size", "micro_batch", "max_steps", "max_tokens", "checkpoints")
        for name in ("epochs", "lr", "lora_rank", "lora_alpha", *counts):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingError(f"--{name.replace('_', '-')} {value}: a number above 0 is expected")
        if not 0 < self.fraction <= 1:
            raise SettingError(f"--fraction {self.fraction}: a share above 0 and up to 1 is expected")
        for flag, value in (("--warmup", self.warmup), ("--lora-dropout", self.lora_dropout)):
            if not 0 <= value < 1:
                raise SettingError(f"{flag} {value}: a share from 0 and below 1 is expected")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise SettingError(
                f"--micro-batch {self.micro_batch}: a divisor of --batch-size {self.batch_size} is expected"
            )
        if self.lora_rank is None and (self.lora_alpha, self.lora_dropout, self.lora_targets) != (None, 0.0, None):
            raise SettingError("--lora-alpha, --lora-dropout and --lora-targets need a --lora-rank")
        if self.optimizer not in OPTIMIZERS:
            raise SettingError(f"--optimizer {self.optimizer}: choose one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in (names := [kind.value for kind in SchedulerType]):
            raise SettingError(f"--schedule {self.schedule}: choose one of {', '.join(names)}")


def train(
    model: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    out: str | Path,
    *,
    preset: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Fine-tune a model on a corpus, into a directory that is a Run; or go on doing so.

    The same settings give the same weights, bit for bit, on the same machine, versions and thread count, whether the
    training was stopped and run again or not.

    Args:
        model: Directory or Hub name. An adapter is trained on, its base untouched.
        corpus: Whatever `corpus.open_corpus` takes. Rows without a supervised token are left out.
        out: Directory of the Run, made where missing: `checkpoint-<step>` as the Trainer writes them, the
            tokenizer in each and beside them, and the settings in `whence_train.json`.
        preset: Name in `PRESETS`, whose settings hold where `settings` does not say otherwise.
        progress: Show a bar on stderr.
        settings: Fields of `TrainSettings`, such as `epochs=3, lr=1e-4, lora_rank=16`.

    Returns:
        The directory.

    Raises:
        CorpusError: The corpus cannot be read, or no row has a supervised token.
        ModelError: The model cannot be loaded.
        SettingError: A setting has a value that cannot work, or `out` holds another training's checkpoints.
    """
    chosen, directory = settings_of(preset, settings), Path(out)
    # An adapter's checkpoint names its base by the path it was loaded from: make it one that stays true.
    last = open_run(model).checkpoints[-1].path
    source = Path(last).resolve() if Path(last).is_dir() else last
    loaded = load_model(source, dtype=None if chosen.lora_rank else "float32")
    texts = open_corpus(corpus)
    rows = _training_rows(texts, loaded, chosen)
    trainer = _trainer(loaded, rows, directory, chosen)
    if progress:
        trainer.add_callback(_Bar)
    begin(directory, {"model": str(source), "corpus": texts.name, **rows.record(), **asdict(chosen)})
    newest = newest_checkpoint(directory)
    if newest is None or step_of(newest) < trainer.args.max_steps:
        _run(trainer, newest, steps_per_epoch=math.ceil(len(rows) / chosen.batch_size))
    loaded.tokenizer.save_pretrained(directory)
    finish(directory)
    return directory


def settings_of(preset: str | None, settings: dict[str, Any]) -> TrainSettings:
    """Settings by name, the others a preset's."""
    if preset is not None and preset not in PRESETS:
        raise SettingError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    return TrainSettings(**(PRESETS[preset] if preset else {}) | settings)


def _run(trainer: "_Trainer", newest: Path | None, *, steps_per_epoch: int) -> None:
    """Train from the newest checkpoint, or from the start."""
    if newest is not None and step_of(newest) % steps_per_epoch:  # within an epoch, whose order was drawn before
        trainer.order.resumed_from = read_order(newest)
    with quiet_saving():
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))


@contextmanager
def quiet_saving() -> Iterator[None]:
    """Without the bar that transformers shows on stderr for each checkpoint that it writes."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


class _Bar(ProgressCallback):
    """The Trainer's bar, on stderr, without the log lines that it writes to stdout."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        pass


class _Rows(Dataset):
    """Encoded rows as the Trainer reads them."""

    def __init__(self, rows: Iterable[Encoded]):
        self.rows = [
            {"input_ids": np.array(row.ids, dtype=np.int32), "supervised": np.array(row.supervised)}
            for row in rows
            if row.targets
        ]

    def record(self) -> dict[str, Any]:
        """What tells them from other rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row["input_ids"].tobytes() + row["supervised"].tobytes() + b"/")
        return {"rows": len(self.rows), "rows_digest": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return self.rows[number]


def _training_rows(corpus: Corpus, loaded: LoadedModel, settings: TrainSettings) -> _Rows:
    longest = min((limit for limit in (settings.max_tokens, loaded.context) if limit), default=None)
    rows = _Rows(encode(example.row, loaded.tokenizer, longest) for example in _sampled(corpus, settings))
    if not len(rows):
        raise CorpusError(f"{corpus.name}: no row has a supervised token, so there is nothing to train on.")
    return rows


def _sampled(corpus: Corpus, settings: TrainSettings) -> Iterator[Example]:
    if settings.fraction == 1:
        return iter(corpus)
    total = sum(1 for _ in corpus)
    rng = random.Random(mixed_seed(settings.seed, "train", "fraction"))
    chosen = set(rng.sample(range(total), max(1, round(settings.fraction * total))))
    return (example for number, example in enumerate(corpus) if number in chosen)


class _Trainer(Trainer):
    """The Trainer, with an order of rows that can be drawn again."""

    def __init__(self, order: Order, **options: Any):
        self.order = order
        super().__init__(callbacks=[OrderKept(order)], **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order


def _trainer(loaded: LoadedModel, rows: _Rows, directory: Path, settings: TrainSettings) -> _Trainer:
    set_seed(settings.seed)  # before the adapters draw their start
    trainer = _Trainer(
        Order(settings.batch_size, lengths=[len(row["input_ids"]) for row in rows.rows]),
        model=_thawed(loaded, settings),
        args=_arguments(directory, len(rows), settings),
        train_dataset=rows,
        data_collator=_collator(loaded.tokenizer.pad_token_id or 0),
        processing_class=loaded.tokenizer,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)  # they print every log line to stdout, which is for results
    return trainer


def _collator(pad_id: int) -> Callable[[list[dict[str, np.ndarray]]], dict[str, Tensor]]:
    def collated(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        encoded = [Encoded(row["input_ids"].tolist(), row["supervised"].tolist()) for row in rows]
        batch = collate(encoded, pad_id)
        # Not shifted here: the model's own loss compares its logits at t - 1 with the label at t.
        labels = batch.ids.masked_fill(~batch.supervised, -100)
        return {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "labels": labels}

    return collated


def _thawed(loaded: LoadedModel, settings: TrainSettings) -> nn.Module:
    """The model with those weights thawed that are to be trained; loading froze all of them."""
    if loaded.has_adapter:
        if settings.lora_rank is not None:
            raise SettingError(f"--lora-rank: {loaded.path} has an adapter already, and that is trained on.")
        for name, weight in loaded.model.named_parameters():
            weight.requires_grad_("lora_" in name)
        return loaded.model
    if settings.lora_rank is None:
        return loaded.model.requires_grad_(True)
    targets = [name.strip() for name in (settings.lora_targets or "").split(",")]
    adapter = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if settings.lora_targets else "all-linear",  # of the blocks; peft leaves the head out
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in loaded.model.modules()),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(loaded.base, adapter)
    except ValueError as error:
        names = dict.fromkeys(name.rpartition(".")[2] for name in loaded.layers())
        raise SettingError(
            f"--lora-targets {settings.lora_targets}: this model has no such layers; its linear layers are called "
            f"{', '.join(names)} ({' '.join(str(error).split())[:100]})"
        ) from None


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
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        optim=OPTIMIZERS[settings.optimizer],
        train_sampling_strategy="group_by_length",
        logging_steps=math.ceil(steps / LOGGED_STEPS),
        save_strategy="steps",
        save_steps=interval,
        seed=settings.seed,
        remove_unused_columns=False,  # columns are chosen by forward's arguments, and `supervised` is none
        dataloader_pin_memory=torch.cuda.is_available(),  # asked for without a GPU, it warns
        report_to="none",
    )
