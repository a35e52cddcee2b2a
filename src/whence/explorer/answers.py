"""A prompt becomes an answer, token by token, and the answer's tokens scores of every row.

Answers stay in memory, so that any stretch is ranked at once; the oldest make room for new ones. A page that asks about
an answer that is gone asks the question again.
"""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float32
from torch import Tensor

from whence import catalogue, runner
from whence.corpus.tokens import Encoded, encode
from whence.errors import SettingError, WhenceError
from whence.explorer.corpus_rows import CorpusRows
from whence.explorer.requests import AnswerRequest
from whence.explorer.verbatim import VerbatimIndex
from whence.explorer.waiting_line import Request
from whence.indexing.opening import Index
from whence.models.generation import ends_of
from whence.models.loading import LoadedModel
from whence.tracing import nulls
from whence.tracing.answer_tokens import AnswerTokens, about, answer_tokens, is_linear, product_bytes, stretch_scores
from whence.tracing.baselines import all_scores
from whence.tracing.levels import Shape
from whence.tracing.own_answers import Sampling
from whence.tracing.queries import EncodedQuery, Query, encode_queries, token_texts
from whence.tracing.retrieval import Retrieval, TraceSettings

MOST_BYTES = 2**29
"""Memory of all answers' scores; the last one stays whatever its size."""
MOST_ANSWERS = 200
MOST_STRETCHES = 32
"""Scores of other methods that an answer keeps."""
LEVEL_TOP = 10
"""Examples of which the best is held against chance."""

OF_TOKENS = ("cosine", "dot")
"""Methods whose scores of tokens add up to those of any stretch."""
Stretch = tuple[bool, ...]
"""For each token of an answer, whether it is asked about."""


class AnswerGoneError(WhenceError):
    """An answer is not in memory any more, or never was."""


class NotScoredError(WhenceError):
    """Scores are asked for at once that take a pass of the model."""


@runtime_checkable
class OpenRun(Protocol):
    """The training that an index is of, as `indexed_run` opens it, whose import brings the Trainer."""

    @property
    def path(self) -> str:
        """Its directory."""
        ...

    def scores(
        self, query: EncodedQuery, method: str, *, progress: runner.ProgressOption = False
    ) -> tuple[Float32[Tensor, " m"], list[str]]:
        """Scores of the index' rows, -inf where one was not trained on; and what is to be known of them."""
        ...


@dataclass
class ExploredIndex:
    """An index that pages ask about, with what is computed once."""

    number: int
    index: Index
    rows: CorpusRows
    context: int | None = None
    """Tokens that its model takes. It is kept here since a model that is at work answers nothing else."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of methods, such as the directory of curvature."""
    run: OpenRun | None = None
    """The training that it is of, for methods that go back through one."""
    levels: dict[tuple[str, Shape], float] = field(default_factory=dict)
    _controls: dict[bool, nulls.Controls | None] = field(default_factory=dict)
    _verbatim: VerbatimIndex | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _verbatim_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """Its directory, as it was given."""
        return self.index.store.place.root

    def encoded(self, numbers: Sequence[int]) -> dict[int, Encoded]:
        """Rows as token ids, by number, as the index was made of them."""
        tokenizer, longest = self.index.model().tokenizer, self.index.store.manifest.settings["max_tokens"]
        return {number: encode(self.rows.row(number), tokenizer, longest) for number in numbers}

    def controls(self, *, cosine: bool) -> nulls.Controls | None:
        """The null's controls; None where the index has too few rows, or its vectors are no queries."""
        with self._lock:
            if cosine not in self._controls:
                has_queries = self.index.space.view == "sgd"
                self._controls[cosine] = nulls.row_controls(self.index, cosine=cosine) if has_queries else None
            return self._controls[cosine]

    def verbatim(self) -> VerbatimIndex:
        """The suffix array of all rows."""
        with self._verbatim_lock:
            if self._verbatim is None:
                self._verbatim = VerbatimIndex(self.rows.text(number) for number in range(len(self.rows)))
            return self._verbatim


@dataclass
class Answered:
    """An answer in memory."""

    id: str
    explored: ExploredIndex
    request: AnswerRequest
    query: EncodedQuery
    """About the whole of the answer."""
    is_cut: bool
    """Whether no token that ends an answer belongs to it."""
    tokens: AnswerTokens | None = None
    """None where tokens do not add up in this index."""
    scores: "OrderedDict[tuple[str, Stretch], Float32[Tensor, ' n']]" = field(default_factory=OrderedDict)
    """Of stretches that were a pass of their own, and of methods that read the corpus."""
    norms: dict[Stretch, Float32[Tensor, " c"]] = field(default_factory=dict)
    notes: dict[tuple[str, Stretch], list[str]] = field(default_factory=dict)
    """What is to be known of some of these scores."""

    @property
    def bytes(self) -> int:
        """Memory that its scores take."""
        kept = sum(scores.numel() * scores.itemsize for scores in self.scores.values())
        return kept + (0 if self.tokens is None else self.tokens.bytes)

    def stretch(self, tokens: Sequence[Sequence[int]] | None) -> Stretch:
        """The tokens that some stretches [from, to) hold; all where there are none."""
        count = len(self.query.answer.tokens)
        asked = [any(first <= place < end for first, end in tokens or [(0, count)]) for place in range(count)]
        if not any(asked):
            raise SettingError(f"tokens {tokens}: none of the answer's is between these; it has {count}")
        return tuple(asked)

    def known(self, method: str, stretch: Stretch) -> Float32[Tensor, " n"] | None:
        """Scores by a method that take no model; None: they have to be computed (`computed`).

        Larger is more helpful, in the method's own unit; -inf where a row cannot be ranked.
        """
        if method in OF_TOKENS and self.tokens is not None:
            return self.tokens.scores(stretch, cosine=method == "cosine")
        return self.scores.get((method, stretch))

    def query_norms(self, stretch: Stretch) -> Float32[Tensor, " c"]:
        """Norms of a stretch's vector, to which controls are scaled."""
        return self.norms[stretch] if self.tokens is None else self.tokens.norms(stretch)

    def computed(
        self, method: str, stretch: Stretch, *, progress: runner.ProgressOption = False
    ) -> Float32[Tensor, " n"]:
        """Scores by a method, from memory or by the model; -inf where a row cannot be ranked.

        Raises:
            SettingError: The method goes back through a run, and none is open.
        """
        if (scores := self.known(method, stretch)) is not None:
            return scores
        index, query = self.explored.index, about(self.query, stretch)
        if method in OF_TOKENS:
            whole = stretch_scores(index, self.query, stretch)
            self.norms[stretch] = whole.norms([True])
            scores = whole.scores([True], cosine=method == "cosine")
        elif catalogue.trace_method(method).needs_run:
            if self.explored.run is None:
                raise SettingError(f"--method {method} goes back through a training: whence explore INDEX --run RUN")
            scores, self.notes[method, stretch] = self.explored.run.scores(query, method, progress=progress)
        else:
            options = self.explored.options.get(method)
            with runner.shown_as(progress, "Ranking"):
                scores = all_scores(index, [query], method=method, objective="loss", seed=0, options=options)[0]
        self.scores[method, stretch] = scores
        self.scores.move_to_end((method, stretch))
        while len(self.scores) > MOST_STRETCHES:
            oldest, _ = self.scores.popitem(last=False)
            self.notes.pop(oldest, None)
        return scores

    def level(self, method: str, stretch: Stretch, *, measures: bool) -> float | None:
        """The z that chance reaches for such a stretch; None: it is not known, and is not to be measured now."""
        first, end = stretch.index(True), len(stretch) - stretch[::-1].index(True)
        has_gaps = not all(stretch[first:end])  # no level is known of such a stretch
        if method not in OF_TOKENS or has_gaps or self.explored.controls(cosine=method == "cosine") is None:
            return None
        query = about(self.query, stretch)
        key = (method, Shape.of(query, self.explored.context))
        if key not in self.explored.levels and measures:
            settings = TraceSettings(method=method, exact=False, top=LEVEL_TOP)
            if traced := Retrieval(self.explored.index, [query], settings).trace().levels:
                self.explored.levels[key] = traced[0]
        return self.explored.levels.get(key)


class Answers:
    """Answers in memory, by their ids."""

    def __init__(self, explored: Sequence[ExploredIndex]):
        self.explored = list(explored)
        self._answers: OrderedDict[str, Answered] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, id: str) -> Answered:
        """An answer, which is then the newest.

        Raises:
            AnswerGoneError: It is gone.
        """
        with self._lock:
            if id not in self._answers:
                raise AnswerGoneError("this answer is not in memory any more: ask the question again")
            self._answers.move_to_end(id)
            return self._answers[id]

    def answer(self, request: Request, asked: AnswerRequest) -> None:
        """Answer a question, telling each token, and keep what was said with its scores."""
        explored = self.explored[asked.index]
        index = explored.index
        model = index.model()
        said: list[int] = []

        def on_token(token: int, probability: float) -> None:
            said.append(token)
            (text,) = token_texts(model, said, [len(said) - 1])
            request.tell("token", text=text, p=probability)

        sampling = Sampling(max_new_tokens=asked.max_new_tokens, temperature=asked.temperature, seed=asked.seed)
        query = Query(asked.prompt, asked.completion, contrast=asked.contrast, context=asked.context())
        with runner.shown_as(request.progress, "Answering"):
            (encoded,) = encode_queries([query], model, kind=index.layout, sampling=sampling, on_token=on_token)
            if asked.is_cut and asked.completion is not None:
                encoded = without_end(encoded, model)
            is_cut = asked.is_cut if asked.completion is not None else _last(encoded)[1] not in ends_of(model)
            answered = Answered(secrets.token_hex(8), explored, asked, encoded, is_cut)
            request.tell("answer", answer=answer_json(answered))
            if is_linear(index) and product_bytes(index, encoded) <= MOST_BYTES:
                answered.tokens = answer_tokens(index, encoded)
            else:
                answered.computed("cosine", answered.stretch(None))
            explored.controls(cosine=True)
        self._keep(answered)
        request.tell("ready", answer=answered.id)

    def _keep(self, answered: Answered) -> None:
        with self._lock:
            self._answers[answered.id] = answered
            while len(self._answers) > 1 and (
                len(self._answers) > MOST_ANSWERS or sum(each.bytes for each in self._answers.values()) > MOST_BYTES
            ):
                self._answers.popitem(last=False)


def without_end(query: EncodedQuery, model: LoadedModel) -> EncodedQuery:
    """A query whose answer was cut, about what was said alone: a completion that is given is closed otherwise."""
    first, *others = query.sequences
    encoded, answer = first.encoded, query.answer
    place, token = _last(query)
    if token not in ends_of(model) or len(answer.tokens) == 1:
        return query
    supervised = [is_target and number != place for number, is_target in enumerate(encoded.supervised)]
    said = replace(answer, tokens=answer.tokens[:-1], probabilities=answer.probabilities[:-1], asked=answer.asked[:-1])
    return replace(
        query, sequences=[replace(first, encoded=replace(encoded, supervised=supervised)), *others], answer=said
    )


def _last(query: EncodedQuery) -> tuple[int, int]:
    """Place and id of an answer's last token."""
    encoded = query.sequences[0].encoded
    place = max(place for place, is_target in enumerate(encoded.supervised) if is_target)
    return place, encoded.ids[place]


def answer_json(answered: Answered) -> dict[str, Any]:
    """An answer as a page shows it."""
    answer = answered.query.answer
    contrast = None
    if answer.contrast is not None:
        pairs = zip(answer.contrast_tokens, answer.contrast_probabilities, strict=True)
        contrast = {"completion": answer.contrast, "tokens": [{"text": text, "p": p} for text, p in pairs]}
    return {
        "id": answered.id,
        "index": answered.explored.number,
        "prompt": answer.prompt,
        "completion": answer.completion,
        "is_generated": answer.is_generated,
        "is_repeatable": answer.is_repeatable,
        "is_cut": answered.is_cut,
        "tokens": [{"text": text, "p": p} for text, p in zip(answer.tokens, answer.probabilities, strict=True)],
        "ending": answer.ending,
        "certainty": answer.certainty,
        "contrast": contrast,
    }
