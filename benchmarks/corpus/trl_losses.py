r"""Is Whence's loss TRL's? Both in float32, as they are computed, and both in float64, where no rounding is left.

OMP_NUM_THREADS=1 python -m benchmarks.corpus.trl_losses ../shared/models/base-6m

TRL's losses are those that trl_shapes.py wrote: `SFTTrainer.compute_loss` of two conversations, every token supervised.
In float64 Whence's are the mean over the tokens that it supervises, from the logits of the model in float64. Numbers
go to benchmarks/corpus/results/trl_losses.json; five seconds.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from whence.corpus.templates import supervise
from whence.corpus.tokens import Batch, collate, encode
from whence.gradients.capture import token_losses
from whence.models.loading import LoadedModel

RESULTS = Path(__file__).with_name("results")


def main() -> None:
    """Compute Whence's losses beside TRL's, and write both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    arguments = parser.parse_args()
    trl = json.loads((RESULTS / "trl_shapes.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    supervise(tokenizer, "all")
    batches = [collate([encode({"messages": talk}, tokenizer)]) for talk in trl["talks"]]
    answer = {}
    for dtype in (torch.float32, torch.float64):
        network = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        name = f"{arguments.model.name}, {str(dtype).removeprefix('torch.')}"
        ours = [_loss(LoadedModel(network, tokenizer, name), batch) for batch in batches]
        theirs = trl["losses"][name]["each"]
        gaps = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
        answer[name] = {"Whence": ours, "TRL": theirs, "gaps": gaps}
        print(f"{name}: {', '.join(f'{gap:.2g}' for gap in gaps)} nats apart")
    (RESULTS / "trl_losses.json").write_text(json.dumps(answer, indent=1) + "\n")


@torch.no_grad()
def _loss(model: LoadedModel, batch: Batch) -> float:
    if model.base.dtype == torch.float32:
        return float(token_losses(model, batch).loss)
    labels = batch.ids.masked_fill(~batch.supervised, -100)[0, 1:]
    return float(cross_entropy(model.base(batch.ids).logits[0, :-1], labels))


if __name__ == "__main__":
    main()
