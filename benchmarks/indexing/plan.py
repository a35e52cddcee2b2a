"""What `whence plan` says of an index, and what the build then takes: time, bytes and memory, on base-6m.

    python benchmarks/indexing/plan.py MODEL CORPUS --rows 1500 -o benchmarks/indexing/results/plan.json

Each is a command of its own. The plan runs before and after the build, since a busy machine changes between; time is
compared with the mean of the two. Memory is the largest resident size of the process (`VmHWM`).
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEASURED = """
import atexit, sys
from whence.indexing.memory import peak_resident
atexit.register(lambda: sys.stderr.write(f"peak {peak_resident()}"))
from whence.cli.app import main
main()
"""


def run(*words):
    """A command's JSON, its seconds, and its largest memory in bytes."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words), "--json"], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - start
    return json.loads(done.stdout), seconds, int(done.stderr.rpartition("peak ")[2])


def measured(model, corpus, settings):
    """Plan, build, plan again."""
    with tempfile.TemporaryDirectory() as home:
        words = (model, corpus, "-o", f"{home}/index", *settings)
        load = os.getloadavg()[0]
        first, planning, _ = run("plan", *words)
        info, seconds, peak = run("index", *words)
        files = sum(file.stat().st_size for file in Path(home).rglob("*") if file.is_file())
        second, _, _ = run("plan", model, corpus, "-o", f"{home}/other", *settings)
    said = (first["seconds"] + second["seconds"]) / 2
    return {
        "settings": list(settings),
        "rows": info["rows"],
        "load_before": load,
        "tokens_per_batch": info["settings"]["tokens_per_batch"],
        "seconds": {"planned": [first["seconds"], second["seconds"]], "taken": seconds, "ratio": said / seconds},
        "bytes": {"planned": first["disk_bytes"], "taken": files, "ratio": first["disk_bytes"] / files},
        "memory": {"planned": first["memory"], "taken": peak, "ratio": first["memory"] / peak},
        "planning_seconds": planning,
    }


def main():
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("corpus")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--bounds", nargs="*", default=["800M", "900M", "1G"], help="bounds of --memory, on 500 rows")
    parser.add_argument("-o", "--out", required=True)
    args = parser.parse_args()
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "unknown")  # fmt: skip
    results = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "plans": [],
        "bounds": [],
    }
    with tempfile.TemporaryDirectory() as home:
        lines = Path(args.corpus).read_text().splitlines(keepends=True)
        few, short = Path(home) / "rows.jsonl", Path(home) / "short.jsonl"
        few.write_text("".join(lines[: args.rows]))
        short.write_text("".join(lines[:500]))
        for settings in ((), ("--projection", "two_sided", "--codec", "bfloat16")):
            results["plans"].append(measured(args.model, few, settings))
            print(json.dumps(results["plans"][-1]), flush=True)
        for bound in args.bounds:
            info, seconds, peak = run("index", args.model, short, "-o", f"{home}/{bound}", "--memory", bound)
            tokens = info["settings"]["tokens_per_batch"]
            results["bounds"].append({"bound": bound, "peak": peak, "tokens_per_batch": tokens, "seconds": seconds})
            print(json.dumps(results["bounds"][-1]), flush=True)
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
