"""What a replay that was stopped needs to go on: `RUN/replay/unfinished`, removed when it is done.

    KEY.json                      how far it is: the step before which it stands, losses, drifts; checksum of the other
    KEY-00000350.safetensors      the adjoint (derivatives by weights and moments) and the scores so far

KEY is a digest of the log, the targets and the kind of replay, so that another question has other files. It is written
where a piece of the training begins, `EVERY` seconds apart at least; going on from there gives the same bits. A damaged
file is not used: the replay begins anew.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import torch
from safetensors.torch import load
from torch import Tensor

from whence.checksums import Written
from whence.errors import ChecksumError, StorageError
from whence.models.weights import in_pieces
from whence.records import Count, FastDigest, read_record
from whence.storage import Place
from whence.training.step_derivatives import Target
from whence.training.step_log import PARTS, StepLog
from whence.training.update_rules import State

logger = logging.getLogger(__name__)

FOLDER = "unfinished"
EVERY = 60.0
"""Seconds between two writings."""
_SCORES = "scores"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a replay has come."""

    step: Count
    """Steps that are still to be gone back through."""
    losses: tuple[float, ...]
    """Of the targets, at the end of the training."""
    drifts: tuple[tuple[Count, float], ...] = ()
    """See `replay.Replayed`."""
    seconds: float = 0.0
    """What it took to come so far."""
    lengths: tuple[float, ...] = ()
    """See `step_differences.DifferencedStep`; none where second derivatives are taken."""
    error: float | None = None
    """See `replay.Replayed`."""
    bytes: Count = 0
    xxh3: FastDigest = "0" * 32


@dataclass
class Unfinished:
    """The files of one replay."""

    log: StepLog
    key: str
    written: float = field(default_factory=time.monotonic)

    @staticmethod
    def of(log: StepLog, targets: Sequence[Target], *, hessian: bool, differences: bool) -> "Unfinished":
        """For some targets."""
        asked = [[[(one.encoded.ids, one.encoded.supervised, one.sign) for one in query] for query in target]
                 for target in targets]  # fmt: skip
        digest = hashlib.sha256(json.dumps([asked, hessian, hessian and differences, log.digest]).encode())
        return Unfinished(log, digest.hexdigest()[:24])

    @property
    def place(self) -> Place:
        """Where they are, in `FOLDER`."""
        return self.log.place

    @property
    def _document(self) -> str:
        return f"{FOLDER}/{self.key}.json"

    def load(self, device: torch.device | str = "cpu") -> tuple[Standing, State, Tensor] | None:
        """Where the replay stands, its adjoint and its scores; None if it has not begun, or its files are damaged."""
        if not self.place.exists(self._document):
            return None
        try:
            remedy = "The replay begins anew."
            where = self.place.path(self._document)
            standing = read_record(Standing, self.place.read(self._document), where, remedy)
            file = self._file(standing.step)
            self.place.check(file, Written(standing.bytes, None, standing.xxh3), remedy)
        except (ChecksumError, FileNotFoundError) as error:
            logger.warning("%s", error)
            return None
        logger.info("a replay goes on %d steps before its end", standing.step)
        tensors = {name: tensor.to(device) for name, tensor in load(self.place.read(file)).items()}
        scores = tensors.pop(_SCORES).cpu()
        parts = [{name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
                 for part in PARTS]  # fmt: skip
        return standing, State(*parts), scores

    def save(self, standing: Standing, adjoint: State, scores: Tensor) -> None:
        """Write where the replay stands, if it is time to; a place that cannot be written to is let be."""
        if time.monotonic() - self.written < EVERY:
            return
        tensors = {f"{part}.{name}": tensor for part, found in zip(PARTS, adjoint, strict=True)
                   for name, tensor in found.items()} | {_SCORES: scores}  # fmt: skip
        described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        pieces, total = in_pieces(described, lambda name: tensors[name].cpu())
        try:
            done = self.place.write(self._file(standing.step), pieces, total=total)
            document = asdict(standing) | {"bytes": done.bytes, "xxh3": done.xxh3}
            self.place.write_document(self._document, document)
            self._remove(but=(self._file(standing.step), self._document))
        except StorageError as error:
            logger.warning("%s: a replay that is stopped will begin anew", error)
        self.written = time.monotonic()

    def remove(self) -> None:
        """Remove them: the replay is done."""
        self._remove()

    def _remove(self, but: Sequence[str] = ()) -> None:
        for name in self.place.names():
            if name.startswith(f"{FOLDER}/{self.key}") and name not in but:
                with suppress(FileNotFoundError):  # another process asks the same
                    self.place.remove(name)

    def _file(self, step: int) -> str:
        return f"{FOLDER}/{self.key}-{step:08d}.safetensors"
