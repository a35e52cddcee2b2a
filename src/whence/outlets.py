"""What results turn into: tables, files, and what a notebook shows. Their classes take these functions as methods.

A result lies below the reports that draw it, so `reports.saved_results` is looked up by name when a method is called,
as `catalogue` looks methods up: no import goes up, and a trace does not wait for pages that nobody asks for.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from whence.errors import MissingExtraError

if TYPE_CHECKING:
    import pyarrow


def to_arrow(self: Any) -> "pyarrow.Table":
    """The rows that `save` writes, as a `pyarrow.Table`: typed columns, nested values as JSON text."""
    return _reports().arrow_of(self)


def to_pandas(self: Any) -> Any:
    """The rows that `save` writes, as a `pandas.DataFrame`: nested values are JSON text.

    Raises:
        MissingExtraError: There is no pandas.
    """
    try:
        return to_arrow(self).to_pandas()
    except ImportError:
        message = "to_pandas() needs pandas: pip install pandas; to_arrow() needs nothing more"
        raise MissingExtraError(message) from None


def save(self: Any, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a result, whole or not at all, by the ending of the file's name.

    Args:
        self: The result.
        path: A file or an fsspec address: .jsonl, .csv or .parquet for its rows, .html for the page, .json for the
            whole result, which `whence.open_result` reads.
        force: Overwrite a file that Whence did not write.

    Raises:
        SettingError: The ending is another, there is no such directory, or there is a file that Whence did not write.
        StorageError: The file cannot be written.
    """
    _reports().save(self, path, force=force)


def as_html(self: Any) -> str:
    """What a notebook shows of the result: the first rows of the report, as a fragment of HTML without scripts."""
    return _reports().fragment_of(self)


def _reports() -> Any:
    return importlib.import_module("whence.reports.saved_results")
