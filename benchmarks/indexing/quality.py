"""What a sketch keeps of the exact order: top 10 and rank correlation against exact gradients, by bytes a row.

    python -m benchmarks.indexing.quality [--model DIR] [--data DIR] [--corpus alpaca] [--rows 1000] [--queries 50]
        [--sketch tensor_sketch:43008:onebit ...] [--seeds 3] [-o FILE]

Rows and queries are different rows of one corpus, cut to 256 tokens, drawn once. Truth is the cosine, or the inner
product, of whole gradients over all traced layers, formed layer by layer. A sketch is PROJECTION:WIDTH:CODEC; rows are
stored by the codec and queries are not, as in an index; its cosine takes the stored row's norm, its product the codec's
scale. For each sketch and seed: the share of the exact first ten among its own first ten, and among its first hundred,
Spearman's correlation over all rows, each a mean over queries with a bootstrap interval over them; and the seconds
that the projection takes, of one thread, over those of forward and backward with frozen weights.
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
from whence.indexing.codecs import codec
from whence.models.loading import LoadedModel, layer_shape, load_model
from whence.numerics import bootstrap_interval, generator, spearman

CORPORA = {"alpaca": "instruct/alpaca", "gsm8k": "instruct/gsm8k_train", "wikitext": "domains/wikitext"}
SKETCHES = ["two_sided:16:bfloat16", "two_sided:32:onebit", "count_sketch:43008:onebit", "tensor_sketch:43008:onebit"]


def main() -> None:
    """Measure every sketch in one pass over the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--corpus", choices=CORPORA, default="alpaca")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--sketch", nargs="+", default=SKETCHES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", "--out", default="benchmarks/indexing/results/quality.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(arguments.model)
    texts = f"{arguments.data}/{CORPORA[arguments.corpus]}.jsonl"
    queries, rows = drawn(model, texts, arguments.queries, arguments.rows)
    measured = Comparison(model, queries, arguments.sketch, arguments.seeds).over(rows)
    results = Path(arguments.out)
    document = json.loads(results.read_text()) if results.exists() else {"machine": machine()}
    document[arguments.corpus] = {"rows": len(rows), "queries": len(queries), "sketches": measured}
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
                made = catalogue.projection(projection)(shapes, width=int(width), seed=seed)
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
        self.seconds = dict.fromkeys(self.projections, 0.0)
        passes = 0.0
        for numbers, batch in batches(rows):

            def exact(captured: Captured, numbers: Tensor = numbers) -> None:
                gradients = example_gradients(captured.a, captured.g).flatten(1)
                products[:, numbers] += self.gradients[captured.layer] @ gradients.T
                squares[numbers] += gradients.square().sum(1)

            for key, vectors in self._sketched(batch, exact).items():
                decoded = self.codecs[key].decode(*self.codecs[key].encode(vectors), vectors.shape[1])
                scores[key][1][:, numbers] = dots = self.queries[key] @ decoded.T
                scores[key][0][:, numbers] = dots / decoded.norm(dim=1)
            start = time.process_time()
            backward(self.model, self.layers, batch, lambda captured: None)
            passes += time.process_time() - start
        report = []
        for (sketch, seed), (cosines, dots) in scores.items():
            entry = {"sketch": sketch, "seed": seed, "seconds_to_pass": round(self.seconds[sketch, seed] / passes, 3)}
            entry["bytes"] = self.codecs[sketch, seed].bytes_per_row(self.projections[sketch, seed].width)
            entry |= {"cosine": kept(cosines, products / squares.sqrt()), "dot": kept(dots, products)}
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
    for name, depth in (("top10", 10), ("top10_in_100", 100)):
        found = scores.topk(min(depth, scores.shape[1])).indices
        by_query[name] = (best[:, :, None] == found[:, None]).any(2).float().mean(1).tolist()
    out = {}
    for name, values in by_query.items():
        low, high = bootstrap_interval(torch.tensor(values)[:, None], seed=0)
        out[name] = [round(number, 4) for number in (sum(values) / len(values), low, high)]
    return out


if __name__ == "__main__":
    main()
