"""An index in an object store: killed, through a network that fails, and as fast as on a disk?

    python -m benchmarks.reliability.object_store [kills] [faults] [speed] [--kills 20] [--faults 1000] [--seed 0]
        [--model ../shared/models/base-6m] [--corpus ../shared/data/instruct/alpaca.jsonl] [-o FILE]

The store is moto's server on this machine. Whether it is whole is told by its objects: those of a build on a disk.

    kills   `whence index` in a process of its own, killed (SIGKILL) after a drawn time from the moment that it has the
            lease; the same command again, until it ends; then another build, until `--kills` were killed
    faults  index, append, trace and verify through a proxy (`faulty_store`) where one request in four is answered 503,
            cut in half, done without an answer, or late; until so many were injected
    speed   an index of real rows by the small model, on a disk and in the store in turn, three times each; and then
            every score of a query, by a process that has read nothing before and by one that has its copies
"""

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.reliability.faulty_store import BUCKET, Faults, endpoint, faulty, s3_store, stored

from whence.indexing.build import append, index, verify
from whence.indexing.opening import open_index
from whence.tracing.pipeline import trace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from conftest import contents, corpus_rows, save_tiny_llama, write_jsonl

RESULTS = Path(__file__).parent / "results" / "object_store.json"
TINY = {"projection": "two_sided", "width": 8}
ROWS_A_PART = 16


def main() -> None:
    """Run stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=[*STAGES])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000, help="of the stage speed")
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--corpus", default="../shared/data/instruct/alpaca.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", type=Path, default=RESULTS, dest="out")
    options = parser.parse_args()
    for stage in options.stages:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, s3_store(patch) as port:
            patch.setenv("WHENCE_CACHE", f"{folder}/cache")
            found = STAGES[stage](options, Path(folder), patch, port) | {"date": time.strftime("%Y-%m-%d")}
        document = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(document | {stage: found}, indent=1) + "\n")
        print(stage, json.dumps(found), flush=True)


def small_parts() -> None:
    """Parts of as few rows as there can be, in this process."""
    importlib.import_module("whence.indexing.ingest").ROWS_PER_SHARD = ROWS_A_PART


def stage_kills(options: argparse.Namespace, folder: Path, patch: Any, port: int) -> dict[str, Any]:
    """Killed builds."""
    small_parts()
    model, rows = save_tiny_llama(folder / "model"), write_jsonl(folder / "rows.jsonl", corpus_rows(640))
    index(model, rows, folder / "here", progress=False, **TINY)
    expected, dice = contents(folder / "here"), random.Random(options.seed)
    words = f"""
import importlib; importlib.import_module("whence.indexing.ingest").ROWS_PER_SHARD = {ROWS_A_PART}
from whence.indexing.build import index
index({str(model)!r}, {str(rows)!r}, PLACE, progress=False, projection="two_sided", width=8)
"""
    killed, builds, listed, after = 0, 0, [], []
    while killed < options.kills:
        name = f"kills-{builds}"
        builds += 1
        ends = False
        while not ends:
            child = subprocess.Popen([sys.executable, "-c", words.replace("PLACE", repr(f"s3://{BUCKET}/{name}"))])
            while holder(name) != child.pid and child.poll() is None:
                time.sleep(0.02)
            if killed < options.kills:
                time.sleep(dice.uniform(0, 3.0))
                if child.poll() is None:
                    child.kill()
                    killed += 1
                    child.wait()
                    listed.append(len([entry for entry in names(name) if "shard" in entry]))
                    continue
            assert child.wait() == 0, "a build failed"
            ends = True
        after.append(stored(name) == expected)
    return {"kills": killed, "builds": builds, "shards at the kills": listed, "builds with the local bytes": sum(after)}


def names(prefix: str) -> list[str]:
    """Names of the objects below a prefix."""
    found = client().list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
    return [entry["Key"].removeprefix(f"{prefix}/") for entry in found]


def holder(prefix: str) -> int | None:
    """The process that has the lease of a directory."""
    with suppress(client().exceptions.NoSuchKey):
        lease = client().get_object(Bucket=BUCKET, Key=f"{prefix}/whence.lease")["Body"].read()
        return json.loads(lease)["process"]
    return None


@cache
def client() -> Any:
    """A client of the store."""
    import boto3

    return boto3.client("s3")


def stage_faults(options: argparse.Namespace, folder: Path, patch: Any, port: int) -> dict[str, Any]:
    """Requests that fail."""
    small_parts()
    model, query = save_tiny_llama(folder / "model"), ("5 and 3?", " yes, 12")
    index(model, corpus_rows(80), folder / "here", progress=False, **TINY)
    append(folder / "here", corpus_rows(40, first=80), progress=False)
    expected, hits = contents(folder / "here"), [hit.id for hit in trace(folder / "here", *query, top=5).hits]
    faults, rounds, whole, same, clean = Faults(every=4, seed=options.seed), 0, 0, 0, 0
    with faulty(port, faults) as proxy:
        while sum(faults.injected.values()) < options.faults:
            place = f"s3://{BUCKET}/faults-{rounds}"
            endpoint(patch, proxy)
            index(model, corpus_rows(80), place, progress=False, **TINY)
            append(place, corpus_rows(40, first=80), progress=False)
            same += [hit.id for hit in trace(place, *query, top=5).hits] == hits
            clean += verify(place) == ([], [])
            endpoint(patch, port)
            whole += stored(f"faults-{rounds}") == expected
            rounds += 1
            print(f"{sum(faults.injected.values())} faults, {whole} of {rounds} whole", flush=True)
    return {"faults": faults.injected, "rounds": rounds, "the local bytes": whole, "the same trace": same,
            "verified": clean}  # fmt: skip


def stage_speed(options: argparse.Namespace, folder: Path, patch: Any, port: int) -> dict[str, Any]:
    """Building and reading."""
    rows = [json.loads(line) for line in Path(options.corpus).read_text().splitlines()[: options.rows]]
    seconds: dict[str, list[float]] = {"disk": [], "store": []}
    for number in range(3):
        for kind, place in (("disk", f"{folder}/{number}"), ("store", f"s3://{BUCKET}/speed-{number}")):
            seconds[kind].append(timed(lambda place=place: index(options.model, rows, place, progress=False)))
            print(kind, seconds[kind][-1], flush=True)
    ratios = [disk / store for disk, store in zip(seconds["disk"], seconds["store"], strict=True)]
    scans = {}
    for kind, place in (("disk", f"{folder}/0"), ("store, first", f"s3://{BUCKET}/speed-0"),
                        ("store, again", f"s3://{BUCKET}/speed-0")):  # fmt: skip
        opened = open_index(place)
        queries = torch.randn(1, 1, opened.store.manifest.width)
        scans[kind] = timed(lambda opened=opened, queries=queries: opened.store.top_k(queries, torch.ones(1), m=10))
    return {"rows": len(rows), "seconds of a build": seconds, "throughput over a disk's": statistics.median(ratios),
            "seconds of a scan": scans, "bytes": open_index(f"{folder}/0").store.info()["bytes"],
            "load": os.getloadavg()[0]}  # fmt: skip


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


STAGES = {"kills": stage_kills, "faults": stage_faults, "speed": stage_speed}

if __name__ == "__main__":
    main()
