"""Write docs/reference/cli.md from the command line's own help. tests/test_docs.py fails where the two differ.

python docs/make_cli.py
"""

import os
import subprocess
import sys
from pathlib import Path

ASK_ALL = """
from typer.main import get_command
from whence.cli.app import app

def ask(command, path):
    print(chr(0), *path)
    app([*path, "--help"], prog_name="whence", standalone_mode=False)
    for name, nested in getattr(command, "commands", {}).items():
        ask(nested, [*path, name])

ask(get_command(app), [])
"""
"""One process for all commands, in the order of `whence --help`: to start one takes longer than to print its help."""


def help_pages() -> str:
    """The `--help` of every command and nested command, 100 columns wide."""
    plain = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "TERMINAL_WIDTH": "100"}
    pages = ["# The command line\n\nWritten by `docs/make_cli.py` from `--help`.\n"]
    command = [sys.executable, "-c", ASK_ALL]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout
    for page in printed.split("\0")[1:]:
        name, *lines = page.splitlines()
        text = "\n".join(line.rstrip() for line in lines).strip()
        pages.append(f"## whence{name}".rstrip() + f"\n\n```\n{text}\n```\n")
    return "\n".join(pages)


if __name__ == "__main__":
    (Path(__file__).parent / "reference/cli.md").write_text(help_pages())
