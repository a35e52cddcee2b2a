"""What `trace --exact` costs for many queries: a pass for each query's short list, one pass for all, or all rows.

    python -m benchmarks.tracing.exact_lists [--queries 20] [--rows 500] [--lists 50 200] [-o FILE]

Queries are gsm8k's questions and answers, rows are of alpaca by base-6m, and short lists are drawn at random,
the hardest case for a shared pass: they overlap no more than they must. CPU seconds of one process, threads and all.

    alone    each list by itself: what `trace --exact` did before it shared the pass
    shared   `exact.list_scores`
    all      `corpus_scores`: the exact method, every row for every query
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from whence.corpus.reading import open_corpus
from whence.corpus.tokens import encode
from whence.gradients import exact
from whence.gradients.corpus_scores import corpus_scores
from whence.gradients.exact import SignedSequence
from whence.gradients.space import GradientSpace
from whence.models.loading import load_model

RESULTS = Path(__file__).parent / "results" / "exact_lists.json"
BUDGET = 4096


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result and its CPU seconds."""
    begin = time.process_time()
    result = call()
    return result, round(time.process_time() - begin, 1)


def main() -> None:
    """Time each way at each length of list, and compare their scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--lists", type=int, nargs="*", default=[50, 200])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/instruct"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, space = load_model(options.model, device="cpu"), GradientSpace()
    layers = model.layers()

    def encoded(file: str, count: int) -> list[Any]:
        return [
            encode(example.row, model.tokenizer, 512) for example in islice(open_corpus(options.data / file), count)
        ]

    rows = encoded("alpaca.jsonl", options.rows)
    queries = [[SignedSequence(row)] for row in encoded("gsm8k_test.jsonl", options.queries)]
    numbered = dict(enumerate(rows))
    results: dict[str, Any] = {"queries": len(queries), "rows": len(rows), "lists": {}}
    whole, results["CPU seconds of all rows"] = timed(
        lambda: corpus_scores(
            model, layers, queries, rows, space, cosine=True, objective="loss", tokens_per_batch=BUDGET
        )
    )
    print(results, flush=True)

    def gradients() -> Any:
        return (exact.query_gradient(model, layers, query, space, "loss") for query in queries)

    generator = torch.Generator().manual_seed(0)
    for length in options.lists:
        lists = [torch.randperm(len(rows), generator=generator)[:length].sort().values.tolist() for _ in queries]

        def alone(lists: list[list[int]] = lists) -> list[torch.Tensor]:
            return [
                exact.layer_products(
                    model, layers, gradient, [rows[n] for n in some], reduction="mean", tokens_per_batch=BUDGET
                ).scores(normalise="none", cosine=True)
                for gradient, some in zip(gradients(), lists, strict=True)
            ]

        def shared(lists: list[list[int]] = lists) -> list[torch.Tensor]:
            return exact.list_scores(
                model, layers, gradients(), lists, numbered, space=space, cosine=True, tokens_per_batch=BUDGET
            )

        (apart, before), (together, after) = timed(alone), timed(shared)
        expected = [whole[number, some] for number, some in enumerate(lists)]
        results["lists"][length] = {
            "CPU seconds alone": before,
            "CPU seconds shared": after,
            "largest difference, alone and shared": float((torch.cat(apart) - torch.cat(together)).abs().max()),
            "largest difference, all and shared": float((torch.cat(expected) - torch.cat(together)).abs().max()),
            "largest score": float(torch.cat(expected).abs().max()),
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(length, results["lists"][length], flush=True)


if __name__ == "__main__":
    main()
