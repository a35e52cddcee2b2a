"""What may be overwritten: a table or page that Whence wrote, any other file only by force, an input never.

Whence's files are known by what they hold, so that those of earlier versions are known too: pages by their heading,
plots by their title, tables by their columns. An empty file loses nothing.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whence.errors import SettingError
from whence.outputs import is_described, refuse_inputs
from whence.reports.files import check_ending, destination

ROWS = (".jsonl", ".csv", ".parquet")
RESULT_ENDINGS = (*ROWS, ".html", ".json")
"""What a result is saved to: its rows, its page, the whole of it."""
REPORT_ENDINGS = (".html", ".json")
HEAD_BYTES = 1 << 18
"""Bytes in which a page's heading and a plot's title stand: a page begins with 25 kB of style."""
MARKS = (
    b"<h1>Whence <span>",
    b"<title>Gain in held-out loss over random selection",
    b"<title>Scores summed by partition against the loss",
    b"<title>Linear datamodeling score against cost",
    b"<title>Finding rows that are known to be behind an answer",
    b"<title>How much does leaving the top rows out raise the loss?",
    b"<title>How much do the top rows alone lower the loss?",
    b"<title>Change of an answer by a step on retrieved rows",
    b'{"whence_result": "',
    b'merge_method: task_arithmetic\nbase_model: "',
)
"""What is in a page, a plot, a whole result and a recipe of Whence's."""
TABLES = (
    ("whence_score",),  # select and recover: rows of any corpus
    ("query", "rank", "id", "score", "source"),
    ("mixture", "set", "merged", "midpoint", "perplexity"),
    ("rank", "method", "lds", "mean_loss_lds", "below_best", "subsets"),
    ("rank", "method", "auroc", "auprc", "mrr", "below_best", "candidates"),
    ("rank", "method", "effect", "over_random", "way", "share"),
    ("rank", "method", "change", "over_random", "helped", "lr"),
    ("method", "task", "seeds", "gain", "gain_interval"),
    ("method", "partition", "set", "score", "change"),
    ("domain", "suggested", "mean", "best_tried", "least_tried", "most_tried", "cap"),
    ("partition", "weight"),
)
"""Columns by which a table of each verb is known: `evaluate` and `ablate` have more, `trace` the text's as well."""
EXACT = TABLES[-3:]
"""Tables that have no other columns: alone, these are words that others use too."""


@dataclass(frozen=True)
class Output:
    """A file that a command is to write."""

    flag: str
    path: str | None
    endings: Sequence[str] | None = ROWS
    """None: any."""
    force: str = "--force"
    """What overwrites a file that Whence did not write, as the caller writes it."""


def check_outputs(outputs: Iterable[Output], *, rows: Iterable[Any], others: Iterable[Any] = (), force: bool) -> None:
    """Refuse, before any work is done, outputs that cannot be written or would overwrite what they must not.

    Args:
        outputs: Files that are to be written; those without a path are passed over.
        rows: Inputs of rows; every file below a directory of them is one.
        others: Other inputs, such as an index or a model; a table of Whence's that lies in their directory is none.
        force: Whether existing files that Whence did not write may be overwritten.

    Raises:
        SettingError: The ending is another, there is no such directory, the file is an input's, or it exists and is not
            Whence's.
    """
    rows = list(rows)
    others = [*others, *filter(is_described, rows)]  # an index is no corpus: tables beside its files are none of it
    for output in outputs:
        if output.path is None:
            continue
        check_ending(output.path, output.endings, flag=output.flag)
        place, name = destination(output.path)
        if place.fs.isdir(place.path(name)):
            raise SettingError(f"{output.flag} {output.path}: a directory, where a file is to be written")
        is_own = not place.exists(name) or is_written_by_whence(output.path)
        refuse_inputs(output.path, (item for item in rows if not is_described(item)), flag=output.flag)
        refuse_inputs(output.path, others, flag=output.flag, is_own=is_own)
        if not is_own and not force:
            raise SettingError(
                f"{output.flag} {output.path}: there is a file that Whence did not write. Name another, or add "
                f"{output.force} to overwrite it."
            )


def is_written_by_whence(path: str) -> bool:
    """Whether an existing file is a table, page, plot or recipe as Whence writes them, or empty."""
    place, name = destination(path)
    with suppress(ValueError, OSError, RecursionError, StopIteration), place.fs.open(place.path(name), "rb") as file:
        if not place.size(name):
            return True
        if (ending := Path(path).suffix) not in ROWS:
            head = file.read(HEAD_BYTES)
            return any(mark in head for mark in MARKS)
        names = _columns(file, ending)
        return any(names == {*table} if table in EXACT else names >= {*table} for table in TABLES)
    return False


def _columns(file: Any, ending: str) -> set[str]:
    """Column names of a table; of .jsonl those of its first row."""
    if ending == ".parquet":
        import pyarrow.parquet

        return {*pyarrow.parquet.read_schema(file).names}
    if ending == ".csv":
        with io.TextIOWrapper(file, "utf-8", newline="") as text:
            return {*next(csv.reader(text))}
    row = json.loads(file.readline())
    return {*row} if isinstance(row, dict) else set()
