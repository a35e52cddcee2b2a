"""Every result as a table, a file, a notebook's view, and as JSON that opens as the same result again.

    .jsonl .csv .parquet    the rows that the verb's -o writes
    .html                   the verb's page
    .json                   the whole result (`result_json`)

A result is known by its class' name, and its class and page are imported when they are needed, so that a trace does
not wait for what recoveries need.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence.corpus.columns import original
from whence.errors import SettingError, StorageError
from whence.reports import result_checks, result_json
from whence.reports.existing_files import RESULT_ENDINGS, Output, check_outputs
from whence.reports.files import arrow_table, destination, write_page, write_result, write_rows

if TYPE_CHECKING:
    import pyarrow

    from whence.ablation.pipeline import Ablation
    from whence.recovery.pipeline import Recovered
    from whence.selection.pipeline import Chosen
    from whence.tracing.results import Trace

Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of result: where its parts are, as `module:name` below `whence`."""

    result: str
    """Its dataclass."""
    page: str
    """The function that draws its page."""
    fragment: str
    """The function that draws what a notebook shows."""
    rows: Callable[[Any], list[Row]]
    check: Callable[[Any], None]
    """Refuses fields that do not belong together."""
    columns: Mapping[str, str]
    """Columns that are there without any row, with their Arrow types."""

    def result_class(self) -> Any:
        """The dataclass."""
        return _named(self.result)


KINDS = {
    "trace": Kind(
        "tracing.results:Trace",
        "reports.trace_page:trace_page",
        "reports.notebook:trace_fragment",
        lambda trace: [hit.as_row() for hit in trace.hits],
        result_checks.check_trace,
        {"query": "int64", "rank": "int64", "id": "string", "score": "float64", "source": "string"},
    ),
    "selection": Kind(
        "selection.pipeline:Chosen",
        "reports.select_page:select_page",
        "reports.notebook:select_fragment",
        lambda chosen: [original(row, chosen.columns) for row in chosen.rows],
        result_checks.check_selection,
        {"whence_score": "float64"},
    ),
    "recovery": Kind(
        "recovery.pipeline:Recovered",
        "reports.recover_page:recover_page",
        "reports.notebook:recover_fragment",
        lambda recovery: [original(row, recovery.columns) for row in recovery.rows],
        result_checks.check_recovery,
        {"whence_score": "float64", "whence_p": "float64"},
    ),
    "ablation": Kind(
        "ablation.pipeline:Ablation",
        "reports.ablate_page:ablate_page",
        "reports.notebook:ablate_fragment",
        lambda ablation: ablation.rows(),
        result_checks.check_ablation,
        {
            **{"mixture": "string", "set": "string", "contained": "bool"},
            **dict.fromkeys(
                ("merged", "low", "high", "bits_per_byte", "mean", "mean_ppl", "best", "ngram", "parent", "truth",
                 "midpoint", "perplexity"), "float64",
            ),
        },
    ),
}  # fmt: skip
"""By the name that stands in a file."""


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"whence.{module}"), name)


def _kind(result: Any) -> tuple[str, Kind]:
    place = f"{type(result).__module__.removeprefix('whence.')}:{type(result).__qualname__}"
    return next((name, kind) for name, kind in KINDS.items() if kind.result == place)


def arrow_of(result: Any) -> "pyarrow.Table":
    """The rows that the result's verb writes with -o, as a table; without any, its columns are there."""
    _, kind = _kind(result)
    return arrow_table(kind.rows(result), kind.columns)


def fragment_of(result: Any) -> str:
    """What a notebook shows."""
    return _named(_kind(result)[1].fragment)(result)


def save(result: Any, path: Any, *, force: bool = False) -> None:
    """Write a result by the ending of a file's name; see `outlets.save`."""
    out = str(path)
    check_outputs([Output("save", out, RESULT_ENDINGS, "force=True")], rows=[], force=force)
    name, kind = _kind(result)
    match Path(out).suffix:
        case ".json":
            write_result(result_json.written(name, result), out)
        case ".html":
            write_page(_named(kind.page)(result), out)
        case _:
            write_rows(kind.rows(result), out)


def write_report(result: Any, out: str, page: Callable[[], str]) -> None:
    """Write what a verb's --report names, once it may be overwritten: the whole result to .json, else this page."""
    if Path(out).suffix == ".json":
        save(result, out, force=True)
    else:
        write_page(page(), out)


def open_result(path: str | Path) -> "Trace | Chosen | Recovered | Ablation":
    """The result that a .json file holds, as it was when its `save` wrote it: every number, row and note.

    A row's values that JSON does not know, such as dates, have become text, and tuples in it lists.

    Args:
        path: A file or an fsspec address: what `result.save("NAME.json")` wrote, or a command with -o NAME.json (trace)
            or --report NAME.json.

    Returns:
        A trace, a selection, a recovery or an ablation.

    Raises:
        SettingError: There is no such file, or it holds no whole result.
        FormatVersionError: A newer Whence wrote it.
        ChecksumError: It is not as Whence writes it.
    """
    place, name = destination(path)
    try:
        data = place.read(name)
    except (OSError, StorageError):
        raise SettingError(f"{path}: there is no file here that can be read") from None
    return result_json.opened(data, str(path), {name: (kind.result_class, kind.check) for name, kind in KINDS.items()})
