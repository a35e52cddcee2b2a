"""How every verb prints: results to stdout, progress and messages to stderr."""

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.text import Text

from whence.cli.stopping import stop_if_asked
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
    Console(stderr=err).print(shown, markup=False, highlight=False, crop=False, soft_wrap=isinstance(part, str))


def print_marked(part: Any, *, err: bool = False) -> None:
    """Print text with rich's marks, or a table."""
    Console(stderr=err).print(_Visible(part))


def print_ending(answer: str, *command: object) -> None:
    """Print the last line of a verb: the answer to its own question, and the command that goes on from there.

    No width breaks it, since the command is copied; with `--json` a verb has no such line.

    Args:
        answer: A sentence, with its full stop.
        command: Words of the command, as a shell would hand them over; in capitals what the user has yet to name.
    """
    words = " ".join(quoted(str(word)) for word in command)
    line = Text.assemble(one_line(answer), (" Next: ", "bold"), one_line(words))
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


def again(*more: object) -> tuple[object, ...]:
    """The command that runs now, with flags in addition; of a flag given twice the last one holds."""
    return ("whence", *sys.argv[1:], *more)


def quoted(word: str) -> str:
    r"""A word for the shell, in one line: control characters are escaped as bash, zsh and ksh read them.

    >>> quoted("a b"), quoted("it's\nso")
    ("'a b'", "$'it\\'s\\nso'")
    """
    if visible(word) == word and not {"\n", "\t"} & {*word}:
        return shlex.quote(word)
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"}
    shown = (escapes.get(char, char if visible(char) == char else f"\\u{ord(char):04x}") for char in word)
    return f"$'{''.join(shown)}'"


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
    stop_if_asked()


@contextlib.contextmanager
def working(words: str) -> Iterator[None]:
    """The same while the library works, which shows a bar in its place where it counts."""
    from whence.runner import waiting as counting  # with torch

    with counting(words):
        yield
    stop_if_asked()
