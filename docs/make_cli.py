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


def help_pages() -> str:
    """Every verb's `--help`, 100 columns wide."""
    plain = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "TERMINAL_WIDTH": "100"}
    pages = ["# The command line\n\nWritten by `docs/make_cli.py` from `--help`.\n"]
    for verb in VERBS:
        command = [sys.executable, "-m", "whence", *verb.split(), "--help"]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout
        text = "\n".join(line.rstrip() for line in out.strip().splitlines())
        pages.append(f"## whence {verb}".rstrip() + f"\n\n```\n{text}\n```\n")
    return "\n".join(pages)


if __name__ == "__main__":
    (Path(__file__).parent / "reference/cli.md").write_text(help_pages())
