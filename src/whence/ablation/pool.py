"""A pool on disk: one model for each partition of a corpus, all trained alike from one parent.

    POOL/pool.json                          parent, recipe, and of every member its partition, tokens and checksum
    POOL/members/000.safetensors            a member, by its number

A member is stored as its delta theta_u - theta_0 in bfloat16, half the size, exact to 2^-9 of every entry's move; or as
its weights theta_u in float32; or, trained as a LoRA, as the adapter's factors. What "the member" is, is what is
stored: theta_0 + its delta. Tensors are read one at a time, in fp32.

Members average well only near one another: of another parent, architecture, tokenizer or recipe they are refused, and
the difference is named. A partition joins a pool later without the others being trained again.

Source: Na et al. 2024, https://arxiv.org/abs/2410.15661.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from whence.errors import ChecksumError, FormatVersionError, ManifestMismatchError, MissingIndexError, ModelError
from whence.models.loading import adapter_config, directory_digest, located
from whence.models.pairing import Adapter, adapter_of, weights_by_name
from whence.models.weights import Described, Weights, in_pieces
from whence.storage import Place

MANIFEST = "pool.json"
FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One partition's model."""

    partition: str
    file: str
    sha256: str
    bytes: int
    kind: str
    """What the file holds: "delta" in bfloat16, "weights" in float32, or "lora", factors in float32."""
    tokens: int
    """Trained on, with repetitions."""
    rows: int
    """Of the partition."""
    loss: float | None = None
    """The last that its training logged."""
    size: int | None = None
    """Tokens of the partition, read once."""
    digest: str | None = None
    """Of the partition's rows."""


@dataclass(frozen=True)
class Pool:
    """A parent and its members. Open one with `open_pool`."""

    place: Place
    parent: str
    """Directory of theta_0."""
    parent_digest: str
    recipe: Mapping[str, Any]
    """How every member was trained: tokens, steps, rate, schedule, seed and so on."""
    members: Mapping[str, Member] = field(default_factory=dict)
    """By partition."""
    corpus: str | None = None
    """That the last members were trained on, where it has an address."""
    words: str | None = None
    """Digest of the parent's tokenizer."""

    @property
    def partitions(self) -> list[str]:
        """Names, in the order in which they joined."""
        return list(self.members)

    def has(self, partition: str) -> bool:
        """There is such a member, and its file."""
        return partition in self.members and self.place.exists(self.members[partition].file)

    def start(self) -> Weights:
        """theta_0's tensors by their names in its files, a tied head once."""
        return weights_by_name(self.parent)

    def member(self, partition: str) -> "MemberWeights":
        """A member's tensors.

        Raises:
            ModelError: There is no such partition.
        """
        if partition not in self.members:
            raise ModelError(f"{self.place.root}: no partition {partition!r}; it has {', '.join(self.members)}")
        return MemberWeights(self.members[partition], Path(self.place.path(self.members[partition].file)), self.start())

    def verify(self, partitions: Iterable[str] | None = None) -> None:
        """Read members' files again: all, or those of some partitions.

        Raises:
            ChecksumError: One is not as it was written.
        """
        for partition in self.members if partitions is None else partitions:
            member = self.members[partition]
            if not self.place.exists(member.file) or self.place.digest(member.file) != member.sha256:
                raise ChecksumError(
                    f"{self.place.path(member.file)}: not what was written for the partition {partition!r}. Remove the "
                    "file; `whence pool train` trains that member again."
                )

    def with_member(
        self,
        partition: str,
        directory: str | Path,
        *,
        dtype: str,
        tokens: int,
        rows: int,
        loss: float | None = None,
        size: int | None = None,
        digest: str | None = None,
    ) -> "Pool":
        """The same with another member, stored and listed.

        Args:
            partition: Its name; one that is there is replaced.
            directory: Of the trained model or adapter.
            dtype: Name in `DTYPES`, of a full model.
            tokens: It was trained on.
            rows: Of its partition.
            loss: The last of its training.
            size: Tokens of its partition.
            digest: Of its partition's rows.

        Raises:
            ModelError: It is of another architecture or parent.
        """
        known = self.members.get(partition)
        name = known.file if known else f"members/{len(self.members):03d}.safetensors"
        kind, described, read = _stored(located(directory), self.start(), self.parent, dtype)
        pieces, total = in_pieces(described, read)
        written = self.place.write(name, pieces, total=total)
        member = Member(partition=partition, file=name, sha256=written.sha256, bytes=written.bytes, kind=kind,
                        tokens=tokens, rows=rows, loss=loss, size=size, digest=digest)  # fmt: skip
        made = replace(self, members={**self.members, partition: member})
        made.write()
        return made

    def write(self) -> None:
        """The manifest, whole or not at all."""
        document = {
            "format_version": FORMAT_VERSION,
            "parent": self.parent,
            "parent_digest": self.parent_digest,
            "recipe": dict(self.recipe),
            "corpus": self.corpus,
            "tokenizer_digest": self.words,
            "members": [asdict(member) for member in self.members.values()],
        }
        data = (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
        self.place.write(MANIFEST, [data], total=len(data))


@dataclass(frozen=True)
class MemberWeights:
    """A member's tensors, read when asked for."""

    member: Member
    file: Path
    start: Weights

    def read(self, name: str, parent: Float32[Tensor, "..."]) -> Float32[Tensor, "..."] | None:
        """theta_u of a parameter, given theta_0's; None where it is the parent's own."""
        with safetensors.safe_open(self.file, framework="pt") as opened:
            if self.member.kind == "lora":
                left, right = f"{name}:left", f"{name}:right"
                if left not in opened.keys():  # noqa: SIM118
                    return None
                return parent + opened.get_tensor(left) @ opened.get_tensor(right)
            if name not in opened.keys():  # noqa: SIM118
                return None
            stored = opened.get_tensor(name)
        return stored if self.member.kind == "weights" else parent + stored.float()


def open_pool(path: str | Path) -> Pool:
    """A pool and the parent that it remembers.

    Raises:
        MissingIndexError: There is none.
        FormatVersionError: It is of a newer format.
        ModelError: Its parent is not where it was.
        ManifestMismatchError: Other weights are there.
    """
    pool = _read(path)
    remedy = (
        f"Say where it is: whence pool train PARENT {pool.corpus or 'CORPUS'} -o {path}, no member is trained again."
    )
    if not Path(pool.parent).is_dir():
        raise ModelError(f"{path}: its parent is not at {pool.parent} any more. {remedy}")
    if directory_digest(pool.parent) != pool.parent_digest:
        raise ManifestMismatchError(f"{path}: the weights at {pool.parent} are not its parent's any more. {remedy}")
    return pool


def _read(path: str | Path) -> Pool:
    """A pool as it was written, wherever its parent is by now."""
    place = Place.at(path)
    if not place.exists(MANIFEST):
        raise MissingIndexError(
            f"{path}: no pool here (no {MANIFEST}). Make one: whence pool train PARENT CORPUS -o {path}"
        )
    document = json.loads(place.read(MANIFEST))
    if document["format_version"] != FORMAT_VERSION:
        raise FormatVersionError(
            f"{place.path(MANIFEST)}: format {document['format_version']}, and this version of Whence reads "
            f"{FORMAT_VERSION}: install the version that wrote it"
        )
    members = {entry["partition"]: Member(**entry) for entry in document["members"]}
    return Pool(place, document["parent"], document["parent_digest"], document["recipe"], members, document["corpus"],
                document.get("tokenizer_digest"))  # fmt: skip


def begin_pool(
    path: str | Path,
    parent: str | Path,
    recipe: Mapping[str, Any],
    *,
    corpus: str | None = None,
    words: str | None = None,
) -> Pool:
    """A pool of this parent and recipe: the one that is there, or a new one without members.

    Raises:
        ManifestMismatchError: The one that is there is of another parent, tokenizer or recipe; the difference is named.
    """
    place, start = Place.at(path), str(Path(located(parent)).resolve())
    digest = directory_digest(start)
    if not place.exists(MANIFEST):
        made = Pool(place, start, digest, json.loads(json.dumps(dict(recipe))), {}, corpus, words)
        made.write()
        return made
    found = _read(path)
    if found.parent_digest != digest:
        raise ManifestMismatchError(
            f"{path}: its members come from {found.parent}, whose weights are not those of {start}. Means of models "
            "from different parents are no models: name another pool."
        )
    if words is not None and found.words not in (None, words):
        raise ManifestMismatchError(
            f"{path}: its members were trained with another tokenizer than the one at {start}: name another pool."
        )
    wanted = json.loads(json.dumps(dict(recipe)))
    for name in sorted({*wanted, *found.recipe}):
        if wanted.get(name) != found.recipe.get(name):
            raise ManifestMismatchError(
                f"{path}: its members were trained with {name} {found.recipe.get(name)!r}, not {wanted.get(name)!r}. "
                "Give the same, or name another pool."
            )
    return replace(found, parent=start, corpus=corpus or found.corpus, words=words or found.words)


def _stored(
    directory: str, start: Weights, parent: str, dtype: str
) -> tuple[str, Described, Callable[[str], Float[Tensor, "..."]]]:
    """Kind of a trained model, what is kept of it, and how to read that, a tensor at a time."""
    if config := adapter_config(directory):
        own = located(config["base_model_name_or_path"])
        if directory_digest(own) != directory_digest(parent):
            raise ModelError(f"{directory}: an adapter of {own}, not of the pool's parent {parent}")
        factors = dict(_factors(adapter_of(directory, config), start, turned=bool(config.get("fan_in_fan_out"))))
        described = {name: (factor.dtype, tuple(factor.shape)) for name, factor in factors.items()}
        return "lora", described, factors.__getitem__
    found = weights_by_name(directory)
    if other := sorted({*found.files} ^ {*start.files}):
        raise ModelError(f"{directory}: {other[0]} is in it or in the parent {parent} alone: another architecture")
    for name in found.files:
        shape, before = found.shape(name), start.shape(name)
        if shape != before:
            raise ModelError(f"{directory}: {name} has the shape {[*shape]}, in the parent {parent} {[*before]}")
    described = {name: (DTYPES[dtype], found.shape(name)) for name in found.files}
    return ("weights" if dtype == "float32" else "delta"), described, partial(_read_member, found, start, dtype)


def _read_member(found: Weights, start: Weights, dtype: str, name: str) -> Float[Tensor, "..."]:
    """What is kept of a parameter."""
    own = found.read(name)
    if not torch.isfinite(own).all():
        raise ModelError(f"{found.path}: {name} is not finite everywhere: its training diverged. Lower --lr.")
    return own.float() if dtype == "float32" else (own.float() - start.read(name).float()).to(torch.bfloat16)


def _factors(adapter: Adapter, start: Weights, *, turned: bool) -> Iterator[tuple[str, Tensor]]:
    """Of every adapted layer two factors, whose product is added to its weight, by the weight's name in the files.

    They are scale B and A of a weight kept as [o i]; A^T and scale B^T of one kept as [i o], as GPT-2's are. Which one
    it is, its shape says; of a square one the adapter's `fan_in_fan_out`, here `turned`.
    """
    for layer in adapter.layers:
        name = next((name for name in start.files if name.endswith(f"{layer.removeprefix('model.')}.weight")), None)
        if name is None:
            raise ModelError(f"{adapter.weights.path}: it adapts {layer}, which the parent does not have")
        update = adapter.update(layer)
        left, right = update.left, update.right
        shape, wide = tuple(start.shape(name)), (left.shape[0], right.shape[1])
        if shape != wide or (wide[0] == wide[1] and turned):
            left, right = right.T, left.T
        if shape != (left.shape[0], right.shape[1]):
            raise ModelError(f"{adapter.weights.path}: {layer} adapts {[*wide]}, and the parent has {[*shape]}")
        yield f"{name}:left", left.contiguous()
        yield f"{name}:right", right.contiguous()
