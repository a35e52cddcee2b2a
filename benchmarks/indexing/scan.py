"""Speed of an exact scan over a warm store, beside the bandwidth of a plain fp32 `sum()` over as many bytes.

    python -m benchmarks.indexing.scan [--rows 100000] [--width 4096] [--repeats 9] [--dir DIR] [-o FILE]
    python -m benchmarks.indexing.scan --codecs onebit --width 43008 [--spread 0.037] [--check 8] [-o FILE]
    python -m benchmarks.indexing.scan --codecs onebit --width 43008 --bits --rows 1000000 --alone 200 [-o FILE]

Makes a store of random vectors in a temporary directory for each codec, in shards as an index has them, reads it
for two seconds (warm), then alternates: a `sum()` of an fp32 tensor in memory of as many bytes, the same over the
mapped file, a top-10 scan (both ends) for one query, and one for 64. Each is timed twice: after another kind of work,
which has filled the caches with its own bytes and left torch's threads awake, and at once again. Prints medians; FILE
gets every repeat and what machine it was.

Vectors are noise, so that all rows are about as good: the hardest case for a bound. With `--spread` S each row also has
a normal multiple, of standard deviation S, of a direction that queries have too: .037 gives products with one-bit rows
the spread of gradients' (base-6m, alpaca: 4.3 of the query's norm; noise has 1). `--bits`: one-bit rows are random
bits, as those of noise are, and no vectors are made. `--alone` N: so many single queries in turn, with the memory that
the process then holds. `--check` N: of so many queries, the rows found are compared with a scan that decodes every row.
 Bars, for bfloat16 and int8: one query at 80% of the bandwidth of `sum()`;
int8: 500 queries a second for 64 at once.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from whence.indexing.codecs import CODECS, Codec
from whence.indexing.ingest import rows_per_shard
from whence.indexing.manifest import Manifest
from whence.indexing.shards import Shard, ShardArrays, encoded
from whence.indexing.store import Store

MANY = 64
WARM_SECONDS = 2.0  # of each kind: a process compiles its kernel after a second of scanning
ASLEEP = 0.005  # seconds before each run: threads of the last one's products stay awake for a millisecond or two


def random_bits(arrays: ShardArrays, codec: Codec) -> Shard:
    """A shard of one-bit rows that are random bits, whatever the vectors are."""
    n, width = arrays.vectors.shape
    rng = np.random.default_rng(int(arrays.loss[0]))
    return Shard(
        vectors=torch.from_numpy(rng.integers(0, 256, (n, codec.columns(width)), dtype=np.uint8)),
        scale=torch.full((n,), math.sqrt(2 / math.pi)),
        norm=arrays.norm,
        loss=arrays.loss,
        status=arrays.status,
        tokens=arrays.tokens,
    )


def direction(width: int) -> torch.Tensor:
    """What rows and queries have in common, where they do."""
    return torch.randn(width, generator=torch.Generator().manual_seed(1))


def random_store(path: Path, codec: str, rows: int, width: int, spread: float, bits: bool) -> Store:
    """A complete store of normal vectors, or of random bits."""
    manifest = Manifest(
        whence_version="benchmark", codec=codec, width=width, settings={}, checkpoints=({"name": "only"},)
    )
    store = Store.create(path, manifest)
    rng, common = torch.Generator().manual_seed(0), direction(width)
    size = rows_per_shard(width)
    for part, first in enumerate(range(0, rows, size)):
        n = min(size, rows - first)
        store.write_part(part, [{"id": str(first + i), "source": None, "row": "{}"} for i in range(n)])
        vectors = torch.ones(1, 1).expand(n, width) if bits else torch.randn(n, width, generator=rng)
        if spread:
            vectors += torch.randn(n, 1, generator=rng) * spread * common
        arrays = ShardArrays(
            vectors=vectors,
            norm=vectors.norm(dim=1) if not bits else torch.full((n,), width**0.5),
            loss=torch.full((n,), float(part)),  # of which random bits are made, too
            status=torch.zeros(n, dtype=torch.uint8),
            tokens=torch.ones(n, dtype=torch.int32),
        )
        with mock.patch("whence.indexing.store.encoded", random_bits if bits else encoded):
            store.write_shard(0, part, arrays)
    store.finish_parts()
    return store


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measured(store: Store, rows: int, width: int, queries: torch.Tensor, repeats: int) -> dict:
    """Alternating repeats of sum, one query and many."""
    size = rows * store.codec.bytes_per_row(width)
    plain = torch.randn(size // 4)
    mapped = [store.shard(0, part).vectors for part in range(len(store.manifest.parts))]
    weight = torch.ones(1)
    kinds: dict[str, Callable[[], object]] = {
        "sum": plain.sum,
        "mapped_sum": lambda: [vectors.view(-1).view(torch.float32).sum() for vectors in mapped],
        "one_query": lambda: store.top_k(queries[:, :1], weight, m=10),
        "many_queries": lambda: store.top_k(queries, weight, m=10),
    }
    for work in kinds.values():
        until = time.perf_counter() + WARM_SECONDS
        while time.perf_counter() < until:
            work()
    times: dict[str, list[float]] = {name: [] for name in kinds}
    again: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, work in kinds.items():
            time.sleep(ASLEEP)
            times[name].append(seconds(work))
            again[name].append(seconds(work))
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bytes": size,
        "sum_gb_per_second": size / middle["sum"] / 1e9,
        "mapped_sum_gb_per_second": size / middle["mapped_sum"] / 1e9,
        "one_query_gb_per_second": size / middle["one_query"] / 1e9,
        "one_query_of_sum": share(times, "sum"),
        "one_query_of_mapped_sum": share(times, "mapped_sum"),
        "one_query_again_gb_per_second": size / statistics.median(again["one_query"]) / 1e9,
        "one_query_again_of_sum": share(again, "sum"),
        "many_queries": MANY,
        "many_queries_per_second": MANY / middle["many_queries"],
        "many_million_pairs_per_second": MANY * rows / middle["many_queries"] / 1e6,
        "seconds": times,
        "seconds_again": again,
    }


def alone(store: Store, queries: torch.Tensor, number: int) -> dict:
    """Percentiles of single queries in turn, each another one, and what the process then holds."""
    times = []
    for query in itertools.islice(itertools.cycle(queries[0]), number):
        # its entries in another order: another query
        shuffled = query[torch.randperm(len(query))][None, None]
        times.append(seconds(lambda query=shuffled: store.top_k(query, torch.ones(1), m=10)))
    return {
        "queries": number,
        "p50_seconds": statistics.median(times),
        "p99_seconds": statistics.quantiles(times, n=100)[98],
        "seconds": times,
        "memory_bytes": memory(),
    }


def memory() -> dict[str, int]:
    """Resident memory of this process: its own, and that of mapped files; and the most of both so far."""
    names = {"RssAnon": "own", "RssFile": "mapped", "VmHWM": "most"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {names[line[0][:-1]]: int(line[1]) * 1024 for line in lines if line[0][:-1] in names}


def agreement(store: Store, queries: torch.Tensor, number: int) -> dict:
    """Of so many queries, the share of the ten highest and lowest rows that a scan of decoded rows finds too."""
    some, weight = queries[:, :number], torch.ones(1)
    scores = torch.cat([scores for _, scores in store.scores(some, weight)], 1)
    best = torch.stack([scores.topk(10).indices, (-scores).topk(10).indices])
    shares = {}
    for name, asked in (("alone", [some[:, q : q + 1] for q in range(number)]), ("together", [queries])):
        found = [store.top_k(each, weight, m=10) for each in asked]
        rows = torch.stack([torch.cat([ends[end].rows for ends in found])[:number] for end in (0, 1)])
        equal = [
            len(set(a.tolist()) & set(b.tolist())) for a, b in zip(rows.flatten(0, 1), best.flatten(0, 1), strict=True)
        ]
        shares[name] = sum(equal) / (10 * len(equal))
    return {"queries": number, "rows_of_decoded_scan_found": shares}


def share(times: dict[str, list[float]], of: str) -> float:
    """Median speed of one query's scan, of that of something else in the same turn."""
    return statistics.median(a / b for a, b in zip(times[of], times["one_query"], strict=True))


def machine() -> dict:
    """What it ran on."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg(),
        "matrix_units": torch.cpu._is_amx_tile_supported(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=4096, help="entries of a vector")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--spread", type=float, default=0.0, help="of rows along a direction of all queries")
    parser.add_argument("--bits", action="store_true", help="rows are random bits")
    parser.add_argument("--alone", type=int, default=0, help="single queries, for percentiles")
    parser.add_argument("--check", type=int, default=0, help="queries to compare with a scan of decoded rows")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--dir", type=Path, help="where to make the stores (default: the system's temporary)")
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent / "results" / "scan.json")
    args = parser.parse_args()
    results = {}
    for name in args.codecs:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            store = random_store(Path(folder) / "index", name, args.rows, args.width, args.spread, args.bits)
            queries = torch.randn(1, MANY, args.width) + (direction(args.width) if args.spread else 0.0)
            results[name] = measured(store, args.rows, args.width, queries, args.repeats)
            if args.alone:
                results[name]["alone"] = alone(store, queries, args.alone)
            if args.check:
                results[name]["agreement"] = agreement(store, queries, args.check)
        told = results[name]
        print(
            f"{name:9} sum {told['sum_gb_per_second']:5.1f} GB/s   "
            f"one query {told['one_query_gb_per_second']:5.1f} GB/s ({told['one_query_of_sum']:4.0%}; "
            f"again {told['one_query_again_of_sum']:4.0%})   "
            f"{MANY} queries: {told['many_queries_per_second']:6.0f}/s, "
            f"{told['many_million_pairs_per_second']:6.1f} M pairs/s"
        )
        print(*(f"{name}: {told[name]}"[:300] for name in ("agreement",) if name in told))
        if "alone" in told:
            print({key: value for key, value in told["alone"].items() if key != "seconds"})
    document = {"rows": args.rows, "width": args.width, "spread": args.spread, "machine": machine(), "codecs": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
