r"""Index time of Whence, bergson and dattri's LoGra over forward + backward, side by side, each in its own environment.

    python -m benchmarks.indexing.peers [--bergson PYTHON] [--dattri PYTHON] [--model DIR] [--corpus FILE]
        [--batches 8 16 32] [--rounds 12] [--core 1] [-o FILE]

Every tool runs in a process of its own (`peer_worker.py`), in one thread, on one core. They take turns: in each round
every tool times its own training pass and its index of the same batch of 128-token rows, and a cell is the median over
rounds of index over pass, of one tool in one round. The first two rounds, in which projections are drawn and compiled,
do not count. Seconds are of the processor, which other work on the machine disturbs least; wall seconds are kept too.
A run that was stopped goes on with the batch sizes that FILE does not have. Environments, each about a gigabyte:

    python -m venv /tmp/env-bergson && /tmp/env-bergson/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/env-bergson/bin/pip install --no-deps bergson==2.5.1
    /tmp/env-bergson/bin/pip install accelerate datasets jaxtyping ml_dtypes natsort peft petname simple-parsing \
        torchopt torch==2.13.0 transformers==5.23.0
    python -m venv /tmp/env-dattri && /tmp/env-dattri/bin/pip install torch==2.13.0 transformers==5.23.0 dattri==0.3.0
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.indexing.speed import machine

from whence.indexing.speed import make_batches
from whence.indexing.vectors import IndexSettings, load_for

WORKER = Path(__file__).with_name("peer_worker.py")
LENGTH = 128
WARMING = 2


def main() -> None:
    """Measure each batch size that FILE does not have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bergson", default="/tmp/env-bergson/bin/python", help="Python that has bergson")
    parser.add_argument("--dattri", default="/tmp/env-dattri/bin/python", help="Python that has dattri")
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--corpus", default="../shared/data/domains/wikitext.jsonl")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("-o", "--out", default="benchmarks/indexing/results/peers.json")
    arguments = parser.parse_args()
    pythons = {"whence": sys.executable, "bergson": arguments.bergson, "dattri": arguments.dattri}
    if missing := [f"{tool} ({python})" for tool, python in pythons.items() if not Path(python).exists()]:
        parser.error(f"no Python of {', '.join(missing)}; --help says how to make the environments")
    out = Path(arguments.out)
    found = json.loads(out.read_text()) if out.exists() else {"batches": {}}
    settings = IndexSettings()
    loaded = load_for(arguments.model, settings)
    for size in arguments.batches:
        if str(size) in found["batches"]:
            continue
        count = arguments.rounds + WARMING
        ids = [batch.ids.tolist() for batch in make_batches(loaded, arguments.corpus, size, LENGTH, count, settings)]
        found["batches"][str(size)] = measured(pythons, arguments.model, ids, arguments.core)
        out.write_text(json.dumps(found, indent=1) + "\n")


def measured(pythons: dict[str, str], model: str, batches: list[list[list[int]]], core: int) -> dict[str, Any]:
    """The rows of a table for one batch size: ratios of each tool's ways to its own pass."""
    load = os.getloadavg()[0]
    with workers(pythons, model, core) as tools:
        ways = {tool: started["ways"] for tool, (_, started) in tools.items()}
        seconds: dict[str, list[dict[str, dict]]] = {tool: [] for tool in tools}
        names = list(tools)
        for number, ids in enumerate(batches):
            turn = number % len(names)
            for tool in names[turn:] + names[:turn]:  # everything in turn
                start = number % len(ways[tool])
                order = ways[tool][start:] + ways[tool][:start]
                seconds[tool].append({way: asked(tools[tool][0], way, ids) for way in order})
        versions = {tool: started["versions"] for tool, (_, started) in tools.items()}
    report: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "processor": processor(), "machine": machine()}
    report |= {"core": core, "load_before": load, "load_after": os.getloadavg()[0], "versions": versions, "rows": {}}
    for tool, rounds in seconds.items():
        for way in ways[tool][1:]:
            row = ratios([(one[way], one["pass"]) for one in rounds[WARMING:]])
            report["rows"][f"{tool} {way}"] = row | {"first_batch_seconds": rounds[0][way]["wall"]}
            low, high = row["cpu_range"]
            print(f"batch {len(batches[0]):3d}  {tool + ' ' + way:60s} {row['cpu']:.3f} ({low:.3f} to {high:.3f})")
    return report


def ratios(pairs: list[tuple[dict, dict]]) -> dict[str, Any]:
    """Median over rounds of index over pass, with the middle half and what a row takes."""
    row: dict[str, Any] = {}
    for clock in ("cpu", "wall"):
        values = [index[clock] / training[clock] for index, training in pairs]
        low, middle, high = statistics.quantiles(values, n=4)
        row |= {clock: round(middle, 4), f"{clock}_range": [round(low, 4), round(high, 4)]}
    row["pass_cpu_seconds"] = statistics.median(training["cpu"] for _, training in pairs)
    return row | {"bytes_per_row": pairs[0][0]["bytes"], "rounds": len(pairs)}


@contextmanager
def workers(pythons: dict[str, str], model: str, core: int) -> Iterator[dict[str, tuple[subprocess.Popen, dict]]]:
    """A process of each tool, and what it said of itself."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    made: dict[str, tuple[subprocess.Popen, dict]] = {}
    try:
        for tool, python in pythons.items():
            own = environment if tool == "whence" else environment | {"PYTHONPATH": ""}
            process = subprocess.Popen(
                [python, str(WORKER), tool, model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=own,
            )
            os.sched_setaffinity(process.pid, {core})
            made[tool] = (process, answered(process))
        yield made
    finally:
        for process, _ in made.values():
            process.kill()
            process.wait()


def asked(process: subprocess.Popen, way: str, ids: list[list[int]]) -> dict:
    """Seconds of one way over one batch."""
    assert process.stdin
    process.stdin.write(json.dumps({"way": way, "ids": ids}) + "\n")
    process.stdin.flush()
    return answered(process)


def answered(process: subprocess.Popen) -> dict:
    """The next line of a worker."""
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args} ended; run it by hand to see why")
    return json.loads(line)


def processor() -> str:
    """The CPU as Linux names it, with the number that tells its generation."""
    fields = dict(
        [part.strip() for part in line.split(":", 1)]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    return f"{fields['model name']}, family {fields['cpu family']}, model {fields['model']}"


if __name__ == "__main__":
    main()
