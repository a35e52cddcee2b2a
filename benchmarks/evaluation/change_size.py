"""How large a change of the rows' weights replay still tells: banks of one run that leave out a half, a tenth, ...

    python -m benchmarks.evaluation.change_size WORK BANK... [-o FILE]

WORK is a directory of `benchmarks.evaluation.banks`, with replay's scores of the queries that are done; BANKs are of
its run and queries. For each bank, what the sum of the scores of the rows left out says of a query's loss is held
against what the loss did, in nats a token: Pearson and Spearman over subsets, slope of the real change on the predicted
one, and the mean rise of the loss; means or medians over queries. Written to results/change_size.json beside this file.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

from whence.evaluation.bank_store import Bank, open_bank
from whence.numerics import spearman

RESULTS = Path(__file__).parent / "results" / "change_size.json"


def main() -> None:
    """Compare each bank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("banks", nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    tables = [pyarrow.parquet.read_table(file) for file in sorted(options.work.glob("replay-0*.parquet"))]
    scores = pyarrow.concat_tables([table.replace_schema_metadata(None) for table in tables]).to_pandas()
    by_query = {str(name): dict(zip(own["id"], own["score"], strict=True)) for name, own in scores.groupby("query")}
    found = {Path(path).name: compared(open_bank(path), by_query) for path in options.banks}
    found["sums of all rows' scores"] = {name: round(sum(own.values()), 4) for name, own in by_query.items()}
    found["date"] = time.strftime("%Y-%m-%d")
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def compared(bank: Bank, by_query: dict[str, dict[str, float]]) -> dict:
    """Predicted and real changes of one bank's random subsets, for the queries that have scores."""
    places = [place for place, name in enumerate(bank.query_ids) if name in by_query]
    scores = torch.tensor([[by_query[bank.query_ids[place]][row] for row in bank.row_ids] for place in places])
    predicted = (~bank.included("random")).double() @ scores.double().T
    real = bank.losses("random")[:, places] - bank.full_losses[places]
    pairs = list(zip(predicted.T, real.T, strict=True))
    pearson = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
    slopes = [float(torch.cov(torch.stack(pair))[0, 1] / pair[0].var()) for pair in pairs]
    assert bank.description.subsets is not None
    return {
        "kept": bank.description.subsets.fraction,
        "subsets": len(predicted),
        "queries": len(places),
        "pearson": statistics.mean(pearson),
        "pearson by query": pearson,
        "spearman": statistics.mean(spearman(*pair) for pair in pairs),
        "slope, median": statistics.median(slopes),
        "slopes": slopes,
        "rise of the loss, median": float(real.mean(0).median()),
    }


if __name__ == "__main__":
    main()
