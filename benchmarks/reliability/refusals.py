"""How long a refusal takes that needs no model: every verb, each in a process of its own.

    python -m benchmarks.reliability.refusals -o benchmarks/reliability/results/refusals.json

A refusal is one line on stderr and exit code 2. `tests/cli/test_refusals.py` runs the same commands in one process
that has no torch to import.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = "rows.jsonl"
COMMANDS = """
index ./none rows.jsonl -o x
index model ./none -o x
index rows.jsonl model -o x
index model rows.jsonl -o x --codec zip
index model rows.jsonl -o x --projection zip
index model rows.jsonl -o x --view zip
index model rows.jsonl -o model
trace none --prompt hi
trace none --prompt hi --method zip
select none --count 3
select rows.jsonl --method bm25
select rows.jsonl --method bm25 --count 3 --fraction 0.1
select rows.jsonl --method bm25 --count 3 --tasks none.jsonl
select rows.jsonl --method bm26 --count 3
select rows.jsonl --method bm25 --count 3 --cap web=2.0
select rows.jsonl --method bm25 --count 3 -o rows.jsonl
recover ./none model rows.jsonl
recover model model none.jsonl
recover model model rows.jsonl --method cosine
recover model model rows.jsonl --rounds 2
train ./none rows.jsonl -o run
train rows.jsonl model -o run
train model rows.jsonl -o run --lr -1
train model rows.jsonl -o run --schedule zip
train model rows.jsonl -o model
info none
verify none
append none rows.jsonl
bench ./none rows.jsonl
ablate none --eval rows.jsonl
mix law none.csv
mix law rows.jsonl --law zip
mix law rows.jsonl --cap web
mix suggest none --eval rows.jsonl
evaluate selection model rows.jsonl --tasks none.jsonl --graded rows.jsonl
evaluate selection model rows.jsonl --tasks a=rows.jsonl --graded b=rows.jsonl
evaluate join none none --eval rows.jsonl
pool train ./none rows.jsonl -o p
pool train model none.jsonl -o p
pool merge none --mixture micro -o m
pool grams none
pool verify none
"""


def commands() -> list[list[str]]:
    """The words of each command, to be run in a directory of `make_inputs`."""
    return [shlex.split(line) for line in COMMANDS.split("\n") if line]


def make_inputs(directory: Path) -> None:
    """Write a file of rows and the configuration of a model, which no refusal opens."""
    (directory / ROWS).write_text(json.dumps({"text": "a row"}) + "\n")
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text("{}")


def main() -> None:
    """Time each command three times, and write the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for words in commands():
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-m", "whence", *words], cwd=folder, capture_output=True, text=True, check=False
                )
                seconds.append(time.perf_counter() - start)
            message = done.stderr.rstrip("\n")
            is_refused = done.returncode == 2 and message.startswith("error ") and "\n" not in message
            rows.append({"command": shlex.join(words), "seconds": statistics.median(seconds), "refused": is_refused})
            print(f"{statistics.median(seconds):.2f} s  {shlex.join(words)}: {message}")
    worst = max(row["seconds"] for row in rows)
    out.write_text(json.dumps({"worst": worst, "refused": all(row["refused"] for row in rows), "rows": rows}, indent=1))
    print(f"{len(rows)} refusals, the slowest {worst:.2f} s")


if __name__ == "__main__":
    main()
