"""The rows of a training, tokenised into memory, as the Trainer reads them."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Set
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from whence.corpus.reading import Corpus, Example
from whence.corpus.tokens import Encoded, encode
from whence.corpus.unsupervised import reason
from whence.errors import CorpusError
from whence.models.loading import LoadedModel
from whence.numerics import mixed_seed
from whence.training.recipe import TrainSettings


class Rows(Dataset):
    """Encoded rows as the Trainer reads them, each with its number, without those that have no supervised token."""

    def __init__(self, rows: Iterable[tuple[int, Example, Encoded]], by: str | None = None):
        self.places: list[int] = []  # in the corpus, from 0
        self.rows: list[dict[str, np.ndarray]] = []
        self.ids: list[str] = []
        self.sources: list[str | None] = []
        self.domains: list[Any] = []
        for place, example, row in rows:
            if row.supervised_count:
                self.places.append(place)
                self.rows.append({"input_ids": np.array(row.ids, np.int32), "supervised": np.array(row.supervised)})
                self.ids.append(example.id)
                self.sources.append(example.source)
                self.domains.append(None if by is None else example.row.get(by))

    def without(self, left_out: Set[int]) -> "Rows":
        """The other rows in their order, as a corpus of them would give; their numbers begin at 0 again."""
        kept, rest = [number for number in range(len(self)) if number not in left_out], Rows(())
        rest.rows, rest.ids = [self.rows[number] for number in kept], [self.ids[number] for number in kept]
        rest.sources = [self.sources[number] for number in kept]
        rest.places = [self.places[number] for number in kept]
        rest.domains = [self.domains[number] for number in kept]
        return rest

    def record(self) -> dict[str, Any]:
        """Entries of the run's record that identify these rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row["input_ids"].tobytes() + row["supervised"].tobytes() + b"/")
        return {"rows": len(self.rows), "rows_digest": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[number] | {"row": number}


def training_rows(corpus: Corpus, loaded: LoadedModel, settings: TrainSettings) -> Rows:
    """The rows of a corpus, or of the share of it that is asked for.

    Raises:
        CorpusError: None has a supervised token.
    """
    rows = encoded_rows(corpus, loaded, settings, _sampled(corpus, settings))
    if not len(rows):
        why = reason(next(iter(corpus)).row, loaded.tokenizer, longest_row(loaded, settings))
        raise CorpusError(
            f"{corpus.name}: no row has a supervised token, so there is nothing to train on: the first ones {why}."
        )
    return rows


def longest_row(loaded: LoadedModel, settings: TrainSettings) -> int | None:
    """Most tokens of a row."""
    return min((limit for limit in (settings.max_tokens, loaded.context) if limit), default=None)


def encoded_rows(
    corpus: Corpus, loaded: LoadedModel, settings: TrainSettings, chosen: Iterable[tuple[int, Example]] | None = None
) -> Rows:
    """All rows of a corpus, or some of it with their places in it."""
    longest = longest_row(loaded, settings)
    by = None if settings.mix is None else settings.by or "source"
    examples = enumerate(corpus) if chosen is None else chosen
    return Rows(((place, each, encode(each.row, loaded.tokenizer, longest)) for place, each in examples), by)


def _sampled(corpus: Corpus, settings: TrainSettings) -> Iterator[tuple[int, Example]]:
    if settings.fraction == 1:
        return iter(enumerate(corpus))
    total = sum(1 for _ in corpus)
    rng = random.Random(mixed_seed(settings.seed, "train", "fraction"))
    chosen = set(rng.sample(range(total), max(1, round(settings.fraction * total))))
    return ((number, example) for number, example in enumerate(corpus) if number in chosen)
