"""How every verb prints: results to stdout, progress and messages to stderr."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from whence.reports.text import BIDI, one_line, visible

_UNSEEN = re.compile(f"[\x7f-\x9f{''.join(sorted(BIDI))}]")
"""Characters that JSON need not escape."""


def complain(message: str) -> None:
    """Print an error to stderr, in one line."""
    Console(stderr=True, soft_wrap=True).print("[bold red]error[/]", end=" ")
    sys.stderr.write(one_line(message) + "\n")


def print_json(document: dict[str, Any]) -> None:
    """Print one document to stdout; a number that is not finite becomes null, for JSON has none."""
    from whence.reports.files import finite

    text = json.dumps(finite(document), ensure_ascii=False, indent=1, default=str, allow_nan=False)
    sys.stdout.write(json_without_controls(text) + "\n")


def json_without_controls(text: str) -> str:
    r"""The same JSON, with escapes for characters that move a terminal's cursor or change the order of others.

    >>> json_without_controls('["\u202e"]')
    '["\\u202e"]'
    """
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def print_part(part: Any, *, err: bool = False) -> None:
    """Print a table, or a line as it stands, for its paths and commands are copied."""
    shown = visible(part) if isinstance(part, str) else _Visible(part)
    Console(stderr=err).print(shown, markup=False, highlight=False, soft_wrap=isinstance(part, str))


@dataclass(frozen=True)
class _Visible:
    """A table whose cells, such as names of files, have no control characters."""

    part: Any

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.part, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


@contextlib.contextmanager
def waiting(words: str) -> Iterator[None]:
    """Turn a spinner on stderr while imports and loading keep a person waiting."""
    with Console(stderr=True).status(words):
        yield
