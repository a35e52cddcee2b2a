"""Conversations and instructions as text, with the stretches that the assistant says.

A conversation is what the tokenizer's chat template makes of it as a whole, as in training, and what stands there of
each assistant's turn is supervised, with the marker by which the turn is closed: that is what the model must produce
to end its turn. A template may close an earlier turn in another way than the last one, or write less of it. Without a
template the layout is Alpaca's.

An assistant's turn of `weight` 0 is not supervised, as in OpenAI's format.
"""

import functools
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from whence.corpus.layouts import calls_of, pieces_of
from whence.corpus.message_forms import NOT_MESSAGES, REASONING, SILENT, are_turns, turns_in
from whence.corpus.roles import role_of
from whence.corpus.templates import (
    Tokenizer,
    common_prefix_length,
    generation_prompt,
    templated,
    templated_or_none,
)
from whence.errors import CorpusError

logger = logging.getLogger(__name__)

ALPACA_PREAMBLE = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
}  # https://github.com/tatsu-lab/stanford_alpaca; the key says whether there is an input
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """The text of an example before tokenisation."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Supervised stretches, in characters of `text`."""
    special: bool
    """Whether the tokenizer adds its special tokens (a chat template has written them already)."""
    closed: bool
    """Whether the text ends with the end-of-sequence token, supervised."""
    last: int = 1
    """How many of the spans, from the end, are the last answer."""


def as_text(value: object) -> str:
    """Text or a number as text that any tokenizer takes.

    Raises:
        CorpusError: It is something else.
    """
    if not isinstance(value, str | int | float):
        raise CorpusError(f"a {type(value).__name__} stands where text is expected: {str(value)[:60]!r}")
    return str(value).encode("utf-8", "replace").decode()  # JSON may hold lone surrogates; no tokenizer takes them


def checked_messages(messages: object) -> Messages | None:
    """Messages with text that any tokenizer takes and the roles' own names; None if they, or one's content, are null.

    Raises:
        CorpusError: They have another form, or a message has a weight other than 0 and 1.
    """
    if messages is None:
        return None
    messages = turns_in(messages)
    if not are_turns(messages):
        raise CorpusError(f"{NOT_MESSAGES}; found {str(messages)[:60]!r}")
    texts = [message.get("content") for message in messages]
    if any(text is None and not calls_of(message) for text, message in zip(texts, messages, strict=True)):
        return None
    for message in messages:
        if message.get("weight") not in (None, 0, 1):
            raise CorpusError(f"a message has the weight {str(message['weight'])[:60]}; 0 or 1 is expected")
    return [
        message | {"role": role_of(message["role"])} | ({} if text is None else {"content": as_text(text)})
        for text, message in zip(texts, messages, strict=True)
    ]


def instruction(
    request: list[str],
    answer: str | None,
    tokenizer: Tokenizer,
    before: Messages | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> Rendered:
    """An instruction, perhaps with its input, and the answer; None leaves it open.

    Args:
        request: The instruction, or the instruction and the input.
        answer: What the assistant says.
        tokenizer: Its chat template lays the instruction out, the input on a line of its own as by LLaMA-Factory;
            without one it is in Alpaca's words.
        before: Messages that come before; what the assistant says in them is supervised too, as by LLaMA-Factory.
        tools: Tools that the assistant may call.
    """
    earlier = before or []
    if not (tokenizer.chat_template or earlier or tools):
        return _alpaca(request, answer)
    content = "\n".join(request) if tokenizer.chat_template else "\n\n### Input:\n".join(request)
    turns = [*earlier, {"role": "user", "content": content}]
    message = None if answer is None else {"role": "assistant", "content": answer}
    return answered(turns, message, tokenizer, tools)


def answered(
    turns: Messages,
    answer: dict[str, Any] | None,
    tokenizer: Tokenizer,
    tools: list[dict[str, Any]] | None = None,
) -> Rendered:
    """Messages and the assistant's answer to them; None leaves it open, and then nothing is supervised.

    Raises:
        CorpusError: As `conversation`.
    """
    if answer is not None:
        return conversation([*turns, answer], tokenizer, tools)
    if tokenizer.chat_template:
        return Rendered(templated(turns, tokenizer, opened=True, tools=tools), (), special=False, closed=False)
    return replace(conversation(turns, tokenizer, tools), spans=(), closed=False)


def said(message: dict[str, Any]) -> str:
    """What a message says as text, one piece a line: reasoning, content, and the tools that it calls as JSON.

    >>> said({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]})
    '[{"function": {"name": "f"}}]'
    """
    return "\n".join(map(as_text, pieces_of(message)))


def _alpaca(request: list[str], answer: str | None) -> Rendered:
    sections = [ALPACA_PREAMBLE[len(request) > 1], f"### Instruction:\n{request[0]}"]
    sections += [f"### Input:\n{request[1]}"] if len(request) > 1 else []
    prompt = "\n\n".join([*sections, "### Response:\n"])
    text = prompt + (answer or "")
    spans = () if answer is None else ((len(prompt), len(text)),)
    return Rendered(text, spans, special=True, closed=answer is not None)


def conversation(messages: Messages, tokenizer: Tokenizer, tools: list[dict[str, Any]] | None = None) -> Rendered:
    """Messages in the tokenizer's chat template, with the tools that the assistant may call; else in Alpaca's layout.

    Raises:
        CorpusError: The template refuses them or writes no answer, or there is none and Alpaca has no words for them.
    """
    if not tokenizer.chat_template:
        if tools:
            raise CorpusError(
                "the row has `tools`, and the tokenizer has no chat template to write them. Give one: --chat-template."
            )
        return _plain_conversation(messages, tokenizer)
    if messages[0]["role"] == "assistant":
        raise CorpusError("the first message is the assistant's: a chat template needs one before it to answer.")
    weights = [message.get("weight") for message in messages]
    silent = [message.get(SILENT, ()) for message in messages]
    messages = [{key: value for key, value in message.items() if key not in ("weight", SILENT)} for message in messages]
    text = templated(messages, tokenizer, tools=tools)
    model = str(tokenizer.name_or_path) or "the tokenizer"
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    written = [number for number in turns if _writes_calls(messages, number, tokenizer, tools, model)]
    spans = {number: span for number in written if (span := _turn_span(text, messages, number, tokenizer, tools))}
    nonempty = [number for number in written if messages[number].get("content") or calls_of(messages[number])]
    if nonempty and not spans:
        raise CorpusError(
            "the tokenizer's chat template leaves out what the assistant says, so nothing would be supervised. "
            "Give another with --chat-template, or the rows as `prompt` and `completion`."
        )
    _warn_of_what_is_left_out(text, messages, tools, tokenizer, model)
    if len(spans) < len(nonempty):
        _warn(model, "assistant")
    answers = [_trained(text, spans[n], str(messages[n].get("content")), silent[n]) for n in spans if weights[n] != 0]
    last = len(answers[-1]) if answers else 0
    return Rendered(text, tuple(itertools.chain(*answers)), special=False, closed=False, last=last)


def _trained(
    text: str, span: tuple[int, int], content: str, silent: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """What is supervised of a turn's characters: all but the parts of its content that are not trained on.

    Raises:
        CorpusError: There are such parts, and the template does not write the content as it stands.
    """
    if not silent:
        return [span]
    place = text.rfind(content, *span)
    if place < 0:
        raise CorpusError(
            "a message has parts that are not trained on, and the chat template writes another text than theirs. Write "
            "the row as `segments`."
        )
    edges = [span[0], *(place + edge for stretch in silent for edge in stretch), span[1]]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _writes_calls(messages: Messages, number: int, tokenizer: Tokenizer, tools: Any, model: str) -> bool:
    """Whether the assistant's turn says something in this template: its text, or the tools that it calls."""
    message = messages[number]
    if not calls_of(message):
        return True
    silent = {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
    silent["content"] = message.get("content") or ""
    with_calls = templated_or_none(messages[: number + 1], tokenizer, tools=tools)
    if with_calls is None or with_calls != templated_or_none([*messages[:number], silent], tokenizer, tools=tools):
        return True
    _warn(model, "assistant's tool calls")
    return bool(silent["content"])


def _turn_span(text: str, messages: Messages, number: int, tokenizer: Tokenizer, tools: Any) -> tuple[int, int] | None:
    """Characters of the assistant's turn `number` in the text: from the generation prompt to the end of its closing.

    A template may write an earlier turn differently once later ones follow (Qwen3 leaves its reasoning out, gpt-oss
    closes it with another marker), or write a generation prompt that no turn begins with (DeepSeek-R1's `<think>`).
    Then `_span_by_substitution` looks for the turn in the whole text. None means that the turn is not there.
    """
    before = templated_or_none(messages[:number], tokenizer, opened=True, tools=tools)
    is_last = number + 1 == len(messages)
    through = text if is_last else templated_or_none(messages[: number + 1], tokenizer, tools=tools)
    if before is None or through is None or not (text.startswith(through.rstrip()) and through.startswith(before)):
        return _span_by_substitution(text, messages, number, tokenizer, tools)
    turn = _to_its_end(through[len(before) :], tokenizer)
    content = str(messages[number].get("content") or "").rstrip()
    end = len(before) + len(turn)
    if not is_last and content and turn.rstrip().endswith(content):  # the last turn of a conversation is left open
        end += len(_closing(text, end, messages, number, tokenizer, tools))
    return (len(before), end) if end > len(before) else None


def _span_by_substitution(
    text: str, messages: Messages, number: int, tokenizer: Tokenizer, tools: Any
) -> tuple[int, int] | None:
    """Characters of a turn, found by rendering another word in its place: what differs is what the assistant says.

    So nothing that the template writes before the turn is supervised, but for what follows the generation prompt, such
    as gpt-oss' channel. None means that the template leaves the turn out or writes it twice.
    """
    word = _new_word(text)
    through = [*messages[:number], {"role": "assistant", "content": word}]
    other = templated_or_none([*through, *messages[number + 1 :]], tokenizer, tools=tools)
    if other is None or other.count(word) != 1:  # None: for instance a tool's answer to a turn that now calls no tool
        return None
    start = common_prefix_length(text, other)
    before = templated_or_none(messages[:number], tokenizer, opened=True, tools=tools)
    if before is not None and text.startswith(before):
        start = min(
            start, len(before)
        )  # what lies between the prompt and the words is the model's, as gpt-oss' channel
    end = max(start, len(text) - common_prefix_length(text[::-1], other[::-1]))
    end += len(_closing(text, end, messages, number, tokenizer, tools))
    return (start, end) if end > start else None


def _closing(text: str, end: int, messages: Messages, number: int, tokenizer: Tokenizer, tools: Any) -> str:
    """The marker by which a turn that says its last word at `end` is closed there; empty if there is none.

    It is what the template writes behind a turn at the end of a conversation, or behind one that another turn is to
    follow, without the prompt of that turn. A template may refuse such pieces of a conversation; an end-of-sequence
    token that stands there closes the turn all the same.
    """
    word = _new_word(text)
    through = [*messages[:number], {"role": "assistant", "content": word}]
    closings = [str(tokenizer.eos_token or "")]
    closings.append((templated_or_none(through, tokenizer, tools=tools) or "").partition(word)[2])
    if not text.startswith(closings[-1].rstrip("\n") or "\0", end):
        followed = templated_or_none(through, tokenizer, opened=True, tools=tools) or ""
        opening = generation_prompt(messages[:number], tokenizer, tools)
        if opening and followed.endswith(opening):
            closings.append(followed.removesuffix(opening).partition(word)[2])
    ends = [_to_its_end(closing, tokenizer) for closing in closings]
    return max((closing for closing in ends if text.startswith(closing, end)), key=len, default="")


def _to_its_end(turn: str, tokenizer: Tokenizer) -> str:
    """A turn without what a template writes behind it and no model does: line breaks, and blanks behind the end."""
    ended = turn.rstrip()
    return ended if tokenizer.eos_token and ended.endswith(str(tokenizer.eos_token)) else turn.rstrip("\n")


def _new_word(text: str) -> str:
    """A letter that a text does not have, of Unicode's private use."""
    return next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in text)


def _warn_of_what_is_left_out(text: str, messages: Messages, tools: Any, tokenizer: Tokenizer, model: str) -> None:
    """Name whose words a template leaves out, as Qwen3's does with the reasoning of all turns but the last."""
    if tools and "tools" not in str(tokenizer.chat_template):
        _warn(model, "list of tools")
    for message in messages:
        for key in ("content", *REASONING):
            said = message.get(key)
            if isinstance(said, str) and not (said.strip() in text or json.dumps(said.strip())[1:-1] in text):
                _warn(model, str(message["role"]))


@functools.cache  # once per process and model, not once per row
def _warn(model: str, what: str) -> None:
    logger.warning(
        "%s: its chat template leaves out some of what the rows hold (of the %s); only what it writes is read and "
        "supervised. If the model was trained with another template, as TRL does for Qwen3, give it: --chat-template.",
        model,
        what,
    )


def _plain_conversation(messages: Messages, tokenizer: Tokenizer) -> Rendered:
    """Messages in Alpaca's template, for a tokenizer without one: the system's turn replaces the preamble.

    Raises:
        CorpusError: A message is a tool's answer or calls a tool, for which Alpaca has no words.
    """
    text, spans = "", []
    is_closed = False
    for message in messages:
        _refuse_tools(message)
        for key in REASONING:
            if message.get(key):
                _warn_of_key(str(tokenizer.name_or_path) or "the tokenizer", key)
        content = as_text(message.get("content") or "")
        is_closed = False
        if message["role"] == "system":
            text += ("" if text.endswith("\n\n") or not text else "\n\n") + f"{content}\n\n"
        elif message["role"] == "assistant":
            if message.get("weight") != 0:
                spans.append((len(text), len(text) + len(content)))
                is_closed = True
            text += content
        else:
            opening = "" if text.endswith("\n\n") else "\n\n" if text else f"{ALPACA_PREAMBLE[False]}\n\n"
            text += f"{opening}### Instruction:\n{content}\n\n### Response:\n"
    return Rendered(text, tuple(spans), special=True, closed=is_closed)


@functools.cache
def _warn_of_key(model: str, key: str) -> None:
    logger.warning(
        "%s: without a chat template the `%s` of messages is not read, and no part of the text that is trained on. If "
        "the model saw it, give the template that wrote it: --chat-template.",
        model,
        key,
    )


def _refuse_tools(message: dict[str, Any]) -> None:
    calls = next((name for name in ("tool_calls", "function_call") if message.get(name)), None)
    if calls or message["role"] not in ("system", "user", "assistant"):
        problem = f"`{calls}`" if calls else f"the role {str(message['role'])!r}"
        raise CorpusError(
            f"a message has {problem}, and the tokenizer has no chat template: without one there are words for the "
            "text of system, user and assistant alone. Give the model's tokenizer a template, or leave such rows out."
        )
