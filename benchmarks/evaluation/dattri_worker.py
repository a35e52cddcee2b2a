"""TRAK's scores by dattri, by its public classes; and what its EK-FAC says. Runs in an environment that has dattri.

    PYTHON dattri_worker.py DIRECTORY

Reads DIRECTORY/order.json: `model`, a directory; `layers`, names of modules; `rows` and `queries`, each with
`input_ids` and `labels`. Writes DIRECTORY/dattri.npy [q n], and to DIRECTORY/dattri.json the seconds of the processor
of `cache` (what TRAK does once) and of `attribute`, the largest memory, and under `ekfac` the error with which its
EK-FAC ends, if it does. TRAK has dattri's own settings, 512 numbers a row, and the weights of `layers`; a row's loss is
the mean over its labels, and its probability of being right that of the mean label, as in dattri's example for language
models. Rows are padded to the longest: dattri takes gradients by `vmap`, for which all have one shape. Its projection
is drawn anew for each batch, so that batches are large.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

BATCH = 48
"""Rows of a pass; 128 of base-6m did not fit in 24 GB."""
REGULARISATION = 1e-3
"""Added to the kernel's diagonal: without it, dattri's default, the solve may fail; it is small beside the kernel."""


def padded(examples: list, longest: int) -> TensorDataset:
    """Ids and labels as tensors."""
    shape = {"input_ids": 0, "labels": -100}
    parts = ([each[name] + [filler] * (longest - len(each[name])) for each in examples]
             for name, filler in shape.items())  # fmt: skip
    return TensorDataset(*map(torch.tensor, parts))


def model_of(order: dict) -> torch.nn.Module:
    """With attention that `vmap` can go through."""
    return AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float32, attn_implementation="eager").eval()


def main() -> None:
    """EK-FAC on one batch, then TRAK."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = Path(sys.argv[1])
    order = json.loads((work / "order.json").read_text())
    longest = max(len(each["input_ids"]) for each in (*order["rows"], *order["queries"]))

    def loss(params: dict, data: tuple) -> torch.Tensor:
        ids, labels = data
        ids, labels = ids.reshape(-1, longest), labels.reshape(-1, longest)
        logits = torch.func.functional_call(net, params, kwargs={"input_ids": ids, "use_cache": False}).logits
        flat, told = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
        losses = cross_entropy(flat, told.clamp_min(0), reduction="none")  # `vmap` allows no count of ignored labels
        weights = (told >= 0).to(losses.dtype)
        return (losses * weights).sum() / weights.sum()

    rows = DataLoader(padded(order["rows"], longest), BATCH, shuffle=False)
    queries = DataLoader(padded(order["queries"], longest), BATCH, shuffle=False)
    result: dict = {}
    net = model_of(order)  # its hooks stay on the model where it ends with an error
    try:
        task = AttributionTask(loss_func=loss, model=net, checkpoints=net.state_dict())
        IFAttributorEKFAC(task, module_name=order["layers"], damping=1e-3).cache(queries, max_iter=1)
    except Exception as error:  # what it says is the result
        result["ekfac"] = f"{type(error).__name__}: {error}"
    net = model_of(order)
    task = AttributionTask(loss_func=loss, model=net, checkpoints=net.state_dict())
    names = [f"{layer}.weight" for layer in order["layers"]]
    trak = TRAKAttributor(task, correct_probability_func=lambda params, data: torch.exp(-loss(params, data)),
                          layer_name=names, regularization=REGULARISATION)  # fmt: skip
    start = time.process_time()
    trak.cache(rows)
    result["factors"] = time.process_time() - start
    found = trak.attribute(queries).numpy()
    result["scores"] = time.process_time() - start - result["factors"]
    np.save(work / "dattri.npy", found.T)
    status = Path("/proc/self/status").read_text()
    result["memory"] = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    (work / "dattri.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
