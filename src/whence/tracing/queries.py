"""What is asked of a trace: from texts to supervised tokens, and to vectors in an index' space.

A query is a prompt with a completion: one given, or the model's own, greedy or sampled. It may be about a span of the
completion alone, or about a comparison ("why this and not that"): the difference of two completions' objectives. All
become `exact.Part`s, tokens of which some are supervised, so that their gradients are taken by the same code as a
training example's, laid out and closed as a row of the index' corpus would be.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.corpus.layouts import Row, shown_text
from whence.corpus.reading import rows_with_place
from whence.corpus.tokens import Encoded, bucketed, collate, encode_prompt, encode_query
from whence.errors import ManifestMismatchError, SettingError
from whence.gradients.capture import sketch, token_losses
from whence.gradients.exact import Part, held_whole, sketched
from whence.indexing.build import Index
from whence.models.generation import generate
from whence.models.loading import LoadedModel
from whence.tracing.results import Answer

SHOWN = 60
"""Characters of a text that a message quotes."""
COLUMNS = (
    "a text as `prompt` (and perhaps as `completion`, `contrast`, `span` or `span_tokens`), or `instruction` (and "
    "`output`), or `messages` of one question (and its answer)"
)


@dataclass(frozen=True)
class Query:
    """What is asked: a prompt, and a completion or None for the model's own."""

    prompt: str
    completion: str | None = None
    span: str | tuple[int, int] | None = None
    """The part of the completion that is asked about: its text (where it first occurs), or tokens from, to (from 0, the
    end left out)."""
    contrast: str | None = None
    """Another completion: why the one and not this."""


@dataclass(frozen=True)
class Asked:
    """A query as tokens."""

    query: Query
    parts: list[Part]
    """The completion; and the contrast, with a minus."""
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the model completes a prompt."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise SettingError(f"--max-new-tokens {self.max_new_tokens}: a number above 0 is expected")
        if not 0 <= self.temperature < math.inf:
            raise SettingError(f"--temperature {self.temperature}: 0 (greedy) or a number above it is expected")


def queries_of(origin: Any, defaults: Query | None = None, *, flag: str = "--queries") -> list[Query]:
    """Queries of a file, of rows in memory, or as they are.

    Args:
        origin: A file as `corpus.open_corpus` reads it, rows, or queries. A row has one of the layouts of `COLUMNS`,
            the answer left out where the model is to complete it, and perhaps `span` (or `span_tokens`, as FROM:TO) and
            `contrast`.
        defaults: `span` and `contrast` of queries that have none.
        flag: What they were given with.

    Raises:
        SettingError: A row is no query, or there is none.
    """
    is_file = isinstance(origin, str | Path)
    rows = rows_with_place(origin) if is_file else ((f"query {number}", item) for number, item in enumerate(origin))
    if is_file and {".csv", ".tsv"} & {*Path(origin).suffixes}:  # where an empty cell is all there is for a null
        rows = ((where, {name: cell or None for name, cell in row.items()}) for where, row in rows)
    found = [item if isinstance(item, Query) else _query(item, where) for where, item in rows]
    if not found:
        raise SettingError(f"{origin if is_file else flag}: no query in it")
    if defaults is None:
        return found
    given = {"span": defaults.span, "contrast": defaults.contrast}
    return [
        replace(query, **{name: value for name, value in given.items() if getattr(query, name) is None})
        for query in found
    ]


def _query(row: Any, where: str) -> Query:
    """A row as a query; its layout is looked for as a corpus row's is, but may lack the answer."""
    columns = _asked_and_answered(row) if isinstance(row, dict) else {}
    others = [columns.get(name) for name in ("completion", "span", "span_tokens", "contrast")]
    if not isinstance(columns.get("prompt"), str) or not all(isinstance(text, str | None) for text in others):
        have = f"the columns {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise SettingError(f"{where}: a query needs {COLUMNS}; found {have}")
    completion, text, tokens, contrast = others
    return Query(
        columns["prompt"], completion, span_of(text or None, tokens or None, f"{where}: span_tokens"), contrast or None
    )


def _asked_and_answered(row: Row) -> Row:
    """The columns of a row, with `prompt` and perhaps `completion` where it has another layout."""
    if row.get("prompt") is not None:
        return row
    if isinstance(row.get("instruction"), str):
        return row | shown_text({"output": None, **row})
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return row
    if [turn.get("role") for turn in turns] not in (["user"], ["user", "assistant"]):
        return row
    said = [turn.get("content") for turn in turns]
    return row | {"prompt": said[0], "completion": said[1] if len(said) == 2 else None}


def span_of(text: str | None, tokens: str | None, where: str) -> str | tuple[int, int] | None:
    """The part of a completion that is asked about: its text, or its tokens FROM:TO."""
    if tokens is None:
        return text
    first, colon, end = tokens.partition(":")
    if text is not None or not (colon and first.isdecimal() and end.isdecimal()):
        flag = "--span" if where.startswith("--") else "`span`"
        raise SettingError(f"{where} {tokens}: FROM:TO is expected, such as 3:7, and no {flag} beside it")
    return int(first), int(end)


def ask(queries: Sequence[Query], model: LoadedModel, *, kind: str, sampling: Sampling | None = None) -> list[Asked]:
    """Tokens of queries, and how sure the model is of each.

    Args:
        queries: In any number.
        model: That answers, and says how probable each token is.
        kind: Layout of the corpus, which the query follows; see `corpus.LAYOUTS`.
        sampling: How open prompts are completed.

    Raises:
        SettingError: A query is longer than the model's context, supervises nothing, or its span does not occur.
    """
    completed = _completed(queries, model, kind, sampling or Sampling())
    return [_asked(query, *completed[number], model, kind) for number, query in enumerate(queries)]


def _completed(
    queries: Sequence[Query], model: LoadedModel, kind: str, sampling: Sampling
) -> list[tuple[Encoded, str | None]]:
    """Token ids of each query, and the text of those that the model completed."""
    tokenizer = model.tokenizer
    open_ended = [number for number, query in enumerate(queries) if query.completion is None]
    chat = kind in ("instruction", "messages")
    prompts = [encode_prompt(queries[number].prompt, tokenizer, chat=chat) for number in open_ended]
    for prompt in prompts:
        _check_length(model, len(prompt) + 1)
    answers = dict(zip(open_ended, zip(prompts, _generated(model, prompts, sampling), strict=True), strict=True))
    out = []
    for number, query in enumerate(queries):
        if query.completion is None:
            before, new = answers[number]
            ids = Encoded(before + new, [False] * len(before) + [True] * len(new))
            out.append((ids, tokenizer.decode(new, skip_special_tokens=True)))
        else:
            out.append((encode_query(query.prompt, query.completion, tokenizer, kind=kind), None))
        _check(model, out[-1][0], query)
    return out


def _generated(model: LoadedModel, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """The model's own answers, each at most `max_new_tokens` long and within the model's context."""
    room = [min(sampling.max_new_tokens, (model.context or 10**9) - len(prompt)) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for limit in set(room):
        numbers = [number for number in range(len(prompts)) if room[number] == limit]
        some = generate(
            model, [prompts[n] for n in numbers], limit, temperature=sampling.temperature, seed=sampling.seed
        )
        for number, new in zip(numbers, some, strict=True):
            answers[number] = new
    return answers


def _check_length(model: LoadedModel, length: int) -> None:
    if model.context is not None and length > model.context:
        raise SettingError(
            f"the query has {length} tokens; the model's context is {model.context}. Shorten the prompt or completion."
        )


def _check(model: LoadedModel, encoded: Encoded, query: Query) -> None:
    _check_length(model, len(encoded.ids))
    said = [model.tokenizer.eos_token_id] if query.completion is None else []
    if not encoded.targets or query.completion == "" or encoded.ids[-encoded.targets :] == said:
        what = "the model ended at once" if query.completion is None else "the completion has no token"
        raise SettingError(f"nothing to trace for prompt {query.prompt[:SHOWN]!r}: {what}. Give another --completion.")


def _asked(query: Query, encoded: Encoded, generated: str | None, model: LoadedModel, kind: str) -> Asked:
    tokens, probabilities = _said(encoded, model)
    completion = generated if query.completion is None else query.completion
    assert completion is not None, "a prompt without a completion was completed"
    spanned = _spanned(tokens, query.span, model, encoded)
    parts = [Part(_restricted(encoded, spanned))]
    contrast_tokens, contrast_probabilities = [], []
    if query.contrast is not None:
        other = encode_query(query.prompt, query.contrast, model.tokenizer, kind=kind)
        _check(model, other, replace(query, completion=query.contrast))
        contrast_tokens, contrast_probabilities = _said(other, model)
        parts.append(Part(other, sign=-1.0))
    answer = Answer(
        prompt=query.prompt,
        completion=completion,
        is_generated=query.completion is None,
        tokens=tokens,
        probabilities=probabilities,
        asked=spanned,
        contrast=query.contrast,
        contrast_tokens=contrast_tokens,
        contrast_probabilities=contrast_probabilities,
    )
    return Asked(query, parts, answer)


def _said(encoded: Encoded, model: LoadedModel) -> tuple[list[str], list[float]]:
    """Supervised tokens as text, and the model's probability of each."""
    nll = token_losses(model, collate([encoded])).nll[0].tolist()
    places = [place for place, is_target in enumerate(encoded.supervised) if is_target]
    return [token_text(model, encoded.ids[t]) for t in places], [math.exp(-nll[t]) for t in places]


def token_text(model: LoadedModel, token: int) -> str:
    """A token as text; part of a character becomes U+FFFD.

    SentencePiece's decoder takes the space off the first token that it is given, and here that is every token.
    """
    text = model.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    piece = model.tokenizer.convert_ids_to_tokens(token)
    return f" {text}" if str(piece).startswith("\u2581") and not text.startswith(" ") else text


def _restricted(encoded: Encoded, spanned: list[bool]) -> Encoded:
    """With only those targets supervised that are asked about."""
    wanted = iter(spanned)
    return replace(encoded, supervised=[is_target and next(wanted) for is_target in encoded.supervised])


def _spanned(tokens: list[str], span: str | tuple[int, int] | None, model: LoadedModel, encoded: Encoded) -> list[bool]:
    """Which of the completion's tokens a span asks about."""
    if span is None:
        return [True] * len(tokens)
    if isinstance(span, str):
        return _of_text(span, model, encoded)
    first, end = span
    if not 0 <= first < end <= len(tokens):
        raise SettingError(f"--span-tokens {first}:{end}: the completion has the tokens 0:{len(tokens)}")
    return [first <= number < end for number in range(len(tokens))]


def _of_text(span: str, model: LoadedModel, encoded: Encoded) -> list[bool]:
    """Tokens that hold characters of the text's first occurrence.

    A token's characters are told from the completion decoded up to it: no tokenizer's offsets are needed, and a
    generated completion is never tokenised again. A character cut in several tokens is a character of each of them.
    """
    if not span.strip():
        raise SettingError(f"--span {span!r} has no words. Give some of the completion's, or its tokens: --span-tokens")
    targets = [place for place, is_target in enumerate(encoded.supervised) if is_target]

    def text_to(count: int) -> str:
        ids = [encoded.ids[place] for place in targets[:count]]
        return model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    whole = text_to(len(targets))
    start = whole.find(span)
    if start < 0:
        raise SettingError(f"--span {span[:SHOWN]!r} does not occur in the completion {whole[:300]!r}")
    begin, asked = 0, []
    for count in range(1, len(targets) + 1):
        text = text_to(count)
        differs = (place for place, pair in enumerate(zip(text, whole, strict=False)) if pair[0] != pair[1])
        certain = next(differs, min(len(text), len(whole)))  # half a character decodes to one U+FFFD or more
        end = min(len(text), certain + 1)
        asked.append(begin < start + len(span) and end > start)
        begin = certain
    return asked


def last_first(index: Index) -> Iterator[tuple[int, LoadedModel]]:
    """Checkpoints with their models, the last one first: it is loaded already."""
    for checkpoint in reversed(range(len(index.weights))):
        yield checkpoint, index.model(checkpoint)


def query_vectors(
    index: Index, queries: Sequence[Sequence[Part]], *, objective: str = "loss"
) -> Float32[Tensor, "c q k"]:
    """Sketched gradients of queries under every checkpoint, in the index's space.

    Raises:
        ManifestMismatchError: A query's gradient is not finite.
    """
    vectors = []
    for _, model in last_first(index):
        projection, layers = index.projection(model), index.layers(model)
        rows = torch.zeros(len(queries), projection.width)
        plain = [number for number, parts in enumerate(queries) if len(parts) == 1]
        lengths = [len(queries[number][0].encoded.ids) for number in plain]
        for batch in bucketed(lengths, index.tokens_per_batch):
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
            held = held_whole(model, layers, queries[number], index.space, objective)
            rows[number] = sketched(held, projection, index.space.normalise)
        vectors.append(rows)
    stacked = torch.stack(vectors[::-1])
    if not torch.isfinite(stacked).all():
        raise ManifestMismatchError("a query's gradient is not finite: the model's weights hold NaN or infinity")
    return stacked
