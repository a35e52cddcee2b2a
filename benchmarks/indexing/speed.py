"""Time of index building as a ratio to training, for every projection, and for LESS's way of doing it.

    python -m benchmarks.indexing.speed [--model DIR] [--data DIR] [--batches 8] [-o FILE]

Each row is one `whence bench` run: batches are timed in turn as forward + backward, as a training step with AdamW, and
as an index, and medians are compared. Rows named LESS train a LoRA (r = 8 on q, k, v, o): `less_batched` is Whence with
LESS's dense projection, `less_way` is what its code does: one example at a time, the whole gradient by autograd,
flattened, times a dense sign matrix [98,304 x 8,192] that is held in memory (its CPU fallback makes it again at every
batch, which is not counted here). A run that was stopped goes on where it was: finished rows are in FILE.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import peft
import torch
import transformers

from whence.indexing.speed import bench, make_batches, training_pass
from whence.indexing.vectors import IndexSettings
from whence.models.loading import LoadedModel, load_model
from whence.numerics import generator, signs

ROWS = {
    "two_sided 16, batch 8": ({"projection": "two_sided", "width": 16}, 8),
    "two_sided 16, batch 16": ({"projection": "two_sided", "width": 16}, 16),
    "two_sided 16, batch 32": ({"projection": "two_sided", "width": 16}, 32),
    "two_sided 16 with lm_head, batch 16": ({"projection": "two_sided", "width": 16, "layers": "*"}, 16),
    "count_sketch 8192, batch 8": ({"projection": "count_sketch", "width": 8192}, 8),
    "count_sketch 8192, batch 16": ({"projection": "count_sketch", "width": 8192}, 16),
    "count_sketch 8192, batch 32": ({"projection": "count_sketch", "width": 8192}, 32),
    "sjlt 8192, batch 16": ({"projection": "sjlt", "width": 8192}, 16),
    "shuffle_sum 65536, batch 16": ({"projection": "shuffle_sum"}, 16),
    "srht 8192, batch 16": ({"projection": "srht", "width": 8192}, 16),
}
LORA_ROWS = {
    "LoRA r = 8, two_sided 8, batch 16": ({"projection": "two_sided", "width": 8}, 16),
    "LoRA r = 8, count_sketch 8192, batch 16": ({"projection": "count_sketch", "width": 8192}, 16),
    "less_batched: LoRA r = 8, rademacher 8192, batch 16": ({"projection": "rademacher", "width": 8192}, 16),
}


def main() -> None:
    """Run every row that FILE does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("-o", "--out", default="benchmarks/indexing/results/speed.json")
    arguments = parser.parse_args()
    corpus, out = f"{arguments.data}/domains/wikitext.jsonl", Path(arguments.out)
    found = json.loads(out.read_text()) if out.exists() else {"machine": machine(), "rows": {}}

    def keep(name: str, row: dict) -> None:
        found["rows"][name] = row
        out.write_text(json.dumps(found, indent=1) + "\n")
        step = f", {row['ratio']:.3f} of a step" if row["ratio"] else ""
        print(f"{name:52s} {row['ratio_to_forward_backward']:.3f} of forward + backward{step}")

    with tempfile.TemporaryDirectory() as folder:
        adapter = lora(arguments.model, Path(folder))
        for rows, model in ((ROWS, arguments.model), (LORA_ROWS, adapter)):
            for name, (options, size) in rows.items():
                if name not in found["rows"]:
                    memory = name.startswith("two_sided 16, batch")
                    result = bench(model, corpus, batch_size=size, batches=arguments.batches, memory=memory, **options)
                    keep(name, asdict(result))
        if (name := "less_way: LoRA r = 8, batch 1, dense 8192") not in found["rows"]:
            keep(name, less_way(adapter, corpus, arguments.batches))


def machine() -> dict:
    """What the numbers were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def lora(model: str, folder: Path) -> str:
    """A LoRA adapter as LESS trains it, with B drawn at random (at B = 0 half of the gradient is zero)."""
    loaded = load_model(Path(model).resolve())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    wrapped = peft.get_peft_model(loaded.base, peft.LoraConfig(r=8, lora_alpha=32, target_modules=targets))
    torch.manual_seed(0)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
    wrapped.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def less_way(model: str, corpus: str, batches: int) -> dict:
    """One example at a time: autograd's whole gradient, flattened, times the sign matrix; against batched training."""
    loaded = load_model(model)
    made = make_batches(loaded, corpus, 16, 128, batches + 1, IndexSettings())
    weights = [weight for name, weight in loaded.model.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.requires_grad_(True)
    d = sum(weight.numel() for weight in weights)
    matrix = signs(d * 8192, generator(0, "less")).view(d, 8192).float()
    seconds: dict[str, list[float]] = {"passes": [], "index": []}
    for number, batch in enumerate(made):
        for name in ("passes", "index"):
            start = time.perf_counter()
            if name == "passes":
                training_pass(loaded, batch, None)
            else:
                for row in range(len(batch.ids)):
                    one = type(batch)(batch.ids[[row]], batch.mask[[row]], batch.supervised[[row]])
                    whole_gradient(loaded, one, weights) @ matrix
            if number:
                seconds[name].append(time.perf_counter() - start)
    index, passes = statistics.median(seconds["index"]), statistics.median(seconds["passes"])
    ratio = index / passes
    spread = {name: [min(found), max(found)] for name, found in seconds.items()}
    return {"index_seconds": index, "forward_backward_seconds": passes, "spread": spread, "width": 8192} | {
        "ratio_to_forward_backward": ratio,
        "ratio": None,  # of a step: not timed
        "examples_per_second": 16 / index,
        "examples_per_batch": 16,
    }


def whole_gradient(loaded: LoadedModel, batch: object, weights: list) -> torch.Tensor:
    """Every trained weight's gradient, flattened and joined."""
    labels = batch.ids.masked_fill(~batch.supervised, -100)
    loaded.model(input_ids=batch.ids, labels=labels, use_cache=False).loss.backward()
    joined = torch.cat([weight.grad.flatten() for weight in weights])
    for weight in weights:
        weight.grad = None
    return joined


if __name__ == "__main__":
    main()
