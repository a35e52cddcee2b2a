"""How far the optimizer's views agree: Adam in both modes, frozen-v on a plain index, and plain gradients.

python -m benchmarks.gradients.adam ../shared/models/base-6m ../shared/data/instruct

A LoRA of r = 8 (LESS' targets) is trained for 40 steps of 16 rows on a mixture of four sources. Under its checkpoints
after 10 and 40 steps, 500 other rows are indexed without a projection (`identity`), by each view, and scored for 16
queries. Two views agree by the rank correlation of a query's scores, and by the overlap of its best 5%, means over
the queries. Numbers go to benchmarks/gradients/results/adam.json; about six minutes on one core.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

from scipy.stats import spearmanr
from torch import Tensor

from whence.corpus.tokens import Encoded, encode
from whence.gradients.space import ADAM_MODES as MODES
from whence.indexing.build import index
from whence.selection.frozen_adam import FrozenView
from whence.selection.views import IndexView
from whence.training.trainer import train

RESULTS = Path(__file__).with_name("results") / "adam.json"
SOURCES = ("alpaca", "gsm8k_train", "dolly", "p3")
TRAINED, POOL, QUERIES = slice(1000, 1150), slice(0, 125), slice(1900, 1904)
RECIPE = {"lora_rank": 8, "lora_targets": "q_proj,k_proj,v_proj,o_proj", "batch_size": 16, "lr": 2e-4}
STEPS = (10, 40)
BEST = 25


def main() -> None:
    """Train, index, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    rows = {name: lines(arguments.data / f"{name}.jsonl", 2000) for name in SOURCES}
    trained, pool, queries = (
        [row for found in rows.values() for row in found[part]] for part in (TRAINED, POOL, QUERIES)
    )
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run = train(arguments.model, trained, place / "run", max_steps=max(STEPS), checkpoints=4, **RECIPE)
        for step in STEPS:
            found[f"after {step} steps"] = compared(run / f"checkpoint-{step}", pool, queries, place / str(step))
            print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def lines(file: Path, count: int) -> list[dict]:
    """The first rows of a jsonl file."""
    with file.open() as stream:
        return [json.loads(line) for line in itertools.islice(stream, count)]


def compared(checkpoint: Path, pool: list[dict], queries: list[dict], place: Path) -> dict[str, dict]:
    """Agreement of every pair of interest under one checkpoint."""
    options = {"projection": "identity", "codec": "float32", "max_tokens": 256}
    plain = index(checkpoint, pool, place / "sgd", **options)
    adam = {mode: index(checkpoint, pool, place / mode, view="adam", adam_mode=mode, **options) for mode in MODES}
    asked = [encode(row, plain.model().tokenizer, 256) for row in queries]
    out = {}
    for kind, cosine in (("dot", False), ("cosine", True)):
        sgd = scores(IndexView(plain), asked, cosine)
        true = {mode: scores(IndexView(adam[mode]), asked, cosine) for mode in MODES}
        out[f"{kind}: less, torch"] = agreement(true["less"], true["torch"])
        for mode in MODES:
            frozen = scores(FrozenView(plain, adam_mode=mode), asked, cosine)
            out[f"{kind}: frozen-v, {mode}"] = agreement(frozen, true[mode])
            out[f"{kind}: sgd, {mode}"] = agreement(sgd, true[mode])
    return out


def scores(view: IndexView, asked: list[Encoded], cosine: bool) -> Tensor:
    """[q n], by the vectors that the view has."""
    queries = view.query_vectors(asked)
    return view.scores(queries / view.norms(queries)[:, :, None] if cosine else queries, cosine=cosine)


def agreement(one: Tensor, other: Tensor) -> dict[str, float]:
    """Rank correlation and overlap of the best, means over queries."""
    correlations = [float(spearmanr(a, b).statistic) for a, b in zip(one, other, strict=True)]
    best = [[{*scores.topk(BEST).indices.tolist()} for scores in side] for side in (one, other)]
    overlaps = [len(a & b) / BEST for a, b in zip(*best, strict=True)]
    return {
        "correlation": round(sum(correlations) / len(correlations), 3),
        "least correlation": round(min(correlations), 3),
        "overlap": round(sum(overlaps) / len(overlaps), 3),
    }


if __name__ == "__main__":
    main()
