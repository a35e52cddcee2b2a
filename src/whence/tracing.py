"""Trace: a prompt and a completion in, the training examples behind it out.

The query's gradient is taken by the same code as a training example's, in the index's own space. The score of an
example is `sum over checkpoints of weight * <query, example>`, or the cosine of the two: to first order, what a step of
gradient descent on the example takes off the query's objective. Positive is helpful, negative opposing.

Coarse, then exact: the index' compressed vectors propose, unprojected gradients of a short list decide (`exact`),
and of the examples shown give the token x token matrix (`tokens`). The two rankings' overlap is told every time, so
that the compression's cost can be seen.

A score says which examples move this answer, not how sure the model was of it, nor whether another answer would have
had the same ones: a model that babbles has gradients too. So every answer carries the model's probability of each of
its tokens, and every example where its score stands among those for control queries (`nulls`).

Source: TracIn, Pruthi et al. 2020, https://arxiv.org/abs/2002.08484, equation 1 and section 3; RapidIn, Lin et al.
2024, https://arxiv.org/abs/2405.11724, for token-wise retrieval and the method of that name.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from whence import catalogue, exact, nulls
from whence.answers import Hit, Null, TokenMatrix, Trace
from whence.baselines import from_scorer
from whence.corpus import Row
from whence.errors import ManifestMismatchError, SettingError
from whence.exact import Part
from whence.gradients import OBJECTIVES, Sketches, inverse, sketch
from whence.index import Index, open_index
from whence.model import LoadedModel
from whence.queries import Asked, Query, Sampling, ask, queries_of, token_text
from whence.scan import Ranking
from whence.tokens import Encoded, bucketed, collate, encode


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
    """Of the matrix; see `exact`."""
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
            ("--basis", self.basis, exact.BASES),
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


def trace(
    index: str | Path | Index,
    prompt: str | None = None,
    completion: str | None = None,
    *,
    queries: str | Path | Sequence[Query | Row] | None = None,
    span: str | tuple[int, int] | None = None,
    contrast: str | None = None,
    controls: str | Path | Sequence[Query | Row] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    model: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Trace:
    """Training examples that made a model say something.

    Args:
        index: Complete, as a path or open.
        prompt: What the model was asked; laid out like the rows of the corpus (chat template included).
        completion: What it said; None lets the model say it now.
        queries: In place of these, many: a corpus file with `prompt` and perhaps `completion`, `span`, `contrast`; rows
            in memory; or queries.
        span: The part of the completion that is asked about: its text, or tokens from, to.
        contrast: Another completion: why the one and not this.
        controls: Queries whose scores are the null, as `queries`; None draws rows of the index.
        max_new_tokens: Longest completion generated.
        temperature: Of a generated completion; 0 is greedy.
        model: The model's directory, where it has moved since the index was built.
        device: Where to load the model.
        trust_remote_code: Let the model's repository run its own code, if the index was built so.
        settings: Fields of `TraceSettings` by name, such as `top=20, method="dot", exact=True, tokens=True`.

    Returns:
        Scores in nats^2 per squared unit of weight (dot), or in -1 to 1 (cosine). Larger is more helpful.

    Raises:
        SettingError: No query, no such method, a query that supervises nothing, a span that does not occur.
        ManifestMismatchError: The model is not the one that the index was built with.
    """
    chosen = TraceSettings(**settings)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=chosen.seed)
    asked = _queries(prompt, completion, queries, span, contrast)
    opened = (
        index
        if isinstance(index, Index)
        else open_index(index, model=model, device=device, trust_remote_code=trust_remote_code)
    )
    opened.store.require_complete()
    _check_space(opened, chosen)
    rankable = len(opened.store.rankable())
    if not rankable:
        raise SettingError(
            f"{opened.store.place.root}: none of its {opened.store.rows:,} rows has a finite gradient, so none can "
            f"be ranked. See: whence info {opened.store.place.root}"
        )
    last = opened.model()
    found = ask(asked, last, kind=opened.layout, sampling=sampling)
    if catalogue.trace_method(chosen.method).from_index:
        traced = _FromIndex(opened, found, chosen, controls, rankable).trace()
    else:
        traced = from_scorer(
            opened, found, method=chosen.method, top=chosen.top, objective=chosen.objective, seed=chosen.seed
        )
    told, notes = _told(opened, chosen, sampling, controls), _notes(chosen, asked, rankable)
    if "control queries" in told and not (chosen.null or chosen.specific):
        told["control queries"] = "none, as asked"
    elif "control queries" in told and traced.needed_z is None:
        told["control queries"] = f"none, for there are fewer than {2 * nulls.LEAST} rows"
    return replace(traced, rows=rankable, settings=told, notes=notes)


def _notes(settings: TraceSettings, asked: list[Query], rankable: int) -> list[str]:
    """What was asked for and is not so."""
    notes = []
    if settings.top > rankable:
        notes.append(f"--top {settings.top}: only {rankable} rows can be ranked; all are shown.")
    is_of_text = catalogue.trace_method(settings.method).scorer is not None
    if is_of_text and any(query.span is not None or query.contrast is not None for query in asked):
        notes.append(f"--method {settings.method} compares whole texts: the span and the contrast are left out of it.")
    return notes


def _queries(prompt: str | None, completion: str | None, queries: Any, span: Any, contrast: str | None) -> list[Query]:
    if (prompt is None) == (queries is None):
        raise SettingError("give either --prompt TEXT or --queries FILE")
    if prompt is not None:
        return [Query(prompt, completion, span, contrast)]
    if completion is not None:
        raise SettingError("--completion belongs to --prompt; with --queries it is a column of the file")
    return queries_of(queries, Query("", None, span, contrast))


def _check_space(index: Index, settings: TraceSettings) -> None:
    """RapidIn's name is for RapidIn's method, whole."""
    if settings.method == "rapidin" and (index.space.projection, index.space.normalise) != ("shuffle_sum", "layer"):
        raise SettingError(
            f"--method rapidin needs an index of RapidIn's gradients; {index.store.place.root} has --projection "
            f"{index.space.projection} --normalise {index.space.normalise}. "
            "Make one with: whence index MODEL CORPUS -o INDEX --projection shuffle_sum --normalise layer"
        )
    if settings.method == "rapidin" and len(index.weights) > 1:
        raise SettingError(
            f"--method rapidin is of one checkpoint; {index.store.place.root} has {len(index.weights)}. "
            "Index again with --checkpoints last, or use --method dot."
        )


def query_vectors(
    index: Index, queries: Sequence[Sequence[Part]], *, objective: str = "loss"
) -> Float32[Tensor, "c q k"]:
    """Sketched gradients of queries under every checkpoint, in the index's space.

    Raises:
        ManifestMismatchError: A query's gradient is not finite.
    """
    vectors = []
    for checkpoint in _last_first(index):
        model = index.model(checkpoint)
        projection, layers = index.projection(model), index.layers(model)
        rows = torch.zeros(len(queries), projection.width)
        plain = [number for number, parts in enumerate(queries) if len(parts) == 1]
        lengths = [len(queries[number][0].encoded.ids) for number in plain]
        for batch in bucketed(lengths, index.settings.tokens_per_batch):
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
            held = exact.held_whole(model, layers, queries[number], index.space, objective)
            rows[number] = exact.sketched(held, projection, index.space.normalise)
        vectors.append(rows)
    stacked = torch.stack(vectors[::-1])
    if not torch.isfinite(stacked).all():
        raise ManifestMismatchError("a query's gradient is not finite: the model's weights hold NaN or infinity")
    return stacked


def _last_first(index: Index) -> Iterator[int]:
    """Checkpoints, the last one first: it is loaded already."""
    return reversed(range(len(index.weights)))


# -- from the index


@dataclass
class _FromIndex:
    """One trace against an index' vectors."""

    index: Index
    asked: list[Asked]
    settings: TraceSettings
    given: Any
    """Control queries of the caller's."""
    rows: int
    """That can be ranked."""

    def trace(self) -> Trace:
        """Rank, correct, re-rank, and look at what is shown token by token."""
        settings, parts = self.settings, [query.parts for query in self.asked]
        vectors = query_vectors(self.index, parts, objective=settings.objective)
        controls = self._controls() if settings.null or settings.specific else None
        if settings.specific and controls is None:
            raise SettingError(f"--specific needs at least {nulls.LEAST} control queries; give more with --controls")
        m = max(2 * settings.top, settings.shortlist) if settings.exact else settings.top
        rankings = self._ranked(vectors, m, controls)
        out = Trace([query.answer for query in self.asked], [], settings.method, 0)
        needed = None if controls is None else self._needed_z(controls)
        for number in range(len(self.asked)):
            sides = [_Side.of(ranking, number, sign) for ranking, sign in zip(rankings, (1, -1), strict=True)]
            hits, overlap = self._hits(number, sides, vectors[:, number], controls)
            out.hits.extend(hits)
            if overlap is not None:
                out.overlaps.append(overlap)
            if needed is not None:
                best = max((hit.null.z for hit in hits if hit.null and hit.rank > 0), default=None)
                out.verdicts.append(nulls.verdict(best, needed))
        return replace(out, needed_z=needed)

    def _ranked(self, vectors: Float32[Tensor, "c q k"], m: int, controls: nulls.Controls | None) -> tuple:
        return self.index.store.top_k(
            vectors,
            torch.tensor(self.index.weights),
            m=m,
            cosine=self.settings.cosine,
            minus=controls.mean(self._norms(vectors)) if self.settings.specific and controls is not None else None,
        )

    def _needed_z(self, controls: nulls.Controls) -> float:
        """The best z that meaningless completions reach, traced as this query is; measured once an open index."""
        settings = self.settings
        key = (settings.method, settings.objective, settings.top, settings.specific, settings.seed, str(self.given))
        if key not in self.index.levels:
            self.index.levels[key] = self._measured_level(controls)
        return self.index.levels[key]

    def _measured_level(self, controls: nulls.Controls) -> float:
        random_tokens = nulls.meaningless(self.index, self.settings.seed)
        vectors = query_vectors(self.index, [[Part(one)] for one in random_tokens], objective=self.settings.objective)
        helpful, _ = self._ranked(vectors, self.settings.top, controls)
        best = []
        for query in range(len(random_tokens)):
            side, norms = _Side.of(helpful, query, 1), self._norms(vectors)[:, query]
            means = self._means(controls, side.rows, norms)
            best.append(max(null.z for null in self._nulls(controls, side.rows, side.scores, means, norms)))
        return nulls.needed_z(best)

    def _norms(self, vectors: Float32[Tensor, "c q k"]) -> Float32[Tensor, "c q"]:
        """What controls are scaled to: queries' norms, which the cosine has divided by."""
        return torch.ones(vectors.shape[:2]) if self.settings.cosine else vectors.norm(dim=2)

    def _controls(self) -> nulls.Controls | None:
        if self.given is None:
            return nulls.draw_controls(self.index, cosine=self.settings.cosine, seed=self.settings.seed)
        found = ask(queries_of(self.given), self.index.model(), kind=self.index.layout)
        vectors = query_vectors(self.index, [query.parts for query in found], objective=self.settings.objective)
        made = nulls.given_controls(self.index, vectors, cosine=self.settings.cosine, seed=self.settings.seed)
        if made is None:
            raise SettingError(f"--controls: {vectors.shape[1]} queries; a null needs {nulls.LEAST} or more")
        return made

    def _hits(
        self, query: int, sides: list["_Side"], vectors: Float32[Tensor, "c k"], controls: nulls.Controls | None
    ) -> tuple[list[Hit], float | None]:
        settings, overlap = self.settings, None
        numbers = sorted({row for side in sides for row in side.rows})
        kept = dict(zip(numbers, self.index.store.read_rows(numbers), strict=True))
        exact_scores: dict[int, float] = {}
        norms = self._norms(vectors[:, None])[:, 0]
        means = self._means(controls, numbers, norms)
        if settings.exact:
            exact_scores = self._exact(query, {number: self._encoded(kept[number]) for number in numbers})
            overlap = _overlap(sides[0], exact_scores, means, settings.top)
            sides = [side.ordered(exact_scores, means) for side in sides]
        sides = [side.cut(settings.top) for side in sides]
        shown = [row for side in sides for row in side.rows]
        scores = [score for side in sides for score in side.scores]
        found_nulls = None if controls is None else self._nulls(controls, shown, scores, means, norms)
        token_parts = {}
        if settings.tokens:
            token_parts = self._by_token(query, vectors, {row: self._encoded(kept[row]) for row in sorted({*shown})})
            exact_scores |= {row: float(matrix.matrix.sum()) for row, (_, matrix) in token_parts.items()}
        hits = []
        for place, (row, rank) in enumerate((row, rank) for side in sides for rank, row in side.ranked()):
            by_token, matrix = token_parts.get(row, (None, None))
            hits.append(
                Hit(
                    query=query,
                    rank=rank,
                    id=kept[row]["id"],
                    score=scores[place],
                    source=kept[row]["source"],
                    row=json.loads(kept[row]["row"]),
                    exact=exact_scores.get(row),
                    null=found_nulls[place] if found_nulls else None,
                    by_token=by_token,
                    tokens=matrix,
                )
            )
        return hits, overlap

    def _encoded(self, row: Row) -> Encoded:
        return encode(
            json.loads(row["row"]), self.index.model().tokenizer, self.index.store.manifest.settings["max_tokens"]
        )

    def _means(self, controls: nulls.Controls | None, rows: list[int], norms: Tensor) -> dict[int, float]:
        """Each row's mean score over the controls, where ranking is corrected for it."""
        if not self.settings.specific or controls is None or not rows:
            return dict.fromkeys(rows, 0.0)
        scores = nulls.control_scores(self.index, controls, rows, cosine=self.settings.cosine, norms=norms)
        return dict(zip(rows, scores.mean(1).tolist(), strict=True))

    def _nulls(
        self, controls: nulls.Controls, rows: list[int], scores: list[float], means: dict[int, float], norms: Tensor
    ) -> list[Null]:
        raw = [score + means[row] for row, score in zip(rows, scores, strict=True)]
        scale = None if self.settings.cosine else norms
        return nulls.nulls(self.index, controls, rows, raw, cosine=self.settings.cosine, norms=scale) if rows else []

    def _exact(self, query: int, rows: dict[int, Encoded]) -> dict[int, float]:
        """Exact scores of some rows."""
        index, total = self.index, torch.zeros(len(rows))
        for checkpoint in _last_first(index):
            model = index.model(checkpoint)
            layers, space = index.layers(model), index.space
            held = exact.held_whole(model, layers, self.asked[query].parts, space, self.settings.objective)
            found = exact.inner(
                model,
                layers,
                held,
                list(rows.values()),
                reduction=space.reduction,
                tokens_per_batch=index.settings.tokens_per_batch,
            )
            scores = found.scores(normalise=space.normalise, cosine=self.settings.cosine)
            total += index.weights[checkpoint] * scores
        return dict(zip(rows, total.tolist(), strict=True))

    def _by_token(
        self, query: int, vectors: Float32[Tensor, "c k"], shown: dict[int, Encoded]
    ) -> dict[int, tuple[list[float], TokenMatrix]]:
        """For the rows shown: each query token's share in the index' score, and the token x token matrix."""
        settings, index, asked, rows = self.settings, self.index, self.asked[query], list(shown.values())
        tokens = exact.tokens_of(asked.parts, index.space.reduction)
        stored, norms = index.store.vectors(list(shown))
        shares = torch.zeros(len(tokens), len(shown))
        matrices = [torch.zeros(len(tokens), self._width(row)) for row in rows]
        for checkpoint in _last_first(index):
            model, weight = index.model(checkpoint), index.weights[checkpoint]
            layers = index.layers(model)
            whole = exact.held_whole(model, layers, asked.parts, index.space, settings.objective)
            factors = exact.factors_of(whole, normalise=index.space.normalise, cosine=settings.cosine)
            rights = stored[checkpoint] * (inverse(norms[checkpoint])[:, None] if settings.cosine else 1)
            scale = float(inverse(vectors[checkpoint].norm())) if settings.cosine else 1.0
            for group in exact.each_group_of_tokens(asked.parts, tokens, layers):
                held, sketches = self._held(model, asked.parts, [tokens[n] for n in group], factors)
                shares[group] += weight * scale * sketches @ rights.T
                found = exact.token_products(
                    model,
                    layers,
                    held,
                    len(group),
                    rows,
                    factors,
                    basis=settings.basis,
                    reduction=index.space.reduction,
                    tokens_per_batch=index.settings.tokens_per_batch,
                )
                for matrix, part in zip(matrices, found, strict=True):
                    matrix[group] += weight * part
        return {
            row: (shares[:, place].tolist(), self._matrix(asked, rows[place], matrices[place]))
            for place, row in enumerate(shown)
        }

    def _held(
        self, model: LoadedModel, parts: list[Part], tokens: list[exact.Token], factors: exact.Factors
    ) -> tuple[exact.Held, Float32[Tensor, "u k"]]:
        """Pairs of some query tokens, and their sketches from the same pass."""
        index, layers = self.index, self.index.layers(model)
        projection = index.projection(model)
        rows, weights = exact.token_rows(parts, tokens), [token.weight for token in tokens]
        scales = dict.fromkeys(layers, 1.0)
        if index.space.normalise == "layer":  # by the whole query's norms, so that tokens add up to it
            scales = {name: square**-0.5 if square > 0 else 0.0 for name, square in factors.query_squares.items()}
        made: list[tuple[list[int], Sketches]] = []

        def also(numbers: list[int]) -> Any:
            into = Sketches(projection, len(numbers), model.device)
            made.append((numbers, into))
            return lambda seen: into(replace(seen, g=seen.g * scales[seen.layer]))

        held = exact.held_tokens(
            model,
            layers,
            rows,
            weights,
            objective=self.settings.objective,
            tokens_per_batch=index.settings.tokens_per_batch,
            also=also,
        )
        sketches = torch.zeros(len(tokens), projection.width)
        for numbers, into in made:
            sketches[numbers] = into.rows.cpu() * torch.tensor(weights)[numbers, None]
        return held, sketches

    def _width(self, row: Encoded) -> int:
        return len(row.ids) if self.settings.basis == "position" else row.targets

    def _matrix(self, asked: Asked, row: Encoded, matrix: Tensor) -> TokenMatrix:
        model = self.index.model()
        everything = self.settings.basis == "position"
        kept = [place for place, is_target in enumerate(row.supervised) if everything or is_target]
        return TokenMatrix(
            basis=self.settings.basis,
            query=asked.answer.query_tokens(),
            train=[token_text(model, row.ids[place]) for place in kept],
            supervised=[row.supervised[place] for place in kept],
            matrix=matrix,
        )


@dataclass(frozen=True)
class _Side:
    """One query's ranking on one side, best first."""

    sign: int
    """1 for helpful, -1 for opposing."""
    rows: list[int]
    scores: list[float]

    @staticmethod
    def of(ranking: Ranking, query: int, sign: int) -> "_Side":
        """Without unfilled places."""
        pairs = zip(ranking.rows[query].tolist(), ranking.scores[query].tolist(), strict=True)
        filled = [(row, score) for row, score in pairs if row >= 0]
        return _Side(sign, [row for row, _ in filled], [score for _, score in filled])

    def ordered(self, exact_scores: dict[int, float], means: dict[int, float]) -> "_Side":
        """By exact score, less what is corrected for; equal ones as they were."""
        order = sorted(
            range(len(self.rows)),
            key=lambda place: -self.sign * (exact_scores[self.rows[place]] - means[self.rows[place]]),
        )
        return _Side(self.sign, [self.rows[place] for place in order], [self.scores[place] for place in order])

    def cut(self, top: int) -> "_Side":
        """The first so many."""
        return _Side(self.sign, self.rows[:top], self.scores[:top])

    def ranked(self) -> Iterator[tuple[int, int]]:
        """(rank, row)."""
        return ((self.sign * place, row) for place, row in enumerate(self.rows, start=1))


def _overlap(side: _Side, exact_scores: dict[int, float], means: dict[int, float], top: int) -> float:
    """Share of the index' best that are among the exact best of the short list."""
    best = side.rows[:top]
    return len({*best} & {*side.ordered(exact_scores, means).rows[:top]}) / len(best) if best else 1.0


def _told(index: Index, settings: TraceSettings, sampling: Sampling, controls: Any) -> dict[str, str]:
    """How a trace was made, for a person."""
    space, manifest = index.space, index.store.manifest
    told = {
        "index": index.store.place.root,
        "model": manifest.checkpoints[-1]["path"],
        "weights digest": manifest.checkpoints[-1]["digest"][:12],
        "checkpoints": str(len(manifest.checkpoints)),
        "corpus": ", ".join(entry["name"] for entry in manifest.corpora),
        "gradients": ", ".join(f"{name} {value}" for name, value in space.as_json().items() if value is not None),
        "codec": manifest.codec,
        "method": settings.method,
        "objective": settings.objective,
        "completion": "greedy"
        if sampling.temperature == 0
        else f"temperature {sampling.temperature}, seed {sampling.seed}",
    }
    if settings.exact:
        told["re-ranked"] = f"{settings.shortlist} on each side, by unprojected gradients"
    if settings.tokens:
        told["token matrix"] = f"by {settings.basis}"
    if catalogue.trace_method(settings.method).from_index:
        drawn = f"rows of the index, drawn with seed {settings.seed}"
        told["control queries"] = (
            drawn if controls is None else str(controls) if isinstance(controls, str | Path) else "given"
        )
        told["corrected for generic examples"] = "yes" if settings.specific else "no"
    return told
