"""The addresses of the explorer, and what each of them calls.

What needs the model waits in the line and comes back as a stream of events, one JSON object a line; what is in memory
is answered at once, beside the line. No part of a request is ever a path of a file.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from whence import __version__, catalogue, runner
from whence.errors import SettingError, WhenceError
from whence.explorer import exports, views
from whence.explorer.answers import Answered, AnswerGoneError, Answers, ExploredIndex, NotScoredError, Stretch
from whence.explorer.requests import (
    AnswerRequest,
    ComparisonRequest,
    ExportRequest,
    LevelRequest,
    MatrixRequest,
    RankingRequest,
    SearchRequest,
    SpanRequest,
)
from whence.explorer.waiting_line import Event, Line, LineFullError, Request
from whence.reports.page import SHARED

EVENTS = "application/x-ndjson"
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
PATIENCE = 1.0
"""Seconds after which it is looked whether whoever asked is still there."""
STATUS = {AnswerGoneError: 410, LineFullError: 429, NotScoredError: 409}


class PlainJSON(JSONResponse):
    """JSON in ASCII: rows may hold half a surrogate pair, which UTF-8 has no bytes for."""

    def render(self, content: Any) -> bytes:
        """The bytes of an answer."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def make_app(explored: Sequence[ExploredIndex]) -> FastAPI:
    """The explorer of some open indexes, without its guard (`security.Guard`)."""
    app = FastAPI(title="Whence", version=__version__, docs_url=None, redoc_url=None, openapi_url=None,
                  default_response_class=PlainJSON)  # fmt: skip
    answers, line = Answers(explored), Line()
    app.state.answers, app.state.line = answers, line
    _add_errors(app)
    _add_pages(app)
    _add_what_is_in_memory(app, answers)
    _add_what_needs_the_model(app, answers, line)
    _add_exports(app, answers, line)
    return app


# -- errors


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(WhenceError)
    async def refused(request: HTTPRequest, error: WhenceError) -> JSONResponse:
        status = STATUS.get(type(error), 422 if error.exit_code == 2 else 500)
        return PlainJSON({"error": str(error)}, status)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return PlainJSON({"error": f"{where}: {first['msg']}" if where else str(first["msg"])}, 422)

    @app.exception_handler(StarletteHTTPException)
    async def failed(request: HTTPRequest, error: StarletteHTTPException) -> JSONResponse:
        return PlainJSON({"error": str(error.detail)}, error.status_code)


# -- pages


def _add_pages(app: FastAPI) -> None:
    """Add the page and its parts, which are read once: a name of a request is looked up, and never opened."""
    own, reports = files("whence.explorer") / "pages", files("whence.reports")
    parts = (*own.iterdir(), *(reports / name for name in SHARED))
    found = {file.name: file.read_bytes() for file in parts if file.is_file()}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(found["index.html"], media_type=TYPES["html"])

    @app.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        ending = name.rpartition(".")[2]
        if name not in found or ending not in TYPES:
            raise HTTPException(404, "there is no such file")
        return Response(found[name], media_type=TYPES[ending])


# -- at once


def _add_what_is_in_memory(app: FastAPI, answers: Answers) -> None:
    described = views.session(answers.explored, __version__)

    @app.get("/api/session")
    async def session() -> dict[str, Any]:
        return described

    @app.get("/api/openapi.json", include_in_schema=False)
    async def schema() -> dict[str, Any]:
        return app.openapi()

    @app.post("/api/rankings")
    async def rankings(asked: RankingRequest) -> Any:
        return await run_in_threadpool(_ranking, answers, asked)

    @app.post("/api/search")
    async def search(asked: SearchRequest) -> Any:
        filters = asked.filters.filters()
        words = f"{asked.text} {filters.text}"
        explored = _explored(answers, asked.index)
        return await run_in_threadpool(
            views.search, explored, type(filters)(filters.sources, filters.columns, words), asked.limit, asked.offset
        )

    @app.get("/api/rows/{index}/{row}")
    async def row(index: int, row: int) -> Any:
        return await run_in_threadpool(views.whole_row, _explored(answers, index), row)

    @app.post("/api/spans")
    async def spans(asked: SpanRequest) -> Any:
        return await run_in_threadpool(views.pieces, answers.get(asked.answer))

    @app.post("/api/commands")
    async def commands(asked: RankingRequest) -> Any:
        answered, stretch = _asked(answers, asked)
        _refuse_filters(asked)
        return exports.commands(answered, stretch, method=asked.method, top=asked.top)


def _refuse_filters(asked: RankingRequest) -> None:
    """Refuse what a trace cannot ask."""
    if not asked.filters.filters().is_empty:
        raise SettingError("a trace ranks all rows: clear the filters, or take the ranking as a file")


def _explored(answers: Answers, number: int) -> ExploredIndex:
    if not 0 <= number < len(answers.explored):
        raise SettingError(f"no index {number}; there are {len(answers.explored)}, from 0 on")
    return answers.explored[number]


def _asked(answers: Answers, asked: Any) -> tuple[Answered, Stretch]:
    """The answer that a request is about, and the stretch of it."""
    answered = answers.get(asked.answer)
    for method in (*([asked.method] if hasattr(asked, "method") else []), *getattr(asked, "methods", [])):
        if method not in views.LABELS:
            raise SettingError(f"no method {method!r:.60} here; there are {', '.join(views.LABELS)}")
    return answered, answered.stretch(asked.tokens)


def _ranking(answers: Answers, asked: RankingRequest) -> dict[str, Any]:
    answered, stretch = _asked(answers, asked)
    scores = answered.known(asked.method, stretch)
    if scores is None:
        raise NotScoredError(
            f"the scores of this stretch by {views.LABELS[asked.method]} are not in memory: ask for a comparison first"
        )
    return _ranked(answered, stretch, scores, asked, asked.method)


def _ranked(answered: Answered, stretch: Stretch, scores: Any, asked: Any, method: str) -> dict[str, Any]:
    return views.ranking(answered, stretch, scores, method=method, top=asked.top, fold=asked.fold,
                         filters=asked.filters.filters()) | {"tokens": asked.tokens}  # fmt: skip


# -- through the line


def _add_what_needs_the_model(app: FastAPI, answers: Answers, line: Line) -> None:
    @app.post("/api/answers")
    async def answer(asked: AnswerRequest) -> Response:
        explored = _explored(answers, asked.index)
        if asked.completion == "":
            raise SettingError("the completion is empty: leave it out, and the model says it")
        if (asked.history or asked.system) and explored.index.layout not in ("instruction", "messages"):
            raise SettingError("a system prompt and earlier turns belong to a corpus of conversations")
        return _events(line, lambda request: answers.answer(request, asked))

    @app.post("/api/levels")
    async def levels(asked: LevelRequest) -> Response:
        answered, stretch = _asked(answers, asked)

        def measure(request: Request) -> None:
            with runner.shown_as(request.progress, "Asking what chance reaches"):
                level = answered.level(asked.method, stretch, measures=True)
            found = None if level is None else views.level_json(answered, stretch, level)
            request.tell("level", level=found)

        return _events(line, measure, gives_way=True)

    @app.post("/api/matrices")
    async def matrices(asked: MatrixRequest) -> Response:
        answered, stretch = _asked(answers, asked)

        def split(request: Request) -> None:
            found = views.matrices(answered, stretch, asked.rows, cosine=asked.method != "dot")
            for number, matrix in enumerate(found, start=1):
                request.tell("matrix", **matrix)
                request.progress(number, len(asked.rows), "Splitting scores over tokens")
            request.tell("done")

        return _events(line, split)

    @app.post("/api/comparisons")
    async def comparisons(asked: ComparisonRequest) -> Response:
        answered, stretch = _asked(answers, asked)
        is_long = any(_takes_long(answered, stretch, method) for method in asked.methods)
        return _events(line, lambda request: _compare(request, answered, stretch, asked), is_long=is_long)


def _takes_long(answered: Answered, stretch: Stretch, method: str) -> bool:
    """Whether a method's scores are not in memory, and take so long that others are answered in its midst.

    Not in that of a pass over several checkpoints, for then each answer would load the last one again.
    """
    if answered.known(method, stretch) is not None:
        return False
    if catalogue.trace_method(method).needs_run:
        return True
    return method in views.ALL_ROWS and len(answered.explored.index.weights) == 1


def _compare(request: Request, answered: Answered, stretch: Stretch, asked: ComparisonRequest) -> None:
    """Rank by one method after another."""
    tops: dict[str, list[int]] = {}
    for number, method in enumerate(dict.fromkeys(asked.methods)):
        request.progress(number, len(asked.methods), f"Ranking by {views.LABELS[method]}")
        try:
            scores = answered.computed(method, stretch, progress=request.progress)
        except WhenceError as error:
            request.tell("method", method=method, error=str(error))
            continue
        found = _ranked(answered, stretch, scores, asked, method)
        tops[method] = [row["row"] for row in found["helpful"]]
        request.tell("method", method=method, helpful=found["helpful"], opposing=found["opposing"], took=found["took"],
                     notes=found["notes"])  # fmt: skip
    request.tell("done", overlaps=views.overlaps(tops))


def _events(line: Line, work: Callable[[Request], None], **how: bool) -> StreamingResponse:
    """What a request in the line tells, as it tells it; whoever goes away leaves the line. For `how` see `Line.enter`.

    Raises:
        LineFullError: It is full.
    """
    entered = _Entered(line, work, **how)
    return StreamingResponse(entered.lines(), media_type=EVENTS)


class _Entered:
    """A request in the line, and its events."""

    def __init__(self, line: Line, work: Callable[[Request], None], **how: bool):
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._line = line

        def emit(event: Event | None) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped: nobody listens any more
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._request = line.enter(work, emit, **how)

    async def lines(self) -> AsyncIterator[bytes]:
        """The events, one a line."""
        try:
            while (event := await self._events.get()) is not None:
                yield json.dumps(event, default=float).encode() + b"\n"
        finally:
            self._line.leave(self._request)

    async def result(self, is_away: Callable[[], Awaitable[bool]]) -> Event:
        """The last event but None; none where whoever asked goes away."""
        last: Event = {}
        try:
            while not await is_away():
                with contextlib.suppress(TimeoutError):
                    event = await asyncio.wait_for(self._events.get(), PATIENCE)
                    if event is None:
                        break
                    last = event
        finally:
            self._line.leave(self._request)
        return last


# -- files


def _add_exports(app: FastAPI, answers: Answers, line: Line) -> None:
    @app.post("/api/exports")
    async def export(asked: ExportRequest, http: HTTPRequest) -> Response:
        answered, stretch = _asked(answers, asked)
        name = exports.NAMES[asked.what]
        if asked.what == "report":
            _refuse_filters(asked)

            def make(request: Request) -> None:
                page = exports.report(request, answered, stretch, method=asked.method, top=asked.top)
                request.tell("report", page=page)

            is_long = _takes_long(answered, stretch, asked.method)
            made = await _Entered(line, make, is_long=is_long).result(http.is_disconnected)
            if "page" not in made:
                raise HTTPException(422, str(made.get("error", "the report was not made")))
            return _file(iter([made["page"].encode("utf-8", "surrogatepass")]), name, "text/html")
        ranking = await run_in_threadpool(_ranking, answers, asked)
        if asked.what == "rows":
            return _file(exports.ranking_rows(ranking, answered), name, EVENTS)
        rows = exports.training_rows(answered, ranking["helpful"], keeps=asked.what == "with")
        return _file(rows, name, EVENTS)


def _file(lines: Iterator[bytes], name: str, kind: str) -> Response:
    return StreamingResponse(lines, media_type=kind,
                             headers={"content-disposition": f'attachment; filename="{name}"'})  # fmt: skip
