"""Time of exact ghost scores at two models, as a ratio to the plain forward passes of both.

    python -m benchmarks.gradients.ghost_speed [--model DIR] [--data DIR] [--examples 192] [-o FILE]

The second model is the first with its weights moved a little; the direction is their difference. Each batch of rows is
timed in turn, at both models, as: `forward` (losses alone), `head` (`head_scores`), `all_layers` (`per_example_dot`
over every parameter), `with_norms` (the same with squared norms), and `forward_backward` (all weights trainable, the
model's own loss, logits at every position: training without the optimizer's step). Ratios are medians over batches of a
batch's own ratio to its `forward`. Once with the answers supervised, as in fine-tuning, and once with every token,
where the head is busiest. Bar: `head` at 1.3 of `forward`.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from whence.corpus.reading import open_corpus
from whence.corpus.tokens import Batch, Encoded, bucketed, collate, encode
from whence.gradients.capture import token_losses
from whence.gradients.ghost import head_scores, per_example_dot
from whence.indexing.speed import training_pass
from whence.models.loading import LoadedModel, load_model


def main() -> None:
    """Time both kinds of supervision and write FILE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--examples", type=int, default=192)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("-o", "--out", default="benchmarks/gradients/results/ghost_speed.json")
    arguments = parser.parse_args()
    base, final = load_model(arguments.model), moved(load_model(arguments.model))
    rows = itertools.islice(open_corpus(f"{arguments.data}/instruct/alpaca.jsonl"), arguments.examples)
    examples = [encode(row.row, base.tokenizer, base.context) for row in rows]
    everything = [Encoded(each.ids, [False] + [True] * (len(each.ids) - 1)) for each in examples]
    found = {"machine": machine(), "examples": len(examples), "tokens_per_batch": arguments.tokens_per_batch}
    for name, chosen in (("answers", examples), ("every token", everything)):
        found[name] = measured(base, final, batches_of(chosen, arguments.tokens_per_batch))
        for way, ratio in found[name]["ratio_to_forward"].items():
            print(f"{name:12s} {way:17s} {1e3 * found[name]['seconds_per_example'][way]:7.2f} ms  {ratio:.3f}")
    Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")


def moved(model: LoadedModel) -> LoadedModel:
    """The same model after a small random move of every weight."""
    rng = torch.Generator().manual_seed(0)
    for weight in model.model.parameters():
        weight.add_(torch.randn(weight.shape, generator=rng) * 1e-3)
    return model


def batches_of(examples: list[Encoded], tokens_per_batch: int) -> list[Batch]:
    """Batches of like length, as an index makes them."""
    groups = bucketed([len(each.ids) for each in examples], tokens_per_batch)
    return [collate([examples[number] for number in group]) for group in groups]


def measured(base: LoadedModel, final: LoadedModel, batches: list[Batch]) -> dict:
    """Seconds of every batch in every way, in an order that rotates; after one batch that warms up."""
    models = (base, final)
    ends = [dict(model.model.named_parameters()) for model in models]
    direction = {name: (ends[0][name] - ends[1][name]).detach() for name in ends[0]}
    head = direction["lm_head.weight"]
    ways: dict[str, Callable[[LoadedModel, Batch], object]] = {
        "forward": token_losses,
        "head": lambda model, batch: head_scores(model, batch, head),
        "all_layers": lambda model, batch: per_example_dot(model, batch, direction),
        "with_norms": lambda model, batch: per_example_dot(model, batch, direction, norms=True),
        "forward_backward": lambda model, batch: training_pass(model, batch, None),
    }
    names, seconds = list(ways), {name: [] for name in ways}
    for number, batch in enumerate([batches[0], *batches]):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for model in models:
                model.model.requires_grad_(name == "forward_backward")
            start = time.perf_counter()
            for model in models:
                ways[name](model, batch)
            if number:
                seconds[name].append(time.perf_counter() - start)
    sizes = [len(batch.ids) for batch in batches]
    pairs = {name: list(zip(took, seconds["forward"], strict=True)) for name, took in seconds.items()}
    return {
        "batches": len(batches),
        "tokens_per_example": sum(int(batch.mask.sum()) for batch in batches) / sum(sizes),
        "targets_per_example": sum(int(batch.supervised.sum()) for batch in batches) / sum(sizes),
        "ratio_to_forward": {name: statistics.median(own / plain for own, plain in pairs[name]) for name in names},
        "seconds_per_example": {
            name: statistics.median(own / size for own, size in zip(seconds[name], sizes, strict=True))
            for name in names
        },
        "seconds_of_batches": seconds,
    }


def machine() -> dict:
    """What the numbers were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
