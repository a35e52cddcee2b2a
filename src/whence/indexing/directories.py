"""Check any directory that Whence writes: a pool, a run, the work of `recover` or `evaluate`, a merged model.

All of them say what they hold in the same way (`checksums`): JSON documents carry their own checksum, and other files
are recorded in one by size and checksum, wherever in the directory it stands. So every document below the directory is
read, and every file that one records. A file that no document records, such as one that an older Whence or another tool
wrote, is counted and not judged.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import PurePosixPath
from typing import Any

from whence.checksums import Written, document_of, is_sealed
from whence.errors import MissingIndexError
from whence.indexing.manifest import MANIFEST
from whence.indexing.verification import Problem
from whence.local_files import TEMPORARY
from whence.models.saved_files import LIST
from whence.models.training_state import RECORD
from whence.storage import Place

KINDS = {
    MANIFEST: "an index",
    "pool.json": "a pool",
    "bank.json": "a bank",
    "curvature.json": "curvature",
    RECORD: "a run",
    "table.json": "an evaluation",
}
"""What a directory is, by a file at its top."""
_RECORDS_OLD_FILES = ("pool.json", "grams")
"""Documents that recorded files before documents had a checksum of their own."""


@dataclass(frozen=True)
class Verified:
    """What was checked of a directory."""

    kind: str
    problems: list[Problem]
    checked: int
    """Files that were read and compared, the damaged ones included."""
    unchecked: list[str]
    """Files that no checksum is known of."""


def verified(path: str | PathLike) -> Verified:
    """Check every file below a directory that has a checksum.

    Raises:
        MissingIndexError: There is nothing that Whence wrote.
    """
    place = Place.at(path)
    names = [name for name in place.names() if not name.endswith(TEMPORARY)]
    recorded: dict[str, tuple[Written, str]] = {}
    problems, checked = [], 0
    unchecked = dict.fromkeys(names)
    for name in (name for name in names if name.endswith(".json")):
        data = place.read(name)
        is_old = not is_sealed(data)
        if is_old and not any(part in _RECORDS_OLD_FILES for part in PurePosixPath(name).parts):
            continue
        try:
            document = document_of(data)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(name, str(error)))
            document = {}
        if not is_old or not document:
            checked += 1
            unchecked.pop(name, None)
        recorded |= {file: (written, name) for file, written in _files_of(document, PurePosixPath(name))}
    for name, (written, _) in recorded.items():
        checked += 1
        unchecked.pop(name, None)
        if (what := place.defect(name, written)) is not None:
            problems.append(Problem(name, what))
    if not checked:
        none = " (nor has any of its files a checksum of Whence's)" if names else ""
        raise MissingIndexError(f"{MissingIndexError.at(place.root)}{none}")
    return Verified(_kind(names), sorted(problems, key=lambda problem: problem.file), checked, list(unchecked))


def _kind(names: list[str]) -> str:
    if kind := next((kind for name, kind in KINDS.items() if name in names), None):
        return kind
    if any(name.endswith("evidence.json") for name in names):
        return "recover's work"
    return "a model" if LIST in names else "a directory"


def _files_of(value: Any, document: PurePosixPath) -> Iterator[tuple[str, Written]]:
    """Files that a document records, whose names count from its own directory."""
    if isinstance(value, list):
        for item in value:
            yield from _files_of(item, document)
    if not isinstance(value, dict):
        return
    size, sha256, xxh3 = value.get("bytes"), value.get("sha256"), value.get("xxh3")
    if isinstance(size, int) and (sha256 or xxh3):
        file = value.get("file") or f"{document.stem}.safetensors"  # of input matrices by an older Whence
        if not all(isinstance(text, str | None) for text in (file, sha256, xxh3)):
            return  # its use says what is wrong with it
        yield str(document.parent / file), Written(size, sha256, xxh3)
        return
    for item in value.values():
        yield from _files_of(item, document)


def remedy(root: str, problem: Problem) -> str:
    """How a problem of such a directory is mended, a sentence with the command."""
    file, parts = PurePosixPath(problem.file), PurePosixPath(problem.file).parts
    full = shlex.quote(f"{root}/{problem.file}")
    checkpoint = next((n for n, part in enumerate(parts) if part.startswith("checkpoint-")), None)
    if problem.is_forbidden:
        return f"chmod u+r {full}, as the user who owns it, then run the same command again"
    if checkpoint is not None:
        folder = shlex.quote("/".join((root, *parts[: checkpoint + 1])))
        return f"rm -r {folder}, then run the training's command again: it goes on from the checkpoint before"
    if file.name in (RECORD, "pool.json", "bank.json", "bank_rows.parquet") or parts[0] == "queries":
        return f"restore {full} from a copy: it alone says how this was made"
    if file.name in ("evidence.json", "table.json"):
        return f"rm -r {shlex.quote(str(PurePosixPath(root) / file.parent))}, then run the same command again"
    if parts[0] == "members" and len(parts) > 2:
        folder = shlex.quote("/".join((root, *parts[:2])))
        return f"rm -r {folder}, then run whence bank again: it trains that member anew"
    if file.parent.name == "members":
        return f"rm {full}, then run whence pool train again: it trains that member anew"
    return f"rm {full}, then run the command that made it again: it makes the file anew"
