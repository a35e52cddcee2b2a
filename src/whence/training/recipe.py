"""How to train: the settings of `train`, their checks, and presets that set several at once from a paper's recipe."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from whence.errors import SettingError
from whence.training.online_mixing import read_options

logger = logging.getLogger(__name__)

LeaveOut = Literal["zero", "drop"]
"""How rows leave a training that is made again; see `repetition`."""
IN_RUN = ("in_run", "in_run_every", "in_run_order", "in_run_rows")
MIX = ("mix", "by", "mix_set")
REPLAY = ("replayable", "replay_every")
"""Settings that belong together: those of the measurement beside a training, of the order of rows, of the log."""
OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}
"""The Trainer's name of each optimizer."""
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    *("reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
)
"""Names in transformers' `SchedulerType`, which takes seconds to import."""

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
        "least_steps": 100,  # not the paper's, whose 13,533 rows make 424 steps: 5% of a small pool makes 4
        "schedule": "linear",
        "warmup": 0.03,
        "weight_decay": 0.0,
    }
}
"""Settings by the name of a preset."""
ORDERS = {"length": "group_by_length", "random": "random"}
"""The Trainer's name of each order of rows."""
LARGEST = 2**53
"""Whole numbers below are floats too."""
LARGEST_SEED = 2**32 - 1
"""As numpy's generator takes it, which a Trainer seeds."""
LEAST_BATCH = 8
"""Rows of a step, below which its gradient says little of the corpus: `least_steps` then takes more epochs."""


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
    least_steps: int | None = None
    """Steps to make at least: where the rows make fewer, a step has fewer rows, down to 8, then there are more epochs.
    Nothing where `max_steps` is given; see `with_least_steps`."""
    max_tokens: int | None = 2048
    """Longest row in tokens, at most the model's context; `tokens.encode` says what a longer one loses."""
    tokenizer: str | None = None
    """Directory or Hub name of the tokenizer to train with, and its chat template; None: the model's own."""
    chat_template: str | None = None
    """File of a chat template to train with, or its text; None: the tokenizer's own."""
    date: str | None = None
    """Day that a chat template writes that writes the date, as YYYY-MM-DD; None: that of the
    training of the model it starts from, if `whence train` wrote it, else the day of the start."""
    supervise: str | None = None
    """Which tokens of a row are supervised: "assistant", "last" or "all"; see `corpus.templates.SUPERVISED`. None: as
    the model it starts from was trained, if `whence train` wrote it, else "assistant"."""
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
    """Share of a weight lost in each step, for each unit of learning rate."""
    optimizer: str = "adamw"
    """"adamw", or "sgd", plain, without momentum."""
    seed: int = 0
    """Seed of the chosen rows, their order, dropout and the adapters' start."""
    in_run: Any = None
    """Validation rows, whatever `corpus.open_corpus` takes: measure what each row does to their loss; see `in_run`."""
    in_run_every: int = 10
    """Number of steps for which one draw of validation rows serves."""
    in_run_order: int = 1
    """Order of the expansion of a step's effect: 1, or 2 at several times the cost."""
    in_run_rows: int = 16
    """Validation rows of a draw."""
    order: str = "length"
    """"length": rows of like length share a batch. "random": the order of a Trainer that is told nothing else."""
    replayable: bool = False
    """Keep what `replay` needs: every step's rows and rate, and the weights and moments every `replay_every` steps."""
    replay_every: int | None = None
    """Steps between stored states, each of three times the trained weights in fp32; as many are held in memory when it
    is replayed, and 1 needs no step to be trained again. None: 1 where all states take a gigabyte at the most, else the
    square root of the number of steps."""
    mix: str | None = None
    """"online": each step's rows come from one domain, drawn by the losses so far; see `online_mixing`."""
    by: str | None = None
    """Column whose values are the domains; None: `source`."""
    mix_set: Mapping[str, Any] | None = None
    """Options of the mixer by name; see `online_mixing.read_options`."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train, by the name of their flag."""
        counts = ("batch_size", "micro_batch", "max_steps", "least_steps", "max_tokens", "checkpoints")
        for name in ("epochs", "lr", "lora_rank", "lora_alpha", *counts):
            value = getattr(self, name)
            if value is not None:
                check_amount(f"--{name.replace('_', '-')}", value)
        check_seed(self.seed)
        if not 0 < self.fraction <= 1:
            raise SettingError(f"--fraction {self.fraction}: a share above 0 and up to 1 is expected")
        for flag, value in (("warmup", self.warmup), ("--lora-dropout", self.lora_dropout)):
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
        if self.order not in ORDERS:
            raise SettingError(f"--order {self.order}: choose one of {', '.join(ORDERS)}")
        if self.order != "length" and self.mix is not None:
            raise SettingError(f"--order {self.order}: with --mix the mixer draws the rows")
        if self.schedule not in SCHEDULES:
            raise SettingError(f"--schedule {self.schedule}: choose one of {', '.join(SCHEDULES)}")
        self._check_in_run()
        self._check_mix()
        self._check_replay()

    def _check_in_run(self) -> None:
        for name in IN_RUN[1:]:
            if self.in_run is None and getattr(self, name) != getattr(TrainSettings, name):
                raise SettingError(f"--{name.replace('_', '-')} needs an --in-run VALIDATION")
        for flag, value in (("--in-run-every", self.in_run_every), ("--in-run-rows", self.in_run_rows)):
            if value < 1:
                raise SettingError(f"{flag} {value}: a number above 0 is expected")
        if self.in_run_order not in (1, 2):
            raise SettingError(f"--in-run-order {self.in_run_order}: choose 1 or 2")

    def _check_mix(self) -> None:
        if self.mix is None and (self.by, self.mix_set) != (None, None):
            raise SettingError("--by and --mix-set need --mix online")
        if self.mix not in (None, "online"):
            raise SettingError(f"--mix {self.mix}: online is expected")
        read_options(self.mix_set or {})

    def _check_replay(self) -> None:
        if self.replay_every is not None and self.replay_every < 1:
            raise SettingError(f"--replay-every {self.replay_every}: a number above 0 is expected")
        if not self.replayable and self.replay_every is not None:
            raise SettingError("--replay-every needs --replayable")
        if self.replayable and self.mix is not None:
            raise SettingError("--mix: a training whose order of rows follows their losses cannot be --replayable")
        if self.replayable and self.lora_dropout:
            raise SettingError(f"--lora-dropout {self.lora_dropout}: a training with dropout cannot be --replayable")

    def record(self) -> dict[str, Any]:
        """Settings by name, for a run's record, which leaves out those of `in_run` and others where they are unused."""
        unused = (IN_RUN if self.in_run is None else ()) + (MIX if self.mix is None else ())
        unused += () if self.replayable else REPLAY
        unused += ("order",) if self.order == TrainSettings.order else ()
        unused += ("least_steps",)  # what it led to is in the others
        unused += tuple(
            name for name in ("tokenizer", "chat_template", "date", "supervise") if getattr(self, name) is None
        )
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in unused}


def check_amount(flag: str, value: int | float) -> None:
    """Refuse an amount that is 0, less or none, or larger than any machine counts to.

    >>> check_amount("--steps", 10**400)
    Traceback (most recent call last):
    whence.errors.SettingError: --steps: a number above 0 and below 9.0e+15 is expected
    """
    if not 0 < value < LARGEST:
        shown = f" {value}" if abs(value) < LARGEST or value != value else ""
        more = "" if shown else f" and below {LARGEST:.1e}"
        raise SettingError(f"{flag}{shown}: a number above 0{more} is expected")


def check_seed(seed: int) -> None:
    """Refuse a seed that a training cannot have."""
    if not 0 <= seed <= LARGEST_SEED:
        raise SettingError(f"--seed {seed}: a number from 0 to {LARGEST_SEED} is expected")


def settings_of(preset: str | None, settings: dict[str, Any]) -> TrainSettings:
    """Settings by name; a preset's hold where they say nothing."""
    if preset is not None and preset not in PRESETS:
        raise SettingError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    chosen = (PRESETS[preset] if preset else {}) | settings
    if "least_steps" not in settings and any(name in settings for name in ("batch_size", "epochs")):
        chosen.pop("least_steps", None)
    return TrainSettings(**chosen)


def with_least_steps(settings: TrainSettings, rows: int) -> TrainSettings:
    """Settings under which so many rows make `least_steps` steps, with as many checkpoints as the settings had epochs.

    >>> few = with_least_steps(TrainSettings(batch_size=128, epochs=4, least_steps=100), 80)
    >>> few.batch_size, few.epochs, few.checkpoints
    (8, 10, 4)
    """
    least, epochs = settings.least_steps, settings.epochs
    if least is None or settings.max_steps is not None or math.ceil(rows / settings.batch_size) * epochs >= least:
        return replace(settings, least_steps=None)
    fewest = min(settings.batch_size, LEAST_BATCH)
    batch_size = max(fewest, min(settings.batch_size, int(rows * epochs / least)))
    if settings.micro_batch is not None:
        batch_size = max(1, batch_size // settings.micro_batch) * settings.micro_batch
    more = max(epochs, math.ceil(least / math.ceil(rows / batch_size)))
    steps = math.ceil(rows / settings.batch_size) * epochs
    logger.warning(
        "%d rows at batch %d for %g epochs are %g steps, which hardly train: batch %d for %g epochs instead. Give "
        "--batch-size or --epochs for others",
        *(rows, settings.batch_size, epochs, steps, batch_size, more),
    )
    checkpoints = settings.checkpoints or math.ceil(epochs)
    return replace(settings, least_steps=None, batch_size=batch_size, epochs=more, checkpoints=checkpoints)
