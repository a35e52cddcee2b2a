"""What a page shows, as files, as a command and as Python."""

import json
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from whence import catalogue, runner
from whence.corpus.layouts import shown_text
from whence.corpus.reading import row_json
from whence.errors import SettingError
from whence.explorer.answers import OF_TOKENS, Answered, Stretch
from whence.explorer.waiting_line import Request
from whence.tracing.pipeline import trace

NAMES = {"with": "examples.jsonl", "without": "corpus_without_examples.jsonl", "rows": "ranking.jsonl",
         "report": "trace.html"}  # fmt: skip


def training_rows(answered: Answered, shown: list[dict[str, Any]], *, keeps: bool) -> Iterator[bytes]:
    """The rows that are shown as lines of JSON, ready to train on; or all others of the corpus.

    A row that stands for several of the same text stands for them here too.
    """
    rows = answered.explored.rows
    groups, numbers = rows.groups, [row["row"] for row in shown]
    folded = {int(groups[row["row"]]) for row in shown if row["copies"] > 1}
    if keeps:
        for number in numbers:
            yield _line(rows.row(number))
        return
    left_out = {*numbers}
    for number in range(len(rows)):
        if number not in left_out and int(groups[number]) not in folded:
            yield _line(rows.row(number))


def ranking_rows(ranking: dict[str, Any], answered: Answered) -> Iterator[bytes]:
    """A ranking as lines of JSON with the columns of `trace`."""
    rows = answered.explored.rows
    for row in (*ranking["helpful"], *ranking["opposing"]):
        columns: dict[str, Any] = {"query": 0, "rank": row["rank"], "id": row["id"], "score": row["score"]}
        if row["z"] is not None:
            columns |= {"z": row["z"], "generic": row["generic"]}
        yield _line(columns | {"source": row["source"]} | dict(shown_text(rows.shown(row["row"]))))


def report(request: Request, answered: Answered, stretch: Stretch, *, method: str, top: int) -> str:
    """The report page of `trace` for what is asked."""
    explored = answered.explored
    source = explored.run.path if catalogue.trace_method(method).needs_run and explored.run else explored.index
    query = replace(answered.query.query, completion=answered.query.answer.completion, span=_span(answered, stretch))
    with runner.shown_as(request.progress, "Making the report"), tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "trace.html"
        traced = trace(
            source, queries=[query], top=top, method=method, tokens=method in OF_TOKENS,
            options=answered.explored.options.get(method), exact=False if method in OF_TOKENS else None,
            shortlist=_all_rows(answered, method), progress=request.progress,
        )  # fmt: skip
        traced.save(str(file))
        return file.read_text(encoding="utf-8")


def commands(answered: Answered, stretch: Stretch, *, method: str, top: int) -> dict[str, str]:
    """The same question as a command and as lines of Python.

    Raises:
        SettingError: It has parts that a command has no words for.
    """
    place, asked, answer = answered.explored.name, answered.request, answered.query.answer
    if catalogue.trace_method(method).needs_run and answered.explored.run is not None:
        place = answered.explored.run.path
    span = _span(answered, stretch)
    if asked.history:
        raise SettingError(
            "a command asks without earlier turns: write the conversation to a file, for --messages FILE"
        )
    words = ["whence", "trace", place, "--prompt", asked.prompt, "--completion", answer.completion]
    arguments: dict[str, Any] = {"prompt": asked.prompt, "completion": answer.completion}
    if asked.system:
        words += ["--system", asked.system]
        arguments["system"] = asked.system
    if span is not None:
        words += ["--span-tokens", f"{span[0]}:{span[1]}"]
        arguments["span"] = span
    if answer.contrast is not None:
        words += ["--contrast", answer.contrast]
        arguments["contrast"] = answer.contrast
    words += ["--method", method, "--top", str(top)]
    arguments |= {"method": method, "top": top}
    if method in OF_TOKENS:
        words += ["--no-exact"]
        arguments["exact"] = False
    if (rows := _all_rows(answered, method)) is not None:
        words += ["--shortlist", str(rows)]
        arguments["shortlist"] = rows
    options = answered.explored.options.get(method, {})
    if "curvature" in options:
        words += ["--curvature", options["curvature"]]
        arguments["curvature"] = options["curvature"]
    lines = [f"    {name}={value!r}," for name, value in arguments.items()]
    python = "\n".join(["import whence", "", f"found = whence.trace(\n    {place!r},", *lines, ")", "print(found)"])
    return {"command": shlex.join(words), "python": python}


def _all_rows(answered: Answered, method: str) -> int | None:
    """The length of a list that leaves no row out, where a trace would make one: the page ranks all rows."""
    return None if catalogue.trace_method(method).listed_by is None else len(answered.explored.rows)


def _span(answered: Answered, stretch: Stretch) -> tuple[int, int] | None:
    """A stretch as tokens from, to; None for a whole answer, unless that was cut: given back as text it is closed.

    Raises:
        SettingError: It has gaps, which a trace has no words for.
    """
    if all(stretch):
        return (0, len(stretch)) if answered.is_cut else None
    first, end = stretch.index(True), len(stretch) - stretch[::-1].index(True)
    if not all(stretch[first:end]):
        raise SettingError("a command asks about one stretch of an answer: choose one")
    return first, end


def _line(row: dict[str, Any]) -> bytes:
    return (row_json(row) if "query" not in row else json.dumps(row, ensure_ascii=False)).encode(
        "utf-8", "surrogatepass"
    ) + b"\n"
