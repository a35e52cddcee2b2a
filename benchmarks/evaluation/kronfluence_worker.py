"""EK-FAC's scores by kronfluence, by its public functions. Runs in an environment that has it, on one thread.

    PYTHON kronfluence_worker.py DIRECTORY

Reads DIRECTORY/order.json: `model`, a directory; `layers`, names of modules; `rows` and `queries`, each with
`input_ids` and `labels`; `batch` and `damping`. Writes DIRECTORY/kronfluence.npy [q n] and the seconds of the processor
for factors and scores to DIRECTORY/kronfluence.json. A row's loss is the sum over its labels, with labels drawn from
the model for the factors; a query's measurement is its mean loss.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM


class LanguageModelling(Task):
    """Losses as kronfluence's own example for language models has them."""

    def __init__(self, layers: list):
        super().__init__()
        self.layers = layers

    def compute_train_loss(self, batch: dict, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
        """Sum over all labels of a batch."""
        logits, labels = self._flat(batch, model)
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
                labels = torch.where(labels == -100, labels, drawn)
        return cross_entropy(logits, labels, reduction="sum", ignore_index=-100)

    def compute_measurement(self, batch: dict, model: torch.nn.Module) -> torch.Tensor:
        """Mean over each query's labels, summed over queries."""
        logits, labels = self._flat(batch, model)
        losses = cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        shape = batch["labels"][:, 1:].shape
        return (losses.view(shape).sum(1) / (batch["labels"][:, 1:] != -100).sum(1)).sum()

    def get_influence_tracked_modules(self) -> list:
        """The layers that Whence traces."""
        return self.layers

    def get_attention_mask(self, batch: dict) -> torch.Tensor:
        """Of real tokens."""
        return batch["attention_mask"]

    @staticmethod
    def _flat(batch: dict, model: torch.nn.Module) -> tuple:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        return logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1)


def padded(examples: list) -> dict:
    """A batch, as long as its longest example."""
    longest, out = max(len(example["input_ids"]) for example in examples), {}
    for name, filler in (("input_ids", 0), ("labels", -100)):
        lines = [example[name] + [filler] * (longest - len(example[name])) for example in examples]
        out[name] = torch.tensor(lines)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return out | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def main() -> None:
    """Factors, then scores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = Path(sys.argv[1])
    order = json.loads((work / "order.json").read_text())
    task = LanguageModelling(order["layers"])
    model = prepare_model(AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float32), task)
    analyzer = Analyzer("whence", model, task, cpu=True, output_dir=str(work / "kronfluence"), disable_tqdm=True)
    places = sorted(range(len(order["rows"])), key=lambda place: len(order["rows"][place]["input_ids"]))
    rows, queries = [order["rows"][place] for place in places], order["queries"]  # of like length in a batch
    how = {"dataloader_kwargs": DataLoaderKwargs(collate_fn=padded), "overwrite_output_dir": True}
    start = time.process_time()
    analyzer.fit_all_factors("factors", rows, per_device_batch_size=order["batch"],
                             factor_args=FactorArguments(strategy="ekfac"), **how)  # fmt: skip
    factors = time.process_time() - start
    analyzer.compute_pairwise_scores(
        "scores", "factors", query_dataset=queries, train_dataset=rows, per_device_query_batch_size=len(queries),
        per_device_train_batch_size=order["batch"], score_args=ScoreArguments(damping_factor=order["damping"]), **how,
    )  # fmt: skip
    scores = time.process_time() - start - factors
    found = analyzer.load_pairwise_scores("scores")["all_modules"].float().numpy()
    scattered = np.zeros_like(found)
    scattered[:, places] = found
    np.save(work / "kronfluence.npy", scattered)
    status = Path("/proc/self/status").read_text()
    memory = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    (work / "kronfluence.json").write_text(json.dumps({"factors": factors, "scores": scores, "memory": memory}))


if __name__ == "__main__":
    main()
