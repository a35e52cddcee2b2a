"""A pool on disk: one model for each partition of a corpus, all trained alike from one parent.

    POOL/pool.json                          parent and recipe; partition, tokens and checksum of every member
    POOL/members/000.safetensors            a member, by its number

A member is stored as its delta theta_u - theta_0 in bfloat16, half the size, exact to 2^-9 of every entry's move; or as
its weights theta_u in float32; or, trained as a LoRA, as the adapter's factors. "The member" is always what is stored:
theta_0 + its delta. Tensors are read one at a time, in fp32.

Members average well only near one another: those of another parent, architecture, tokenizer or recipe are refused, and
the message names the difference. A partition joins a pool later without the others being trained again.

Source: Na et al. 2024, https://arxiv.org/abs/2410.15661.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import safetensors
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from whence.corpus.templates import date_of
from whence.counts import number_of
from whence.errors import (
    ChecksumError,
    FormatVersionError,
    ManifestMismatchError,
    MissingPoolError,
    ModelError,
)
from whence.models.loaded_weights import loaded_weights
from whence.models.loading import adapter_config, directory_digest, load_tokenizer
from whence.models.local_copies import local_directory
from whence.models.pairing import Adapter, adapter_of, weights_by_name
from whence.models.training_state import date_of_training
from whence.models.weights import Described, Weights, in_pieces
from whence.opened_tensors import opened_tensors
from whence.paths import is_directory
from whence.records import Count, Digest, FastDigest, read_record, unlike_written
from whence.storage import Place

MANIFEST = "pool.json"
FORMAT_VERSION = 2
"""Version 1 had no `xxh3`, and no checksum of its own."""
REMEDY = "Restore it from a copy, or train the pool again in another directory."
"""What mends a manifest."""
_RETRAIN = "Remove the file; `whence pool train` trains the member of the partition {partition!r} again."
Kind = Literal["delta", "weights", "lora"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One partition's model."""

    partition: str
    file: Annotated[str, re.compile(r"members/[0-9]{3,}\.safetensors")]
    sha256: Digest
    bytes: Count
    xxh3: FastDigest | None = None
    """XXH3-128, checked when the file is first read; None where an older Whence wrote it, and `sha256` is checked."""
    kind: Kind
    """What the file holds: "delta" in bfloat16, "weights" in float32, or "lora", factors in float32."""
    tokens: Count
    """Tokens trained on, with repetitions."""
    rows: Count
    """Rows of the partition."""
    loss: float | None = None
    """Last loss that its training logged."""
    size: Count | None = None
    """Tokens of the partition, each counted once."""
    digest: str | None = None
    """Digest of the partition's rows."""


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
    """Members by partition."""
    corpus: str | None = None
    """Address of the corpus that the last members were trained on, if it has one."""
    words: str | None = None
    """Digest of the parent's tokenizer."""

    def __repr__(self) -> str:
        """Where it is, of whom, how many members, and how to go on."""
        some = ", ".join(list(self.members)[:6]) + (", ..." if len(self.members) > 6 else "")
        return (
            f"Pool({self.place.root}, {number_of(len(self.members), 'member')} of {self.parent}: {some})\n"
            "  More: .members, .recipe; whence.ablate(POOL, EVAL)"
        )

    @property
    def partitions(self) -> list[str]:
        """Names of the partitions, in the order in which they joined."""
        return list(self.members)

    def has(self, partition: str) -> bool:
        """Whether the partition has a member, and the member its file."""
        return partition in self.members and self.place.exists(self.members[partition].file)

    def start(self) -> Weights:
        """Tensors of theta_0 by their names in its files; a tied head stands once."""
        return self._start

    @cached_property
    def _start(self) -> Weights:
        """Its names take a model without weights, and every step of a mixture asks for them."""
        return weights_by_name(self.parent)

    def member(self, partition: str) -> "MemberWeights":
        """A member's tensors, once it is known that they are those that were written, and numbers.

        Raises:
            ModelError: There is no such partition, or its member holds a number that is not finite.
            ChecksumError: The member's file is damaged.
        """
        if partition not in self.members:
            raise ModelError(f"{self.place.root}: no partition {partition!r}; it has {', '.join(self.members)}")
        self.check([partition])
        return MemberWeights(self.members[partition], self.place, self.start())

    def check(self, partitions: Iterable[str] | None = None) -> None:
        """Refuse members, all or some, whose files are damaged or not finite; each is read once in a process.

        Raises:
            ChecksumError: A file is not as it was written.
            ModelError: A tensor is not finite everywhere.
        """
        for partition in self.members if partitions is None else partitions:
            member = self.members[partition]
            remedy = _RETRAIN.format(partition=partition)
            self.place.check(member.file, member, remedy, also=partial(_refuse_not_finite, remedy=remedy))

    def verify(self, partitions: Iterable[str] | None = None) -> None:
        """Check the files of all members, or of some, against their checksums.

        Raises:
            ChecksumError: One is not as it was written.
        """
        for partition in self.members if partitions is None else partitions:
            member = self.members[partition]
            if (what := self.place.defect(member.file, member)) is not None:
                remedy = _RETRAIN.format(partition=partition)
                raise ChecksumError(f"{self.place.path(member.file)} is not what was written ({what}). {remedy}")

    def with_member(
        self,
        partition: str,
        directory: str | Path,
        *,
        dtype: str,
        tokens: int,
        rows: int,
        number: int | None = None,
        loss: float | None = None,
        size: int | None = None,
        digest: str | None = None,
    ) -> "Pool":
        """The pool with another member, which is stored and listed.

        Args:
            partition: The member's partition; an existing member of it is replaced.
            directory: Directory of the trained model or adapter.
            dtype: Name in `DTYPES`, for a full model.
            tokens: Tokens that it was trained on.
            rows: Rows of its partition.
            number: Of its file, one of `free_numbers`; None: the first of them.
            loss: Last loss of its training.
            size: Tokens of its partition.
            digest: Digest of its partition's rows.

        Raises:
            ModelError: The model has another architecture or parent.
        """
        existing = self.members.get(partition)
        free = _member_file(next(self.free_numbers()) if number is None else number)
        name = free if existing is None else existing.file
        kind, described, read = _storage_form(local_directory(directory), self.start(), self.parent, dtype)
        pieces, total = in_pieces(described, read)
        written = self.place.write(name, pieces, total=total)
        member = Member(partition=partition, file=name, **vars(written), kind=kind, tokens=tokens,
                        rows=rows, loss=loss, size=size, digest=digest)  # fmt: skip
        members = sorted({**self.members, partition: member}.values(), key=_number_of)
        pool = replace(self, members={each.partition: each for each in members})
        pool.write()
        return pool

    def free_numbers(self) -> Iterator[int]:
        """Numbers of files that no member has, from the lowest on."""
        taken = {member.file for member in self.members.values()}
        return (number for number in itertools.count() if _member_file(number) not in taken)

    def write(self) -> None:
        """Write the manifest, whole or not at all."""
        document = {
            "format_version": FORMAT_VERSION,
            "parent": self.parent,
            "parent_digest": self.parent_digest,
            "recipe": dict(self.recipe),
            "corpus": self.corpus,
            "tokenizer_digest": self.words,
            "members": [asdict(member) for member in self.members.values()],
        }
        self.place.write_document(MANIFEST, document, is_commit=True)


@dataclass(frozen=True)
class MemberWeights:
    """A member's tensors, each read when it is used."""

    member: Member
    place: Place
    """The pool's directory."""
    start: Weights

    def read(self, name: str, parent: Float32[Tensor, "..."]) -> Float32[Tensor, "..."] | None:
        """theta_u of a parameter, given theta_0 of it; None if it is the parent's own."""
        with self._opened() as opened:
            if self.member.kind == "lora":
                left, right = f"{name}:left", f"{name}:right"
                if left not in opened.keys():  # noqa: SIM118
                    return None
                return parent + opened.get_tensor(left) @ opened.get_tensor(right)
            if name not in opened.keys():  # noqa: SIM118
                return None
            stored = opened.get_tensor(name)
        return stored if self.member.kind == "weights" else parent + stored.float()

    def _opened(self) -> Any:
        remedy = _RETRAIN.format(partition=self.member.partition).removeprefix("Remove the file; ")
        try:
            return opened_tensors(self.place, self.member.file, self.member, remedy)
        except FileNotFoundError:
            file = self.place.path(self.member.file)
            raise ChecksumError(f"{file} was there, and was removed meanwhile: {remedy}") from None


def open_pool(path: str | Path) -> Pool:
    """Open a pool, and check the parent that it names.

    Raises:
        MissingIndexError: There is no pool.
        FormatVersionError: The pool has another format.
        ChecksumError: Its manifest says what no pool can.
        ModelError: Its parent is not where it was.
        ManifestMismatchError: The parent has other weights now.
    """
    pool = _read(path)
    remedy = (
        f"Say where it is: whence pool train PARENT {pool.corpus or 'CORPUS'} -o {path}, no member is trained again."
    )
    if not is_directory(pool.parent):
        raise ModelError(f"{path}: its parent is not at {pool.parent} any more. {remedy}")
    if directory_digest(pool.parent) != pool.parent_digest:
        raise ManifestMismatchError(f"{path}: the weights at {pool.parent} are not its parent's any more. {remedy}")
    return pool


def date_in(pool: Pool) -> str | None:
    """The day with which the rows of a pool are written; None for a chat template without a date."""
    return date_of(pool.place, load_tokenizer(pool.parent, pool.parent, False), trained=date_of_training(pool.parent))


def _read(path: str | Path) -> Pool:
    """Read a pool's manifest, without a look at its parent."""
    place = Place.at(path)
    if not place.exists(MANIFEST):
        raise MissingPoolError.at(str(path))
    data = place.read_committed(MANIFEST)
    _check_format(place, data)
    stored = read_record(_StoredPool, data, place.path(MANIFEST), REMEDY)
    members = {member.partition: member for member in stored.members}
    last, seen = -1, set[str]()
    for number, member in enumerate(stored.members):
        if _number_of(member) <= last or member.partition in seen:
            what = f"member {number} is {member.partition!r} in {member.file}"
            raise unlike_written(place.path(MANIFEST), what, REMEDY)
        last = _number_of(member)
        seen.add(member.partition)
    return Pool(place, stored.parent, stored.parent_digest, stored.recipe, members, stored.corpus,
                stored.tokenizer_digest)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _StoredPool:
    """The content of a pool's manifest."""

    format_version: int
    parent: str
    parent_digest: str
    recipe: dict[str, Any]
    corpus: str | None
    members: tuple[Member, ...]
    tokenizer_digest: str | None = None


def _check_format(place: Place, data: bytes) -> None:
    """Check the format before anything else: another one may have other entries."""
    found = read_record(_Format, data, place.path(MANIFEST), REMEDY)["format_version"]
    if found not in (1, FORMAT_VERSION):
        raise FormatVersionError(
            f"{place.path(MANIFEST)}: format {found}, and this version of Whence reads up to {FORMAT_VERSION}: install "
            "the version that wrote it"
        )


class _Format(TypedDict):
    format_version: int


def _number_of(member: Member) -> int:
    return int(Path(member.file).stem)


def _member_file(number: int) -> str:
    return f"members/{number:03d}.safetensors"


def begin_pool(
    path: str | Path,
    parent: str | Path,
    recipe: Mapping[str, Any],
    *,
    corpus: str | None = None,
    words: str | None = None,
) -> Pool:
    """Open the pool of this parent and recipe, or begin one without members.

    Raises:
        ManifestMismatchError: The pool there has another parent, tokenizer or recipe; the message names the difference.
    """
    place, start = Place.at(path), str(Path(local_directory(parent)).resolve())
    digest = directory_digest(start)
    if not place.exists(MANIFEST):
        pool = Pool(place, start, digest, json.loads(json.dumps(dict(recipe))), {}, corpus, words)
        pool.write()
        return pool
    pool = _read(path)
    if pool.parent_digest != digest:
        raise ManifestMismatchError(
            f"{path}: its members come from {pool.parent}, whose weights are not those of {start}. Means of models "
            "from different parents are no models: name another pool."
        )
    if words is not None and pool.words not in (None, words):
        raise ManifestMismatchError(
            f"{path}: its members were trained with another tokenizer than the one at {start}: name another pool."
        )
    expected = json.loads(json.dumps(dict(recipe)))
    for name in sorted({*expected, *pool.recipe}):
        if expected.get(name) != pool.recipe.get(name):
            raise ManifestMismatchError(
                f"{path}: its members were trained with {name} {pool.recipe.get(name)!r}, not {expected.get(name)!r}. "
                "Give the same, or name another pool."
            )
    return replace(pool, parent=start, corpus=corpus or pool.corpus, words=words or pool.words)


def _storage_form(
    directory: str, start: Weights, parent: str, dtype: str
) -> tuple[Kind, Described, Callable[[str], Float[Tensor, "..."]]]:
    """Kind of a trained model, types and shapes of its stored tensors, and a function that reads one of them."""
    if config := adapter_config(directory):
        base = local_directory(config["base_model_name_or_path"])
        if directory_digest(base) != directory_digest(parent):
            raise ModelError(f"{directory}: an adapter of {base}, not of the pool's parent {parent}")
        factors = dict(_factors(adapter_of(directory, config), start, is_transposed=bool(config.get("fan_in_fan_out"))))
        if diverged := [name for name, factor in factors.items() if not torch.isfinite(factor).all()]:
            raise ModelError(f"{directory}: {diverged[0]} is not finite everywhere: its training diverged. Lower --lr.")
        described = {name: (factor.dtype, tuple(factor.shape)) for name, factor in factors.items()}
        return "lora", described, factors.__getitem__
    weights = weights_by_name(directory)
    if unshared := sorted({*weights.files} ^ {*start.files}):
        if loaded_weights(weights).sources.keys() == loaded_weights(start).sources.keys():
            raise ModelError(
                f"{parent}: its files name weights otherwise ({unshared[0]}) than transformers does. Save it anew: "
                "AutoModelForCausalLM.from_pretrained(PARENT).save_pretrained(NEW), and name NEW as the parent."
            )
        raise ModelError(f"{directory}: {unshared[0]} is in it or in the parent {parent} alone: another architecture")
    for name in weights.files:
        shape, parent_shape = weights.shape(name), start.shape(name)
        if shape != parent_shape:
            raise ModelError(f"{directory}: {name} has the shape {[*shape]}, in the parent {parent} {[*parent_shape]}")
    described = {name: (DTYPES[dtype], weights.shape(name)) for name in weights.files}
    return ("weights" if dtype == "float32" else "delta"), described, partial(_stored_tensor, weights, start, dtype)


def _refuse_not_finite(file: Path, remedy: str) -> None:
    with safetensors.safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            if not torch.isfinite(opened.get_tensor(name)).all():
                raise ModelError(f"{file}: {name} is not finite everywhere. {remedy}")


def _stored_tensor(weights: Weights, start: Weights, dtype: str, name: str) -> Float[Tensor, "..."]:
    """A parameter in the form in which it is stored: its weights, or its delta."""
    tensor = weights.read(name)
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{weights.path}: {name} is not finite everywhere: its training diverged. Lower --lr.")
    return tensor.float() if dtype == "float32" else (tensor.float() - start.read(name).float()).to(torch.bfloat16)


def _factors(adapter: Adapter, start: Weights, *, is_transposed: bool) -> Iterator[tuple[str, Tensor]]:
    """Two factors of every adapted layer, whose product is added to its weight, by the weight's name in the files.

    They are scale B and A for a weight stored as [o i]; A^T and scale B^T for one stored as [i o], as GPT-2's are. The
    shape tells which; for a square weight the adapter's `fan_in_fan_out` does, here `is_transposed`.
    """
    for layer in adapter.layers:
        name = next((name for name in start.files if name.endswith(f"{layer.removeprefix('model.')}.weight")), None)
        if name is None:
            raise ModelError(f"{adapter.weights.path}: it adapts {layer}, which the parent does not have")
        update = adapter.update(layer)
        left, right = update.left, update.right
        shape, product = tuple(start.shape(name)), (left.shape[0], right.shape[1])
        if shape != product or (product[0] == product[1] and is_transposed):
            left, right = right.T, left.T
        if shape != (left.shape[0], right.shape[1]):
            raise ModelError(f"{adapter.weights.path}: {layer} adapts {[*product]}, and the parent has {[*shape]}")
        yield f"{name}:left", left.contiguous()
        yield f"{name}:right", right.contiguous()
