"""A command of `whence` in this process, watched: how it ended, how long it took, and what reached the terminal.

    ok          exit code 0
    refused     another exit code, with one message
    traceback   an error that nobody foresaw, also where the command line caught it as `unexpected`
    hang        no end within the time
    long        the same, where the command was asked for that much work

`controls` counts control characters on stdout and stderr, `lines` the lines of stderr that are no message's first.
"""

import contextlib
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when its library is imported: strange names are not asked for
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MESSAGE = re.compile(
    r"error |WARNING |ERROR |INFO |.*: [\d,]+/[\d,]+, |\d\. [A-Z]|   |\d+ s in all|.*\|.*\[|"
    r".* seed \d+ .*: [\d.]+$|\s*$"
)
"""How a line of stderr begins: a message, or a progress line of a command without a terminal."""
BAR = re.compile(r"\r? {0,3}\d{1,3}%\|[^\r\n]*")
"""A bar of the Trainer's, drawn over itself."""
UNEXPECTED = "error unexpected "
WIDTH = 100_000
"""Columns of the terminal: so wide that a line is broken only where the message has a line break."""


@dataclass(frozen=True)
class Ending:
    """How a call ended."""

    outcome: str
    text: str
    """The message of a refusal, or where a traceback comes from."""
    controls: int = 0
    lines: int = 0

    @property
    def is_fault(self) -> bool:
        """Whether it is one of what must not be."""
        return self.outcome in ("traceback", "hang") or self.controls > 0 or self.lines > 0


class HangError(BaseException):
    """The time is over."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `HangError` after some seconds; what hangs outside of Python is not ended."""

    def ring(number: int, frame: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def watched(call: Callable[[], Any], *, seconds: float = 20) -> Ending:
    """Call what prints and leaves by `SystemExit`, as the command line does."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "replace", write_through=True) for _ in range(2))
    outcome, place = "ok", ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit(seconds):
            call()
    except SystemExit as left:
        outcome = "refused" if left.code else "ok"
    except HangError as error:
        outcome, place = "hang", _place(error)
    except Exception as error:  # what nobody foresaw is what this looks for
        outcome, place = "traceback", f"{_place(error)}: {error!r}"
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    printed = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]
    printed = [BAR.sub("", text) for text in printed]
    lines = printed[1].splitlines()
    message = next((line for line in lines if line.startswith("error ")), "")
    if message.startswith(UNEXPECTED):
        outcome = "traceback"
    extra = [line for line in lines if not MESSAGE.match(line)]
    found = [text for text in printed if CONTROLS.search(text)]
    text = place or message or " ".join(printed[0].split()) * (outcome == "refused")
    if found or extra:
        text += f" | {(extra or found)[0][:300]!r}"
    return Ending(outcome, text[:900], sum(len(CONTROLS.findall(text)) for text in found), len(extra))


def whence(*words: Any, seconds: float = 20) -> Ending:
    """Run a command with these words."""
    from whence.cli.app import main

    sys.argv = ["whence", *map(str, words)]
    return watched(main, seconds=seconds)


def _place(error: BaseException) -> str:
    """Where an error comes from: the last lines of Whence's own, and the very last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/whence/" in frame.filename]
    chosen = dict.fromkeys(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [*own[-2:], *frames[-1:]])
    return " < ".join(reversed(chosen))
