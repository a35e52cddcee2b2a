"""The default index on RapidIn's three tasks, beside the default of old and exact gradients, in one run.

    python -m benchmarks.tracing.rapidin_default STAGE... [--training short|full|lora] [--data DIR] [--model DIR]
        [--work DIR]

Stages, in order (`all` runs them all), each skipped where what it leaves in WORK is there:

    train    `short` alone: the 5,000 rows that `rapidin.py` ranks train the model: all weights, STEPS steps
    queries  `short` alone: the trained model answers prompts that should set it off; attacked answers are kept, of
             each kind QUERIES
    pass     one pass over the rows: the exact cosine of each for each query, and each one's codes by both sketches
    table    auROC, auPRC and the share right of the first ten, with intervals over queries
    reach    the same of `--method reach` by both sketches, for REACHING queries of each kind
    trace    a real index of the first ROWS_OF_CHECK rows, traced by `whence.trace`, against what `table` makes of them

Poisons, prompts, measures and intervals are those of `rapidin.py`. `--training full` and `lora` take its models and
queries from a WORK where its stages `train` and `queries` were run: two epochs on all 15,118 rows, cut at 192 tokens.
`short` trains for less, on rows cut at 96 tokens, so that it fits into half an hour of a core, and is compared with
itself only. Results are kept by training; `rapidin_default_page.py` writes the page.

`two_sided` is the default until 2026-11-29: 16, in bfloat16. `tensor_sketch` is the one since: its width by the model's
size, in one bit, with scales for unbiased products as an index reads them. `default` is what `trace` shows by it: short
lists from either end, as deep as `whence.tracing.depth` says for ten rows, in the order of exact cosines; the rows
between stay in the order of the index.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.tracing import rapidin
from benchmarks.tracing.rapidin import TOKENS_PER_BATCH, measured, names, query_sketches, summary
from benchmarks.tracing.rapidin_data import POISONS, Poisoned, poisoned
from torch import Tensor

import whence
from whence import catalogue
from whence.corpus.tokens import Encoded, bucketed, collate, encode
from whence.gradients.capture import Captured, Sketches, backward, example_gradients
from whence.gradients.corpus_scores import query_directions
from whence.gradients.protocols import Projection
from whence.gradients.space import GradientSpace
from whence.indexing.codecs import codec
from whence.models.loading import LoadedModel, layer_shape
from whence.numerics import bootstrap_interval, inverse_or_zero
from whence.tracing.depth import CANDIDATES, depth, row_noise
from whence.tracing.queries import EncodedQuery, Query, encode_queries
from whence.training.trainer import train

MAX_TOKENS = {"short": 96, "full": rapidin.MAX_TOKENS, "lora": rapidin.MAX_TOKENS}
"""Tokens at which rows are cut, by training."""
WORKS = {"short": "/tmp/rapidin-default", "full": "/tmp/rapidin-0", "lora": "/tmp/rapidin-0"}
STEPS = 450
"""Of `short`."""
QUERIES = {"howdy": 15, "shouting": 15, "swap": 50}
"""Of `short`; `rapidin.py` keeps 50 of each kind."""
REACHING = 10
"""Queries of each kind that `reach` is asked about: a backward pass a token is dear."""
TOP = 10
SKETCHES = {"two_sided": "bfloat16", "tensor_sketch": "onebit"}
"""Projections at their default widths, and how their vectors are stored."""
ROWS_OF_CHECK, QUERIES_OF_CHECK = 300, 4
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rapidin_default.json"


def main() -> None:
    """Run stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--training", choices=list(MAX_TOKENS), default="short")
    parser.add_argument("--work", type=Path, help=f"by training: {WORKS}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work = options.work or Path(WORKS[options.training])
    options.kind = "lora" if options.training == "lora" else "full"
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if "all" in options.stages else options.stages:
        STAGES[stage](options)


def keep(options: argparse.Namespace, name: str, found: object) -> None:
    """Put a stage's results into the committed file."""
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document.setdefault(options.training, {})[name] = found
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


@dataclass(frozen=True)
class Inputs:
    """What the stages after `train` share."""

    made: Poisoned
    texts: list[dict]
    loaded: LoadedModel
    max_tokens: int

    @staticmethod
    def of(options: argparse.Namespace) -> "Inputs":
        """The corpus and the trained model."""
        made = poisoned(options.data, options.seed)
        loaded = rapidin.trained(options, options.kind)
        return Inputs(made, rapidin.ranked_rows(options, made), loaded, MAX_TOKENS[options.training])

    @property
    def rows(self) -> list[Encoded]:
        """As they were trained on."""
        return [encode(row, self.loaded.tokenizer, self.max_tokens) for row in self.texts]


def stage_train(options: argparse.Namespace) -> None:
    """One training."""
    file = options.work / "ranked.jsonl"
    if not any((options.work / options.kind).glob("checkpoint-*")):
        refuse_unless_short(options)
        made = poisoned(options.data, options.seed)
        file.write_text("".join(json.dumps(row) + "\n" for row in rapidin.ranked_rows(options, made)))
        settings = {"lr": 1e-3, "max_steps": STEPS, "schedule": "cosine", "checkpoints": 1}
        train(options.model, file, options.work / options.kind, seed=options.seed,
              max_tokens=MAX_TOKENS[options.training], **settings)  # fmt: skip


def refuse_unless_short(options: argparse.Namespace) -> None:
    """The other trainings are `rapidin.py`'s."""
    if options.training != "short":
        raise SystemExit(
            f"{options.work}: no model or no queries of the training {options.kind}. Run `python -m "
            f"benchmarks.tracing.rapidin train queries --kinds {options.kind} --work {options.work}`."
        )


def stage_queries(options: argparse.Namespace) -> None:
    """Answers that show the poison, and how often prompts gave one."""
    file, at_once = options.work / f"{options.kind}-queries.json", 32
    if file.exists():
        return
    refuse_unless_short(options)
    inputs, out, rates = Inputs.of(options), {}, {}
    for poison, most in QUERIES.items():
        out[poison], rates[poison] = [], {"prompts": 0, "attacked": 0}
        prompts = inputs.made.prompts[poison]
        for sampling in rapidin.ANSWERS[poison]:
            for first in range(0, len(prompts), at_once):
                if len(out[poison]) < most:
                    some = [Query(prompt) for prompt in prompts[first : first + at_once]]
                    answers = encode_queries(some, inputs.loaded, kind="instruction", sampling=sampling)
                    attacked = [row for found in answers if (row := rapidin.attacked_row(poison, found)) is not None]
                    rates[poison]["prompts"] += len(some)
                    rates[poison]["attacked"] += len(attacked)
                    out[poison] = (out[poison] + attacked)[:most]
        print(poison, rates[poison], flush=True)
    file.write_text(json.dumps(out, indent=1))
    keep(options, "attacked", rates)


# -- the pass


class Cosines:
    """Consumes whole passes into exact cosines with queries [q n]."""

    def __init__(self, queries: dict[str, Tensor], n: int):
        self.queries = queries
        q = len(next(iter(queries.values())))
        self.dots, self.squares = torch.zeros(q, n), torch.zeros(n)

    def consumer(self, numbers: list[int]) -> Callable[[Captured], None]:
        """For a batch of these rows."""
        place = torch.tensor(numbers)

        def consume(seen: Captured) -> None:
            found = example_gradients(seen.a, seen.g).flatten(1)
            self.dots.index_add_(1, place, self.queries[seen.layer] @ found.T)
            self.squares.index_add_(0, place, found.square().sum(1))

        return consume

    def scores(self) -> Tensor:
        """Of all rows; queries come with norm 1."""
        return self.dots * inverse_or_zero(self.squares.sqrt())


def projections(loaded: LoadedModel, seed: int) -> dict[str, Projection]:
    """Both sketches at their default widths."""
    shapes = {name: layer_shape(layer) for name, layer in loaded.layers().items()}
    return {name: catalogue.projection(name)(shapes, seed=seed) for name in SKETCHES}


def stage_pass(options: argparse.Namespace) -> None:
    """Exact scores, and rows' codes and norms by each sketch."""
    file = options.work / f"{options.kind}-pass.pt"
    if file.exists():
        return
    inputs = Inputs.of(options)
    loaded, rows, queries = inputs.loaded, inputs.rows, rapidin.queries_of(options, options.kind, inputs.loaded)
    layers, start, done = loaded.layers(), time.time(), 0
    sequences = [query.sequences for _, query in queries]
    directions = query_directions(loaded, layers, sequences, GradientSpace(), cosine=True)
    held = {name: direction.flatten(1) for name, direction in directions.items()}
    cosines, sketches = Cosines(held, len(rows)), projections(loaded, options.seed)
    held_rows = {name: torch.zeros(len(rows), projection.width) for name, projection in sketches.items()}
    print(f"{len(queries)} queries held, {time.time() - start:,.0f} s", flush=True)
    for numbers in bucketed([len(row.ids) for row in rows], TOKENS_PER_BATCH):
        consumers = {name: Sketches(one, len(numbers), torch.device("cpu")) for name, one in sketches.items()}
        consumed = [cosines.consumer(numbers), *consumers.values()]

        def fan_out(seen: Captured, consumed: Sequence[Callable[[Captured], None]] = consumed) -> None:
            for consume in consumed:
                consume(seen)

        backward(loaded, layers, collate([rows[number] for number in numbers]), fan_out, whole=True)
        for name, sketch in consumers.items():
            held_rows[name][numbers] = sketch.rows
        done += len(numbers)
        if done % 200 < len(numbers):
            print(f"{done:,}/{len(rows):,} rows, {time.time() - start:,.0f} s", flush=True)
    codes = {name: (*codec(SKETCHES[name]).encode(found), found.norm(dim=1)) for name, found in held_rows.items()}
    torch.save({"exact": cosines.scores(), "codes": codes}, file)


# -- scores from codes


@dataclass(frozen=True)
class Coded:
    """Rows as an index holds them, by one sketch."""

    name: str
    projection: Projection
    stored: Tensor
    scale: Tensor
    """As an index reads it: for unbiased products."""
    norm: Tensor

    @staticmethod
    def of(name: str, projection: Projection, stored: Tensor, scale: Tensor, norm: Tensor) -> "Coded":
        """From what `stage_pass` left."""
        scale = codec(SKETCHES[name]).unbiased(scale, norm, projection.width)
        return Coded(name, projection, stored, scale, norm)

    def cosines(self, queries: Tensor) -> Tensor:
        """Cosines [q n] of queries' sketches."""
        queries = queries * inverse_or_zero(queries.norm(dim=1))[:, None]
        return codec(SKETCHES[self.name]).scores(self.stored, self.scale, queries) * inverse_or_zero(self.norm)

    def reach(self, loaded: LoadedModel, query: EncodedQuery) -> Tensor:
        """As `--method reach`: magnitudes of each token's cosine, weighed by its norm."""
        tokens, _ = rapidin.token_sequences([query.sequences[0]])
        vectors = query_sketches(loaded, tokens, self.projection, False, "loss")
        norms = vectors.norm(dim=1)
        return (self.cosines(vectors).abs() * norms[:, None]).sum(0) / norms.sum()

    def noise(self) -> Tensor:
        """Standard deviation of each row's cosine."""
        spread = row_noise(self.norm, self.scale, codec(SKETCHES[self.name]), self.projection.width)
        return spread * inverse_or_zero(self.norm)


def reranked(index: Tensor, true: Tensor, noise: Tensor) -> tuple[Tensor, list[int]]:
    """Ranks [n], larger is better, of what `trace` shows and of the rows between; and how deep each side went."""
    n, order, depths = len(index), index.argsort(descending=True, stable=True), []
    sides = []
    for sign, side in ((1, order[:CANDIDATES]), (-1, order.flip(0)[:CANDIDATES])):
        deep = depth(sign * index[side], noise[side], TOP).rows
        depths.append(deep)
        sides.append(side[:deep][(sign * true[side[:deep]]).argsort(descending=True, stable=True)])
    helpful, opposing = sides
    opposing = opposing[~torch.isin(opposing, helpful)]  # of few rows, both lists may have one
    is_between = torch.ones(n, dtype=torch.bool)
    is_between[helpful] = is_between[opposing] = False
    ranking = torch.cat([helpful, order[is_between[order]], opposing.flip(0)])
    ranks = torch.empty(n)
    ranks[ranking] = torch.arange(n, 0, -1).float()
    return ranks, depths


def indexes(options: argparse.Namespace, inputs: Inputs) -> dict[str, Coded]:
    """Rows by both sketches, as `stage_pass` left them."""
    codes = torch.load(options.work / f"{options.kind}-pass.pt", weights_only=True)["codes"]
    sketches = projections(inputs.loaded, options.seed)
    return {name: Coded.of(name, projection, *codes[name]) for name, projection in sketches.items()}


def stage_table(options: argparse.Namespace) -> None:
    """Measures of each method, for each poison."""
    inputs = Inputs.of(options)
    queries, coded = rapidin.queries_of(options, options.kind, inputs.loaded), indexes(options, inputs)
    sequences = [query.sequences[0] for _, query in queries]
    scores = {"exact": torch.load(options.work / f"{options.kind}-pass.pt", weights_only=True)["exact"]}
    for name, one in coded.items():
        scores[name] = one.cosines(query_sketches(inputs.loaded, sequences, one.projection, False, "loss"))
    noise = coded["tensor_sketch"].noise()
    deep = [reranked(*pair, noise) for pair in zip(scores["tensor_sketch"], scores["exact"], strict=True)]
    scores["default"] = torch.stack([ranks for ranks, _ in deep])
    torch.save(scores, options.work / f"{options.kind}-default-scores.pt")
    widths = {name: one.projection.width for name, one in coded.items()}
    sizes = {name: codec(SKETCHES[name]).bytes_per_row(width) for name, width in widths.items()}
    keep(options, "index", {"rows": len(inputs.texts), "width": widths, "bytes a row": sizes})
    for poison, of_kind in relevant_rows(inputs, queries).items():
        if not of_kind:
            continue  # no answer showed this poison
        found: dict[str, Any] = table(scores, list(of_kind), of_kind, options.seed) | {"queries": len(of_kind)}
        found["depth"] = [sum(deep[n][1][side] for n in of_kind) / len(of_kind) for side in (0, 1)]
        keep(options, poison, found)
        for method, row in found["methods"].items():
            print(poison, method, row["precision@10"], row["auroc@1000"], flush=True)


def stage_reach(options: argparse.Namespace) -> None:
    """Measures of reach from both indexes, for each poison."""
    inputs = Inputs.of(options)
    queries, coded = rapidin.queries_of(options, options.kind, inputs.loaded), indexes(options, inputs)
    found = {}
    for poison, of_kind in relevant_rows(inputs, queries).items():
        some = [(queries[number][1], is_relevant) for number, is_relevant in list(of_kind.items())[:REACHING]]
        if not some:
            continue
        found[poison] = reaches(inputs, coded, some, options.seed)
        print(poison, {name: row["precision@10"] for name, row in found[poison].items() if name in coded}, flush=True)
    keep(options, "reach", found)


def relevant_rows(inputs: Inputs, queries: list[tuple[str, EncodedQuery]]) -> dict[str, dict[int, Tensor]]:
    """Of each poison: whether each row is what a query should find, by the query's number."""
    shown = [inputs.loaded.tokenizer.decode(row.ids) for row in inputs.rows]
    return {
        poison: {n: relevant(inputs, shown, poison, query) for n, (of, query) in enumerate(queries) if of == poison}
        for poison in POISONS
    }


def relevant(inputs: Inputs, shown: Sequence[str], poison: str, query: EncodedQuery) -> Tensor:
    """As `rapidin.relevant`, but for wrong countries that were cut off: the model never saw them."""
    found = rapidin.relevant(inputs.made, inputs.texts, poison, query)
    if poison != "swap":
        return found
    return found & torch.tensor([names(text, str(query.query.span)) for text in shown])


def table(scores: dict[str, Tensor], numbers: list[int], is_relevant: dict[int, Tensor], seed: int) -> dict:
    """Every method's measures; differences of the default from others, query by query; overlaps of first tens."""
    by_method: dict[str, list[dict]] = {}
    for method, found in scores.items():
        by_method[method] = [measured(found[number], is_relevant[number]) for number in numbers]
        if method != "default":
            by_method[f"{method}, magnitude"] = [measured(found[n].abs(), is_relevant[n]) for n in numbers]
    return {
        "poisoned": sum(int(some.sum()) for some in is_relevant.values()) / len(numbers),
        "methods": {
            method: {key: summary([one[key] for one in each], seed) for key in each[0]}
            for method, each in by_method.items()
        },
        "default less": {
            other: {key: difference(by_method["default"], by_method[other], key, seed)
                    for key in ("precision@10", "auroc@1000", "auprc@1000")}
            for other in ("exact", "two_sided", "tensor_sketch")
        },
        "exact first ten found": {
            method: summary([rapidin.overlap(scores["exact"][n], scores[method][n], TOP) for n in numbers], seed)
            for method in scores if method != "exact"
        },
    }  # fmt: skip


def difference(ours: list[dict], theirs: list[dict], key: str, seed: int) -> dict:
    """Mean over queries of the difference, and its interval."""
    values = torch.tensor([one[key] - other[key] for one, other in zip(ours, theirs, strict=True)])
    low, high = bootstrap_interval(values, seed=seed)
    return {"mean": round(float(values.mean()), 4), "interval": [round(low, 4), round(high, 4)]}


def reaches(inputs: Inputs, coded: dict[str, Coded], queries: list[tuple[EncodedQuery, Tensor]], seed: int) -> dict:
    """Measures of reach from both indexes."""
    found = {
        name: [measured(one.reach(inputs.loaded, query), some) for query, some in queries]
        for name, one in coded.items()
    }
    return {"queries": len(queries)} | {
        name: {key: summary([one[key] for one in each], seed) for key in each[0]} for name, each in found.items()
    }


# -- against the real thing


def stage_trace(options: argparse.Namespace) -> None:
    """A real index of some rows, and whether `trace` shows what `reranked` makes of them."""
    inputs = Inputs.of(options)
    texts = inputs.texts[:ROWS_OF_CHECK]
    file = options.work / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    built = whence.index(str(options.work / options.kind), file, options.work / "index", max_tokens=inputs.max_tokens,
                         tokens_per_batch=TOKENS_PER_BATCH, seed=options.seed, progress=False)  # fmt: skip
    queries, passed = (
        rapidin.queries_of(options, options.kind, inputs.loaded),
        torch.load(options.work / f"{options.kind}-pass.pt", weights_only=True),
    )
    some = [number for number, (of, _) in enumerate(queries) if of == "swap"][:QUERIES_OF_CHECK]
    one = Coded.of("tensor_sketch", projections(inputs.loaded, options.seed)["tensor_sketch"],
                   *(found[:ROWS_OF_CHECK] for found in passed["codes"]["tensor_sketch"]))  # fmt: skip
    sequences = [queries[number][1].sequences[0] for number in some]
    index = one.cosines(query_sketches(inputs.loaded, sequences, one.projection, False, "loss"))
    shown = whence.trace(built, queries=[queries[number][1].query for number in some], null=False)
    same, depths = [], []
    for place, number in enumerate(some):
        ranks, deep = reranked(index[place], passed["exact"][number, :ROWS_OF_CHECK], one.noise())
        ours = [texts[row]["id"] for row in ranks.topk(TOP).indices.tolist()]
        theirs = [hit.id for hit in shown.hits if hit.query == place and hit.rank > 0]
        same.append(len({*ours} & {*theirs}) / TOP)
        depths.append((deep, [shown.rerankings[place].helpful, shown.rerankings[place].opposing]))
    print(same, depths)
    found = {"rows": len(texts), "queries": len(some), "same of the first ten": same, "depths, and trace's": depths}
    keep(options, "trace", found)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": stage_train,
    "queries": stage_queries,
    "pass": stage_pass,
    "table": stage_table,
    "reach": stage_reach,
    "trace": stage_trace,
}

if __name__ == "__main__":
    main()
