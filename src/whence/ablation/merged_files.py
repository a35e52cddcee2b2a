"""A mixture's merged model as files: a model directory that `from_pretrained` loads, or a recipe for mergekit.

The directory is written beside its place and moved there whole, so that a model that was there before stays until then.
Memory holds one tensor a member, never the model.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from whence.ablation.averages import RegMean
from whence.ablation.merging import MergedModel, check_scale
from whence.ablation.mixtures import Mixture, checked_mixture
from whence.ablation.pool import Pool
from whence.errors import ChecksumError, SettingError, StorageError
from whence.local_files import remove_directory
from whence.models.saved_files import LIST, list_files, listed_files
from whence.models.weights import Described, in_pieces
from whence.outputs import refuse_inputs
from whence.storage import Place

MIXTURE = "whence_mixture.json"
"""A file that only merged models have."""
SHARD_BYTES = 4_000_000_000
"""Bytes of a merged model's file, at most."""


def write_merged(
    pool: Pool,
    mixture: Mixture,
    out: str | Path,
    *,
    scale: float = 1.0,
    regmean: RegMean | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> Path:
    """Write a mixture's merged model as a directory that `from_pretrained` loads, in the parent's own dtypes.

    A merged model that is there already is replaced; another model only with `force`.

    Raises:
        SettingError: The mixture is wrong, `out` is or holds the pool, its parent or its corpus, or it holds something
            that is no merged model.
        StorageError: The disk is full; nothing is changed.
    """
    Place.at(out).require_disk("-o")  # it also refuses what no directory can be called
    directory = Path(out).resolve()
    making, before = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("making", "before"))
    if before.exists() and not directory.exists():
        before.rename(directory)  # a process was killed between the two names
    if directory.exists() and not (directory / "config.json").is_file():
        raise SettingError(f"-o {out}: there is something there that is no model; name another directory")
    if directory == Path(pool.parent).resolve():
        raise SettingError(f"-o {out}: the pool's parent, which its members are told from; name another directory")
    refuse_inputs(directory, [pool, pool.parent, pool.corpus], is_directory=True)
    if directory.exists() and not (_is_merged(directory) or force):
        raise SettingError(
            f"-o {out}: a model that `whence pool merge` did not write, or not as it is now. Name another directory, "
            "or add --force to replace it."
        )
    check_scale(scale)
    weights = checked_mixture(mixture, pool.members)
    remove_directory(making)
    try:
        _write_beside(pool, weights, making, scale, regmean, shard_bytes, out=out)
        _exchange(making, directory, before, out=out)
    finally:
        remove_directory(making)
    return directory


def _is_merged(directory: Path) -> bool:
    """Whether a directory holds a merged model as it was written, and nothing that someone else put there."""
    if not (directory / MIXTURE).is_file() or any(path.is_dir() for path in directory.iterdir()):
        return False
    try:
        return {path.name for path in directory.iterdir()} <= {*listed_files(directory), LIST, MIXTURE}
    except ChecksumError:
        return False


def _exchange(new: Path, directory: Path, before: Path, *, out: str | Path) -> None:
    """Move a new directory to the place of an old one; on failure, or if stopped between, the old one is moved back."""
    remove_directory(before)
    try:
        if directory.exists():
            directory.rename(before)
        new.rename(directory)
    except OSError as error:
        raise StorageError(f"Cannot write {out}: {error.strerror or error}. Nothing there was changed.") from error
    finally:
        if before.exists() and not directory.exists():
            before.rename(directory)
        remove_directory(before)


def _write_beside(
    pool: Pool,
    weights: Mixture,
    making: Path,
    scale: float,
    regmean: RegMean | None,
    shard_bytes: int,
    *,
    out: str | Path,
) -> None:
    """Write the whole model to a temporary directory."""
    settings = {"mixture": weights, "scale": scale, "parent": pool.parent_digest, "pool": pool.place.root}
    settings |= {"method": "regmean", "alpha": regmean.alpha} if regmean else {}
    try:
        making.mkdir(parents=True)
        for file in sorted(Path(pool.parent).iterdir()):
            if file.is_file() and not _is_weights(file.name):
                shutil.copyfile(file, making / file.name)
        _write_shards(MergedModel.of(pool, weights, scale, regmean), making, shard_bytes)
        (making / MIXTURE).write_text(json.dumps(settings, indent=1))
        list_files(making)
    except OSError as error:
        raise StorageError(f"Cannot write {out}: {error.strerror or error}. Nothing there was changed.") from error


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json"))


def _write_shards(model: MergedModel, out: Path, shard_bytes: int) -> None:
    """Write one file, or several with an index."""
    place, described = Place.at(out), model.start.described()
    shards = _shards(described, shard_bytes)

    def stored(name: str) -> Tensor:
        return model.tensor(name).to(described[name][0])

    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        pieces, total = in_pieces(shard, stored, metadata={"format": "pt"})
        place.write(file, pieces, total=total)
        files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=1))


def _shards(described: Described, most: int) -> list[Described]:
    """Tensors in their order, as many to a file as fit in `most` bytes."""
    shards, filled = [dict[str, tuple[torch.dtype, tuple[int, ...]]]()], 0
    for name, (dtype, shape) in described.items():
        size = math.prod(shape) * dtype.itemsize
        if filled and filled + size > most:
            shards, filled = [*shards, {}], 0
        shards[-1][name] = (dtype, shape)
        filled += size
    return list(shards)


def mergekit_yaml(pool: Pool, mixture: Mixture, *, scale: float = 1.0) -> str:
    """A mixture as a mergekit recipe, for mergekit's other methods.

    The recipe reads members from directories `members/NAME`; `whence pool merge POOL --mixture NAME=1 -o members/NAME`
    writes each of them.
    """
    lines = ["merge_method: task_arithmetic", f"base_model: {json.dumps(pool.parent)}", "models:"]
    for partition, weight in checked_mixture(mixture, pool.members).items():
        lines.append(f"  - model: {json.dumps(f'members/{partition}')}")
        lines.append(f"    parameters: {{weight: {scale * weight!r}}}")
    return "\n".join([*lines, "dtype: float32", ""])
