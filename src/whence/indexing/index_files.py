"""Which files an index has in its directory, and what else may not stand there when one is made or started over."""

import json
import re

from whence.errors import SettingError
from whence.indexing.manifest import MANIFEST
from whence.local_files import TEMPORARY
from whence.storage import Place

_INDEX_FILE = re.compile(
    re.escape(MANIFEST) + r"|corpus/part-[0-9]{5,}\.parquet|checkpoint-[0-9]{3,}/shard-[0-9]{5,}\.safetensors"
)


def refuse_other_files(place: Place) -> None:
    """Refuse a directory that holds files of other kinds than an index's, before anything in it is touched."""
    others = [name for name in place.names() if not is_index_file(name)]
    if others:
        raise SettingError(
            f"{place.root} is not empty and not an index's alone ({others[0]} is there). Nothing was changed; "
            "move that away, or give the index a directory of its own"
        )


def refuse_other_manifest(place: Place) -> None:
    """Refuse a `manifest.json` of another tool. A damaged one may be an index'."""
    if not place.exists(MANIFEST):
        return
    try:
        content = json.loads(place.read(MANIFEST))
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict) or not content.keys() & {"whence_version", "format_version"}:
        raise SettingError(
            f"{place.path(MANIFEST)} is not an index's. Nothing was changed; move it away, or give the index a "
            "directory of its own"
        )


def refuse_stray_files(place: Place) -> None:
    """Refuse complete files with an index's names where there is no index: no kill leaves such files."""
    strays = [name for name in place.names() if not name.endswith(TEMPORARY)]
    if strays:
        raise SettingError(
            f"{place.root} has files with an index's names, such as {strays[0]}, and no {MANIFEST}. Nothing was "
            "changed. Give the index a directory of its own, or, if they are what is left of one, add --restart"
        )


def is_index_file(name: str) -> bool:
    """Whether an index writes a file of this name, complete or half-written; such a file may be removed."""
    return _INDEX_FILE.fullmatch(name.removesuffix(TEMPORARY)) is not None
