"""How long a user waits: `whence --help`, and from `whence index` to the first batch, in fresh processes.

    python -m benchmarks.indexing.startup [--model DIR] [--data DIR] [--repeats 5] [-o FILE]

The second is the time from the start of `python -m whence index` on all rows of alpaca to the first pass through the
model, less what importing torch and loading that model take by themselves in the same process. Bars: 1 s and 4 s.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Run in a fresh process: the command line's own entry point, with a clock at three places.
PROBE = """
import sys, time
began = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - began
import whence.indexing.vectors, whence.index, whence.cli
loading = [0.0]
own = whence.vectors.load_model
def timed(*args, **options):
    start = time.perf_counter()
    try:
        return own(*args, **options)
    finally:
        loading[0] += time.perf_counter() - start
whence.vectors.load_model = timed
def first_batch(*args, **options):
    print("SECONDS", time.perf_counter() - began - torch_seconds - loading[0], loading[0], torch_seconds, flush=True)
    sys.stdout.flush()
    import os
    os._exit(0)
whence.vectors.sketch = first_batch
sys.argv = ["whence", *sys.argv[1:]]
whence.cli.main()
"""


def to_first_batch(model: str, corpus: str) -> dict:
    """Seconds beyond torch and the model, and those two."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PROBE, "index", model, corpus, "-o", f"{folder}/index"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    told = next(line for line in said.splitlines() if "SECONDS" in line)
    beyond, model_seconds, torch_seconds = map(float, told.split("SECONDS")[1].split())
    return {"beyond": beyond, "model": model_seconds, "torch": torch_seconds}


def of_help() -> float:
    """Seconds of `whence --help`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "whence", "--help"], capture_output=True, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/indexing/results/startup.json"))
    args = parser.parse_args()
    corpus = f"{args.data}/instruct/alpaca.jsonl"
    rows = [to_first_batch(args.model, corpus) for _ in range(args.repeats)]
    helps = [of_help() for _ in range(args.repeats)]
    found = {"to_first_batch": rows, "help": helps, "load_average": os.getloadavg()}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    beyond, model, torch = (statistics.median(row[key] for row in rows) for key in ("beyond", "model", "torch"))
    print(f"to the first batch: {beyond:.2f} s beyond torch ({torch:.2f} s) and the model ({model:.2f} s)")
    print(f"whence --help: {statistics.median(helps):.2f} s")


if __name__ == "__main__":
    main()
