"""What `whence train --in-run` costs and what its scores are worth, on base-6m.

    python benchmarks/inrun.py [--model DIR] [--data DIR] [--cycles 12] [--parts speed,scores] [-o FILE]

**speed**: one real training (AdamW, batches of 16 rows x 128 tokens) whose steps take turns: `plain`, with nothing
measured; `reused`, first order with a validation gradient that is kept; `fresh`, first order with a new one of 32 rows;
`second`, second order. A step is timed from where its pass begins to where the next one's does, so the optimizer, the
clipping and the collating are in it. Ratios are medians over cycles of a step's time to its own cycle's plain step, by
the wall clock and by the process' own time (which a busy machine disturbs less). `default` is what a step costs on
average with a new gradient every 10 steps: reused + (fresh - reused) / 10. Bar: 1.6.

**scores**: 640 rows of four domains, two passes, validation rows of one of them. By source, the mean score; AUROC of the
validation's domain against the others; and what all scores add up to against the real fall of the validation loss.
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
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pyarrow.parquet
import torch
import transformers

from whence.corpus import open_corpus
from whence.gradients import token_losses
from whence.inrun import SCORES, SETTINGS, InRun
from whence.model import load_model
from whence.numerics import auroc
from whence.resuming import newest_checkpoint
from whence.tokens import bucketed, collate, encode
from whence.train import train

DOMAINS = ("shakespeare", "code", "science_news", "wikitext")
MODES = ("plain", "reused", "fresh", "second")
EVERY = 10
"""Steps between validation gradients, by default."""
BAR = 1.6


def main() -> None:
    """Measure the parts and write FILE, where parts that are not measured stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--cycles", type=int, default=12)
    parser.add_argument("--rows", type=int, default=160, help="of each domain")
    parser.add_argument("--parts", default="speed,scores")
    parser.add_argument("-o", "--out", default="benchmarks/results/inrun.json")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    found = json.loads(out.read_text()) if out.exists() else {}
    found["machine"] = machine()
    for part in arguments.parts.split(","):
        found[part] = {"speed": speeds, "scores": scores}[part](arguments)
        out.write_text(json.dumps(found, indent=1) + "\n")


# -- speed


class Alternating(InRun):
    """Contributions that are measured in another way at each step."""

    modes: tuple[str, ...] = MODES
    marks: list[tuple[float, float]] = []  # noqa: RUF012 - of one training at a time
    """Wall clock and process time when each step's pass began."""

    @property
    def mode(self) -> str:
        """Of the step whose pass began last."""
        return self.modes[(len(self.marks) - 1) % len(self.modes)]

    @contextmanager
    def watching(self, inputs, rows) -> Iterator[None]:
        """As ever, but for plain steps."""
        self.marks.append((time.perf_counter(), time.process_time()))
        if self.mode == "plain":
            yield
            return
        with super().watching(inputs, rows):
            yield

    def step(self, optimizer, number: int) -> None:
        """By the step's mode."""
        if self.mode == "plain":
            return
        self.plan = replace(self.plan, order=2 if self.mode == "second" else 1, every=10**9)
        kept = self._slope
        if self.mode in ("fresh", "second"):
            self._slope = None
        super().step(optimizer, number or 1)
        self._slope = self._slope or kept


def speeds(arguments) -> dict:
    """Ratios of full training and of adapters."""
    rows = list(itertools.islice(long_rows(arguments, "gutenberg"), 16 * 60))
    validation = list(itertools.islice(long_rows(arguments, "science_news"), 64))
    out = {}
    for name, more in (("full", {}), ("lora rank 8", {"lora_rank": 8})):
        Alternating.marks = []
        steps = len(MODES) * (arguments.cycles + 1) + 1
        with tempfile.TemporaryDirectory() as directory, mock.patch("whence.train.InRun", Alternating):
            train(arguments.model, rows, Path(directory) / "run", batch_size=16, max_tokens=128, max_steps=steps,
                  lr=1e-4, checkpoints=1, in_run=validation, progress=False, **more)  # fmt: skip
        out[name] = told(Alternating.marks, name)
    return out


def told(marks: list[tuple[float, float]], name: str) -> dict:
    """Medians over cycles, the first of which warms up."""
    seconds = {mode: ([], []) for mode in MODES}
    for number, (start, end) in enumerate(itertools.pairwise(marks)):
        if number >= len(MODES):
            for kind in (0, 1):
                seconds[MODES[number % len(MODES)]][kind].append(end[kind] - start[kind])
    found: dict = {"cycles": len(seconds["plain"][0])}
    for kind, clock in enumerate(("wall", "process")):
        plain = seconds["plain"][kind]
        ratio = {
            mode: statistics.median(own / base for own, base in zip(took[kind], plain, strict=True))
            for mode, took in seconds.items()
        }
        ratio["default"] = ratio["reused"] + (ratio["fresh"] - ratio["reused"]) / EVERY
        found[clock] = {
            "ratio": ratio,
            "seconds": {mode: statistics.median(took[kind]) for mode, took in seconds.items()},
        }
        print(f"{name:12s} {clock:8s}", "  ".join(f"{mode} {value:.3f}" for mode, value in ratio.items()))
    found["bar"], found["is_met"] = BAR, found["process"]["ratio"]["default"] <= BAR
    return found


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
    return total / sum(row.targets for row in encoded)


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
