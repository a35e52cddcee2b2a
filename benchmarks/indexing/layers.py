"""Cost of each sketch by the size of a layer, and whether `tensor_sketch` cuts its layers as measured times would.

    python -m benchmarks.indexing.layers [--sizes 256 1024 4096] [--rounds N] [-o FILE]

One decoder block of a Llama with random weights, rows of 128 random states, fp32, one thread. Inputs and output
gradients of its seven linear layers are kept from a backward pass; each round times the block's forward and backward
(all weights trainable), each layer's three products, and each sketch of every layer as an index makes it. A cell is the
median over rounds of a ratio within the round. Seconds are of the processor. Widths are those of a model of so many
blocks (`flat_width`). `tensor_sketch` is timed as its rule cuts the layers, and with a quarter to four times as many
blocks. Sizes that FILE has are not measured again.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.indexing.peers import processor
from benchmarks.indexing.speed import machine
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from whence import catalogue
from whence.gradients.capture import Captured, Sketches
from whence.gradients.flat_width import flat_width
from whence.gradients.projections.tensor_sketch import LEAST_SHARE, Cut, TensorSketch
from whence.gradients.protocols import Projection, Shapes

SIZES = {256: (688, 6, 8, 40), 1024: (2752, 24, 4, 12), 4096: (11008, 32, 2, 5)}
"""Hidden size: that of the MLP, blocks of the model, rows in a batch, rounds."""
TOKENS = 128
FACTORS = (0.25, 0.5, 1, 2, 4)
RULE = "tensor_sketch"
COMPARED = ("two_sided", "count_sketch", RULE)


def main() -> None:
    """Measure each size that FILE does not have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, help="instead of 40, 12 and 5")
    parser.add_argument("-o", "--out", default="benchmarks/indexing/results/layers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(arguments.out)
    found = json.loads(out.read_text()) if out.exists() else {"sizes": {}}
    for hidden in arguments.sizes:
        if str(hidden) in found["sizes"]:
            continue
        found["sizes"][str(hidden)] = report = Block(hidden).measured(arguments.rounds or SIZES[hidden][3])
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(hidden, report["width"], report["of_block"])
        for shape, layer in report["layers"].items():
            print(f"  {shape:14s} of its products {layer['of_products']}")
            print(f"  {'':14s} by blocks {layer['by_blocks']}")


class Block:
    """A decoder block, and what its linear layers saw in a backward pass."""

    def __init__(self, hidden: int):
        mlp, self.blocks, self.rows, _ = SIZES[hidden]
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
        )
        config._attn_implementation = "sdpa"
        self.module = LlamaDecoderLayer(config, 0).eval()
        self.layers = {name: layer for name, layer in self.module.named_modules() if isinstance(layer, nn.Linear)}
        self.states = torch.randn(self.rows, TOKENS, hidden)
        self.slopes = torch.randn(self.rows, TOKENS, hidden) / TOKENS
        self.positions = LlamaRotaryEmbedding(config)(self.states, torch.arange(TOKENS)[None])
        self.seen: dict[str, Captured] = {}
        hooks = [layer.register_full_backward_hook(self._keep(name)) for name, layer in self.layers.items()]
        hooks += [layer.register_forward_hook(self._keep_inputs(name)) for name, layer in self.layers.items()]
        self.inputs: dict[str, Tensor] = {}
        self.train()
        for hook in hooks:
            hook.remove()

    def _keep_inputs(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
            self.inputs[name] = arguments[0].detach().clone()

        return keep

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, before: Any, after: tuple[Tensor, ...]) -> None:
            self.seen[name] = Captured(name, self.inputs[name], after[0].detach().clone(), None)

        return keep

    def train(self) -> None:
        """Forward and backward, down to the block's input."""
        states = self.states.clone().requires_grad_(True)
        self.module(states, position_embeddings=self.positions).backward(self.slopes)
        self.module.zero_grad(set_to_none=True)

    @property
    def shapes(self) -> Shapes:
        """Shapes of all layers of the model; the first block's names are those of the layers."""
        own = {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}
        return own | {f"{block}.{name}": shape for block in range(1, self.blocks) for name, shape in own.items()}

    def cut(self, width: int) -> dict[float, TensorSketch]:
        """`tensor_sketch` by `FACTORS`: with so many times the blocks that its rule gives each layer."""
        shapes = self.shapes
        rule = TensorSketch(shapes, width=width)
        most = [min(shape) for shape in shapes.values()]
        return {
            factor: TensorSketch(
                shapes,
                width=width,
                blocks=[_power(factor * own, limit) for own, limit in zip(rule.blocks, most, strict=True)],
            )
            for factor in FACTORS
        }

    def products(self, name: str) -> None:
        """A layer's forward product, and the two of its backward pass."""
        layer, seen = self.layers[name], self.seen[name]
        a, g = seen.a.flatten(0, 1), seen.g.flatten(0, 1)
        a @ layer.weight.T
        g @ layer.weight
        g.T @ a

    @torch.no_grad()
    def round(self, sketches: dict[str, Projection], turn: int) -> dict[str, Any]:
        """Seconds of the block's pass, of each layer's products, and of each sketch of each layer."""
        with torch.enable_grad():
            timed: dict[str, Any] = {"block": seconds(self.train)}
        timed["products"] = {name: seconds(partial(self.products, name)) for name in self.layers}
        names, start = list(sketches), turn % len(sketches)
        for sketch in names[start:] + names[:start]:
            consume = Sketches(sketches[sketch], self.rows, torch.device("cpu"))
            timed[sketch] = {name: seconds(partial(consume, self.seen[name])) for name in self.layers}
        return timed

    def measured(self, rounds: int) -> dict[str, Any]:
        """Medians over rounds, after one that does not count."""
        width, load = flat_width(self.shapes), os.getloadavg()[0]
        cut = self.cut(width)
        sketches: dict[str, Projection] = {
            "two_sided": catalogue.projection("two_sided")(self.shapes, width=16),
            "count_sketch": catalogue.projection("count_sketch")(self.shapes, width=width),
            RULE: cut[1],
        }
        sketches |= {f"times {factor}": made for factor, made in cut.items() if factor != 1}
        timed = [self.round(sketches, turn) for turn in range(rounds + 1)][1:]
        report: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "processor": processor()}
        report |= {"machine": machine(), "load": [load, os.getloadavg()[0]], "rounds": rounds}
        report |= {"width": width, "model_blocks": self.blocks, "rows": self.rows, "tokens": TOKENS}
        report["block_seconds"] = statistics.median(one["block"] for one in timed)
        layers = list(self.layers)
        report["of_block"] = {
            name: quartiles([total(one[name], layers) / one["block"] for one in timed]) for name in COMPARED
        }
        groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, layer in self.layers.items():
            groups[layer.out_features, layer.in_features].append(name)
        report["layers"] = {
            f"{o} x {i}": by_shape(group, (o, i), timed, cut, layers.index(group[0]))
            for (o, i), group in groups.items()
        }
        return report


def by_shape(
    layers: list[str], shape: tuple[int, int], timed: list[dict], cut: dict[float, TensorSketch], place: int
) -> dict[str, Any]:
    """Sketches of the layers of one shape, over their products; and `tensor_sketch` by blocks, over the rule's.

    `place` is that of the first of them in the model.
    """
    own = {factor: Cut(*shape, made.blocks[place]) for factor, made in cut.items()}
    least = min(math.prod(shape), cut[1].width / LEAST_SHARE)
    by_blocks = {
        made.blocks: {
            "numbers": made.size,
            "allowed": made.size >= least,
            "cost": round(made.cost() / own[1].cost(), 3),
            "time": quartiles([total(one[name], layers) / total(one[RULE], layers) for one in timed]),
        }
        for factor, made in own.items()
        for name in [RULE if factor == 1 else f"times {factor}"]
    }
    of_products = {
        name: quartiles([total(one[name], layers) / total(one["products"], layers) for one in timed])
        for name in COMPARED
    }
    return {"layers": len(layers), "rule": own[1].blocks, "of_products": of_products, "by_blocks": by_blocks}


def total(by_layer: dict[str, float], layers: list[str]) -> float:
    """Seconds of some layers."""
    return sum(by_layer[name] for name in layers)


def seconds(what: Callable[[], Any]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    what()
    return time.process_time() - start


def quartiles(values: list[float]) -> list[float]:
    """Median, and the ends of the middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return [round(middle, 4), round(low, 4), round(high, 4)]


def _power(blocks: float, most: int) -> int:
    """A power of two from 1 to `most`."""
    return max(1, min(int(blocks), 2 ** int(math.log2(most))))


if __name__ == "__main__":
    main()
