"""Whole replays by differences of gradients, held against those by second derivatives: their scores, and their LDS.

    python -m benchmarks.evaluation.replay_differences BANK --exact FILE... --differences FILE... --name NAME

FILEs are parts that the stages `replay` and `mean` of `benchmarks.evaluation.banks` wrote, by the same training, with
`differences` or without; queries that both have are compared. Written to results/replay_differences.json beside this
file: Pearson correlation of a query's scores over rows, length of their difference in the length of the exact ones, LDS
of each way, and how far the first is below the second, with its 95% interval over subsets and queries.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from benchmarks.evaluation.magic import of_first_queries

from whence.evaluation.bank_scores import evaluate_lds
from whence.evaluation.bank_store import open_bank

RESULTS = Path(__file__).parent / "results" / "replay_differences.json"
EXACT, DIFFERENCES = "second derivatives", "differences"


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank")
    parser.add_argument("--exact", nargs="+", required=True, type=Path)
    parser.add_argument("--differences", nargs="+", required=True, type=Path)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    bank = open_bank(options.bank)
    tables = {EXACT: joined(options.exact), DIFFERENCES: joined(options.differences)}
    by_query = {way: scores_of(table) for way, table in tables.items()}
    first = sum(all(name in found for found in by_query.values()) for name in bank.query_ids)
    bank = of_first_queries(bank, first)
    pearson, lengths = [], []
    for name in bank.query_ids:
        exact, found = (torch.tensor([by_query[way][name][row] for row in bank.row_ids]) for way in tables)
        pearson.append(float(torch.corrcoef(torch.stack([exact, found]))[0, 1]))
        lengths.append(float((found - exact).norm() / exact.norm()))
    with tempfile.TemporaryDirectory() as folder:
        files = {way: f"{folder}/{number}.parquet" for number, way in enumerate(tables)}
        for way, table in tables.items():
            pyarrow.parquet.write_table(table, files[way])
        table = evaluate_lds(bank, [], scores=files, costs=dict.fromkeys(tables, 0.0), progress=False).table
    marks = {mark.method: mark for mark in table.marks}
    found = {
        "queries": first,
        "Pearson": {"mean": statistics.mean(pearson), "least": min(pearson)},
        "length of the difference": {"mean": statistics.mean(lengths), "largest": max(lengths)},
        "LDS": {way: marks[way].spearman._asdict() for way in tables},
        "LDS of the mean loss": {way: marks[way].of_mean.value for way in tables},
        "below second derivatives by": table.difference(EXACT, DIFFERENCES)._asdict(),
        "seconds": {EXACT: seconds_of(options.exact), DIFFERENCES: seconds_of(options.differences)},
        "date": time.strftime("%Y-%m-%d"),
    }
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(document | {options.name: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def joined(files: list[Path]) -> pyarrow.Table:
    """Parts as one table."""
    return pyarrow.concat_tables([pyarrow.parquet.read_table(file).replace_schema_metadata(None) for file in files])


def scores_of(table: pyarrow.Table) -> dict[str, dict[str, float]]:
    """Scores by query and row."""
    out: dict[str, dict[str, float]] = {}
    for query, row, score in zip(*(table[name].to_pylist() for name in ("query", "id", "score")), strict=True):
        out.setdefault(query, {})[row] = score
    return out


def seconds_of(files: list[Path]) -> float:
    """What the parts took, on the clock."""
    return round(sum(float(pyarrow.parquet.read_schema(file).metadata[b"seconds"]) for file in files), 1)


if __name__ == "__main__":
    main()
