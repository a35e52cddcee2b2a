"""What a training would take, by a pilot of a few of its steps on the real model and rows. Nothing is kept of them.

The Trainer draws the largest batch first, by which memory is measured. The steps after it are timed, and stand for the
others by their tokens, padding included. Sizes of checkpoints follow from the weights and the optimizer.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus
from whence.counts import number_of
from whence.indexing.memory import forget_peak, peak_resident
from whence.indexing.memory_bound import ROOM
from whence.indexing.planning import DISK, MEMORY, Phase, Plan, free_disk, free_memory
from whence.models.loading import LoadedModel
from whence.outputs import refuse_inputs
from whence.training.recipe import TrainSettings, settings_of
from whence.training.resuming import RECORD, RowOrder, begin, step_of
from whence.training.step_log import PARTS, default_interval, states_stored
from whence.training.trainer import Opened, open_training, quiet_saving, trainer_of, with_followers

STEPS = 9
"""Steps of a pilot; the first two are not timed."""
UNTIMED = 2
OTHER_FILES = 30_000
"""Bytes of a checkpoint's files of settings, states and checksums, about."""
HEADER, STATE = 120, 900
"""Bytes of a weight's entry in a file of weights, and in one of AdamW's moments, beside its numbers."""
ADAPTER_CONFIG, ADAPTER_CARD = 1_600, 5_200
"""Bytes of an adapter's settings, and of the page that peft writes beside it."""


@dataclass(frozen=True, kw_only=True)
class PilotSteps:
    """What some steps of a training took."""

    seconds_per_position: float
    """Time of a step over its tokens, padding included."""
    peak: int
    """Bytes of the process at their peak, or of the GPU."""
    checkpoint: int
    """Bytes of a checkpoint."""
    trained: int
    """Bytes of a file of the weights that are trained."""
    on_gpu: bool
    free: int | None
    """Bytes that are free for it, or that the GPU has; None: not known."""

    @property
    def memory(self) -> int:
        """Expected peak of a whole training."""
        return self.peak + ROOM


def plan_training(
    model: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    out: str | Path,
    *,
    preset: str | None = None,
    **settings: Any,
) -> Plan:
    """What `train` would take with these arguments: time, disk and memory. Nothing is written to `out`.

    Args:
        model: See `trainer.train`.
        corpus: See there.
        out: Directory of the Run; if a training was stopped there, its rest is planned.
        preset: See there.
        **settings: Fields of `TrainSettings`.

    Raises:
        CorpusError: See `train`, as all others.
        ModelError: See there.
        SettingError: See there.
    """
    start = time.perf_counter()
    chosen, directory = settings_of(preset, settings), Path(out)
    refuse_inputs(directory, [model, corpus, chosen.in_run, chosen.tokenizer], is_directory=True)
    opened = open_training(model, corpus, directory, chosen)
    began = time.perf_counter() - start
    steps, kept = steps_of(opened.settings, len(opened.rows))
    done = _steps_done(directory)
    found = pilot_steps(opened, check=directory)
    positions = positions_of(opened) * max(0.0, 1 - done / steps)
    checkpoints = sum(step > done for step in kept)
    notes = ("The time of writing checkpoints is not counted.",)
    if done:
        notes += (f"{number_of(done, 'step')} of {steps:,} are done; this is the rest.",)
    return Plan(
        verb="train",
        about=f"{number_of(len(opened.rows), 'row')}, {number_of(steps, 'step')} of "
        f"{number_of(opened.settings.batch_size, 'row')}, {number_of(len(kept), 'checkpoint')}",
        phases=(
            Phase("checking and loading", began),
            Phase("steps", found.seconds_per_position * positions, number_of(max(0, steps - done), "step")),
        ),
        disk={"checkpoints": checkpoints * found.checkpoint, **_states(opened.settings, found, steps, done)},
        memory=found.memory,
        free_disk=free_disk(out),
        free_memory=found.free,
        on_gpu=found.on_gpu,
        remedies={DISK: ("--checkpoints", "1"), MEMORY: _less_memory(opened.settings)},
        notes=notes,
    )


def _states(settings: TrainSettings, found: PilotSteps, steps: int, done: int) -> dict[str, int]:
    """Bytes of the states that a replayable training stores; nothing for another."""
    if not settings.replayable:
        return {}
    stored = states_stored(steps, settings.replay_every or default_interval(found.trained, steps))
    return {"states to replay": sum(len(PARTS) if step else 1 for step in stored if step >= done) * found.trained}


def steps_of(settings: TrainSettings, rows: int) -> tuple[int, list[int]]:
    """Steps of a training on so many rows, and those after which a checkpoint is written."""
    per_epoch = math.ceil(rows / settings.batch_size)
    steps = settings.max_steps or math.ceil(settings.epochs * per_epoch)
    interval = math.ceil(steps / settings.checkpoints) if settings.checkpoints else per_epoch
    return steps, sorted({*range(interval, steps + 1, interval), steps})


def pilot_steps(opened: Opened, *, check: Path | None = None) -> PilotSteps:
    """Make the first steps of a training, in a directory that is removed, and measure them.

    Args:
        opened: What the training starts from. Its weights are other ones afterwards.
        check: Directory whose record must be that of this training, if it has one.
    """
    on_gpu = opened.loaded.device.type == "cuda"
    few = replace(opened, settings=replace(opened.settings, max_steps=STEPS))
    with tempfile.TemporaryDirectory() as name:
        trainer = trainer_of(few, Path(name))
        record = with_followers(trainer, opened, Path(name))
        if check is not None and (check / RECORD).exists():
            begin(check, record)  # which compares the two
        trainer.args.save_strategy, trainer.args.logging_steps = "no", STEPS  # type: ignore[assignment]
        batches = _Batches(trainer.data_collator)
        trainer.data_collator = batches
        clock = _Clock(torch.cuda.synchronize if on_gpu else lambda: None)
        trainer.add_callback(clock)
        device = opened.loaded.device
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        forget_peak()
        with quiet_saving():
            trainer.train()
        peak = torch.cuda.max_memory_reserved(device) if on_gpu else peak_resident()
        trained = bytes_of(weight for weight in trainer.model.parameters() if weight.requires_grad)  # type: ignore[union-attr]
        size = checkpoint_bytes(opened.loaded, trainer.model, opened.settings)
    passes = opened.settings.batch_size // (opened.settings.micro_batch or opened.settings.batch_size)
    timed = sum(batches.positions[UNTIMED * passes : STEPS * passes])
    seconds = clock.ends[-1] - clock.ends[UNTIMED - 1]
    return PilotSteps(
        seconds_per_position=seconds / max(1, timed),
        peak=peak,
        checkpoint=size,
        on_gpu=on_gpu,
        trained=trained,
        free=_free_memory(opened.loaded) if on_gpu else free_memory(),
    )


class _Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self, synchronise: Callable[[], Any]):
        self.synchronise = synchronise
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is made."""
        self.synchronise()
        self.ends.append(time.perf_counter())


class _Batches:
    """A collate function that notes how many positions each batch has."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]):
        self.collate = collate
        self.positions: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch."""
        batch = self.collate(rows)
        self.positions.append(batch["input_ids"].numel())
        return batch


def positions_of(opened: Opened) -> float:
    """Tokens of all steps, padding included, from the order of one epoch."""
    settings, lengths = opened.settings, [len(row["input_ids"]) for row in opened.rows.rows]
    size = settings.micro_batch or settings.batch_size
    order = list(RowOrder(settings.batch_size, lengths=lengths))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    epoch = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    steps, _ = steps_of(settings, len(lengths))
    return epoch * steps / math.ceil(len(lengths) / settings.batch_size)


def checkpoint_bytes(loaded: LoadedModel, trained: Any, settings: TrainSettings) -> int:
    """Bytes of a checkpoint: weights (an adapter's alone, with an adapter), the optimizer's moments, the tokenizer."""
    weights = {id(weight): weight for weight in trained.parameters()}.values()
    thawed = [weight for weight in weights if weight.requires_grad]
    has_adapter = loaded.has_adapter or settings.lora_rank is not None
    saved = bytes_of(thawed if has_adapter else weights) + (ADAPTER_CONFIG + ADAPTER_CARD if has_adapter else 0)
    optimizer = 0
    if settings.optimizer == "adamw":
        optimizer = sum(2 * weight.numel() * weight.element_size() + STATE for weight in thawed)
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    words = len(backend.to_str(pretty=True).encode()) if backend is not None else 0
    return saved + optimizer + words + OTHER_FILES


def bytes_of(weights: Iterable[torch.Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes of a file of weights, as they are or of another type."""
    return sum(HEADER + weight.numel() * (dtype or weight.dtype).itemsize for weight in weights)


def _steps_done(directory: Path) -> int:
    whole = [path for path in directory.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(map(step_of, whole), default=0)


def _less_memory(settings: TrainSettings) -> tuple[str, ...]:
    size = settings.micro_batch or settings.batch_size
    smaller = next((part for part in range(size // 2, 0, -1) if settings.batch_size % part == 0), None)
    return ("--micro-batch", str(smaller)) if smaller else ("--max-tokens", str((settings.max_tokens or 2048) // 2))


def _free_memory(loaded: LoadedModel) -> int:
    return torch.cuda.mem_get_info(loaded.device)[0] + torch.cuda.memory_reserved(loaded.device)
