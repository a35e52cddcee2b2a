"""A pilot of a build: some parts of the corpus, read and tokenised as a build does, and some of their passes, measured.

Nothing is written. A sample holds a few parts, evenly spread over the corpus, and the part with the longest row, whose
passes are the largest. Passes are made by `vectors.example_vectors`, as in a build, while the memory of a whole
shard is held. Time is that of passes spread over the sampled parts' tokens; memory that of the largest passes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from whence.corpus.reading import Corpus
from whence.corpus.shapes import Row
from whence.corpus.tokens import Encoded, bucketed
from whence.gradients.capture import Transform
from whence.indexing.codecs import codec
from whence.indexing.ingest import rows_in_groups, rows_per_shard
from whence.indexing.memory import forget_peak, peak_resident, resident
from whence.indexing.parts import encoded_row, part_bytes
from whence.indexing.shards import ShardArrays, encoded, shard_pieces
from whence.indexing.vectors import IndexSettings, example_vectors, projection_for
from whence.models.loading import LoadedModel

PARTS = 8
"""Parts that are sampled, at most, beside that with the longest row."""
SAMPLED_BYTES = 2**26
"""Bytes of the sampled parts' rows, from which on no more are taken."""
LARGEST_PASSES = 4
"""Passes by which memory is measured: what the first frees is not all used by the second."""
PASSES = 12
"""Passes that are timed, at most."""
PATIENCE = 60.0
"""Seconds after which no further pass is timed."""
LEAST_PASSES = 3
"""Passes that are timed, at least."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some parts of a corpus, and what all of them are."""

    parts: list[list[Row]]
    """Stored rows of parts that are spread over the corpus."""
    widest: list[Row]
    """Those of the part with the longest row."""
    sizes: list[int]
    """Rows of every part."""
    characters: int
    """Characters of all rows' JSON."""
    seconds: float
    """Time of reading them all."""
    part_seconds: float = 0.0
    """Time of making the sampled parts' files."""
    part_bytes: int = 0
    """Bytes of these files."""

    @property
    def share(self) -> float:
        """Share of the corpus' text that is in the sampled parts."""
        return sum(len(row["row"]) for part in self.parts for row in part) / max(1, self.characters)


def sample_of(corpus: Corpus, rows: int, width: int) -> Sample:
    """Read a corpus of so many rows through, and keep some of its parts."""
    size, start = rows_per_shard(width), time.perf_counter()
    count = -(-rows // size)
    chosen = {round((number + 0.5) * count / min(PARTS, count) - 0.5) for number in range(min(PARTS, count))}
    parts: list[list[Row]] = []
    widest: list[Row] = []
    sizes, characters, longest, held = [], 0, -1, 0
    for number, group in enumerate(rows_in_groups(corpus, size)):
        lengths = [len(row["row"]) for row in group]
        sizes.append(len(group))
        characters += sum(lengths)
        if number in chosen and held < SAMPLED_BYTES:
            parts.append(group)
            held += sum(lengths)
        if max(lengths) > longest:
            widest, longest = group, max(lengths)
    seconds, start = time.perf_counter() - start, time.perf_counter()
    made = sum(len(part_bytes(part)) for part in parts)
    return Sample(
        parts=parts,
        widest=widest,
        sizes=sizes,
        characters=characters,
        seconds=seconds,
        part_seconds=time.perf_counter() - start,
        part_bytes=made,
    )


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What the passes of some rows take."""

    seconds: float
    """Time of all of them, tokenising included, from those that were timed."""
    timed: int
    positions: int
    """Tokens of all of them, padding included."""


@dataclass
class Pilot:
    """A model and its projection, ready for passes as a build makes them."""

    model: LoadedModel
    settings: IndexSettings
    """With the tokens of a pass."""
    transform: Transform | None
    longest: int
    """Tokens of the longest row."""
    start: int = field(init=False)
    """Bytes that the process held before the first pass, or the GPU."""

    def __post_init__(self):
        self.layers = self.model.layers(self.settings.space.layers)
        self.projection = projection_for(self.model, self.settings)
        self.start = torch.cuda.memory_reserved(self.model.device) if self.on_gpu else resident()

    @property
    def on_gpu(self) -> bool:
        """Whether passes run on a GPU, whose memory is then what counts."""
        return self.model.device.type == "cuda"

    @cached_property
    def _ballast(self) -> torch.Tensor:
        """The vectors of a whole shard, which a build holds."""
        return torch.ones(rows_per_shard(self.projection.width), self.projection.width)

    def tokenised(self, rows: Sequence[Row]) -> list[Encoded]:
        """The rows of a part that have a vector."""
        examples = [encoded_row(row, self.model.tokenizer, self.longest) for row in rows]
        return [example for example in examples if example.supervised_count]

    def run(self, examples: list[Encoded], tokens: int) -> ShardArrays:
        """Passes over examples, as a build makes them: the longest first."""
        settings = replace(self.settings, tokens_per_batch=tokens)
        return example_vectors(
            self.model, self.layers, self.projection, examples, settings=settings, transform=self.transform
        )

    def peak(self, examples: list[Encoded], tokens: int) -> int:
        """Largest memory of the process, or of the GPU, during the largest passes over examples, in bytes."""
        batches = bucketed([example.positions for example in examples], tokens)[:LARGEST_PASSES]
        some = [examples[number] for batch in batches for number in batch]
        held = self._ballast
        self._forget_peak()
        self.run(some, tokens)
        assert held is not None
        return self._peak()

    def _forget_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        else:
            forget_peak()

    def _peak(self) -> int:
        if self.on_gpu:
            return torch.cuda.max_memory_reserved(self.model.device)
        return peak_resident()

    def passes(self, parts: Sequence[Sequence[Row]]) -> Passes:
        """Time of the passes over parts' rows: passes spread over their tokens stand for the rest."""
        start, tokens = time.perf_counter(), self.settings.tokens_per_batch or self.longest
        batches: list[list[Encoded]] = []
        for part in parts:
            examples = self.tokenised(part)
            grouped = bucketed([example.positions for example in examples], tokens)
            batches += [[examples[number] for number in batch] for batch in grouped]
        reading = time.perf_counter() - start
        batches.sort(key=lambda batch: batch[0].positions)
        positions = [len(batch) * batch[0].positions for batch in batches]
        seconds, done, timed = 0.0, 0, 0
        for number in spread(positions, PASSES):
            start = time.perf_counter()
            self.run(batches[number], tokens)
            seconds += time.perf_counter() - start
            done, timed = done + positions[number], timed + 1
            if seconds > PATIENCE and timed >= LEAST_PASSES:
                break
        rate = seconds / done if done else 0.0
        return Passes(seconds=reading + rate * sum(positions), timed=timed, positions=sum(positions))

    def shard(self, rows: int) -> tuple[float, int]:
        """Seconds of encoding a shard of so many rows, and the bytes of its file."""
        vectors, ones = self._ballast[:rows], torch.ones(rows)
        whole = ShardArrays(
            vectors=vectors,
            norm=ones,
            loss=ones,
            status=torch.zeros(rows, dtype=torch.uint8),
            tokens=torch.ones(rows, dtype=torch.int32),
        )
        start = time.perf_counter()
        _, size = shard_pieces(encoded(whole, codec(self.settings.codec_name)))
        return time.perf_counter() - start, size


def spread(weights: Sequence[int], count: int) -> list[int]:
    """Numbers of things that stand for equal shares of their weights' sum, in an order whose beginnings are spread too.

    >>> spread([1, 1, 1, 1, 1, 1, 1, 1, 1], 3), spread([10, 1, 1], 8)
    ([1, 7, 4], [0, 2, 1])
    """
    if len(weights) <= count:
        chosen = [*range(len(weights))]
    else:
        total, before, number, chosen = sum(weights), 0, 0, []
        for place in range(count):
            while before + weights[number] < (place + 0.5) * total / count:
                before, number = before + weights[number], number + 1
            if number not in chosen[-1:]:
                chosen.append(number)
    golden = (5**0.5 - 1) / 2
    return [chosen[place] for place in sorted(range(len(chosen)), key=lambda place: place * golden % 1)]
