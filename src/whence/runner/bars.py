"""How far a job is: bars on stderr, a line a minute where that is no terminal, or a function of the caller's."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Column
from rich.text import Text

from whence.errors import SettingError

Tick = Callable[[int, int], None]
"""Called with how many things, and how many tokens, were done since the last call."""
ItemT = TypeVar("ItemT")
ProgressOption = bool | Callable[[int, int, str], Any]
"""How progress is shown: True for bars on stderr, False for none, or a function that is called with how many things are
done, how many there are, and what is being done; at the beginning of each phase, at its end, and up to ten times a
second between."""
PERIOD = 0.1
"""Seconds between two calls of such a function, as between two drawings of a bar."""
WIDE = 100
"""Columns of a terminal from which a bar has room for tokens/s too."""
PATIENCE = 1.0
"""Seconds after which a bar is worth while."""


class _Rate(ProgressColumn):
    """Things a second since the bar began, and tokens where they are counted and there is room."""

    def __init__(self, unit: str, *, has_room: bool):
        self.unit, self.has_room = unit, has_room
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        elapsed, done = task.elapsed or 0, task.completed - task.fields["before"]
        if elapsed < 0.5 or done <= 0:
            return Text("")
        tokens = task.fields["tokens"] if self.has_room else 0
        return Text(_rates(done, tokens, elapsed, self.unit))


def _rates(done: float | int, tokens: float | int, seconds: float, unit: str) -> str:
    """Things a second, and tokens a second where any were counted.

    >>> _rates(3, 0, 2.0, "mixtures"), _rates(3, 600, 2.0, "examples")
    ('1.5 mixtures/s', '1.5 examples/s, 300 tokens/s')
    """
    rate = done / seconds
    words = f"{rate:,.1f} {unit}/s" if rate >= 0.1 or not rate else f"{1 / rate:,.0f} s for one"
    return f"{words}, {tokens / seconds:,.0f} tokens/s" if tokens else words


def check_progress(option: Any) -> None:
    """Refuse what is no `ProgressOption`: a word would count as True.

    >>> check_progress("yes")
    Traceback (most recent call last):
    whence.errors.SettingError: progress is 'yes': True, False or a function of (done, total, words) is expected
    """
    if not isinstance(option, bool) and not callable(option):
        raise SettingError(f"progress is {option!r:.60}: True, False or a function of (done, total, words) is expected")


@contextlib.contextmanager
def progress(
    label: str, total: int, *, unit: str = "examples", done: int = 0, shown: ProgressOption = True
) -> Iterator[Tick]:
    """A bar on stderr with the rate and the time left, or one line per minute if stderr is no terminal.

    Args:
        label: What is being done.
        total: Things in all.
        unit: What they are, in the plural.
        done: Things done before this run; they do not count in the rates.
        shown: Whether to show a bar at all, or a function to call in its place.

    Raises:
        SettingError: `shown` is none of these.
    """
    check_progress(shown)
    console = Console(stderr=True)
    if callable(shown):
        yield _calling(shown, label, total, done)
    elif not shown:
        yield lambda count, tokens: None
    elif console.is_terminal:
        with _bar(console, unit, is_transient=False) as bar:
            yield _ticking(bar, label, total, done)
    else:
        yield _line_a_minute(label, total, done, unit)


def _calling(function: Callable[[int, int, str], Any], label: str, total: int, done: int) -> Tick:
    """A tick that calls a function now, at the end, and in between as often as a bar is drawn."""
    count, last = done, time.monotonic()
    function(count, total, label)

    def tick(more: int, tokens: int) -> None:
        nonlocal count, last
        count, now = count + more, time.monotonic()
        if more and (count >= total or now - last >= PERIOD):
            last = now
            function(count, total, label)

    return tick


def _bar(console: Console, unit: str, *, is_transient: bool) -> Progress:
    """A bar in one line, whatever the terminal's width: what has no room is cut."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        _Rate(unit, has_room=console.width >= WIDE),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
    )
    return Progress(*columns, console=console, expand=True, transient=is_transient)


def _ticking(bar: Progress, label: str, total: int, done: int) -> Tick:
    task = bar.add_task(label, total=total, completed=done, tokens=0, before=done)

    def tick(count: int, tokens: int) -> None:
        bar.update(task, advance=count, tokens=bar.tasks[task].fields["tokens"] + tokens)

    return tick


def _line_a_minute(label: str, total: int, done: int, unit: str, *, ends: bool = True) -> Tick:
    start = last = time.monotonic()
    count, tokens_done = done, 0

    def tick(more: int, tokens: int) -> None:
        nonlocal count, tokens_done, last
        count, tokens_done = count + more, tokens_done + tokens
        now = time.monotonic()
        if now - last < 60 and (count < total or not ends):
            return
        last, seconds = now, max(now - start, 1e-9)
        rate = (count - done) / seconds
        left = f"{(total - count) / rate:,.0f} s left" if count < total and rate > 0 else f"{now - start:,.0f} s"
        sys.stderr.write(f"{label}: {count:,}/{total:,}, {_rates(count - done, tokens_done, seconds, unit)}, {left}\n")

    return tick


# -- bars of what a command waits for


class _Waiting:
    """A spinner, which gives way to a bar once something that is counted takes longer than `PATIENCE`."""

    def __init__(self, spinner: Status, console: Console):
        self.spinner, self.console = spinner, console
        self.is_counting = False

    @contextlib.contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Tick]:
        """A tick whose bar begins when it is worth while."""
        if not self.console.is_terminal:
            yield _line_a_minute(label, total, 0, unit, ends=False)
            return
        start, count, bar = time.monotonic(), 0, _bar(self.console, unit, is_transient=True)
        shown: list[Tick] = []

        def tick(more: int, tokens: int) -> None:
            nonlocal count
            if shown:
                shown[0](more, tokens)
            elif (count := count + more) < total and time.monotonic() - start > PATIENCE:
                self.spinner.stop()
                bar.start()
                shown.append(_ticking(bar, label, total, 0))
                shown[0](count, tokens)

        try:
            yield tick
        finally:
            if shown:
                bar.stop()
                self.spinner.start()


class _Reporting:
    """A function in the place of bars."""

    def __init__(self, function: Callable[[int, int, str], Any]):
        self.function, self.is_counting = function, False

    @contextlib.contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Tick]:
        """A tick that calls it."""
        yield _calling(self.function, label, total, 0)


_WAITING: ContextVar[_Waiting | _Reporting | None] = ContextVar("waiting", default=None)


@contextlib.contextmanager
def waiting(words: str) -> Iterator[None]:
    """Turn a spinner on stderr; what is `counted` meanwhile shows a bar in its place."""
    console = Console(stderr=True)
    with console.status(words) as spinner:
        token = _WAITING.set(_Waiting(spinner, console))
        try:
            yield
        finally:
            _WAITING.reset(token)


@contextlib.contextmanager
def shown_as(progress: ProgressOption, words: str) -> Iterator[None]:
    """Show how far what is `counted` meanwhile is, as a call asks for it; with False as it is shown already, if at all.

    Args:
        progress: True for a spinner and bars on stderr, or a function to call.
        words: What is being done, beside the spinner.

    Raises:
        SettingError: `progress` is none of these.
    """
    check_progress(progress)
    if callable(progress):
        token = _WAITING.set(_Reporting(progress))
        try:
            yield
        finally:
            _WAITING.reset(token)
    elif progress:
        with waiting(words):
            yield
    else:
        yield


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Show nobody how far what is `counted` meanwhile is: it is not what they wait for."""
    token = _WAITING.set(None)
    try:
        yield
    finally:
        _WAITING.reset(token)


def counted(
    items: Iterable[ItemT], label: str, total: int, size: Callable[[ItemT], int], unit: str = "examples"
) -> Iterator[ItemT]:
    """The items; where a command waits, or a call asked for it (`shown_as`), a bar shows how far they are.

    Args:
        items: What is worked on between one and the next.
        label: What is being done.
        total: Sum of the sizes.
        size: How many things an item is.
        unit: What these are, in the plural.
    """
    with counting(label, total, unit) as tick:
        for item in items:
            yield item
            tick(size(item), 0)


@contextlib.contextmanager
def counting(label: str, total: int, unit: str = "examples") -> Iterator[Tick]:
    """A tick that moves the bar of `counted`, and nothing where no one waits or something else is being counted.

    Args:
        label: What is being done.
        total: Things in all.
        unit: What these are, in the plural.
    """
    waits = _WAITING.get()
    if waits is None or waits.is_counting:
        yield lambda count, tokens: None
        return
    waits.is_counting = True
    try:
        with waits.bar(label, total, unit) as tick:
            yield tick
    finally:
        waits.is_counting = False
