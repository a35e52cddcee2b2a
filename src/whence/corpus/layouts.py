"""The layouts that a row of a corpus may have, and a row's text as prompt and completion whatever its layout.

This module only reads columns; `tokens` turns each layout into token ids.
"""

from typing import Any

from whence.errors import CorpusError

Row = dict[str, Any]
LAYOUTS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}


def layout(row: Row, where: str = "row") -> str:
    """Name of the first of `LAYOUTS` whose columns a row fills; if nulls leave none, the first whose columns it has.

    Raises:
        CorpusError: The row has none of the layouts; the message lists its columns.

    >>> layout({"messages": None, "text": "a"}), layout({"prompt": "a", "completion": None})
    ('text', 'prompt')
    """
    present = [name for name, columns in LAYOUTS.items() if all(column in row for column in columns)]
    for name in present:
        if all(row[column] is not None for column in LAYOUTS[name]):
            return name
    if present:
        return present[0]
    columns = ", ".join(map(str, row)) or "none"
    raise CorpusError(
        f"{where}: columns are {columns}; a row needs `text`, or `prompt` and `completion`, "
        "or `instruction` and `output`, or `messages`."
    )


def shown_text(row: Row) -> Row:
    """A corpus row as `prompt` and `completion`, or as `text`, whatever its layout."""
    kind = layout(row)
    if kind == "instruction":
        request = [str(row[name]) for name in ("instruction", "input") if row.get(name)]
        return {"prompt": "\n\n".join(request), "completion": _text(row["output"])}
    if kind == "messages":
        turns = row["messages"] or [{"role": "", "content": ""}]
        texts = [str(turn.get("content") or "") for turn in turns]
        prompt = "\n".join(f"{turn['role']}: {text}" for turn, text in zip(turns[:-1], texts, strict=False))
        return {"prompt": prompt, "completion": texts[-1]}
    return {name: _text(row[name]) for name in (("prompt", "completion") if kind == "prompt" else ("text",))}


def row_text(row: Row) -> str:
    """Text of a corpus row whatever its layout, as valid UTF-8; empty where nulls stand for text.

    >>> row_text({"prompt": "1 + 1?", "completion": "2"})
    '1 + 1? 2'
    """
    text = " ".join(text for text in shown_text(row).values() if text)
    return text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates


def _text(value: Any) -> str | None:
    """A value as text, so that a column has one type, as a file of rows needs."""
    return None if value is None else str(value)
