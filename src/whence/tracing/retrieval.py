"""From an index' vectors to the examples shown: rank, correct, re-rank, add token matrices.

Coarse, then exact: the index' compressed vectors propose a short list as long as their error asks for (`depth`), and
unprojected gradients decide its order (`exact`) and give the token x token matrix of the examples shown (`tokens`). The
overlap of the two rankings is reported every time, so that the compression's cost can be seen.

What is shown rests on exact scores: an example's z is its exact score's place among its scores for the controls, which
come from the index. Those are unbiased, and their noise widens a spread a little: z is rather too small.

Each of the three steps goes through the checkpoints once, whatever the number of queries: loading a model may cost more
than a pass through it.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence import catalogue
from whence.corpus.layouts import Row
from whence.corpus.tokens import Encoded, encode
from whence.counts import number_of
from whence.errors import SettingError
from whence.gradients import exact, tokenwise
from whence.gradients.capture import OBJECTIVES
from whence.gradients.exact import SignedSequence
from whence.gradients.flat_width import FLAT
from whence.indexing.opening import Index
from whence.indexing.scan import Ranking
from whence.selection.pipeline import build_scorer
from whence.selection.views import IndexView
from whence.tracing import nulls
from whence.tracing.depth import Noise, candidates, depth
from whence.tracing.levels import EQUAL_ANSWERS, Meaningless, Shape, answer_of, level_of, meaningless, verdict
from whence.tracing.matrices import TokenShares, shares_by_row
from whence.tracing.queries import EncodedQuery, last_first, query_vectors
from whence.tracing.rankings import QueryResult, Side
from whence.tracing.results import Hit, Reranking, Trace
from whence.tracing.stability import margins, under_checkpoints, under_noise
from whence.turns import one_at_a_time

ListScorer = Callable[[list[EncodedQuery], list[list[int]]], list[Tensor]]
"""Scores of each query for the rows of its own list; larger is more helpful, -inf for one that has none."""
MOST_QUERIES = 64
"""Queries whose short lists are ranked by unprojected gradients where nobody says so: those of more hold most rows."""


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """How to trace."""

    top: int = 10
    """Examples on each side, helpful and opposing."""
    method: str = "cosine"
    """Name in `catalogue.TRACE_METHODS`."""
    objective: str = "loss"
    """The query's objective: "loss", or the log-odds "margin", which does not vanish where the model is sure."""
    exact: bool | None = None
    """Whether a short list is ranked by unprojected gradients. None: where the method and the index allow it, its
    vectors are not whole gradients themselves, and there are at most `MOST_QUERIES` queries."""
    shortlist: int | None = None
    """Length of the short list, on each side. None: as long as it takes (`depth`), or as the method has it."""
    tokens: bool = False
    """Whether to add the token x token matrix of the examples shown, and each query token's share in their scores."""
    basis: str = "position"
    """Basis of the matrix; see `gradients.tokenwise`."""
    specific: bool = False
    """Whether to rank by the score less the example's mean over the control queries."""
    null: bool = True
    """Whether scores are compared with those for control queries."""
    seed: int = 0
    """Seed of drawn controls, sampled completions and the method `random`."""

    def __post_init__(self):
        entry = catalogue.trace_method(self.method)
        for flag, value in (("--top", self.top), ("--shortlist", self.shortlist)):
            if value is not None and value < 1:
                raise SettingError(f"{flag} {value}: a number above 0 is expected")
        for flag, value, known in (
            ("--objective", self.objective, tuple(OBJECTIVES)),
            ("--basis", self.basis, tokenwise.BASES),
        ):
            if value not in known:
                raise SettingError(f"{flag} {value}: choose one of {', '.join(known)}")
        for flags, has_them, names, what in (
            (("exact", "tokens"), entry.has_gradients, catalogue.gradient_methods(), "compare gradients as they are"),
            (("specific",), entry.from_index, catalogue.index_methods(), "score from the index"),
        ):
            if not has_them and (given := [flag for flag in flags if getattr(self, flag)]):
                raise SettingError(
                    f"--{given[0]} belongs to the methods that {what} ({', '.join(names)}), not to --method "
                    f"{self.method}"
                )
        if entry.scorer is not None and self.objective != "loss":
            raise SettingError(f"--objective {self.objective}: --method {self.method} is about the loss")

    def reranks(self, index: Index, queries: int) -> bool:
        """Whether short lists of so many queries are ranked by unprojected gradients."""
        if self.exact is not None:
            return self.exact
        return queries <= MOST_QUERIES and catalogue.trace_method(self.method).reranks and can_rerank(index)

    @property
    def cosine(self) -> bool:
        """Whether vectors are divided by their norms."""
        return catalogue.trace_method(self.method).cosine


def can_rerank(index: Index) -> bool:
    """Whether unprojected gradients say more than an index: its vectors are sketches, of gradients as they are."""
    return index.space.view == "sgd" and index.space.sketch != "identity"


@dataclass
class Retrieval:
    """One trace by an index' vectors."""

    index: Index
    queries: list[EncodedQuery]
    settings: TraceSettings
    control_queries: list[EncodedQuery] | None = None
    """The user's control queries; None draws rows of the index."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the method's scorer, where it has one."""
    stored_rows: dict[int, Row] = field(default_factory=dict)
    """Rows that were read from the index, by number."""
    seconds_a_row: float | None = None
    """What each row's exact score took, where exact scores decided the order."""
    list_scorer: ListScorer | None = None
    """Another method, which orders what the index lists; z and verdict stay those of the index."""

    def trace(self) -> Trace:
        """Rank, correct, re-rank, and add token matrices to what is shown."""
        vectors, controls, levels = self._vectors()
        return self._described(self._ranked(vectors, self._length, controls), vectors, controls, levels)

    @property
    def _length(self) -> int:
        """Rows of the index' ranking that are looked at, on each side."""
        settings = self.settings
        if self.list_scorer is not None:
            return settings.shortlist or settings.top
        knows_noise = self.index.space.sketch in FLAT and catalogue.trace_method(settings.method).has_gradients
        return candidates(settings.top, settings.shortlist) if self.is_exact or knows_noise else settings.top

    @property
    def is_exact(self) -> bool:
        """Whether exact scores decide the order."""
        return self.settings.reranks(self.index, len(self.queries))

    @one_at_a_time
    def _described(
        self,
        rankings: tuple[Ranking, Ranking],
        vectors: Float32[Tensor, "c q k"],
        controls: nulls.Controls | None,
        levels: list[float],
    ) -> Trace:
        """A trace of the rows that were ranked."""
        settings, numbers = self.settings, range(len(self.queries))
        ranked = {row for ranking in rankings for row in ranking.rows.flatten().tolist() if row >= 0}
        has_noise = catalogue.trace_method(settings.method).has_gradients
        noise = Noise.of(self.index, ranked, cosine=settings.cosine) if has_noise else None
        results = [self._result(number, rankings, vectors[:, number]) for number in numbers]
        for result in results:
            if self.list_scorer is not None:
                result.listed = result.sides
            elif self.is_exact:
                self._shorten(result, noise)
            else:
                self._cut(result, noise)
        for result in results:
            self._set_means(result, controls)
        self._read({row for result in results for row in result.rows})
        if self.list_scorer is not None:
            self._score_lists(results, self.list_scorer)
        elif self.is_exact:
            self._rerank(results)
        for result in results:
            result.sides = [side.cut(settings.top) for side in result.sides]
        if settings.tokens:
            self._add_matrices(results, vectors)
        out = Trace([query.answer for query in self.queries], [], settings.method, 0, levels=levels)
        for number, result in enumerate(results):
            hits = self._hits(number, result, controls)
            out.hits.extend(hits)
            out.stabilities.append(result.stability)
            if result.overlap is not None and result.reranking is not None:
                out.overlaps.append(result.overlap)
                out.rerankings.append(result.reranking)
            if levels and controls is not None:
                best = self._best_z(result, hits, controls)
                out.best_z.append(best)
                out.verdicts.append(verdict(best, levels[number]))
        return out

    def _best_z(self, result: QueryResult, hits: Sequence[Hit], controls: nulls.Controls) -> float | None:
        """What the verdict is of: the best of what is shown, or of the index' own best where another method ranks."""
        if not result.listed:
            return max((hit.null.z for hit in hits if hit.null and hit.rank > 0), default=None)
        side = result.listed[0].cut(self.settings.top)
        return self._among(result, side, controls, nulls.best_z) if side.rows else None

    @one_at_a_time
    def _vectors(self) -> tuple[Float32[Tensor, "c q k"], nulls.Controls | None, list[float]]:
        """Gradients of the queries; the controls; and each query's level, where there are controls.

        All gradients are taken in one pass through the checkpoints. A level is measured once for an open index.
        """
        settings, index = self.settings, self.index
        options = {"cosine": settings.cosine, "seed": settings.seed}
        control_queries, control_rows = self._controls()
        texts = tuple(tuple(query.sequences[0].encoded.ids) for query in control_queries)
        own = tuple(sorted((name, str(value)) for name, value in self.options.items()))
        how = (settings.method, own, settings.objective, settings.top, settings.specific, settings.seed, texts)
        has_null = bool(control_queries) or control_rows is not None
        keys = [(*how, Shape.of(query, index.model().context)) for query in self.queries if has_null]
        new = [key for key in dict.fromkeys(keys) if key not in index.levels]
        drawn = [meaningless(index, shape, settings.seed) for *_, shape in new]
        # An index of another view holds what an optimizer makes of its rows, not their gradients as queries.
        plain = self._encoded(control_rows.tolist()) if control_rows is not None and index.space.view != "sgd" else []
        gradients = query_vectors(
            index,
            [query.sequences for query in [*self.queries, *control_queries]]
            + [[SignedSequence(encoded)] for encoded in plain]
            + [query.sequences for queries in drawn for query in queries],
            objective=settings.objective,
        )
        sizes = [len(self.queries), len(control_queries), len(plain), sum(map(len, drawn))]
        vectors, control_vectors, row_vectors, drawn_vectors = self._solved(gradients.split(sizes, 1), control_rows)
        if control_queries:
            controls = nulls.query_controls(index, control_vectors, **options)
        elif control_rows is not None:
            controls = nulls.row_controls(index, vectors=row_vectors if row_vectors.shape[1] else None, **options)
        else:
            return vectors, None, []
        assert controls is not None, "there are enough of them"
        for key, queries, own in zip(new, drawn, drawn_vectors.split([*map(len, drawn)], 1), strict=True):
            index.levels[key] = self._level(queries, own, controls)
        return vectors, controls, [index.levels[key] for key in keys]

    def _solved(
        self, parts: Sequence[Float32[Tensor, "c _ k"]], control_rows: Int64[Tensor, " m"] | None
    ) -> Sequence[Float32[Tensor, "c _ k"]]:
        """Vectors of queries, controls, rows as controls and meaningless completions, as the index is asked for them.

        For a method with a curvature of its own they are divided by it, the index' own rows too.
        """
        entry = catalogue.trace_method(self.settings.method)
        if not entry.is_solved or entry.scorer is None:
            return parts
        queries, controls, rows, drawn = parts
        if control_rows is not None and not rows.shape[1]:
            rows, _ = self.index.store.vectors(control_rows.tolist())
        parts = [queries, controls, rows, drawn]
        scorer = build_scorer(entry.scorer, self.settings.seed, self.options)
        return scorer.solved(IndexView(self.index), torch.cat(parts, 1)).split([part.shape[1] for part in parts], 1)

    def _controls(self) -> tuple[list[EncodedQuery], Tensor | None]:
        """Control queries: the user's, or numbers of rows."""
        settings, queries = self.settings, self.control_queries or []
        if not (settings.null or settings.specific):
            return [], None
        if queries and len(queries) < nulls.LEAST:
            raise SettingError(
                f"--controls: {number_of(len(queries), 'query', 'queries')}; to say what chance reaches takes "
                f"{nulls.LEAST} or more"
            )
        rows = None if queries else nulls.control_rows(self.index, seed=settings.seed)
        if settings.specific and not queries and rows is None:
            raise SettingError(f"--specific needs at least {nulls.LEAST} control queries; give more with --controls")
        return queries, rows

    def _level(
        self, queries: Sequence[Meaningless], vectors: Float32[Tensor, "c q k"], controls: nulls.Controls
    ) -> float:
        """The best z that meaningless completions reach, traced as queries are."""
        top, best = self.settings.top, list[float | None]()
        rankings = self._ranked(vectors, top + EQUAL_ANSWERS, controls)
        for number, query in enumerate(queries):
            result = self._result(number, rankings, vectors[:, number])
            self._set_means(result, controls)
            side = result.sides[0]
            if query.answers:
                self._read(side.rows)
                own = {row for row in side.rows if answer_of(self.index, self.stored_rows[row]) in query.answers}
                side = side.without(own)
            is_left = bool(side.rows) or not query.answers
            best.append(self._among(result, side.cut(top), controls, nulls.best_z) if is_left else None)
        return level_of(queries, best)

    def _ranked(
        self, vectors: Float32[Tensor, "c q k"], m: int, controls: nulls.Controls | None
    ) -> tuple[Ranking, Ranking]:
        return self.index.store.top_k(
            vectors,
            torch.tensor(self.index.weights, dtype=torch.float32),
            m=m,
            cosine=self.settings.cosine,
            minus=controls.mean(self._norms(vectors)) if self.settings.specific and controls is not None else None,
        )

    def _norms(self, vectors: Float32[Tensor, "c q k"]) -> Float32[Tensor, "c q"]:
        """Queries' norms; 1 for the cosine, which divides by them."""
        return torch.ones(vectors.shape[:2], dtype=torch.float32) if self.settings.cosine else vectors.norm(dim=2)

    def _result(self, query: int, rankings: tuple[Ranking, Ranking], vector: Float32[Tensor, "c k"]) -> QueryResult:
        sides = [Side.of(ranking, query, sign) for ranking, sign in zip(rankings, (1, -1), strict=True)]
        return QueryResult(sides, self._norms(vector[:, None])[:, 0], {})

    def _set_means(self, result: QueryResult, controls: nulls.Controls | None) -> None:
        """What ranks are corrected by."""
        rows = result.rows
        result.means = dict.fromkeys(rows, 0.0)
        if self.settings.specific and controls is not None and rows:
            scores = nulls.control_scores(self.index, controls, rows, cosine=self.settings.cosine, norms=result.norms)
            result.means = dict(zip(rows, scores.mean(1).tolist(), strict=True))

    def _shorten(self, result: QueryResult, noise: Noise | None) -> None:
        """Cut both sides to the rows that are re-ranked."""
        settings, depths = self.settings, []
        for side in result.sides:
            spread = None if noise is None else noise.for_query(side.rows, result.norms)
            depths.append(depth(torch.tensor(side.scores) * side.sign, spread, settings.top, settings.shortlist))
        helpful, opposing = depths
        result.reranking = Reranking(helpful.rows, opposing.rows, helpful.sure, opposing.sure)
        result.sides = [side.cut(each.rows) for side, each in zip(result.sides, depths, strict=True)]

    def _cut(self, result: QueryResult, noise: Noise | None) -> None:
        """Cut both sides to the rows that are shown, in the index' own order, and say how firm that is."""
        helpful = result.sides[0]
        if noise is not None:
            deviations = noise.for_query(helpful.rows, result.norms)
            result.stability = under_noise(torch.tensor(helpful.scores), deviations, self.settings.top)
        result.sides = [side.cut(self.settings.top) for side in result.sides]
        if noise is not None and not self.settings.specific and (rows := result.rows):
            found = margins(noise.for_query(rows, result.norms), len(rows), len(self.index.store.rankable()))
            result.margins = dict(zip(rows, found.tolist(), strict=True))

    def _among(self, result: QueryResult, side: Side, controls: nulls.Controls, measure: Callable[..., Any]) -> Any:
        """`nulls.nulls` or `nulls.best_z` of a side's rows, by exact scores where these decide the order."""
        if result.listed:
            own = {row: score for each in result.listed for row, score in zip(each.rows, each.scores, strict=True)}
            raw = [own[row] for row in side.rows]
        else:
            exact_scores = result.exact if result.reranking is not None else {}
            raw = [exact_scores.get(row, score + result.means[row])
                   for row, score in zip(side.rows, side.scores, strict=True)]  # fmt: skip
        scale = None if self.settings.cosine else result.norms
        return measure(self.index, controls, side.rows, raw, cosine=self.settings.cosine, norms=scale)

    def _score_lists(self, results: list[QueryResult], scorer: ListScorer) -> None:
        """Order every query's list by another method's scores; rows without one are left out."""
        lists = [result.rows for result in results]
        for result, rows, scores in zip(results, lists, scorer(self.queries, lists), strict=True):
            own = {row: score for row, score in zip(rows, scores.tolist(), strict=True) if score > -torch.inf}
            result.sides = []
            for sign in (1, -1):
                order = sorted(own, key=lambda row, own=own, sign=sign: (-sign * own[row], row))
                result.sides.append(Side(sign, order, [own[row] for row in order]))

    def _rerank(self, results: list[QueryResult]) -> None:
        """Order every query's short list by exact scores."""
        index, by_checkpoint = self.index, [torch.zeros(len(self.index.weights), len(r.rows)) for r in results]
        lists = [result.rows for result in results]
        numbers = sorted({row for rows in lists for row in rows})
        rows, start = dict(zip(numbers, self._encoded(numbers), strict=True)), time.perf_counter()
        for checkpoint, model in last_first(index):
            layers, space = index.layers(model), index.space
            objective = self.settings.objective
            scores = exact.list_scores(
                model,
                layers,
                (exact.query_gradient(model, layers, query.sequences, space, objective) for query in self.queries),
                lists,
                rows,
                space=space,
                cosine=self.settings.cosine,
                tokens_per_batch=index.tokens_per_batch,
            )
            for own, query_scores in zip(by_checkpoint, scores, strict=True):
                own[checkpoint] = index.weights[checkpoint] * query_scores
        self.seconds_a_row = (time.perf_counter() - start) / len(numbers) / len(index.weights) if numbers else None
        for result, own in zip(results, by_checkpoint, strict=True):
            result.exact = dict(zip(result.rows, own.sum(0).tolist(), strict=True))
            if not self.settings.specific:
                result.stability = under_checkpoints(own, self.settings.top)
            result.reorder(self.settings.top)

    def _add_matrices(self, results: list[QueryResult], vectors: Float32[Tensor, "c q k"]) -> None:
        """Add token matrices to what is shown; they sum to the exact scores."""
        settings = self.settings
        shares = [
            TokenShares(
                self.index,
                query,
                vectors[:, number],
                dict(zip(result.rows, self._encoded(result.rows), strict=True)),
                objective=settings.objective,
                cosine=settings.cosine,
                basis=settings.basis,
            )
            for number, (result, query) in enumerate(zip(results, self.queries, strict=True))
        ]
        for result, by_token in zip(results, shares_by_row(self.index, shares), strict=True):
            result.by_token = by_token
            result.exact |= {row: float(matrix.matrix.sum()) for row, (_, matrix) in by_token.items()}

    def _encoded(self, rows: list[int]) -> list[Encoded]:
        self._read(rows)
        longest = self.index.store.manifest.settings["max_tokens"]
        return [encode(json.loads(self.stored_rows[row]["row"]), self.index.model().tokenizer, longest) for row in rows]

    def _read(self, rows: Iterable[int]) -> None:
        missing = sorted({*rows} - {*self.stored_rows})
        self.stored_rows |= zip(missing, self.index.store.read_rows(missing), strict=True)

    def _hits(self, query: int, result: QueryResult, controls: nulls.Controls | None) -> list[Hit]:
        hits = []
        for side in result.sides:
            side_nulls = (
                [None] * len(side.rows) if controls is None else self._among(result, side, controls, nulls.nulls)
            )
            for (rank, row, score), null in zip(side.ranked(), side_nulls, strict=True):
                by_token, matrix = result.by_token.get(row, (None, None))
                exact = result.exact.get(row)
                stored = self.stored_rows[row]
                hits.append(
                    Hit(
                        query=query,
                        rank=rank,
                        id=stored["id"],
                        score=score,
                        source=stored["source"],
                        row=self.index.shown_row(stored),
                        exact=exact,
                        exact_rank_score=None
                        if exact is None or result.reranking is None
                        else exact - result.means[row],
                        null=null,
                        by_token=by_token,
                        rejected=self.index.rejected_answer(stored),
                        tokens=matrix,
                        margin=result.margins.get(row),
                    )
                )
        return hits
