"""What a sketch keeps of the exact order: top 10 and rank correlation against exact gradients, by bytes a row.

    python -m benchmarks.indexing.quality [--model DIR] [--data DIR] [--corpus alpaca | FILE] [--rows 1000]
        [--queries 50] [--sketch tensor_sketch:43008:onebit ...] [--seeds 3] [-o FILE]

Rows and queries are different rows of one corpus, cut to 256 tokens, drawn once. Truth is the cosine, or the inner
product, of whole gradients over all traced layers, formed layer by layer. A sketch is PROJECTION:WIDTH:CODEC, with no
WIDTH for the default; rows are stored by the codec and queries are not, and both scores are those of an index. For each
sketch and seed: the share of the exact first ten among its own first ten, and among its first hundred, and after the
re-rank that `trace` does, to the depth of `whence.tracing.depth` from either end; Spearman's correlation over all rows;
each a mean over queries with a bootstrap interval over them. `depth` is the median and the largest number of rows that
are re-ranked on the helpful side, then on the opposing one. `seconds_to_pass` is what the projection takes, of one
thread, over forward and backward with frozen weights. Sketches that are in FILE already for a corpus stay there.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks.indexing.speed import machine
from torch import Tensor

from whence import catalogue
from whence.corpus.reading import open_corpus
from whence.corpus.tokens import Batch, Encoded, collate, encode
from whence.gradients.capture import Captured, backward, example_gradients
from whence.gradients.flat_width import FLAT
from whence.indexing.codecs import codec
from whence.models.loading import LoadedModel, layer_shape, load_model
from whence.numerics import bootstrap_interval, generator, spearman
from whence.tracing.depth import CANDIDATES, depth, row_noise

CORPORA = {"alpaca": "instruct/alpaca", "gsm8k": "instruct/gsm8k_train", "wikitext": "domains/wikitext"}
SKETCHES = ["two_sided:16:bfloat16", "two_sided:32:onebit", "count_sketch:43008:onebit", "tensor_sketch:43008:onebit"]


def main() -> None:
    """Measure every sketch in one pass over the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--corpus", default="alpaca", help=f"{', '.join(CORPORA)}, or a file")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--sketch", nargs="+", default=SKETCHES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", "--out", default="benchmarks/indexing/results/quality.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(arguments.model)
    name = arguments.corpus if arguments.corpus in CORPORA else Path(arguments.corpus).parent.name
    texts = f"{arguments.data}/{CORPORA[name]}.jsonl" if name in CORPORA else arguments.corpus
    queries, rows = drawn(model, texts, arguments.queries, arguments.rows)
    measured = Comparison(model, queries, arguments.sketch, arguments.seeds).over(rows)
    results = Path(arguments.out)
    document = json.loads(results.read_text()) if results.exists() else {"machine": machine()}
    before = document.get(name, {"sketches": []})["sketches"]
    again = {(entry["sketch"], entry["seed"]) for entry in measured}
    kept_entries = [entry for entry in before if (entry["sketch"], entry["seed"]) not in again]
    document[name] = {"rows": len(rows), "queries": len(queries), "sketches": kept_entries + measured}
    results.write_text(json.dumps(document, indent=1) + "\n")


def drawn(model: LoadedModel, texts: str, queries: int, rows: int) -> tuple[list[Encoded], list[Encoded]]:
    """Queries, and other rows, at random."""
    encoded = (encode(row.row, model.tokenizer, 256) for row in open_corpus(texts))
    different = [*{tuple(one.ids): one for one in encoded if one.supervised_count}.values()]
    order = torch.randperm(len(different), generator=generator(0, "quality"))[: queries + rows].tolist()
    return [different[n] for n in order[:queries]], [different[n] for n in order[queries:]]


def batches(examples: list[Encoded], size: int = 8) -> Iterator[tuple[Tensor, Batch]]:
    """Batches of like length, with the examples' numbers."""
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].ids))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        yield torch.tensor(numbers), collate([examples[number] for number in numbers])


class Comparison:
    """Sketches of a few queries, and their exact gradients, to be held against rows."""

    def __init__(self, model: LoadedModel, queries: list[Encoded], sketches: list[str], seeds: int):
        self.model, self.layers = model, model.layers()
        shapes = {name: layer_shape(layer) for name, layer in self.layers.items()}
        self.projections, self.codecs = {}, {}
        for sketch in sketches:
            projection, width, stored = sketch.split(":")
            for seed in range(seeds):
                made = catalogue.projection(projection)(shapes, width=int(width) if width else None, seed=seed)
                self.projections[sketch, seed], self.codecs[sketch, seed] = made, codec(stored)
        self.seconds = dict.fromkeys(self.projections, 0.0)
        self.gradients = {name: torch.zeros(len(queries), o * i) for name, (o, i) in shapes.items()}
        self.queries = {key: torch.zeros(len(queries), made.width) for key, made in self.projections.items()}
        for numbers, batch in batches(queries):
            for key, rows in self._sketched(batch, self._keep(numbers)).items():
                self.queries[key][numbers] = rows

    def _keep(self, numbers: Tensor):
        def keep(captured: Captured) -> None:
            self.gradients[captured.layer][numbers] = example_gradients(captured.a, captured.g).flatten(1)

        return keep

    def _sketched(self, batch: Batch, also) -> dict[tuple[str, int], Tensor]:
        rows = {key: torch.zeros(len(batch.ids), made.width) for key, made in self.projections.items()}

        def consume(captured: Captured) -> None:
            for key, made in self.projections.items():
                start = time.process_time()
                rows[key][:, made.columns(captured.layer)] += made(captured.a, captured.g, layer=captured.layer)
                self.seconds[key] += time.process_time() - start
            also(captured)

        backward(self.model, self.layers, batch, consume)
        return rows

    def over(self, rows: list[Encoded]) -> list[dict]:
        """What each sketch and seed keeps of the order of these rows."""
        q, n = len(next(iter(self.gradients.values()))), len(rows)
        products, squares = torch.zeros(q, n), torch.zeros(n)
        scores = {key: (torch.zeros(q, n), torch.zeros(q, n)) for key in self.projections}
        noises, norms = ({key: torch.zeros(n) for key in self.projections} for _ in range(2))
        self.seconds = dict.fromkeys(self.projections, 0.0)
        passes = 0.0
        for numbers, batch in batches(rows):

            def exact(captured: Captured, numbers: Tensor = numbers) -> None:
                gradients = example_gradients(captured.a, captured.g).flatten(1)
                products[:, numbers] += self.gradients[captured.layer] @ gradients.T
                squares[numbers] += gradients.square().sum(1)

            for key, vectors in self._sketched(batch, exact).items():
                stored, scale = self.codecs[key].encode(vectors)
                norm, k = vectors.norm(dim=1), vectors.shape[1]
                scale = self.codecs[key].unbiased(scale, norm, k)
                noises[key][numbers], norms[key][numbers] = row_noise(norm, scale, self.codecs[key], k), norm
                scores[key][1][:, numbers] = dots = self.queries[key] @ self.codecs[key].decode(stored, scale, k).T
                scores[key][0][:, numbers] = dots / norm / self.queries[key].norm(dim=1)[:, None]
            start = time.process_time()
            backward(self.model, self.layers, batch, lambda captured: None)
            passes += time.process_time() - start
        report = []
        for (sketch, seed), (cosines, dots) in scores.items():
            entry = {"sketch": sketch, "seed": seed, "seconds_to_pass": round(self.seconds[sketch, seed] / passes, 3)}
            entry["bytes"] = self.codecs[sketch, seed].bytes_per_row(self.projections[sketch, seed].width)
            is_flat, lengths = sketch.split(":")[0] in FLAT, self.queries[sketch, seed].norm(dim=1)
            noise, norm = noises[sketch, seed], norms[sketch, seed]
            entry["cosine"] = kept(cosines, products / squares.sqrt())
            entry["cosine"] |= reranked(cosines, products / squares.sqrt(), noise / norm if is_flat else None)
            entry["dot"] = kept(dots, products)
            entry["dot"] |= reranked(dots, products, noise * lengths[:, None] if is_flat else None)
            report.append(entry)
            shares = {name: entry[name]["top10"][0] for name in ("cosine", "dot")}
            print(
                sketch, seed, f"{entry['bytes']:,} bytes", shares, entry["cosine"]["spearman"], entry["seconds_to_pass"]
            )
        return report


def kept(scores: Tensor, exact: Tensor) -> dict[str, list[float]]:
    """Means over queries, with their intervals of 95%."""
    best = exact.topk(10).indices
    by_query = {"spearman": [spearman(found, true) for found, true in zip(scores, exact, strict=True)]}
    for name, rows in (("top10", 10), ("top10_in_100", 100)):
        found = scores.topk(min(rows, scores.shape[1])).indices
        by_query[name] = (best[:, :, None] == found[:, None]).any(2).float().mean(1).tolist()
    return {name: with_interval(values) for name, values in by_query.items()}


def with_interval(values: list[float]) -> list[float]:
    """The mean over queries, and its interval of 95%."""
    low, high = bootstrap_interval(torch.tensor(values)[:, None], seed=0)
    return [round(number, 4) for number in (sum(values) / len(values), low, high)]


def reranked(scores: Tensor, exact: Tensor, noise: Tensor | None) -> dict[str, list]:
    """The exact first ten, and last ten, that are found after exact scores have ordered both short lists together."""
    found: dict[str, list[float]] = {"reranked": [], "reranked_opposing": []}
    depths = []
    for query, (line, true) in enumerate(zip(scores, exact, strict=True)):
        spread = None if noise is None else noise if noise.ndim == 1 else noise[query]
        short: set[int] = set()
        for sign in (1, -1):
            order = (sign * line).argsort(descending=True)[:CANDIDATES]
            deep = depth(sign * line[order], None if spread is None else spread[order], 10)
            short |= {*order[: deep.rows].tolist()}
            depths.append(deep.rows)
        for name, sign in (("reranked", 1), ("reranked_opposing", -1)):
            best = (sign * true).topk(10).indices.tolist()
            found[name].append(len({*best} & short) / 10)
    helpful, opposing = sorted(depths[::2]), sorted(depths[1::2])
    middle = [side[len(side) // 2] for side in (helpful, opposing)]
    deepest = [middle[0], helpful[-1], middle[1], opposing[-1]]
    return {name: with_interval(values) for name, values in found.items()} | {"depth": deepest}


if __name__ == "__main__":
    main()
