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
import logging
import os
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from whence.corpus import Row
from whence.errors import SettingError
from whence.model import LoadedModel
from whence.numerics import mixed_seed

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
"""Of the Llama. More blocks make a pass slower and need more passes."""
POSITIONS = 128
"""Longest sequence in tokens; the longest row has about 90."""
RECIPE: dict[str, Any] = {"epochs": 24, "lr": 2e-3, "batch_size": 32, "schedule": "cosine", "checkpoints": 1}
"""Settings of `train`."""
ANSWER_TOKENS = 80
"""Longest answer generated."""
PROMPTS_PER_BATCH = 64


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
    found = {row["id"]: row for file in _source_files(stdlib) for row in _file_rows(file, stdlib)}
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
        seed: Of the weights.

    Returns:
        The directory, which `AutoModelForCausalLM` and `AutoTokenizer` load.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from whence.train import quiet_saving

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
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def generate(loaded: LoadedModel, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations of many prompts.

    Only prompts of equal length share a batch, so none is padded: no answer depends on its neighbours.

    Args:
        loaded: The model; its tokenizer says which token ends an answer.
        prompts: Token ids, as `tokens.encode_prompt` gives them.
        max_new_tokens: Longest answer.

    Returns:
        The new tokens of each prompt, without the end-of-sequence token.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for numbers in _equal_lengths(prompts):
        ids = torch.tensor([prompts[number] for number in numbers], device=loaded.device)
        for number, answer in zip(numbers, _continued(loaded, ids, max_new_tokens), strict=True):
            answers[number] = answer
    return answers


def _equal_lengths(prompts: list[list[int]]) -> Iterator[list[int]]:
    """Positions of prompts, in batches of one length."""
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), PROMPTS_PER_BATCH):
            yield numbers[start : start + PROMPTS_PER_BATCH]


def _continued(loaded: LoadedModel, ids: Int64[Tensor, "b t"], max_new_tokens: int) -> list[list[int]]:
    end = loaded.tokenizer.eos_token_id
    with torch.inference_mode():
        out = loaded.base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,  # a row that ended early is filled with ends, and cut at the first
        )
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
