"""Data for bergson's MAGIC: rows in the order in which a run read them. Runs in bergson's environment.

    PYTHON magic_worker.py DIRECTORY

Reads DIRECTORY/order.json: `rows` and `queries`, each with `input_ids` and `labels`; `sequence`, the number of the row
at each place of the training; and `seed`. Writes the data sets DIRECTORY/train and DIRECTORY/queries. `bergson magic`
shuffles its data by `Dataset.shuffle(seed)`: rows are laid out so that its shuffling puts them in `sequence`. Each row
has its number for `doc_ids`, so that scores of a row are added up over epochs.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import json
import sys
from pathlib import Path

from datasets import Dataset


def main() -> None:
    """Write both data sets."""
    work = Path(sys.argv[1])
    order = json.loads((work / "order.json").read_text())
    rows, sequence = order["rows"], order["sequence"]
    longest = max(len(row["input_ids"]) for row in rows)
    shuffled = Dataset.from_dict({"place": list(range(len(sequence)))}).shuffle(seed=order["seed"])["place"]
    laid = [0] * len(sequence)
    for number, place in zip(sequence, shuffled, strict=True):
        laid[place] = number
    _dataset([rows[number] for number in laid], doc_ids=[[number] * longest for number in laid]).save_to_disk(
        str(work / "train")
    )
    _dataset(order["queries"]).save_to_disk(str(work / "queries"))


def _dataset(rows: list, **more: list) -> Dataset:
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    return Dataset.from_dict(columns | {"length": [len(ids) for ids in columns["input_ids"]]} | more)


if __name__ == "__main__":
    main()
