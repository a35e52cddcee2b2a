"""A worker of Ray's: a process that opens what the work holds once, and does jobs.

It is a process of this user and imports this Whence: what it is sent is pickled, and it sends results alone.
"""

import contextlib
import gc
import logging
import os
import pickle  # of what this user's own process has sent
import socket
from dataclasses import dataclass
from typing import Any

import ray
import torch

import whence
from whence.errors import WhenceError
from whence.runner.jobs import done


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    result: Any
    done: tuple[int, int]
    """Examples and tokens, of the job alone."""
    refusal: tuple[str, str] | None = None
    """Name and message of an error that Whence raised on purpose."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class How:
    """How often a job is tried, and advice where memory runs out."""

    retries: int
    less_memory: str
    folder: str
    """The caller's working directory: a relative path means the same here."""


class Worker:
    """A process that does jobs, and is asked meanwhile how far it is."""

    def __init__(self):
        self.work: Any = None
        self.reference: Any = None
        """That the work is of."""
        self.done = (0, 0)

    def hello(self) -> tuple[str, str, int]:
        """Version of Whence, host, process."""
        return whence.__version__, socket.gethostname(), os.getpid()

    def progress(self) -> tuple[int, int, int]:
        """Examples and tokens of the job at hand, and the process."""
        examples, tokens = self.done
        return examples, tokens, os.getpid()

    def do(self, job: Any, pickled: list[Any], how: How) -> Outcome:
        """Do a job by the work that a reference is of; an error that Whence raises on purpose is an outcome."""
        self.done, heard = (0, 0), _Heard()

        def tick(examples: int, tokens: int) -> None:
            self.done = self.done[0] + examples, self.done[1] + tokens

        with contextlib.suppress(OSError):  # another machine need not have it
            os.chdir(how.folder)
        logging.getLogger("whence").addHandler(heard)
        try:
            if self.reference != pickled[0]:
                self.release()
                self.work, self.reference = pickle.loads(ray.get(pickled[0])), pickled[0]
            result = done(self.work, job, tick, retries=how.retries, less_memory=how.less_memory)
        except WhenceError as error:
            return Outcome(None, self.done, (type(error).__name__, str(error)), tuple(heard.messages))
        finally:
            logging.getLogger("whence").removeHandler(heard)
        return Outcome(result, self.done, warnings=tuple(heard.messages))

    def release(self) -> None:
        """Let go of the work, and of the model that it holds."""
        if self.reference is None:
            return
        self.work = self.reference = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class _Heard(logging.Handler):
    """Warnings of a job."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
