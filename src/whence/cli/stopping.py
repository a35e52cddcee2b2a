"""Signals that stop a command, answered alike: Ctrl-C, a scheduler's SIGTERM, and the SIGHUP of a closed terminal.

Nothing but the standard library is imported here, so that a command can be stopped in one line from its first moment:
its own imports take a third of a second, and torch's seconds.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MESSAGE = "stopped. What was finished is kept: the same command goes on from there."


class Stopped(KeyboardInterrupt):
    """A signal came.

    It is not `KeyboardInterrupt` itself: once that has passed through an `exec` or `eval` of text, which imports are
    full of, CPython ends the process by SIGINT at last, whatever the exit code.
    """


_received: list[int] = []
"""Signals that came to the command that runs now."""


def stop_if_asked() -> None:
    """Stop where a signal has come and some library, which catches whatever its imports raise, has passed over it.

    Raises:
        Stopped: It has.
    """
    if _received:
        raise Stopped


@contextmanager
def stoppable() -> Iterator[None]:
    """Let the first signal raise `Stopped`, said in one line with exit code 128 + signal; a second one ends at once.

    Signals that are ignored, as under nohup, or that have a handler already, stay so.
    """
    _received.clear()

    def interrupt(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped

    own = (signal.SIG_DFL, signal.default_int_handler)
    handlers = {number: handler for number in STOPPING if (handler := signal.getsignal(number)) in own}
    for number in handlers:
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        # without rich, as long as that is not imported
        complain = getattr(sys.modules.get("whence.cli.console"), "complain", _complain)
        complain(MESSAGE)
        sys.exit(128 + (_received or [signal.SIGINT])[0])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _received.clear()


def _complain(message: str) -> None:
    sys.stderr.write(f"error {message}\n")
