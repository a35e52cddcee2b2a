"""Averages of models: the weights of a mixture that nobody trained.

With theta_0 the parent, theta_u the members of a pool, and w_u >= 0 a mixture's weights,

    theta(w) = theta_0 + scale * sum over u of w_u (theta_u - theta_0)                            (weighted mean)

`scale` is task arithmetic's; 1 where the weights sum to 1 gives the plain weighted mean. From shares pi of partitions
that are split into units, w_u = pi(partition of u) * tokens_u / tokens of the partition: with pi by size every unit
weighs alike (the paper's micro), with equal pi every partition does (macro): `named_mixture`. Of a pool of units a
partition's name stands for all of its units.

Sums are in fp32, one tensor at a time, in the order of the members. One member at weight 1 is that member bit for bit.

    RegMean   of a linear layer with inputs X_u, G_u = X_u^T X_u over the real tokens of u, off-diagonals times alpha:
              W^T = (sum of w_u G_u)^-1 sum of w_u G_u W_u^T, damped by `DAMPING` of the mean diagonal

which at alpha 1 is the layer with the smallest sum of w_u |X_u W^T - X_u W_u^T|^2. It is of weights of linear layers
alone: embeddings, a head tied to one, norms, biases, and layers whose inputs `grams` could not tell, are averaged. Of
adapters it takes the layer with B A added.

Sources: Na et al. 2024, https://arxiv.org/abs/2410.15661 (uniform means); task arithmetic, Ilharco et al. 2023,
https://arxiv.org/abs/2212.04089; RegMean, Jin et al. 2023, https://arxiv.org/abs/2212.09849. Other weights than uniform
are an extension of ours, measured in docs/results/ablation.md.
"""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from whence.ablation.pool import MemberWeights, Pool
from whence.errors import ManifestMismatchError, SettingError, StorageError
from whence.models.loading import LoadedModel, load_model, tokenizer_digest
from whence.models.weights import Described, Weights, in_pieces
from whence.storage import Place

SUM_TOLERANCE = 1e-3
"""By which weights may miss a sum of 1: what rounding to three digits does."""
DAMPING = 1e-6
ALPHA = 0.1
"""Of RegMean, in the configurations of its released code."""
SHARD_BYTES = 4_000_000_000
"""Of a merged model's file."""

Mixture = Mapping[str, float]
"""Weights by partition."""
Grams = Mapping[str, Mapping[str, Float32[Tensor, "i i"]]]
"""By partition and parameter."""


@dataclass(frozen=True, kw_only=True)
class RegMean:
    """Averages of linear layers by what goes into them."""

    grams: Grams
    """Of members' inputs; a parameter that is not in all of a mixture's is averaged. One may be read when asked for."""
    transposed: Collection[str] = ()
    """Parameters that are kept as [i o], as GPT-2's are."""
    alpha: float = ALPHA
    """Factor of off-diagonals, from 0 (a mean by input feature) to 1."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of each member's matrices, for what is kept by content."""

    def __post_init__(self):
        _check_alpha(self.alpha)

    def merged(self, name: str, parts: Mapping[str, Tensor], weights: Mixture) -> Tensor | None:
        """A parameter of a mixture; None where it has no matrices, or the mixture is one member's alone."""
        if len(weights) == 1 or not all(name in self.grams[partition] for partition in weights):
            return None
        grams = {partition: self.grams[partition][name] for partition in weights}
        if name not in self.transposed:
            return regmean(parts, grams, weights, alpha=self.alpha)
        turned = {partition: part.T for partition, part in parts.items()}
        return regmean(turned, grams, weights, alpha=self.alpha).T.contiguous()


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise SettingError(f"--alpha {alpha} of RegMean: a number from 0 to 1 is expected")


def checked(mixture: Mixture, partitions: Iterable[str], *, name: str = "mixture") -> dict[str, float]:
    """A mixture's positive weights, made to sum to 1.

    Raises:
        SettingError: A partition that is not there, a negative or infinite weight, or another sum than 1.

    >>> checked({"a": 0.25, "b": 0.75, "c": 0.0}, ["a", "b", "c"])
    {'a': 0.25, 'b': 0.75}
    >>> checked({"a": 0.5, "b": 0.5}, ["a/0", "a/1", "b"])
    {'a/0': 0.25, 'a/1': 0.25, 'b': 0.5}
    """
    known, spread = list(partitions), dict[str, float]()
    for partition, weight in mixture.items():
        own = [partition] if partition in known else units_of(partition, known)
        for unit in own:
            spread[unit] = spread.get(unit, 0.0) + weight / len(own)
        if not own:
            raise SettingError(f"{name}: no partition {partition!r}; the pool has {', '.join(known)}")
        if not 0 <= weight < math.inf:
            raise SettingError(f"{name}: the weight of {partition} is {weight}; 0 or more is expected")
    mixture = spread
    total = math.fsum(mixture.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise SettingError(f"{name}: its weights sum to {total:.6g}; a sum of 1 is expected")
    return {partition: mixture[partition] / total for partition in known if mixture.get(partition)}


def units_of(partition: str, members: Iterable[str]) -> list[str]:
    """Members that are units of a partition: its name with a number."""
    return [name for name in members if re.fullmatch(re.escape(partition) + r"/\d+", name)]


def named_mixture(pool: Pool, name: str) -> dict[str, float]:
    """The mixture that a corpus is ("micro": by tokens), or all of its partitions alike ("macro").

    Raises:
        SettingError: Another name, or a pool that does not know how large its partitions are.
    """
    if name not in ("micro", "macro"):
        raise SettingError(f"--mixture {name}: NAME=WEIGHT,... is expected, or micro (by size), or macro (all alike)")
    sizes: dict[str, int] = {}
    for member in pool.members.values():
        if member.size is None:
            raise SettingError(f"{pool.place.root} does not know how large {member.partition} is: give weights")
        sizes[member.partition] = member.size
    owners = {unit: re.sub(r"/\d+$", "", unit) if pool.recipe.get("unit_tokens") else unit for unit in sizes}
    whole = Counter[str]()
    for unit, owner in owners.items():
        whole[owner] += sizes[unit]
    if name == "micro":
        return {unit: size / whole.total() for unit, size in sizes.items()}
    return {unit: size / whole[owners[unit]] / len(whole) for unit, size in sizes.items()}


def merged_tensors(
    pool: Pool, mixture: Mixture, *, scale: float = 1.0, regmean: RegMean | None = None
) -> Iterator[tuple[str, Float32[Tensor, "..."]]]:
    """A mixture's parameters, one at a time, by their names in the parent's files.

    Args:
        pool: Parent and members.
        mixture: Weights that sum to 1.
        scale: Of the move away from the parent.
        regmean: How to average linear layers; None: by the mean.
    """
    made = _Merge.of(pool, mixture, scale, regmean)
    for name in made.start.files:
        yield name, made.tensor(name)


@dataclass(frozen=True)
class _Merge:
    """A mixture of which each parameter is made when it is asked for."""

    start: Weights
    members: Mapping[str, MemberWeights]
    weights: Mixture
    scale: float
    regmean: RegMean | None

    @staticmethod
    def of(pool: Pool, mixture: Mixture, scale: float, regmean: RegMean | None) -> "_Merge":
        weights = checked(mixture, pool.members)
        members = {partition: pool.member(partition) for partition in weights}
        return _Merge(pool.start(), members, weights, scale, regmean)

    def tensor(self, name: str) -> Float32[Tensor, "..."]:
        """One tensor a member is held meanwhile."""
        parent = self.start.read(name).float()
        own = {partition: member.read(name, parent) for partition, member in self.members.items()}
        parts = {partition: parent if part is None else part for partition, part in own.items()}
        moved = any(part is not None for part in own.values())
        merged = self.regmean.merged(name, parts, self.weights) if self.regmean and moved else None
        if merged is None:
            merged = mean(parts, self.weights)
        return merged if self.scale == 1.0 else parent + self.scale * (merged - parent)


def mean(parts: Mapping[str, Float32[Tensor, "*s"]], weights: Mixture) -> Float32[Tensor, "*s"]:
    """Sum of w_u theta_u, in fp32 and in the order of the weights."""
    total: Tensor | None = None
    for partition, weight in weights.items():
        part = parts[partition]
        if total is None:
            total = part * weight if weight != 1.0 else part.clone()
        else:
            total.add_(part, alpha=weight)
    assert total is not None
    return total


def regmean(
    parts: Mapping[str, Float32[Tensor, "o i"]],
    grams: Mapping[str, Float32[Tensor, "i i"]],
    weights: Mixture,
    *,
    alpha: float = ALPHA,
) -> Float32[Tensor, "o i"]:
    """The linear layer that is nearest to every member's on that member's own inputs; the mean where that is singular.

    Args:
        parts: Weights as torch lays out a linear layer.
        grams: X^T X of each member's inputs over their number.
        weights: Of the members.
        alpha: Factor of the grams' off-diagonals.
    """
    _check_alpha(alpha)
    total, right = torch.zeros(()), torch.zeros(())
    for partition, weight in weights.items():  # not stacked: inputs of i squared numbers each
        shrunk = weight * shrunk_gram(grams[partition], alpha)
        total, right = total + shrunk, right + shrunk @ parts[partition].double().T
    damping = DAMPING * total.diagonal().mean()
    right = right + damping * mean(parts, weights).double().T
    factor, info = torch.linalg.cholesky_ex(total + damping * torch.eye(len(total), dtype=torch.float64))
    if int(info) or not float(damping) > 0:
        return mean(parts, weights)
    return torch.cholesky_solve(right, factor).T.float()


def shrunk_gram(gram: Float32[Tensor, "i i"], alpha: float) -> Float64[Tensor, "i i"]:
    """Off-diagonals times alpha."""
    wide = gram.double()
    return alpha * wide + (1 - alpha) * torch.diag(wide.diagonal())


# -- in memory


MOVES = 16
"""By the change alone, before a mixture is summed anew, so that rounding does not add up."""


@dataclass
class Mixed:
    """A model whose weights are those of any mixture of a pool, one after the other.

    Where fewer members change their weight than the new mixture has, only those are read and their change is added;
    RegMean, which is no sum, is solved anew.
    """

    pool: Pool
    model: LoadedModel
    scale: float = 1.0
    regmean: RegMean | None = None
    weights: dict[str, float] | None = field(default=None, init=False)
    """That it has now; None: the parent's."""
    moves: int = field(default=0, init=False)
    """By change, since the last sum."""

    def become(self, mixture: Mixture | None) -> LoadedModel:
        """The model with a mixture's weights; None: the parent's."""
        wanted = None if mixture is None else checked(mixture, self.pool.members)
        if wanted == self.weights:
            return self.model
        change = {} if wanted is None or self.weights is None else _change(self.weights, wanted)
        if wanted and change and not self.regmean and len(change) < len(wanted) and self.moves < MOVES:
            self._move(change)
            self.moves += 1
        else:
            fill(self.model, self._parent() if wanted is None else self._sum(wanted))
            self.moves = 0
        self.weights = wanted
        return self.model

    def _sum(self, mixture: Mixture) -> Iterator[tuple[str, Tensor]]:
        return merged_tensors(self.pool, mixture, scale=self.scale, regmean=self.regmean)

    def _parent(self) -> Iterator[tuple[str, Tensor]]:
        start = self.pool.start()
        return ((name, start.read(name).float()) for name in start.files)

    def _move(self, change: Mixture) -> None:
        """Add scale * change_u theta_u; the changes sum to 0, so that theta_0 drops out."""
        start, own = self.pool.start(), parameters(self.model)
        members = {partition: self.pool.member(partition) for partition in change}
        for name in start.files:
            parent = start.read(name).float()
            for partition, by in change.items():
                part = members[partition].read(name, parent)
                into = own(name)
                into.add_((parent if part is None else part).to(into.device), alpha=self.scale * by)


def _change(before: Mixture, after: Mixture) -> dict[str, float]:
    by = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {**before, **after}}
    return {name: value for name, value in by.items() if value}


def mixed(pool: Pool, *, scale: float = 1.0, regmean: RegMean | None = None) -> Mixed:
    """The parent, loaded in fp32, to become mixtures.

    Raises:
        SettingError: A scale that is no number.
        ManifestMismatchError: The parent's tokenizer is not the one that members were trained with.
    """
    check_scale(scale)
    model = load_model(pool.parent, dtype="float32")
    if pool.words is not None and tokenizer_digest(model.tokenizer) != pool.words:
        raise ManifestMismatchError(
            f"{pool.parent}: its tokenizer is not the one that the members of {pool.place.root} were trained with. "
            "Put the old one back."
        )
    return Mixed(pool, model, scale, regmean)


def check_scale(scale: float) -> None:
    """A number.

    Raises:
        SettingError: It is none.
    """
    if not math.isfinite(scale):
        raise SettingError(f"--scale {scale}: a number is expected")


def fill(model: LoadedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put tensors by their names in a model's files into the model; a tied head follows its embedding.

    Raises:
        SettingError: The model has no such parameter.
    """
    own = parameters(model)
    for name, tensor in tensors:
        own(name).copy_(tensor)


def parameters(model: LoadedModel) -> Callable[[str], Tensor]:
    """A loaded model's parameters by their names in its files."""
    named = dict(model.model.named_parameters(remove_duplicate=False)) | dict(model.model.named_buffers())

    def own(name: str) -> Tensor:
        found = next((candidate for candidate in _spellings(name) if candidate in named), None)
        if found is None:
            raise SettingError(f"{model.path}: the loaded model has no parameter {name}")
        return named[found].data

    return own


def _spellings(name: str) -> Iterator[str]:
    """As it is, and with or without the part that some files leave out."""
    yield name
    yield name.partition(".")[2]
    yield from (f"{prefix}.{name}" for prefix in ("model", "transformer", "gpt_neox"))


# -- as a directory


def write_merged(
    pool: Pool,
    mixture: Mixture,
    out: str | Path,
    *,
    scale: float = 1.0,
    regmean: RegMean | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """A mixture as a model directory that `from_pretrained` loads, in the parent's own dtypes.

    Written beside its place and moved there whole, so that a model that was there before stays until then. What is
    held meanwhile is one tensor a member, never the model.

    Raises:
        SettingError: The mixture, or `out` is the pool's parent, or something else than a model or nothing.
        StorageError: The disk is full; nothing is changed.
    """
    directory = Path(out).resolve()
    making, before = (directory.with_name(f".{directory.name}.{word}") for word in ("making", "before"))
    if before.exists() and not directory.exists():
        before.rename(directory)  # a process was killed between the two names
    if directory.exists() and not (directory / "config.json").is_file():
        raise SettingError(f"-o {out}: there is something there that is no model; name another directory")
    if directory == Path(pool.parent).resolve():
        raise SettingError(f"-o {out}: the pool's parent, which its members are told from; name another directory")
    check_scale(scale)
    weights = checked(mixture, pool.members)
    shutil.rmtree(making, ignore_errors=True)
    try:
        _write_beside(pool, weights, making, scale, regmean, shard_bytes, asked=out)
        _exchange(making, directory, before, asked=out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return directory


def _exchange(made: Path, directory: Path, before: Path, *, asked: str | Path) -> None:
    """A new directory in the place of an old one, which comes back where that fails."""
    try:
        shutil.rmtree(before, ignore_errors=True)
        if directory.exists():
            directory.rename(before)
        try:
            made.rename(directory)
        except OSError:
            if before.exists():
                before.rename(directory)
            raise
    except OSError as error:
        raise StorageError(f"Cannot write {asked}: {error.strerror or error}. Nothing there was changed.") from error
    shutil.rmtree(before, ignore_errors=True)


def _write_beside(
    pool: Pool,
    weights: Mixture,
    making: Path,
    scale: float,
    regmean: RegMean | None,
    shard_bytes: int,
    *,
    asked: str | Path,
) -> None:
    """The whole model, where nobody looks yet."""
    told = {"mixture": weights, "scale": scale, "parent": pool.parent_digest, "pool": pool.place.root}
    told |= {"method": "regmean", "alpha": regmean.alpha} if regmean else {}
    try:
        making.mkdir(parents=True)
        for file in sorted(Path(pool.parent).iterdir()):
            if file.is_file() and not _is_weights(file.name):
                shutil.copyfile(file, making / file.name)
        _write_shards(_Merge.of(pool, weights, scale, regmean), making, shard_bytes)
        (making / "whence_mixture.json").write_text(json.dumps(told, indent=1))
    except OSError as error:
        raise StorageError(f"Cannot write {asked}: {error.strerror or error}. Nothing there was changed.") from error


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json"))


def _write_shards(merge: _Merge, out: Path, shard_bytes: int) -> None:
    """One file, or several with an index."""
    place, described = Place.at(out), merge.start.described()
    shards = _shards(described, shard_bytes)

    def stored(name: str) -> Tensor:
        return merge.tensor(name).to(described[name][0])

    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        whole = "model.safetensors"
        file = whole if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        pieces, total = in_pieces(shard, stored, metadata={"format": "pt"})
        place.write(file, pieces, total=total)
        files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=1))


def _shards(described: Described, most: int) -> list[Described]:
    """Tensors in their order, as many to a file as there is room for."""
    shards, held = [dict[str, tuple[torch.dtype, tuple[int, ...]]]()], 0
    for name, (dtype, shape) in described.items():
        size = math.prod(shape) * dtype.itemsize
        if held and held + size > most:
            shards, held = [*shards, {}], 0
        shards[-1][name] = (dtype, shape)
        held += size
    return list(shards)


def mergekit_yaml(pool: Pool, mixture: Mixture, *, scale: float = 1.0) -> str:
    """A mixture as a mergekit recipe, for its other methods.

    It reads members from directories `members/NAME`, each of which `whence pool merge POOL --mixture NAME=1 -o
    members/NAME` writes.
    """
    lines = ["merge_method: task_arithmetic", f"base_model: {json.dumps(pool.parent)}", "models:"]
    for partition, weight in checked(mixture, pool.members).items():
        lines.append(f"  - model: {json.dumps(f'members/{partition}')}")
        lines.append(f"    parameters: {{weight: {scale * weight!r}}}")
    return "\n".join([*lines, "dtype: float32", ""])
