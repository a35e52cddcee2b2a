"""One tool, one process, in the tool's own environment: times a batch as a training pass and as an index.

Started by `peers.py`, which says over standard input what to do. It imports whence only as the tool `whence`.

    PYTHON peer_worker.py TOOL MODEL        TOOL: whence, bergson or dattri

A request is a line of JSON, {"way": NAME, "ids": [[...]]}; the answer {"cpu": s, "wall": s, "bytes": stored bytes a
row}. The first answer, without a request, says which versions run and which ways there are. The way "pass" is in every
tool: forward and backward of the model's own loss with all weights trainable. Everything is fp32, in one thread.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import Tensor

Index = Callable[[Tensor], int]
"""Indexes a batch of token ids [b t] and gives the bytes it stored for a row."""

WHENCE = {
    "tensor_sketch 43,008, one bit": {"projection": "tensor_sketch", "width": 43008, "codec": "onebit"},
    "two_sided 16, bfloat16": {"projection": "two_sided", "width": 16, "codec": "bfloat16"},
    "count_sketch 43,008, one bit": {"projection": "count_sketch", "width": 43008, "codec": "onebit"},
}
BERGSON_DIMENSION, LOGRA_DIMENSION = 16, 4096  # numbers on a side; numbers a layer


def main() -> None:
    """Answer requests until there are no more."""
    tool, model = sys.argv[1], sys.argv[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # tools print
    torch.set_num_threads(1)
    ways = {"whence": whence_ways, "bergson": bergson_ways, "dattri": dattri_ways}[tool](model)
    names = [tool, "torch", "transformers"]
    versions = {name: version(name) for name in names if name != "whence"}
    print(json.dumps({"versions": versions, "ways": ["pass", *ways]}), file=answers, flush=True)
    trained = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ways["pass"] = partial(training, trained)
    for line in sys.stdin:
        request = json.loads(line)
        ids = torch.tensor(request["ids"])
        way = ways[request["way"]]
        cpu, wall = time.process_time(), time.perf_counter()
        stored = way(ids)
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(seconds | {"bytes": stored}), file=answers, flush=True)


def training(model: Any, ids: Tensor) -> int:
    """Forward and backward, every weight's gradient."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for weight in model.parameters():
        weight.grad = None
    return 0


def whence_ways(model: str) -> dict[str, Index]:
    """What `whence index` does with a batch, up to the codes that it writes, for each of `WHENCE`."""
    from whence.corpus.tokens import Encoded, collate
    from whence.gradients.capture import sketch
    from whence.indexing.codecs import codec
    from whence.indexing.vectors import IndexSettings, load_for, projection_for, with_options

    ways, loaded = {}, load_for(model, IndexSettings())
    layers = loaded.layers(IndexSettings().space.layers)

    def way(options: dict[str, Any]) -> Index:
        settings = with_options(IndexSettings(), options)
        projection, store = projection_for(loaded, settings), codec(settings.codec_name)

        def index(ids: Tensor) -> int:
            batch = collate([Encoded(row, [False] + [True] * (len(row) - 1)) for row in ids.tolist()])
            rows, _ = sketch(loaded, layers, batch, projection)
            return store.encode(rows)[0][0].nbytes

        return index

    for name, options in WHENCE.items():
        ways[name] = way(options)
    return ways


def bergson_ways(model: str) -> dict[str, Index]:
    """The body of the loop of `bergson build` (`CollectorComputer.run_with_collector_hooks`), its memory map included.

    It leaves the output head out by itself: its collector sees the decoder.
    """
    from bergson.collector.collector import CollectorComputer
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.config.config import IndexConfig, PreprocessConfig
    from bergson.data import pad_and_tensor
    from bergson.utils.worker_utils import create_processor, setup_model_and_peft
    from datasets import Dataset

    folder = tempfile.mkdtemp()
    settings = IndexConfig(run_path=f"{folder}/run", model=model, projection_dim=BERGSON_DIMENSION)
    settings.partial_run_path.mkdir(parents=True)
    loaded, targets = setup_model_and_peft(settings)
    processor = create_processor(loaded, settings, targets)
    found: dict[int, CollectorComputer] = {}

    def computer(rows: int, tokens: int) -> CollectorComputer:
        data = Dataset.from_list([{"input_ids": [0] * tokens, "length": tokens}] * rows)
        collector = GradientCollector(
            model=loaded.base_model,
            cfg=settings,
            processor=processor,
            target_modules=targets,
            data=data,
            preprocess_cfg=PreprocessConfig(),
        )
        return CollectorComputer(model=loaded, data=data, collector=collector, batches=[[*range(rows)]], cfg=settings)

    def index(ids: Tensor) -> int:
        if len(ids) not in found:
            found.clear()  # a collector's memory map is a file of the folder
            found[len(ids)] = computer(*ids.shape)
        made = found[len(ids)]
        x, y, _, mask = pad_and_tensor(ids.tolist(), device=made.device, sync_max_len=False)
        with made.collector.with_batch(mask):
            losses = made.forward_backward(made.model, x, y, {})
        made.collector.process_batch([*range(len(ids))], losses=losses)
        return made.collector.builder.grad_buffer[0].nbytes

    return {f"{BERGSON_DIMENSION} x {BERGSON_DIMENSION} a layer, fp32": index}


def dattri_ways(model: str) -> dict[str, Index]:
    """The body of the loop of LoGra's `cache` (`BlockProjectedIFAttributor`), without Hessian, gradients in memory.

    As it comes, weights that are not hooked are trainable, and their gradients are made too; so a second way freezes
    the output head, the embedding and the norms. Its projection is compiled by inductor at the first batch of a shape.
    """
    from dattri.algorithm.block_projected_if.core.hook import HookManager
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    def loss(network: Any, batch: Tensor, device: str) -> Tensor:
        return network(input_ids=batch.to(device), labels=batch.to(device), use_cache=False).loss

    def way(frozen: bool) -> Index:
        network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        layers = [name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]
        layers = [name for name in layers if name != "lm_head"]
        for name, weight in network.named_parameters():
            weight.requires_grad_(not frozen or name.removesuffix(".weight") in layers)
        task = AttributionTask(loss_func=loss, model=network, checkpoints=network.state_dict())
        logra = LoGraAttributor(task, layer_names=layers, hessian="Identity", proj_dim=LOGRA_DIMENSION)
        state: dict[str, HookManager] = {}

        def index(ids: Tensor) -> int:
            if not state:
                rows: Any = [{"input_ids": row} for row in ids]  # of a tuple it takes the first of the first
                logra._setup_compressors(torch.utils.data.DataLoader(rows, len(ids)))
                state["hooks"] = HookManager(logra.model, layers)
                state["hooks"].set_compressors(logra.compressors)
            logra.model.zero_grad()
            logra.task.original_loss_func(logra.model, ids, "cpu").backward()
            with torch.no_grad():
                gradients = state["hooks"].get_compressed_grads()
                logra.offload_manager.store_gradients(0, gradients, is_test=False)
            return logra.offload_manager.cached_gradients[0][0].nbytes

        return index

    name = f"LoGra {LOGRA_DIMENSION:,} a layer, fp32"
    return {name: way(False), f"{name}, other weights frozen": way(True)}


if __name__ == "__main__":
    main()
