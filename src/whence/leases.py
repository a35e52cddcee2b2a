"""A lease on a directory of an object store: one writer at a time, where nothing can be locked.

The lease is an object in the directory, which says who holds it and until when. Its holder renews it from a thread, and
removes it in the end. One that has run out, or whose process on this machine is gone, is taken over. It is made on the
condition that there is none where the store has such puts (S3, Google's and others); elsewhere, and whenever one is
taken over, it is read again after `SETTLED` seconds: of several that take it over at once, the last one has it.

A holder that was cut off for as long as the lease lasts has lost it, and must write no more: `require` says so.

Source: leases are of Gray and Cheriton 1989, https://doi.org/10.1145/74850.74870.
"""

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whence.errors import ManifestMismatchError
from whence.remote_calls import is_passing, is_unmet, is_unsupported, persistent

NAME = "whence.lease"
"""Of the object, within the directory."""
LASTS = 60.0
RENEWED = 15.0
SETTLED = 1.0
SKEW = 10.0
"""Seconds by which clocks of two machines may differ."""


@dataclass(frozen=True)
class _Holder:
    """Who has a lease."""

    token: str
    host: str
    process: int
    space: str
    """The machine since it began, and the space in which processes have their numbers: containers may share a name."""
    started: str
    """When the process began, in ticks since the machine did: its number is used again."""
    expires: float
    """Seconds since 1970."""

    @staticmethod
    def this(token: str) -> "_Holder":
        number = os.getpid()
        return _Holder(token, socket.gethostname(), number, _space(), _started(number), time.time() + LASTS)

    @property
    def is_over(self) -> bool:
        """Whether another may take the lease."""
        is_here = self.host == socket.gethostname() and self.space == _space() and bool(self.space and self.started)
        return self.expires + SKEW < time.time() or (is_here and _started(self.process) != self.started)


def _started(process: int) -> str:
    """When a process of this machine began; empty where there is none, or where it cannot be told."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _space() -> str:
    """What the number of a process belongs to; empty where it cannot be told."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


@dataclass
class Lease:
    """A lease, held from `take` to `release`."""

    fs: Any
    root: str
    """The directory's address."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    _renewed: float = 0.0
    _is_lost: bool = False
    _why: str = ""
    """What a renewal was refused with."""
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def _path(self) -> str:
        return f"{self.root}/{NAME}"

    def take(self) -> None:
        """Take the lease.

        Raises:
            ManifestMismatchError: Another process has it.
        """
        for _ in range(3):
            if self._create():
                break
            other = self._read()
            if other is None:  # released meanwhile
                continue
            if not other.is_over:
                raise ManifestMismatchError(self._refusal(other))
            with suppress(FileNotFoundError):
                persistent(lambda: self.fs.rm_file(self._path), f"removing {self._path}")
            if self._create():
                time.sleep(SETTLED)
                break
        if (holder := self._read()) is None or holder.token != self.token:
            raise ManifestMismatchError(self._refusal(holder))
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._renewing, name="whence lease", daemon=True)
        self._thread.start()

    def require(self, *, asks: bool = False) -> None:
        """Refuse to go on where the lease is lost.

        Args:
            asks: Ask the store, too.

        Raises:
            ManifestMismatchError: It is.
        """
        if asks and not self._is_lost:
            holder = self._read()
            self._is_lost = holder is None or holder.token != self.token
        if self._is_lost or time.monotonic() - self._renewed > LASTS:
            why = self._why or f"it was cut off for more than {LASTS:.0f} seconds, or another one has taken it over"
            raise ManifestMismatchError(
                f"{self.root}: this process has lost its lease, {NAME} ({why}). Another one may be writing there, so "
                "that nothing more was written. Run the same command again: it goes on from what is listed"
            )

    def release(self) -> None:
        """Give the lease back."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(LASTS)  # what it is writing would come after the removal
        with suppress(Exception):  # it runs out by itself
            if (holder := self._read()) is not None and holder.token == self.token:
                persistent(lambda: self.fs.rm_file(self._path), f"removing {self._path}")

    def _refusal(self, holder: _Holder | None) -> str:
        who = "" if holder is None else f" (process {holder.process} of {holder.host})"
        return (
            f"Another process is writing {self.root}{who}; wait for it or stop it, then retry. Its lease, {NAME}, runs "
            f"out {LASTS + SKEW:.0f} seconds after it stops"
        )

    def _create(self) -> bool:
        """Make the lease if there is none; whether it was made, as far as this store can tell."""
        data = json.dumps(asdict(_Holder.this(self.token))).encode()
        if self._read() is not None:  # a store may take no notice of a condition
            return False
        try:
            persistent(lambda: self.fs.makedirs(self.root, exist_ok=True), f"making {self.root}")
            persistent(lambda: self.fs.pipe_file(self._path, data, mode="create"), f"writing {self._path}")
            return True
        except Exception as error:
            if is_unmet(error):
                holder = self._read()  # a try that failed may have written it
                return holder is not None and holder.token == self.token
            if not is_unsupported(error):
                raise
            persistent(lambda: self.fs.pipe_file(self._path, data), f"writing {self._path}")
            time.sleep(SETTLED)
            return True

    def _read(self) -> _Holder | None:
        try:
            data = persistent(lambda: self.fs.cat_file(self._path), f"reading {self._path}")
        except FileNotFoundError:
            return None
        try:
            return _Holder(**json.loads(data))
        except (ValueError, TypeError):  # not one of ours
            return _Holder("", "", 0, "", "", 0.0)

    def _renewing(self) -> None:
        while not self._end.wait(RENEWED):
            try:
                holder = self._read()
                if holder is None or holder.token != self.token:
                    self._is_lost = True
                    return
                data = json.dumps(asdict(_Holder.this(self.token))).encode()
                if self._end.is_set():
                    return
                self.fs.pipe_file(self._path, data)
                self._renewed = time.monotonic()
            except Exception as error:
                if not is_passing(error):
                    self._why, self._is_lost = f"it could not be renewed: {str(error)[:200]}", True
                    return
