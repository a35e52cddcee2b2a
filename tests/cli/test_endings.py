"""Every verb's last line is its answer and the next command. The fixture `printed` looks at it wherever a verb runs."""

import ast
import inspect
import shlex
import sys

import pytest
import typer.main

from conftest import ENDING
from whence.cli.app import app
from whence.cli.console import again, print_ending, quoted


def leaves(command, path=()):
    """Commands that do something, by their words."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return {" ".join(path): command.callback}
    return {name: leaf for word, each in inner.items() for name, leaf in leaves(each, (*path, word)).items()}


VERBS = leaves(typer.main.get_command(app))


def functions(callback):
    """The functions of a verb's module by name, and the verb's own name."""
    closure = inspect.getclosurevars(callback).nonlocals
    function = closure.get("command", closure.get("callback", callback))
    function = inspect.getclosurevars(function).nonlocals.get("command", function)
    module = ast.parse(inspect.getsource(inspect.getmodule(function)))
    return {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}, function.__name__


def called(functions, name):
    """What a function calls, and what the functions of its module that it calls do."""
    names = {node.func.id for node in ast.walk(functions[name]) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name)}  # fmt: skip
    return names | {deeper for each in names & functions.keys() - {name} for deeper in called(functions, each)}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints_an_ending(verb):
    assert "print_ending" in called(*functions(VERBS[verb]))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_last_line_is_not_broken(printed, tiny_index, monkeypatch, width, is_terminal):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR" if is_terminal else "NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb" if not is_terminal else "xterm")
    print_ending("All " + 40 * "long " + "answers.", "whence", "trace", "a b", "--prompt", "it's")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    _, out, err = printed("info", tiny_index)
    first, *_, last = out.splitlines()
    assert first.startswith("All long") or "\x1b" in first
    assert ENDING.fullmatch(last) and shlex.split(last.partition(" Next: ")[2])[:2] == ["whence", "trace"]
    assert err == ""


def test_paths_and_prompts_are_quoted_for_the_shell(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["whence", "trace", "my index", "--prompt", "it's\nso \x1b[2J"])
    print_ending("An answer\nin two lines.", *again("-o", "a.html"))
    assert capsys.readouterr().out == (
        "An answer␊in two lines. Next: whence trace 'my index' --prompt $'it\\'s\\nso \\u001b[2J' -o a.html\n"
    )
    assert quoted("--mixture") == "--mixture"


def test_a_trace_that_finds_nothing_asks_the_words(printed, tiny_index, tmp_path):
    asked = ("trace", tiny_index, "--prompt", "5 and 3?", "--completion", " yes", "--top", 2)
    assert printed(*asked)[1].endswith("--top 2 -o trace.html\n"), "without a z there is only a page to look at"
    page = tmp_path / "t.html"
    assert "--count 100 -o chosen.jsonl" in printed(*asked, "--exact", "-o", page)[1].splitlines()[-1]
