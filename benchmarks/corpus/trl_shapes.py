"""What TRL trains on, row by row: the ids and labels of its own trainers, and its loss, to hold Whence against.

OMP_NUM_THREADS=1 PYTHONPATH=tests TRL_ENVIRONMENT/bin/python benchmarks/corpus/trl_shapes.py ../shared/models/base-6m

TRL is no dependency of Whence, so this runs in an environment of TRL's own (torch 2.13, transformers 5.23, trl 1.16
and what it needs) and imports nothing of Whence. Each row goes through `SFTTrainer`'s preparation and collator (a
preference row through `DPOTrainer`'s, of which the chosen side is taken), with the tests' byte-level tokenizer under
two chat templates. The losses are those of `SFTTrainer.compute_loss` for base-6m and for a tiny model whose weights are
a rule, and once more for base-6m in float64. trl_losses.py holds Whence's losses against them. Numbers go to
benchmarks/corpus/results/trl_shapes.json, which tests/corpus/test_trl.py reads; 15 seconds on one core.
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tiny_tokenizers import byte_level

RESULTS = Path(__file__).with_name("results") / "trl_shapes.json"
MERGES = [("x", "y")]
"""So that a token may straddle the boundary of a prompt and its completion."""
TEMPLATES = {
    "tight": "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<a>{% generation %}{{ m['content'] }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{% endfor %}</s>{% endgeneration %}{% elif m['role'] == 'user' %}<u>{{ m['content'] }}"
    "{% else %}({{ m['role'] }}){{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
    "lines": "{% for m in messages %}<u>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}</s>{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<u>assistant\n{% endif %}",
}


def user(content: str) -> dict:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str, **more: object) -> dict:
    """A message of the assistant."""
    return {"role": "assistant", "content": content, **more}


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"n": "1"}}}
TURNS = [user("x"), assistant("y"), user("z"), assistant("w")]
SYSTEM = {"role": "system", "content": "s"}
SHAREGPT = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
X, Y = byte_level()("xy")["input_ids"]
IDS = {"input_ids": [X, Y, X, 1]}
DEFAULT: dict = {}
ASSISTANT = {"assistant_only_loss": True}
WHOLE = {"completion_only_loss": False}
CASES: dict[str, tuple[dict, dict, str]] = {
    "text": ({"text": "x z"}, DEFAULT, "assistant"),
    "text that ends with the end": ({"text": "x z</s>"}, DEFAULT, "assistant"),
    "prompt and completion": ({"prompt": "x ", "completion": "z"}, DEFAULT, "assistant"),
    "prompt and completion, a token straddles": ({"prompt": "zx", "completion": "yz"}, DEFAULT, "assistant"),
    "prompt and completion that ends with the end": ({"prompt": "x", "completion": "z</s>"}, DEFAULT, "assistant"),
    "prompt and completion, whole": ({"prompt": "x ", "completion": "z"}, WHOLE, "all"),
    "messages": ({"messages": TURNS}, DEFAULT, "all"),
    "messages, assistant only": ({"messages": TURNS}, ASSISTANT, "assistant"),
    "messages with system": ({"messages": [SYSTEM, *TURNS]}, ASSISTANT, "assistant"),
    "messages with tools": ({"messages": TURNS, "tools": [TOOL]}, ASSISTANT, "assistant"),
    "messages with tools as JSON text": ({"messages": TURNS, "tools": json.dumps([TOOL])}, ASSISTANT, "assistant"),
    "messages with a call of a tool": (
        {"messages": [user("x"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "o"}, assistant("y")]},
        ASSISTANT,
        "assistant",
    ),
    "messages that end with the user": ({"messages": TURNS[:3]}, ASSISTANT, "assistant"),
    "conversational prompt and completion": ({"prompt": TURNS[:3], "completion": TURNS[3:]}, DEFAULT, "assistant"),
    "conversational prompt and completion, whole": ({"prompt": TURNS[:3], "completion": TURNS[3:]}, WHOLE, "all"),
    "conversational completion of three turns": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, DEFAULT, "assistant"),
    "conversational completion of three turns, assistant only": (
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        ASSISTANT,
        "assistant",
    ),
    "ShareGPT": ({"conversations": SHAREGPT}, DEFAULT, "all"),
    "ShareGPT, assistant only": ({"conversations": SHAREGPT}, ASSISTANT, "assistant"),
    "conversations of roles": ({"conversations": TURNS}, ASSISTANT, "assistant"),
    "token ids": ({"input_ids": [X, Y, 1]}, DEFAULT, "assistant"),
    "token ids and labels": ({"input_ids": [X, Y, 1], "labels": [-100, Y, 1]}, DEFAULT, "assistant"),
    "token ids and assistant masks": (IDS | {"assistant_masks": [0, 0, 1, 1]}, DEFAULT, "assistant"),
    "token ids and completion mask": (IDS | {"completion_mask": [0, 0, 1, 1]}, DEFAULT, "all"),
    "token ids and completion mask, completion only": (
        IDS | {"completion_mask": [0, 0, 1, 1]},
        {"completion_only_loss": True},
        "assistant",
    ),
    "preference": ({"prompt": "x ", "chosen": "y", "rejected": "n"}, DEFAULT, "assistant"),
    "preference, prompt in both": ({"chosen": "x y", "rejected": "x n"}, DEFAULT, "assistant"),
    "preference, prompt in both, no space": ({"chosen": "xz", "rejected": "xn"}, DEFAULT, "assistant"),
    "conversational preference": (
        {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [assistant("n")]},
        DEFAULT,
        "assistant",
    ),
    "conversational preference, prompt in both": (
        {"chosen": TURNS, "rejected": [*TURNS[:3], assistant("n")]},
        DEFAULT,
        "assistant",
    ),
    "conversational preference with tools": (
        {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [assistant("n")], "tools": [TOOL]},
        DEFAULT,
        "assistant",
    ),
}
"""Rows, the trainer's settings, and Whence's `--supervise` for the same."""
TINY = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
TALKS = [
    [user("What is the capital of France?"), assistant("Paris.")],
    [
        SYSTEM,
        user("Name two primes."),
        assistant("Two and three."),
        user("And a third?"),
        assistant("Five, of course."),
    ],
]


def main() -> None:
    """Prepare every row by its trainer, compute the losses, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"name": name, "template": template, "row": row, "settings": settings, "supervise": supervise}
            | prepared(row, settings, text, folder)
            for template, text in TEMPLATES.items()
            for name, (row, settings, supervise) in CASES.items()
            if template == "tight" or "messages" in row or isinstance(row.get("prompt"), list)
        ]
        name, tokenizer = Path(arguments.model).name, AutoTokenizer.from_pretrained(arguments.model)
        losses = {"tiny": losses_of(_tiny(), byte_level(MERGES, chat=TEMPLATES["lines"]), folder)}
        for dtype in (torch.float32, torch.float64):
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
            losses[f"{name}, {str(dtype).removeprefix('torch.')}"] = losses_of(model, tokenizer, folder)
    packages = {name: version(name) for name in ("trl", "transformers", "torch")}
    answer = {
        "packages": packages,
        "merges": MERGES,
        "tiny": TINY,
        "templates": TEMPLATES,
        "talks": TALKS,
        "losses": losses,
    }
    parts = [f'"{name}": {json.dumps(part)}' for name, part in answer.items()]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    RESULTS.write_text("{\n " + ",\n ".join([*parts, f'"rows": [\n  {lines}\n ]']) + "\n}\n")


def prepared(row: dict, settings: dict, template: str, folder: str) -> dict:
    """Ids and labels of a row as its trainer's collator gives them, or the error by which the trainer refuses it."""
    tokenizer = byte_level(MERGES, chat=template)
    try:
        return _preference(row, tokenizer, folder) if "chosen" in row else _supervised(row, settings, tokenizer, folder)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}


def _supervised(row: dict, settings: dict, tokenizer: object, folder: str) -> dict:
    config = SFTConfig(folder, max_length=None, report_to=[], use_cpu=True, **settings)
    trainer = SFTTrainer(_tiny(), config, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    return {"ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}


def _preference(row: dict, tokenizer: object, folder: str) -> dict:
    config = DPOConfig(folder, max_length=None, report_to=[], use_cpu=True)
    data = Dataset.from_list([row])
    trainer = DPOTrainer(_tiny(), _tiny(), args=config, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    length = int(batch["attention_mask"][0].sum())
    ids, mask = batch["input_ids"][0, :length].tolist(), batch["completion_mask"][0, :length].tolist()
    return {"ids": ids, "labels": [token if on else -100 for token, on in zip(ids, mask, strict=True)]}


def _tiny() -> LlamaForCausalLM:
    """A model whose weights are a rule, so that a test can make it too."""
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.arange(1, weight.numel() + 1, dtype=torch.float64).sin().reshape(weight.shape))
    return model


def _wide_loss(outputs: object, labels: torch.Tensor, num_items_in_batch: int | None = None) -> torch.Tensor:
    """The mean that TRL takes, in float64: its own code takes logarithms in float32 whatever the model is."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def losses_of(model: torch.nn.Module, tokenizer: object, folder: str) -> dict:
    """TRL's default loss of conversations under a model, by themselves and as one batch, with their token counts."""
    config = SFTConfig(folder, max_length=None, report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=2)
    data = Dataset.from_list([{"messages": talk} for talk in TALKS])
    wide = _wide_loss if model.dtype == torch.float64 else None
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, compute_loss_func=wide)
    trainer.model.eval()
    examples = [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]

    def loss(batch: list[dict]) -> float:
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.model, trainer.data_collator(batch)))

    return {
        "each": [loss([example]) for example in examples],
        "batch": loss(examples),
        "tokens": [sum(label != -100 for label in example["labels"][1:]) for example in examples],
    }


if __name__ == "__main__":
    sys.exit(main())
