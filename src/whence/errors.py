"""Every error that Whence raises on purpose.

A message says what was found, what was expected, where, and which command repairs it. The command line prints it as
one line and exits with `exit_code`: 2 where the user's input or file is at fault, 1 where the work failed.
"""


class WhenceError(Exception):
    """Base of every error that Whence raises on purpose."""

    exit_code = 2


class SettingError(WhenceError):
    """A flag or argument has a value that cannot work."""


class CorpusError(WhenceError):
    """A corpus cannot be read: no such file, a bad line, missing columns, no rows, a duplicate id."""


class ModelError(WhenceError):
    """A model, adapter or tokenizer cannot be loaded, or the two do not belong together."""


class UnknownNameError(WhenceError):
    """A method, projection or codec has no such name."""


class MissingIndexError(WhenceError):
    """There is no index at this path, or it is incomplete."""

    @classmethod
    def at(cls, path: str) -> "MissingIndexError":
        """The refusal of a path where there is none."""
        return cls(f"There is no index at {path}; make one with: whence index MODEL CORPUS -o {path}")


class MissingPoolError(MissingIndexError):
    """There is no pool at this path."""

    @classmethod
    def at(cls, path: str) -> "MissingPoolError":
        """The refusal of a path where there is none."""
        return cls(f"{path}: no pool here (no pool.json). Make one: whence pool train PARENT CORPUS -o {path}")


class MissingLogError(WhenceError):
    """A run does not say what it did at each step."""

    @classmethod
    def at(cls, run: object) -> "MissingLogError":
        """The refusal of a run without a log of its steps."""
        return cls(
            f"{run}: no training that can be replayed (no replay/replay.json). Train it with a log of its steps, into "
            "another directory: whence train MODEL CORPUS -o RUN --replayable"
        )


class MissingBankError(MissingIndexError):
    """There is no bank of retrainings at this path, or only the beginning of one."""

    @classmethod
    def at(cls, path: str) -> "MissingBankError":
        """The refusal of a path where there is none."""
        return cls(f"{path}: no bank here (no bank.json). Make one: whence bank RUN CORPUS --queries FILE -o {path}")


class MissingCurvatureError(WhenceError):
    """There is no curvature at this path, or only the beginning of one."""

    @classmethod
    def at(cls, path: str) -> "MissingCurvatureError":
        """The refusal of a path where there is none."""
        return cls(f"{path}: no curvature here (no curvature.json). Measure it: whence curvature INDEX -o {path}")


class ManifestMismatchError(WhenceError):
    """Two things were made with different settings: an index and a build, a query or a model."""


class FormatVersionError(WhenceError):
    """An index was written by a newer Whence in a format that this version does not know."""


class MissingExtraError(WhenceError):
    """An optional package is not installed."""


class StorageError(WhenceError):
    """A file cannot be written, read or removed: full disk, no permission, a broken disk."""


class ChecksumError(WhenceError):
    """A file of an index no longer has the bytes that were written."""

    exit_code = 1


class JobError(WhenceError):
    """A job failed at every try."""

    exit_code = 1
