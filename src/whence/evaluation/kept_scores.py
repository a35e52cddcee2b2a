"""Scores that a bank keeps, so that no method scores the same rows for the same queries twice.

    BANK/scores/KEY.json             method, what it took, where it comes from; checksum of the other
    BANK/scores/KEY.safetensors      `scores` [q n], float32

KEY is a digest of all that scores depend on: the method with its options, what it reads (an index' manifest, the log of
a run, or the rows, with the weights of the model), the queries, the rows, the seed and the version of Whence. So an
evaluation that is stopped goes on with the method that it was at, and removal takes what the linear datamodeling score
was worked out from. A damaged file is not used. A bank that cannot be written to is graded all the same, and keeps
nothing.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from whence import __version__, catalogue
from whence.checksums import Written
from whence.corpus.layouts import Row
from whence.corpus.reading import row_json
from whence.errors import ChecksumError, StorageError
from whence.indexing.ingest import fingerprint_of
from whence.indexing.manifest import MANIFEST
from whence.models.loading import directory_digest
from whence.models.weights import in_pieces
from whence.records import Count, FastDigest, read_record
from whence.second_order.store import DOCUMENT
from whence.selection.views import CorpusView, IndexView
from whence.storage import Place

logger = logging.getLogger(__name__)

FOLDER = "scores"
REMEDY = "The method scores anew."


@dataclass(frozen=True, kw_only=True)
class KeptRecord:
    """What stands beside a method's scores."""

    method: str
    seconds: float
    """What scoring took, on the clock."""
    file: str
    bytes: Count
    xxh3: FastDigest


@dataclass(frozen=True)
class KeptScores:
    """The scores that are kept in a place for some queries and rows."""

    place: Place
    queries: Sequence[Row]
    row_ids: Sequence[str]
    max_tokens: int | None = None
    """Where longer queries are cut."""
    _digests: dict[tuple[int, bool], list[Any]] = field(default_factory=dict, init=False, repr=False)
    """Of what was read, by view and whether its model was."""

    def load(self, key: str) -> tuple[torch.Tensor, float] | None:
        """Scores [q n], larger is more helpful, and their seconds; None if there are none, or they are damaged."""
        document = f"{FOLDER}/{key}.json"
        if not self.place.exists(document):
            return None
        try:
            record = read_record(KeptRecord, self.place.read(document), self.place.path(document), REMEDY)
            file = f"{FOLDER}/{key}.safetensors"
            data = self.place.read_checked(file, Written(record.bytes, None, record.xxh3), REMEDY)
            scores = load(data)["scores"]
        except (ChecksumError, FileNotFoundError) as error:
            logger.warning("%s", error)
            return None
        return scores, record.seconds

    def save(self, key: str, method: str, scores: torch.Tensor, seconds: float) -> None:
        """Keep a method's scores, if the place can be written to."""
        tensor = scores.float().contiguous().cpu()
        pieces, total = in_pieces({"scores": (tensor.dtype, tuple(tensor.shape))}, lambda name: tensor)
        file = f"{key}.safetensors"
        try:
            done = self.place.write(f"{FOLDER}/{file}", pieces, total=total)
            assert done.xxh3 is not None
            record = KeptRecord(method=method, seconds=seconds, file=file, bytes=done.bytes, xxh3=done.xxh3)
            self.place.write_document(f"{FOLDER}/{key}.json", asdict(record))
        except StorageError as error:
            logger.warning("%s: its scores are not kept", error)

    def key(self, method: str, options: dict[str, str], view: IndexView | CorpusView, seed: int) -> str:
        """Digest of what a method's scores depend on.

        Args:
            method: Its name in the catalogue.
            options: Its options; one that names a directory counts by the model or the curvature there.
            view: What it reads.
            seed: The seed, also of a method that draws nothing.
        """
        values = {name: _content(value) for name, value in options.items()}
        reads_model = catalogue.graded_entry(method).needs_model
        read = (id(view), reads_model)
        if read not in self._digests:  # weights are read through for it
            self._digests[read] = _read_by(view, reads_model)
        parts = [__version__, method, values, seed, self._digests[read], self._asked]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]

    @cached_property
    def _asked(self) -> list[Any]:
        digest = hashlib.sha256()
        for query in self.queries:
            digest.update(row_json(query).encode())
        return [digest.hexdigest(), hashlib.sha256(json.dumps([*self.row_ids]).encode()).hexdigest(), self.max_tokens]


def _content(value: str) -> str:
    """An option's value; of a directory, what is in it."""
    if (document := Path(value) / DOCUMENT).is_file():
        return hashlib.sha256(document.read_bytes()).hexdigest()
    return directory_digest(value) if Path(value).is_dir() else value


def _read_by(view: IndexView | CorpusView, reads_model: bool) -> list[Any]:
    """Digests of what a method reads."""
    if isinstance(view, IndexView):
        return [hashlib.sha256(view.index.store.place.read(MANIFEST)).hexdigest()]
    run = getattr(view, "run", None)  # of a `run_view.RunView`, whose import would bring the Trainer
    if run is not None:
        return [run.log.digest]
    loaded = view.loaded
    weights = directory_digest(loaded.path) if loaded is not None and reads_model else None
    return [fingerprint_of(view.corpus).digest, weights, view.max_tokens]
