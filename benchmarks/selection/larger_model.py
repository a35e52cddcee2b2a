"""A larger model of the same tokenizer, for choices that a smaller one made (LESS-T).

    python -m benchmarks.selection.larger_model OUT [--model ../shared/models/base-6m] [--data ../shared/data]
        [--rows 2000] [--lr 5e-4] [--seed 0]

Each layer of the model gets a copy above it whose two last maps (of the attention and of the feed-forward part) are 0:
twice as many layers, and at first the same function. It is then trained on text, so that the new layers do something:
on so many rows of `domains`, once, in full. OUT holds the model; OUT/larger.json its losses on 100 other rows before
and after, beside those of the smaller model trained on the same text.

Source: block expansion, Wu et al. 2024 (LLaMA Pro, https://arxiv.org/abs/2401.02415), section 3.2; there the old layers
stay as they are.
"""

import argparse
import copy
import json
import random
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from whence.corpus.layouts import Row
from whence.corpus.tokens import encode
from whence.evaluation.selection import grade
from whence.models.loading import load_model
from whence.models.runs import open_run
from whence.training.trainer import train

HELD_OUT, MAX_TOKENS = 100, 256


def expanded(model: str) -> torch.nn.Module:
    """The model with a copy of each layer above it that adds nothing yet."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layers = torch.nn.ModuleList()
    for layer in net.model.layers:
        above = copy.deepcopy(layer)
        torch.nn.init.zeros_(above.self_attn.o_proj.weight)
        torch.nn.init.zeros_(above.mlp.down_proj.weight)
        layers.extend([layer, above])
    for place, layer in enumerate(layers):
        layer.self_attn.layer_idx = place
    net.model.layers = layers
    net.config.num_hidden_layers = len(layers)
    if getattr(net.config, "layer_types", None):
        net.config.layer_types = [kind for kind in net.config.layer_types for _ in range(2)]
    return net


def texts(data: Path, count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, as many of each domain as it has of all, and other rows."""
    rows = [json.loads(line) for file in sorted((data / "domains").glob("*.jsonl")) for line in file.open()]
    random.Random(seed).shuffle(rows)
    return rows[HELD_OUT : HELD_OUT + count], rows[:HELD_OUT]


def loss(model: str, rows: list[Row]) -> float:
    """Mean over rows of their mean loss, in nats a token."""
    loaded = load_model(open_run(model).checkpoints[-1].path)
    return float(grade(loaded, [encode(row, loaded.tokenizer, MAX_TOKENS) for row in rows]).loss.mean())


def main() -> None:
    """Expand, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows, others = texts(options.data, options.rows, options.seed)
    work = options.out.with_name(f"{options.out.name}.work")
    start = work / "start"
    expanded(options.model).save_pretrained(start)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(start)
    found = {"rows": len(rows), "held out": len(others), "smaller": loss(options.model, others)}
    found["expanded"] = loss(str(start), others)
    settings = {"epochs": 1, "lr": options.lr, "max_tokens": MAX_TOKENS, "seed": options.seed, "checkpoints": 1}
    for name, parent in (("larger, trained", str(start)), ("smaller, trained", options.model)):
        run = work / name.replace(", ", "-")
        train(parent, rows, run, **settings)
        found[name] = loss(str(run), others)
        if parent == str(start):
            shutil.copytree(open_run(str(run)).checkpoints[-1].path, options.out, dirs_exist_ok=True)
    net = AutoModelForCausalLM.from_pretrained(options.out)
    found["weights"] = sum(weight.numel() for weight in net.parameters())
    (options.out / "larger.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
