"""The server: it opens indexes, reads their rows, and answers on loopback until it is stopped."""

import contextlib
import errno
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whence import runner
from whence.errors import ManifestMismatchError, MissingExtraError, SettingError, StorageError
from whence.explorer.answers import ExploredIndex
from whence.explorer.corpus_rows import CorpusRows
from whence.indexing.opening import open_index
from whence.second_order.store import open_curvature

PORT = 8765
LOOPBACK = "127.0.0.1"
EXTRA = "the pages are served by FastAPI and uvicorn, which are not installed: pip install 'whence[web]'"


@dataclass(frozen=True)
class Server:
    """A server that is ready to answer."""

    address: str
    """What to open in a browser, with the token if there is one."""
    run: Callable[[], None]
    """Answer until a signal stops it."""
    stop: Callable[[], None]
    """Stop answering, from another thread."""


def opened(
    indexes: Sequence[str | Path],
    *,
    curvature: str | None = None,
    run: str | None = None,
    corpus: str | None = None,
    parent: str | None = None,
    progress: runner.ProgressOption = False,
    **loading: Any,
) -> list[ExploredIndex]:
    """Open indexes with their models and rows.

    Args:
        indexes: Directories.
        curvature: A directory of `whence curvature`, for the method "ekfac".
        run: The run of `whence train --replayable` that the index is of, for the methods "replay" and "source". Of
            several indexes one has to be of it.
        corpus: What the run was trained on, where that is not where it was.
        parent: The model that the run was trained from, if that has moved.
        progress: Show bars on stderr.
        loading: Fields of `models.load_options.Loading`.

    Raises:
        SettingError: A corpus or a parent without a run.
        ManifestMismatchError: No index is of the run.
    """
    if corpus is not None and run is None:
        raise SettingError(f"--corpus {corpus}: it belongs to --run RUN; an index has its own copy of its rows")
    if parent is not None and run is None:
        raise SettingError(f"--parent {parent}: it belongs to --run RUN, which was trained from it")
    options: dict[str, dict[str, Any]] = {}
    if curvature is not None:
        open_curvature(curvature)
        options["ekfac"] = {"curvature": curvature}
    out = []
    with runner.shown_as(progress, "Opening"):
        for number, path in enumerate(indexes):
            index = open_index(path, **loading)
            index.store.require_complete()
            context = index.model().context
            out.append(ExploredIndex(number, index, CorpusRows(index), context, options))
        if run is not None:
            _add_run(run, out, corpus, parent)
    return out


def _add_run(run: str, explored: Sequence[ExploredIndex], corpus: str | None, parent: str | None) -> None:
    """Give a run to the indexes that are of it.

    Raises:
        ManifestMismatchError: None is.
    """
    from whence.explorer.indexed_run import IndexedRun  # which brings the Trainer
    from whence.training.replayed_run import open_replayable

    refusals, replayable = [], None
    for each in explored:
        try:
            IndexedRun.require_weights(run, each.index)
            replayable = replayable or open_replayable(run, corpus, model=parent, flag="--parent")
            each.run = IndexedRun.of(run, each.index, each.rows, replayable)
        except ManifestMismatchError as error:
            refusals.append(error)
    if len(refusals) == len(explored):
        raise refusals[0]


@contextlib.contextmanager
def serving(
    explored: Sequence[ExploredIndex], *, host: str = LOOPBACK, port: int = PORT, token: str | None = None
) -> Iterator[Server]:
    """A server of open indexes.

    Args:
        explored: What pages may ask about.
        host: Address to listen at; any but loopback needs a token.
        port: 0: any that is free.
        token: What every request must show. None: nothing on loopback, elsewhere one that is drawn now.

    Raises:
        MissingExtraError: The server's packages are not installed.
        SettingError: The host has no such address.
        StorageError: The port is taken.
    """
    try:
        import uvicorn

        from whence.explorer.app import make_app
        from whence.explorer.security import LOOPBACK as NAMES
        from whence.explorer.security import Guard
    except ImportError as error:
        raise MissingExtraError(EXTRA) from error
    if host not in NAMES and token is None:
        token = secrets.token_urlsafe(16)
    if token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]+", token):
        raise SettingError(
            "--token: letters, digits and . _ ~ - are expected, one or more, for it stands in an address"
        )
    listening = _listening(host, port)
    port = listening.getsockname()[1]
    app = make_app(explored)
    config = uvicorn.Config(Guard(app, hosts=NAMES, token=token), log_level="warning", server_header=False,
                            ws="none", access_log=False, timeout_graceful_shutdown=1)  # fmt: skip
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}/" + ("" if token is None else f"?token={token}")
    try:
        yield Server(address, lambda: server.run(sockets=[listening]), stop)
    finally:
        listening.close()
        app.state.line.close()


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, so that the port is known before anything is said of it."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise SettingError(
            f"--host {host}: {error.strerror or error}; an address of this machine is expected"
        ) from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise SettingError(f"--host {host}: an address of this machine is expected, such as 127.0.0.1") from None
        other = port + 1 if 0 < port < 65535 else 0
        raise StorageError(
            f"{host}:{port} cannot be listened at ({error.strerror}). Give another port: --port {other}"
        ) from None
    return listening
