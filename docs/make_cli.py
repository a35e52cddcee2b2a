"""Write docs/reference/cli.md from the command line's own help. tests/test_docs.py fails where the two differ.

python docs/make_cli.py
"""

import os
import subprocess
import sys
from pathlib import Path

VERBS = (
    "",
    "demo",
    "train",
    "index",
    "trace",
    "select",
    "recover",
    "evaluate",
    "evaluate selection",
    "evaluate join",
    "pool",
    "pool train",
    "pool merge",
    "pool verify",
    "ablate",
    "mix",
    "mix law",
    "mix suggest",
    "info",
    "verify",
    "append",
    "bench",
)

ASK_ALL = """
import sys
from whence.cli.app import app
for verb in sys.argv[1:]:
    app([*verb.split(), "--help"], prog_name="whence", standalone_mode=False)
    print(end=chr(0), flush=True)
"""
"""One process for all verbs: to start one takes longer than to print its help."""


def help_pages() -> str:
    """Every verb's `--help`, 100 columns wide."""
    plain = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "TERMINAL_WIDTH": "100"}
    pages = ["# The command line\n\nWritten by `docs/make_cli.py` from `--help`.\n"]
    command = [sys.executable, "-c", ASK_ALL, *VERBS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout.split("\0")
    for verb, out in zip(VERBS, printed[:-1], strict=True):
        text = "\n".join(line.rstrip() for line in out.strip().splitlines())
        pages.append(f"## whence {verb}".rstrip() + f"\n\n```\n{text}\n```\n")
    return "\n".join(pages)


if __name__ == "__main__":
    (Path(__file__).parent / "reference/cli.md").write_text(help_pages())
