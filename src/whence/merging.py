"""Averages of models: the weights of a mixture that nobody trained.

With theta_0 the parent, theta_u the members of a pool, and w_u >= 0 a mixture's weights,

    theta(w) = theta_0 + scale * sum over u of w_u (theta_u - theta_0)                            (weighted mean)

`scale` is task arithmetic's; 1 where the weights sum to 1 gives the plain weighted mean. From shares pi of partitions
that are split into units, w_u = pi(partition of u) * tokens_u / tokens of the partition: with pi by size every unit
weighs alike (the paper's micro), with equal pi every partition does (macro).

Sums are in fp32, one tensor at a time, in the order of the members. One member at weight 1 is that member bit for bit.

    RegMean   of a linear layer with inputs X_u, G_u = X_u^T X_u over the real tokens of u, off-diagonals times alpha:
              W^T = (sum of w_u G_u)^-1 sum of w_u G_u W_u^T, damped by `DAMPING` of the mean diagonal; else the mean

Sources: Na et al. 2024, https://arxiv.org/abs/2410.15661 (uniform means); task arithmetic, Ilharco et al. 2023,
https://arxiv.org/abs/2212.04089; RegMean, Jin et al. 2023, https://arxiv.org/abs/2212.09849. Other weights than uniform
are an extension of ours, measured in docs/ablate.md.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from whence.errors import SettingError, StorageError
from whence.members import Pool
from whence.model import LoadedModel, load_model
from whence.storage import Place

SUM_TOLERANCE = 1e-3
"""By which weights may miss a sum of 1: what rounding to three digits does."""
DAMPING = 1e-6
SHARD_BYTES = 4_000_000_000
"""Of a merged model's file."""

Mixture = Mapping[str, float]
"""Weights by partition."""
Grams = Mapping[str, Mapping[str, Float32[Tensor, "i i"]]]
"""By partition and parameter."""


def checked(mixture: Mixture, partitions: Iterable[str], *, name: str = "mixture") -> dict[str, float]:
    """A mixture's positive weights, made to sum to 1.

    Raises:
        SettingError: A partition that is not there, a negative or infinite weight, or another sum than 1.

    >>> checked({"a": 0.25, "b": 0.75, "c": 0.0}, ["a", "b", "c"])
    {'a': 0.25, 'b': 0.75}
    """
    known = list(partitions)
    for partition, weight in mixture.items():
        if partition not in known:
            raise SettingError(f"{name}: no partition {partition!r}; the pool has {', '.join(known)}")
        if not 0 <= weight < math.inf:
            raise SettingError(f"{name}: the weight of {partition} is {weight}; 0 or more is expected")
    total = math.fsum(mixture.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise SettingError(f"{name}: its weights sum to {total:.6g}; a sum of 1 is expected")
    return {partition: mixture[partition] / total for partition in known if mixture.get(partition)}


def merged_tensors(
    pool: Pool, mixture: Mixture, *, scale: float = 1.0, grams: Grams | None = None, alpha: float = 0.0
) -> Iterator[tuple[str, Float32[Tensor, "..."]]]:
    """A mixture's parameters, one at a time, by their names in the parent's files.

    Args:
        pool: Parent and members.
        mixture: Weights that sum to 1.
        scale: Of the move away from the parent.
        grams: For RegMean: of members' inputs; parameters that have none are averaged.
        alpha: RegMean's factor of off-diagonals, from 0 (a mean by input feature) to 1.
    """
    weights, start = checked(mixture, pool.members), pool.start()
    members = {partition: pool.member(partition) for partition in weights}
    for name in start.files:
        parent = start.read(name).float()
        own = {partition: member.read(name, parent) for partition, member in members.items()}
        parts = {partition: parent if part is None else part for partition, part in own.items()}
        if grams and all(name in grams[partition] for partition in weights):
            gram = {partition: grams[partition][name] for partition in weights}
            merged = regmean(parts, gram, weights, alpha=alpha)
        else:
            merged = mean(parts, weights)
        yield name, merged if scale == 1.0 else parent + scale * (merged - parent)


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
    alpha: float = 0.0,
) -> Float32[Tensor, "o i"]:
    """The linear layer that is nearest to every member's on that member's own inputs; the mean where that is singular.

    Args:
        parts: Weights as torch lays out a linear layer.
        grams: X^T X of each member's inputs over their number.
        weights: Of the members.
        alpha: Factor of the grams' off-diagonals.
    """
    if not 0 <= alpha <= 1:
        raise SettingError(f"alpha {alpha} of RegMean: a number from 0 to 1 is expected")
    shrunk = {partition: shrunk_gram(grams[partition], alpha) * weights[partition] for partition in weights}
    total = torch.stack(list(shrunk.values())).sum(0)
    damping = DAMPING * total.diagonal().mean()
    right = torch.stack([shrunk[partition] @ parts[partition].double().T for partition in weights]).sum(0)
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

    Where fewer members change their weight than the new mixture has, only those are read and their change is added.
    """

    pool: Pool
    model: LoadedModel
    scale: float = 1.0
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
        if wanted and change and len(change) < len(wanted) and self.moves < MOVES:
            self._move(change)
            self.moves += 1
        else:
            tensors = self._parent() if wanted is None else merged_tensors(self.pool, wanted, scale=self.scale)
            fill(self.model, tensors)
            self.moves = 0
        self.weights = wanted
        return self.model

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
                own(name).add_(parent if part is None else part, alpha=self.scale * by)


def _change(before: Mixture, after: Mixture) -> dict[str, float]:
    by = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {**before, **after}}
    return {name: value for name, value in by.items() if value}


def mixed(pool: Pool, *, scale: float = 1.0) -> Mixed:
    """The parent, loaded in fp32, to become mixtures."""
    return Mixed(pool, load_model(pool.parent, dtype="float32"), scale)


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
    grams: Grams | None = None,
    alpha: float = 0.0,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """A mixture as a model directory that `from_pretrained` loads, in the parent's own dtypes.

    Written beside its place and moved there whole, so that a model that was there before stays until then.

    Raises:
        SettingError: The mixture, or `out` is something else than a model or nothing.
        StorageError: The disk is full; nothing is changed.
    """
    directory = Path(out)
    if directory.exists() and not (directory / "config.json").is_file():
        raise SettingError(f"-o {out}: there is something there that is no model; name another directory")
    weights = checked(mixture, pool.members)
    making = directory.with_name(f".{directory.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        for file in sorted(Path(pool.parent).iterdir()):
            if file.is_file() and not _is_weights(file.name):
                shutil.copyfile(file, making / file.name)
        _write_shards(pool, merged_tensors(pool, weights, scale=scale, grams=grams, alpha=alpha), making, shard_bytes)
        told = {"mixture": weights, "scale": scale, "parent": pool.parent_digest, "pool": pool.place.root}
        (making / "whence_mixture.json").write_text(json.dumps(told, indent=1))
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        raise StorageError(f"Cannot write {out}: {error.strerror or error}. Nothing there was changed.") from error
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    before = directory.with_name(f".{directory.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if directory.exists():
        directory.rename(before)
    making.rename(directory)
    shutil.rmtree(before, ignore_errors=True)
    return directory


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json"))


def _write_shards(pool: Pool, tensors: Iterable[tuple[str, Tensor]], out: Path, shard_bytes: int) -> None:
    """One file, or several with an index; no more than one is held."""
    place, start = Place.at(out), pool.start()
    held: dict[str, Tensor] = {}
    shards: list[list[str]] = []

    def write() -> None:
        data = safetensors.torch.save(held, metadata={"format": "pt"})
        place.write(f"{len(shards)}.safetensors", [data], total=len(data))
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        stored = tensor.to(start.read(name).dtype).contiguous()
        if held and sum(own.nbytes for own in held.values()) + stored.nbytes > shard_bytes:
            write()
        held[name] = stored
    write()
    if len(shards) == 1:
        (out / "0.safetensors").rename(out / "model.safetensors")
        return
    names = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"{number}.safetensors").rename(out / file)
        names |= dict.fromkeys(shard, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=1))


def mergekit_yaml(pool: Pool, mixture: Mixture, *, scale: float = 1.0) -> str:
    """A mixture as a mergekit recipe, for its other methods; members have to be written as directories first."""
    lines = ["merge_method: task_arithmetic", f"base_model: {json.dumps(pool.parent)}", "models:"]
    for partition, weight in checked(mixture, pool.members).items():
        lines.append(f"  - model: {json.dumps(f'members/{partition}')}")
        lines.append(f"    parameters: {{weight: {scale * weight!r}}}")
    return "\n".join([*lines, "dtype: float32", ""])
