"""What contributors and CI rely on: the same linters everywhere, pins for all extras, pages of the site, completion."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import whence

ROOT = Path(__file__).parents[1]


def shell(*words, **settings):
    """Stdout of the command line with these environment variables, as a shell's completion runs it."""
    command = [sys.executable, "-m", "whence", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | settings).stdout


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_of_every_shell_can_be_shown(name):
    script = shell("--show-completion", name, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"_WHENCE_COMPLETE=complete_{name}" in script


def test_verbs_are_completed():
    offered = shell(COMP_WORDS="whence tr", COMP_CWORD="1", _WHENCE_COMPLETE="complete_bash")
    assert sorted(offered.split()) == ["trace", "train"]


def test_help_does_not_load_torch():
    script = (
        "import sys; sys.argv[1:] = ['--help']; from whence.cli.app import main\ntry: main()\nexcept SystemExit: pass"
    )
    run = [sys.executable, "-c", script + "\nprint('torch' in sys.modules, file=sys.stderr)"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stderr.split() == ["False"]


def test_hooks_before_a_commit_are_the_linters_of_make():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    commands = [hook["entry"] for hook in hooks[0]["hooks"]]
    assert commands == [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]


def test_every_requirement_has_a_pin_that_it_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for text in (
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ):
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_version_is_cited_and_in_the_changelog():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    dates = dict(re.findall(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE))
    assert (cited["version"], dates[cited["version"]]) == (whence.__version__, str(cited["date-released"]))


def test_every_public_name_is_on_the_page_of_the_api():
    tree = ast.parse((ROOT / "src/whence/__init__.py").read_text())
    homes = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES"
    )
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(f"whence.{name}" for name in homes)


def test_links_out_of_the_docs_become_code_and_wrong_ones_stay(load):
    page = ROOT / "docs/guide/new.md"
    text = "[a table](../../pyproject.toml), [numbers](../reference/numbers.md#x), [gone](gone.md), `[no](../LOG.md)`\n"
    assert load("docs/make_site.py").site_page(text, page, "guide/new.md") == (
        "a table (`pyproject.toml`), [numbers](../reference/numbers.md#x), [gone](gone.md), `[no](../LOG.md)`\n"
    )
    moved = load("docs/make_site.py").site_page(
        "[x](docs/LOG.md), [y](README.md)", ROOT / "CHANGELOG.md", "changelog.md"
    )
    assert moved == "[x](LOG.md), [y](index.md)"


@pytest.fixture
def load():
    """A script of the repository as a module."""

    def by_path(path):
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    return by_path


def test_every_package_that_is_imported_is_a_requirement():
    """The wheel is tested beside packages that are there already: one that nobody requires would not be missed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name in ("fast", "laws", "ray", "s3", "web") for text in project["optional-dependencies"][name]]
    required = {canonicalize_name(Requirement(text).name) for text in (*project["dependencies"], *extras)}
    imported = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    homes = packages_distributions()
    others = imported - sys.stdlib_module_names - {"whence"}
    missing = {name for name in others if required.isdisjoint(map(canonicalize_name, homes.get(name, [name])))}
    assert missing <= {"huggingface_hub", "llvmlite"}, "these come with datasets, with numba, or with an address"
