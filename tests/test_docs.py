"""The docs say what the code does."""

import importlib.util
import inspect
import re
from pathlib import Path

from typer.main import get_command

import whence
from whence import catalogue
from whence.cli.app import app
from whence.runner import ProgressOption

ROOT = Path(__file__).parents[1]


def test_cli_page_is_the_help_of_today():
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs/make_cli.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert (ROOT / "docs/reference/cli.md").read_text() == made.help_pages(), "run: python docs/make_cli.py"


def test_every_command_and_nested_command_has_its_part_of_the_cli_page():
    def paths(command, path):
        yield path
        for name, nested in getattr(command, "commands", {}).items():
            yield from paths(nested, f"{path} {name}")

    page = (ROOT / "docs/reference/cli.md").read_text()
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == [*paths(get_command(app), "whence")]


def test_flags_that_messages_name_are_those_of_the_command_line():
    flags = {
        *re.findall(r"--[a-z][a-z-]+", (ROOT / "docs/reference/cli.md").read_text()),
        "--optim",
        "--safe",
        "--head",
    }  # of a Trainer, zero_to_fp32, ray start
    for file in (ROOT / "src").rglob("*.py"):
        unknown = {*re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", file.read_text())} - flags
        assert not unknown, f"{file.name}: {unknown}"


def test_readme_lists_every_projection_and_is_short():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == set(catalogue.PROJECTIONS)
    assert len(text.splitlines()) <= 120


def test_every_projection_shows_its_source_in_its_file():
    for name, entry in catalogue.PROJECTIONS.items():
        file = ROOT / "src" / (entry.implementation.partition(":")[0].replace(".", "/") + ".py")
        source = file.read_text()
        assert "Source:" in source, name
        for paper in re.findall(r"\d{4}\.\d{4,5}", entry.source):
            assert paper in source, f"{name}: {entry.source}"


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_public_function_names_its_quiet_switch_alike():
    for name in whence._HOMES:
        if inspect.isfunction(function := getattr(whence, name)):
            switches = {*inspect.signature(function).parameters} & {"progress", "shown", "verbose", "quiet", "bar"}
            assert switches <= {"progress"}, f"{name}: {switches}"
            if switches:
                assert inspect.signature(function).parameters["progress"].annotation in (bool, ProgressOption), name
