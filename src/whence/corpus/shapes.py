"""The shapes in which training data comes, and how each becomes one of the layouts that Whence lays out.

A shape is known by its columns. What it becomes holds the columns of a layout alone (`LAYOUTS`), and follows what the
tools do that it comes from: TRL's conversational `prompt` and `completion` are one conversation of which the completion
is supervised, a preference row is its `chosen` side (`preferences` says how it is both), LLaMA-Factory's `system` comes
before the first turn, axolotl's `segments` are tokenised each by itself, as they stand. Everywhere else a row keeps its
own columns: ids, digests and outputs are of the row as it came.

Sources: TRL's "Dataset formats and types", LLaMA-Factory's data/README.md, axolotl's "Dataset formats", OpenAI's
fine-tuning formats, databricks-dolly-15k, OpenOrca.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whence.corpus.message_forms import are_turns, turns_in
from whence.corpus.preferences import CONTRAST
from whence.corpus.roles import role_of
from whence.corpus.suggestions import suggested_map
from whence.errors import CorpusError

Row = dict[str, Any]
LAYOUTS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
    "segments": ("segments",),
    "tokens": ("input_ids",),
}
"""Columns of each layout; the last is the answer, or all there is."""
IGNORED = -100
"""Label of a token that is not supervised."""
WHICH = "Say which column is which:"
BEFORE = ("system", "history", "tools")
"""Columns that come before a question."""
OTHER_SIDE = {
    **{"chosen": "rejected", "rejected": "chosen"},
    **{"preferred_output": "non_preferred_output", "non_preferred_output": "preferred_output"},
}
"""Columns of a preferred and a rejected answer, each with the other."""


@dataclass(frozen=True)
class Shape:
    """Columns by which rows of one kind are known, and the layout that they become."""

    name: str
    """What it is called, as the end of "read as"; empty where a row has a layout's own columns."""
    layout: str
    """The layout, but for prompts and completions that are messages."""
    columns: tuple[str, ...]
    """Columns that a row must have; the last holds the answer, or all there is."""
    optional: tuple[str, ...]
    """Columns that are read where a row has them."""
    read: Callable[[Row], Row]
    """From a row to the columns of a layout. A query may lack the answer; then so does what it becomes."""

    @property
    def is_preference(self) -> bool:
        """Whether rows have a preferred and a rejected answer."""
        return not OTHER_SIDE.keys().isdisjoint(self.columns)

    @property
    def asked(self) -> tuple[str, ...]:
        """The columns that a query must have; none for what asks nothing."""
        if self.is_preference:
            return self.columns
        return () if self.layout in ("text", "segments", "tokens") else self.columns[:1]


def layout_of(columns: Row) -> str:
    """The layout whose columns these are, as `Shape.read` gives them."""
    return next(name for name, (first, *_) in LAYOUTS.items() if first in columns)


def _own(row: Row, *names: str) -> Row:
    return {name: row[name] for name in names if name in row}


# -- conversations


def _conversation(column: str) -> Callable[[Row], Row]:
    def read(row: Row) -> Row:
        messages = turns_in(row[column])
        if isinstance(messages, list) and len(messages) > 1 and all(isinstance(text, str) for text in messages):
            roles = itertools.cycle(("user", "assistant"))  # as in LIMA
            messages = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
        return _with_system(messages, row)

    return read


def _with_system(messages: Any, row: Row) -> Row:
    """Messages with the row's `system` before them, unless they begin with one, and the row's tools."""
    system = row.get("system")
    if system and are_turns(messages) and messages and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages} | ({"tools": row["tools"]} if row.get("tools") is not None else {})


def _continued(row: Row, prompt: Any, *completion: Any) -> Row:
    """A prompt and what follows it: text that is joined as it stands, or messages, whose prompt is not supervised."""
    before, after = turns_in(prompt), [turns_in(side) for side in completion]
    if not any(are_turns(side) for side in (before, *after)):
        return {"prompt": prompt} | dict(zip(("completion",), completion, strict=False)) | _own(row, *BEFORE)
    if after == [None]:
        return {"messages": None}
    if not are_turns(before):
        before = [] if before in (None, "") else [{"role": "user", "content": before}]
    answers = [side if are_turns(side) else [{"role": "assistant", "content": side}] for side in after]
    silent = [turn | {"weight": 0} for turn in before] if answers else before
    return _with_system([*silent, *(turn for side in answers for turn in side)], row)


def _prompt(row: Row) -> Row:
    return _continued(row, row["prompt"], *(row[name] for name in ("completion",) if name in row))


# -- preferences: their chosen side


def _chosen(row: Row) -> Row:
    """Where the prompt is no column, it is what both sides begin with; it may also stand in both.

    `messages` that end without an answer are a prompt too, as in axolotl's `chat_template` for preferences.
    """
    prompt, chosen, rejected = turns_in(row.get("prompt")), _side(row["chosen"]), _side(row["rejected"])
    messages = turns_in(row.get("messages"))
    if prompt is None and are_turns(messages) and messages and role_of(messages[-1]["role"]) != "assistant":
        prompt = messages
    if not are_turns(chosen):
        if isinstance(prompt, str) and isinstance(chosen, str | None) and "system" in row:
            return _texts_in_a_conversation(row)
        if prompt is not None or not (isinstance(chosen, str) and isinstance(rejected, str)):
            return _continued(row, prompt, chosen)
        shared = _shared_length(chosen, rejected)
        return {"prompt": chosen[:shared], "completion": chosen[shared:]}
    holds_prompt = any(turn.get("content") == prompt for turn in chosen[:-1])
    if are_turns(prompt) or not (prompt in (None, "") or holds_prompt):
        return _continued(row, prompt, chosen)
    shared = len(chosen) - 1
    if are_turns(rejected):
        pairs = enumerate(zip(chosen[:-1], rejected[:-1], strict=False))
        shared = next((number for number, (one, other) in pairs if one != other), min(len(chosen), len(rejected)) - 1)
    return _continued(row, chosen[:shared], chosen[shared:])


def _side(value: Any) -> Any:
    """One side of a preference: text, or messages, of which there may be one without a list."""
    turns = turns_in([value]) if isinstance(value, dict) else turns_in(value)
    return turns if are_turns(turns) or not isinstance(value, dict) else value


def _shared_length(one: str, other: str) -> int:
    """Characters that two texts begin with, up to the space before the word in which they differ.

    >>> _shared_length("Sky is blue", "Sky is black")
    6
    """
    count = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return max(one.rfind(" ", 0, count), 0)


def _preferred(row: Row) -> Row:
    """OpenAI's preference rows, whose `input` holds the messages and the tools."""
    request = row["input"] if isinstance(row["input"], dict) else {"messages": row["input"]}
    return _continued(request, request.get("messages"), row["preferred_output"])


# -- instructions


def _instruction(question: str, answer: str, *inputs: str) -> Callable[[Row], Row]:
    """An instruction and its answer under their names, and its input under one of several.

    Where one of them is messages, the row is a conversation.
    """

    def read(row: Row) -> Row:
        before, after = turns_in(row[question]), turns_in(row.get(answer))
        if any(are_turns(side) and side for side in (before, after)):
            context = _own(row, "tools") | {"system": row.get("system") or row.get("system_prompt")}
            return _continued(context, before, *(row[name] for name in (answer,) if name in row))
        for name in (question, answer):
            if isinstance(value := row.get(name), list | dict):
                kind = type(value).__name__
                raise CorpusError(f"`{name}` holds a {kind}, and text is expected. {WHICH} {suggested_map(row)}")
        columns = {"instruction": row[question]} | ({"output": row[answer]} if answer in row else {})
        given = next((row[name] for name in inputs if row.get(name) not in (None, "")), None)
        columns |= {} if given is None else {"input": given}
        system = row.get("system") if row.get("system") is not None else row.get("system_prompt")
        columns |= {} if system is None else {"system": system}
        return columns | ({"history": row["history"]} if row.get("history") is not None else {})

    return read


_texts_in_a_conversation = _instruction("prompt", "chosen")
"""A pair of texts in rows with a `system`, which only a conversation has, as in Truthy-DPO and axolotl's `chatml`."""


def _instructions(answer: str, *inputs: str, name: str = "") -> Shape:
    read, optional = _instruction("instruction", answer, *inputs), (*inputs, "system", "system_prompt", "history")
    return Shape(name, "instruction", ("instruction", answer), optional, read)


def _pair(question: str, answer: str) -> Shape:
    name = "a question and its answer"
    optional = ("system_prompt", "system", "history")
    return Shape(name, "instruction", (question, answer), optional, _instruction(question, answer))


def _preference(name: str, read: Callable[[Row], Row], *columns: str, optional: tuple[str, ...] = ()) -> Shape:
    return Shape(name, "messages", (*columns, "rejected", "chosen"), optional, read)


def _answered_question(question: str) -> Shape:
    """A preference row with a question: what comes before answers that are text, as in axolotl's `chatml`."""
    as_text = _instruction(question, "chosen")

    def read(row: Row) -> Row:
        if not are_turns(_side(row["chosen"])):
            return as_text(row)
        system = row.get("system") or row.get("system_prompt")
        return _chosen(row | {"prompt": row[question], "system": system})

    optional = ("system", "system_prompt", "history")
    return _preference("pairs of answers to a question", read, question, optional=optional)


def _token_ids(name: str, *columns: str) -> Shape:
    return Shape(name, "tokens", columns, ("attention_mask",), lambda row: _own(row, *columns))


def _masked(mask: str, name: str) -> Shape:
    """Token ids of which a mask says which are supervised, as TRL's preparation leaves them."""

    def read(row: Row) -> Row:
        ids, on = row["input_ids"], row[mask]
        if ids is None or on is None:
            return {"input_ids": ids, "labels": None}
        if (
            not isinstance(ids, list)
            or not isinstance(on, list)
            or len(on) != len(ids)
            or any(x not in (0, 1) for x in on)
        ):
            raise CorpusError(f"`{mask}` holds a 0 or 1 for each of `input_ids`; found {str(on)[:60]!r}")
        return {"input_ids": ids, "labels": [token if x else IGNORED for token, x in zip(ids, on, strict=True)]}

    return Shape(name, "tokens", ("input_ids", mask), ("attention_mask",), read)


def _as_it_is(layout: str, *optional: str) -> Shape:
    columns = LAYOUTS[layout]
    return Shape("", layout, columns, optional, lambda row: _own(row, *columns, *optional))


CHAT = ("system", "tools")
SHAPES: tuple[Shape, ...] = (
    _token_ids("token ids", "input_ids", "labels"),
    _masked("assistant_masks", "token ids, the assistant's supervised"),
    _masked("completion_mask", "token ids, the completion's supervised"),
    Shape("", "messages", ("messages",), CHAT, _conversation("messages")),
    _preference(
        "pairs of answers to a conversation",
        lambda row: _continued(row, row["conversations"], _side(row["chosen"])),
        "conversations",
        optional=CHAT,
    ),
    Shape("conversations", "messages", ("conversations",), CHAT, _conversation("conversations")),
    Shape("conversations", "messages", ("conversation",), CHAT, _conversation("conversation")),
    Shape("segments", "segments", ("segments",), (), lambda row: _own(row, "segments")),
    Shape("", "prompt", ("prompt", "completion"), (), _prompt),
    _preference(
        "pairs of answers to an instruction",
        _instruction("instruction", "chosen", "input"),
        "instruction",
        optional=("input", "system", "system_prompt", "history"),
    ),
    _preference("pairs of answers", _chosen, "prompt", optional=CHAT),
    *(_answered_question(question) for question in ("question", "query", "input")),
    _preference("pairs of answers", _chosen, optional=("messages", *CHAT)),
    Shape(
        "pairs of answers",
        "messages",
        ("input", "non_preferred_output", "preferred_output"),
        (),
        _preferred,
    ),
    _instructions("output", "input"),
    _instructions("response", "input", "context", name="instructions"),
    _as_it_is("text"),
    *(_pair("question", answer) for answer in ("answer", "response")),
    *(_pair(question, "response") for question in ("query", "prompt")),
    _pair("problem", "solution"),
    _pair("input", "output"),
    _pair("inputs", "targets"),
    _token_ids("token ids, all of them supervised", "input_ids"),
)
"""All shapes, in the order in which they are tried."""
PAIRS_FIRST = tuple(sorted(SHAPES, key=lambda shape: not shape.is_preference))
"""All shapes, in the order in which they are tried where a pair of answers is their contrast."""


def _in_order(preferences: str | None) -> tuple[Shape, ...]:
    return PAIRS_FIRST if preferences == CONTRAST else SHAPES


def shape_of(row: Row, where: str = "row", *, preferences: str | None = None) -> Shape:
    """The first of `SHAPES` whose columns a row fills; of `PAIRS_FIRST` where `preferences` says contrasts.

    Sets of preferences often hold their chosen side as a conversation too, which is what a row is by itself.

    One whose answer is empty comes after those that have one: a table that was joined from several has every column in
    every row. If nulls leave none, it is the first whose columns the row has.

    Raises:
        CorpusError: The row has no shape that is known; the message lists its columns.

    >>> shape_of({"messages": None, "text": "a"}).layout, shape_of({"prompt": "a", "completion": None}).layout
    ('text', 'prompt')
    """
    present = [shape for shape in _in_order(preferences) if all(column in row for column in shape.columns)]
    filled = [shape for shape in present if all(row[column] is not None for column in shape.columns)]
    answered = [shape for shape in filled if not is_blank(row[shape.columns[-1]])]
    if present:
        return (answered or filled or present)[0]
    raise CorpusError(f"{where}: {_unknown(row)}")


def _unknown(row: Row) -> str:
    return (
        f"columns are {', '.join(map(str, row)) or 'none'}; a row needs `text`, or `prompt` and `completion`, or "
        f"`instruction` and `output`, or `messages`, or another shape that trainers read. {WHICH} {suggested_map(row)}"
    )


def query_shape(row: Row, *, preferences: str | None = None) -> Shape | None:
    """The shape of a query, which is a row that may lack its answer; None if it asks nothing.

    It is that of a corpus' row wherever the row has an answer; for `preferences` see `shape_of`.

    >>> query_shape({"prompt": "a", "instruction": "b", "output": "c"}).columns, query_shape({"text": "a"})
    (('instruction', 'output'), None)
    """
    shapes = _in_order(preferences)
    asked = [shape for shape in shapes if shape.asked and all(row.get(column) is not None for column in shape.asked)]
    answered = [shape for shape in asked if not is_blank(row.get(shape.columns[-1], ""))]
    return (*answered, *asked, None)[0]


def rejected_side(row: Row, shape: Shape | None = None) -> Row | None:
    """The columns of a layout that a row's rejected answer is, after the same prompt; None where there is none.

    Args:
        row: The row.
        shape: Its shape; None: that of `shape_of` for contrasts.

    Raises:
        CorpusError: One answer is text, the other messages.

    >>> rejected_side({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."})
    {'prompt': 'Sky?', 'completion': 'Green.'}
    """
    shape = shape or shape_of(row, preferences=CONTRAST)
    if not shape.is_preference:
        return None
    preferred, rejected = shape.read(row), shape.read({OTHER_SIDE.get(name, name): row[name] for name in row})
    sides = [layout_of(side) for side in (preferred, rejected)]
    if sides[0] != sides[1] and not any(is_blank(row[name]) for name in shape.columns):
        raise CorpusError(f"{columns_in_words(shape.columns)} have two layouts, {' and '.join(sides)}; one is expected")
    return rejected


def columns_in_words(columns: tuple[str, ...]) -> str:
    """Names of columns as words.

    >>> columns_in_words(("a", "b", "c"))
    '`a`, `b` and `c`'
    """
    *first, last = (f"`{name}`" for name in columns)
    return f"{', '.join(first)} and {last}" if first else last


def is_blank(value: Any) -> bool:
    """Whether a cell is null, an empty list, or text of blanks alone."""
    return value in (None, []) or (isinstance(value, str) and not value.strip())
