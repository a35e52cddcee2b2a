"""Every verb on tiny data, as a first-time user meets it: what its last line says, and how its pages look.

    .venv/bin/python benchmarks/reliability/walk.py FOLDER            # the last line of each, piped
    .venv/bin/python benchmarks/reliability/walk.py FOLDER --all      # and in terminals of 80 and 120 columns
    .venv/bin/python benchmarks/reliability/walk.py FOLDER --screens  # pictures of each page, into FOLDER/piped/screens

The models are random and have two layers: what the numbers say is chance, that they are said is the point. Pictures
are of 390 and 1280 pixels, light and dark, and need Chromium. Words that break inside, and columns that are cut, are
counted in each page of 390 pixels, and must be none. With `--all` a verb's last line must hold its answer and a command
that begins with `whence`, unbroken, and no line of progress may be wider than the terminal.
"""

import argparse
import base64
import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import struct
import sys
import tempfile
import termios
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from chromium import Browser
from conftest import save_tiny_llama
from whence.cli.app import main as whence_main

SOURCES = ("gsm8k/train", "news-2024", "stack_overflow", "wiki")
COMMANDS = {
    "train": "train model rows.jsonl -o run --max-steps 6 --batch-size 8 --lr 0.003 --checkpoints 2",
    "index": "index run rows.jsonl -o index --width 8",
    "info": "info index",
    "verify": "verify index",
    "append": "append index more.jsonl",
    "bench": "bench run rows.jsonl --width 8 --batches 1 --length 16",
    "trace": "trace index --prompt 'What is 7?' --completion ' seven and three' --span seven --exact --tokens "
    "--top 6 -o trace.html",
    "trace many": "trace index --queries asked.jsonl --top 3",
    "select": "select index --tasks asked.jsonl --count 40 --compare bm25,random -o chosen.jsonl --report select.html",
    "recover": "recover model run rows.jsonl --count 60 --epochs 1 --lr 0.003 --batch-size 8 --mixture gradients "
    "-o found.jsonl --report recover.html",
    "pool train": "pool train model rows.jsonl -o pool --steps 4 --warmup-steps 1 --tokens 1500 --lr 0.01 "
    "--max-tokens 48",
    "pool grams": "pool grams pool --tokens 400",
    "pool verify": "pool verify pool",
    "ablate": "ablate pool --eval held-out -o cells.jsonl --report ablate.html --truth",
    "pool merge": "pool merge pool --mixture macro -o merged",
    "mix law": "mix law cells.jsonl --folds 4 --before wiki=5.4 --cap wiki=0.4 -o mixture.csv --report mix.html",
    "mix suggest": "mix suggest pool --eval held-out --steps 3 --rows 8",
    "evaluate join": "evaluate join index pool --eval held-out --methods influence,bm25 --queries 4 -o join.svg",
    "evaluate selection": "evaluate selection model rows.jsonl --tasks t=asked.jsonl --graded t=graded.jsonl "
    "--methods bm25 --fraction 0.2 --seeds 2 --steps 3 -o selection.svg",
    "demo": "demo",
}
"""In order: each may read what those before it wrote."""
ENDING = re.compile(r"\S.* Next: whence .+")


def write(file: Path, rows: list[dict]) -> None:
    """Rows as .jsonl."""
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_files(folder: Path) -> None:
    """A model, rows of four sources, questions, and held-out rows."""
    words = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

    def rows(first: int, count: int) -> list[dict]:
        return [
            {"id": f"row-{n:03}", "prompt": f"What is {n}?", "completion": f" {words[n % 10]} and {words[n * 7 % 10]}",
             "source": SOURCES[n % 4]} for n in range(first, first + count)
        ]  # fmt: skip

    save_tiny_llama(folder / "model")
    write(folder / "rows.jsonl", rows(0, 160))
    write(folder / "more.jsonl", rows(160, 4))
    write(folder / "asked.jsonl", rows(300, 4))
    write(folder / "graded.jsonl", rows(310, 6))
    for place, name in enumerate(SOURCES):
        write(folder / f"held-out/{name.replace('/', '-')}.jsonl", rows(400, 40)[place::4])


def run(command: str, folder: Path, width: int | None) -> tuple[int, str]:
    """A verb in a child of this process: its exit code, and what it wrote to a terminal of this width, or a pipe."""
    if width is None:
        ends = os.pipe()
        child = os.fork()
    else:
        child, end = pty.fork()
        ends = (end, -1)
    if child == 0:
        if width is None:
            os.dup2(ends[1], 1), os.dup2(ends[1], 2)
        else:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        sys.stdout, sys.stderr = (open(place, "w", buffering=1, closefd=False) for place in (1, 2))  # noqa: SIM115
        os.chdir(folder)
        sys.argv = ["whence", *shlex.split(command)]
        try:
            whence_main()
        except SystemExit as left:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(int(left.code or 0))
    if width is None:
        os.close(ends[1])
    written = b""
    with contextlib.suppress(OSError):  # a terminal whose child has ended
        while more := os.read(ends[0], 1 << 16):
            written += more
    os.close(ends[0])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.decode(errors="replace")


def lines_of(written: str) -> list[str]:
    """Lines as they stand on the screen, without colours; a bar is many, drawn one over the other."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r\n", "\n")
    return [line for line in re.split(r"[\r\n]", plain) if line.strip()]


def walk(folder: Path, width: int | None, names: list[str]) -> list[str]:
    """Run every verb, show its last line; what is wrong."""
    wrong = []
    for name in names:
        code, written = run(COMMANDS[name], folder, width)
        lines = lines_of(written)
        last = lines[-1] if lines else ""
        sys.stdout.write(f"{name:20} {last}\n")
        (folder / "said").mkdir(exist_ok=True)
        (folder / "said" / f"{name.replace(' ', '-')}-{width or 'pipe'}.txt").write_text(written)
        if code or not ENDING.fullmatch(last):
            wrong.append(f"{name}, {width or 'piped'}: exit code {code}, last line {last!r}")
        bars = [line for line in lines if "/s" in line and "━" in line]
        if width is not None and any(len(line.rstrip()) > width for line in bars):
            wrong.append(f"{name}, {width}: a bar is wider than the terminal")
        if width is None and ("━" in written or "\x1b" in written or "\r" in written):
            wrong.append(f"{name}, piped: a bar or colours in a pipe")
        if "0 tokens/s" in re.sub(r"\d[\d,.]* tokens/s", "n tokens/s", written) or re.search(r"\b0 tokens/s", written):
            wrong.append(f"{name}: 0 tokens/s")
    return wrong


def pictures(folder: Path) -> list[str]:
    """Pictures of every page, into `screens`; what is broken in those of 390 pixels."""
    wrong, out = [], folder / "screens"
    out.mkdir(exist_ok=True)
    pages = sorted([*folder.glob("*.html"), *folder.glob("*.svg"), *folder.glob("whence-demo/*.html")])
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(profile)
        for page in pages:
            for width in (390, 1280):
                for scheme in ("light", "dark"):
                    name = "demo" if page.parent != folder else page.stem
                    emulated = [{"name": "prefers-color-scheme", "value": scheme}]
                    browser.call("Emulation.setEmulatedMedia", features=emulated)
                    browser.open(page, "", width)
                    height = min(4000, browser.value("document.documentElement.scrollHeight"))
                    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
                    picture = browser.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
                    (out / f"{name}-{width}-{scheme}.png").write_bytes(base64.b64decode(picture["data"]))
                if width == 390 and page.suffix == ".html":
                    wrong += [f"{name}, {width} pixels: {what}" for what in browser.broken()]
        browser.close()
    return wrong


def main() -> None:
    """Walk, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--screens", action="store_true")
    parser.add_argument("--verbs", help="names of `COMMANDS`, with commas between; unless given, all")
    chosen = parser.parse_args()
    chosen.folder.mkdir(exist_ok=True)
    names, wrong = (chosen.verbs.split(",") if chosen.verbs else list(COMMANDS)), []
    import transformers  # noqa: F401  # once, for all children

    for width in (None, 80, 120) if chosen.all else () if chosen.screens and chosen.verbs == "" else (None,):
        sys.stdout.write(f"-- {width or 'piped'}\n")
        place = chosen.folder / str(width or "piped")
        if not place.exists():
            place.mkdir()
            make_files(place)
        wrong += walk(place, width, names)
    if chosen.screens:
        wrong += pictures(chosen.folder / "piped")
    sys.stdout.write("".join(f"WRONG {line}\n" for line in wrong) or "nothing is wrong\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
