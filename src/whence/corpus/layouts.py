"""A row's layout, and its text as prompt and completion, whatever its shape.

This module only reads columns; `tokens` turns each layout into token ids. Beside the columns that make a layout, a row
of messages may have `tools`, and an instruction `input`, `system` and `history`: pairs of a question and an answer that
came before, as LLaMA-Factory has them. A row that is labelled as a bad answer (`label` or `kto_tag` is false, as in
data for KTO) is never trained on.
"""

import json
from typing import Any

from whence.corpus.message_forms import NOT_MESSAGES, REASONING, are_turns
from whence.corpus.roles import role_of
from whence.corpus.shapes import BEFORE, Row, layout_of, query_shape, shape_of
from whence.errors import CorpusError

VERDICTS = ("label", "kto_tag")
"""Columns that say whether an answer is good."""


def in_layout(row: Row, where: str = "row", *, preferences: str | None = None) -> tuple[str, Row]:
    """A row's layout, one of `LAYOUTS`, and the row as the columns of that layout; of a contrast, its chosen side's.

    Raises:
        CorpusError: The row has no known shape, or a part of it is no text.

    >>> in_layout({"conversations": [{"from": "human", "value": "Hi"}]})
    ('messages', {'messages': [{'role': 'human', 'content': 'Hi'}]})
    """
    columns = shape_of(row, where, preferences=preferences).read(row)
    return layout_of(columns), columns


def layout(row: Row, where: str = "row", *, preferences: str | None = None) -> str:
    """Name of a row's layout, one of `LAYOUTS`; see `shapes.shape_of` for which of several.

    Raises:
        CorpusError: As `in_layout`.

    >>> layout({"messages": None, "text": "a"}), layout({"prompt": "a", "completion": None})
    ('text', 'prompt')
    >>> layout({"prompt": "", "completion": "", "text": "a"}), layout({"prompt": "a", "completion": ""})
    ('text', 'prompt')
    """
    return in_layout(row, where, preferences=preferences)[0]


def query_in_layout(row: Row) -> tuple[str, Row] | None:
    """Layout and columns of a query, which is a row that may lack its answer; None if it asks nothing.

    >>> query_in_layout({"question": "Why?"}), query_in_layout({"text": "a"})
    (('instruction', {'instruction': 'Why?'}), None)
    """
    shape = query_shape(row)
    if shape is None:
        return None
    columns = shape.read(row)
    return layout_of(columns), columns


def columns_read(row: Row, *, preferences: str | None = None) -> set[str]:
    """Columns of a row that its shape reads."""
    shape, kind = shape_of(row, preferences=preferences), layout(row, preferences=preferences)
    if kind == "messages" and "preferred_output" not in shape.columns:
        return {*shape.columns, *shape.optional, "system", "tools"} - ({"history", "input"} - {*shape.columns})
    return {*shape.columns, *shape.optional} - {*(("tools",) if kind == "instruction" else BEFORE)}


def query_columns_read(row: Row, *, preferences: str | None = None) -> set[str]:
    """Columns of a query that its shape reads; a plain prompt may have what comes before it."""
    shape = query_shape(row, preferences=preferences)
    if shape is None:
        return set()
    return {*shape.columns, *shape.optional, *(BEFORE if shape.columns[0] == "prompt" else ())}


def check_messages(row: Row, where: str = "row") -> None:
    """Refuse a row without a known shape, or whose messages are no list of objects with a role; null is no fault.

    Raises:
        CorpusError: The row has another form.
    """
    try:
        kind, columns = in_layout(row)
    except CorpusError as error:
        raise CorpusError(f"{where}: {str(error).removeprefix('row: ')}") from None
    messages = columns["messages"] if kind == "messages" else None
    if messages is not None and not are_turns(messages):
        raise CorpusError(f"{where}: {NOT_MESSAGES}; found {str(messages)[:60]!r}")


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
    """A corpus row as `prompt` and `completion`, or as `text`, whatever its shape.

    Turns before the last message are named by their roles, but for one question. Of token ids the text is the row's
    `text`, if it has one; `tokens.with_text` adds it.
    """
    own, (kind, row) = row, in_layout(row)
    if kind == "tokens":
        ids = " ".join(map(str, row["input_ids"] or ()))
        return {"text": own["text"] if isinstance(own.get("text"), str) else ids}
    if kind == "segments":
        return _text_of_segments(segments_of(row))
    if kind == "instruction":
        request = [turn["content"] for turn in turns_before(row)]
        request += [str(row[name]) for name in ("instruction", "input") if row.get(name)]
        return {"prompt": "\n\n".join(request), "completion": _text(row["output"])}
    if kind == "messages":
        turns = row["messages"] or [{"role": "", "content": ""}]
        texts = [" ".join(map(str, pieces_of(turn))) for turn in turns]
        before = list(zip(turns[:-1], texts, strict=False))
        is_question = len(before) == 1 and role_of(before[0][0]["role"]) == "user"
        prompt = before[0][1] if is_question else "\n".join(f"{turn['role']}: {text}" for turn, text in before)
        return {"prompt": prompt, "completion": texts[-1]}
    return {name: _text(row[name]) for name in (("prompt", "completion") if kind == "prompt" else ("text",))}


def question_in(row: Row) -> str | None:
    """What a row asks last, or how its text begins where it asks nothing; None for token ids, and where that is empty.

    >>> question_in({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}]})
    'Why?'
    """
    asked = query_in_layout(row)
    if asked is None:
        is_text = layout(row) != "tokens" or isinstance(row.get("text"), str)
        texts = list(shown_text(row).values()) if is_text else []
    elif asked[0] == "messages":
        turns = asked[1]["messages"] or []
        texts = [" ".join(map(str, pieces_of(turn))) for turn in reversed(turns) if role_of(turn["role"]) == "user"]
    else:
        texts = [asked[1].get(name) for name in ("prompt", "instruction", "input")]
    return next((str(text) for text in texts if text is not None and str(text).strip()), None)


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
    kind, columns = in_layout(row)
    tools = [json.dumps(columns["tools"], default=str)] if kind == "messages" and columns.get("tools") else []
    text = " ".join([*tools, *(text for text in shown_text(row).values() if text)])
    return text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates


def _text(value: Any) -> str | None:
    """A value as text, so that a column has one type, as a file of rows needs."""
    return None if value is None else str(value)


def segments_of(columns: Row) -> list[tuple[str, bool]] | None:
    """Pieces of text and whether each is supervised, as axolotl's `segments` have them; None where they are null.

    Raises:
        CorpusError: They have another form.
    """
    segments = columns["segments"]
    if segments is None:
        return None
    if not isinstance(segments, list) or not all(
        isinstance(piece, dict) and isinstance(piece.get("text"), str) and isinstance(piece.get("label"), bool)
        for piece in segments
    ):
        raise CorpusError(f"`segments` is a list of objects with `text` and a `label`; found {str(segments)[:60]!r}")
    return [(piece["text"], piece["label"]) for piece in segments]


def _text_of_segments(segments: list[tuple[str, bool]] | None) -> Row:
    """The last supervised segments as the completion, and what stands before them as the prompt."""
    pieces = segments or []
    end = len(pieces)
    while end and pieces[end - 1][1]:
        end -= 1
    prompt, completion = ("".join(text for text, _ in part) for part in (pieces[:end], pieces[end:]))
    return {"prompt": prompt, "completion": completion}
