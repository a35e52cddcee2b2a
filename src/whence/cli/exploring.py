"""The verb `explore`: parse, serve, say where."""

import contextlib
import sys
from typing import Annotated

import typer

from whence.cli.console import print_ending, working
from whence.cli.inputs import check_inputs
from whence.cli.options import LoadingFlags, ModelPath, Parent
from whence.cli.stopping import Stopped


def explore(
    indexes: Annotated[list[str], typer.Argument(metavar="INDEX...", help="Directories of indexes.")],
    loading: LoadingFlags,
    curvature: Annotated[
        str | None, typer.Option(metavar="DIRECTORY", help="Of whence curvature: the method EK-FAC is offered too.")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Of whence train --replayable, indexed here: Replay and SOURCE are offered too."
        ),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="What that run was trained on, where that is not where it was.")
    ] = None,
    parent: Parent = None,
    model: ModelPath = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Any but this machine's own needs the token that is printed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")] = 8765,
    token: Annotated[str | None, typer.Option(help="What a visitor must show; drawn where one is needed.")] = None,
) -> None:
    """Look instead of read: a page on which any stretch of an answer is ranked as you point at it."""
    for index in indexes:
        check_inputs(index=index, curvature=curvature, run=run, corpora=[corpus], models=[parent])
    with working("Opening"):
        from whence.explorer.serving import opened, serving

        explored = opened(indexes, curvature=curvature, run=run, corpus=corpus, parent=parent, model=model,
                          **vars(loading))  # fmt: skip
    with serving(explored, host=host, port=port, token=token) as server:
        answer = f"The page is at {server.address} until Ctrl-C stops it."
        print_ending(answer, "whence", "trace", indexes[0], "--prompt", "TEXT", "-o", "trace.html")
        sys.stdout.flush()
        with contextlib.suppress(Stopped):  # which is how it ends
            server.run()
