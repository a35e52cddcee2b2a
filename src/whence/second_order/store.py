"""Curvature on disk: what `whence curvature` measured of some rows under a model.

    DIRECTORY/curvature.json            what it is of, how far it is, and the checksums of the others
    DIRECTORY/sums-00001024.safetensors unfinished: K-FAC's sums over so many rows, or EK-FAC's; replaced as they grow
    DIRECTORY/bases.safetensors         eigenbases and eigenvalues of K-FAC's factors, of each layer
    DIRECTORY/eigenvalues.safetensors   EK-FAC's eigenvalues, of each layer, unless K-FAC alone was asked for

Each file is whole before the document names it, and an old one is removed after that, so that a stop loses the rows
since the last writing and nothing else.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from whence.checksums import Written
from whence.counts import number_of
from whence.errors import (
    FormatVersionError,
    ManifestMismatchError,
    MissingCurvatureError,
    SettingError,
    UnknownNameError,
)
from whence.local_files import TEMPORARY
from whence.models.weights import in_pieces
from whence.records import Count, read_record, unlike_written
from whence.second_order.eigen import Curvature, LayerCurvature
from whence.second_order.factors import Factors
from whence.storage import FileEntry, Place

DOCUMENT, BASES, EIGENVALUES = "curvature.json", "bases.safetensors", "eigenvalues.safetensors"
FORMAT_VERSION = 1
REMEDY = "Measure it again: the same `whence curvature` command with --restart."
Kind = Literal["ekfac", "kfac"]
Stage = Literal["factors", "eigenvalues", "complete"]


def kind_of(name: str) -> Kind:
    """A kind of curvature by its name.

    Raises:
        UnknownNameError: There is none of it; the message lists those there are.
    """
    for kind in get_args(Kind):
        if name == kind:
            return kind
    raise UnknownNameError(f"--kind {name}: there is no such kind. Known: {', '.join(get_args(Kind))}")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What curvature is of; a measurement that goes on must agree on all of it."""

    kind: Kind
    """EK-FAC's eigenvalues, or K-FAC's alone."""
    seed: Count
    """Of the answers that the model draws, and of the rows where not all are taken."""
    is_empirical: bool
    """Whether the rows' own answers were taken in place of drawn ones."""
    model: str
    """Directory or Hub name of the model."""
    model_digest: str
    """Of its weights and configuration."""
    index: str
    """Directory of the index whose rows were measured."""
    corpora: tuple[str, ...]
    """Digests of the rows' files, as its manifest has them."""
    rows: Count
    """Rows that are measured."""
    of_rows: Count
    """Rows of the index that can be ranked."""
    layers: tuple[str, ...]
    """Names of the layers, which are all that scores read."""
    reading: Mapping[str, Any]
    """Settings of the index that say what its rows' tokens are, and how its model is loaded."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of `curvature.json`."""

    format_version: int = FORMAT_VERSION
    measured: Measured
    stage: Stage = "factors"
    """What is being measured."""
    done: Count = 0
    """Rows that the unfinished sums of the stage hold."""
    positions: Mapping[str, Count] = field(default_factory=dict)
    """Positions with a slope, by layer: of the sums of the first stage."""
    seconds: float = 0.0
    """What it took so far, on the clock."""
    files: tuple[FileEntry, ...] = ()


@dataclass
class CurvatureStore:
    """A directory with curvature, complete or begun. Open a complete one with `open_curvature`."""

    place: Place
    description: Description

    def __repr__(self) -> str:
        """Where it is, and of what."""
        measured = self.measured
        return f"CurvatureStore({self.place.root}, {measured.kind} of {number_of(measured.rows, 'row')})"

    @property
    def measured(self) -> Measured:
        """What it is of."""
        return self.description.measured

    @property
    def is_complete(self) -> bool:
        """Whether all of it was measured."""
        return self.description.stage == "complete"

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(entry["bytes"] for entry in self.description.files)

    @staticmethod
    def begin(out: str | Path, measured: Measured, *, restart: bool) -> "CurvatureStore":
        """Begin a measurement in a directory, or go on with what is there.

        Raises:
            ManifestMismatchError: There is another one; what differs is named.
            SettingError: The directory holds something else.
        """
        place = Place.at(out)
        if restart or not place.exists(DOCUMENT):
            _refuse_others(place)
            store = CurvatureStore(place, Description(measured=measured))
            store.write_description()
            store.remove_leftovers()
            return store
        store = CurvatureStore(place, read_description(place))
        check_same(store.measured, measured, place.root)
        store.remove_leftovers()
        return store

    # -- writing

    def save_factors(self, factors: Mapping[str, Factors], done: int, seconds: float) -> None:
        """Write K-FAC's sums over the first rows."""
        tensors = {}
        for name, layer in factors.items():
            tensors |= {f"{name}|inputs": layer.inputs, f"{name}|slopes": layer.slopes}
        positions = {name: layer.positions for name, layer in factors.items()}
        self._write(_sums_file(done), tensors, done=done, positions=positions, seconds=seconds)

    def save_kfac(self, curvature: Curvature, seconds: float) -> None:
        """Write K-FAC's curvature in place of its sums."""
        tensors = {}
        for name, layer in curvature.items():
            tensors |= {f"{name}|inputs": layer.inputs, f"{name}|slopes": layer.slopes,
                        f"{name}|eigenvalues": layer.eigenvalues}  # fmt: skip
        stage: Stage = "complete" if self.measured.kind == "kfac" else "eigenvalues"
        self._write(BASES, tensors, stage=stage, done=0, seconds=seconds)

    def save_squares(self, squares: Mapping[str, Tensor], done: int, seconds: float) -> None:
        """Write EK-FAC's sums over the first rows."""
        self._write(_sums_file(done), squares, keep=(BASES,), done=done, seconds=seconds)

    def save_eigenvalues(self, eigenvalues: Mapping[str, Tensor], seconds: float) -> None:
        """Write EK-FAC's eigenvalues in place of their sums: the measurement is complete."""
        self._write(EIGENVALUES, eigenvalues, keep=(BASES,), stage="complete", done=0, seconds=seconds)

    def _write(self, file: str, tensors: Mapping[str, Tensor], *, keep: Sequence[str] = (), **changes: Any) -> None:
        described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        pieces, total = in_pieces(described, lambda name: tensors[name].cpu())
        written = self.place.write(file, pieces, total=total)
        assert written.xxh3 is not None
        kept = tuple(entry for entry in self.description.files if entry["file"] in keep)
        entry = FileEntry(file=file, bytes=written.bytes, xxh3=written.xxh3)
        self.description = replace(self.description, files=(*kept, entry), **changes)
        self.write_description()
        self.remove_leftovers()

    def write_description(self) -> None:
        """Write `curvature.json`, whole or not at all."""
        self.place.write_document(DOCUMENT, asdict(self.description))

    def remove_leftovers(self) -> None:
        """Remove files of a measurement that the document does not name; others are nobody's here."""
        named = {DOCUMENT, *(entry["file"] for entry in self.description.files)}
        for name in self.place.names():
            if name not in named and _is_own(name):
                with suppress(FileNotFoundError):
                    self.place.remove(name)

    # -- reading

    def factors(self, device: torch.device) -> dict[str, Factors]:
        """K-FAC's sums as far as they are."""
        positions = self.description.positions
        stored = self._read(_sums_file(self.description.done), device)
        return {name: Factors(stored[f"{name}|inputs"], stored[f"{name}|slopes"], positions[name],
                              self.description.done) for name in self.measured.layers}  # fmt: skip

    def squares(self, device: torch.device) -> dict[str, Tensor]:
        """EK-FAC's sums as far as they are."""
        return self._read(_sums_file(self.description.done), device)

    def curvature(self, kind: Kind | None = None, device: torch.device | str = "cpu") -> Curvature:
        """Curvature by layer; None: as it was measured.

        Raises:
            SettingError: EK-FAC is asked for where K-FAC alone was measured.
            ChecksumError: A file is damaged.
        """
        kind = kind or self.measured.kind
        if kind == "ekfac" and self.measured.kind == "kfac":
            raise SettingError(
                f"{self.place.root}: K-FAC alone was measured there. Leave kind=ekfac out, or measure: whence "
                f"curvature {shlex.quote(self.measured.index)} -o ANOTHER"
            )
        sides = self._read(BASES, device, ("inputs", "slopes"))
        values = self.eigenvalues(kind, device)
        return {name: LayerCurvature(sides[f"{name}|inputs"], sides[f"{name}|slopes"], values[name])
                for name in self.measured.layers}  # fmt: skip

    def eigenvalues(self, kind: Kind | None = None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Eigenvalues by layer alone; None: as it was measured. EK-FAC's are K-FAC's until they are complete."""
        kind = kind or self.measured.kind
        if kind == "ekfac" and self.is_complete:
            return self._read(EIGENVALUES, device)
        values = self._read(BASES, device, ("eigenvalues",))
        return {name: values[f"{name}|eigenvalues"] for name in self.measured.layers}

    def _read(self, file: str, device: torch.device | str, parts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tensors of a file, or those whose names end with one of some parts.

        Raises:
            ChecksumError: It is damaged, or not named.
        """
        entry = next((entry for entry in self.description.files if entry["file"] == file), None)
        if entry is None:
            raise unlike_written(self.place.path(DOCUMENT), f"it does not name {file}", REMEDY)
        written = Written(entry["bytes"], None, entry["xxh3"])
        if not self.place.is_local:
            read = load(self.place.read_checked(file, written, REMEDY))
            return {name: tensor.to(device) for name, tensor in read.items() if _is_of(name, parts)}
        self.place.check(file, written, REMEDY)
        with safe_open(self.place.path(file), "pt", device=str(device)) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if _is_of(name, parts)}  # noqa: SIM118


def open_curvature(path: str | Path) -> CurvatureStore:
    """Open curvature that is complete.

    Raises:
        MissingCurvatureError: There is none, or it was stopped.
        FormatVersionError: A newer Whence wrote it.
        ChecksumError: Its document is damaged.
    """
    place = Place.at(path)
    if not place.exists(DOCUMENT):
        raise MissingCurvatureError.at(place.root)
    store = CurvatureStore(place, read_description(place))
    if not store.is_complete:
        index, out = (shlex.quote(text) for text in (store.measured.index, place.root))
        raise MissingCurvatureError(
            f"{place.root}: curvature that was stopped before it was complete. Go on: whence curvature {index} -o {out}"
        )
    return store


class _Format(TypedDict):
    format_version: int


def read_description(place: Place) -> Description:
    """The content of `curvature.json`; for errors see `open_curvature`."""
    data, where = place.read(DOCUMENT), place.path(DOCUMENT)
    version = read_record(_Format, data, where, REMEDY)["format_version"]
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{where}: format {version}, and this version of Whence reads {FORMAT_VERSION}: install the version that "
            "wrote it"
        )
    return read_record(Description, data, where, REMEDY)


def check_same(begun: Measured, asked: Measured, where: str) -> None:
    """Refuse to go on with a measurement of something else.

    Raises:
        ManifestMismatchError: What differs is named.
    """
    then, now = asdict(begun), asdict(asked)
    for name in ("kind", "seed", "is_empirical", "model_digest", "corpora", "rows", "layers", "reading"):
        if then[name] != now[name]:
            then[name], now[name] = _where_they_part(then[name], now[name])
            raise ManifestMismatchError(
                f"{where}: begun with another {name.replace('_', ' ')} (there {_short(then[name])}, here "
                f"{_short(now[name])}). Give another directory, or begin anew with --restart"
            )


def _where_they_part(one: Any, other: Any) -> tuple[Any, Any]:
    """The first entries of two lists or dictionaries that differ, or the two values."""
    if isinstance(one, Mapping):
        return next(({name: one[name]}, {name: other.get(name)}) for name in one if one[name] != other.get(name))
    if isinstance(one, Sequence) and not isinstance(one, str) and len(one) == len(other):
        return next((a, b) for a, b in zip(one, other, strict=True) if a != b)
    return one, other


def _sums_file(done: int) -> str:
    return f"sums-{done:08d}.safetensors"


def _refuse_others(place: Place) -> None:
    others = [name for name in place.names() if not _is_own(name)]
    if others:
        raise SettingError(
            f"{place.root} is not empty and not curvature's alone ({others[0]} is there). Nothing was changed; move "
            "that away, or give the curvature a directory of its own"
        )


def _is_of(name: str, parts: Sequence[str] | None) -> bool:
    return parts is None or name.rpartition("|")[2] in parts


def _is_own(name: str) -> bool:
    """Whether a measurement writes a file of this name, whole or as a draft."""
    return _OWN.fullmatch(name.removesuffix(TEMPORARY)) is not None


_OWN = re.compile(r"curvature\.json|(bases|eigenvalues|sums-[0-9]{8,})\.safetensors")
"""Names of the files that a measurement writes."""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
