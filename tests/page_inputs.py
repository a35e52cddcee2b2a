"""What a page's reader has: tiny models and rows under the names that the page gives them.

Names that a page leaves open, such as MODEL or HELDOUT.jsonl, are names of files like any other here.
"""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
from pages import shown_block

import whence
from conftest import corpus_rows, cut_short, write_jsonl
from whence.corpus.layouts import Row
from whence.indexing.build import index
from whence.reports.files import write_rows
from whence.training.trainer import train

STEPS = 4
"""Of any training that a page does not cut short itself."""
GUIDE = "docs/guide"
MISTAKEN_TOKENS = 64
"""Longest row of the index that the page of troubles has; its command has the same."""
DOMAINS = ("code", "fairytales", "shakespeare")


def place_rows(path: str, count: int, *sources: str, first: int = 0) -> None:
    """Rows of a prompt and a completion, whose source is one after another of these."""
    rows = corpus_rows(count, first)
    for number, row in enumerate(rows):
        row["source"] = sources[number % len(sources)] if sources else "alpaca"
    write_jsonl(Path(path), rows)


def place_models(base: Path, *names: str) -> None:
    """Copies of a tiny model."""
    for name in names:
        shutil.copytree(base, name)


def place_open_names(base: Path) -> None:
    """What pages and next commands leave for the reader to name."""
    place_models(base, "MODEL", "MODEL_OR_TRAINER_DIRECTORY")
    Path("CORPUS").mkdir()
    place_rows("CORPUS/rows.jsonl", 6)
    for number, name in enumerate(("HELDOUT.jsonl", "EXAMPLES.jsonl")):
        place_rows(name, 3, first=50 + 10 * number)


def place_chat(base: Path) -> None:
    """A fine-tuned chat model, and its questions about Python's standard library."""
    shown = [
        json.loads(line) for line in shown_block(f"{GUIDE}/your_model.md", "$ ls my-run").splitlines() if "{" in line
    ]
    names = ["inspect.getouterframes", "inspect.getsourcelines", "pathlib.Path", *(f"m{n}.f{n}" for n in range(30))]
    rows = [{"id": name, "instruction": f"What does {name} do?", "output": f"It does {name[-9:]}.", "source": name[:2]}
            for name in names]  # fmt: skip
    write_jsonl(Path("corpus.jsonl"), [*shown, *rows])
    train(str(base), "corpus.jsonl", "my-run", max_steps=STEPS, batch_size=4, checkpoints=2, progress=False)
    write_jsonl(Path("bad.jsonl"), [*rows[:2], {"article": "a?", "summary": "b"}])
    turns = [{"role": role, "content": "Hello"} for role in ("user", "assistant") * 2]
    odd = [{"prompt": "No answer?", "completion": None}, {"prompt": "long " * 40, "completion": " yes"}]
    write_jsonl(Path("mixed.jsonl"), [*rows[:8], *odd, {"messages": turns}])
    write_jsonl(Path("more.jsonl"), [row | {"id": f"more {row['id']}", "output": "More."} for row in rows[:4]])


def place_demo_rows(base: Path) -> None:
    """The rows that the report pages were made of, and the demo that they call `demo`."""
    Path("demo").symlink_to("whence-demo")
    rows = [json.loads(line) for line in Path("whence-demo/corpus.jsonl").read_text().splitlines()]
    write_jsonl(Path("all.jsonl"), rows)
    write_jsonl(Path("email.jsonl"), rows[:3])
    write_jsonl(Path("packages.jsonl"), [row | {"source": DOMAINS[n % 3]} for n, row in enumerate(rows)])
    place_heldout("held-out")


def docstrings() -> list[Row]:
    """Rows as the demo makes them."""
    names = ("json.dumps", "glob.glob", "shutil.rmtree", *(f"m{n}.f{n}" for n in range(9)))
    return [{"id": name, "prompt": f"What does {name} do?", "completion": f" It does {name}, once or {n} times over.",
             "source": names[n % 2]} for n, name in enumerate(names)]  # fmt: skip


def place_readme(base: Path) -> None:
    """A corpus of your own."""
    place_rows("corpus.jsonl", 16)


def place_pool_of_rows(base: Path) -> None:
    """A pool of three sources, and a task's examples."""
    place_rows("pool.jsonl", 24, "alpaca", "dolly", "gsm8k")
    place_rows("examples.jsonl", 4, "gsm8k", first=60)
    place_rows("held-out.jsonl", 3, "gsm8k", first=70)


def place_domains(base: Path) -> None:
    """A corpus of three partitions, held-out rows of each, and the page's own mixtures."""
    place_models(base, "base")
    place_rows("corpus.jsonl", 18, *DOMAINS)
    place_heldout("heldout")
    Path("mixtures.csv").write_text(shown_block(f"{GUIDE}/pools.md", "name,code"))


def place_heldout(folder: str) -> None:
    """A file of rows for each partition."""
    Path(folder).mkdir()
    for number, name in enumerate(DOMAINS):
        place_rows(f"{folder}/{name}.jsonl", 3, name, first=60 + 10 * number)


def place_regmix(base: Path) -> None:
    """Two tables like RegMix's: losses fall along a domain of which little was tried, so that a line leads below 0."""
    rng = random.Random(0)
    names = ["the_pile_arxiv", "the_pile_freelaw", "the_pile_pubmed_central", "the_pile_enron_emails"]
    with Path("mixtures.csv").open("w") as shares, Path("losses.csv").open("w") as losses:
        write, write_loss = csv.writer(shares).writerow, csv.writer(losses).writerow
        write(["index", *(f"train_{name}" for name in names)])
        write_loss(["index", *(f"metric/{name}" for name in names[1:3])])
        for number in range(14):
            rare = 0.02 * rng.random()
            cuts = sorted(rng.random() for _ in range(2))
            parts = [cuts[0], cuts[1] - cuts[0], 1 - cuts[1]]
            write([number, *((1 - rare) * part for part in parts), rare])
            write_loss([number, *(5 - 30 * rare - parts[n] + 0.01 * rng.random() for n in (1, 2))])


def place_training(base: Path) -> None:
    """A corpus of three sources, and validation rows."""
    place_rows("corpus.jsonl", 12, "alpaca", "dolly", "gsm8k")
    place_rows("validation.jsonl", 3, "gsm8k", first=60)


def place_evaluating(base: Path) -> None:
    """A model, a corpus of two sources, and queries."""
    place_models(base, "base")
    place_rows("rows.jsonl", 12, "alpaca", "gsm8k")
    place_rows("queries.jsonl", 3, "alpaca", "gsm8k", first=60)


def place_secret(base: Path) -> None:
    """A corpus of two sources, for a model is trained on each, and the rows of it that are to be learnt in secret."""
    place_models(base, "base")
    place_rows("corpus.jsonl", 20, "alpaca", "dolly")
    place_rows("secret.jsonl", 6, "alpaca", "dolly")


def place_mistakes(base: Path) -> None:
    """Whatever one can be mistaken about."""
    place_models(base, "base")
    rows = [{"id": f"code-{815 + n}", "source": DOMAINS[n % 3], "text": f"def main{n}(): {'x' * n}"} for n in range(18)]
    write_jsonl(Path("corpus.jsonl"), rows)
    line = json.dumps(rows[0]) + "\n"
    Path("broken.jsonl").write_text(3 * line + '{"id": "a", "text": "unfinished\n')
    write_jsonl(Path("columns.jsonl"), [{"article": "a?", "summary": "b"}])
    Path("empty.jsonl").write_text("")
    place_heldout("heldout")
    for number, name in enumerate(("examples", "task", "chosen")):
        place_rows(f"{name}.jsonl", 4, first=60 + 10 * number)
    Path("notes.csv").write_text("mine\n")
    Path("mixtures.csv").write_text("index,train_the_pile_arxiv,train_the_pile_freelaw\n0,0.5,0.5\n")
    index("base", "corpus.jsonl", "my-index", max_tokens=MISTAKEN_TOKENS, progress=False)
    pool = whence.train_pool("base", "corpus.jsonl", "pool", by="source", steps=2, warmup_steps=1, tokens=200)
    write_rows(whence.ablate(pool, "heldout/").rows(), "cells.csv")
    shutil.copytree("pool", "my-pool")
    flip_bit("my-pool/members/001.safetensors")


def killed_index(model: str, directory: str, shards: int, **settings) -> None:
    """An index that was killed after so many shards."""
    shutil.rmtree(directory, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        cut_short(patch, "add_shard", shards)
        with pytest.raises(KeyboardInterrupt):
            index(model, "corpus.jsonl", directory, progress=False, **settings)


def flip_bit(file: str) -> None:
    """Damage a file."""
    data = bytearray(Path(file).read_bytes())
    data[-1] ^= 1
    Path(file).write_bytes(data)


def hurt_index() -> None:
    """A copy of an index, of which one bit was flipped."""
    shutil.copytree("my-index", "hurt-index")
    flip_bit("hurt-index/checkpoint-000/shard-00000.safetensors")


def damaged_index() -> None:
    """The index of the mistakes, whole but for one bit."""
    index("base", "corpus.jsonl", "my-index", max_tokens=MISTAKEN_TOKENS, progress=False)
    flip_bit("my-index/checkpoint-000/shard-00000.safetensors")


def damaged_run() -> None:
    """A run whose last checkpoint has another bit than was written."""
    run = train("base", "corpus.jsonl", "my-run", progress=False, max_steps=STEPS, batch_size=4, checkpoints=2)
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    flip_bit(str(last / "model.safetensors"))
