"""Errors of the libraries that load a model, as Whence's own: foreign files end in errors of any type."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

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
def as_model_errors(path: str) -> Iterator[None]:
    """Turn the `FOREIGN` errors of loading a directory into a `ModelError` that names it."""
    try:
        yield
    except FOREIGN as error:
        raise ModelError(f"{path}: not loadable as a causal language model ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """What a library says, in one line; with the error's type where the words alone say little.

    >>> reason_of(KeyError("q")), reason_of(ValueError("no such size"))
    ("KeyError: 'q'", 'no such size')
    """
    text = " ".join(str(error).split())[:300]
    return (
        text if text and isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"
    )
