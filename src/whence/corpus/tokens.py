"""Token ids of examples and which of them are supervised; batches of similar length under a token budget.

A causal model at position t predicts token t + 1. `supervised[t]` says that token t is supervised: its loss is read
from the logits at t - 1. The first token is never supervised, since nothing predicts it. (RapidIn's released code
compares logits and labels at the same position, so it differentiates "repeat this token"; see
research/less_rapidin.md, 2.2.)

The layout decides what is supervised: all of a `text`; the completion and the closing end-of-sequence token of a
`prompt` and `completion`, which are joined as they stand; what the assistant says and the tokens that close its turn
in `instruction` rows and `messages`. A token that straddles the boundary holds characters of the answer and is
supervised. A chat template may leave out some of an earlier turn, such as its reasoning: a conversation is what its
template makes of it as a whole, as in training, and what stands there of each assistant's turn is supervised. A text
that begins with the token that its tokenizer puts first is read with one of the two.

Boundaries are found in characters, from the tokenizer's offsets over the whole text, so that an example is tokenised
as it was in training. (Tokenising prompt and completion separately gives other tokens where they meet.)
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from whence.brief import brief
from whence.corpus.conversations import (
    Rendered,
    answered,
    as_text,
    checked_messages,
    conversation,
    instruction,
    said,
)
from whence.corpus.layouts import in_layout, is_rejected, segments_of, tools_of, turns_before
from whence.corpus.long_texts import kept_part
from whence.corpus.missing import without_missing
from whence.corpus.offsets import tokenised, with_offsets
from whence.corpus.preferences import CONTRAST, preferences_of
from whence.corpus.shapes import IGNORED, LAYOUTS, Row, rejected_side, shape_of
from whence.corpus.templates import ASSISTANT, LAST, Tokenizer, supervision
from whence.errors import CorpusError
from whence.turns import one_at_a_time

LAYOUT_VERSION = 4
"""Version of the rules by which rows become tokens. Version 1, which no index names, closed only the last turn under
some chat templates, knew no role `gpt`, read no `tools`, `system`, `history` and `weight`, took NaN for a word, and
read two beginnings. Version 2 read no `system` beside messages, and fewer shapes. Version 3 put an empty line between
an instruction and its input under a chat template, took `segments` for one text, read no `question` beside pairs of
answers, and supervised what a template writes behind the end-of-sequence token."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example."""

    __repr__ = brief

    ids: list[int]
    supervised: list[bool]
    """Whether each token of `ids` is supervised; the first never is."""
    cut: int = 0
    """Tokens left out because the row is too long: from the left of a prompt, from the right of a text.

    Of a text or a prompt that is much too long, at least so many: what is left out is not tokenised (`long_texts`).
    """
    completion_cut: int = 0
    """Supervised tokens among them, of an answer that is too long by itself; likewise."""
    prompt_cut: int = 0
    """Tokens among them of the left of a prompt."""
    rejected: "Encoded | None" = None
    """The answer against which this one is held, after the same prompt: the example's loss is the difference of the
    two losses (`preferences`). None: it is this one's."""

    @property
    def supervised_count(self) -> int:
        """Number of supervised tokens, of both answers where there are two."""
        return sum(self.supervised) + (0 if self.rejected is None else self.rejected.supervised_count)

    def is_same_as(self, other: "Encoded") -> bool:
        """Whether two answers are the same supervised tokens after the same prompt."""
        return (self.ids, self.supervised) == (other.ids, other.supervised)

    @property
    def positions(self) -> int:
        """Positions that the example takes of a batch: its tokens, or twice those of the longer of two sequences."""
        return len(self.ids) if self.rejected is None else 2 * max(len(self.ids), len(self.rejected.ids))


@one_at_a_time
def encode(row: Row, tokenizer: Tokenizer, max_tokens: int | None = None, *, preferences: str | None = None) -> Encoded:
    """Token ids of a row and which of them are supervised.

    Args:
        row: A row in one of `shapes.SHAPES`. A null where text is expected supervises nothing.
        tokenizer: The tokenizer of the model that will read the ids.
        max_tokens: Longest allowed. A longer row loses the left of its prompt (a leading beginning-of-sequence
            token stays), a longer `text` its right. An answer that is too long by itself keeps its beginning. Two
            answers follow the same prompt: each loses as much of its left as the one that loses more.
        preferences: One of `preferences.PREFERENCES`; None: the tokenizer's. Nothing is supervised of a contrast that
            lacks one answer, nor of one whose answers are the same tokens, which may be what a cut leaves of them.

    Raises:
        CorpusError: The row has none of the layouts, or the chat template refuses its messages.
    """
    rows = sides_of(without_missing(row), tokenizer, preferences)
    sides = [_encoded(side, tokenizer, max_tokens, is_side=len(rows) > 1) for side in rows]
    if len(sides) == 1:
        return sides[0]
    most = max(side.prompt_cut for side in sides)
    chosen, rejected = (_with_shorter_prompt(side, most - side.prompt_cut, tokenizer) for side in sides)
    if not (chosen.supervised_count and rejected.supervised_count) or chosen.is_same_as(rejected):
        return Encoded([], [])  # a difference of nothing would be ranked by its rounding
    cuts = (chosen.cut + rejected.cut, chosen.completion_cut + rejected.completion_cut)
    return Encoded(chosen.ids, chosen.supervised, *cuts, rejected=rejected)


def sides_of(row: Row, tokenizer: Tokenizer, preferences: str | None = None) -> list[Row]:
    """A row; or a contrast's preferred and rejected answers, each as a row. For `preferences` see `encode`."""
    if (preferences or preferences_of(tokenizer)) != CONTRAST or is_rejected(row):
        return [row]
    shape = shape_of(row, preferences=CONTRAST)
    other = rejected_side(row, shape)
    return [row] if other is None else [shape.read(row), other]


def _encoded(row: Row, tokenizer: Tokenizer, max_tokens: int | None, *, is_side: bool = False) -> Encoded:
    kind, columns = in_layout(row)
    if kind == "tokens":
        return _truncated(*token_ids_of(columns, tokenizer), max_tokens, keep_left=True, tokenizer=tokenizer)
    rendered = render(row, tokenizer)
    if rendered is None:
        return Encoded([], [])
    if kind == "segments":
        ids, supervised = _segment_ids(segments_of(columns) or [], tokenizer)
        return _truncated(ids, supervised, max_tokens, keep_left=True, tokenizer=tokenizer)
    keep_left = kind == "text"
    part = None if max_tokens is None else kept_part(rendered, tokenizer, max_tokens, keep_left=keep_left,
                                                     is_side=is_side)  # fmt: skip
    ids, supervised = tokenised(rendered, tokenizer) if part is None else part
    return _truncated(ids, supervised, max_tokens, keep_left=keep_left, tokenizer=tokenizer)


def render(row: Row, tokenizer: Tokenizer) -> Rendered | None:
    """Text of a row with its supervised spans; None where a null stands for text, and for a rejected answer.

    Rows of token ids have no text of their own: see `token_ids_of`.
    """
    rendered, supervised = _rendered(without_missing(row), tokenizer), supervision(tokenizer)
    if rendered is None or supervised == ASSISTANT:
        return rendered
    first = len(rendered.spans) - rendered.last
    spans = rendered.spans[first:] if supervised == LAST else ((0, len(rendered.text)),)
    return replace(rendered, spans=spans)


def _rendered(row: Row, tokenizer: Tokenizer) -> Rendered | None:
    kind, columns = in_layout(row)
    if is_rejected(row) or kind == "tokens":
        return None
    if kind == "messages":
        messages = checked_messages(columns["messages"])
        if messages and supervision(tokenizer) == LAST:
            messages = _silent_but_last(messages)
        return conversation(messages, tokenizer, tools_of(columns)) if messages else None
    if any(columns[name] is None for name in LAYOUTS[kind]):
        return None
    if kind == "instruction":
        before = checked_messages(turns_before(columns)) or []
        if supervision(tokenizer) == LAST:
            before = [message | {"weight": 0} for message in before]
        return instruction(request_of(columns), as_text(columns["output"]), tokenizer, before)
    if kind == "segments":
        return replace(_joined(segments_of(columns) or []), special=False, closed=False)
    if kind == "prompt":
        return _joined([(as_text(columns["prompt"]), False), (as_text(columns["completion"]), True)])
    return _joined([(as_text(columns["text"]), True)])


def _silent_but_last(messages: list[Row]) -> list[Row]:
    """Messages of which the assistant's last keeps its weight, and the others have 0.

    If the last has the weight 0 too, nothing is supervised, as with LLaMA-Factory's `mask_history` and `loss_mask`.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    return [message | {"weight": 0} if number in turns[:-1] else message for number, message in enumerate(messages)]


def _joined(segments: list[tuple[str, bool]]) -> Rendered:
    """Pieces of text, each supervised or not, joined as they stand; closed where the last one is supervised."""
    ends = [0, *itertools.accumulate(len(text) for text, _ in segments)]
    pairs = zip(itertools.pairwise(ends), segments, strict=True)
    spans = [span for span, (_, is_supervised) in pairs if is_supervised]
    is_closed = bool(segments) and segments[-1][1]
    return Rendered("".join(text for text, _ in segments), tuple(spans), special=True, closed=is_closed)


def _segment_ids(segments: list[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of pieces of text and which are supervised, as axolotl's `input_output` has them.

    Each piece is tokenised by itself, and nothing is added: a beginning and an end stand in the pieces.
    """
    chosen, last = supervision(tokenizer), max((n for n, (_, on) in enumerate(segments) if on), default=-1)
    ids, supervised = [], []
    for number, (text, on) in enumerate(segments):
        tokens = tokenizer(as_text(text), add_special_tokens=False)["input_ids"]
        ids += tokens
        supervised += [chosen == "all" or (on and (chosen == ASSISTANT or number == last))] * len(tokens)
    return ids, [False, *supervised[1:]][: len(ids)]


def token_ids_of(columns: Row, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a row that holds them, and which are supervised: all, or those whose label is not -100.

    Raises:
        CorpusError: They are no ids of the tokenizer's, or labels other than the ids.
    """
    ids, labels = columns["input_ids"], columns.get("labels")
    if ids is None or ("labels" in columns and labels is None):
        return [], []
    labels = ids if labels is None else labels
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
            raise CorpusError(f"`{name}` is a list of token ids; found {str(values)[:60]!r}")
    if outside := [token for token in ids if not 0 <= token < len(tokenizer)]:
        raise CorpusError(f"`input_ids` holds {outside[0]}; the tokenizer has the ids 0 to {len(tokenizer) - 1}")
    if len(labels) != len(ids) or any(label not in (token, IGNORED) for label, token in zip(labels, ids, strict=True)):
        raise CorpusError(f"`labels` holds each token's own id, or {IGNORED} where it is not supervised, unshifted")
    if supervision(tokenizer) == "all":
        labels = ids
    return list(ids), [False, *(label != IGNORED for label in labels[1:])][: len(ids)]


def with_text(row: Row, tokenizer: Tokenizer) -> Row:
    """A row of token ids with their text as `text`, for a person; another row as it is."""
    kind, columns = in_layout(row)
    if kind != "tokens" or isinstance(row.get("text"), str):
        return row
    return row | {"text": tokenizer.decode(columns["input_ids"] or [])}


def request_of(row: Row) -> list[str]:
    """The instruction of a row, and its input if both are there."""
    return [as_text(row[name]) for name in ("instruction", "input") if row.get(name) not in (None, "")] or [""]


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
def encode_prompt(prompt: str, tokenizer: Tokenizer, *, chat: bool, context: Row | None = None) -> list[int]:
    """Token ids for a model to continue: `prompt` as it stands, or as the user's turn of a conversation.

    Args:
        prompt: The text.
        tokenizer: The tokenizer of the model that is to continue.
        chat: The prompt is the user's turn.
        context: What else the request holds, as columns of a row: `system`, `history` and `tools` that come before,
            and the `input` of an instruction. `messages` stand for all turns before the answer, the prompt's among
            them, and `answer` for the completion where that is a message of more than its text: one that calls tools.

    Raises:
        CorpusError: There is a context, and no conversation; or the chat template refuses it.
    """
    rendered = _request(as_text(prompt), None, tokenizer, chat=chat, context=context)
    ids, _ = with_offsets(rendered, tokenizer)
    closing, text = tokenizer.eos_token_id, rendered.text
    return ids[:-1] if ids and ids[-1] == closing and not text.endswith(str(tokenizer.eos_token)) else ids


@one_at_a_time
def encode_query(
    prompt: str, completion: str, tokenizer: Tokenizer, *, kind: str, context: Row | None = None
) -> Encoded:
    """Token ids of a prompt and its completion, in the layout `kind` of a corpus' rows.

    Only the completion is supervised. It is closed like a row of that layout, except in a `text` corpus, where a
    completion is a stretch of running text. For `context` and errors see `encode_prompt`.
    """
    chat = kind in ("instruction", "messages")
    rendered = _request(as_text(prompt), as_text(completion), tokenizer, chat=chat, context=context)
    return Encoded(*tokenised(replace(rendered, closed=rendered.closed and kind != "text"), tokenizer))


def _request(prompt: str, completion: str | None, tokenizer: Tokenizer, *, chat: bool, context: Row | None) -> Rendered:
    """A prompt with its completion, which alone is supervised; None leaves it open."""
    context = context or {}
    messages, tools = context.get("messages"), tools_of(context)
    before = [turn | {"weight": 0} for turn in (*turns_before(context), *(messages or []))]
    request = [prompt, *(as_text(text) for text in [context.get("input")] if text not in (None, ""))]
    if chat and messages is not None:
        return answered(checked_messages(before) or [], _answer(completion, context), tokenizer, tools)
    if chat:
        return instruction(request, completion, tokenizer, checked_messages(before), tools)
    if before or tools or context.get("answer"):
        raise CorpusError(
            "`system`, `history`, `tools`, and messages other than a question and its answer in words have a place in "
            "conversations alone, and the rows of this corpus are plain text: write them into the prompt as the rows "
            "have them."
        )
    prompt = "\n\n".join(request)
    text = prompt + (completion or "")
    spans = () if completion is None else ((len(prompt), len(text)),)
    return Rendered(text, spans, special=True, closed=completion is not None)


def _answer(completion: str | None, context: Row) -> dict[str, object] | None:
    """The assistant's message for a completion: the context's own where the completion is what that says."""
    if completion is None:
        return None
    own: dict[str, object] = context.get("answer") or {}
    is_own = bool(own) and as_text(said(own)) == completion
    return own | {"weight": 1} if is_own else {"role": "assistant", "content": completion}


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
    left = min(excess, room)
    start = opening + left
    ids, supervised = ids[:opening] + ids[start:], supervised[:opening] + supervised[start:]
    lost = sum(supervised[max_tokens:])
    return Encoded(ids[:max_tokens], supervised[:max_tokens], cut=excess, completion_cut=lost, prompt_cut=left)


def _with_shorter_prompt(encoded: Encoded, count: int, tokenizer: Tokenizer) -> Encoded:
    """The same answer after a prompt that has lost `count` more tokens of its left, or as many as it has."""
    ids, supervised = encoded.ids, encoded.supervised
    if count <= 0 or True not in supervised:
        return encoded
    left = min(count, supervised.index(True) - 1)  # something must predict the first supervised token
    opening = 1 if ids[0] == tokenizer.bos_token_id else 0
    start = opening + left
    ids, supervised = ids[:opening] + ids[start:], supervised[:opening] + supervised[start:]
    return replace(
        encoded, ids=ids, supervised=supervised, cut=encoded.cut + left, prompt_cut=encoded.prompt_cut + left
    )


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to one length."""

    ids: Int64[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    """True for tokens, False for padding."""
    supervised: Bool[Tensor, "b t"]
    """Whether each token is supervised; see the module's text."""
    sides: int = 1
    """Sequences of an example, one after another. Of 2, the second is the rejected answer, whose loss is subtracted;
    nothing of it is supervised where an example has no such answer."""

    def __len__(self):
        """Examples."""
        return len(self.ids) // self.sides

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.supervised.to(device), self.sides)


def collate(examples: Sequence[Encoded], pad_id: int = 0) -> Batch:
    """Pad examples on the right to the longest of them. Any id can pad, since no token attends to padding."""
    if any(example.rejected is not None for example in examples):
        pairs = ((example, example.rejected or Encoded(example.ids[:1], [False])) for example in examples)
        sequences = [replace(side, rejected=None) for pair in pairs for side in pair]
        return replace(collate(sequences, pad_id), sides=2)
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
