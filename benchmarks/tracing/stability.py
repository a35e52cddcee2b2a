"""Is the stability that a trace states what happens? Over ten seeds of the sketch, and against exact gradients.

    python -m benchmarks.tracing.stability [--model DIR] [--data DIR] [--corpora alpaca gsm8k] [--rows 1000]
        [--queries 50] [--seeds 10] [--top 10] [-o FILE]

Rows and queries are those of `benchmarks.indexing.quality`. For each corpus, seed and query an index of the default
sketch ranks the rows by cosine; `tracing.stability.under_noise` says how many of the first ten the exact ones and
another seed's have, and that is held against the exact first ten and those of the nine other seeds. Bar: within 5
points, over queries whose stability is alike and over all of them. `margins` of the rows shown on both sides should
hold 95 of 100 exact scores. Corpora that FILE has are not measured again.
"""

import argparse
import json
from pathlib import Path

import torch
from benchmarks.indexing.quality import batches, drawn

from whence.corpus.tokens import Encoded
from whence.gradients.capture import backward, example_gradients
from whence.gradients.flat_width import flat_width
from whence.gradients.projections.tensor_sketch import TensorSketch
from whence.indexing.codecs import codec
from whence.models.loading import LoadedModel, layer_shape, load_model
from whence.tracing.depth import candidates, row_noise
from whence.tracing.stability import margins, under_noise

RESULTS = Path(__file__).parent / "results" / "stability.json"
GROUPS = ((0.0, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01))
"""Stated stabilities that are averaged together."""


def main() -> None:
    """Measure each corpus that the results lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--corpora", nargs="+", default=["alpaca", "gsm8k"])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = load_model(options.model, device="cpu")
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for corpus in options.corpora:
        if corpus not in found:
            names = {"alpaca": "instruct/alpaca", "gsm8k": "instruct/gsm8k_train"}
            text = str(options.data / f"{names.get(corpus, corpus)}.jsonl")
            queries, rows = drawn(model, text, options.queries, options.rows)
            found[corpus] = measured(model, queries, rows, options)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(corpus, *(json.dumps(found[corpus][name]) for name in found[corpus] if not name.startswith("stated")))


def measured(model: LoadedModel, queries: list[Encoded], rows: list[Encoded], options: argparse.Namespace) -> dict:
    """What is stated and what happens, for each seed and query."""
    cosines = exact_cosines(model, queries, rows)
    exact = cosines.topk(options.top).indices
    tops, stated, held = [], [], []
    for seed in range(options.seeds):
        scores, noise = sketched_cosines(model, queries, rows, seed)
        order = scores.topk(min(candidates(options.top, None), scores.shape[1])).indices
        tops.append(order[:, : options.top])
        for own, places in zip(scores, order, strict=True):
            found = under_noise(own[places], noise[places], options.top)
            stated.append((found.exact, found.sketch))
        shown = torch.cat([order[:, : options.top], (-scores).topk(options.top).indices], 1)
        apart = (scores - cosines).abs().gather(1, shown)
        held.append((apart <= margins(noise[shown], shown.shape[1], len(rows))).float().mean(1))
        print("seed", seed, flush=True)
    pairs = []
    for seed, top in enumerate(tops):
        for query in range(len(queries)):
            others = [shared(top[query], other[query]) for number, other in enumerate(tops) if number != seed]
            said_exact, said_again = stated[seed * len(queries) + query]
            pairs.append([said_exact, shared(top[query], exact[query]), said_again, sum(others) / len(others)])
    inside = round(float(torch.stack(held).mean()), 4)
    return {
        "table": table(torch.tensor(pairs)),
        "share of exact scores within their margins": inside,
        "stated and real, exact and another seed": pairs,
    }


def table(pairs: torch.Tensor) -> dict:
    """Means over all, and over those whose stated stability is alike."""
    out = {}
    for name, first in (("exact", 0), ("another seed", 2)):
        said, real = pairs[:, first], pairs[:, first + 1]
        out[name] = {"all": [len(said), round(float(said.mean()), 3), round(float(real.mean()), 3)]}
        for low, high in GROUPS:
            own = (said >= low) & (said < high)
            if int(own.sum()) >= 20:
                means = [round(float(values[own].mean()), 3) for values in (said, real)]
                out[name][f"{low} to {min(high, 1.0)}"] = [int(own.sum()), *means]
    return out


def shared(one: torch.Tensor, other: torch.Tensor) -> float:
    """Share of the first in the second."""
    return len({*one.tolist()} & {*other.tolist()}) / len(one)


def exact_cosines(model: LoadedModel, queries: list[Encoded], rows: list[Encoded]) -> torch.Tensor:
    """Of whole gradients [q n]."""
    layers = model.layers()
    held = {name: torch.zeros(len(queries), *layer_shape(layer)) for name, layer in layers.items()}
    for numbers, batch in batches(queries):

        def keep(captured, numbers=numbers):
            held[captured.layer][numbers] = example_gradients(captured.a, captured.g)

        backward(model, layers, batch, keep)
    products, squares = torch.zeros(len(queries), len(rows)), torch.zeros(len(rows))
    for numbers, batch in batches(rows):

        def compare(captured, numbers=numbers):
            own = example_gradients(captured.a, captured.g).flatten(1)
            products[:, numbers] += held[captured.layer].flatten(1) @ own.T
            squares[numbers] += own.square().sum(1)

        backward(model, layers, batch, compare)
    lengths = sum(matrix.flatten(1).square().sum(1) for matrix in held.values()).sqrt()
    return products / lengths[:, None] / squares.sqrt()


def sketched_cosines(
    model: LoadedModel, queries: list[Encoded], rows: list[Encoded], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """By an index of the default sketch and codec [q n], and the noise of each row's."""
    layers, onebit = model.layers(), codec("onebit")
    shapes = {name: layer_shape(layer) for name, layer in layers.items()}
    width = flat_width(shapes)
    made = TensorSketch(shapes, width=width, seed=seed)

    def sketched(examples):
        out = torch.zeros(len(examples), width)
        for numbers, batch in batches(examples):

            def add(captured, numbers=numbers):
                columns = out[:, made.columns(captured.layer)]  # a view
                columns[numbers] += made(captured.a, captured.g, layer=captured.layer)

            backward(model, layers, batch, add)
        return out

    asked, stored = sketched(queries), sketched(rows)
    norm = stored.norm(dim=1)
    codes, scale = onebit.encode(stored)
    scale = onebit.unbiased(scale, norm, width)
    decoded = onebit.decode(codes, scale, width)
    deviation = row_noise(norm, scale, onebit, width) / norm
    return torch.nn.functional.normalize(asked) @ decoded.T / norm, deviation


if __name__ == "__main__":
    main()
