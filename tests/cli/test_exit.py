"""A process that has read an index ends as it should: threads of a library must not outlive the interpreter."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import whence

TRIES = 12  # each of a tenth's chance to abort, as it was


@pytest.mark.slow
def test_a_process_that_read_parquet_ends_quietly(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [f"row {n}" for n in range(2000)]}), tmp_path / "rows.parquet")
    code = (
        "import sys, pyarrow as pa\n"
        "from whence.corpus.row_files import parquet_file\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "table = parquet_file(pa.BufferReader(data)).read(use_threads=False)\n"
        "del table, data\n"
    )
    own = Path(whence.__file__).parent
    readers = [path.name for path in own.rglob("*.py") if re.search(r"read_table|[^_]ParquetFile\(", path.read_text())]
    assert readers == ["row_files.py"], "all Parquet is read by parquet_file"
    for _ in range(TRIES):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "rows.parquet")], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
