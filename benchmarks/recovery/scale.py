"""`whence recover` over 100,000 rows: rows a second, memory as it goes, a SIGKILL and what the next run keeps.

The rows are those of all files of the data, again and again, each with its own id. Layers: the head, as in SELECT.
"""

import argparse
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from whence.recovery.evidence import ROWS_PER_PART
from whence.training.trainer import train

ROWS, LONGEST = 100_000, 64
KILLED_AT = 0.4
"""Of the parts of the first point."""


def run(options: argparse.Namespace, keep, kept: dict[str, object]) -> None:
    """Once."""
    if "head" in kept:
        return
    work = options.work / "scale"
    work.mkdir(parents=True, exist_ok=True)
    corpus, base = work / "corpus.jsonl", str(Path(options.model).resolve())
    files = sorted((options.data / "instruct").glob("*.jsonl")) + sorted((options.data / "domains").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().strip().split("\n")]
    random.Random(0).shuffle(lines)
    with corpus.open("w") as out:
        for number, line in enumerate(itertools.islice(itertools.cycle(lines), ROWS)):
            out.write(json.dumps(json.loads(line) | {"id": f"row-{number}"}) + "\n")
    known = [json.loads(line) for line in lines[:500]]
    model = train(base, known, work / "run", epochs=2, batch_size=16, max_tokens=LONGEST, checkpoints=1, lr=3e-4,
                  progress=False)  # fmt: skip
    words = [base, str(model), str(corpus), "--layers", "lm_head", "--method", "row_cosine", "--count", "500",
             "--max-tokens", str(LONGEST), "--work", str(work / "evidence"),
             "-o", str(work / "found.jsonl")]  # fmt: skip
    parts = -(-ROWS // ROWS_PER_PART)
    first = watched(words, work, until=round(KILLED_AT * parts))
    before = written(work)
    second = watched(words, work)
    after = written(work)
    keep("head", {
        "rows": ROWS, "longest": LONGEST, "killed": first, "went on": second,
        "parts kept": sum(after.get(name) == when for name, when in before.items()), "parts before": len(before),
        "parts": len(after), "evidence bytes": sum(file.stat().st_size for file in work.rglob("part-*")),
        "found": len((work / "found.jsonl").read_text().strip().split("\n")),
    })  # fmt: skip


def written(work: Path) -> dict[str, float]:
    """When each part was."""
    return {str(file): file.stat().st_mtime for file in work.rglob("part-*.safetensors")}


def watched(words: list[str], work: Path, *, until: int | None = None) -> dict[str, object]:
    """Run the command, to its end or until there are so many parts; resident memory (MB) at each tenth of the time."""
    start, seen = time.perf_counter(), []
    child = subprocess.Popen([sys.executable, "-m", "whence", "recover", *words], stdout=subprocess.DEVNULL)
    while child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text()
        seen += [int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("RssAnon")]
        if until is not None and len(written(work)) >= until:
            child.send_signal(signal.SIGKILL)
            child.wait()
        time.sleep(1)
    steps = [seen[min(len(seen) - 1, round(tenth * (len(seen) - 1) / 10))] for tenth in range(1, 11)]
    return {"seconds": time.perf_counter() - start, "rc": child.returncode, "anonymous MB": steps, "peak MB": max(seen)}
