"""Signals that stop a command, from its first moment on."""

import contextlib
import os
import signal
import subprocess
import sys
from types import ModuleType

import pytest

from whence.cli import app, console

STOPPED = "error stopped. What was finished is kept: the same command goes on from there."


@pytest.mark.usefixtures("answered_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_during_the_imports_is_told(monkeypatch, capsys, number):
    from whence.__main__ import main

    class Importing(ModuleType):
        def __getattr__(self, name):
            os.kill(os.getpid(), number)

    monkeypatch.setitem(sys.modules, "whence.cli.app", Importing("whence.cli.app"))
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (left.value.code, capsys.readouterr().err.strip()) == (128 + number, STOPPED)


def test_the_command_is_started_where_signals_are_answered():
    """What is imported before that is of no weight: a stop within the imports of a process of its own."""
    code = "import sys, whence.__main__; print({'typer', 'rich', 'logging'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.usefixtures("answered_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_exit_code_of_a_stop_within_text_that_is_run_is_its_own(number):
    """CPython ends by SIGINT where a plain KeyboardInterrupt has passed through `exec` of text, as imports have it."""
    code = (
        "import os\nfrom whence.cli.stopping import stoppable\n"
        f"with stoppable(): exec('os.kill(os.getpid(), {int(number)})\\nwhile True: pass')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (128 + number, STOPPED)


def test_an_error_that_a_library_makes_of_a_stop_is_a_stop(monkeypatch, capsys):
    def translated(**settings):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("a library's own error") from None

    monkeypatch.setattr(app, "app", translated)
    with pytest.raises(SystemExit) as left:
        app.main()
    assert (left.value.code, capsys.readouterr().err.strip()) == (143, STOPPED)


@pytest.mark.parametrize("where", ["imports of the command line", "imports of a verb"])
def test_a_stop_that_a_library_passes_over_is_a_stop(monkeypatch, capsys, where):
    def passed_over():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)

    def verb(**settings):
        with console.waiting("Loading torch"):
            passed_over()
        pytest.fail("the verb goes on")

    monkeypatch.setattr(app, "app", verb)
    if where == "imports of the command line":
        monkeypatch.setattr(app.logging, "basicConfig", lambda **settings: passed_over())
    with pytest.raises(SystemExit) as left:
        app.main()
    assert (left.value.code, capsys.readouterr().err.strip()) == (143, STOPPED)
