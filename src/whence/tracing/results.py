"""The result of a trace as plain data: answers, the examples behind them, and how far each stands above chance.

Everything that a person or a program reads of a trace is here; `reports` only draws it. Larger scores are more helpful.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float32
from torch import Tensor

from whence import outlets
from whence.brief import brief
from whence.corpus.layouts import Row, shown_text
from whence.counts import number_of
from whence.tracing.stability import Stability

SURE = 0.5
"""The model is called sure of a token from this probability on."""


@dataclass(frozen=True)
class Answer:
    """A query's completion as tokens, with the model's probability of each."""

    __repr__ = brief

    prompt: str
    completion: str
    is_generated: bool
    tokens: list[str]
    """The completion's tokens, as text, the closing one included where it is part of the query's layout."""
    probabilities: list[float]
    """Probability of each token, given the tokens before it, under the last checkpoint."""
    asked: list[bool] = field(default_factory=list)
    """For each token, whether the query is about it. Empty: it is about all of them."""
    contrast: str | None = None
    """The completion that this one is compared with ("why this and not that")."""
    contrast_tokens: list[str] = field(default_factory=list)
    contrast_probabilities: list[float] = field(default_factory=list)
    ending: str | None = None
    """Where a generated answer ended, in words: by which token, or cut by which limit."""
    is_repeatable: bool = True
    """Whether a generated answer's `completion`, given back, becomes its `tokens`."""

    def as_json(self) -> dict[str, Any]:
        """For a file; what is known of a generated answer alone is left out of another."""
        others = () if self.is_generated else ("ending", "is_repeatable")
        return {name: value for name, value in vars(self).items() if name not in others} | {
            "perplexity": self.perplexity
        }

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss of a token in nats: 1 is certain, the vocabulary's size is a blind guess."""
        return _perplexity(self.probabilities)

    @property
    def certainty(self) -> str:
        """How sure the model is of the tokens that the query is about, in words."""
        places = [place for place, is_asked in enumerate(self.asked) if is_asked] or range(len(self.probabilities))
        probabilities = [self.probabilities[place] for place in places]
        sure = sum(probability >= SURE for probability in probabilities)
        of_span = " of the span" if len(probabilities) < len(self.probabilities) else ""
        words = (
            f"{sure} of {number_of(len(probabilities), 'token')}{of_span} at p >= {SURE}; "
            f"perplexity {_perplexity(probabilities):,.2f} a token"
        )
        guesses = ". The model guesses here: expect examples that score high for any question."
        return words + guesses if sure < len(probabilities) / 2 else words

    def query_tokens(self) -> list[str]:
        """Text of the tokens that the query is about, those of the contrast after them: rows of a `TokenMatrix`."""
        in_query = self.asked or [True] * len(self.tokens)
        return [token for token, is_asked in zip(self.tokens, in_query, strict=True) if is_asked] + self.contrast_tokens


def _perplexity(probabilities: Sequence[float]) -> float:
    if not probabilities:
        return math.nan
    return math.exp(sum(-math.log(max(p, 1e-30)) for p in probabilities) / len(probabilities))


AND_NOT = "\n\nand not: "
"""What stands between a preferred answer and a rejected one."""


@dataclass(frozen=True)
class TokenMatrix:
    """Influence of each training token on each query token: entries sum to the example's exact score."""

    basis: str
    """`position`: where in the training text the gradient arises. `loss`: which training token is predicted."""
    query: list[str] = field(repr=False)
    """Tokens as `Answer.query_tokens` has them; rows of a contrast's tokens have a minus in the matrix."""
    train: list[str] = field(repr=False)
    """Tokens of the training example: all of them by `position`, the supervised ones by `loss`. Of a contrast those of
    the rejected answer follow, and the prompt's with them."""
    supervised: list[bool] = field(repr=False)
    """For each of `train`, whether the example is trained to say it."""
    matrix: Float32[Tensor, "u s"] = field(repr=False)
    rejected_from: int | None = None
    """Of a contrast, where among `train` the rejected answer's sequence begins."""

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        out = {"basis": self.basis, "query": self.query, "train": self.train, "matrix": self.matrix.tolist()}
        return out if self.rejected_from is None else out | {"rejected_from": self.rejected_from}

    def shown_train(self) -> list[str]:
        """The training example's tokens as a person reads them one after another, with a word between two answers."""
        places = enumerate(self.train)
        return [f"{AND_NOT}{text}" if place == self.rejected_from else text for place, text in places]


@dataclass(frozen=True)
class Null:
    """One training example's scores for control queries, and the place of this query's score among them."""

    scores: list[float] = field(repr=False)
    """The example's score for each control query."""
    mean: float
    z: float
    """(score - mean) / standard deviation of `scores`."""
    percentile: float
    """Share of control queries that this example scores lower for, 0 to 100."""
    generic: bool
    """Whether it scores high for any query; see `nulls`."""
    score: float | None = None
    """This query's score that `z` is of, in the unit of `scores`. None: not known, in a trace of an older Whence."""


@dataclass(frozen=True)
class Hit:
    """One training example behind an answer."""

    __repr__ = brief

    query: int
    """Number of the query, from 0."""
    rank: int
    """From 1 for the highest score; from -1 for the lowest, which opposes where what ranks it is negative."""
    id: str
    score: float
    """Score from the index' vectors, or by the trace's method; with `specific`, less the mean over the controls."""
    source: str | None
    row: Row
    """The corpus row."""
    exact: float | None = None
    """The same score from unprojected gradients, never corrected."""
    null: Null | None = None
    by_token: list[float] | None = None
    """Share of each query token in `score`, from the index' vectors; sums to it, before any correction."""
    tokens: TokenMatrix | None = field(default=None, repr=False)
    exact_rank_score: float | None = None
    """With `exact`, what orders the ranks: the exact score, with `specific` less the mean over the controls."""
    rejected: str | None = None
    """Of a row that is a contrast, the answer that it is held against; see `corpus.preferences`."""
    margin: float | None = None
    """Where the index alone ranks, `score` plus and minus this holds the exact score for 95 of 100 rows shown. None:
    exact scores rank, or the error is not known; see `stability`."""

    @property
    def rank_score(self) -> float:
        """What orders the ranks, from the index or exact."""
        return self.score if self.exact_rank_score is None else self.exact_rank_score

    def as_row(self) -> Row:
        """For a file: the numbers beside the row's own text."""
        columns: Row = {"query": self.query, "rank": self.rank, "id": self.id, "score": self.score}
        if self.exact is not None:
            columns["exact"] = self.exact
        if self.margin is not None:
            columns["margin"] = self.margin
        if self.null is not None:
            columns |= {"z": self.null.z, "percentile": self.null.percentile, "generic": self.null.generic}
        columns |= {"source": self.source} | shown_text(self.row)
        columns |= {} if self.rejected is None else {"rejected": self.rejected}
        if self.by_token is not None:
            columns["by_token"] = self.by_token
        if self.tokens is not None:
            columns["tokens"] = self.tokens.as_json()
        return columns


@dataclass(frozen=True)
class Reranking:
    """How many rows of an index' ranking exact gradients have ordered, and how sure that is to be enough."""

    helpful: int
    """From the highest score on."""
    opposing: int
    """From the lowest score on."""
    sure: float | None = None
    """Probability that the exact best are among these, from the index' own error: as if none lay below the rows that
    were compared (`depth.candidates`). None: it is not known."""
    sure_opposing: float | None = None
    """The same of the exact lowest."""


@dataclass(frozen=True)
class Trace:
    """Answers and the examples behind them."""

    answers: list[Answer]
    hits: list[Hit]
    """Hits in the order of query and rank: helpful first, then opposing."""
    method: str
    rows: int
    """Number of examples that could be ranked."""
    verdicts: list[str] = field(default_factory=list)
    """For each query, whether any example stands above the null, in words. Empty: there was no null."""
    levels: list[float] = field(default_factory=list)
    """For each query, the z that the best z of 19 in 20 meaningless completions of its length stays below; see
    `levels`. Empty: there was no null."""
    overlaps: list[float] = field(default_factory=list)
    """For each query, with `exact`: share of the index' best examples that are among the exact best."""
    notes: list[str] = field(default_factory=list)
    """What else a person should know, such as fewer rows than were asked for."""
    settings: dict[str, str] = field(default_factory=dict)
    """How it was made, for a person: model, index, projection, objective, controls and so on."""
    rerankings: list[Reranking] = field(default_factory=list)
    """For each query, with `exact`: how deep the short lists were."""
    stabilities: list[Stability] = field(default_factory=list)
    """For each query, how much of its helpful side would stand. Empty: the method is not of an index."""
    curvature_time: str = field(default="", compare=False)
    """What curvature would take here, in words, where exact gradients were timed. It is in no file: it varies."""
    best_z: list[float | None] = field(default_factory=list)
    """For each query, the best z, of which the verdict is; None where no example has one. Empty: there was no null, or
    it is a trace of an older Whence."""
    listed: int | None = None
    """Rows on each side that were scored, where the index lists some; None: all that can be ranked."""

    to_arrow = outlets.to_arrow
    to_pandas = outlets.to_pandas
    save = outlets.save
    _repr_html_ = outlets.as_html

    def __repr__(self) -> str:
        """How much there is, the first examples, and how to go on."""
        lines = [
            f"Trace({self.method} over {number_of(self.rows, 'example')}, "
            f"{number_of(len(self.answers), 'answer')}, {number_of(len(self.hits), 'hit')})"
        ]
        for number, answer in enumerate(self.answers[:3]):
            first = next((f"{hit.id} first, score {hit.rank_score:+.4g}" for hit in self.of(number)), "no example")
            lines.append(
                f"  {answer.prompt[:50]!r}: {first}. {self.verdicts[number] if self.verdicts else ''}".rstrip()
            )
        return "\n".join([*lines, "  More: .of(QUERY), .answers, .verdicts, .notes; [hit.as_row() for hit in .hits]"])

    @property
    def needed_z(self) -> float | None:
        """The level of the one query, and of many the highest; None: there was no null."""
        return max(self.levels, default=None)

    def of(self, query: int, *, opposing: bool = False) -> list[Hit]:
        """Hits of one query on one side."""
        return [hit for hit in self.hits if hit.query == query and (hit.rank < 0) == opposing]
