"""Make docs/examples/*.html, report pages that the site shows: real output on the demo's model. Run after `make demo`.

The demo's model learned 1,000 of the 1,840 docstrings of Python's standard library. `trace` is the demo's own page.
`select` chooses rows for one of its packages. `recover` is asked which of all 1,840 it learned. A pool of four more
models learns the docstrings of four packages; `ablate` and `mix law` say what mixtures of the packages would give.

python docs/make_examples.py [whence-demo]     # some minutes; the pages are committed
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from whence.cli.demonstration import as_conversation, docstring_rows

PAGES = Path(__file__).parent / "examples"
LARGEST = 300_000
"""Bytes of a page: the repository keeps them."""
PACKAGES = ("asyncio", "distutils", "email", "tkinter")


def write_rows(file: Path, rows: list) -> Path:
    """Rows as .jsonl."""
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def whence(scratch: Path, command: str) -> None:
    """A command of this environment's Whence, run where its files are: pages show commands as they were typed."""
    words = [sys.executable, "-m", "whence", *command.split()]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=scratch)


def make(demo: Path, scratch: Path) -> None:
    """Every page, below `PAGES`."""
    everything = [as_conversation(row) for row in docstring_rows(None)]
    learned = {row["id"] for row in map(json.loads, (demo / "corpus.jsonl").read_text().splitlines())}
    new = {name: [row for row in everything if row["source"] == name] for name in PACKAGES}
    questions = [row for row in new["email"] if row["id"] not in learned][:8]
    write_rows(scratch / "all.jsonl", everything)
    write_rows(scratch / "email.jsonl", questions)
    write_rows(scratch / "packages.jsonl", [row for rows in new.values() for row in rows[::2]])
    for name, rows in new.items():
        write_rows(scratch / f"held-out/{name}.jsonl", rows[1::2])
    (scratch / "demo").symlink_to(demo.resolve())
    shutil.copyfile(demo / "report.html", scratch / "trace.html")
    whence(scratch, "select demo/index --tasks email.jsonl --fraction 0.05 --compare bm25,random --report select.html")
    recover = f"recover demo/parent demo/run all.jsonl --count {len(learned)} --no-calibrate"
    whence(scratch, f"{recover} --report recover.html")
    whence(scratch, "pool train demo/run packages.jsonl --steps 24 --tokens 6000 --lr 0.001 -o pool")
    whence(scratch, "ablate pool --eval held-out -o cells.jsonl --report ablate.html")
    whence(scratch, "mix law cells.jsonl --report mix.html")
    for page in scratch.glob("*.html"):
        text = page.read_text("utf-8")
        for place in (scratch, demo.resolve().parent):  # of this machine
            text = text.replace(f"{place}/", "")
        (PAGES / page.name).write_text(text, "utf-8")
    for page in sorted(PAGES.glob("*.html")):
        size = page.stat().st_size
        assert size <= LARGEST, f"{page.name} has {size} bytes, at most {LARGEST} expected"
        sys.stdout.write(f"{page.name}: {size / 1000:.0f} kB\n")


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(sys.argv[1] if len(sys.argv) > 1 else "whence-demo"), Path(folder))
