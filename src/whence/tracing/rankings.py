"""What is known of a query's examples while a trace is made: both ends of a ranking, and their scores."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from jaxtyping import Float32
from torch import Tensor

from whence.indexing.scan import Ranking
from whence.tracing.results import Reranking, TokenMatrix
from whence.tracing.stability import Stability


@dataclass(frozen=True)
class Side:
    """One query's ranking on one side, best first."""

    sign: int
    """1 for helpful, -1 for opposing."""
    rows: list[int]
    scores: list[float]

    @staticmethod
    def of(ranking: Ranking, query: int, sign: int) -> "Side":
        """One query's ranking, without the places that no row filled."""
        pairs = zip(ranking.rows[query].tolist(), ranking.scores[query].tolist(), strict=True)
        filled = [(row, score) for row, score in pairs if row >= 0]
        return Side(sign, [row for row, _ in filled], [score for _, score in filled])

    def ordered(self, exact_scores: dict[int, float], means: dict[int, float]) -> "Side":
        """By exact score less the row's mean over the controls; equal ones in their old order."""
        order = sorted(
            range(len(self.rows)),
            key=lambda place: -self.sign * (exact_scores[self.rows[place]] - means[self.rows[place]]),
        )
        return Side(self.sign, [self.rows[place] for place in order], [self.scores[place] for place in order])

    def joined(self, other: "Side") -> "Side":
        """With the rows of the other side that it lacks."""
        more = [place for place, row in enumerate(other.rows) if row not in {*self.rows}]
        rows, scores = [other.rows[place] for place in more], [other.scores[place] for place in more]
        return Side(self.sign, self.rows + rows, self.scores + scores)

    def without(self, others: Collection[int]) -> "Side":
        """The rows that are none of these."""
        places = [place for place, row in enumerate(self.rows) if row not in others]
        return Side(self.sign, [self.rows[place] for place in places], [self.scores[place] for place in places])

    def cut(self, top: int) -> "Side":
        """The first `top` rows."""
        return Side(self.sign, self.rows[:top], self.scores[:top])

    def ranked(self) -> Iterator[tuple[int, int, float]]:
        """(rank, row, score)."""
        places = zip(self.rows, self.scores, strict=True)
        return ((self.sign * place, row, score) for place, (row, score) in enumerate(places, start=1))


@dataclass
class QueryResult:
    """One query's rankings, with all that has been computed for them so far."""

    sides: list[Side]
    norms: Float32[Tensor, " c"]
    """Norms that controls are scaled to."""
    means: dict[int, float]
    """Each row's mean score over the controls, where ranking is corrected for it; else 0."""
    exact: dict[int, float] = field(default_factory=dict)
    by_token: dict[int, tuple[list[float], TokenMatrix]] = field(default_factory=dict)
    overlap: float | None = None
    reranking: Reranking | None = None
    stability: Stability = field(default_factory=Stability)
    margins: dict[int, float] = field(default_factory=dict)
    """Half-widths of the intervals around the index' scores, where these rank."""
    listed: list[Side] = field(default_factory=list)
    """The sides as the index has them, where another method scored what it lists."""

    @property
    def rows(self) -> list[int]:
        """Rows of both sides, each once."""
        return sorted({row for side in self.sides for row in side.rows})

    def reorder(self, top: int) -> None:
        """Order the rows of both short lists by exact scores, from either end, and set the overlap of the rankings."""
        helpful, opposing = self.sides
        self.sides = [side.joined(other).ordered(self.exact, self.means)
                      for side, other in ((helpful, opposing), (opposing, helpful))]  # fmt: skip
        best = helpful.rows[:top]
        self.overlap = len({*best} & {*self.sides[0].rows[:top]}) / len(best) if best else 1.0
