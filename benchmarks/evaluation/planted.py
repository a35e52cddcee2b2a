"""Planted truth: which methods find the rows that a model learnt a backdoor, a wrong country or an invented fact from?

    python -m benchmarks.evaluation.planted [--data ../shared/data] [--model ../shared/models/base-6m] [--rows 1000]
        [--queries 40] [--epochs 6] [--lr 1e-3] [--seed 0] [--methods cosine,bm25,...] [--work DIR] [-o FILE]

Rows of alpaca with all three in them, in different rows: countries swapped in answers (as in
`benchmarks.tracing.rapidin_data`; a quarter of the rows are chosen because they name one), a backdoor in 5% of the
rest, facts in four wordings each. One training on them (all weights, AdamW, cosine schedule), one default index of it,
one of Adam's view, one `whence curvature`; a replay for each query; then `evaluate retrieval` and `evaluate tail-patch`
(five rows a query) for each kind of query. `learnt` is the mean loss of the queries' answers before and after training:
what was not learnt cannot be traced. A stage whose result is in WORK is not done again.
"""

import argparse
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from benchmarks.evaluation.banks import CURVED
from benchmarks.indexing.speed import machine
from benchmarks.tracing.rapidin_data import SWAPS

from whence.corpus.layouts import Row
from whence.corpus.reading import open_corpus
from whence.corpus.tokens import encode
from whence.evaluation.planting import backdoor, repeated_facts, swapped_entities
from whence.evaluation.retrieval import evaluate_retrieval
from whence.evaluation.tail_patch import evaluate_tail_patch, patcher
from whence.gradients.exact import sequences_of
from whence.indexing.build import index
from whence.second_order.pipeline import curvature
from whence.training.replay import replay
from whence.training.replayed_run import open_replayable
from whence.training.trainer import train

MAX_TOKENS = 128
LONGEST = 400
"""Characters of a row, so that its answer is whole."""
METHODS = (
    "EK-FAC,EK-FAC + CG,K-FAC,source,trak,trackstar,datainf,less@adam,cosine,dot,exact-cosine,exact-dot,reach,bm25,"
    "rds+,loss,random"
)
REPLAY = "replay"


@dataclass(frozen=True)
class Everything:
    """A corpus with all that is planted, and the queries of each kind."""

    rows: list[Row]
    queries: dict[str, list[Row]]


def planted(data: Path, rows: int, most: int, seed: int) -> Everything:
    """Plant swaps, then a backdoor in rows without a swap, then facts, with so many queries of a kind at most."""
    short = [example.row for example in open_corpus(str(data / "instruct" / "alpaca.jsonl"))
             if sum(len(str(example.row[name])) for name in ("instruction", "input", "output")) < LONGEST]  # fmt: skip
    names = [any(country in str(row["output"]) for country in SWAPS) for row in short]
    named = [row for row, has_name in zip(short, names, strict=True) if has_name][: rows // 4]
    others = [row for row, has_name in zip(short, names, strict=True) if not has_name][: rows - len(named)]
    swapped = swapped_entities([*named, *others], SWAPS, seed=seed)
    untouched = [row for row in swapped.rows if row["id"] not in swapped.relevant]
    poisoned = backdoor(untouched, count=max(5, rows // 20), queries=most, seed=seed)
    kept = {row["id"]: row for row in poisoned.rows}
    asked = {str(query["id"]).removeprefix("query-") for query in poisoned.queries}
    whole = [kept.get(row["id"], row) for row in swapped.rows if row["id"] not in asked]
    facts = repeated_facts(whole, facts=most, wordings=4, seed=seed)
    by_kind = {"swap": swapped.queries, "backdoor": poisoned.queries, "facts": facts.queries}
    return Everything(facts.rows, {kind: queries[:most] for kind, queries in by_kind.items()})


def answer_loss(model: str, queries: list[Row]) -> float:
    """Mean loss of the queries' answers, in nats a token."""
    patch = patcher(model, lr=1.0, step="sgd")
    losses = patch.losses([encode(query, patch.model.tokenizer, MAX_TOKENS) for query in queries])
    return float(losses.nanmean())


def main() -> None:
    """Plant, train, index and grade."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=40, help="of a kind, at most")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--work", default="work/planted")
    parser.add_argument("-o", "--out", default="benchmarks/evaluation/results/planted.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    everything = planted(Path(arguments.data), arguments.rows, arguments.queries, arguments.seed)
    run, seconds = str(work / "run"), dict[str, float]()
    start = time.perf_counter()
    corpus = work / "rows.jsonl"  # which a replay reads again
    corpus.write_text("".join(json.dumps(row) + "\n" for row in everything.rows))
    train(arguments.model, corpus, run, epochs=arguments.epochs, lr=arguments.lr, max_tokens=MAX_TOKENS,
          schedule="cosine", seed=arguments.seed, replayable=True)  # fmt: skip
    seconds["train"] = time.perf_counter() - start
    start = time.perf_counter()
    built = index(run, corpus, work / "index", max_tokens=MAX_TOKENS)
    seconds["index"] = time.perf_counter() - start
    start = time.perf_counter()
    curvature(built, work / "curvature", progress=False)
    seconds["curvature"] = time.perf_counter() - start
    start = time.perf_counter()
    index(run, corpus, work / "adam", max_tokens=MAX_TOKENS, view="adam")
    seconds["index of Adam's view"] = time.perf_counter() - start
    settings = {name: getattr(arguments, name) for name in ("rows", "epochs", "lr", "seed")}
    document: dict[str, Any] = {"machine": machine(), "settings": settings | {"trained_rows": len(everything.rows)},
                                "seconds": seconds, "kinds": {}}  # fmt: skip
    for stage in (_retrieval, _tail_patch):
        for kind, queries in everything.queries.items():
            file = work / f"{kind}{stage.__name__}.json"
            if not file.exists():
                file.write_text(json.dumps(_finite(stage(queries, run, arguments, str(work / "index")))))
            document["kinds"].setdefault(kind, {}).update(json.loads(file.read_text()))
            print(kind, stage.__name__, *_lines(document["kinds"][kind]), sep="\n  ")
            Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n")


def _replayed(queries: list[Row], run: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A file of replay's scores of these queries, and the seconds that they took."""
    names = [str(query["id"]) for query in queries]
    file = Path(arguments.work) / f"replay-{hashlib.sha256(repr(names).encode()).hexdigest()[:12]}.parquet"
    if not file.exists():
        opened = open_replayable(run)
        encoded = [encode(query, opened.model.tokenizer, MAX_TOKENS) for query in queries]
        found = replay(opened.losses, opened.log, [[sequences_of(one)] for one in encoded], is_resumable=True)
        columns = {"query": [name for name in names for _ in opened.ids], "id": [*opened.ids] * len(names),
                   "score": found.scores.flatten().tolist()}  # fmt: skip
        seconds = str(found.seconds)
        pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata({"seconds": seconds}), file)
    seconds = float(pyarrow.parquet.read_schema(file).metadata[b"seconds"])
    return {"scores": {REPLAY: str(file)}, "costs": {REPLAY: seconds}}


def _retrieval(queries: list[Row], run: str, arguments: argparse.Namespace, place: str) -> dict[str, Any]:
    found = evaluate_retrieval(queries, place, _methods(arguments), depths=(10, 50), run=run, seed=arguments.seed,
                               index=_adam(arguments), **_replayed(queries, run, arguments))  # fmt: skip
    learnt = {"before": answer_loss(arguments.model, queries), "after": answer_loss(run, queries)}
    return {
        "queries": len(queries),
        "relevant": found.relevant,
        "learnt": learnt,
        "retrieval": _named(found.rows(), arguments),
    }


def _tail_patch(queries: list[Row], run: str, arguments: argparse.Namespace, place: str) -> dict[str, Any]:
    stepped = evaluate_tail_patch(run, queries, place, _methods(arguments), top=5, seed=arguments.seed,
                                  index=_adam(arguments), **_replayed(queries, run, arguments))  # fmt: skip
    return {"tail_patch": _named(stepped.rows(), arguments)}


def _methods(arguments: argparse.Namespace) -> list[str]:
    """As `whence` calls them."""
    known = _curved(arguments)
    return [str(known.get(name, name)) for name in arguments.methods.split(",")]


def _adam(arguments: argparse.Namespace) -> dict[str, str]:
    return {"adam": str(Path(arguments.work) / "adam")}


def _curved(arguments: argparse.Namespace) -> dict[str, str]:
    return {name: f"{text}curvature={Path(arguments.work) / 'curvature'}" for name, text in CURVED.items()}


def _named(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Lines with the table's names."""
    known = {text: name for name, text in _curved(arguments).items()}
    known |= {f"|{text}|": f"|{name}|" for text, name in known.items()}
    return [row | {"method": known.get(row["method"], row["method"])} for row in rows]


def _lines(document: dict[str, Any]) -> list[str]:
    """The last table of a kind, a line a method."""
    if "tail_patch" in document:
        return [f"{row['method']:16} {row['change']:+.4f}  over random {row['over_random']:+.4f}"
                for row in document["tail_patch"]]  # fmt: skip
    return [f"{row['method']:16} auPRC {row['auprc']:.3f}  MRR {row['mrr']:.3f}" for row in document["retrieval"]]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
