"""How a model is loaded, as arguments that every verb takes by the same names.

They are typed as keyword arguments (PEP 692), so that a verb hands them on as one group: `load_model(path, **loading)`.
"""

from pathlib import Path
from typing import Any, TypedDict


class Loading(TypedDict, total=False):
    """How a model is loaded: the arguments that every verb takes, by these names."""

    tokenizer: str | Path | None
    """Directory or Hub name of the tokenizer, where it is not with the model, or has moved."""
    chat_template: str | Path | None
    """A file with the chat template to use in place of the tokenizer's own, or the template's text."""
    date: str | None
    """Day that a chat template writes that writes the date, as YYYY-MM-DD; None: that of the model's
    training, if `whence train` wrote it, else today."""
    supervise: str | None
    """Which tokens of a row are supervised; see `corpus.templates.SUPERVISED`. None: those of the model's training, if
    `whence train` wrote it, else "assistant"."""
    device: str | None
    """cpu, cuda, ...; None takes a GPU if there is one."""
    device_map: str | None
    """auto spreads a large model over all devices (accelerate)."""
    trust_remote_code: bool
    """Let the model's repository run its own Python code."""


class IndexLoading(Loading, total=False):
    """How the model of an index is loaded."""

    model: str | None
    """The model's directory, where it has moved since the index was built."""
    preferences: str | None
    """What a row with two answers is, one of `corpus.preferences.PREFERENCES`: that of the index, or None."""


def split_loading(options: dict[str, Any]) -> tuple[Loading, dict[str, Any]]:
    """Options by name, parted into those of `Loading` and all others.

    >>> split_loading({"device": "cpu", "top": 3})
    ({'device': 'cpu'}, {'top': 3})
    """
    names = Loading.__annotations__
    loading: Any = {name: value for name, value in options.items() if name in names}
    return loading, {name: value for name, value in options.items() if name not in names}
