"""What `whence train --in-run` costs and what its scores are worth, on base-6m.

    python -m benchmarks.training.in_run [--model DIR] [--data DIR] [--pairs 20] [--parts speed,scores] [-o FILE]

**speed**: real trainings (AdamW, batches of 16 rows x 128 tokens) of which every other step is `plain`, with nothing
measured, and the steps between are `reused`, first order with a validation gradient that is kept; `fresh`, first order
with a new one of 16 rows; or `second`, second order. A step is timed from where its pass begins to where the next one's
does, so the optimizer, the clipping and the collating are in it. Ratios are medians of a step's time to the mean of the
plain steps on both sides of it, by the wall clock and by the process' own time (which a busy machine disturbs less).
`default` is a step's average cost with a new gradient every 10 steps: reused + (fresh - reused) / 10. Bar: 1.6.

**scores**: 384 rows of four domains, two passes, validation rows of one of them. By source, the mean score; AUROC of
the validation's domain against the others; what all scores add up to, and the real fall of the validation loss.
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pyarrow.parquet
import torch
import transformers

from whence.corpus.reading import open_corpus
from whence.corpus.tokens import bucketed, collate, encode
from whence.gradients.capture import token_losses
from whence.models.loading import load_model
from whence.numerics import auroc
from whence.training.in_run import SCORES, SETTINGS, InRun
from whence.training.resuming import newest_checkpoint
from whence.training.trainer import train

DOMAINS = ("shakespeare", "code", "science_news", "wikitext")
MODES = {"reused": 1, "fresh": 2, "second": 5}
"""Ways to measure, and of what number of pairs each takes a part."""
EVERY = 10
"""Steps between validation gradients, by default."""
BAR = 1.6


def main() -> None:
    """Measure the parts and write FILE, where parts that are not measured stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument(
        "--pairs", type=int, default=20, help="of a plain step and another; a half and a fifth of other ways"
    )
    parser.add_argument("--rows", type=int, default=96, help="of each domain")
    parser.add_argument("--parts", default="speed,scores")
    parser.add_argument("-o", "--out", default="benchmarks/training/results/in_run.json")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    found = json.loads(out.read_text()) if out.exists() else {}
    found["machine"] = machine()
    for part in arguments.parts.split(","):
        found[part] = {"speed": speeds, "scores": scores}[part](arguments)
        out.write_text(json.dumps(found, indent=1) + "\n")


# -- speed


class Alternating(InRun):
    """Contributions of every other step, measured in one way."""

    mode = "reused"
    marks: list[tuple[float, float]] = []  # noqa: RUF012 - of one training at a time
    """Wall clock and process time when each step's pass began."""

    @property
    def is_plain(self) -> bool:
        """The step whose pass began last is not measured: the second, fourth, and so on."""
        return len(self.marks) % 2 == 0

    @contextmanager
    def watching(self, inputs, rows) -> Iterator[None]:
        """As ever, but for plain steps."""
        self.marks.append((time.perf_counter(), time.process_time()))
        if self.is_plain:
            yield
            return
        with super().watching(inputs, rows):
            yield

    def step(self, optimizer, number: int) -> None:
        """As ever, but for plain steps."""
        if not self.is_plain:
            super().step(optimizer, number)


def speeds(arguments) -> dict:
    """Ratios of full training and of adapters."""
    rows = list(itertools.islice(long_rows(arguments, "gutenberg"), 16 * 60))
    validation = list(itertools.islice(long_rows(arguments, "science_news"), 64))
    out = {}
    for name, more in (("full", {}), ("lora rank 8", {"lora_rank": 8})):
        found = {}
        for mode, part in MODES.items():
            pairs = max(3, arguments.pairs // part)
            own = more | {
                "in_run_every": 10**9 if mode == "reused" else 1,
                "in_run_order": 2 if mode == "second" else 1,
            }
            Alternating.mode, Alternating.marks = mode, []
            with tempfile.TemporaryDirectory() as directory, mock.patch("whence.training.trainer.InRun", Alternating):
                train(arguments.model, rows, Path(directory) / "run", batch_size=16, max_tokens=128, lr=1e-4,
                      max_steps=2 * pairs + 4, checkpoints=1, in_run=validation, progress=False, **own)  # fmt: skip
            found[mode] = told(Alternating.marks)
            print(f"{name:12s} {mode:8s} {json.dumps(found[mode])}", flush=True)
        ratio = {mode: found[mode]["process"]["ratio"] for mode in MODES}
        average = ratio["reused"] + (ratio["fresh"] - ratio["reused"]) / EVERY
        out[name] = found | {"default": average, "bar": BAR, "is_met": average <= BAR}
        print(f"{name:12s} default  {average:.3f}")
    return out


def told(marks: list[tuple[float, float]]) -> dict:
    """Medians over measured steps, each beside its two plain neighbours. The first one and its neighbour warm up."""
    found: dict = {}
    for kind, clock in enumerate(("wall", "process")):
        took = [end[kind] - start[kind] for start, end in itertools.pairwise(marks)][1:]
        plain, own = took[::2], took[1::2]  # from the second step on
        own = own[: len(plain) - 1]
        ratios = [mine / statistics.mean(plain[n : n + 2]) for n, mine in enumerate(own)]
        found[clock] = {
            "ratio": statistics.median(ratios),
            "least_and_largest": [min(ratios), max(ratios)],
            "plain_seconds": statistics.median(plain),
            "seconds": statistics.median(own),
        }
    return {"steps": len(own)} | found


# -- scores


def scores(arguments) -> dict:
    """What scores say of domains, by optimizer and order."""
    rows = [row for name in DOMAINS for row in itertools.islice(long_rows(arguments, name), arguments.rows)]
    validation = list(itertools.islice(long_rows(arguments, DOMAINS[0]), arguments.rows, arguments.rows + 64))
    ways = {
        "sgd, lr .02": {"optimizer": "sgd", "lr": 0.02},
        "sgd, lr .02, second order": {"optimizer": "sgd", "lr": 0.02, "in_run_order": 2},
        "adamw, lr 1e-5": {"lr": 1e-5},
        "adamw, lr 3e-4": {"lr": 3e-4},
    }
    out = {}
    for name, more in ways.items():
        with tempfile.TemporaryDirectory() as directory:
            run = train(arguments.model, rows, Path(directory) / "run", batch_size=16, max_tokens=128, epochs=2,
                        checkpoints=1, in_run=validation, progress=False, **more)  # fmt: skip
            table = pyarrow.parquet.read_table(run / SCORES).to_pylist()
            settings = json.loads((run / SETTINGS).read_text())
            ends = [mean_loss(model, validation) for model in (arguments.model, newest_checkpoint(run))]
        values = torch.tensor([row["whence_score"] for row in table])
        own = torch.tensor([row["source"] == DOMAINS[0] for row in table])
        out[name] = {
            "mean_score": {
                domain: statistics.mean(row["whence_score"] for row in table if row["source"] == domain)
                for domain in DOMAINS
            },
            "auroc": auroc(values, own),
            "predicted_fall": settings["predicted_fall"],
            "real_fall": ends[0] - ends[1],
            "relative_step": settings["relative_step"],
        }
        print(name, json.dumps(out[name]))
    return out


def mean_loss(model, rows: list[dict]) -> float:
    """Nats a supervised token."""
    loaded = load_model(model, dtype="float32")
    encoded = [encode(row, loaded.tokenizer, 128) for row in rows]
    groups = bucketed([len(row.ids) for row in encoded], 2048)
    total = sum(float(token_losses(loaded, collate([encoded[n] for n in group])).nll.sum()) for group in groups)
    return total / sum(row.supervised_count for row in encoded)


def long_rows(arguments, domain: str) -> Iterator[dict]:
    """Rows of a domain that fill 128 tokens."""
    for example in open_corpus(f"{arguments.data}/domains/{domain}.jsonl"):
        if len(example.row["text"]) > 1000:
            yield example.row | {"id": example.id}


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
