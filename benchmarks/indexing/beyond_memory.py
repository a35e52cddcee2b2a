"""An index larger than memory: how long a query takes, and in how much memory.

    python -m benchmarks.indexing.beyond_memory [--rows 100000 300000 1000000] [--linked 10000000] [--limit 2G]
        [--queries 20] [--work DIR] [-o FILE]

Indexes of random codes (one bit, 40,960 numbers, 5,120 bytes a row) are written as an index is, shard by shard; one of
`--linked` rows has the files of the largest as hard links, many times over. Each is then asked in a process of its
own, in a memory cgroup of `--limit` (needs root and cgroups v1), after the system's cache of files was dropped: one
query after another for the ten best rows and the ten worst, once its kernels are compiled. The first one checks every
shard's checksum, too. Beside it stands how fast the same files are read (`cat`).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whence.indexing.codecs import codec
from whence.indexing.manifest import Manifest, ShardEntry, part_file, shard_file
from whence.indexing.shards import STATUSES, ShardArrays, encoded, shard_pieces
from whence.indexing.store import Store
from whence.sizes import size_of

RESULTS = Path(__file__).parent / "results" / "beyond_memory.json"
WIDTH, SHARD = 40_960, 1024
GROUP = Path("/sys/fs/cgroup/memory/whence")
ASK = """
import json, sys, time, torch
from whence.indexing.memory import resident
from whence.indexing.store import Store
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
query = torch.randn(1, 1, 40_960)
for _ in range(2):  # compiles the kernels
    Store.open(sys.argv[3]).top_k(query, torch.ones(1), m=10, cosine=True)
start = time.perf_counter()
store, seconds, held = Store.open(sys.argv[1]), [], []
opened = time.perf_counter() - start
for number in range(int(sys.argv[2])):
    query = torch.randn(1, 1, store.manifest.width, generator=torch.Generator().manual_seed(number))
    start = time.perf_counter()
    store.top_k(query, torch.ones(1), m=10, cosine=True)
    seconds.append(time.perf_counter() - start)
    held.append(anonymous())
print(json.dumps({"opening": opened, "seconds": seconds, "anonymous bytes": held}))
"""


def main() -> None:
    """Write, ask, read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--linked", type=int, default=10_000_000)
    parser.add_argument("--limit", default="2G")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("/tmp/beyond"))
    parser.add_argument("-o", type=Path, default=RESULTS, dest="out")
    options = parser.parse_args()
    largest = options.work / str(max(options.rows))
    written = made(largest, max(options.rows))
    made(options.work / "warm", 30_000)
    found = {"bytes a row": WIDTH // 8, "limit": size_of(options.limit), "seconds of writing": written,
             "date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0]}  # fmt: skip
    for rows in [*options.rows, options.linked]:
        index = largest if rows == max(options.rows) else linked(largest, options.work / str(rows), rows)
        queries = options.queries if rows <= max(options.rows) else max(3, options.queries // 4)
        found[f"{rows:,} rows"] = {"reading": read(index, options.limit)} if rows == max(options.rows) else {}
        found[f"{rows:,} rows"] |= asked(index, queries, options.limit, options.work / "warm")
        print(rows, json.dumps(found[f"{rows:,} rows"]), flush=True)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def made(place: Path, rows: int) -> float:
    """An index of random codes; the seconds that it took to write."""
    if (place / "manifest.json").exists():
        return float("nan")
    start = time.perf_counter()
    shutil.rmtree(place, ignore_errors=True)
    count, onebit = -(-rows // SHARD), codec("onebit")
    manifest = Manifest(
        whence_version="0", codec="onebit", width=WIDTH, settings={}, checkpoints=({"name": "a", "step": 1},),
        corpora=({"name": "random", "digest": "0", "rows": rows},),
    )  # fmt: skip
    store, dice = Store.create(place, manifest), np.random.default_rng(0)
    counts = dict.fromkeys(STATUSES, 0)
    ok = torch.zeros(SHARD, dtype=torch.uint8)
    pattern = encoded(
        ShardArrays(vectors=torch.randn(SHARD, WIDTH), norm=torch.ones(SHARD), loss=torch.ones(SHARD), status=ok,
                    tokens=torch.ones(SHARD, dtype=torch.int32), counts={}), onebit)  # fmt: skip
    for part in range(count):
        size = min(SHARD, rows - part * SHARD)
        store.write_part(part, [{"id": str(part * SHARD + row), "source": None, "row": "{}"} for row in range(size)])
    store.finish_parts()
    for part in range(count):
        size = min(SHARD, rows - part * SHARD)
        codes = torch.from_numpy(dice.integers(0, 256, tuple(pattern.vectors.shape), dtype=np.uint8))
        some = {name: getattr(pattern, name)[:size] for name in ("scale", "norm", "loss", "status", "tokens")}
        pieces, total = shard_pieces(replace(pattern, vectors=codes.view(pattern.vectors.dtype)[:size], **some))
        name = shard_file(0, part)
        wrote = store.place.write(name, pieces, total=total)
        entry = ShardEntry(
            checkpoint=0,
            part=part,
            file=name,
            rows=size,
            **vars(wrote),
            counts=counts | {STATUSES[0]: size},
        )
        store.add_shard(entry)
    store.flush()
    return time.perf_counter() - start


def linked(source: Path, place: Path, rows: int) -> Path:
    """An index of the files of another, as often as it takes."""
    if (place / "manifest.json").exists():
        return place
    shutil.rmtree(place, ignore_errors=True)
    (place / "corpus").mkdir(parents=True)
    (place / "checkpoint-000").mkdir()
    manifest = Store.open(source).manifest
    parts, shards, first, number = [], [], 0, 0
    while first < rows:
        part, shard = (each[number % len(each)] for each in (manifest.parts, manifest.shards))
        parts.append(replace(part, file=part_file(number), first_row=first))
        shards.append(replace(shard, file=shard_file(0, number), part=number))
        for old, new in ((part.file, parts[-1].file), (shard.file, shards[-1].file)):
            os.link(source / old, place / new)
        first, number = first + part.rows, number + 1
    corpora = ({**manifest.corpora[0], "rows": first},)
    store = Store.open(source)
    copied = Store(replace(store.place, root=str(place)), manifest)
    copied._save(replace(manifest, parts=tuple(parts), shards=tuple(shards), corpora=corpora))
    return place


def in_group(limit: str, words: list[str]) -> tuple[str, int]:
    """What a command prints in a cgroup of so much memory, and the most that was charged to it."""
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.force_empty").write_text("0")
    (GROUP / "memory.limit_in_bytes").write_text(str(size_of(limit)))
    (GROUP / "memory.max_usage_in_bytes").write_text("0")
    enter = f'echo $$ > {GROUP}/cgroup.procs; exec "$@"'
    done = subprocess.run(["sh", "-c", enter, "sh", *words], check=True, capture_output=True, text=True)
    return done.stdout, int((GROUP / "memory.max_usage_in_bytes").read_text())


def asked(index: Path, queries: int, limit: str, warm: Path) -> dict[str, Any]:
    """Queries one after another."""
    text, charged = in_group(limit, [sys.executable, "-c", ASK, str(index), str(queries), str(warm)])
    found = json.loads(text.splitlines()[-1])
    later = sorted(found["seconds"][1:])
    size = sum(file.stat().st_size for file in (index / "checkpoint-000").iterdir())
    return {"bytes": size, "opening": found["opening"], "first query": found["seconds"][0],
            "p50": statistics.median(later), "p99": later[min(len(later) - 1, round(0.99 * len(later)))],
            "queries": queries, "bytes a second": size / statistics.median(later),
            "anonymous bytes, first and last": [found["anonymous bytes"][0], found["anonymous bytes"][-1]],
            "charged to the group at most": charged}  # fmt: skip


def read(index: Path, limit: str) -> dict[str, float]:
    """The same files by `cat`."""
    start = time.perf_counter()
    in_group(limit, ["sh", "-c", f"cat {index}/checkpoint-000/* > /dev/null"])
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in (index / "checkpoint-000").iterdir())
    return {"seconds": seconds, "bytes a second": size / seconds}


if __name__ == "__main__":
    main()
