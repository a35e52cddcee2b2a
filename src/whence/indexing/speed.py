"""Speed as a ratio: index building against a plain training step, on the same batches, in one process.

Machines are noisy and differ, so examples per second alone mean little. Each batch is timed three ways in turn, in an
order that rotates: forward + backward with all weights trainable (the model's own loss, logits at every position), the
same plus AdamW's step, and an index of the batch (forward, backward with frozen weights, projection, encoding). Quote
the ratios of the medians. The first batch of each way is not counted.

Peak memory is measured in a fresh process for indexing and another for training: its largest resident size over a few
batches (on a GPU, the largest allocation).
"""

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.corpus.reading import open_corpus
from whence.corpus.tokens import Batch, Encoded, collate, encode
from whence.errors import CorpusError, SettingError
from whence.gradients.capture import Transform, sketch
from whence.gradients.protocols import Projection
from whence.indexing.codecs import codec as codec_of
from whence.indexing.memory import peak_resident
from whence.indexing.shards import COLUMN_BYTES
from whence.indexing.vectors import IndexSettings, batch_tokens, load_for, projection_for, transform_for, with_options
from whence.models.loading import LoadedModel
from whence.models.runs import open_run

MOST_TIMED = 1_000_000
"""Rows, batches or tokens, at most."""
MEMORY_BATCHES = 3
ROWS = 16
"""Default number of rows in a batch of rows as they are."""


@dataclass(frozen=True)
class BenchResult:
    """Medians over batches. Seconds are for one batch."""

    step_seconds: float
    """Forward, backward and AdamW."""
    forward_backward_seconds: float
    index_seconds: float
    ratio: float
    """index_seconds / step_seconds."""
    ratio_to_forward_backward: float
    examples_per_second: float
    """Examples indexed per second."""
    tokens_per_second: float
    peak_bytes: int
    """Peak memory of the process that indexes; a build also holds one shard, about 32 MB."""
    step_peak_bytes: int
    """Peak memory of the process that trains."""
    bytes_per_example: int
    """Bytes on disk, without the corpus' text."""
    width: int
    batches: int
    examples_per_batch: int
    tokens_per_example: float
    spread: dict[str, list[float]]
    """Least and largest seconds of each way."""


def bench(
    model: str | Path,
    corpus: Any,
    *,
    batch_size: int | None = None,
    length: int | None = 128,
    batches: int = 8,
    settings: IndexSettings | None = None,
    memory: bool = True,
    **options: Any,
) -> BenchResult:
    """Time index building against a training step of the same model on the same batches.

    Args:
        model: Directory or Hub name.
        corpus: Whatever `corpus.open_corpus` takes; its first rows are used.
        batch_size: Examples in a batch. None: as many as an index takes in one pass (`tokens_per_batch`), or
            `ROWS` where rows are of different lengths.
        length: Tokens of an example: rows are joined and cut to this length. None: rows as they are.
        batches: Number of batches to time, each in all three ways.
        settings: Settings of the index; or its fields, and those of `GradientSpace`, by name as `options`.
        memory: Also measure peak memory, in two fresh processes.
        **options: See `settings`.

    Raises:
        CorpusError: The corpus has too little text for one batch.
    """
    for flag, value, least in (("batch-size", batch_size, 1), ("batches", batches, 1), ("length", length, 2)):
        if value is not None and not least <= value <= MOST_TIMED:
            raise SettingError(f"--{flag} {value}: a number from {least} to {MOST_TIMED:,} is expected")
    chosen = with_options(settings or IndexSettings(), options)
    loaded = load_for(open_run(model).checkpoints[-1].path, chosen)
    if length is not None and loaded.context is not None and length > loaded.context:
        raise SettingError(f"--length {length}: the model's context is {loaded.context} tokens")
    batch_size = batch_size or (max(1, batch_tokens(chosen, loaded.device) // length) if length else ROWS)
    batch_list = make_batches(loaded, corpus, batch_size, length, batches + 1, chosen)
    projection = projection_for(loaded, chosen)
    seconds = _timed(loaded, batch_list, projection, chosen, transform_for(loaded, chosen))
    step, passes, index = (statistics.median(seconds[name]) for name in ("step", "passes", "index"))
    tokens = statistics.mean(int(batch.mask.sum()) for batch in batch_list)
    peaks = {"index": 0, "step": 0}
    if memory:
        peaks = {kind: _peak(kind, model, corpus, batch_size, length, chosen) for kind in peaks}
    return BenchResult(
        step_seconds=step,
        forward_backward_seconds=passes,
        index_seconds=index,
        ratio=index / step,
        ratio_to_forward_backward=index / passes,
        examples_per_second=batch_size / index,
        tokens_per_second=tokens / index,
        peak_bytes=peaks["index"],
        step_peak_bytes=peaks["step"],
        bytes_per_example=codec_of(chosen.codec_name).bytes_per_row(projection.width) + COLUMN_BYTES,
        width=projection.width,
        batches=batches,
        examples_per_batch=batch_size,
        tokens_per_example=tokens / batch_size,
        spread={name: [min(times), max(times)] for name, times in seconds.items()},
    )


def make_batches(
    loaded: LoadedModel, corpus: Any, size: int, length: int | None, count: int, settings: IndexSettings
) -> list[Batch]:
    """Batches from the first rows of a corpus, which are repeated where they are too few."""
    longest = settings.max_tokens or loaded.context
    rows = itertools.islice(open_corpus(corpus), 4 * size * count)
    examples = [encoded for row in rows if (encoded := encode(row.row, loaded.tokenizer, longest)).supervised_count]
    if length is not None:
        ids = [token for encoded in examples for token in encoded.ids]
        examples = [
            Encoded(ids[start : start + length], [False] + [True] * (length - 1))
            for start in range(0, len(ids) - length + 1, length)
        ]
    if not examples:
        raise CorpusError(f"{corpus}: too little text for a batch; give a longer corpus or a smaller --length")
    endless = itertools.cycle(examples)
    return [collate(list(itertools.islice(endless, size))) for _ in range(count)]


def _timed(
    loaded: LoadedModel,
    batches: list[Batch],
    projection: Projection,
    settings: IndexSettings,
    transform: Transform | None,
) -> dict[str, list[float]]:
    optimizer = _optimizer(loaded)
    ways: dict[str, Callable[[Batch], Any]] = {
        "passes": lambda batch: training_pass(loaded, batch, None),
        "step": lambda batch: training_pass(loaded, batch, optimizer),
        "index": lambda batch: _index(loaded, batch, projection, settings, transform),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number, batch in enumerate(batches):
        for name in names[number % 3 :] + names[: number % 3]:
            _set_trainable(loaded, name != "index")
            _synchronise(loaded)
            start = time.perf_counter()
            ways[name](batch)
            _synchronise(loaded)
            if number:  # the first of each warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _optimizer(loaded: LoadedModel) -> torch.optim.Optimizer:
    _set_trainable(loaded, True)
    return torch.optim.AdamW([weight for weight in loaded.model.parameters() if weight.requires_grad], lr=0.0)


def _set_trainable(loaded: LoadedModel, trainable: bool) -> None:
    for name, weight in loaded.model.named_parameters():
        weight.requires_grad_(trainable and loaded.is_trained(name))
        if not trainable:
            weight.grad = None


def training_pass(loaded: LoadedModel, batch: Batch, optimizer: torch.optim.Optimizer | None) -> None:
    """Forward and backward by the model's own loss, and a step where there is an optimizer."""
    batch = batch.to(loaded.device)
    labels = batch.ids.masked_fill(~batch.supervised, -100)
    loss = loaded.model(input_ids=batch.ids, attention_mask=batch.mask.long(), labels=labels, use_cache=False).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    for weight in loaded.model.parameters():
        weight.grad = None


def _index(
    loaded: LoadedModel, batch: Batch, projection: Projection, settings: IndexSettings, transform: Transform | None
) -> Tensor:
    rows, _ = sketch(
        loaded,
        loaded.layers(settings.space.layers),
        batch,
        projection,
        reduction=settings.space.reduction,
        normalise=settings.space.normalise,
        gradient_checkpointing=settings.gradient_checkpointing,
        transform=transform,
    )
    return codec_of(settings.codec_name).encode(rows.cpu())[0]


def _synchronise(loaded: LoadedModel) -> None:
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)


def _peak(kind: str, model: Any, corpus: Any, size: int, length: int | None, settings: IndexSettings) -> int:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_here, (kind, str(model), corpus, size, length, settings))


def _peak_here(kind: str, model: str, corpus: Any, size: int, length: int | None, settings: IndexSettings) -> int:
    loaded = load_for(open_run(model).checkpoints[-1].path, settings)
    batches = make_batches(loaded, corpus, size, length, MEMORY_BATCHES, settings)
    if kind == "step":
        optimizer = _optimizer(loaded)
        for batch in batches:
            training_pass(loaded, batch, optimizer)
    else:
        projection, transform = projection_for(loaded, settings), transform_for(loaded, settings)
        for batch in batches:
            _index(loaded, batch, projection, settings, transform)
    if loaded.device.type == "cuda":
        return torch.cuda.max_memory_allocated(loaded.device)
    return peak_resident()
