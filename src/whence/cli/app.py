"""The command line as a whole: its verbs, its messages, its exit codes.

Results go to stdout (with `--json` one document and nothing else), progress and messages to stderr. Exit code 0; 2 for
a user's mistake, with one clear message; 1 for a failure; 130, 143 or 129 where Ctrl-C, SIGTERM or SIGHUP stopped it.
Only names are imported here: torch comes with the verb.
"""

import io
import logging
import os
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.exceptions import TyperException
from typer.main import get_command

from whence import __version__
from whence.cli.ablation import ablate, pool
from whence.cli.banking import bank
from whence.cli.console import complain, print_ending, print_json, print_marked, print_part, quoted, waiting
from whence.cli.exploring import explore
from whence.cli.groups import flattened, reads_rows
from whence.cli.indexing import append, bench, index, info, plan, verify
from whence.cli.mixing import mix
from whence.cli.options import Json
from whence.cli.recovery import recover
from whence.cli.removing import evaluate
from whence.cli.second_order import curvature
from whence.cli.selection import select
from whence.cli.stopping import Stopped, stop_if_asked, stoppable
from whence.cli.tracing import trace
from whence.cli.training import train
from whence.errors import WhenceError
from whence.reports.text import one_line, visible

TRACEBACK = "--traceback"
STOPPED = 130
"""The exit code that the parser makes of Ctrl-C, as a shell does."""

app = typer.Typer(
    name="whence",
    help="Whence traces a language model back to its data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line and exit with its code."""
    with stoppable():
        run()


def run() -> None:
    """The same where signals are answered already.

    Raises:
        Stopped: One came.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Handler()])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:  # libraries' advice to programmers; what matters of it is checked and told
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # corpora hold lone surrogates, and terminals may lack UTF-8
    stop_if_asked()
    try:
        code = app(prog_name="whence", standalone_mode=False)
    except Exception as error:
        stop_if_asked()  # some libraries make an error of their own of whatever interrupts them
        _complain_of(error)
    if code == STOPPED:  # what the parser makes of an interrupt
        raise Stopped
    sys.exit(code or 0)


def _complain_of(error: Exception) -> NoReturn:
    """Say what is wrong in one line, and exit."""
    if isinstance(error, WhenceError):
        complain(str(error))
        sys.exit(error.exit_code)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing more to say
        sys.exit(0)
    if isinstance(error, TyperException):  # a missing argument, an unknown flag
        if message := error.format_message():  # empty: the help was printed
            verb = getattr(getattr(error, "ctx", None), "command_path", None) or command_path(sys.argv[1:])
            complain(f"{message}{'' if message.endswith(('.', '?')) else '.'} See: {verb} --help")
        sys.exit(error.exit_code)
    if TRACEBACK in sys.argv[1:2]:  # none other is expected here: it is a fault of Whence's, and is said as one
        raise error
    complain(unforeseen(error))
    sys.exit(1)


def command_path(words: list[str]) -> str:
    """The command that an argument list begins with: the parser does not say whose flag lacks its value.

    >>> command_path(["--traceback", "pool", "train", "--by"])
    'whence pool train'
    """
    path, command = ["whence"], get_command(app)
    for word in words:
        nested = getattr(command, "commands", {})
        if word in nested:
            path, command = [*path, word], nested[word]
        elif not word.startswith("-"):
            break
    return " ".join(path)


def unforeseen(error: Exception) -> str:
    """What to say of an error that nobody foresaw: where it is raised, and how to see more."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "DefaultCPUAllocator" in str(error):
        return (
            "out of memory. Give it more, or ask for less at a time: fewer or shorter rows, a smaller --batch-tokens."
        )
    package = Path(__file__).parent.parent
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(package)] or frames
    place = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
    text = " ".join(str(error).split())[:600]
    return (
        f"unexpected {type(error).__name__} ({place}): {text}. This is a fault of Whence's: please report it with what "
        f"whence {TRACEBACK} and the rest of the command print."
    )


class _Handler(RichHandler):
    """Log lines to stderr, without time or path."""

    def __init__(self):
        super().__init__(console=Console(stderr=True), show_time=False, show_path=False, show_level=True)

    def format(self, record: logging.LogRecord) -> str:
        """The message; a line of Whence's own may name a column or a file, whose name may hold any character."""
        text = super().format(record)
        return one_line(text) if record.name.partition(".")[0] == "whence" else visible(text)


def _version(is_asked: bool) -> bool:
    if is_asked:
        sys.stdout.write(f"whence {__version__}\n")
        raise typer.Exit()
    return is_asked


@app.callback()
def _root(
    show_traceback: Annotated[
        bool, typer.Option(TRACEBACK, help="Show Python's traceback of an error that nobody foresaw.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Directory for all that it makes.")] = "whence-demo",
    seed: Annotated[int, typer.Option(help="Seed of the chosen docstrings, the weights and the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a small model on Python's own docstrings, and ask which of them taught it each answer."""
    with waiting("Loading torch"):
        from whence.cli.demonstration import demo as run
        from whence.cli.demonstration import grade_answer
    result = run(out, seed=seed, say=partial(print_marked, err=as_json))
    if as_json:
        print_json(result)
        return
    look = " ".join(map(quoted, ("whence", "explore", f"{out}/index")))
    print_part(f"To point at an answer in a browser: {look} (after pip install 'whence[web]')")
    question = "What does json.dumps do?"
    print_ending(grade_answer(result), "whence", "trace", f"{out}/index", "--prompt", question, "--tokens")


for verb in (train, plan, index, trace, curvature, info, verify, append, bench, select, recover, bank):
    app.command()(flattened(verb) if verb is info else reads_rows(flattened(verb)))
app.add_typer(evaluate, name="evaluate")
app.add_typer(mix, name="mix")
app.add_typer(pool, name="pool")
app.command()(reads_rows(ablate))
app.command()(flattened(explore))
