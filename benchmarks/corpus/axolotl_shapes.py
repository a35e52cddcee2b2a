r"""What axolotl trains on, row by row: the ids and labels of its own prompt strategies, to hold Whence against.

OMP_NUM_THREADS=1 PYTHONPATH=tests AXOLOTL_ENVIRONMENT/bin/python benchmarks/corpus/axolotl_shapes.py

AXOLOTL_ENVIRONMENT is that of trl_shapes.py with axolotl 0.19 (the last for Python 3.11) beside it, and of what it
names only addict, certifi, colorama, distro, llvmlite, numba, posthog, requests and urllib3 (`pip install --no-deps`).
It imports nothing of Whence. Each row goes through `get_dataset_wrapper`, as axolotl's preparation does; rows of its
ORPO strategy, of which the chosen side is taken, through that. Numbers go to
benchmarks/corpus/results/axolotl_shapes.json, which tests/corpus/test_axolotl.py reads; half a minute.
"""

import copy
import json
from importlib.metadata import version
from pathlib import Path

from axolotl.prompt_strategies.orpo import chat_template as orpo
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from tiny_tokenizers import byte_level

RESULTS = Path(__file__).with_name("results") / "axolotl_shapes.json"
MERGES = [("x", "y")]
"""So that a token may straddle the boundary of two pieces."""
TEMPLATES = {
    "tight": "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<a>{{ message.get('reasoning_content', '') }}{{ message['content'] }}"
    "{% if message.tool_calls %}{% for c in message.tool_calls %}{{ c.function.name }}{% endfor %}{% endif %}</s>"
    "{% elif message['role'] == 'user' %}<u>{{ message['content'] }}"
    "{% else %}({{ message['role'] }}){{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
    "lines": "{% for message in messages %}<u>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<u>assistant\n{% endif %}",
}

"""axolotl gives a template the keys of a message that it reads from a variable called `message`."""


def user(content: object, **more: object) -> dict:
    """A message of the user."""
    return {"role": "user", "content": content, **more}


def assistant(content: object, **more: object) -> dict:
    """A message of the assistant."""
    return {"role": "assistant", "content": content, **more}


def said(speaker: str, value: str, **more: object) -> dict:
    """A turn of ShareGPT's."""
    return {"from": speaker, "value": value, **more}


def part(text: str, **more: object) -> dict:
    """A part of a content."""
    return {"type": "text", "text": text, **more}


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"n": "1"}}}
TURNS = [user("x"), assistant("y"), user("z"), assistant("w")]
SYSTEM = {"role": "system", "content": "s"}
TALK = [said("human", "x"), said("gpt", "y"), said("human", "z"), said("gpt", "w")]
X, Y = byte_level()("xy")["input_ids"]
CHAT = {"type": "chat_template"}
SHAREGPT = CHAT | {
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
}
TRAIN = {"message_field_training": "train", "message_field_training_detail": "train_detail"}
ALPACA = {"instruction": "x", "input": "z", "output": "y"}
OWN = {"type": {"field_instruction": "q", "field_output": "a", "no_input_format": "{instruction}"}}
SEGMENTS = [{"label": False, "text": "<s>x"}, {"label": True, "text": "y"}, {"label": False, "text": "z"}]
CASES: dict[str, tuple[dict, dict, dict]] = {
    # chat_template
    "messages": ({"messages": TURNS}, CHAT, {}),
    "messages with system": ({"messages": [SYSTEM, *TURNS]}, CHAT, {}),
    "messages and a column of the system": ({"messages": TURNS, "system": "s"}, CHAT, {}),
    "messages as JSON text": ({"messages": json.dumps(TURNS)}, CHAT, {}),
    "messages with tools": ({"messages": TURNS, "tools": [TOOL]}, CHAT, {}),
    "messages with tools as JSON text": ({"messages": TURNS, "tools": json.dumps([TOOL])}, CHAT, {}),
    "messages with a call of a tool": (
        {"messages": [user("x"), assistant("c", tool_calls=[CALL]), {"role": "tool", "content": "o"}, assistant("y")]},
        CHAT,
        {},
    ),
    "messages that end with the user": ({"messages": TURNS[:3]}, CHAT, {}),
    "messages of parts": ({"messages": [user([part("x"), part("z")]), assistant([part("y")])]}, CHAT, {}),
    "messages, no roles to train: the last alone": (
        {"messages": TURNS},
        CHAT | {"roles_to_train": None, "train_on_eos": None},
        {"supervise": "last"},
    ),
    "messages, the end of the last turn alone": ({"messages": TURNS}, CHAT | {"train_on_eos": "last"}, {}),
    "messages, the end of every turn": ({"messages": TURNS}, CHAT | {"train_on_eos": "all"}, {}),
    "messages, roles user and assistant": (
        {"messages": TURNS},
        CHAT | {"roles_to_train": ["user", "assistant"]},
        {"supervise": "all"},
    ),
    "messages, train on inputs": ({"messages": TURNS}, CHAT | {"train_on_inputs": True}, {"supervise": "all"}),
    "messages with weights": ({"messages": [user("x"), assistant("y", weight=0), *TURNS[2:]]}, CHAT, {}),
    "messages that say whether to train": (
        {"messages": [user("x"), assistant("y", train=False), user("z"), assistant("w", train=True)]},
        CHAT | TRAIN,
        {},
    ),
    "messages of which the user is trained on": (
        {"messages": [user("x", train=True), assistant("y", train=True), user("z"), assistant("w", train=False)]},
        CHAT | TRAIN,
        {},
    ),
    "messages trained on in part": (
        {"messages": [user("x"), assistant("ww", train_detail=[{"begin_offset": 0, "end_offset": 0, "train": True}])]},
        CHAT | TRAIN,
        {},
    ),
    "messages of parts trained on in part": (
        {"messages": [user([part("x")]), assistant([part("w", train=False), part(" y", train=True)])]},
        CHAT,
        {},
    ),
    "messages of parts that have weights": (
        {"messages": [user([part("x")]), assistant([part("w", weight=0), part(" y", weight=1)])]},
        CHAT,
        {},
    ),
    "reasoning of parts": (
        {"messages": [user("x"), assistant("y", reasoning_content=[part("r"), part("t")])]},
        CHAT,
        {},
    ),
    "another name of the messages": ({"talk": TURNS}, CHAT | {"field_messages": "talk"}, {"map": {"messages": "talk"}}),
    "ShareGPT": ({"conversations": TALK}, SHAREGPT, {}),
    "ShareGPT with a turn of the system": ({"conversations": [said("system", "s"), *TALK]}, SHAREGPT, {}),
    "ShareGPT with a column of the system": ({"conversations": TALK, "system": "s"}, SHAREGPT, {}),
    "ShareGPT with weights": (
        {"conversations": [TALK[0], said("gpt", "y", weight=0), *TALK[2:]]},
        SHAREGPT | {"message_field_training": "weight"},
        {},
    ),
    "ShareGPT with roles of its own": (
        {"conversations": [said("human", "x"), said("model", "y")]},
        SHAREGPT | {"roles": {"user": ["human"], "assistant": ["model"]}},
        {},
    ),
    # preferences
    "preference": (
        {"chosen": TURNS[:2], "rejected": [user("x"), assistant("n")]},
        {"type": "orpo.chat_template"},
        {},
    ),
    "preference with a column of the system": (
        {"system": "s", "chosen": TURNS[:2], "rejected": [user("x"), assistant("n")]},
        {"type": "orpo.chat_template"},
        {},
    ),
    # without a template
    "Alpaca": ({"instruction": "x", "input": "", "output": "y"}, {"type": "alpaca"}, {}),
    "Alpaca with input": (ALPACA, {"type": "alpaca"}, {}),
    "Alpaca with system": (ALPACA | {"system": "s"}, {"type": "alpaca_w_system.load_instruct"}, {}),
    "Alpaca as a chat": (ALPACA, {"type": "alpaca_chat"}, {}),
    "question and answer": ({"question": "x", "answer": "y"}, {"type": "alpaca_chat.load_qa"}, {}),
    "OpenOrca": (
        {"system_prompt": "s", "question": "x", "response": "y"},
        {"type": "alpaca_w_system.load_open_orca"},
        {},
    ),
    "GPTeacher": ({"instruction": "x", "input": "z", "response": "y"}, {"type": "gpteacher"}, {}),
    "summaries": (
        {"article": "x", "summary": "y"},
        {"type": "summarizetldr"},
        {"map": {"instruction": "article", "output": "summary"}},
    ),
    "columns of the user's": ({"q": "x", "a": "w"}, OWN, {"map": {"prompt": "q", "completion": "a"}}),
    "columns of the user's, a token straddles": (
        {"q": "x", "a": "y"},
        OWN,
        {"map": {"prompt": "q", "completion": "a"}},
    ),
    "completion": ({"text": "x z"}, {"type": "completion"}, {}),
    "completion that ends with the end": ({"text": "x z</s>"}, {"type": "completion"}, {}),
    "completion of another column": (
        {"content": "x z"},
        {"type": "completion", "field": "content"},
        {"map": {"text": "content"}},
    ),
    "segments": ({"segments": SEGMENTS}, {"type": "input_output"}, {}),
    "segments, the last trained on": ({"segments": SEGMENTS[:2]}, {"type": "input_output"}, {}),
    "segments that end with the end": (
        {"segments": [SEGMENTS[0], {"label": True, "text": "y</s>"}]},
        {"type": "input_output"},
        {},
    ),
    "segments, train on inputs": (
        {"segments": SEGMENTS},
        {"type": "input_output", "train_on_inputs": True},
        {"supervise": "all"},
    ),
    "token ids": (
        {"input_ids": [X, Y, 1], "labels": [-100, Y, 1], "attention_mask": [1, 1, 1]},
        {"type": None},
        {},
    ),
}
"""Rows, axolotl's settings of the data set, and Whence's flags for the same."""


def main() -> None:
    """Prepare every row by its strategy, and write ids and labels."""
    rows = [
        {"name": name, "template": template, "row": row, "settings": settings} | flags | prepared(row, settings, text)
        for template, text in TEMPLATES.items()
        for name, (row, settings, flags) in CASES.items()
        if (template == "tight" or "messages" in row) and not _is_plain(settings)
    ]
    rows += [
        {"name": name, "template": None, "row": row, "settings": settings} | flags | prepared(row, settings, None)
        for name, (row, settings, flags) in CASES.items()
        if _is_plain(settings)
    ]
    answer = {
        "packages": {name: version(name) for name in ("axolotl", "trl", "transformers", "torch")},
        "merges": MERGES,
        "templates": TEMPLATES,
    }
    parts = [f'"{name}": {json.dumps(part)}' for name, part in answer.items()]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    RESULTS.write_text("{\n " + ",\n ".join([*parts, f'"rows": [\n  {lines}\n ]']) + "\n}\n")


def _is_plain(settings: dict) -> bool:
    return "chat_template" not in str(settings["type"])


def prepared(row: dict, settings: dict, template: str | None) -> dict:
    """Ids and labels of a row as axolotl prepares it, or the error by which it refuses."""
    tokenizer = byte_level(MERGES, bos=template is None, chat=template)
    everything = {"sequence_len": 512, "train_on_inputs": settings.get("train_on_inputs", False)}
    cfg = DictDefault(everything | {"chat_template": "tokenizer_default", "dataset_num_proc": 1})
    config = {"path": "row"} | {key: value for key, value in settings.items() if key != "train_on_inputs"}
    try:
        if settings["type"] == "orpo.chat_template":
            found = orpo.load(tokenizer, cfg, config).tokenize_prompt(copy.deepcopy(row))
        else:
            data, base = Dataset.from_list([copy.deepcopy(row)]), settings["type"]
            base = base if isinstance(base, str) else None
            found = get_dataset_wrapper(DictDefault(config), tokenizer, cfg, base, data)[0][0]
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    return {"ids": found["input_ids"], "labels": found["labels"]}


if __name__ == "__main__":
    main()
