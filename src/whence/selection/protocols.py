"""The protocols of selection: the view that a scorer reads, the scorer, and the selector.

Letters in shapes: `n` training examples, `q` queries, `s` targets, `c` checkpoints, `k` sketch width.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float32
from torch import Tensor

from whence.corpus.layouts import Row
from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.gradients.exact import SignedSequence, sequences_of
from whence.models.loading import LoadedModel


@dataclass(frozen=True)
class QueryText:
    """A query as a scorer reads it: as text and as token ids."""

    prompt: str
    completion: str
    encoded: Encoded
    """Prompt and completion, laid out like a row of the corpus; the completion is supervised."""


@dataclass(frozen=True)
class Target:
    """What scores are for: queries that are scored together, such as the examples of one task."""

    name: str
    queries: Sequence[QueryText]

    def __post_init__(self):
        if not self.queries:
            raise SettingError(f"target {self.name!r} has no query; a target needs at least one example")

    def sequences(self) -> list[SignedSequence]:
        """Its sequences, whose gradients add up to the mean of its queries'."""
        share = 1 / len(self.queries)
        return [
            replace(sequence, sign=share * sequence.sign)
            for query in self.queries
            for sequence in sequences_of(query.encoded)
        ]


@runtime_checkable
class View(Protocol):
    """What a scorer reads of a corpus, indexed or not. Rows always come in the corpus' order."""

    @property
    def rows(self) -> int:
        """`n`."""
        ...

    @property
    def tokens_per_batch(self) -> int:
        """The most tokens of one forward pass, padding included."""
        ...

    def examples(self) -> Iterator[Row]:
        """Every corpus row, also those that are never ranked."""
        ...

    def encoded(self) -> Iterator[Encoded]:
        """The same rows as token ids, cut as the index cut them."""
        ...

    def model(self) -> LoadedModel:
        """The model of the last checkpoint."""
        ...


@runtime_checkable
class GradientView(View, Protocol):
    """A view of an indexed corpus that shows its vectors too."""

    @property
    def weights(self) -> Float32[Tensor, " c"]:
        """Share of each checkpoint in a score; they sum to 1."""
        ...

    @property
    def blocks(self) -> Mapping[str, tuple[slice, int]]:
        """Every traced layer's columns in a vector, and its number of weights. Layers may share columns."""
        ...

    def vectors(self) -> Iterator[tuple[Float32[Tensor, "c n k"], Bool[Tensor, " n"]]]:
        """Every row's vectors, some rows at a time, and whether each row can be ranked; vectors of the others are 0."""
        ...

    def query_vectors(self, queries: Sequence[Encoded]) -> Float32[Tensor, "c q k"]:
        """Plain gradients of queries, whatever the rows' view; not finite for a query without a gradient."""
        ...

    def norms(self, vectors: Float32[Tensor, "c s k"]) -> Float32[Tensor, "c s"]:
        """Norms of query vectors, or of their means, by which a cosine divides the query's side."""
        ...

    def scores(self, vectors: Float32[Tensor, "c s k"], *, cosine: bool) -> Float32[Tensor, "s n"]:
        """Inner products with every row, summed over checkpoints by their weights; -inf where a row cannot be ranked.

        With `cosine` the row's vector is divided by its norm; `vectors` are taken as they are.
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    """A score of every training example for every target, from whatever a `View` shows.

    A score says how much an example should help with a target: larger is more helpful, always. Its unit is the
    scorer's own, so scores of different scorers compare by rank alone. A row that has no score (no tokens, states
    that are not finite) is given -inf and must not be ranked; NaN is never returned.

    A scorer that compares rows with one query at a time gives a target the mean over those of its queries that have a
    finite score. A target that no row can be compared with is refused by name: without it the scores would answer
    another question than the user's.
    """

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores, on the CPU: a row for each target, a column for each row of the corpus."""
        ...


class MakeScorer(Protocol):
    """A scorer's class, as the catalogue lists it. A scorer without randomness takes a seed too, and ignores it."""

    def __call__(self, *, seed: int = 0) -> Scorer: ...


class Pick(NamedTuple):
    """A row that a selector offers next."""

    row: int
    score: float
    """The score that it is ranked by, without noise."""
    target: int | None
    """Number of the target that it is taken for; None where it is for no single one."""


@runtime_checkable
class Selector(Protocol):
    """An order over rows, from scores. `selection.choice` decides which of them may be taken, and how many.

    A row comes at most once, and a row without a finite score (NaN, either infinity) never: a score that is not finite
    counts neither for its row nor against another row. Equal scores go by the lower row number.
    """

    def __call__(self, scores: Float32[Tensor, "s n"]) -> Generator[Pick, bool, None]:
        """Rows, best first. Send back whether each was taken: a target whose row was refused may offer its next."""
        ...


class MakeSelector(Protocol):
    """A selector's class, as the catalogue lists it."""

    def __call__(self, *, temperature: float = 0.0, seed: int = 0) -> Selector:
        """At temperature 0 it takes the best rows, else it draws them without replacement; see `sampling`."""
        ...
