"""One thread at a time goes through a model, in the whole process; others wait for their turn.

A pass writes into what all threads share: hooks and a decoder's stub are set on the module, random numbers, the default
dtype and the choice of deterministic algorithms are torch's, truncation is a fast tokenizer's, and an index keeps one
checkpoint loaded. So there is one lock for all models, also for two indexes that share one. A thread may take it
again, so that a function that makes many passes can keep its turn between them: no other then swaps the checkpoint.

Passes use all cores already, so that little time is lost. Scans of vectors share nothing and take no turns. A module
that is run by other code than Whence's meanwhile is not protected.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

TURN = threading.RLock()

Parameters = ParamSpec("Parameters")
ResultT = TypeVar("ResultT")


def one_at_a_time(function: Callable[Parameters, ResultT]) -> Callable[Parameters, ResultT]:
    """The function, to be called by one thread at a time. It must not be a generator, which would return at once."""

    @wraps(function)
    def in_turn(*args: Parameters.args, **kwargs: Parameters.kwargs) -> ResultT:
        with TURN:
            return function(*args, **kwargs)

    return in_turn
