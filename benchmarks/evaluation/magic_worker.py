"""Data for bergson's MAGIC: rows in the order in which a run read them. Runs in bergson's environment.

    PYTHON magic_worker.py DIRECTORY

Reads DIRECTORY/order.json: `rows` and `queries`, each with `input_ids` and `labels`; `sequence`, the number of the row
at each place of the training; and `seed`. Writes the data sets DIRECTORY/train and DIRECTORY/queries. `bergson magic`
shuffles its data by `Dataset.shuffle(seed)`: rows are laid out so that its shuffling puts them in `sequence`, and each
of its scores is of one place of the layout, which DIRECTORY/laid.json tells: the number of the row there.
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
    shuffled = Dataset.from_dict({"place": list(range(len(sequence)))}).shuffle(seed=order["seed"])["place"]
    laid = [0] * len(sequence)
    for number, place in zip(sequence, shuffled, strict=True):
        laid[place] = number
    (work / "laid.json").write_text(json.dumps(laid))
    _dataset([rows[number] for number in laid]).save_to_disk(str(work / "train"))
    _dataset(order["queries"]).save_to_disk(str(work / "queries"))


def _dataset(rows: list) -> Dataset:
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    return Dataset.from_dict(columns | {"length": [len(ids) for ids in columns["input_ids"]]})


if __name__ == "__main__":
    main()
