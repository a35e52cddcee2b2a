"""Tiny random models of each architecture, made from configurations; nothing is downloaded."""

import functools
import gc
import importlib
import json
import os
import re
import signal
import sys

import beartype.door
import bm25s
import datasets
import peft
import pytest
import scipy.optimize
import scipy.stats
import torch
import typer.rich_utils

from chromium import CHROMIUM, Browser
from whence.corpus.tokens import Encoded
from whence.models.loading import LoadedModel

FIRST = (beartype.door, bm25s, datasets, peft, scipy.optimize, scipy.stats, typer.rich_utils)
"""Imported before Whence: what an instrumented module is the first to import is compiled from its source each time
(jaxtyping gives compiled files another name meanwhile), a third of the time that collecting the tests takes."""
ENDING = re.compile(r"\S.*[.;:)] Next: whence [a-z].*")
"""The last line of a verb's stdout; it ends with a command, which no width breaks."""
VOCABULARY = 61
ARCHITECTURES = ["llama", "gpt2", "neox", "qwen2", "gemma", "lora"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}


def _config(architecture):
    import transformers as t

    configs = {
        "llama": lambda: t.LlamaConfig(**COMMON, num_key_value_heads=1),
        "lora": lambda: t.LlamaConfig(**COMMON, num_key_value_heads=1),
        "gpt2": lambda: t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, n_positions=64, vocab_size=VOCABULARY),
        "neox": lambda: t.GPTNeoXConfig(**COMMON),
        "qwen2": lambda: t.Qwen2Config(**COMMON, num_key_value_heads=1),
        "falcon": lambda: t.FalconConfig(  # writes into the outputs of its linear layers
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_hidden_size=24, vocab_size=VOCABULARY
        ),
        "mamba": lambda: t.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=VOCABULARY),
        "gemma": lambda: t.Gemma2Config(**COMMON, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0),
    }
    return configs[architecture]()


def tiny_model(architecture, seed=0):
    """A fresh two-layer model with weights large enough that attention and soft caps matter."""
    import transformers as t

    torch.manual_seed(seed)
    config = _config(architecture)
    config._attn_implementation = "eager" if architecture in ("gemma", "mamba") else "sdpa"
    model = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if architecture == "lora":
        model = _with_adapter(model)
    model.requires_grad_(False).eval()
    return LoadedModel(model=model, tokenizer=None, path=architecture, has_adapter=architecture == "lora")


def _with_adapter(model):
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_dropout=0.5, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # peft begins with B = 0, where A has no gradient
                parameter.normal_()
    return model


def random_examples(count, seed, longest=14):
    """Examples of different lengths with random targets, at least one each."""
    rng = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randint, generator=rng)
    examples = []
    for _ in range(count):
        length = int(draw(2, longest, ()))
        supervised = [False, *(bool(x) for x in draw(0, 2, (length - 1,)))]
        supervised[int(draw(1, length, ()))] = True
        examples.append(Encoded(draw(0, VOCABULARY, (length,)).tolist(), supervised))
    return examples


def byte_tokenizer(chat=False):
    """One token a byte, after `<s>`; ended by `</s>`. 259 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, []))
    words.add_special_tokens(["<pad>", "<s>", "</s>"])
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}[a]{% endif %}"
        )
    return tokenizer


def save_tiny_llama(directory, seed=0, *, chat=False, context=96, scale=0.15):
    """A random two-layer Llama of 259 byte tokens with its tokenizer, in a directory."""
    import transformers as t

    torch.manual_seed(seed)
    config = t.LlamaConfig(
        **SIZES | {"num_key_value_heads": 1, "vocab_size": 259, "max_position_embeddings": context},
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = t.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * scale)
    model.save_pretrained(directory)
    byte_tokenizer(chat).save_pretrained(directory)
    return directory


def save_tiny_run(directory, rates=(3e-4, 1e-4)):
    """A Trainer's output directory: a checkpoint every two steps, at these learning rates."""
    history = []
    for number, rate in enumerate(rates, start=1):
        checkpoint = save_tiny_llama(directory / f"checkpoint-{2 * number}", seed=number)
        history += [{"step": 2 * number - 1, "learning_rate": rate}, {"step": 2 * number, "learning_rate": rate}]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return directory


def plain_trainer_run(directory, architecture="llama", steps=4, *, named=False, **options):
    """A Trainer's output directory as a script makes it that knows nothing of Whence; a checkpoint every two steps.

    Args:
        directory: To make.
        architecture: llama, gpt2, or lora (on a Llama that is saved beside the run).
        steps: Of AdamW, with weight decay, so in two groups.
        named: Make the optimizer from named parameters, in one group.
        options: Of `TrainingArguments`.

    Returns:
        The Trainer, when done.
    """
    import peft
    import transformers as t

    torch.manual_seed(3)
    if architecture == "gpt2":
        small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 16, "n_positions": 64}  # c_proj is square
        model = t.GPT2LMHeadModel(t.GPT2Config(**small, vocab_size=259, bos_token_id=1, eos_token_id=2))
    else:
        base = save_tiny_llama(directory.parent / f"{directory.name}-base")
        model = t.AutoModelForCausalLM.from_pretrained(base)
        if architecture == "lora":
            config = peft.LoraConfig(r=3, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
            model = peft.get_peft_model(model, config)
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 259, (12,), generator=rng) for _ in range(32)]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    arguments = t.TrainingArguments(
        output_dir=str(directory), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
        **{"weight_decay": 0.1, "save_steps": 2, "logging_steps": 1, "report_to": "none"} | options,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2) if named else None
    trainer = t.Trainer(
        model, arguments, train_dataset=rows, processing_class=byte_tokenizer(), optimizers=(optimizer, None)
    )
    trainer.train()
    return trainer


def corpus_rows(count, first=0):
    """Rows of a prompt and a completion, all different, with ids."""
    return [
        {
            "id": f"row-{number}",
            "prompt": f"{number * 37 % 101} and {number % 7}?",
            "completion": f" {'yes' if number % 3 else 'no'}, {number}" + "!" * (number % 9),
            "source": f"s{number % 2}",
        }
        for number in range(first, first + count)
    ]


def write_jsonl(path, rows):
    """Rows as a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(path):
    """Bytes of every file below a directory, by relative name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def answered_signals():
    """Signals that stop a command do so, also where the tests run in the background, which ignores them."""
    answers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, answer) for number, answer in answers.items()}
    yield
    for number, answer in before.items():
        signal.signal(number, answer)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Directory of a tiny model."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Directory of a run of two checkpoints."""
    return save_tiny_run(tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A jsonl file of 20 rows."""
    return write_jsonl(tmp_path_factory.mktemp("tiny") / "corpus.jsonl", corpus_rows(20))


@pytest.fixture(scope="session")
def tiny_index(tiny_llama, tiny_corpus, tmp_path_factory):
    """Directory of a complete index of that file. Copy it before changing it."""
    from whence.indexing.build import index

    out = tmp_path_factory.mktemp("tiny") / "index"
    index(tiny_llama, tiny_corpus, out, projection="two_sided", width=8, progress=False)
    return out


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 16 rows, the fewest there can be."""
    monkeypatch.setattr(importlib.import_module("whence.indexing.ingest"), "ROWS_PER_SHARD", 16)


def cut_short(monkeypatch, name, calls):
    """Let a method of the store raise KeyboardInterrupt after so many calls."""
    from whence.indexing.store import Store

    real, left = getattr(Store, name), [calls]

    def stop(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(Store, name, stop)


def pytest_collection_finish(session):
    """What is imported stays to the end: no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def few_meaningless_completions(monkeypatch, request):
    """A level is of seven of each kind; test_levels.py measures those of thirty-three."""
    if request.path.name != "test_levels.py":
        for module in ("levels", "pipeline"):
            monkeypatch.setattr(f"whence.tracing.{module}.MEANINGLESS", 21)


@pytest.fixture
def printed(monkeypatch, capsys):
    """Run a command: its exit code, stdout and stderr."""

    def call(*words):
        from whence.cli.app import main

        monkeypatch.setattr(sys, "argv", ["whence", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        if not left.value.code and not {"--json", "--help", "--version"} & {*words}:
            assert ENDING.fullmatch(said.out.splitlines()[-1]), "a verb's last line is its answer and the next command"
        return left.value.code, said.out, said.err

    return call


@pytest.fixture
def command(printed):
    """Run a command: its exit code, stdout, and stderr without line breaks."""

    def call(*words):
        code, out, err = printed(*words)
        return code, out, " ".join(err.split())

    return call


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, where there is one; where `WHENCE_NEEDS_BROWSER` is set, as in CI, there must be."""
    if CHROMIUM is None:
        missing = "there is no chromium, chromium-browser or google-chrome to look at a report with"
        pytest.fail(missing) if os.environ.get("WHENCE_NEEDS_BROWSER") else pytest.skip(missing)
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()
