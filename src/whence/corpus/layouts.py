"""The layouts that a row of a corpus may have, and a row's text as prompt and completion whatever its layout.

This module only reads columns; `tokens` turns each layout into token ids. Beside the columns that make a layout, a row
of messages may have `tools`, and an instruction `input`, `system` and `history`: pairs of a question and an answer that
came before, as LLaMA-Factory has them. A row that is labelled as a bad answer (`label` or `kto_tag` is false, as in
data for KTO) is never trained on.
"""

import json
from typing import Any, TypeGuard

from whence.errors import CorpusError

Row = dict[str, Any]
LAYOUTS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""Columns of each layout; the last is the answer, or all there is."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("tools",),
    "prompt": (),
    "instruction": ("input", "system", "history"),
    "text": (),
}
"""Columns that a layout reads where a row has them."""
VERDICTS = ("label", "kto_tag")
"""Columns that say whether an answer is good."""


NOT_MESSAGES = "messages are a list of objects with `role` and `content`"
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what the assistant thought."""


def layout(row: Row, where: str = "row") -> str:
    """Name of the first of `LAYOUTS` whose columns a row fills.

    A layout whose answer is empty comes after those that have one: a table that was joined from several has every
    column in every row. If nulls leave none, it is the first whose columns the row has.

    Raises:
        CorpusError: The row has none of the layouts; the message lists its columns.

    >>> layout({"messages": None, "text": "a"}), layout({"prompt": "a", "completion": None})
    ('text', 'prompt')
    >>> layout({"prompt": "", "completion": "", "text": "a"}), layout({"prompt": "a", "completion": ""})
    ('text', 'prompt')
    """
    present = [name for name, columns in LAYOUTS.items() if all(column in row for column in columns)]
    filled = [name for name in present if all(row[column] is not None for column in LAYOUTS[name])]
    answered = [name for name in filled if not _is_blank(row[LAYOUTS[name][-1]])]
    if present:
        return (answered or filled or present)[0]
    columns = ", ".join(map(str, row)) or "none"
    raise CorpusError(
        f"{where}: columns are {columns}; a row needs `text`, or `prompt` and `completion`, "
        "or `instruction` and `output`, or `messages`."
    )


def check_messages(row: Row, kind: str, where: str = "row") -> None:
    """Refuse a row whose messages are no list of objects with a role, whoever reads it; null is no fault.

    Args:
        row: A row of a corpus.
        kind: Its layout.
        where: Its place, for the message.

    Raises:
        CorpusError: They have another form.
    """
    messages = row["messages"] if kind == "messages" else None
    if messages is not None and not is_list_of_messages(messages):
        raise CorpusError(f"{where}: {NOT_MESSAGES}; found {str(messages)[:60]!r}")


def is_list_of_messages(messages: object) -> TypeGuard[list[dict[str, Any]]]:
    """Whether they are a list of objects that have a role."""
    return isinstance(messages, list) and all(isinstance(message, dict) and "role" in message for message in messages)


def _is_blank(value: Any) -> bool:
    return value in (None, []) or (isinstance(value, str) and not value.strip())


def question_layout(row: Row) -> str | None:
    """Name of the layout of a query, which is a row that may lack its answer; None if it asks nothing.

    It is that of a corpus' row wherever the row has an answer.

    >>> question_layout({"prompt": "a", "instruction": "b", "output": "c"}), question_layout({"text": "a"})
    ('instruction', None)
    """
    asked = [name for name, columns in LAYOUTS.items() if name != "text" and row.get(columns[0]) is not None]
    answered = [name for name in asked if not _is_blank(row.get(LAYOUTS[name][-1], ""))]
    return (*answered, *asked, None)[0]


def query_columns(kind: str) -> tuple[str, ...]:
    """Columns that a query of a layout reads: a corpus row's, and with a `prompt` what may come before it."""
    return *LAYOUTS[kind], *(("system", "history", "tools") if kind == "prompt" else OPTIONAL[kind])


def is_rejected(row: Row) -> bool:
    """Whether a row is labelled as a bad answer, which no training should imitate.

    >>> is_rejected({"prompt": "a", "completion": "b", "label": False}), is_rejected({"text": "a", "label": False})
    (True, False)
    """
    verdicts = [row.get(name) for name in VERDICTS]
    return (
        any(is_verdict(verdict) and str(verdict).lower() == "false" for verdict in verdicts) and layout(row) != "text"
    )


def is_verdict(value: object) -> bool:
    """Whether a value says true or false; a csv file has only text for that, and a number may be a class."""
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """Tools that the assistant of a row may call, as JSON schemas; None where there are none.

    Raises:
        CorpusError: `tools` is no list of objects, nor JSON text of one.
    """
    tools = _list_in(row, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise CorpusError(f"`tools` is a list of objects, or JSON text of one; found {str(row['tools'])[:60]!r}")
    return tools or None


def turns_before(row: Row) -> list[dict[str, Any]]:
    """Messages that come before an instruction: its `system`, and the turns of its `history`.

    Raises:
        CorpusError: They have another form.
    """
    system = row.get("system")
    if not isinstance(system, str | None):
        raise CorpusError(f"`system` is text; found a {type(system).__name__}: {str(system)[:60]!r}")
    turns = [{"role": "system", "content": system}] if system else []
    for pair in _list_in(row, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise CorpusError(f"`history` is a list of [question, answer]; found {str(pair)[:60]!r} in it")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _list_in(row: Row, name: str) -> list[Any]:
    """A column that holds a list, or JSON text of one, as files without lists have it; empty where it is null."""
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise CorpusError(f"`{name}` is a list, or JSON text of one; found the text {value[:60]!r}") from None
    if value in (None, "") or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list | tuple):
        raise CorpusError(f"`{name}` is a list; found a {type(value).__name__}: {str(value)[:60]!r}")
    return list(value)


def shown_text(row: Row) -> Row:
    """A corpus row as `prompt` and `completion`, or as `text`, whatever its layout."""
    kind = layout(row)
    if kind == "instruction":
        request = [turn["content"] for turn in turns_before(row)]
        request += [str(row[name]) for name in ("instruction", "input") if row.get(name)]
        return {"prompt": "\n\n".join(request), "completion": _text(row["output"])}
    if kind == "messages":
        turns = row["messages"] or [{"role": "", "content": ""}]
        texts = [" ".join(map(str, pieces_of(turn))) for turn in turns]
        prompt = "\n".join(f"{turn['role']}: {text}" for turn, text in zip(turns[:-1], texts, strict=False))
        return {"prompt": prompt, "completion": texts[-1]}
    return {name: _text(row[name]) for name in (("prompt", "completion") if kind == "prompt" else ("text",))}


def pieces_of(message: dict[str, Any]) -> list[Any]:
    """What a message says, without what it lacks: reasoning, content, and the tools that it calls as JSON."""
    calls = calls_of(message)
    pieces = [message.get(key) for key in (*REASONING, "content")]
    pieces.append(calls and json.dumps(calls, ensure_ascii=False, default=str))
    return [piece for piece in pieces if piece not in (None, "", [])]


def calls_of(message: dict[str, Any]) -> Any:
    """Tools that a message calls, in either of OpenAI's forms."""
    return message.get("tool_calls") or message.get("function_call")


def row_text(row: Row) -> str:
    """Text of a corpus row whatever its layout, as valid UTF-8; empty where nulls stand for text.

    Tools that a conversation may call are part of it, and so are the calls.

    >>> row_text({"prompt": "1 + 1?", "completion": "2"})
    '1 + 1? 2'
    """
    tools = [json.dumps(row["tools"], default=str)] if layout(row) == "messages" and row.get("tools") else []
    text = " ".join([*tools, *(text for text in shown_text(row).values() if text)])
    return text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates


def _text(value: Any) -> str | None:
    """A value as text, so that a column has one type, as a file of rows needs."""
    return None if value is None else str(value)
