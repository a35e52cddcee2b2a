"""Time of `--view adam` beside a training step and beside LESS's way of making the same features.

    python -m benchmarks.selection.less_speed [--model DIR] [--data DIR] [--batches 6] [--ranks 8 16] [-o FILE]

A LoRA on q, k, v and o, as LESS trains it, is trained for some steps, so that its checkpoint has moments. Then the same
batches of 16 examples of 128 tokens are gone through in turn, and medians are compared:

    passes          forward and backward
    step            the same and AdamW's step
    adam            Whence: the batch's features at once, count_sketch 8,192
    two_sided       Whence: plain gradients in two_sided 16, for comparison
    less            LESS: one example at a time, autograd's gradient of every weight, joined, Adam's formula, and for 16
                    of them together the product with a sign matrix [d, 8,192] that is held in memory
    less_features   its part before that product
    regenerated     the product with a matrix made anew for every 16 examples, 128 columns at a time, as the projector
                    that LESS falls back to without a CUDA extension does. Timed on two batches, without the features,
                    which are added: they are the same work.

LESS casts features to fp16 before the product, for a GPU; here all is fp32, which is faster on a CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.indexing.speed import machine, whole_gradient
from torch import Tensor

from whence.corpus.tokens import Batch
from whence.gradients.capture import sketch
from whence.gradients.space import GradientSpace
from whence.indexing.speed import make_batches, training_pass
from whence.indexing.vectors import IndexSettings, projection_for, transform_for
from whence.models.loading import LoadedModel, load_model
from whence.models.moments import read_moments
from whence.models.runs import open_run
from whence.numerics import generator, signs
from whence.training.trainer import train

SIZE, LENGTH, WIDTH, BLOCK = 16, 128, 8192, 128
ADAM = IndexSettings(
    space=GradientSpace(view="adam", adam_mode="less", projection="count_sketch", width=WIDTH), max_tokens=LENGTH
)
PLAIN = IndexSettings(space=GradientSpace(projection="two_sided", width=16), max_tokens=LENGTH)


def main() -> None:
    """Time every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("-o", "--out", default="benchmarks/selection/results/less_speed.json")
    arguments = parser.parse_args()
    corpus, found = f"{arguments.data}/domains/wikitext.jsonl", {"machine": machine(), "rows": {}}
    for rank in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            run = train(
                arguments.model, corpus, Path(folder) / "run", max_steps=8, batch_size=SIZE, max_tokens=LENGTH,
                lora_rank=rank, lora_targets="q_proj,k_proj,v_proj,o_proj", checkpoints=1, progress=False,
            )  # fmt: skip
            found["rows"][f"r = {rank}"] = timed(str(open_run(run).checkpoints[-1].path), corpus, arguments.batches)
        print(json.dumps(found["rows"], indent=1), flush=True)
        Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")


def timed(checkpoint: str, corpus: str, batches: int) -> dict[str, Any]:
    """Medians and their ratios."""
    loaded = load_model(checkpoint)
    made = make_batches(loaded, corpus, SIZE, LENGTH, batches + 1, ADAM)
    weights = [weight for name, weight in loaded.model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW([weight.requires_grad_(True) for weight in weights], lr=0.0)
    d = sum(weight.numel() for weight in weights)
    features, matrix = less_features(loaded, weights), signs(d * WIDTH, generator(0, "less")).view(d, WIDTH).float()
    ways: dict[str, Callable[[Batch], Any]] = {
        "passes": lambda batch: training_pass(loaded, batch, None),
        "step": lambda batch: training_pass(loaded, batch, optimizer),
        "adam": whence_way(loaded, ADAM),
        "two_sided": whence_way(loaded, PLAIN),
        "less": lambda batch: features(batch) @ matrix,
        "less_features": features,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number, batch in enumerate(made):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for weight in weights:
                weight.requires_grad_(name not in ("adam", "two_sided"))
            start = time.perf_counter()
            ways[name](batch)
            if number:  # the first of each warms up
                seconds[name].append(time.perf_counter() - start)
    del matrix
    made_anew = [regenerated(torch.randn(SIZE, d)) for _ in range(2)]
    median = {name: statistics.median(found) for name, found in seconds.items()}
    median["regenerated"] = median["less_features"] + statistics.median(made_anew)
    return {
        "weights": d,
        "seconds": median,
        "spread": {name: [min(found), max(found)] for name, found in (seconds | {"product": made_anew}).items()},
        "adam / step": median["adam"] / median["step"],
        "adam / passes": median["adam"] / median["passes"],
        "two_sided / step": median["two_sided"] / median["step"],
        "less / adam": median["less"] / median["adam"],
        "regenerated / adam": median["regenerated"] / median["adam"],
    }


def whence_way(loaded: LoadedModel, settings: IndexSettings) -> Callable[[Batch], Tensor]:
    """A batch's vectors as `index` makes them."""
    layers, projection = loaded.layers(settings.space.layers), projection_for(loaded, settings)
    transform = transform_for(loaded, settings)
    return lambda batch: sketch(loaded, layers, batch, projection, transform=transform)[0]


def less_features(loaded: LoadedModel, weights: list[torch.nn.Parameter]) -> Callable[[Batch], Tensor]:
    """[16, d]: what LESS multiplies with its matrix."""
    moments = read_moments(loaded, loaded.layers())
    held = list(moments.values())
    assert sum(each.m1.numel() for each in held) == sum(weight.numel() for weight in weights)
    m1, m2 = (torch.cat([getattr(each, name).flatten() for each in held]) for name in ("m1", "m2"))
    first, second, eps = *held[0].betas, held[0].eps

    def make(batch: Batch) -> Tensor:
        rows = []
        for number in range(len(batch.ids)):
            one = type(batch)(batch.ids[[number]], batch.mask[[number]], batch.supervised[[number]])
            g = whole_gradient(loaded, one, weights)
            rows.append((first * m1 + (1 - first) * g) / (second * m2 + (1 - second) * g * g + eps).sqrt())
        return torch.stack(rows)

    return make


def regenerated(features: Tensor) -> float:
    """Seconds of a product whose matrix is made anew."""
    start = time.perf_counter()
    block, out = torch.empty(features.shape[1], BLOCK), torch.empty(len(features), WIDTH)
    drawn = torch.Generator().manual_seed(0)
    for first in range(0, WIDTH, BLOCK):
        block.bernoulli_(0.5, generator=drawn).mul_(2).sub_(1)
        out[:, first : first + BLOCK] = features @ block
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
