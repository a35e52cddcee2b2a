"""A directory that is of some settings, and refuses work of others."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from whence.errors import WhenceError
from whence.records import read_record
from whence.storage import Place


def claim_directory(
    place: Place, file: str, settings: Mapping[str, Any], refusal: Callable[[str], WhenceError]
) -> None:
    """Mark a directory as of these settings; refuse one of others.

    Args:
        place: The directory; made where there is none.
        file: Name of the JSON file in it that keeps the settings.
        settings: What all its other files depend on, as JSON has it.
        refusal: The error to raise, from the first setting that differs: "seed (there 0, here 1)".
    """
    if not place.exists(file):
        place.write_document(file, settings)
        return
    remedy = f"Remove {place.root}, and run the same command again."
    stored = read_record(dict[str, Any], place.read(file), place.path(file), remedy)
    for name in {**settings, **stored}:
        if stored.get(name) != settings.get(name):
            raise refusal(f"{name} (there {_shortened(stored.get(name))}, here {_shortened(settings.get(name))})")


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
