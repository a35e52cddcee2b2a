"""Writing an object of S3 on the condition that it is still what this process last read or wrote.

What makes other files count, such as a manifest, is written so: of two writers the second is refused, lease or none.

Source: conditional writes, https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html.
"""

import hashlib
from typing import Any

from whence.errors import ManifestMismatchError
from whence.remote_calls import is_unmet, is_unsupported, persistent

_tags: dict[str, str] = {}
"""Of objects, by address, as this process last saw them."""


def has_conditions(fs: Any) -> bool:
    """Whether a store writes an object on the condition that it is still a certain version."""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "s3" in protocols


def see(fs: Any, path: str) -> None:
    """Remember the version of an object.

    Raises:
        FileNotFoundError: There is none, which is remembered too.
    """
    forget(path)
    _tags[path] = persistent(lambda: fs.info(path), f"reading {path}")["ETag"]


def forget(path: str) -> None:
    """Know of an object that it is not there."""
    _tags.pop(path, None)


def commit(fs: Any, path: str, data: bytes) -> None:
    """Write an object where it is what this process last saw.

    Raises:
        ManifestMismatchError: Another process has written it meanwhile.
    """
    known = _tags.get(path)
    condition = {"mode": "create"} if known is None else {"IfMatch": known}
    try:
        persistent(lambda: fs.pipe_file(path, data, **condition), f"writing {path}")
    except Exception as error:  # clients have errors of their own
        if is_unsupported(error):  # the lease alone keeps others away
            persistent(lambda: fs.pipe_file(path, data), f"writing {path}")
            return
        if not is_unmet(error):
            raise
        if _read(fs, path) != data:  # a try that failed may have written it
            raise ManifestMismatchError(
                f"{path}: another process has written it meanwhile, so that nothing more was written. Wait for that "
                "process, then run the same command again: it goes on from what is listed"
            ) from error
    see(fs, path)
    tag = hashlib.md5(data, usedforsecurity=False).hexdigest()  # of an object in one piece
    if _tags[path].strip('"') != tag and _read(fs, path) != data:
        forget(path)  # another process was quick: the next commit is refused


def _read(fs: Any, path: str) -> bytes:
    return persistent(lambda: fs.cat_file(path), f"reading {path}")
