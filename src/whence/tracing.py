"""Trace: a prompt and a completion in, the training examples behind it out.

The query's gradient is taken by the same code as a training example's, in the index's own space: the loss of the
completion, reduced as there, supervised and closed as a row of the corpus' layout would be. The score of an example
is `sum over checkpoints of weight * <query, example>`, or the cosine of the two: to first order, what a step of
gradient descent on the example takes off the query's loss. Positive is helpful, negative opposing.

A score says which examples move this answer, not how sure the model was of it: a model that babbles has gradients
too. So every answer carries the model's probability of each of its tokens.

Source: TracIn, Pruthi et al. 2020, https://arxiv.org/abs/2002.08484, equation 1 and section 3.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.corpus import Row, layout, open_corpus
from whence.errors import ManifestMismatchError, SettingError
from whence.generation import generate
from whence.gradients import sketch, token_losses
from whence.index import Index, open_index
from whence.model import LoadedModel
from whence.tokens import Encoded, bucketed, collate, encode_prompt, encode_query

METHODS = ("cosine", "dot")


@dataclass(frozen=True)
class Query:
    """What is asked: a prompt, and a completion or None for the model's own."""

    prompt: str
    completion: str | None = None


@dataclass(frozen=True)
class Answer:
    """A query's completion as tokens, with how sure the model is of it."""

    prompt: str
    completion: str
    is_generated: bool
    tokens: list[str]
    """The supervised tokens, as text."""
    probabilities: list[float]
    """Of each of them, given what is before it, under the last checkpoint."""

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss of a token in nats: 1 is certain, the vocabulary's size is a blind guess."""
        if not self.probabilities:
            return math.nan
        return math.exp(sum(-math.log(max(p, 1e-30)) for p in self.probabilities) / len(self.probabilities))


@dataclass(frozen=True)
class Hit:
    """One training example behind an answer."""

    query: int
    """Number of the query, from 0."""
    rank: int
    """From 1 for the highest score; from -1 for the lowest, which opposes where its score is negative."""
    id: str
    score: float
    source: str | None
    row: Row
    """The corpus row."""

    def as_row(self) -> Row:
        """For a file: the score beside the row's own text."""
        shown = {
            "query": self.query,
            "rank": self.rank,
            "id": self.id,
            "score": self.score,
            "source": self.source,
        }
        return shown | shown_text(self.row)


@dataclass(frozen=True)
class Trace:
    """Answers and the examples behind them."""

    answers: list[Answer]
    hits: list[Hit]
    """By query and rank: helpful first, then opposing."""
    method: str
    rows: int
    """Examples that could be ranked."""

    def of(self, query: int, *, opposing: bool = False) -> list[Hit]:
        """Hits of one query on one side."""
        return [hit for hit in self.hits if hit.query == query and (hit.rank < 0) == opposing]


def trace(
    index: str | Path | Index,
    prompt: str | None = None,
    completion: str | None = None,
    *,
    queries: str | Path | Sequence[Query | Row] | None = None,
    top: int = 10,
    method: str = "cosine",
    max_new_tokens: int = 64,
    model: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Trace:
    """Training examples that made a model say something.

    Args:
        index: Complete, as a path or open.
        prompt: What the model was asked; laid out like the rows of the corpus (chat template included).
        completion: What it said; None lets the model say it now, greedily.
        queries: In place of these, many: a corpus file with `prompt` and perhaps `completion`, or rows in memory.
        top: Examples on each side, helpful and opposing.
        method: "dot" or "cosine".
        max_new_tokens: Longest completion generated.
        model: The model's directory, where it has moved since the index was built.
        device: Where to load the model.
        trust_remote_code: Let the model's repository run its own code, if the index was built so.

    Returns:
        Scores in nats^2 per squared unit of weight (dot), or in -1 to 1 (cosine). Larger is more helpful.

    Raises:
        SettingError: No query, no such method, or a query that supervises nothing.
        ManifestMismatchError: The model is not the one that the index was built with.
    """
    if method not in METHODS:
        raise SettingError(f"--method {method}: choose one of {', '.join(METHODS)}")
    for flag, value in (("--top", top), ("--max-new-tokens", max_new_tokens)):
        if value < 1:
            raise SettingError(f"{flag} {value}: a number above 0 is expected")
    asked = _asked(prompt, completion, queries)
    opened = (
        index
        if isinstance(index, Index)
        else open_index(index, model=model, device=device, trust_remote_code=trust_remote_code)
    )
    opened.store.require_complete()
    rankable = opened.store.info()["ok_rows"]
    if not rankable:
        raise SettingError(
            f"{opened.store.place.root}: none of its {opened.store.rows:,} rows has a finite gradient, so none can "
            f"be ranked. See: whence info {opened.store.place.root}"
        )
    last = opened.model()
    encoded, generated = _encoded(opened, last, asked, max_new_tokens)
    answers = _answers(last, asked, encoded, generated)
    helpful, opposing = opened.store.top_k(
        query_vectors(opened, encoded), torch.tensor(opened.weights), m=top, cosine=method == "cosine"
    )
    return Trace(answers, _hits(opened, helpful, opposing), method, rankable)


def query_vectors(index: Index, encoded: Sequence[Encoded]) -> Float32[Tensor, "c q k"]:
    """Sketched gradients of queries under every checkpoint, in the index's space.

    Raises:
        ManifestMismatchError: A query's gradient is not finite.
    """
    vectors = []
    for checkpoint in reversed(range(len(index.weights))):  # the last is loaded already
        model = index.model(checkpoint)
        projection, layers = index.projection(model), index.layers(model)
        rows = torch.zeros(len(encoded), projection.width)
        for batch in bucketed([len(query.ids) for query in encoded], index.settings.tokens_per_batch):
            examples = collate([encoded[number] for number in batch])
            rows[batch] = sketch(model, layers, examples, projection, reduction=index.space.reduction)[0].cpu()
        vectors.append(rows)
    stacked = torch.stack(vectors[::-1])
    if not torch.isfinite(stacked).all():
        raise ManifestMismatchError("a query's gradient is not finite: the model's weights hold NaN or infinity")
    return stacked


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


def _text(value: Any) -> str | None:
    """One type a column, whatever stands in a row: a file of rows needs that."""
    return None if value is None else str(value)


def _asked(prompt: str | None, completion: str | None, queries: Any) -> list[Query]:
    if (prompt is None) == (queries is None):
        raise SettingError("give either --prompt TEXT or --queries FILE")
    if prompt is not None:
        return [Query(prompt, completion)]
    if completion is not None:
        raise SettingError("--completion belongs to --prompt; with --queries it is a column of the file")
    rows = _query_rows(queries) if isinstance(queries, str | Path) else enumerate(queries)
    asked = [item if isinstance(item, Query) else _query(item, where) for where, item in rows]
    if not asked:
        raise SettingError(f"{queries if isinstance(queries, str | Path) else '--queries'}: no query in it")
    return asked


def _query_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Rows of a queries file; one with a prompt alone lets the model complete it, so it is no corpus row yet."""
    if not str(path).endswith(".jsonl") or not Path(path).is_file():
        yield from ((f"{path}: query {number}", example.row) for number, example in enumerate(open_corpus(path)))
        return
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError both are
            raise SettingError(f"{path}:{number}: not a line of JSON: {error}") from None
        if line.strip():
            yield f"{path}:{number}", row


def _query(row: Any, where: str | int) -> Query:
    columns = {"output": None, **row} if isinstance(row, dict) else {}
    if isinstance(columns.get("instruction"), str) and "prompt" not in columns:
        columns = shown_text(columns)
    prompt, completion = columns.get("prompt"), columns.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str | None):
        have = f"the columns {', '.join(row)}" if isinstance(row, dict) else f"a JSON {type(row).__name__}"
        told = where if isinstance(where, str) else f"query {where}"
        raise SettingError(
            f"{told}: a query needs a text as `prompt` (and one as `completion`, if not the model's own); found {have}"
        )
    return Query(prompt, completion)


def _encoded(
    index: Index, model: LoadedModel, asked: list[Query], max_new_tokens: int
) -> tuple[list[Encoded], list[str | None]]:
    """Token ids of every query, and the text of those that the model completed."""
    kind, tokenizer = index.layout, model.tokenizer
    chat = kind in ("instruction", "messages")
    open_ended = [number for number, query in enumerate(asked) if query.completion is None]
    prompts = [encode_prompt(asked[number].prompt, tokenizer, chat=chat) for number in open_ended]
    for prompt in prompts:
        _check_length(model, len(prompt) + 1)
    answers = dict(zip(open_ended, zip(prompts, _generated(model, prompts, max_new_tokens), strict=True), strict=True))
    encoded, texts = [], []
    for number, query in enumerate(asked):
        if query.completion is None:
            before, new = answers[number]
            encoded.append(Encoded(before + new, [False] * len(before) + [True] * len(new)))
            texts.append(tokenizer.decode(new, skip_special_tokens=True))
        else:
            encoded.append(encode_query(query.prompt, query.completion, tokenizer, kind=kind))
            texts.append(None)
        _check_query(model, encoded[-1], query)
    return encoded, texts


def _generated(model: LoadedModel, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The model's own answers, each at most `max_new_tokens` long and within the model's context."""
    room = [min(max_new_tokens, (model.context or 10**9) - len(prompt)) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for limit in set(room):
        numbers = [number for number in range(len(prompts)) if room[number] == limit]
        for number, new in zip(numbers, generate(model, [prompts[n] for n in numbers], limit), strict=True):
            answers[number] = new
    return answers


def _check_length(model: LoadedModel, length: int) -> None:
    if model.context is not None and length > model.context:
        raise SettingError(f"the query has {length} tokens; the model's context is {model.context}")


def _check_query(model: LoadedModel, encoded: Encoded, query: Query) -> None:
    _check_length(model, len(encoded.ids))
    if not encoded.targets:
        what = "the model ended at once" if query.completion is None else "the completion has no token"
        raise SettingError(f"nothing to trace for prompt {query.prompt[:60]!r}: {what}. Give another --completion.")


def _answers(
    model: LoadedModel, asked: list[Query], encoded: list[Encoded], generated: list[str | None]
) -> list[Answer]:
    answers = []
    for query, ids, text in zip(asked, encoded, generated, strict=True):
        nll = token_losses(model, collate([ids])).nll[0].tolist()
        places = [t for t, supervised in enumerate(ids.supervised) if supervised]
        answers.append(
            Answer(
                prompt=query.prompt,
                completion=text if query.completion is None else query.completion,  # type: ignore[arg-type]
                is_generated=query.completion is None,
                tokens=[model.tokenizer.decode([ids.ids[t]]) for t in places],
                probabilities=[math.exp(-nll[t]) for t in places],
            )
        )
    return answers


def _hits(index: Index, helpful: Any, opposing: Any) -> list[Hit]:
    numbers = sorted({*helpful.rows.flatten().tolist(), *opposing.rows.flatten().tolist()} - {-1})
    rows = dict(zip(numbers, index.store.read_rows(numbers), strict=True))
    hits = []
    for query in range(len(helpful.rows)):
        for ranking, sign in ((helpful, 1), (opposing, -1)):
            pairs = zip(ranking.rows[query].tolist(), ranking.scores[query].tolist(), strict=True)
            for rank, (number, score) in enumerate(pairs, start=1):
                if number >= 0:
                    row = rows[number]
                    hits.append(Hit(query, sign * rank, row["id"], score, row["source"], json.loads(row["row"])))
    return hits
