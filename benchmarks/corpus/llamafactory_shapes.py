r"""What LLaMA-Factory trains on, row by row, with and without `mask_history`: its own ids and labels.

DISABLE_VERSION_CHECK=1 OMP_NUM_THREADS=1 PYTHONPATH=tests TRL_ENVIRONMENT/bin/python \
  benchmarks/corpus/llamafactory_shapes.py LLAMA_FACTORY

LLAMA_FACTORY is its source (ff6d4d1). It runs in the environment of trl_shapes.py, whose transformers is newer than it
asks for, with peft beside it, and imports nothing of Whence. Each row goes through LLaMA-Factory's converter and its
`SupervisedDatasetProcessor`, under a template of its own kind that writes what the Jinja template beside it writes.
Numbers go to benchmarks/corpus/results/llamafactory_shapes.json, which tests/corpus/test_trl.py reads; ten seconds.
"""

import argparse
import importlib.machinery
import json
import sys
import types
from pathlib import Path

RESULTS = Path(__file__).with_name("results") / "llamafactory_shapes.json"
JINJA = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}</s>{% elif m['role'] == 'user' %}"
    "<u>{{ m['content'] }}<a>{% else %}({{ m['content'] }}){% endif %}{% endfor %}"
)
"""The prompt of the assistant's turn ends the user's, as in LLaMA-Factory."""
ALPACA = {"formatting": "alpaca", "columns": {"prompt": "instruction", "query": "input", "response": "output"}}
FULL = {
    "formatting": "alpaca",
    "columns": ALPACA["columns"] | {"system": "system", "history": "history"},
}
SHAREGPT = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
OPENAI = {"human": "user", "gpt": "assistant"}
MESSAGES = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": ROLES}


def said(speaker: str, value: str) -> dict:
    """A turn of ShareGPT's."""
    return {"from": speaker, "value": value}


TURNS = [said("human", "x"), said("gpt", "y"), said("human", "z"), said("gpt", "w")]
CASES: dict[str, tuple[dict, dict]] = {
    "Alpaca": ({"instruction": "x", "input": "", "output": "y"}, ALPACA),
    "Alpaca with input": ({"instruction": "x", "input": "z", "output": "y"}, ALPACA),
    "Alpaca with system and history": (
        {"instruction": "z", "input": "", "output": "w", "system": "s", "history": [["x", "y"]]},
        FULL,
    ),
    "ShareGPT": ({"conversations": TURNS[:2]}, SHAREGPT),
    "ShareGPT of two turns": ({"conversations": TURNS}, SHAREGPT),
    "ShareGPT with system": (
        {"conversations": TURNS, "system": "s"},
        SHAREGPT | {"columns": {"messages": "conversations", "system": "system"}},
    ),
    "ShareGPT with a turn of the system": ({"conversations": [said("system", "s"), *TURNS]}, SHAREGPT),
    "messages": (
        {
            "messages": [
                {"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]} for t in TURNS
            ]
        },
        MESSAGES,
    ),
    "ShareGPT that ends with the user": ({"conversations": TURNS[:3]}, SHAREGPT),
}
"""Rows, and their entry in LLaMA-Factory's dataset_info.json."""


def main() -> None:
    """Prepare every row, and write ids and labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.source / "src"))
    sound = types.ModuleType("torchaudio")  # LLaMA-Factory imports it, and no row has sound
    sound.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = sound
    rows = [
        {"name": name, "row": row, "mask_history": mask_history} | prepared(row, entry, mask_history=mask_history)
        for name, (row, entry) in CASES.items()
        for mask_history in (False, True)
    ]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    RESULTS.write_text(f'{{\n "template": {json.dumps(JINJA)},\n "rows": [\n  {lines}\n ]\n}}\n')


def prepared(row: dict, entry: dict, *, mask_history: bool) -> dict:
    """Ids and labels of a row; neither where LLaMA-Factory leaves it out."""
    from llamafactory.data import template as templates
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.hparams import DataArguments

    from tiny_tokenizers import byte_level

    if "whence" not in templates.TEMPLATES:
        templates.register_template(
            "whence",
            format_user=templates.StringFormatter(slots=["<u>{{content}}<a>"]),
            format_system=templates.StringFormatter(slots=["({{content}})"]),
        )
    tokenizer = byte_level(chat=JINJA)
    tokenizer.pad_token = tokenizer.eos_token
    settings = DataArguments(template="whence", mask_history=mask_history, cutoff_len=512)
    attributes = DatasetAttr("file", dataset_name="row")
    attributes.join(entry)
    converted = get_dataset_converter(entry["formatting"], attributes, settings)(row)
    processor = SupervisedDatasetProcessor(templates.TEMPLATES["whence"], tokenizer, None, settings)
    found = processor.preprocess_dataset({key: [value] for key, value in converted.items()})
    return {"ids": found["input_ids"][0], "labels": found["labels"][0]} if found["input_ids"] else {"left out": True}


if __name__ == "__main__":
    main()
