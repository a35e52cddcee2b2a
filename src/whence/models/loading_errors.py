"""Errors of the libraries that load a model, as Whence's own: foreign files end in errors of any type."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from whence.errors import ModelError

FOREIGN = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError, pickle.UnpicklingError, SafetensorError),
    StrictDataclassError,  # a value of the wrong type in config.json
)
"""What transformers, peft and torch raise of files that are not as they expect; fuzzing found each."""


@contextmanager
def as_model_errors(path: str, files: str | None = None) -> Iterator[None]:
    """Turn the `FOREIGN` errors of loading a directory into a `ModelError` that names it.

    Args:
        path: The directory or Hub name, as the user gave it.
        files: Where its files are, if that is another place.
    """
    try:
        yield
    except FOREIGN as error:
        if method := quantisation(files or path):
            raise ModelError(
                f"{path}: a quantised model ({method}), which does not load here ({reason_of(error)}). Do what that "
                "asks for, or give the model as it was before it was quantised."
            ) from error
        raise ModelError(f"{path}: not loadable as a causal language model ({reason_of(error)})") from error


def quantisation(directory: str) -> str | None:
    """The method by which a directory's model is quantised; None if its configuration does not say that it is."""
    try:
        settings = json.loads((Path(directory) / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return str(settings.get("quant_method", "by an unnamed method")) if isinstance(settings, dict) else None


def reason_of(error: Exception) -> str:
    """What a library says, in one line; with the error's type where the words alone say little.

    >>> reason_of(KeyError("q")), reason_of(ValueError("no such size"))
    ("KeyError: 'q'", 'no such size')
    """
    text = " ".join(str(error).split())[:300]
    return (
        text if text and isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"
    )
