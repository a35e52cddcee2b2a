"""Losses of a model on evaluation sets, row by row, so that a mean over rows has an interval.

A set is a corpus. Texts longer than the model's context, or than a given length, are read in windows that do not
overlap; each window's first token is predicted from the tokenizer's initial token, or not at all, and only the last
window is closed by an end of sequence. Sums over tokens:

    perplexity      exp(sum of nats / tokens)
    bits per byte   sum of nats / (ln 2 * bytes of the supervised text), the same for any tokenizer

Losses are stored by the content of a model's weights and a set's rows, so that nothing is measured twice. Those that an
older Whence stored carry no checksum, and may be of weights that were damaged: they are measured again.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from whence.brief import brief
from whence.checksums import is_sealed
from whence.corpus.layouts import Row
from whence.corpus.partitions import pieces_of
from whence.corpus.reading import open_corpus, row_json
from whence.corpus.tokens import Encoded, encode, supervised_bytes
from whence.errors import ChecksumError, CorpusError, ModelError, SettingError
from whence.gradients.forward_passes import losses
from whence.models.loading import LoadedModel
from whence.numerics import bootstrap_interval
from whence.paths import is_directory, require_readable
from whence.records import Count, read_record, unlike_written
from whence.storage import AGAIN, Place


@dataclass(frozen=True)
class EvalSet:
    """An evaluation set: held-out rows with a name."""

    __repr__ = brief

    name: str
    rows: tuple[Row, ...]

    @property
    def digest(self) -> str:
        """Digest of the rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row_json(row).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Losses:
    """Losses of one model on one set, by row."""

    __repr__ = brief

    nats: Float64[Tensor, " n"]
    """Sum over the row's supervised tokens."""
    tokens: Int64[Tensor, " n"]
    bytes: Int64[Tensor, " n"]

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Exp of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the supervised text."""
        return float(self.nats.sum() / (math.log(2) * self.bytes.sum().clamp(min=1)))

    def interval(self, *, seed: int = 0) -> tuple[float, float]:
        """95% interval of the loss, bootstrapped over rows."""
        pairs = torch.stack([self.nats, self.tokens.double()], 1)[self.tokens > 0]
        if len(pairs) < 2:
            return self.loss, self.loss
        return bootstrap_interval(pairs, seed=seed, resamples=1000, statistic=_losses)


def _losses(pairs: Float64[Tensor, "r n 2"]) -> Float64[Tensor, " r"]:
    """Nats a token of r resamples of rows, of which each has its nats and its tokens."""
    nats, tokens = pairs.sum(1).T
    return nats / tokens


def read_sets(paths: Iterable[str | Path]) -> list[EvalSet]:
    """Evaluation sets from files, each named after its file; a directory's files are one set each.

    Raises:
        CorpusError: A file cannot be read or has no row.
        SettingError: Two sets have one name.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if is_directory(path):
            require_readable(path, ())
        files += sorted(path.iterdir()) if is_directory(path) else [path]
    sets: list[EvalSet] = []
    for file in files:
        name = file.name.partition(".")[0]
        if name in (known.name for known in sets):
            raise SettingError(f"--eval {file}: there is a set {name} already; sets are named after their files")
        sets.append(EvalSet(name, tuple(example.row for example in open_corpus(file))))
    if not sets:
        raise SettingError("--eval: one file of held-out rows or more is expected")
    return sets


def measure(
    model: LoadedModel, evaluated: EvalSet, *, max_tokens: int | None = None, tokens_per_batch: int = 4096
) -> Losses:
    """Losses of a model on a set.

    Raises:
        CorpusError: No row has a supervised token.
        ModelError: A row's loss is not finite.
    """
    longest = min((limit for limit in (max_tokens, model.context) if limit), default=None)
    pieces, encoded = [], []
    for number, row in enumerate(evaluated.rows):
        windows = list(pieces_of(row, model.tokenizer, longest))
        tokens = [encode(window, model.tokenizer, longest) for window in windows]
        pieces += [(number, window) for window in windows]
        encoded += [_open_ended(window) for window in tokens[:-1]] + tokens[-1:]
    counts = torch.tensor([row.supervised_count for row in encoded])
    if not int(counts.sum()):
        raise CorpusError(f"the evaluation set {evaluated.name} has no text: none of its rows has a token to predict")
    nats = torch.zeros(len(pieces), dtype=torch.float64)
    for numbers, means in losses(model, encoded, tokens_per_batch):
        supervised = counts[numbers]
        nats[numbers] = torch.where(supervised > 0, means.double() * supervised, 0.0)
    if not nats.isfinite().all():
        raise ModelError(
            f"{evaluated.name}: a model has no finite loss there, since its weights are too large or no numbers. Take "
            "a --scale that is nearer to 1, or train the pool again at a lower --lr"
        )
    owners = torch.tensor([number for number, _ in pieces])
    sizes = torch.tensor([supervised_bytes(piece, model.tokenizer) for _, piece in pieces])
    n = len(evaluated.rows)
    return Losses(
        torch.zeros(n, dtype=torch.float64).index_add_(0, owners, nats),
        torch.zeros(n, dtype=torch.int64).index_add_(0, owners, counts),
        torch.zeros(n, dtype=torch.int64).index_add_(0, owners, sizes),
    )


def _open_ended(encoded: Encoded) -> Encoded:
    """A window that goes on, without the token that would close it."""
    return Encoded(encoded.ids[:-1], encoded.supervised[:-1])


def content_name(key: Sequence[object]) -> str:
    """File name of a key's content."""
    return hashlib.sha256(json.dumps(list(key), sort_keys=True, default=str).encode()).hexdigest()[:32]


class _StoredLosses(TypedDict):
    """Losses as JSON, an entry a row."""

    key: list[Any]
    nats: list[float]
    tokens: list[Count]
    bytes: list[Count]


def _losses_from(stored: _StoredLosses, where: str) -> Losses:
    lengths = [len(stored["nats"]), len(stored["tokens"]), len(stored["bytes"])]
    if len({*lengths}) > 1 or not any(stored["tokens"]):
        what = f"its lists of nats, tokens and bytes have {', '.join(map(str, lengths))} entries"
        raise unlike_written(where, what, AGAIN)
    if not all(map(math.isfinite, stored["nats"])):
        raise unlike_written(where, "a row's nats are not finite", AGAIN)
    tokens, sizes = (torch.tensor(stored[name], dtype=torch.int64) for name in ("tokens", "bytes"))
    return Losses(torch.tensor(stored["nats"], dtype=torch.float64), tokens, sizes)


def stored_losses(place: Place, key: Sequence[object], compute: Callable[[], Losses]) -> Losses:
    """Losses stored under a key, which has all that they depend on; computed and stored if they are not there.

    Raises:
        ChecksumError: The file is damaged, or is the file of another key.
    """
    name, known = f"{content_name(key)}.json", json.loads(json.dumps(list(key), default=str))
    if place.exists(name) and is_sealed(data := place.read(name)):
        stored = read_record(_StoredLosses, data, place.path(name), AGAIN)
        if stored["key"] != known:
            raise ChecksumError(f"{place.path(name)} holds the losses of another model or set. {AGAIN}")
        return _losses_from(stored, place.path(name))
    computed = compute()
    columns = {"nats": computed.nats.tolist(), "tokens": computed.tokens.tolist(), "bytes": computed.bytes.tolist()}
    place.write_document(name, {"key": known, **columns})
    return computed
