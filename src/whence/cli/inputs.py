"""What a command reads, checked while its words are parsed: a wrong name is refused before torch is imported.

Each function is the callback of an argument or option: it takes its value, and gives it back or raises. Whoever reads
the input says the rest: here it is asked whether there is something of the right kind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from whence.corpus.addresses import SUFFIXES, require_corpus
from whence.errors import MissingIndexError, MissingPoolError, SettingError
from whence.models.local_copies import local_directory
from whence.storage import Place

MANIFEST, POOL = "manifest.json", "pool.json"
CONFIGURATIONS = ("config.json", "adapter_config.json")
PathT = TypeVar("PathT", str, None)


def is_index(path: str) -> bool:
    """Whether there is an index at a path."""
    return Place.at(path).exists(MANIFEST)


def an_index(path: str) -> str:
    """The path of an index.

    Raises:
        MissingIndexError: There is none.
    """
    if not is_index(path):
        raise MissingIndexError.at(Place.at(path).root)
    return path


def a_pool(path: str) -> str:
    """The path of a pool.

    Raises:
        MissingPoolError: There is none.
    """
    if not Place.at(path).exists(POOL):
        raise MissingPoolError.at(path)
    return path


def a_corpus(path: PathT) -> PathT:
    """The path or name of a corpus.

    Raises:
        CorpusError: There is none.
        SettingError: It is a model.
    """
    if path is not None:
        if _is_model(path):
            raise SettingError(f"{path}: a model, where a corpus is expected. MODEL comes first, then CORPUS.")
        require_corpus(path)
    return path


def corpora(paths: Sequence[str]) -> Sequence[str]:
    """The paths or names of corpora, or of directories of them."""
    for path in paths:
        a_corpus(path)
    return paths


def an_index_or_corpus(path: str) -> str:
    """The path of an index, or the path or name of a corpus."""
    return path if is_index(path) else a_corpus(path)


def a_model(path: PathT) -> PathT:
    """The path or name of a model, an adapter or a Trainer's directory.

    Raises:
        ModelError: There is none.
        SettingError: It is a corpus or an index.
    """
    if path is None:
        return path
    if path.lower().endswith(SUFFIXES) and Path(path).is_file():
        raise SettingError(f"{path}: a file of rows, where a model is expected. MODEL comes first, then CORPUS.")
    if Path(path).is_dir() and is_index(path) and not _is_model(path):
        raise SettingError(f"{path}: an index, where a model is expected: whence info {path} says which one made it.")
    local_directory(path, patterns=())
    return path


def _is_model(path: str) -> bool:
    return any(Path(path, name).is_file() for name in CONFIGURATIONS)
