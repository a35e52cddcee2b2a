"""From an index' vectors to the examples shown: rank, correct, look closer.

Coarse, then exact: the index' compressed vectors propose, unprojected gradients of a short list decide (`exact`), and
of the examples shown give the token x token matrix (`tokens`). The two rankings' overlap is told every time, so that
the compression's cost can be seen.

Each of the three steps goes through the checkpoints once, whatever the number of queries: loading a model may cost more
than asking it.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float32
from torch import Tensor

from whence import catalogue
from whence.corpus.layouts import Row
from whence.corpus.tokens import Encoded, encode
from whence.errors import SettingError
from whence.gradients import exact, tokenwise
from whence.gradients.capture import OBJECTIVES
from whence.gradients.exact import Part
from whence.indexing.build import Index
from whence.indexing.scan import Ranking
from whence.tracing import nulls
from whence.tracing.matrices import Sharing, share_out
from whence.tracing.queries import Asked, last_first, query_vectors
from whence.tracing.results import Hit, Null, TokenMatrix, Trace


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """How to trace."""

    top: int = 10
    """Examples on each side, helpful and opposing."""
    method: str = "cosine"
    """Name in `catalogue.TRACE_METHODS`."""
    objective: str = "loss"
    """Of the query: "loss", or the log-odds "margin", which does not vanish where the model is sure."""
    exact: bool = False
    """Rank a short list by unprojected gradients."""
    shortlist: int = 100
    """Its length, on each side."""
    tokens: bool = False
    """Also the token x token matrix of the examples shown, and each query token's share in their scores."""
    basis: str = "position"
    """Of the matrix; see `tokenwise`."""
    specific: bool = False
    """Rank by the score less the example's mean over the control queries."""
    null: bool = True
    """Whether scores are compared with those for control queries."""
    seed: int = 0
    """Of drawn controls, sampled completions and the method `random`."""

    def __post_init__(self):
        entry = catalogue.trace_method(self.method)
        for flag, value in (("--top", self.top), ("--shortlist", self.shortlist)):
            if value < 1:
                raise SettingError(f"{flag} {value}: a number above 0 is expected")
        for flag, value, known in (
            ("--objective", self.objective, tuple(OBJECTIVES)),
            ("--basis", self.basis, tokenwise.BASES),
        ):
            if value not in known:
                raise SettingError(f"{flag} {value}: choose one of {', '.join(known)}")
        asked = [flag for flag in ("exact", "tokens", "specific") if getattr(self, flag)]
        if asked and not entry.from_index:
            raise SettingError(
                f"--{asked[0]} belongs to the methods that score from the index "
                f"({', '.join(catalogue.index_methods())}), not to --method {self.method}"
            )

    @property
    def cosine(self) -> bool:
        """Whether vectors are divided by their norms."""
        return catalogue.trace_method(self.method).cosine


@dataclass(frozen=True)
class Side:
    """One query's ranking on one side, best first."""

    sign: int
    """1 for helpful, -1 for opposing."""
    rows: list[int]
    scores: list[float]

    @staticmethod
    def of(ranking: Ranking, query: int, sign: int) -> "Side":
        """Without unfilled places."""
        pairs = zip(ranking.rows[query].tolist(), ranking.scores[query].tolist(), strict=True)
        filled = [(row, score) for row, score in pairs if row >= 0]
        return Side(sign, [row for row, _ in filled], [score for _, score in filled])

    def ordered(self, exact_scores: dict[int, float], means: dict[int, float]) -> "Side":
        """By exact score, less what is corrected for; equal ones as they were."""
        order = sorted(
            range(len(self.rows)),
            key=lambda place: -self.sign * (exact_scores[self.rows[place]] - means[self.rows[place]]),
        )
        return Side(self.sign, [self.rows[place] for place in order], [self.scores[place] for place in order])

    def cut(self, top: int) -> "Side":
        """The first so many."""
        return Side(self.sign, self.rows[:top], self.scores[:top])

    def ranked(self) -> Iterator[tuple[int, int, float]]:
        """(rank, row, score)."""
        places = zip(self.rows, self.scores, strict=True)
        return ((self.sign * place, row, score) for place, (row, score) in enumerate(places, start=1))


@dataclass
class _Found:
    """What is known of one query so far."""

    sides: list[Side]
    norms: Float32[Tensor, " c"]
    """What controls are scaled to."""
    means: dict[int, float]
    """Each row's mean score over the controls, where ranking is corrected for it; else 0."""
    exact: dict[int, float] = field(default_factory=dict)
    by_token: dict[int, tuple[list[float], TokenMatrix]] = field(default_factory=dict)
    overlap: float | None = None

    @property
    def rows(self) -> list[int]:
        """Of both sides, each once."""
        return sorted({row for side in self.sides for row in side.rows})

    def reordered(self, top: int) -> None:
        """Let exact scores decide, and say what they changed."""
        helpful = self.sides[0]
        self.sides = [side.ordered(self.exact, self.means) for side in self.sides]
        best = helpful.rows[:top]
        self.overlap = len({*best} & {*self.sides[0].rows[:top]}) / len(best) if best else 1.0


@dataclass
class Retrieval:
    """One trace against an index' vectors."""

    index: Index
    asked: list[Asked]
    settings: TraceSettings
    given: list[Asked] | None = None
    """Control queries of the caller's; None draws rows of the index."""
    kept: dict[int, Row] = field(default_factory=dict)
    """The index' own rows, of those that are looked at."""

    def trace(self) -> Trace:
        """Rank, correct, re-rank, and look at what is shown token by token."""
        settings = self.settings
        vectors, controls, needed = self._vectors()
        m = max(2 * settings.top, settings.shortlist) if settings.exact else settings.top
        rankings = self._ranked(vectors, m, controls)
        found = [self._found(number, rankings, vectors[:, number], controls) for number in range(len(self.asked))]
        self._read({row for one in found for row in one.rows})
        if settings.exact:
            self._rerank(found)
        for one in found:
            one.sides = [side.cut(settings.top) for side in one.sides]
        if settings.tokens:
            self._look_closer(found, vectors)
        out = Trace([query.answer for query in self.asked], [], settings.method, 0, needed_z=needed)
        for number, one in enumerate(found):
            hits = self._hits(number, one, controls)
            out.hits.extend(hits)
            if one.overlap is not None:
                out.overlaps.append(one.overlap)
            if needed is not None:
                best = max((hit.null.z for hit in hits if hit.null and hit.rank > 0), default=None)
                out.verdicts.append(nulls.verdict(best, needed))
        return out

    def _vectors(self) -> tuple[Float32[Tensor, "c q k"], nulls.Controls | None, float | None]:
        """Gradients of the queries; the controls; and the best z that meaningless completions reach.

        What needs gradients is asked of each checkpoint at once, and the level is measured once an open index.
        """
        settings, index = self.settings, self.index
        chosen = {"cosine": settings.cosine, "seed": settings.seed}
        given, own = self._controls()
        texts = tuple(tuple(query.parts[0].encoded.ids) for query in given)
        key = (settings.method, settings.objective, settings.top, settings.specific, settings.seed, texts)
        is_new = (given or own is not None) and key not in index.levels
        strange = nulls.meaningless(index, settings.seed) if is_new else []
        # An index of another view holds what an optimizer makes of its rows, not what they are as queries.
        plain = self._encoded(own.tolist()) if own is not None and index.space.view != "sgd" else []
        alone = [[Part(one)] for one in [*plain, *strange]]
        found = query_vectors(
            index, [query.parts for query in [*self.asked, *given]] + alone, objective=settings.objective
        )
        vectors, theirs, again, strangers = found.split([len(self.asked), len(given), len(plain), len(strange)], 1)
        if given:
            controls = nulls.given_controls(index, theirs, **chosen)
        elif own is not None:
            controls = nulls.draw_controls(index, vectors=again if plain else None, **chosen)
        else:
            return vectors, None, None
        assert controls is not None, "there are enough of them"
        if is_new:
            index.levels[key] = self._level(strangers, controls)
        return vectors, controls, index.levels[key]

    def _controls(self) -> tuple[list[Asked], Tensor | None]:
        """Control queries: the caller's, or numbers of rows."""
        settings, given = self.settings, self.given or []
        if not (settings.null or settings.specific):
            return [], None
        if given and len(given) < nulls.LEAST:
            raise SettingError(f"--controls: {len(given)} queries; a null needs {nulls.LEAST} or more")
        own = None if given else nulls.drawn_rows(self.index, seed=settings.seed)
        if settings.specific and not given and own is None:
            raise SettingError(f"--specific needs at least {nulls.LEAST} control queries; give more with --controls")
        return given, own

    def _level(self, strangers: Float32[Tensor, "c q k"], controls: nulls.Controls) -> float:
        """The best z that meaningless completions reach, traced as queries are."""
        rankings, best = self._ranked(strangers, self.settings.top, controls), []
        for number in range(strangers.shape[1]):
            one = self._found(number, rankings, strangers[:, number], controls)
            best.append(max(null.z for null in self._nulls(one, one.sides[0], controls)))
        return nulls.needed_z(best)

    def _ranked(
        self, vectors: Float32[Tensor, "c q k"], m: int, controls: nulls.Controls | None
    ) -> tuple[Ranking, Ranking]:
        return self.index.store.top_k(
            vectors,
            torch.tensor(self.index.weights),
            m=m,
            cosine=self.settings.cosine,
            minus=controls.mean(self._norms(vectors)) if self.settings.specific and controls is not None else None,
        )

    def _norms(self, vectors: Float32[Tensor, "c q k"]) -> Float32[Tensor, "c q"]:
        """Queries' norms, which the cosine has divided by."""
        return torch.ones(vectors.shape[:2]) if self.settings.cosine else vectors.norm(dim=2)

    def _found(
        self,
        query: int,
        rankings: tuple[Ranking, Ranking],
        vector: Float32[Tensor, "c k"],
        controls: nulls.Controls | None,
    ) -> _Found:
        sides = [Side.of(ranking, query, sign) for ranking, sign in zip(rankings, (1, -1), strict=True)]
        found = _Found(sides, self._norms(vector[:, None])[:, 0], {})
        rows = found.rows
        found.means = dict.fromkeys(rows, 0.0)
        if self.settings.specific and controls is not None and rows:
            scores = nulls.control_scores(self.index, controls, rows, cosine=self.settings.cosine, norms=found.norms)
            found.means = dict(zip(rows, scores.mean(1).tolist(), strict=True))
        return found

    def _nulls(self, found: _Found, side: Side, controls: nulls.Controls) -> list[Null]:
        if not side.rows:
            return []
        raw = [score + found.means[row] for row, score in zip(side.rows, side.scores, strict=True)]
        scale = None if self.settings.cosine else found.norms
        return nulls.nulls(self.index, controls, side.rows, raw, cosine=self.settings.cosine, norms=scale)

    def _rerank(self, found: list[_Found]) -> None:
        """Exact scores of every query's short list, which decide its order."""
        index, totals = self.index, [torch.zeros(len(one.rows)) for one in found]
        encoded = [self._encoded(one.rows) for one in found]
        for checkpoint, model in last_first(index):
            layers, space = index.layers(model), index.space
            for total, query, rows in zip(totals, self.asked, encoded, strict=True):
                inner = exact.inner(
                    model,
                    layers,
                    exact.held_whole(model, layers, query.parts, space, self.settings.objective),
                    rows,
                    reduction=space.reduction,
                    tokens_per_batch=index.tokens_per_batch,
                )
                scores = inner.scores(normalise=space.normalise, cosine=self.settings.cosine)
                total += index.weights[checkpoint] * scores
        for one, total in zip(found, totals, strict=True):
            one.exact = dict(zip(one.rows, total.tolist(), strict=True))
            one.reordered(self.settings.top)

    def _look_closer(self, found: list[_Found], vectors: Float32[Tensor, "c q k"]) -> None:
        """Matrices of what is shown, which sum to the exact scores."""
        settings = self.settings
        sharings = [
            Sharing(
                self.index,
                query,
                vectors[:, number],
                dict(zip(one.rows, self._encoded(one.rows), strict=True)),
                objective=settings.objective,
                cosine=settings.cosine,
                basis=settings.basis,
            )
            for number, (one, query) in enumerate(zip(found, self.asked, strict=True))
        ]
        for one, by_token in zip(found, share_out(self.index, sharings), strict=True):
            one.by_token = by_token
            one.exact |= {row: float(matrix.matrix.sum()) for row, (_, matrix) in by_token.items()}

    def _encoded(self, rows: list[int]) -> list[Encoded]:
        self._read(rows)
        longest = self.index.store.manifest.settings["max_tokens"]
        return [encode(json.loads(self.kept[row]["row"]), self.index.model().tokenizer, longest) for row in rows]

    def _read(self, rows: Iterable[int]) -> None:
        missing = sorted({*rows} - {*self.kept})
        self.kept |= zip(missing, self.index.store.read_rows(missing), strict=True)

    def _hits(self, query: int, found: _Found, controls: nulls.Controls | None) -> list[Hit]:
        hits = []
        for side in found.sides:
            theirs = [None] * len(side.rows) if controls is None else self._nulls(found, side, controls)
            for (rank, row, score), null in zip(side.ranked(), theirs, strict=True):
                by_token, matrix = found.by_token.get(row, (None, None))
                kept = self.kept[row]
                hits.append(
                    Hit(
                        query=query,
                        rank=rank,
                        id=kept["id"],
                        score=score,
                        source=kept["source"],
                        row=json.loads(kept["row"]),
                        exact=found.exact.get(row),
                        null=null,
                        by_token=by_token,
                        tokens=matrix,
                    )
                )
        return hits
