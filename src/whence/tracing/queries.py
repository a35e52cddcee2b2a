"""Queries of a trace: from texts to supervised tokens, and to vectors in an index' space.

A query is a prompt with a completion: the user's, or the model's own, greedy or sampled. It may be about a span of the
completion alone, or about a comparison ("why this and not that"): the difference of two completions' objectives. Each
becomes one or two `exact.SignedSequence`s, tokens of which some are supervised, so that its gradient is taken by the
same code as a training example's, laid out and closed as a row of the index' corpus would be.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.brief import brief
from whence.corpus.columns import current, renamed
from whence.corpus.conversations import as_text, checked_messages, said
from whence.corpus.missing import without_missing
from whence.corpus.preferences import CONTRAST, checked
from whence.corpus.reading import is_from_arrow, rows_in_memory, rows_with_place
from whence.corpus.roles import role_of
from whence.corpus.shapes import BEFORE, LAYOUTS, Row, columns_in_words, layout_of, query_shape, rejected_side
from whence.corpus.tokens import Encoded, bucketed, collate, encode_prompt, encode_query, request_of
from whence.corpus.unread import log_unread_of_queries
from whence.errors import CorpusError, ManifestMismatchError, SettingError
from whence.gradients.capture import sketch, token_losses
from whence.gradients.exact import SignedSequence, query_gradient, query_sketch
from whence.indexing.opening import Index
from whence.models.generation import OnToken, ends_of
from whence.models.loading import LoadedModel
from whence.runner import counted
from whence.tracing.own_answers import OwnAnswer, Sampling, own_answers
from whence.tracing.results import Answer
from whence.tracing.spans import span_of
from whence.turns import one_at_a_time

QUOTED = 60
"""Characters of a text that a message quotes."""
COLUMNS = (
    "a text as `prompt` (and perhaps as `completion`, `contrast`, `span` or `span_tokens`), or `instruction` (and "
    "`output`), or `messages` that end in a question (and its answer), with `system`, `history` and `tools` as in a "
    "row, or `chosen` and `rejected` with their `prompt`"
)


@dataclass(frozen=True)
class Query:
    """A prompt and a completion, or None for the model's own completion."""

    __repr__ = brief

    prompt: str
    completion: str | None = None
    span: str | tuple[int, int] | None = None
    """The stretch of the completion to trace: its text (where it first occurs), or tokens from, to (from 0, without the
    end)."""
    contrast: "str | Query | None" = None
    """Another completion, for "why the one and not this"; or a query with its completion, where what comes before it is
    its own."""
    context: Row | None = None
    """What else the request holds, as a corpus row has it: `system`, `history` and `tools` that come before the prompt,
    an instruction's `input`, the `messages` that stand for a prompt of several turns, and the message `answer` that
    stands for a completion of more than text; see `corpus.tokens.encode_prompt`."""


@dataclass(frozen=True)
class EncodedQuery:
    """A query as tokens."""

    __repr__ = brief

    query: Query
    sequences: list[SignedSequence]
    """The completion; and the contrast, with a minus."""
    answer: Answer


def queries_of(
    origin: Any,
    defaults: Query | None = None,
    *,
    flag: str = "--queries",
    columns: Mapping[str, str] | None = None,
    preferences: str | None = None,
) -> list[Query]:
    """Queries of a file, of rows in memory, or as they are.

    Args:
        origin: A file, a DataFrame, a data set or rows, as `open_corpus` reads them, or queries. A row has one of the
            layouts of `COLUMNS`, without the answer where the model is to complete it, and perhaps `span` (or
            `span_tokens`, as FROM:TO) and `contrast`. A query asks about the last answer alone, whatever its `weight`
            or `label`; the answers before it are part of its prompt.
        defaults: `span` and `contrast` for queries that have none.
        flag: The flag that named them, for messages.
        columns: Names that Whence reads, and the rows' own in their place; those of `corpus.columns.columns_called`
            come first.
        preferences: What a row with a preferred and a rejected answer asks about, one of
            `corpus.preferences.PREFERENCES`: the former, or why that and not the latter. None: the former.

    Raises:
        SettingError: A row is no query, or there is no row.
    """
    preferences = checked(preferences)
    name = str(origin) if isinstance(origin, str | Path) else flag
    items = list(_rows(origin, current() or columns or {}))
    queries = [item if isinstance(item, Query) else _query(item, location, preferences) for location, item in items]
    log_unread_of_queries(name, [item for _, item in items if isinstance(item, dict)])
    if not queries:
        raise SettingError(f"{name}: no query in it")
    if defaults is None:
        return queries
    default_fields = {"span": defaults.span, "contrast": defaults.contrast}
    return [
        replace(query, **{name: value for name, value in default_fields.items() if getattr(query, name) is None})
        for query in queries
    ]


def _rows(origin: Any, columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Rows with None for missing values, or queries, each with its place."""
    if isinstance(origin, str | Path):
        yield from rows_with_place(origin, columns=columns)
        return
    from_arrow = is_from_arrow(origin)
    for number, item in enumerate(rows_in_memory(origin)):
        where = f"query {number}"
        is_row = isinstance(item, dict)
        yield where, renamed(without_missing(item, from_arrow=from_arrow), columns, where) if is_row else item


def _query(row: Any, location: str, preferences: str) -> Query:
    """A row as a query; its layout is that of a corpus row, but it may lack the answer."""
    try:
        request = _request(row, preferences) if isinstance(row, dict) else None
    except CorpusError as error:
        raise SettingError(f"{location}: {error}") from None
    others = [row.get(name) for name in ("span", "span_tokens", "contrast")] if request else []
    if request is None or not all(isinstance(text, str | None) for text in others):
        have = f"the columns {', '.join(map(str, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise SettingError(f"{location}: a query needs {COLUMNS}; found {have}")
    text, tokens, contrast = others
    span = span_of(text or None, tokens or None, f"{location}: span_tokens")
    return replace(request, span=span, contrast=contrast or request.contrast)


def _request(row: Row, preferences: str) -> Query | None:
    """What a row asks, and its answer; None if it asks nothing.

    Raises:
        CorpusError: Something else stands where text is expected.
    """
    shape = query_shape(row, preferences=preferences)
    if shape is None:
        return None
    request, other = _of_columns(shape.read(row)), None
    if request is not None and preferences == CONTRAST and (rejected := rejected_side(row, shape)) is not None:
        other = _of_columns(rejected)
        if other is None or other.completion is None or request.completion is None:
            raise CorpusError(f"{columns_in_words(shape.columns)}: one of the two ends without an answer")
    return None if request is None else replace(request, contrast=other)


def _of_columns(columns: Row) -> Query | None:
    """What the columns of a layout ask, and the answer."""
    kind = layout_of(columns)
    if kind == "messages":
        return _of_messages(columns)
    first, *more = request_of(columns) if kind == "instruction" else [as_text(columns["prompt"])]
    answer = columns.get(LAYOUTS[kind][-1])
    context = {name: columns[name] for name in BEFORE if columns.get(name)} | ({"input": more[0]} if more else {})
    return Query(first, None if answer is None else as_text(answer), context=context or None)


def _of_messages(row: Row) -> Query | None:
    """What a row of messages asks; only a question and its answer in words are a prompt and a completion."""
    turns, context = row["messages"], {"tools": row["tools"]} if row.get("tools") else {}
    if isinstance(turns, list) and turns and _is_place_of_answer(turns[-1]):
        turns = turns[:-1]
    messages = checked_messages(turns)
    if not messages:
        return None
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    answer = messages.pop() if messages[-1]["role"] == "assistant" else None
    if answer is None and messages[-1]["role"] in ("system", "developer"):
        return None
    questions = [said(message) for message in messages if message["role"] == "user"] or [*map(said, messages)]
    prompt = questions[-1] if questions else ""
    is_plain = answer is None or answer.keys() == {"role", "content"}
    if not is_plain or messages != [{"role": "user", "content": prompt}]:
        context |= {"messages": messages} | ({} if is_plain else {"answer": answer})
    return Query(prompt, None if answer is None else said(answer), context=context or None)


def _is_place_of_answer(message: Any) -> bool:
    """Whether a message is the assistant's, and null."""
    if not isinstance(message, dict) or role_of(message.get("role")) != "assistant":
        return False
    return {key for key, value in message.items() if value is not None} <= {"role", "weight"}


def _shown_prompt(query: Query) -> str:
    """The prompt and its input, as text for a person."""
    return "\n\n".join([query.prompt, *(str(text) for text in [(query.context or {}).get("input")] if text)])


@one_at_a_time
def encode_queries(
    queries: Sequence[Query],
    model: LoadedModel,
    *,
    kind: str,
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
) -> list[EncodedQuery]:
    """Encode queries, complete those without a completion, and take the model's probability of each token.

    Args:
        queries: Any number of them.
        model: The model that completes open prompts, and whose probabilities are taken.
        kind: Layout of the corpus, which the query follows; see `corpus.layouts`.
        sampling: How open prompts are completed.
        on_token: Called with each token of the one open prompt's answer, and its probability, as it is chosen.

    Raises:
        SettingError: A query is longer than the model's context or has no supervised token, or its span does not occur.
    """
    completed = _completed(queries, model, kind, sampling or Sampling(), on_token)
    return [_encoded_query(query, *completed[number], model, kind) for number, query in enumerate(queries)]


def _completed(
    queries: Sequence[Query], model: LoadedModel, kind: str, sampling: Sampling, on_token: OnToken | None
) -> list[tuple[Encoded, OwnAnswer | None]]:
    """Token ids of each query, and the answers of those that the model completed."""
    tokenizer = model.tokenizer
    open_ended = [query for query in queries if query.completion is None]
    prompts, contexts = [query.prompt for query in open_ended], [query.context for query in open_ended]
    chat = kind in ("instruction", "messages")
    before = [encode_prompt(query.prompt, tokenizer, chat=chat, context=query.context) for query in open_ended]
    for ids in before:
        _check_length(model, len(ids) + 1)
    answers = iter(own_answers(prompts, before, model, kind, sampling, contexts=contexts, on_token=on_token))
    out: list[tuple[Encoded, OwnAnswer | None]] = []
    for query in queries:
        if query.completion is None:
            answer = next(answers)
            out.append((answer.encoded, answer))
        else:
            out.append(
                (encode_query(query.prompt, query.completion, tokenizer, kind=kind, context=query.context), None)
            )
        _check(model, out[-1][0], query)
    return out


def _check_length(model: LoadedModel, length: int) -> None:
    if model.context is not None and length > model.context:
        raise SettingError(
            f"the query has {length} tokens; the model's context is {model.context}. Shorten the prompt or completion."
        )


def _check(model: LoadedModel, encoded: Encoded, query: Query) -> None:
    _check_length(model, len(encoded.ids))
    targets = [token for token, is_target in zip(encoded.ids, encoded.supervised, strict=True) if is_target]
    is_empty = query.completion is None and targets[1:] == [] and set(targets) <= set(ends_of(model))
    if not targets or query.completion == "" or is_empty:
        problem = "the model ended at once" if query.completion is None else "the completion has no token"
        raise SettingError(
            f"nothing to trace for prompt {query.prompt[:QUOTED]!r}: {problem}. Give another --completion."
        )


def _encoded_query(
    query: Query, encoded: Encoded, own: OwnAnswer | None, model: LoadedModel, kind: str
) -> EncodedQuery:
    tokens, probabilities = _token_probabilities(encoded, model)
    completion = query.completion if own is None else own.text
    assert completion is not None, "a prompt without a completion was completed"
    in_span = _tokens_in_span(tokens, query.span, model, encoded)
    sequences = [SignedSequence(_restricted(encoded, in_span))]
    contrast, contrast_tokens, contrast_probabilities = None, [], []
    if query.contrast is not None:
        against = query.contrast if isinstance(query.contrast, Query) else replace(query, completion=query.contrast)
        contrast = against.completion
        if contrast is None:
            raise SettingError(
                f"the contrast of prompt {query.prompt[:QUOTED]!r} is a query without a completion, and two answers "
                "are compared. Give it one."
            )
        other = encode_query(against.prompt, contrast, model.tokenizer, kind=kind, context=against.context)
        _check(model, other, against)
        if encoded.is_same_as(other):
            raise SettingError(
                f"nothing to trace for prompt {query.prompt[:QUOTED]!r}: the completion and its contrast are the same "
                f"tokens, {contrast[:QUOTED]!r}. Give another --contrast."
            )
        contrast_tokens, contrast_probabilities = _token_probabilities(other, model)
        sequences.append(SignedSequence(other, sign=-1.0))
    answer = Answer(
        prompt=_shown_prompt(query),
        completion=completion,
        is_generated=own is not None,
        ending=None if own is None else own.ending,
        is_repeatable=own is None or own.is_repeatable,
        tokens=tokens,
        probabilities=probabilities,
        asked=in_span,
        contrast=contrast,
        contrast_tokens=contrast_tokens,
        contrast_probabilities=contrast_probabilities,
    )
    return EncodedQuery(query, sequences, answer)


def _token_probabilities(encoded: Encoded, model: LoadedModel) -> tuple[list[str], list[float]]:
    """Supervised tokens as text, and the model's probability of each."""
    nll = token_losses(model, collate([encoded])).nll[0].tolist()
    places = [place for place, is_target in enumerate(encoded.supervised) if is_target]
    return token_texts(model, encoded.ids, places), [math.exp(-nll[t]) for t in places]


@one_at_a_time
def token_texts(model: LoadedModel, ids: list[int], places: Sequence[int]) -> list[str]:
    """Tokens of a sequence as text, those at `places`; a fraction of a character becomes U+FFFD.

    A token is decoded behind the one before it: a decoder takes the space off a text's first word (SentencePiece), or
    writes one before every word but the first (WordPiece).
    """
    return [_token_text(model, ids[place], ids[place - 1] if place else None) for place in places]


def _token_text(model: LoadedModel, token: int, before: int | None) -> str:
    text = model.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    piece = str(model.tokenizer.convert_ids_to_tokens(token))
    if piece.startswith("\u2581") and not text.startswith(" "):
        return f" {text}"
    if before is None or text[:1].isspace() or "\ufffd" in text:
        return text
    start = model.tokenizer.decode([before], clean_up_tokenization_spaces=False)
    both = model.tokenizer.decode([before, token], clean_up_tokenization_spaces=False)
    return f" {text}" if both == f"{start} {text}" else text


def _restricted(encoded: Encoded, in_span: list[bool]) -> Encoded:
    """The same tokens, supervised only where they are in the span."""
    is_in_span = iter(in_span)
    return replace(encoded, supervised=[is_target and next(is_in_span) for is_target in encoded.supervised])


def _tokens_in_span(
    tokens: list[str], span: str | tuple[int, int] | None, model: LoadedModel, encoded: Encoded
) -> list[bool]:
    """For each of the completion's tokens, whether it is in the span."""
    if span is None:
        return [True] * len(tokens)
    if isinstance(span, str):
        return _tokens_of_text(span, model, encoded)
    first, end = span
    if not 0 <= first < end <= len(tokens):
        raise SettingError(f"--span-tokens {first}:{end}: the completion has the tokens 0:{len(tokens)}")
    return [first <= number < end for number in range(len(tokens))]


def _tokens_of_text(span: str, model: LoadedModel, encoded: Encoded) -> list[bool]:
    """For each token, whether it holds a character of the text's first occurrence.

    A token's characters follow from the completion decoded up to it: no tokenizer's offsets are needed, and a generated
    completion is never tokenised again. A character that is cut into several tokens is a character of each of them.
    """
    if not span.strip():
        raise SettingError(f"--span {span!r} has no words. Give some of the completion's, or its tokens: --span-tokens")
    targets = [place for place, is_target in enumerate(encoded.supervised) if is_target]
    before = encoded.ids[targets[0] - 1 : targets[0]]  # behind a token, a first word has its space
    opening = str(model.tokenizer.decode(before, clean_up_tokenization_spaces=False))

    def text_to(count: int) -> str:
        ids = [encoded.ids[place] for place in targets[:count]]
        text = str(model.tokenizer.decode(before + ids, clean_up_tokenization_spaces=False))
        alone = str(model.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        return text[len(opening) :] if text.startswith(opening) else alone

    whole = text_to(len(targets))
    start = whole.find(span)
    if start < 0:
        raise SettingError(f"--span {span[:QUOTED]!r} does not occur in the completion {whole[:300]!r}")
    begin, in_span = 0, []
    for count in range(1, len(targets) + 1):
        text = text_to(count)
        differs = (place for place, pair in enumerate(zip(text, whole, strict=False)) if pair[0] != pair[1])
        certain = next(differs, min(len(text), len(whole)))  # half a character decodes to one U+FFFD or more
        end = min(len(text), certain + 1)
        in_span.append(begin < start + len(span) and end > start)
        begin = certain
    return in_span


def last_first(index: Index) -> Iterator[tuple[int, LoadedModel]]:
    """Checkpoints with their models, the last one first: it is loaded already."""
    for checkpoint in reversed(range(len(index.weights))):
        yield checkpoint, index.model(checkpoint)


@one_at_a_time
def query_vectors(
    index: Index, queries: Sequence[Sequence[SignedSequence]], *, objective: str = "loss"
) -> Float32[Tensor, "c q k"]:
    """Sketched gradients of queries under every checkpoint, in the index's space.

    Raises:
        ManifestMismatchError: A query's gradient is not finite.
    """
    vectors = []
    for _, model in last_first(index):
        projection, layers = index.projection(model), index.layers(model)
        rows = torch.zeros(len(queries), projection.width)
        plain = [number for number, sequences in enumerate(queries) if len(sequences) == 1]
        lengths = [queries[number][0].encoded.positions for number in plain]
        for batch in counted(
            bucketed(lengths, index.tokens_per_batch), "Gradients of questions", len(plain), len, "texts"
        ):
            numbers = [plain[place] for place in batch]
            rows[numbers] = sketch(
                model,
                layers,
                collate([queries[number][0].encoded for number in numbers]),
                projection,
                reduction=index.space.reduction,
                normalise=index.space.normalise,
                objective=objective,
            )[0].cpu()
        for number in set(range(len(queries))) - set(plain):
            gradient = query_gradient(model, layers, queries[number], index.space, objective)
            rows[number] = query_sketch(gradient, projection, index.space.normalise)
        vectors.append(rows)
    stacked = torch.stack(vectors[::-1])
    if not torch.isfinite(stacked).all():
        raise ManifestMismatchError("a query's gradient is not finite: the model's weights hold NaN or infinity")
    return stacked
