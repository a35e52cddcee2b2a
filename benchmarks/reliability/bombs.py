"""How much memory does a small file take that holds a very large row, or very many rows?

    python -m benchmarks.reliability.bombs [--name NAME] [--only BOMB ...] [-o FILE]

Each bomb is made in a temporary directory, and `whence index` reads it in a process of its own, whose peak of memory is
taken from the kernel, and which is stopped after `--limit` seconds. NAME is the commit's name in the results; each run
adds its own to FILE. The address space of the process is limited to 12 GiB, so that the machine survives.

    cell        Parquet of one row with a cell of 1 GiB
    cell among  Parquet of 1,000 rows, one of them with a cell of 1 GiB
    line        .jsonl.gz with one line of 3 GiB
    cell of csv .csv.gz with one cell of 3 GiB
    item        .json.gz, an array of one object of 3 GiB
    rows        .parquet of 20 million rows of 100 bytes, of which `whence index` counts and checks every one
    long rows   .jsonl of three rows of 10 MB, which are to be indexed
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

RESULTS = Path(__file__).parent / "results" / "bombs.json"
GIB = 2**30


def compressed(folder: Path, name: str, begin: bytes, end: bytes, size: int) -> Path:
    """A gzip file of one long run of letters between two pieces."""
    path = folder / name
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(begin)
        for _ in range(size // 2**24):
            file.write(b"a" * 2**24)
        file.write(end)
    return path


def parquet(folder: Path, name: str, *tables: dict[str, Any], **options: Any) -> Path:
    """A Parquet file of tables of one column `text`, one behind another in the same row group."""
    path = folder / name
    pq.write_table(pa.concat_tables([pa.table(table) for table in tables]), path, compression="zstd", **options)
    return path


def long_rows(folder: Path) -> Path:
    """Three rows of 10 MB of English."""
    corpus = Path("../shared/data/instruct/alpaca.jsonl").read_text().splitlines()
    text = " ".join(json.loads(line)["output"] for line in corpus)
    path = folder / "long.jsonl"
    with path.open("w") as file:
        for number in range(3):
            begin = number * 1_000_000
            file.write(json.dumps({"text": (text[begin:] * 4)[:10_000_000]}) + "\n")
    return path


BOMBS: dict[str, Callable[[Path], Path]] = {
    "cell": lambda folder: parquet(folder, "cell.parquet", {"text": ["a" * GIB]}, use_dictionary=False),
    "cell among": lambda folder: parquet(
        folder, "among.parquet", {"text": [f"row {n}" for n in range(999)]}, {"text": ["a" * GIB]}, use_dictionary=False
    ),
    "line": lambda folder: compressed(folder, "line.jsonl.gz", b'{"text": "', b'"}\n', 3 * GIB),
    "cell of csv": lambda folder: compressed(folder, "cell.csv.gz", b"text\n", b"\n", 3 * GIB),
    "item": lambda folder: compressed(folder, "item.json.gz", b'[{"text": "', b'"}]\n', 3 * GIB),
    "rows": lambda folder: parquet(
        folder, "rows.parquet", {"text": pa.array(["twenty words " * 7]).take(pa.array([0] * 20_000_000))}
    ),
    "long rows": long_rows,
}


def limited() -> None:
    """Limit the address space of the process that is about to begin."""
    resource.setrlimit(resource.RLIMIT_AS, (12 * GIB, 12 * GIB))


def peak_bytes(pid: int) -> int:
    """Peak of a process' resident memory since it began its program."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def measured(bomb: Path, model: str, limit: float) -> dict[str, Any]:
    """What `whence index` says of a file, its seconds of CPU, and its peak of memory."""
    words = [sys.executable, "-m", "whence", "index", model, str(bomb), "-o", str(bomb.parent / "index"), "--restart"]
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, stdout=errors, stderr=errors, preexec_fn=limited)
        peak = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, peak_bytes(process.pid))
            if time.perf_counter() - begin > limit:
                process.kill()
            time.sleep(0.05)
        errors.seek(0)
        lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return {
        "bytes on disk": bomb.stat().st_size,
        "code": os.waitstatus_to_exitcode(status),
        "CPU seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak GiB": round(peak / GIB, 2),
        "last line": (lines or [""])[-1].replace(str(bomb.parent), "FOLDER")[-300:],
    }


def main() -> None:
    """Measure each bomb, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="now")
    parser.add_argument("--only", nargs="*", choices=BOMBS)
    parser.add_argument("--limit", type=float, default=600)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.only or BOMBS:
        with tempfile.TemporaryDirectory() as folder:
            result = measured(BOMBS[name](Path(folder)), options.model, options.limit)
        results.setdefault(options.name, {})[name] = result
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, result, flush=True)


if __name__ == "__main__":
    main()
