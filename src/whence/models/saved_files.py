"""The files of a saved model or of a run, with their checksums: `whence_checksums.json` beside them.

`whence train` writes the list into every checkpoint when that is whole, and beside the checkpoints when the training is
done. Whoever reads a listed file checks it first, once in a process. A directory without a list, such as another tool's
or an older Whence's, is read as it stands.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypedDict

from whence.checksums import Written, digest
from whence.errors import ChecksumError
from whence.local_files import TEMPORARY, remove_directory, temporary_directory, write_whole
from whence.records import read_record
from whence.storage import FileEntry, Place

LIST = "whence_checksums.json"
OF_TRAINING = ("optimizer.", "scheduler.", "rng_state", "training_args.", "trainer_state.", "in_run.", "online_mixing.",
               "replay_steps.")  # fmt: skip
"""Beginnings of the names of files that training reads, and loading a model does not."""
_READ_BYTES = 1 << 22


def list_files(directory: str | Path, *, but: str = "") -> None:
    """Write the list of the files of a directory, without those in its folders and the one named `but`."""
    entries = []
    for file in sorted(Path(directory).iterdir()):
        if file.is_file() and file.name not in (LIST, but) and not file.name.endswith(TEMPORARY):
            entries.append({"file": file.name, "bytes": file.stat().st_size, "xxh3": _digest(file)})
    Place.at(directory).write_document(LIST, {"files": entries})


class _Listed(TypedDict):
    files: list[FileEntry]


def forget_files(directory: str | Path) -> None:
    """Remove the list of a directory, whose files are about to change."""
    (Path(directory) / LIST).unlink(missing_ok=True)


def check_listed(
    directory: str | Path, *, remedy: str | None = None, which: Callable[[str], bool] | None = None
) -> None:
    """Refuse a directory whose listed files, or those of them that are about to be read, are not as they were written.

    Args:
        directory: A directory of this machine; one without a list passes.
        remedy: How to mend it, a sentence.
        which: Whether a file of this name is about to be read; None: all are.

    Raises:
        ChecksumError: A file or the list itself is damaged.
    """
    place = Place.at(directory)
    if not (Path(directory) / LIST).is_file():
        return
    advice = remedy or f"Copy {directory} again from where it is whole, or train it again."
    for entry in read_record(_Listed, place.read(LIST), place.path(LIST), advice)["files"]:
        if which is None or which(entry["file"]):
            mended = f"{advice} If you changed it yourself, remove {LIST} there."
            place.check(entry["file"], Written(entry["bytes"], None, entry["xxh3"]), mended)


def listed_files(directory: str | Path) -> list[str]:
    """Names of the files that a directory's list has, each of which is checked; none without a list.

    Raises:
        ChecksumError: A file or the list itself is damaged, or was changed.
    """
    names: list[str] = []
    check_listed(directory, which=lambda name: not names.append(name))
    return names


def store_directory(directory: Path, place: Place, name: str) -> None:
    """Copy the listed files of a directory into a directory of a store, the list last."""
    for file in (*listed_files(directory), LIST):
        path = directory / file
        with path.open("rb") as opened:
            pieces = iter(partial(opened.read, _READ_BYTES), b"")
            place.write(f"{name}/{file}", pieces, total=path.stat().st_size)


def directory_here(place: Place, name: str, remedy: str) -> Path:
    """Where a directory of a place is on this machine's disk; one of a store has a list, and its files are copied.

    Args:
        place: The directory that it is in.
        name: Its name there.
        remedy: How to mend it, a sentence.

    Raises:
        ChecksumError: A file, or the list, is missing in the store, or has other bytes.
        StorageError: There is no room for a copy.
    """
    if place.is_local:
        return Path(place.path(name))
    remote, target = place.below(name), place.scratch / name
    try:
        data = remote.read(LIST)
    except FileNotFoundError:
        raise ChecksumError(f"{remote.path(LIST)} is not what was written (missing). {remedy}") from None
    if (target / LIST).is_file() and (target / LIST).read_bytes() == data:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_directory(target.parent, "copy-") as folder:  # another process may copy it too, or read a copy
        draft = Path(folder) / "files"
        draft.mkdir()
        for entry in read_record(_Listed, data, remote.path(LIST), remedy)["files"]:
            copy = remote.here(entry["file"], Written(entry["bytes"], None, entry["xxh3"]), remedy)
            _link(copy, draft / entry["file"])
        write_whole(draft / LIST, [data])
        with suppress(FileNotFoundError):
            target.rename(Path(folder) / "before")
        with suppress(OSError):  # the other was faster
            draft.rename(target)
    return target


def forget_copy(place: Place, name: str) -> None:
    """Remove this machine's copy of a directory of a store."""
    if not place.is_local:
        remove_directory(place.scratch / name)


def _link(file: Path, name: Path) -> None:
    """Another name for a file, or a copy where the disk has no such thing."""
    try:
        name.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, name)


def check_model_files(directory: str | Path) -> None:
    """Refuse a model whose weights, configuration or tokenizer are not as they were written; see `check_listed`."""
    check_listed(directory, which=lambda name: not name.startswith(OF_TRAINING))


def check_file(file: Path) -> None:
    """Refuse one damaged file of a listed directory; see `check_listed`."""
    check_listed(file.parent, which=lambda name: name == file.name)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return digest(iter(lambda: stream.read(_READ_BYTES), b""))
