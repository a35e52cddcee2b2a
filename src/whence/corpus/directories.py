"""Which files of a directory are a corpus': not its indexes, not metadata, and of a data set's splits `train` alone.

The splits are those of the Hub's data sets: a file belongs to one if the split's name stands in its own name or in that
of a directory below the corpus, between characters that are no letters, as in `data/train-00000-of-00002.parquet`.

Source: the names by which `datasets` finds splits, https://huggingface.co/docs/datasets/repository_structure.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from whence.errors import CorpusError

logger = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of each split in file names."""


def files_below(files: Any, root: str) -> list[str]:
    """Every file below a directory in the order of names, without files and directories that a dot hides."""
    paths = _local_files_below(root) if isinstance(files, LocalFileSystem) else files.find(root)
    return sorted(path for path in paths if "/." not in path.removeprefix(root))


def _local_files_below(root: str) -> Iterator[str]:
    """Files below a local directory. Links are followed, but each directory is read once: a link may lead upwards."""

    def refuse(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be read: {error.strerror}")

    visited: set[Path] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        if (real := Path(folder).resolve()) in visited:
            folders.clear()
            continue
        visited.add(real)
        # a directory's own subdirectories come before those that it links to
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".")),
            key=lambda name, folder=folder: (Path(folder, name).is_symlink(), name),
        )
        yield from (f"{folder.rstrip('/')}/{name}" for name in names)


def is_index(files: Any, path: str) -> bool:
    """Whether a `manifest.json` is an index': it has the keys that every version writes (see `indexing.manifest`)."""
    try:
        content = json.loads(files.cat_file(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= {"whence_version", "format_version", "checksum"}


def is_metadata(path: str, below: list[str]) -> bool:
    """Whether a file holds the metadata of a Hugging Face data set, and no rows."""
    folder, _, name = path.rpartition("/")
    if name == "state.json":
        return f"{folder}/dataset_info.json" in below
    return name in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def of_split(paths: Sequence[str], root: str, address: str, split: str | None) -> list[str]:
    """The files of a directory that are read as one corpus.

    Args:
        paths: Its files of rows.
        root: The directory, as its file system names it.
        address: The same as one has to write it: with the file system, such as `s3://`.
        split: The split that is asked for; None: `train` where there are others beside it, and files of no split.

    Raises:
        CorpusError: There is no such split, or none is asked for and there are several, but no `train`.
    """
    splits = {path: split_of(path.removeprefix(root)) for path in paths}
    names = sorted({name for name in splits.values() if name})
    if split is not None:
        if split not in names:
            raise CorpusError(f"{address}:{split}: there is no such split; there is {', '.join(names) or 'none'}.")
        return [path for path in paths if splits[path] == split]
    if len(names) < 2:
        return list(paths)
    if "train" not in names:
        raise CorpusError(f"{address}: splits are {', '.join(names)}; name one: {address}:{names[0]}")
    chosen = [path for path in paths if splits[path] in ("train", None)]
    _tell_of_splits(address, tuple(path for path in paths if path not in set(chosen)), tuple(set(names) - {"train"}))
    return chosen


def split_of(path: str) -> str | None:
    """The split that a path names, in its last part that names one; None if it names none, or two in one part.

    >>> split_of("data/train-00000-of-00002.parquet"), split_of("test/part0.jsonl"), split_of("trains/latest.csv")
    ('train', 'test', None)
    """
    for part in reversed(path.split("/")):
        words = {*re.findall(r"[a-z]+", part.lower())}
        named = [split for split, names in SPLITS.items() if words & {*names}]
        if named:
            return named[0] if len(named) == 1 else None
    return None


@functools.cache  # once per process, since a corpus is read several times
def _tell_of_splits(address: str, paths: tuple[str, ...], splits: tuple[str, ...]) -> None:
    logger.warning(
        "%s: only its split `train` is read; files of %s are left out: %d, such as %s. For another, name %s:%s",
        address,
        " and ".join(sorted(splits)),
        len(paths),
        paths[0],
        address,
        sorted(splits)[0],
    )


@functools.cache
def warn_of_left_out_files(root: str, paths: tuple[str, ...]) -> None:
    """Say which files of a directory are no rows by their endings."""
    logger.warning("%s: files left out for their endings: %d, such as %s", root, len(paths), paths[0])
