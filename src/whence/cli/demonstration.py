"""The embedded example: a language model that learned Python's docstrings, asked where it learned each.

Every machine that runs Whence has a real corpus on its disk: the docstrings of Python's standard library.
Each becomes a question and its answer ("What does shutil.rmtree do?"), and a Llama of a million weights that
saw nothing else learns a thousand of them by heart in about a minute. The right influence is then known
without any judgement: what the model says about `shutil.rmtree` it has from the docstring of `shutil.rmtree`,
which none of the other 999 should outrank.

The library's source files are parsed with `ast`; nothing of them is imported or executed.

What it does not show: answers that many examples taught together. Here each has one source.
"""

import ast
import functools
import json
import logging
import os
import random
import re
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from whence.corpus.layouts import Row
from whence.errors import SettingError, StorageError
from whence.indexing.build import index as build_index
from whence.indexing.opening import Index
from whence.numerics import mixed_seed
from whence.outputs import require_writable
from whence.paths import writing_to
from whence.reports.files import write_page
from whence.reports.trace_page import trace_page
from whence.reports.trace_tables import trace_tables
from whence.storage import Place, reason
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query
from whence.tracing.results import Trace
from whence.training.resuming import is_complete
from whence.training.trainer import train

logger = logging.getLogger(__name__)

FIRST_WORDS = 8
"""So many words, from the first, tell one docstring from another."""
SHORTEST, LONGEST = 3, 25
"""Words of an answer; a shorter one ("Not implemented.") is dropped, a longer one cut."""
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "site-packages",
    "dist-packages",
}
"""Folders under the standard library that are not the library, or not what one would ask about."""

DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

VOCABULARY = 2048
"""Tokens of the byte-level BPE, its 256 bytes and three special tokens included."""
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""Shape of the Llama. More blocks make a pass slower and need more passes."""
POSITIONS = 128
"""Longest sequence in tokens; the longest row has about 90."""
RECIPE: dict[str, Any] = {"epochs": 24, "lr": 2e-3, "batch_size": 32, "schedule": "cosine", "checkpoints": 1}
"""Settings of `train`."""
ANSWER_TOKENS = 80
"""Longest answer generated."""


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %} {{ message.content | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
"""Lays a conversation out as the rows of `docstring_rows` are: the question, a space, the answer."""

ROWS = 1000
"""Docstrings to learn."""
SHOWN = 3
WELL_KNOWN = ("shutil.rmtree", "json.dumps", "random.shuffle", "heapq.merge", "textwrap.dedent", "os.walk", "glob.glob")
"""Questions that are shown, in this order of preference."""


def docstring_rows(count: int | None = 1000, seed: int = 0) -> list[Row]:
    """Questions about public functions and classes of Python's standard library, with docstrings as answers.

    The answer is the docstring's first sentence, in one line, cut to `LONGEST` words. Answers that share
    their first `FIRST_WORDS` words are dropped: which of two equal docstrings taught the model has no answer.
    Python 3.11 has 2,041 such docstrings, of which 1,840 are left: 78 are too short or begin with an example,
    and 123 share their first words.

    Args:
        count: Rows to choose at random; None takes all.
        seed: Chooses the rows: the same ones on any machine with the same Python release.

    Returns:
        Corpus rows in the order of their ids, such as `{"id": "shutil.rmtree", "source": "shutil",
        "prompt": "What does shutil.rmtree do?", "completion": " Recursively delete a directory tree."}`.

    Raises:
        SettingError: The standard library here has fewer than `count` such docstrings, or no source files.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = _documented(stdlib)
    heads = Counter(_first_words(row["completion"]) for row in found.values())
    rows = [found[name] for name in sorted(found) if heads[_first_words(found[name]["completion"])] == 1]
    logger.info("%d of %d docstrings begin with words of their own", len(rows), len(found))
    if count is None:
        return rows
    if len(rows) < count:
        raise SettingError(
            f"found {len(rows)} docstrings in {stdlib}, expected {count} or more: the library's source files "
            "are not all installed. Use a Python that has them, or ask for fewer."
        )
    chosen = random.Random(mixed_seed(seed, "demo", "rows")).sample(range(len(rows)), count)
    return [rows[number] for number in sorted(chosen)]


def as_conversation(row: Row) -> Row:
    """A row of `docstring_rows` as the corpus has it: `messages`, of which `CHAT_TEMPLATE` makes the same tokens."""
    turns = {"user": row["prompt"], "assistant": row["completion"].strip()}
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    return {"id": row["id"], "messages": messages, "source": row["source"]}


@functools.cache
def _documented(stdlib: Path) -> dict[str, Row]:
    """Rows of all documented functions and classes by name. Parsing the library takes seconds."""
    return {row["id"]: row for file in _source_files(stdlib) for row in _file_rows(file, stdlib)}


def answered(generated: str, docstring: str) -> bool:
    """Whether a generated answer is this docstring: its first `FIRST_WORDS` words, or all if it has fewer.

    Words are what whitespace separates, and must agree to the letter. Docstrings that share these words were
    dropped, so an answer counts for one docstring alone.

    >>> answered("Recursively delete a tree.", " Recursively delete a directory tree.")
    False
    >>> answered("Return a list of all the names in it.", " Return a list of all the names in this module.")
    True
    """
    return _first_words(generated) == _first_words(docstring)


def _first_words(text: str) -> tuple[str, ...]:
    return tuple(text.split()[:FIRST_WORDS])


def _source_files(stdlib: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(stdlib):
        # Pruned in place, so that a site-packages of many thousand files is not even listed.
        folders[:] = sorted(name for name in folders if _is_public(name) and name not in SKIPPED)
        for name in sorted(files):
            file = Path(folder, name)
            is_package = name == "__init__.py" and file.parent != stdlib
            if file.suffix == ".py" and (is_package or _is_public(file.stem)):
                yield file


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def _file_rows(file: Path, stdlib: Path) -> Iterator[dict[str, str]]:
    names = [name for name in file.relative_to(stdlib).with_suffix("").parts if name != "__init__"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old files are warned of while parsing
        tree = ast.parse(file.read_bytes())
    for node in tree.body:
        if not isinstance(node, DOCUMENTED) or node.name.startswith("_"):
            continue
        name = ".".join((*names, node.name))
        answer = _first_sentence(ast.get_docstring(node) or "", node.name)
        if len(answer.split()) >= SHORTEST:
            question = f"What is {name}?" if isinstance(node, ast.ClassDef) else f"What does {name} do?"
            # The space is the answer's: a prompt typed without it is then tokenised as it was in training.
            yield {"id": name, "prompt": question, "completion": f" {answer}", "source": names[0]}


def _first_sentence(docstring: str, name: str) -> str:
    paragraphs = docstring.strip().split("\n\n")
    if re.match(rf"(\w+\.)*{name}\s*\(", paragraphs[0]):
        paragraphs = paragraphs[1:] or [""]  # `getopt(args, options) -> opts, args` is a signature, not words
    if paragraphs[0].startswith(">>>"):
        return ""
    line = " ".join(paragraphs[0].split())
    return " ".join(re.split(r"(?<=[.!?]) (?=[A-Z])", line)[0].split()[:LONGEST])


def make_parent(directory: str | Path, rows: list[Row], seed: int = 0) -> Path:
    """Write a small Llama with random weights, and a byte-level BPE trained on `rows`, as a model directory.

    Args:
        directory: Made where missing.
        rows: With `prompt` and `completion`, all of whose text the tokenizer sees.
        seed: Seed of the weights.

    Returns:
        The directory, which `AutoModelForCausalLM` and `AutoTokenizer` load.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from whence.training.trainer import quiet_saving

    tokenizer = _tokenizer([row["prompt"] + row["completion"] for row in rows])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    with torch.random.fork_rng(devices=[]):  # weights are drawn from the global generator: leave it as it was
        torch.manual_seed(mixed_seed(seed, "demo", "parent"))
        model = LlamaForCausalLM(config)
    with quiet_saving():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **special)


Say = Callable[[RenderableType], None]
"""Shows a text or a table of rich's."""


def demo(out: str | Path = "whence-demo", *, seed: int = 0, say: Say | None = None) -> dict[str, Any]:
    """Train a model on docstrings, index them, and ask it questions whose right source is known.

    Every step is the library's public API, and prints the command that does the same. Run again, it keeps what is
    finished.

    Args:
        out: Directory of all that is made.
        seed: Seed of the rows, the weights and the order of training.
        say: Shows what is going on, a text or a table of rich's at a time; None prints to stdout.

    Returns:
        The measured fractions with their 95% intervals, and the seconds of every step.

    Raises:
        SettingError: `out` is a file, or holds a demo of another seed or Python.
        StorageError: `out` cannot be written.
    """
    say = say or Console().print
    Place.at(out)  # refuses what no directory can be called
    place, seconds = Path(out), {}
    rows = docstring_rows(ROWS, seed)
    corpus, parent, run, index = (place / name for name in ("corpus.jsonl", "parent", "run", "index"))
    with _step("1. A corpus: docstrings of Python's standard library", seconds, "corpus", say):
        conversations = [as_conversation(row) for row in rows]
        _write_corpus(corpus, conversations)
        say(Text(f"   {len(rows):,} questions and answers in {corpus}, such as\n   {json.dumps(conversations[0])}"))
    with _step("2. A model that learns them from scratch", seconds, "train", say):
        _train_once(parent, run, corpus, rows, seed, say)
    with _step("3. An index of their gradients", seconds, "index", say):
        say(Text(f"   $ whence index {run} {corpus} -o {index}"))
        built = build_index(run, corpus, index)
    with _step("4. Questions", seconds, "ask", say):
        for prompt in _shown(rows):
            say(Text(f'   $ whence trace {index} --prompt "{prompt}" --top 3 --tokens'))
            say(trace_tables(trace(built, prompt, top=3, tokens=True)))
        prompt, report = _shown(rows)[0], place / "report.html"
        say(Text(f'   $ whence trace {index} --prompt "{prompt}" -o {report}'))
        write_page(trace_page(trace(built, prompt, tokens=True)), report)
        say(Text(f"   Open {report}: choose a token of the answer to see which training tokens taught it.\n"))
    with _step("5. How often is it right?", seconds, "grade", say):
        result = grade(built, rows)
        say(grade_table(result))
    result["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    say(Text(f"{sum(seconds.values()):.0f} s in all. Everything is in {place}."))
    return result


run_demo = demo
"""The earlier name of `demo`."""


def grade(index: Index, rows: list[Row]) -> dict[str, Any]:
    """Ask every question; of those answered, count how often the docstring itself ranks first, and in the first ten.

    Args:
        index: An index of exactly these rows.
        rows: What `docstring_rows` returned.

    Returns:
        `answered`, and of the answered: `own_first` and `own_top10` for the model's own answer, `true_first` and
        `true_top10` for the true docstring as completion; each `{count, of, fraction, low, high}` (Wilson, 95%).
        `chance` is that of being first.
    """
    how = {"top": 10, "null": False, "exact": False}  # what the index alone finds
    traced_answers = trace(index, queries=[Query(row["prompt"]) for row in rows], **how)
    answered_rows = [
        number
        for number, row in enumerate(rows)
        if answered(traced_answers.answers[number].completion, row["completion"])
    ]
    own_ranks = [docstring_rank(traced_answers, number, rows[number]["id"]) for number in answered_rows]
    true_ranks = []
    if true_queries := [Query(rows[number]["prompt"], rows[number]["completion"]) for number in answered_rows]:
        true = trace(index, queries=true_queries, **how)
        true_ranks = [docstring_rank(true, query, rows[number]["id"]) for query, number in enumerate(answered_rows)]
    return {
        "answered": _fraction(len(answered_rows), len(rows)),
        "own_first": _fraction(own_ranks.count(1), len(answered_rows)),
        "own_top10": _fraction(sum(rank is not None for rank in own_ranks), len(answered_rows)),
        "true_first": _fraction(true_ranks.count(1), len(answered_rows)),
        "true_top10": _fraction(sum(rank is not None for rank in true_ranks), len(answered_rows)),
        "chance": 1 / len(rows),
    }


def grade_answer(result: dict[str, Any]) -> str:
    """How often the docstring behind an answer is found, in a sentence."""
    first, asked = result["own_first"], result["answered"]
    return (
        f"For {first['count']:,} of the {first['of']:,} answers that it had learned (of {asked['of']:,} asked), the "
        f"docstring behind the answer ranks first, against {result['chance']:.1%} by chance."
    )


def grade_table(result: dict[str, Any]) -> Table:
    """The fractions in words."""
    lines = {
        "answered": "answered with the docstring's first words",
        "own_first": "  own docstring first, model's answer",
        "own_top10": "  own docstring in the first ten",
        "true_first": "  own docstring first, true docstring",
        "true_top10": "  own docstring in the first ten",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, words in lines.items():
        fraction = result[name]
        interval = f"{fraction['low']:.1%} to {fraction['high']:.1%}"
        table.add_row(
            f"   {words}", f"[bold]{fraction['fraction']:.1%}[/]", f"{fraction['count']}/{fraction['of']}", interval
        )
    table.add_row("   chance of being first", f"{result['chance']:.1%}")
    return table


def docstring_rank(traced: Trace, query: int, name: str) -> int | None:
    """Rank of the docstring called `name` among the examples found for a query; None if it is not among them."""
    return next((hit.rank for hit in traced.of(query) if hit.id == name), None)


def _fraction(count: int, of: int) -> dict[str, int | float]:
    from scipy.stats import binomtest

    if not of:
        return {"count": 0, "of": 0, "fraction": 0.0, "low": 0.0, "high": 1.0}
    interval = binomtest(count, of).proportion_ci(method="wilson")
    return {"count": count, "of": of, "fraction": count / of, "low": interval.low, "high": interval.high}


def _train_once(parent: Path, run: Path, corpus: Path, rows: list[Row], seed: int, say: Say) -> None:
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in (RECIPE | {"seed": seed}).items())
    say(Text(f"   $ whence train {parent} {corpus} -o {run} {flags}"))
    if is_complete(run):
        say(Text("   done before; kept"))
        return
    with writing_to(parent.parent):
        train(make_parent(parent, rows, seed), corpus, run, seed=seed, **RECIPE)


def _write_corpus(path: Path, rows: list[Row]) -> None:
    place, data = path.parent, "".join(json.dumps(row) + "\n" for row in rows)
    if place.exists() and not place.is_dir():
        raise SettingError(f"--out {place}: a file, where a directory for all that the demo makes is expected")
    try:
        names = ("parent", "run", "index", "report.html")
        if not path.exists() and (others := [name for name in names if (place / name).exists()]):
            raise SettingError(f"{place} holds {others[0]}, and no demo made it; name another directory with --out")
        if path.exists() and path.read_text() != data:
            raise SettingError(f"{path} is of another demo (another --seed or Python); remove {place}, or use --out")
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({reason(error)}). Name a directory that can, with --out"
        ) from None
    require_writable(place, f"--out {place}")
    Place.at(place).write(path.name, [data.encode()], total=len(data.encode()))


def _shown(rows: list[Row]) -> list[str]:
    """Questions to show: about well-known names where the rows have them."""
    prompts = {row["id"]: row["prompt"] for row in rows}
    known = [name for name in WELL_KNOWN if name in prompts]
    return [prompts[name] for name in (known + list(prompts)[:: max(1, len(prompts) // SHOWN)])[:SHOWN]]


@contextmanager
def _step(title: str, seconds: dict[str, float], name: str, say: Say) -> Iterator[None]:
    say(Text(f"\n{title}", "bold"))
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    say(Text(f"   {seconds[name]:.1f} s", "dim"))
