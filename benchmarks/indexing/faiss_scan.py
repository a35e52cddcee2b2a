"""Speed of FAISS's scan of one-bit codes (RaBitQ), beside a `sum()` over as many bytes, for `scan.py` to be held to.

    python3 -m venv ENV && ENV/bin/pip install faiss-cpu
    ENV/bin/python benchmarks/indexing/faiss_scan.py [--rows 100000] [--width 43008] [--repeats 7] [-o FILE]

In an environment of its own, since Whence does not depend on FAISS: its index holds codes with two numbers a row among
them, in memory of its own, so that it cannot read shards. Vectors are normal, as in `scan.py`; ten nearest by inner
product. `qb`: bits of the query. `IndexRaBitQFastScan` holds its codes in blocks of 32 rows for table look-ups.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np

CHUNK = 1000
MANY = 64


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=43_008)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent / "results" / "faiss_scan.json")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    index = faiss.IndexRaBitQ(arguments.width, faiss.METRIC_INNER_PRODUCT)
    fast = faiss.IndexRaBitQFastScan(arguments.width, faiss.METRIC_INNER_PRODUCT)
    for first in range(0, arguments.rows, CHUNK):
        vectors = rng.standard_normal((min(CHUNK, arguments.rows - first), arguments.width), dtype=np.float32)
        for each in (index, fast):
            if not first:
                each.train(vectors)
            each.add(vectors)
    queries = rng.standard_normal((MANY, arguments.width), dtype=np.float32)
    size = arguments.rows * arguments.width // 8
    threads = faiss.omp_get_max_threads()
    plain = np.array_split(np.ones(size // 4, np.float32), threads)
    pool = ThreadPoolExecutor(threads)
    kinds = {"sum": lambda: list(pool.map(np.sum, plain))}
    for name, each in (("rabitq", index), ("fast_scan", fast)):
        for bits in (4, 8):
            for many in (1, MANY):
                kinds[f"{name} qb={bits} queries={many}"] = lambda each=each, bits=bits, many=many: asked(
                    each, bits, queries[:many]
                )
    times = {name: [] for name in kinds}
    for _ in range(arguments.repeats):
        for name, work in kinds.items():
            if len(times[name]) > 1 and sum(times[name]) > 20:
                continue  # of what takes long, two repeats
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in middle.items():
        share = f"{size / seconds / 1e9:6.2f} GB/s   {middle['sum'] / seconds:4.0%} of sum()"
        print(f"{name:32} {seconds * 1e3:9.1f} ms   {share}")
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    document = {
        "rows": arguments.rows, "width": arguments.width, "bytes": size, "faiss": faiss.__version__,
        "threads": threads,
        "date": time.strftime("%Y-%m-%d"), "load_average": os.getloadavg(),
        "cpu": cpu[0].split(":")[1].strip() if cpu else None, "seconds": times,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


def asked(index: faiss.Index, bits: int, queries: np.ndarray) -> None:
    """One search."""
    index.qb = bits
    index.search(queries, 10)


if __name__ == "__main__":
    main()
