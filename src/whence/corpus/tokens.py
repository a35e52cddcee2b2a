"""Examples to token ids, and which of them are supervised; batches of like length under a token budget.

A causal model at position t predicts token t + 1. `supervised[t]` says that token t is a *target*: its loss is read
from the logits at t - 1. The first token is never a target. (RapidIn's released code compares logits and labels at
the same position, so it differentiates "repeat this token"; see research/less_rapidin.md, 2.2.)

What is supervised, by layout: all of a `text`; of `prompt` and `completion`, joined as they stand, the completion
and the closing end-of-sequence token; of `instruction` rows and `messages`, what the assistant says and the tokens
that close its turn. A token that straddles the boundary holds characters of the answer and is supervised. Chat
templates may leave out some of what was said in earlier turns, such as what was thought: a conversation is what its
template makes of it as a whole, as it was trained on, and of each turn what stands there is supervised.

Boundaries are found in characters, from the tokenizer's offsets over the text as a whole, so that what is indexed
is tokenised as it was trained on. (Tokenising prompt and completion apart gives other tokens at the joint.)
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

logger = logging.getLogger(__name__)

Tokenizer = Any  # a transformers tokenizer; its classes share no useful static type

ALPACA_PREAMBLE = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
}  # https://github.com/tatsu-lab/stanford_alpaca, by whether there is an input


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example."""

    ids: list[int]
    supervised: list[bool]
    """As long as `ids`: this token is a target. Never the first."""
    cut: int = 0
    """Tokens left out because the row was longer than allowed: from the left of a prompt, the right of a text."""
    completion_cut: int = 0
    """Of those, supervised tokens of an answer that alone is longer than allowed."""

    @property
    def targets(self) -> int:
        """Number of supervised tokens."""
        return sum(self.supervised)


@dataclass(frozen=True)
class Rendered:
    """The text of an example before tokenisation."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Supervised stretches, in characters of `text`."""
    special: bool
    """Let the tokenizer add its own special tokens (a chat template has written them already)."""
    closed: bool
    """End with the end-of-sequence token, supervised."""


def encode(row: Row, tokenizer: Tokenizer, max_tokens: int | None = None) -> Encoded:
    """Token ids of a row and which of them are supervised.

    Args:
        row: In one of the layouts of `corpus.LAYOUTS`. A null where text is expected supervises nothing.
        tokenizer: Of the model that will read the ids.
        max_tokens: Longest allowed. A longer row loses the left of its prompt (a leading beginning-of-sequence
            token stays), a longer `text` its right. An answer that alone is too long keeps its beginning.

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
        asked = [_string(row[name]) for name in ("instruction", "input") if row.get(name) not in (None, "")] or [""]
        return _instruction(asked, _string(row["output"]), tokenizer)
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
    """Bytes of a row's supervised text in UTF-8, whatever a tokenizer closes it with.

    Raises:
        CorpusError: As `encode`.
    """
    rendered = render(row, tokenizer)
    if rendered is None:
        return 0
    return sum(len(rendered.text[start:end].encode("utf-8", "replace")) for start, end in rendered.spans)


def encode_prompt(prompt: str, tokenizer: Tokenizer, *, chat: bool) -> list[int]:
    """Ids that a model is given to continue: `prompt` as it stands, or as the user's turn of a conversation."""
    prompt = _string(prompt)
    text = _instruction([prompt], None, tokenizer) if chat else Rendered(prompt, (), special=True, closed=False)
    ids = tokenizer(text.text, add_special_tokens=text.special)["input_ids"]
    closing = tokenizer.eos_token_id
    return ids[:-1] if ids and ids[-1] == closing and not text.text.endswith(str(tokenizer.eos_token)) else ids


def encode_query(prompt: str, completion: str, tokenizer: Tokenizer, *, kind: str) -> Encoded:
    """Ids of a prompt and its completion, laid out like the rows of a corpus whose layout is `kind`.

    Only the completion is supervised. It is closed as a row of that layout is, except in a `text` corpus, where a
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
    """Messages whose text any tokenizer takes; None where a null stands for them or for what one of them says."""
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


def _instruction(asked: list[str], answer: str | None, tokenizer: Tokenizer) -> Rendered:
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "\n\n".join(asked)}]
        if answer is None:
            return Rendered(_templated(turns, tokenizer, opened=True), (), special=False, closed=False)
        return _conversation([*turns, {"role": "assistant", "content": answer}], tokenizer)
    parts = [ALPACA_PREAMBLE[len(asked) > 1], f"### Instruction:\n{asked[0]}"]
    parts += [f"### Input:\n{asked[1]}"] if len(asked) > 1 else []
    prompt = "\n\n".join([*parts, "### Response:\n"])
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
    found = [span for number in turns if (span := _turn(text, messages, number, tokenizer))]
    said = [number for number in turns if messages[number].get("content") or messages[number].get("tool_calls")]
    if said and not found:
        raise CorpusError(
            "the tokenizer's chat template leaves out what the assistant says, so nothing would be supervised. "
            "Give the rows as `prompt` and `completion`."
        )
    if len(found) < len(said):
        _tell_dropped(str(tokenizer.name_or_path))
    return Rendered(text, tuple(found), special=False, closed=False)


def _templated(messages: list[dict[str, Any]], tokenizer: Tokenizer, *, opened: bool = False) -> str:
    """Messages as the tokenizer's chat template writes them; `opened` for the assistant to go on."""
    from jinja2 import TemplateError  # of a template that raises on roles it does not take

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        raise CorpusError(f"the tokenizer's chat template refuses these messages: {error}") from None


def _templated_if_taken(messages: list[dict[str, Any]], tokenizer: Tokenizer, *, opened: bool = False) -> str | None:
    """As `_templated`; None where a template refuses what is but a part of a conversation that it takes."""
    try:
        return _templated(messages, tokenizer, opened=opened)
    except CorpusError:
        return None


def _turn(text: str, messages: list[dict[str, Any]], number: int, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Characters of the assistant's turn `number` in the whole: from the generation prompt to the end of its closing.

    A template may write an earlier turn differently once later ones follow (Qwen3 leaves out what was thought), or
    write a generation prompt that no turn begins with (DeepSeek-R1's `<think>`). Then the turn is looked for in the
    whole by `_located`. None: it is not there.
    """
    before = _templated_if_taken(messages[:number], tokenizer, opened=True)
    is_last = number + 1 == len(messages)
    through = text if is_last else _templated_if_taken(messages[: number + 1], tokenizer)
    if before is None or through is None or not (text.startswith(through.rstrip()) and through.startswith(before)):
        return _located(text, messages, number, tokenizer)
    closing = through[len(before) :].rstrip("\n")  # the newline after the turn's end is not the model's to say
    return (len(before), len(before) + len(closing)) if closing else None


def _located(text: str, messages: list[dict[str, Any]], number: int, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Characters of a turn, found by rendering another word in its place: what differs is what the assistant says.

    So nothing that the template writes before the turn is supervised. What closes it is, where it closes a
    conversation that ends there in the same way. None: the template leaves the turn out, or writes it twice.
    """
    word = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in text)  # for private use
    part = [*messages[:number], {"role": "assistant", "content": word}]
    other = _templated_if_taken([*part, *messages[number + 1 :]], tokenizer)
    if other is None or other.count(word) != 1:  # None: such as a tool's answer to what now calls none
        return None
    start = _shared(text, other)
    end = max(start, len(text) - _shared(text[::-1], other[::-1]))
    closing = (_templated_if_taken(part, tokenizer) or "").partition(word)[2].rstrip("\n")
    end += len(closing) if text.startswith(closing, end) else 0
    return (start, end) if end > start else None


def _shared(one: str, two: str) -> int:
    """Characters with which both begin."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(two)))


@functools.cache  # once a process and model, not once a row
def _tell_dropped(name: str) -> None:
    logger.warning(
        "%s: its chat template leaves out some of what the assistant says before the last turn; only what it writes "
        "is supervised",
        name or "the tokenizer",
    )


def _plain_conversation(messages: list[dict[str, Any]]) -> Rendered:
    """Messages in Alpaca's words, for a tokenizer without a template: the system's turn replaces the preamble.

    Raises:
        CorpusError: Alpaca has no words for a tool's answer, nor for a call of one.
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
        found = f"`{calls}`" if calls else f"the role {str(message['role'])!r}"
        raise CorpusError(
            f"a message has {found}, and the tokenizer has no chat template: without one there are words for the text "
            "of system, user and assistant alone. Give the model's tokenizer a template, or leave such rows out."
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
    """A token of characters [start, end) has some of the span [begin, stop)."""
    if start < end:
        return start < stop and end > begin
    # A tokenizer that trims its offsets leaves a token of spaces no length, at its end. At 0 are the special
    # tokens that it puts first.
    return begin < end <= stop or begin == end == 0


def _with_offsets(rendered: Rendered, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    if tokenizer.is_fast:
        out = tokenizer(rendered.text, add_special_tokens=rendered.special, return_offsets_mapping=True)
        return out["input_ids"], out["offset_mapping"]
    # Without offsets: a token's place is where the ids of the text up to a boundary stop agreeing with the whole.
    ids = tokenizer(rendered.text, add_special_tokens=rendered.special)["input_ids"]
    marks = sorted({0, len(rendered.text), *(edge for span in rendered.spans for edge in span)})
    offsets: list[tuple[int, int]] = []
    for begin, end in itertools.pairwise(marks):
        prefix = tokenizer(rendered.text[:end], add_special_tokens=rendered.special)["input_ids"]
        whole = end == len(rendered.text)
        same = next((k for k, pair in enumerate(zip(prefix, ids, strict=False)) if pair[0] != pair[1]), len(prefix))
        offsets += [(begin, end)] * ((len(ids) if whole else same) - len(offsets))
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
    context = 1 - opening  # what must stay in front of the first target, so that something predicts it
    room = max(supervised.index(True) - opening - context, 0)
    start = opening + min(excess, room)
    kept, marks = ids[:opening] + ids[start:], supervised[:opening] + supervised[start:]
    lost = sum(marks[max_tokens:])
    return Encoded(kept[:max_tokens], marks[:max_tokens], cut=excess, completion_cut=lost)


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to one length."""

    ids: Int64[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    """Real tokens, not padding."""
    supervised: Bool[Tensor, "b t"]
    """Targets; see the module's text."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.supervised.to(device))


def collate(examples: Sequence[Encoded], pad_id: int = 0) -> Batch:
    """Pad examples on the right to the longest of them. Which id pads does not matter: no real token sees it."""
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
    """Positions grouped into batches of like length, each at most `tokens_per_batch` with its padding.

    Longest first, so that a build that will not fit in memory fails at once. A single row above the budget
    is a batch of its own. Equal lengths keep their order, so the same rows always give the same batches.

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
