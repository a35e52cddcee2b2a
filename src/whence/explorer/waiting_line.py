"""One model, many viewers: requests that need the model wait in a line, each sees its place, and any may leave.

Requests run one after another in a thread of their own, in the order in which they came. Each tells events while it
waits (its place) and while it runs; the last event is None. One that has left is skipped, or stopped at the next event
that it tells. One that gives way is served when no other waits, and begins anew after one that came meanwhile. One that
is long (a replay, a pass over all rows) lets the others through each time that it says how far it is, and goes on:
between two batches a model is free. Others that are long, or give way, wait for its end.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from whence.errors import WhenceError
from whence.runner import unwatched

logger = logging.getLogger(__name__)

Event = dict[str, Any]
"""What a page is told, as JSON, with its `type`."""
FAILED = "This question could not be answered; the server's log says why."
MOST = 100
"""Requests that may wait."""


class LineFullError(WhenceError):
    """Too many requests wait already."""


class LeftError(Exception):
    """Nobody waits for the request's result any more."""


class GivesWayError(Exception):
    """Another request is to be served first."""


@dataclass(eq=False)
class Request:
    """One request in the line."""

    work: Callable[["Request"], None]
    emit: Callable[[Event | None], None]
    gives_way: bool = False
    is_long: bool = False
    others_wait: Callable[[], bool] = lambda: False
    """Whether there is one that does not give way."""
    let_through: Callable[[], None] = lambda: None
    """Serve those that wait and are short."""
    has_left: threading.Event = field(default_factory=threading.Event)
    place: int | None = None
    """How many are served before it, as it was told last."""

    def tell(self, kind: str, **event: Any) -> None:
        """Tell an event.

        Raises:
            LeftError: The request is to stop.
        """
        self.check()
        self.emit({"type": kind, **event})

    def tell_place(self, place: int) -> None:
        """Tell its place in the line where that has changed."""
        if place != self.place:
            self.place = place
            self.emit({"type": "queue", "position": place})

    def check(self) -> None:
        """Stop if nobody waits any more.

        Raises:
            LeftError: The request is to stop.
            GivesWayError: It is to begin anew later.
        """
        if self.has_left.is_set():
            raise LeftError
        if self.gives_way and self.others_wait():
            raise GivesWayError

    def progress(self, done: int, total: int, what: str) -> None:
        """Tell how far a job is: a `runner.ProgressOption`. One that is long lets others through."""
        self.tell("progress", done=done, total=total, what=what)
        if self.is_long:
            self.let_through()


class Line:
    """Requests that wait for the model, and the thread that serves them."""

    def __init__(self, most: int = MOST):
        self.most = most
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._running: list[Request] = []
        """What runs: the one whose turn it is, and one that is served in its midst."""
        self._is_open = True
        self._thread = threading.Thread(target=self._serve, name="whence-explorer", daemon=True)
        self._thread.start()

    def enter(
        self,
        work: Callable[[Request], None],
        emit: Callable[[Event | None], None],
        *,
        gives_way: bool = False,
        is_long: bool = False,
    ) -> Request:
        """Join the line; `emit` is called from its thread.

        Args:
            work: What the request is; it tells events by the request that it is given.
            emit: Told each event.
            gives_way: Whether it is stopped where others wait, and begins anew.
            is_long: Whether others are served in its midst.

        Raises:
            LineFullError: It is full.
        """
        request = Request(work, emit, gives_way, is_long, self._others_wait, self._let_through)
        with self._changed:
            if len(self._waiting) >= self.most or not self._is_open:
                raise LineFullError(f"{len(self._waiting)} questions wait already: ask again in a while")
            self._join(request)
            self._tell_places()
            self._changed.notify_all()
        return request

    def leave(self, request: Request) -> None:
        """Leave the line, or stop what runs; of no effect on a request that is done."""
        request.has_left.set()
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                self._tell_places()

    def close(self) -> None:
        """Serve no more, and wait for what runs to stop."""
        with self._changed:
            self._is_open = False
            for request in (*self._waiting, *self._running):
                request.has_left.set()
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()

    def _join(self, request: Request) -> None:
        """Put a request at its place: one that gives way behind all others, and those before such."""
        first = next((place for place, other in enumerate(self._waiting) if other.gives_way), len(self._waiting))
        self._waiting.insert(len(self._waiting) if request.gives_way else first, request)

    def _others_wait(self) -> bool:
        return any(not request.gives_way for request in tuple(self._waiting))

    def _tell_places(self) -> None:
        for place, request in enumerate(self._waiting, start=1 if self._running else 0):
            request.tell_place(place)

    def _serve(self) -> None:
        while (request := self._next()) is not None:
            self._run(request)

    def _run(self, request: Request) -> None:
        """Serve a request to its end, or until it gives way."""
        try:
            request.check()
            request.work(request)
        except GivesWayError:  # it is not over
            with self._changed:
                if self._is_open:
                    self._join(request)
                    return
        except LeftError:
            pass
        except WhenceError as error:
            request.emit({"type": "error", "error": str(error)})
        except Exception:  # one question must not end the others'
            logger.exception("A question could not be answered")
            request.emit({"type": "error", "error": FAILED})
        request.emit(None)

    def _let_through(self) -> None:
        """Serve the short requests that wait now, in the midst of the long one that runs; later ones the next time."""
        for request in [other for other in tuple(self._waiting) if not (other.gives_way or other.is_long)]:
            with self._changed:
                if request not in self._waiting:
                    continue  # it has left
                self._waiting.remove(request)
                self._running.append(request)
                request.tell_place(0)
                self._tell_places()
            try:
                with unwatched():  # whoever waits for the long one is told of it alone
                    self._run(request)
            finally:
                with self._changed:
                    self._running.remove(request)
            self._running[0].check()

    def _next(self) -> Request | None:
        with self._changed:
            self._running = []
            self._tell_places()
            self._changed.wait_for(lambda: bool(self._waiting) or not self._is_open)
            if not self._is_open:
                return None
            request = self._waiting.popleft()
            self._running = [request]
            request.tell_place(0)
            self._tell_places()
            return request
