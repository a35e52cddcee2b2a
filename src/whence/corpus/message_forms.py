"""The forms in which formats write the messages of a conversation, and the one that Whence reads.

That is OpenAI's: a list of objects with `role` and `content`. ShareGPT writes `from` and `value`, and has roles of its
own for tools; files without lists hold JSON text; contents may be lists of parts, or called `value` (Pygmalion),
`text` or `parts` (Gemini); a question and its answer may be one object.
"""

import itertools
import json
from typing import Any, TypeGuard

from whence.errors import CorpusError

NOT_MESSAGES = "messages are a list of objects with `role` and `content`"
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what the assistant thought."""
WITH_LOSS = "output_with_loss"
"""Key of a question and its answer in one object that says whether the answer is trained on."""
SILENT = "whence: silent"
"""Key of a message, of Whence's own: stretches of its content, in characters, that are not trained on."""


def are_turns(messages: object) -> TypeGuard[list[dict[str, Any]]]:
    """Whether they are a list of objects that have a role."""
    return isinstance(messages, list) and all(isinstance(message, dict) and "role" in message for message in messages)


def turns_in(value: Any) -> Any:
    """Messages in OpenAI's form, if a value is a conversation in any form; else the value as it is.

    >>> turns_in([{"from": "human", "value": "Hi"}]), turns_in("Hi")
    ([{'role': 'human', 'content': 'Hi'}], 'Hi')
    """
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict) and any(keys <= value.keys() for keys in ({"role", "content"}, {"from", "value"})):
        columns = list(value.values())  # a list of objects as `datasets` stores it: an object of lists
        if all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return value
    if all({"input", "output"} <= turn.keys() and "role" not in turn for turn in value):
        value = [message for turn in value for message in _pair_of_turns(turn)]
    return [_turn(turn) for turn in value]


def _pair_of_turns(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """A question and its answer in one object, as XTuner and Capybara have them; other keys are the answer's.

    XTuner's `output_with_loss` says whether the answer is trained on, which is a `weight` of 1 or 0.
    """
    roles = (("system", "system"), ("user", "input"), ("assistant", "output"))
    messages = [{"role": role, "content": turn[key]} for role, key in roles if turn.get(key) or key == "output"]
    others = {name: value for name, value in turn.items() if name not in ("system", "input", "output", WITH_LOSS)}
    if (with_loss := turn.get(WITH_LOSS)) is not None and others.get("weight") is None:
        others["weight"] = int(with_loss) if isinstance(with_loss, bool) else with_loss
    return [*messages[:-1], messages[-1] | others]


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    if "role" not in turn and "from" in turn and "value" in turn:
        others = {name: value for name, value in turn.items() if name not in ("from", "value")}
        turn = {"role": turn["from"], "content": turn["value"]} | others
        if turn["role"] == "function_call":
            turn = others | {"role": "assistant", "content": "", "tool_calls": _calls(turn["content"])}
        turn["role"] = {"observation": "tool"}.get(turn["role"], turn["role"])
    if "role" in turn and "content" not in turn:
        text_key = next((key for key in ("value", "text", "parts") if turn.get(key) is not None), None)
        turn = turn if text_key is None else turn | {"content": turn[text_key]}
    for key in ("content", *REASONING):
        if isinstance(parts := turn.get(key), list):
            turn = turn | {key: text_of_parts(parts)}
            if silent := _silent(parts):
                if key != "content":
                    raise CorpusError(f"parts of `{key}` are not trained on; Whence reads that of `content` alone")
                turn = turn | {SILENT: silent}
    return turn


def _silent(parts: list[Any]) -> list[tuple[int, int]]:
    """Stretches of parts that are not trained on, as axolotl has it: their `train` is false, or their `weight` 0."""
    ends = [0, *itertools.accumulate(len(_text_of(part)) for part in parts)]
    pairs = zip(itertools.pairwise(ends), parts, strict=True)
    return [stretch for stretch, part in pairs if isinstance(part, dict) and _trains(part) in (False, 0)]


def _trains(part: dict[str, Any]) -> Any:
    return part.get("weight") if part.get("train") is None else part["train"]


def _calls(content: Any) -> list[dict[str, Any]]:
    """Calls of tools that a ShareGPT turn holds as JSON text."""
    try:
        calls = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        raise CorpusError(f"a `function_call` turn holds JSON; found {str(content)[:60]!r}") from None
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in calls]


def text_of_parts(parts: list[Any]) -> str:
    """The text of a content that is a list of parts.

    Raises:
        CorpusError: A part is no text.

    >>> text_of_parts([{"type": "text", "text": "Hi"}])
    'Hi'
    """
    return "".join(map(_text_of, parts))


def _text_of(part: Any) -> str:
    text = part
    if isinstance(part, dict):
        text = next((part[key] for key in ("text", "content", "value") if part.get(key) is not None), None)
    if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") != "text"):
        kind = part.get("type", "of another form") if isinstance(part, dict) else type(part).__name__
        raise CorpusError(f"a part of a message is {kind}: {str(part)[:60]!r}; Whence reads text alone")
    return text
