"""A corpus as named partitions, and the rows of each partition that a model with a token budget reads.

    pieces    a text longer than a row may be is cut into rows between its tokens, so that none of it is lost
    units     a large partition is cut into units of about equally many tokens, each its own member of a pool
    draw      rows come in seeded random order, repeated if a partition is smaller than the budget, until the budget is
              met: exact fractional epochs, where the released code repeats files a whole number of times

Tokens are counted by the model's own tokenizer and include the closing one.

Source: Na et al. 2024, https://arxiv.org/abs/2410.15661, section 3 (base units, equal budgets).
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whence.corpus.layouts import layout
from whence.corpus.reading import Corpus, storable
from whence.corpus.shapes import Row
from whence.corpus.tokens import encode
from whence.errors import CorpusError, SettingError

FILE = "file"
"""Partitioning by this name is partitioning by file, unless the rows have a column of that name."""


@dataclass(frozen=True)
class Piece:
    """A row that fits, and its number of tokens."""

    row: Row
    tokens: int


@dataclass(frozen=True)
class Partition:
    """A named slice of a corpus."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all its rows, each row counted once."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def digest(self) -> str:
        """SHA-256 of its rows in their order."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(json.dumps(piece.row, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def draw(self, budget: int, *, seed: int) -> list[Row]:
        """Rows of about `budget` tokens: at least so many, and less than one row more."""
        if budget <= 0:
            return []
        order, rows, total = random.Random(f"{self.name} {seed}"), list[Row](), 0
        while total < budget:
            for piece in order.sample(self.pieces, len(self.pieces)):
                if total >= budget:
                    break
                rows.append(piece.row)
                total += piece.tokens
        return rows

    def units(self, tokens: int) -> "list[Partition]":
        """Units of equal size with about `tokens` tokens, in the corpus' order; itself if it is no larger.

        The units are called `name/0`, `name/1`, and so on.
        """
        count = max(1, round(self.tokens / tokens))
        if count == 1:
            return [self]
        size, units, total = self.tokens / count, [list[Piece]() for _ in range(count)], 0
        for piece in self.pieces:
            units[min(count - 1, int(total / size))].append(piece)
            total += piece.tokens
        return [Partition(f"{self.name}/{number}", tuple(unit)) for number, unit in enumerate(units) if unit]


def partitions_of(
    corpus: Corpus, tokenizer: Any, *, by: str = "source", max_tokens: int | None = None, unit_tokens: int | None = None
) -> dict[str, Partition]:
    """Partitions by the values of a column, in order of first appearance.

    Args:
        corpus: Rows to partition; rows without a supervised token are left out.
        tokenizer: The tokenizer of the model that will read them.
        by: Name of the column. "file", if the rows have no such column, is the file that a row was read from.
        max_tokens: Longest row, in tokens.
        unit_tokens: Cut partitions into units of about so many tokens.

    Raises:
        CorpusError: A row lacks the column.
        SettingError: A number is below 1.
    """
    for flag, value in (("--max-tokens", max_tokens), ("--unit-tokens", unit_tokens)):
        if value is not None and value < 1:
            raise SettingError(f"{flag} {value}: 1 or more are expected")
    pieces_of_value: dict[str, list[Piece]] = {}
    for example in corpus:
        if (value := example.row.get(by, example.file if by == FILE else None)) is None:
            names = ", ".join(map(str, example.row))
            raise CorpusError(f"{corpus.name}: row {example.id} has no {by!r} to partition by; its columns are {names}")
        pieces = pieces_of_value.setdefault(storable(value), [])
        for number, row in enumerate(pieces_of(example.row, tokenizer, max_tokens)):
            encoded = encode(row, tokenizer, max_tokens)
            if encoded.supervised_count:
                pieces.append(Piece(row | {"id": f"{example.id}#{number}"}, len(encoded.ids)))
    partitions = [Partition(name, tuple(pieces)) for name, pieces in pieces_of_value.items() if pieces]
    if unit_tokens is not None:
        partitions = [unit for partition in partitions for unit in partition.units(unit_tokens)]
    return {partition.name: partition for partition in partitions}


def pieces_of(row: Row, tokenizer: Any, max_tokens: int | None) -> Iterator[Row]:
    """A text row as rows of at most `max_tokens` tokens, cut between tokens; any other row as it is."""
    text = row.get("text")
    if max_tokens is None or layout(row) != "text" or not isinstance(text, str):
        yield row
        return
    text = storable(text)
    if not getattr(tokenizer, "is_fast", False):  # only fast tokenizers report where a token stands
        yield row
        return
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    added = len(encode({"text": "a"}, tokenizer).ids) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
    room, first = max(1, max_tokens - added), 0
    while first < len(spans):
        end = min(first + room, len(spans))
        while first + 1 < end < len(spans) and spans[end][0] < spans[end - 1][1]:  # both are bytes of one letter
            end -= 1
        piece = text[spans[first][0] : spans[end - 1][1]]
        first = end
        if piece.strip():
            yield row | {"text": piece}


def draw_mixture(
    partitions: Mapping[str, Partition], weights: Mapping[str, float], budget: int, *, seed: int
) -> list[Row]:
    """Rows of a mixture: each partition gives its share of the budget. The rows of several partitions are shuffled."""
    rows = [row for name, weight in weights.items() for row in partitions[name].draw(round(weight * budget), seed=seed)]
    if len(weights) > 1:
        random.Random(f"mixture {seed}").shuffle(rows)
    return rows


def by_size(partitions: Sequence[Partition]) -> dict[str, float]:
    """Each partition's share of the tokens: the mixture that the corpus itself is."""
    total = sum(partition.tokens for partition in partitions)
    return {partition.name: partition.tokens / total for partition in partitions}
