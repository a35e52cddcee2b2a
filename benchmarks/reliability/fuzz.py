"""Does every way in give an answer or one line? Mutated files, values of flags and edited JSON, put to the commands.

    python -m benchmarks.reliability.fuzz [--files 5000] [--flags 3000] [--edits 300] [--seed 0] [--dir DIR] [-o FILE]

    files   rows of every layout in every format, with values, types, keys, nesting or bytes changed: read as a corpus,
            as queries, mixtures, tables of losses and tasks, trained on, indexed, and written to every output format
    flags   every option and argument of every command, found in the command line itself, with values it cannot have
    edits   one JSON file of an index, pool, run, Trainer's run, model, or work directory, changed in its structure,
            with the checksums written anew; then the commands that use it

Of each call it counts what must not be: a traceback, a hang, control characters on the terminal, a message of more than
one line (`calls`). Every case is drawn from its own seed; cases that FILE has are not done again, and a case during
which the process ended counts as a hang. The inputs must be as they were at the end.
"""

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.calls import Ending, whence
from benchmarks.reliability.inputs import USES, VERBS, Inputs, edit_json
from benchmarks.reliability.mutations import NUMBERS, SUFFIXES, TEXTS, write_file, write_template

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
SECONDS = 20.0
"""Time of a call; most take milliseconds."""
MEMORY = 12 << 30
"""Bytes of address space, so that what asks for more is refused and not granted."""
WORK = {
    "--steps",
    "--max-steps",
    "--epochs",
    "--tokens",
    "--batches",
    "--rows",
    "--rounds",
    "--seeds",
    "--max-new-tokens",
}
"""Flags that say how much work is asked for: a command that is still busy with it does not hang."""


def files(inputs: Any, scratch: Path, rng: random.Random, only: tuple[str, ...] = ()) -> tuple[str, Ending]:
    """One mutated file through one of its readers, or of those that are named."""
    if not only and rng.random() < 0.01:
        path = write_template(scratch, rng)
        words = ["index", inputs.base, inputs.corpus, "-o", scratch / "ix", "--width", 4, "--chat-template", path]
        return "chat template", whence(*words, seconds=SECONDS)
    path, out, page = write_file(scratch, rng), scratch / f"out{rng.choice(SUFFIXES[:3])}", scratch / "page.html"
    task = ("--method", "bm25", "--tasks", path, "--count", 2, "-o", out)
    step = ("--max-steps", 1, "--batch-size", 2, "--lr", 1e-3, "--json")
    member = ("--max-tokens", 64, "--tokens", 64, "--steps", 1, "--warmup-steps", 0)
    query = ("--top", 2, "--no-null", "-o", rng.choice((out, page)))
    readers: dict[str, tuple[int, tuple[Any, ...]]] = {
        "select": (50, ("select", path, "--method", "random", "--fraction", 0.9, "-o", out)),
        "select by task": (10, ("select", path, *task, "--report", page)),
        "tasks": (4, ("select", inputs.corpus, *task)),
        "queries": (10, ("trace", inputs.index, "--queries", path, *query)),
        "mix law": (10, ("mix", "law", path, "--folds", 2, "-o", out, "--report", page)),
        "mixtures": (4, ("ablate", inputs.pool, "--eval", inputs.held_out, "--mixtures", path, "-o", out)),
        "held-out rows": (2, ("ablate", inputs.pool, "--eval", path, "-o", out)),
        "index": (6, ("index", inputs.base, path, "-o", scratch / "ix", "--width", 4)),
        "train": (2, ("train", inputs.base, path, "-o", scratch / "run", *step)),
        "pool train": (2, ("pool", "train", inputs.base, path, "-o", scratch / "p", *member)),
        "recover": (1, ("recover", inputs.base, inputs.final, path, "--count", 1, "--method", "cosine", "-o", out)),
    }
    readers = {name: reader for name, reader in readers.items() if name in (only or readers)}
    reader = rng.choices([*readers], [weight for weight, _ in readers.values()])[0]
    ending = whence(*readers[reader][1], seconds=SECONDS)
    return f"{reader} of {path.suffix}", ending


def flags(inputs: Inputs, scratch: Path, rng: random.Random, number: int) -> tuple[str, Ending]:
    """One command with one value that is strange; values go round the options."""
    every = [(verb, parameter) for verb, parameters in inputs.parameters.items() for parameter in parameters]
    verb, parameter = every[number % len(every)]
    values = VERBS[verb](inputs, scratch)
    places = [
        scratch,
        inputs.base,
        inputs.corpus,
        inputs.index,
        inputs.pool,
        inputs.base / "config.json",
        scratch / "none",
    ]
    value: Any = rng.choice((rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(TEXTS), rng.choice(places)))
    kind = str(parameter.type_descriptor)
    if "class 'int'" in kind or "class 'float'" in kind:
        value = rng.choice((rng.choice(NUMBERS), rng.choice(NUMBERS), value))
    is_flag = parameter.param_type_name != "argument" and parameter.is_flag
    words = inputs.words(verb, values | {parameter.name: True if is_flag else value})
    name = parameter.opts[0] if parameter.param_type_name == "argument" else max(parameter.opts, key=len)
    ending = whence(*words, seconds=5 if name in WORK else SECONDS)
    if ending.outcome == "hang" and name in WORK:
        ending = Ending("long", ending.text, ending.controls, ending.lines)
    return f"{verb} {name} {str(value)[:40]!r}", ending


def edits(inputs: Inputs, scratch: Path, rng: random.Random, number: int) -> tuple[str, Ending]:
    """One changed JSON file of a directory, and the directory's uses; the first fault, else the last refusal."""
    kind = [*USES][number % len(USES)]
    copy = Path(shutil.copytree(inputs.root / kind, scratch / kind))
    what = edit_json(copy, rng)
    ending = Ending("ok", "")
    for words in USES[kind](inputs, copy, scratch):
        now = whence(*words, seconds=SECONDS)
        if now.is_fault:
            return f"{kind} {what}: {words[0]}", now
        ending = now if now.outcome == "refused" else ending
    return f"{kind} {what}", ending


STREAMS = {"files": files, "flags": flags, "edits": edits}


@contextlib.contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """An empty folder as the working directory."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(path)
    try:
        yield path
    finally:
        os.chdir(before)
        shutil.rmtree(path, ignore_errors=True)


def case(stream: str, number: int, seed: int, inputs: Inputs, scratch: Path) -> dict[str, Any]:
    """One case, drawn from the seed and its number alone."""
    rng = random.Random(f"{seed} {stream} {number}")
    start = time.perf_counter()
    with empty_folder(scratch / "a" / "b" / "c") as folder:
        more = () if stream == "files" else (number,)
        what, ending = STREAMS[stream](inputs, folder, rng, *more)  # type: ignore[operator]
    seconds = round(time.perf_counter() - start, 2)
    return {"case": f"{stream} {number}", "what": what, **vars(ending), "seconds": seconds}


def make_small() -> None:
    """Let the demo learn a few docstrings in a step, and `bench` start no process to measure memory: both take long."""
    from whence.cli import demonstration
    from whence.indexing import speed

    demonstration.ANSWER_TOKENS = 4
    demonstration.ROWS, demonstration.RECIPE = 12, demonstration.RECIPE | {"epochs": 1}
    demonstration.SHAPE |= {"hidden_size": 16, "intermediate_size": 16}
    speed._peak = lambda *arguments: 0  # type: ignore[assignment]


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by stream."""
    table = {}
    for stream in STREAMS:
        of_stream = [item for item in cases if item["case"].startswith(stream)]
        outcomes = Counter(item["outcome"] for item in of_stream)
        faults = {name: outcomes[f"{name[:-1]}"] for name in ("tracebacks", "hangs")}
        more = {"control characters": sum(item["controls"] for item in of_stream),
                "more than one line": sum(item["lines"] > 0 for item in of_stream)}  # fmt: skip
        busy = {name: outcomes[name] for name in ("ok", "refused", "long")}
        table[stream] = {"cases": len(of_stream), **busy, **faults, **more}
    return table


def main(arguments: argparse.Namespace) -> None:
    """Do the cases that FILE does not have yet."""
    out, root = Path(arguments.out or RESULTS), Path(arguments.dir).absolute()
    counts = {"files": arguments.files, "flags": arguments.flags, "edits": arguments.edits}
    document = (
        json.loads(out.read_text()) if out.exists() else {"seed": arguments.seed, "done": {}, "faults": [], "cases": []}
    )
    if document["seed"] != arguments.seed:
        raise SystemExit(f"{out} has another seed")
    log, now = out.with_suffix(".cases"), out.with_suffix(".now")
    cases = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if now.exists():
        cases.append({"case": now.read_text(), "what": "the process ended", **vars(Ending("hang", ""))})
    inputs = Inputs(root)
    make_small()
    before = inputs.digest()
    os.environ["HOME"] = str(root / "home")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    done = {item["case"] for item in cases}
    with log.open("a") as file:
        for stream, count in counts.items():
            for number in range(count):
                if (name := f"{stream} {number}") not in done:
                    now.write_text(name)
                    faulthandler.dump_traceback_later(4 * SECONDS * 5, exit=True)
                    item = case(stream, number, arguments.seed, inputs, root / "scratch" / str(os.getpid()))
                    faulthandler.cancel_dump_traceback_later()
                    cases.append(item)
                    file.write(json.dumps(item) + "\n")
                    file.flush()
            print(stream, summary(cases)[stream], flush=True)
    now.unlink(missing_ok=True)
    faults = [item for item in cases if Ending(**{key: item[key] for key in Ending.__dataclass_fields__}).is_fault]
    result = {"seed": arguments.seed, "summary": summary(cases), "inputs changed": inputs.digest() != before,
              "seconds": round(sum(item.get("seconds", 0) for item in cases)),
              "longest": sorted(cases, key=lambda item: -item.get("seconds", 0))[:5], "faults": faults}  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")
    for item in faults:
        print(item["case"], item["what"], item["outcome"], item["text"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--flags", type=int, default=3000)
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", default="/tmp/whence-fuzz")
    parser.add_argument("-o", "--out")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    main(parser.parse_args())
