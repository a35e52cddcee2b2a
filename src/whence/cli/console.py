"""How every verb prints: results to stdout, progress and messages to stderr."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console


def complain(message: str) -> None:
    """Print an error to stderr."""
    Console(stderr=True, soft_wrap=True).print("[bold red]error[/]", end=" ")
    sys.stderr.write(message + "\n")


def print_json(document: dict[str, Any]) -> None:
    """Print one document to stdout; a number that is not finite becomes null, for JSON has none."""
    from whence.reports.files import finite

    text = json.dumps(finite(document), ensure_ascii=False, indent=1, default=str, allow_nan=False)
    sys.stdout.write(text + "\n")


def print_part(part: Any, *, err: bool = False) -> None:
    """Print a table, or a line as it stands, for its paths and commands are copied."""
    Console(stderr=err).print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


@contextlib.contextmanager
def waiting(words: str) -> Iterator[None]:
    """Turn a spinner on stderr while imports and loading keep a person waiting."""
    with Console(stderr=True).status(words):
        yield
