"""Calls to an object store, again where its network or its load failed one.

What a store refuses for good (no such object, no permission, a condition that does not hold) is raised at once, and so
is what this client lacks, such as credentials. Everything else is tried `TRIES` times, `FIRST` seconds after one
another and twice as long each time.
"""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

TRIES = 4
"""Beside those that the store's own client makes."""
FIRST = 0.5
ResultT = TypeVar("ResultT")
FINAL = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    NotImplementedError,
)
CLIENTS = ("aiohttp", "aiobotocore", "asyncio", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3")
"""Packages whose errors are of the network, or of the service's answer."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What the disk here refuses."""
LACKING = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError")


def persistent(call: Callable[[], ResultT], what: str) -> ResultT:
    """The result of a call, which may fail for a while.

    Args:
        call: Idempotent.
        what: What it does, for a warning.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as error:
            if attempt == TRIES - 1 or not is_passing(error):
                raise
            if attempt:
                logger.warning("%s failed (%s); trying again", what, str(error)[:200] or type(error).__name__)
            time.sleep(FIRST * 2**attempt)
    raise AssertionError("not reached")


def is_passing(error: BaseException) -> bool:
    """Whether the same call may go well later.

    >>> is_passing(OSError("503 Slow Down")), is_passing(FileNotFoundError()), is_passing(KeyError("x"))
    (True, False, False)
    """
    is_final = isinstance(error, FINAL) or getattr(error, "errno", None) in DISK
    if is_final or type(error).__name__ in LACKING or is_unmet(error) or is_unsupported(error):
        return False
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | EOFError | TimeoutError) or package in CLIENTS


def is_unmet(error: BaseException) -> bool:
    """Whether a store says that the condition of a put does not hold."""
    return isinstance(error, FileExistsError) or _answer(error) in (412, "PreconditionFailed")


def is_unsupported(error: BaseException) -> bool:
    """Whether a store, or its client, has no puts on a condition."""
    is_said = isinstance(error, NotImplementedError | TypeError) or getattr(error, "errno", None) == errno.ENOSYS
    return is_said or _answer(error) in (501, "NotImplemented")


def _answer(error: BaseException) -> int | str | None:
    """Status of the answer that an error was made of, or the code in it."""
    answer = getattr(error.__cause__, "response", None) or {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if status in (412, 501) else answer.get("Error", {}).get("Code")
