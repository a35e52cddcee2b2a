"""What the reliability scripts use: tiny directories of every kind, the words of every command, and edits of JSON."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.reliability.calls import whence
from benchmarks.reliability.flips import save_model, write_rows
from benchmarks.reliability.mutations import changed_json

from whence.checksums import digest, document_of, is_sealed, sealed
from whence.models.saved_files import LIST
from whence.models.training_state import IS_COMPLETE, RECORD

TRAINING = ("--max-steps", 4, "--checkpoints", 2, "--batch-size", 4, "--lr", "1e-2", "--max-tokens", 64)
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


class Inputs:
    """Directories below `root`, made once, and the command line's own parameters."""

    def __init__(self, root: Path):
        self.root = root
        self.base, self.final, self.index, self.pool = (root / name for name in ("base", "final", "index", "pool"))
        self.corpus, self.task, self.held_out = (root / f"{name}.jsonl" for name in ("corpus", "task", "held_out"))
        self.table = root / "table.csv"
        if not (root / "made").exists():
            self._make()
        self.parameters = command_parameters()

    def _make(self) -> None:
        root = self.root
        shutil.rmtree(root, ignore_errors=True)
        (root / "home").mkdir(parents=True)
        save_model(self.base, 0)
        (self.base / "chat_template.jinja").write_text(TEMPLATE)
        rows = [
            {"id": f"row-{n}", "prompt": f"{n * 37 % 101} and {n % 7}?", "completion": f" {n % 3}, {n}" + "!" * (n % 9),
             "source": f"s{n % 3}"}
            for n in range(24)
        ]  # fmt: skip
        write_rows(self.corpus, rows)
        write_rows(self.task, [{"prompt": f"{n} and 1?", "completion": f" {n}, 1"} for n in range(2)])
        write_rows(self.held_out, [{"text": "37 and 1? 1, 1!"}, {"text": "74 and 2? 2, 2!!"}])
        made: list[tuple] = [
            ("train", self.base, self.corpus, "-o", self.final, *TRAINING),
            ("train", self.base, self.corpus, "-o", root / "run", *TRAINING),
            ("index", self.final, self.corpus, "-o", self.index, "--width", 8, "--checkpoints", "all"),
            ("pool", "train", self.base, self.corpus, "-o", self.pool, "--by", "source", "--max-tokens", 64,
             "--tokens", 512, "--steps", 4, "--warmup-steps", 1),
            ("ablate", self.pool, "--eval", self.held_out, "--method", "regmean", "-o", self.table),
            _recover(self, root / "evidence"),
            _evaluate(self, root / "cells"),
        ]  # fmt: skip
        for words in made:
            ending = whence(*words, seconds=300)
            assert ending.outcome == "ok", (words, ending)
        run = root / "run"  # stopped after its first checkpoint
        for path in [run / "checkpoint-4", *(path for path in run.iterdir() if path.is_file() and path.name != RECORD)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (run / RECORD).write_bytes(sealed(document_of((run / RECORD).read_bytes()) | {IS_COMPLETE: False}))
        trainer = Path(shutil.copytree(self.final, root / "trainer"))  # as another tool leaves it: no list, no record
        for path in [*trainer.rglob(LIST), trainer / RECORD]:
            path.unlink()
        scheduler = trainer / "checkpoint-2" / "scheduler.pt"
        assert scheduler.exists() and torch.load(scheduler, weights_only=True)
        adapter = ("train", self.base, self.corpus, "-o", root / "adapter", *TRAINING, "--lora-rank", 2)
        assert whence(*adapter, seconds=300).outcome == "ok"
        (root / "made").write_text("")

    def digest(self) -> str:
        """Of every file that was made."""
        own = {"scratch", "losses", "grams", "levels"}  # the last three are where commands keep what they measured
        paths = sorted(path for path in self.root.rglob("*") if path.is_file() and not own & {*path.parts})
        return digest([piece for path in paths for piece in (str(path).encode(), path.read_bytes())])

    def words(self, verb: str, values: dict[str, Any]) -> list[Any]:
        """A command from values by the names of its parameters."""
        out: list[Any] = verb.split()
        for parameter in sorted(self.parameters[verb], key=lambda item: item.param_type_name != "argument"):
            if parameter.name not in values:
                continue
            given = values[parameter.name]
            is_argument = parameter.param_type_name == "argument"
            flag = [] if is_argument else [parameter.opts[-1]]
            if isinstance(given, bool) and not is_argument and parameter.is_flag:
                out += flag if given else parameter.secondary_opts
            else:
                out += [word for value in (given if isinstance(given, list) else [given]) for word in (*flag, value)]
        return out


def command_parameters() -> dict[str, list[Any]]:
    """Parameters of every command, by its words, as the command line itself has them."""
    import typer

    from whence.cli.app import app

    out: dict[str, list[Any]] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            out[" ".join(words)] = [item for item in command.params if item.name != "help"]
            return
        for name, child in children.items():
            walk(child, (*words, name))

    walk(typer.main.get_command(app), ())
    return out


def _recover(inputs: Inputs, work: Path) -> tuple:
    return ("recover", inputs.base, inputs.final, inputs.corpus, "--count", 8, "--method", "nnls", "--mixture",
            "gradients", "--work", work)  # fmt: skip


def _evaluate(inputs: Inputs, work: Path) -> tuple:
    return ("evaluate", "selection", inputs.base, inputs.corpus, "--tasks", inputs.task, "--graded", inputs.task,
            "--methods", "bm25", "--seeds", 2, "--steps", 1, "--batch-size", 2, "--max-tokens", 64, "--fraction", 0.2,
            "--work", work)  # fmt: skip


VERBS: dict[str, Callable[[Inputs, Path], dict[str, Any]]] = {
    "train": lambda i, s: {"model": i.base, "corpus": i.corpus, "out": s / "run", "max_steps": 1, "batch_size": 2,
                           "checkpoints": 1, "lr": 1e-3, "as_json": True},
    "index": lambda i, s: {"model": i.base, "corpus": i.corpus, "out": s / "ix", "width": 4},
    "trace": lambda i, s: {"index": i.index, "prompt": "37 and 1?", "completion": " 1, 1", "top": 2, "null": False},
    "info": lambda i, s: {"index": i.index},
    "verify": lambda i, s: {"index": i.index},
    "append": lambda i, s: {"index": shutil.copytree(i.index, s / "grown"), "corpus": i.task},
    "bench": lambda i, s: {"model": i.base, "corpus": i.corpus, "batches": 1, "batch_size": 2, "length": 16},
    "select": lambda i, s: {"source": i.corpus, "tasks": i.task, "method": "bm25", "count": 3},
    "recover": lambda i, s: {"base": i.base, "final": i.final, "corpus": i.corpus, "count": 8, "method": "cosine",
                             "mixture": "none", "work": s / "w"},
    "demo": lambda i, s: {"out": i.corpus},
    "ablate": lambda i, s: {"path": i.pool, "evaluated": i.held_out},
    "evaluate selection": lambda i, s: {"model": i.base, "source": i.corpus, "tasks": i.task, "graded": i.task,
                                        "methods": "bm25", "seeds": 2, "steps": 1, "batch_size": 2, "max_tokens": 64,
                                        "fraction": 0.2, "work": shutil.copytree(i.root / "cells", s / "w")},
    "evaluate join": lambda i, s: {"source": i.index, "path": i.pool, "evaluated": i.held_out, "methods": "bm25",
                                   "queries": 1},
    "mix law": lambda i, s: {"table": i.table, "folds": 7},
    "mix suggest": lambda i, s: {"pool": i.pool, "evaluated": i.held_out, "steps": 1, "rows": 2},
    "pool train": lambda i, s: {"parent": i.base, "corpus": i.corpus, "out": s / "pool", "max_tokens": 64,
                                "tokens": 64, "steps": 1, "warmup_steps": 0},
    "pool merge": lambda i, s: {"path": i.pool, "mixture": "macro", "out": s / "merged"},
    "pool grams": lambda i, s: {"path": shutil.copytree(i.pool, s / "pool")},
    "pool verify": lambda i, s: {"path": i.pool},
}  # fmt: skip
"""Cheap values of each command's parameters, from the inputs and an empty folder."""


def _uses_of_run(inputs: Inputs, copy: Path, scratch: Path) -> list[tuple]:
    return [
        ("verify", copy),
        ("index", copy, inputs.corpus, "-o", scratch / "ix", "--width", 4, "--checkpoints", "all"),
        ("index", copy, inputs.corpus, "-o", scratch / "ix2", "--width", 4, "--view", "adam"),
        ("recover", inputs.base, copy, inputs.corpus, "--count", 4, "--method", "cosine", "--mixture", "none",
         "--checkpoints", "all", "--undo", "moments", "--work", scratch / "w"),
        ("train", inputs.base, inputs.corpus, "-o", copy, *TRAINING, "--json"),
    ]  # fmt: skip


USES: dict[str, Callable[[Inputs, Path, Path], list[tuple]]] = {
    "index": lambda i, copy, s: [
        ("info", copy), ("verify", copy), ("trace", copy, "--prompt", "37 and 1?", "--completion", " 1", "--top", 2),
        ("select", copy, "--tasks", i.task, "--method", "less", "--count", 3), ("append", copy, i.task),
    ],
    "pool": lambda i, copy, s: [
        ("pool", "verify", copy), ("ablate", copy, "--eval", i.held_out, "--method", "regmean"),
        ("pool", "merge", copy, "--mixture", "micro", "-o", s / "merged"),
        ("pool", "train", i.base, i.corpus, "-o", copy, "--by", "source", "--max-tokens", 64, "--tokens", 512,
         "--steps", 4, "--warmup-steps", 1),
    ],
    "run": _uses_of_run,
    "trainer": _uses_of_run,
    "adapter": _uses_of_run,
    "base": lambda i, copy, s: [("index", copy, i.corpus, "-o", s / "ix", "--width", 4),
                                ("train", copy, i.corpus, "-o", s / "run", *TRAINING, "--json")],
    "evidence": lambda i, copy, s: [("verify", copy), _recover(i, copy)],
    "cells": lambda i, copy, s: [("verify", copy), _evaluate(i, copy)],
}  # fmt: skip
"""Commands that use a copy of each directory; the last is given an empty folder."""


def edit_json(directory: Path, rng: random.Random) -> str:
    """Change one JSON file below a directory in its structure, and give it the checksums of that.

    A file is a sealed document, or one that a list beside it names, or neither.
    """
    file = rng.choice(sorted(directory.rglob("*.json")))
    data = file.read_bytes()
    name = str(file.relative_to(directory))
    if rng.random() < 0.05:
        document, new = None, b"[" * 100_000
    else:
        document = document_of(data) if is_sealed(data) else json.loads(data)
        document = changed_json(document, rng)
        is_object = isinstance(document, dict) and document
        new = sealed(document) if is_sealed(data) and is_object else json.dumps(document).encode()
    file.write_bytes(new)
    record = file.parent / LIST
    if record.exists() and file != record:
        listed = document_of(record.read_bytes())
        for entry in listed["files"]:
            if entry["file"] == file.name:
                entry |= {"bytes": len(new), "xxh3": digest([new])}
        record.write_bytes(sealed(listed))
    return f"{name}"
