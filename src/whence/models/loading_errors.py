"""Errors of the libraries that load a model, as Whence's own: foreign files end in errors of any type."""

from collections.abc import Iterator
from contextlib import contextmanager

from whence.errors import ModelError, WhenceError


@contextmanager
def as_model_errors(path: str) -> Iterator[None]:
    """Turn whatever transformers, peft or torch raise while they load a directory into a `ModelError` that names it."""
    try:
        yield
    except (WhenceError, MemoryError):
        raise
    except Exception as error:
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
