"""The layouts that a row of a corpus may have, and its text as prompt and completion whatever the layout.

`tokens` says how each of them becomes token ids; here is only what its columns hold.
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
    """Name of the first of `LAYOUTS` whose columns a row fills; where nulls leave none, of the first that it has.

    Raises:
        CorpusError: It has none of them; the message lists the columns that it has.

    >>> layout({"messages": None, "text": "a"}), layout({"prompt": "a", "completion": None})
    ('text', 'prompt')
    """
    found = [name for name, columns in LAYOUTS.items() if all(column in row for column in columns)]
    for name in found:
        if all(row[column] is not None for column in LAYOUTS[name]):
            return name
    if found:
        return found[0]
    have = ", ".join(map(str, row)) or "none"
    raise CorpusError(
        f"{where}: columns are {have}; a row needs `text`, or `prompt` and `completion`, "
        "or `instruction` and `output`, or `messages`."
    )


def shown_text(row: Row) -> Row:
    """A corpus row as `prompt` and `completion`, or as `text`, whatever its layout."""
    kind = layout(row)
    if kind == "instruction":
        asked = [str(row[name]) for name in ("instruction", "input") if row.get(name)]
        return {"prompt": "\n\n".join(asked), "completion": _text(row["output"])}
    if kind == "messages":
        turns = row["messages"] or [{"role": "", "content": ""}]
        said = [str(turn.get("content") or "") for turn in turns]
        before = "\n".join(f"{turn['role']}: {text}" for turn, text in zip(turns[:-1], said, strict=False))
        return {"prompt": before, "completion": said[-1]}
    return {name: _text(row[name]) for name in (("prompt", "completion") if kind == "prompt" else ("text",))}


def row_text(row: Row) -> str:
    """Text of a corpus row, whatever its layout; empty where nulls stand for text. UTF-8 can hold it.

    >>> row_text({"prompt": "1 + 1?", "completion": "2"})
    '1 + 1? 2'
    """
    text = " ".join(text for text in shown_text(row).values() if text)
    return text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates


def _text(value: Any) -> str | None:
    """One type a column, whatever stands in a row: a file of rows needs that."""
    return None if value is None else str(value)
