"""Where a corpus is: a file or directory, here or at any fsspec address, or a data set of the Hugging Face Hub.

The command line asks before it imports torch, so that this module does not.
"""

import re
from collections.abc import Iterator
from typing import Any

import fsspec

from whence.corpus.directories import SPLITS
from whence.corpus.shapes import Row
from whence.errors import CorpusError, MissingExtraError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KINDS = (
    f"a file ({' '.join((*SUFFIXES, '.txt'))}), a directory of them, or a Hugging Face data set "
    "(NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT)"
)


def file_system(address: str) -> tuple[Any, str]:
    """File system of an address, and the path in it."""
    try:
        return fsspec.url_to_fs(address)
    except ValueError as error:
        raise CorpusError(f"{address}: {error}. A corpus is {KINDS}.") from None
    except ImportError as error:
        raise MissingExtraError(f"{address}: {error}, with pip.") from None


def has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a path, compressed or not, ends so."""
    path = path.lower()
    for ending in COMPRESSED:
        path = path.removesuffix(ending)
    return path.endswith(suffixes)


def require_corpus(address: str) -> None:
    """Refuse an address where there is nothing to read; what is there is not opened.

    Raises:
        CorpusError: There is no such file, directory or data set.
    """
    files, root = file_system(address)
    if not (files.exists(root) or split_of(files, address)):
        require_hub_data_set(address)


def split_of(files: Any, address: str) -> tuple[str, str] | None:
    """The directory and the split that DIRECTORY:SPLIT names; None if it names none."""
    folder, _, split = address.rpartition(":")
    return (folder, split) if split in SPLITS and files.isdir(folder) else None


def require_hub_data_set(address: str) -> None:
    """Refuse what is no address here and no name on the Hub; the Hub is asked, for no file."""
    if "://" in address or has_suffix(address, SUFFIXES) or address.startswith((".", "/", "~")):
        raise CorpusError(f"{address}: no such file or directory. A corpus is {KINDS}.")
    import huggingface_hub
    from huggingface_hub import constants

    repository, _, _ = _hub_name(address)
    try:
        if not constants.HF_HUB_OFFLINE:  # at once, where datasets tries a wrong name for 25 s
            huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=[])
    except (OSError, ValueError, RuntimeError) as error:
        raise _no_data_set(address, (str(error).splitlines() or [type(error).__name__])[0]) from None


def _no_data_set(name: str, reason: str) -> CorpusError:
    return CorpusError(
        f"{name}: no such file or directory here, and no data set of that name could be read from the "
        f"Hugging Face Hub ({reason}). A corpus is {KINDS}."
    )


def hub_rows(name: str) -> Iterator[tuple[str, Row]]:
    """Rows of a data set of the Hub, each with its place for messages.

    Raises:
        CorpusError: It cannot be read.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    repository, configuration, split = _hub_name(name)
    try:
        data = datasets.load_dataset(repository, configuration, split=split, streaming=True)
        for number, row in enumerate(data):
            yield f"{name}[{number}]", dict(row)
    except (OSError, ValueError, OverflowError, RuntimeError, DatasetsError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = " ".join([lines[0], *(line for line in lines[1:] if "available configs" in line)])
        if "available configs" in reason or "BuilderConfig" in reason:
            raise CorpusError(f"{name}: {reason}. Name one as {repository}:CONFIGURATION:{split}") from None
        raise _no_data_set(name, reason) from None


def _hub_name(name: str) -> tuple[str, str | None, str]:
    """Repository, configuration and split of `name`, `name:split` or `name:configuration:split`.

    >>> _hub_name("a/b"), _hub_name("a/b:test[:10]"), _hub_name("openai/gsm8k:main:train")
    (('a/b', None, 'train'), ('a/b', None, 'test[:10]'), ('openai/gsm8k', 'main', 'train'))
    """
    repository, *rest = re.split(r":(?![^\[]*\])", name)  # a colon in brackets belongs to the split
    if len(rest) > 2 or not repository:
        raise CorpusError(f"{name}: {len(rest)} colons, where NAME:CONFIGURATION:SPLIT has two.")
    configuration = rest[0] if len(rest) == 2 else None
    return repository, configuration or None, rest[-1] if rest and rest[-1] else "train"
