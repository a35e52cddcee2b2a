"""Token ids of examples and which of them are supervised; batches of similar length under a token budget.

A causal model at position t predicts token t + 1. `supervised[t]` says that token t is supervised: its loss is read
from the logits at t - 1. The first token is never supervised, since nothing predicts it. (RapidIn's released code
compares logits and labels at the same position, so it differentiates "repeat this token"; see
research/less_rapidin.md, 2.2.)

The layout decides what is supervised: all of a `text`; the completion and the closing end-of-sequence token of a
`prompt` and `completion`, which are joined as they stand; what the assistant says and the tokens that close its turn
in `instruction` rows and `messages`. A token that straddles the boundary holds characters of the answer and is
supervised. A chat template may leave out some of an earlier turn, such as its reasoning: a conversation is what its
template makes of it as a whole, as in training, and what stands there of each assistant's turn is supervised.

Boundaries are found in characters, from the tokenizer's offsets over the whole text, so that an example is tokenised
as it was in training. (Tokenising prompt and completion separately gives other tokens where they meet.)
"""

import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from whence.corpus.layouts import Row, layout
from whence.errors import CorpusError
from whence.turns import one_at_a_time

logger = logging.getLogger(__name__)

Tokenizer = Any  # a transformers tokenizer; its classes share no useful static type

ALPACA_PREAMBLE = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
}  # https://github.com/tatsu-lab/stanford_alpaca; the key says whether there is an input


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example."""

    ids: list[int]
    supervised: list[bool]
    """Whether each token of `ids` is supervised; the first never is."""
    cut: int = 0
    """Tokens left out because the row is too long: from the left of a prompt, from the right of a text."""
    completion_cut: int = 0
    """Supervised tokens among them, of an answer that is too long by itself."""

    @property
    def supervised_count(self) -> int:
        """Number of supervised tokens."""
        return sum(self.supervised)


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


@one_at_a_time
def encode(row: Row, tokenizer: Tokenizer, max_tokens: int | None = None) -> Encoded:
    """Token ids of a row and which of them are supervised.

    Args:
        row: A row in one of the layouts of `layouts.LAYOUTS`. A null where text is expected supervises nothing.
        tokenizer: The tokenizer of the model that will read the ids.
        max_tokens: Longest allowed. A longer row loses the left of its prompt (a leading beginning-of-sequence
            token stays), a longer `text` its right. An answer that is too long by itself keeps its beginning.

    Raises:
        CorpusError: The row has none of the layouts, or the chat template refuses its messages.
    """
    rendered = render(row, tokenizer)
    if rendered is None:
        return Encoded([], [])
    ids, supervised = _tokenised(rendered, tokenizer)
    return _truncated(ids, supervised, max_tokens, keep_left=layout(row) == "text", tokenizer=tokenizer)


def render(row: Row, tokenizer: Tokenizer) -> Rendered | None:
    """Text of a row with its supervised spans; None where a null stands for text."""
    kind = layout(row)
    if kind == "messages":
        messages = _messages(row["messages"])
        return _conversation(messages, tokenizer) if messages else None
    if kind == "instruction":
        if row["instruction"] is None or row["output"] is None:
            return None
        request = [_string(row[name]) for name in ("instruction", "input") if row.get(name) not in (None, "")] or [""]
        return _instruction(request, _string(row["output"]), tokenizer)
    if kind == "prompt":
        if row["prompt"] is None or row["completion"] is None:
            return None
        prompt, completion = _string(row["prompt"]), _string(row["completion"])
        text = prompt + completion
        return Rendered(text, ((len(prompt), len(text)),), special=True, closed=True)
    if row["text"] is None:
        return None
    text = _string(row["text"])
    return Rendered(text, ((0, len(text)),), special=True, closed=True)


def supervised_bytes(row: Row, tokenizer: Tokenizer) -> int:
    """Bytes of a row's supervised text in UTF-8, without the token that closes it.

    Raises:
        CorpusError: As `encode`.
    """
    rendered = render(row, tokenizer)
    if rendered is None:
        return 0
    return sum(len(rendered.text[start:end].encode("utf-8", "replace")) for start, end in rendered.spans)


@one_at_a_time
def encode_prompt(prompt: str, tokenizer: Tokenizer, *, chat: bool) -> list[int]:
    """Token ids for a model to continue: `prompt` as it stands, or as the user's turn of a conversation."""
    prompt = _string(prompt)
    text = _instruction([prompt], None, tokenizer) if chat else Rendered(prompt, (), special=True, closed=False)
    ids = tokenizer(text.text, add_special_tokens=text.special)["input_ids"]
    closing = tokenizer.eos_token_id
    return ids[:-1] if ids and ids[-1] == closing and not text.text.endswith(str(tokenizer.eos_token)) else ids


@one_at_a_time
def encode_query(prompt: str, completion: str, tokenizer: Tokenizer, *, kind: str) -> Encoded:
    """Token ids of a prompt and its completion, in the layout `kind` of a corpus' rows.

    Only the completion is supervised. It is closed like a row of that layout, except in a `text` corpus, where a
    completion is a stretch of running text.
    """
    prompt, completion = _string(prompt), _string(completion)
    if kind in ("instruction", "messages"):
        rendered = _instruction([prompt], completion, tokenizer)
    else:
        text = prompt + completion
        rendered = Rendered(text, ((len(prompt), len(text)),), special=True, closed=kind == "prompt")
    return Encoded(*_tokenised(rendered, tokenizer))


def _string(value: object) -> str:
    if not isinstance(value, str | int | float):
        raise CorpusError(f"a {type(value).__name__} stands where text is expected: {str(value)[:60]!r}")
    return str(value).encode("utf-8", "replace").decode()  # JSON may hold lone surrogates; no tokenizer takes them


def _messages(messages: object) -> list[dict[str, Any]] | None:
    """Messages with text that any tokenizer takes; None if they, or the content of one, are null."""
    if messages is None:
        return None
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and "role" in message for message in messages
    ):
        raise CorpusError(f"messages are a list of objects with `role` and `content`; found {str(messages)[:60]!r}")
    texts = [message.get("content") for message in messages]
    if any(text is None and not message.get("tool_calls") for text, message in zip(texts, messages, strict=True)):
        return None
    return [
        message if text is None else message | {"content": _string(text)}
        for text, message in zip(texts, messages, strict=True)
    ]


def _instruction(request: list[str], answer: str | None, tokenizer: Tokenizer) -> Rendered:
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "\n\n".join(request)}]
        if answer is None:
            return Rendered(_templated(turns, tokenizer, opened=True), (), special=False, closed=False)
        return _conversation([*turns, {"role": "assistant", "content": answer}], tokenizer)
    sections = [ALPACA_PREAMBLE[len(request) > 1], f"### Instruction:\n{request[0]}"]
    sections += [f"### Input:\n{request[1]}"] if len(request) > 1 else []
    prompt = "\n\n".join([*sections, "### Response:\n"])
    text = prompt + (answer or "")
    spans = () if answer is None else ((len(prompt), len(text)),)
    return Rendered(text, spans, special=True, closed=answer is not None)


def _conversation(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> Rendered:
    if not tokenizer.chat_template:
        return _plain_conversation(messages)
    if messages[0]["role"] == "assistant":
        raise CorpusError("the first message is the assistant's: a chat template needs one before it to answer.")
    text = _templated(messages, tokenizer)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [span for number in turns if (span := _turn_span(text, messages, number, tokenizer))]
    nonempty = [number for number in turns if messages[number].get("content") or messages[number].get("tool_calls")]
    if nonempty and not spans:
        raise CorpusError(
            "the tokenizer's chat template leaves out what the assistant says, so nothing would be supervised. "
            "Give the rows as `prompt` and `completion`."
        )
    if len(spans) < len(nonempty):
        _warn_of_dropped_turns(str(tokenizer.name_or_path))
    return Rendered(text, tuple(spans), special=False, closed=False)


def _templated(messages: list[dict[str, Any]], tokenizer: Tokenizer, *, opened: bool = False) -> str:
    """Messages as the tokenizer's chat template writes them; `opened` adds the prompt for the assistant's turn."""
    from jinja2 import TemplateError  # raised by a template that refuses a role

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        raise CorpusError(f"the tokenizer's chat template refuses these messages: {error}") from None


def _templated_or_none(messages: list[dict[str, Any]], tokenizer: Tokenizer, *, opened: bool = False) -> str | None:
    """As `_templated`; None if the template refuses these messages, which are only a piece of a conversation."""
    try:
        return _templated(messages, tokenizer, opened=opened)
    except CorpusError:
        return None


def _turn_span(text: str, messages: list[dict[str, Any]], number: int, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Characters of the assistant's turn `number` in the text: from the generation prompt to the end of its closing.

    A template may write an earlier turn differently once later ones follow (Qwen3 leaves its reasoning out), or write
    a generation prompt that no turn begins with (DeepSeek-R1's `<think>`). Then `_span_by_substitution` looks for the
    turn in the whole text. None means that the turn is not there.
    """
    before = _templated_or_none(messages[:number], tokenizer, opened=True)
    is_last = number + 1 == len(messages)
    through = text if is_last else _templated_or_none(messages[: number + 1], tokenizer)
    if before is None or through is None or not (text.startswith(through.rstrip()) and through.startswith(before)):
        return _span_by_substitution(text, messages, number, tokenizer)
    closing = through[len(before) :].rstrip("\n")  # the model does not write the newline after its turn
    return (len(before), len(before) + len(closing)) if closing else None


def _span_by_substitution(
    text: str, messages: list[dict[str, Any]], number: int, tokenizer: Tokenizer
) -> tuple[int, int] | None:
    """Characters of a turn, found by rendering another word in its place: what differs is what the assistant says.

    So nothing that the template writes before the turn is supervised. Its closing is supervised if a conversation that
    ends with this turn is closed in the same way. None means that the template leaves the turn out or writes it twice.
    """
    word = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in text)  # Unicode's private use
    through = [*messages[:number], {"role": "assistant", "content": word}]
    other = _templated_or_none([*through, *messages[number + 1 :]], tokenizer)
    if other is None or other.count(word) != 1:  # None: for instance a tool's answer to a turn that now calls no tool
        return None
    start = _common_prefix_length(text, other)
    end = max(start, len(text) - _common_prefix_length(text[::-1], other[::-1]))
    closing = (_templated_or_none(through, tokenizer) or "").partition(word)[2].rstrip("\n")
    end += len(closing) if text.startswith(closing, end) else 0
    return (start, end) if end > start else None


def _common_prefix_length(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


@functools.cache  # once per process and model, not once per row
def _warn_of_dropped_turns(name: str) -> None:
    logger.warning(
        "%s: its chat template leaves out some of what the assistant says before the last turn; only what it writes "
        "is supervised",
        name or "the tokenizer",
    )


def _plain_conversation(messages: list[dict[str, Any]]) -> Rendered:
    """Messages in Alpaca's template, for a tokenizer without one: the system's turn replaces the preamble.

    Raises:
        CorpusError: A message is a tool's answer or calls a tool, for which Alpaca has no words.
    """
    text, spans = "", []
    for message in messages:
        _refuse_tools(message)
        content = _string(message.get("content") or "")
        if message["role"] == "system":
            text += ("" if text.endswith("\n\n") or not text else "\n\n") + f"{content}\n\n"
        elif message["role"] == "assistant":
            spans.append((len(text), len(text) + len(content)))
            text += content
        else:
            opening = "" if text.endswith("\n\n") else "\n\n" if text else f"{ALPACA_PREAMBLE[False]}\n\n"
            text += f"{opening}### Instruction:\n{content}\n\n### Response:\n"
    return Rendered(text, tuple(spans), special=True, closed=bool(spans) and spans[-1][1] == len(text))


def _refuse_tools(message: dict[str, Any]) -> None:
    calls = next((name for name in ("tool_calls", "function_call") if message.get(name)), None)
    if calls or message["role"] not in ("system", "user", "assistant"):
        problem = f"`{calls}`" if calls else f"the role {str(message['role'])!r}"
        raise CorpusError(
            f"a message has {problem}, and the tokenizer has no chat template: without one there are words for the "
            "text of system, user and assistant alone. Give the model's tokenizer a template, or leave such rows out."
        )


def _tokenised(rendered: Rendered, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    ids, offsets = _with_offsets(rendered, tokenizer)
    supervised = [any(_overlap(*offset, *span) for span in rendered.spans) for offset in offsets]
    if rendered.closed and tokenizer.eos_token_id is not None:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids, supervised = [*ids, tokenizer.eos_token_id], [*supervised, True]
        supervised[-1] = True
    if supervised:
        supervised[0] = False
    return ids, supervised


def _overlap(start: int, end: int, begin: int, stop: int) -> bool:
    """Whether a token of characters [start, end) holds some of the span [begin, stop)."""
    if start < end:
        return start < stop and end > begin
    # A tokenizer that trims its offsets gives a token of spaces the length 0, at its end. The special tokens that a
    # tokenizer puts first lie at 0.
    return begin < end <= stop or begin == end == 0


def _with_offsets(rendered: Rendered, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    if tokenizer.is_fast:
        out = tokenizer(rendered.text, add_special_tokens=rendered.special, return_offsets_mapping=True)
        return out["input_ids"], out["offset_mapping"]
    # Without offsets, a boundary is where the ids of the text up to it stop agreeing with the ids of the whole text.
    ids = tokenizer(rendered.text, add_special_tokens=rendered.special)["input_ids"]
    marks = sorted({0, len(rendered.text), *(edge for span in rendered.spans for edge in span)})
    offsets: list[tuple[int, int]] = []
    for begin, end in itertools.pairwise(marks):
        prefix = tokenizer(rendered.text[:end], add_special_tokens=rendered.special)["input_ids"]
        is_last = end == len(rendered.text)
        same = next((k for k, pair in enumerate(zip(prefix, ids, strict=False)) if pair[0] != pair[1]), len(prefix))
        offsets += [(begin, end)] * ((len(ids) if is_last else same) - len(offsets))
    return ids, offsets + [(0, 0)] * (len(ids) - len(offsets))


def _truncated(
    ids: list[int], supervised: list[bool], max_tokens: int | None, *, keep_left: bool, tokenizer: Tokenizer
) -> Encoded:
    excess = 0 if max_tokens is None else len(ids) - max_tokens
    if excess <= 0 or max_tokens is None:
        return Encoded(ids, supervised)
    if keep_left or True not in supervised:
        return Encoded(ids[:max_tokens], supervised[:max_tokens], cut=excess)
    opening = 1 if ids[0] == tokenizer.bos_token_id else 0
    context = 1 - opening  # what must stay before the first supervised token, so that something predicts it
    room = max(supervised.index(True) - opening - context, 0)
    start = opening + min(excess, room)
    ids, supervised = ids[:opening] + ids[start:], supervised[:opening] + supervised[start:]
    lost = sum(supervised[max_tokens:])
    return Encoded(ids[:max_tokens], supervised[:max_tokens], cut=excess, completion_cut=lost)


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to one length."""

    ids: Int64[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    """True for tokens, False for padding."""
    supervised: Bool[Tensor, "b t"]
    """Whether each token is supervised; see the module's text."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.supervised.to(device))


def collate(examples: Sequence[Encoded], pad_id: int = 0) -> Batch:
    """Pad examples on the right to the longest of them. Any id can pad, since no token attends to padding."""
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    supervised = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = True
        supervised[row, :length] = torch.tensor(example.supervised)
    return Batch(ids, mask, supervised)


def bucketed(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Positions grouped into batches of similar length, each of at most `tokens_per_batch` tokens with its padding.

    The longest come first, so that a build that does not fit in memory fails at once. A single row above the budget is
    a batch of its own. Equal lengths keep their order, so that the same rows always give the same batches.

    >>> bucketed([3, 9, 4, 1], 8)
    [[1], [2, 0], [3]]
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches
