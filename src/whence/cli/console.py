"""What the verbs share: how they print, and the options that several have."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, to stdout.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU where there is one.")]
DeviceMap = Annotated[str | None, typer.Option(help="auto: spread a large model over all devices.")]
Tokenizer = Annotated[str | None, typer.Option(help="Where to find the tokenizer, if not with the model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let a model repository run its own code.")]


def complain(message: str) -> None:
    """An error, to stderr."""
    Console(stderr=True, soft_wrap=True).print("[bold red]error[/]", end=" ")
    sys.stderr.write(message + "\n")


def print_json(document: dict[str, Any]) -> None:
    """One document, to stdout; a number that is not finite becomes null, for JSON has none."""
    from whence.reports.tables import finite

    text = json.dumps(finite(document), ensure_ascii=False, indent=1, default=str, allow_nan=False)
    sys.stdout.write(text + "\n")


def print_part(part: Any, *, err: bool = False) -> None:
    """A table, or a line: as it stands, for its paths and commands are copied."""
    Console(stderr=err).print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


@contextlib.contextmanager
def waiting(words: str) -> Iterator[None]:
    """A spinner on stderr while imports and loading keep a person waiting."""
    with Console(stderr=True).status(words):
        yield
