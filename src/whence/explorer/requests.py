"""What a page may ask, and how large it may be: every request's body, checked before anything is done."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from whence.corpus.shapes import Row
from whence.explorer.corpus_rows import Filters

MOST_CHARACTERS = 20_000
"""Of a prompt, a completion, a turn."""
MOST_NEW_TOKENS = 512
MOST_TOP = 50
MOST_TURNS = 50

Text = Annotated[str, StringConstraints(max_length=MOST_CHARACTERS)]
Id = Annotated[str, StringConstraints(max_length=64)]
Place = Annotated[int, Field(ge=0, le=2**31)]
Value = str | bool | int
Stretch = Annotated[list[Place], Field(min_length=2, max_length=2)]
"""Tokens of an answer: from, and to without the last."""


class _Body(BaseModel):
    """A body without other fields than these."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Turn(_Body):
    """An earlier turn of a conversation."""

    role: Literal["user", "assistant"]
    content: Text


class AnswerRequest(_Body):
    """A prompt to answer, or with its completion to score."""

    index: Place = 0
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARACTERS)]
    system: Text | None = None
    history: Annotated[list[Turn], Field(max_length=MOST_TURNS)] = []
    completion: Text | None = None
    contrast: Text | None = None
    is_cut: bool = False
    """The completion was cut: no token that ends an answer belongs to it."""
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] = 64
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    seed: Place = 0

    def context(self) -> Row | None:
        """What stands before the prompt, as a corpus row has it."""
        context: dict[str, Any] = {"system": self.system} if self.system else {}
        if self.history:
            turns = [{"role": turn.role, "content": turn.content} for turn in self.history]
            first = [{"role": "system", "content": self.system}] if self.system else []
            return {"messages": [*first, *turns, {"role": "user", "content": self.prompt}]}
        return context or None


class FilterRequest(_Body):
    """Which rows may be ranked."""

    sources: Annotated[list[Text | None], Field(max_length=500)] | None = None
    columns: Annotated[dict[Text, Annotated[list[Value], Field(max_length=100)]], Field(max_length=50)] = {}
    text: Text = ""

    def filters(self) -> Filters:
        """The same for `CorpusRows`."""
        return Filters(self.sources, self.columns, self.text)


class _OfAnswer(_Body):
    """About a stretch of an answer."""

    answer: Id
    tokens: Annotated[list[Stretch], Field(max_length=1000)] | None = None


class RankingRequest(_OfAnswer):
    """Rows by one method."""

    method: Id = "cosine"
    top: Annotated[int, Field(ge=1, le=MOST_TOP)] = 20
    fold: bool = True
    filters: FilterRequest = FilterRequest()


class ExportRequest(RankingRequest):
    """What is shown, as a file."""

    what: Literal["with", "without", "rows", "report"]


class LevelRequest(_OfAnswer):
    """What chance reaches."""

    method: Id = "cosine"


class MatrixRequest(_OfAnswer):
    """Rows token by token."""

    rows: Annotated[list[Place], Field(max_length=2 * MOST_TOP)]
    method: Id = "cosine"
    """By which the rows are ranked: of any but the inner product the colours are the cosine's."""


class ComparisonRequest(_OfAnswer):
    """Methods side by side."""

    methods: Annotated[list[Id], Field(min_length=1, max_length=20)]
    top: Annotated[int, Field(ge=1, le=MOST_TOP)] = 10
    fold: bool = True
    filters: FilterRequest = FilterRequest()


class SpanRequest(_Body):
    """Verbatim pieces of an answer."""

    answer: Id


class SearchRequest(_Body):
    """Rows by their words."""

    index: Place = 0
    text: Text = ""
    filters: FilterRequest = FilterRequest()
    limit: Annotated[int, Field(ge=1, le=MOST_TOP)] = 20
    offset: Place = 0
