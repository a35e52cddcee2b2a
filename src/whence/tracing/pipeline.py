"""Trace: a prompt and a completion in, the training examples behind the completion out.

The query's gradient is taken by the same code as a training example's, in the index's own space. The score of an
example is `sum over checkpoints of weight * <query, example>`, or the cosine of the two: to first order, what a step of
gradient descent on the example takes off the query's objective. Positive is helpful, negative opposing.

A score says which examples move this answer. It does not say how sure the model was of the answer, nor whether other
answers have the same examples: a model that babbles has gradients too. So every answer carries the model's probability
of each of its tokens, and every example the place of its score among its scores for control queries (`nulls`).

Source: TracIn, Pruthi et al. 2020, https://arxiv.org/abs/2002.08484, equation 1 and section 3; RapidIn, Lin et al.
2024, https://arxiv.org/abs/2405.11724, for token-wise retrieval and the method of that name.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from jaxtyping import Int64
from torch import Tensor

from whence import catalogue
from whence.corpus.unsupervised import reason
from whence.counts import number_of
from whence.errors import SettingError
from whence.evidence import curvature_time, trace_evidence
from whence.indexing.opening import Index, open_index
from whence.models.load_options import split_loading
from whence.runner import LOCAL, EngineOption, ProgressOption, shown_as, workers_kept
from whence.second_order.sampled_rows import sampled_rows
from whence.selection.pipeline import check_options
from whence.tracing import nulls
from whence.tracing.baselines import from_scorer
from whence.tracing.depth import DEEPEST
from whence.tracing.levels import MEANINGLESS, Shape, cost
from whence.tracing.own_answers import notes_on
from whence.tracing.queries import EncodedQuery, Query, Sampling, encode_queries, queries_of
from whence.tracing.results import Answer, Trace
from whence.tracing.retrieval import Retrieval, TraceSettings
from whence.tracing.shortlists import LISTED, list_note, list_words, shortlisted_trace, takes_list
from whence.training.step_log import FOLDER, RECORD

PARTS = ("span", "contrast")
"""What a question may have beside its completion."""


class _Reading(TypedDict):
    """How rows become queries: arguments of `queries_of`."""

    columns: Mapping[str, str]
    preferences: str | None


def trace(
    index: str | Path | Index,
    prompt: str | None = None,
    completion: str | None = None,
    *,
    queries: str | Path | Iterable[Any] | None = None,
    span: str | tuple[int, int] | None = None,
    contrast: str | Query | None = None,
    system: str | None = None,
    preferences: str | None = None,
    controls: str | Path | Iterable[Any] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    model: str | None = None,
    corpus: str | Path | None = None,
    curvature: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    engine: EngineOption = LOCAL,
    progress: ProgressOption = False,
    **settings: Any,
) -> Trace:
    """Training examples that made a model say something.

    Args:
        index: A complete index, as a path or open; for the method "replay" a run of `train --replayable`.
        prompt: The text before the completion; laid out like the rows of the corpus (chat template included).
        completion: The text to trace; None lets the model generate it.
        queries: Many queries in place of these two: a file of `queries.COLUMNS`, rows in memory, or queries.
        span: The stretch of the completion to trace: its text, or tokens from, to.
        contrast: Another completion, for "why the one and not this"; or a query with its completion, where what comes
            before it is its own.
        system: What the system says before the prompt.
        preferences: What a row of `queries` with a preferred and a rejected answer asks: about the one ("chosen"), or
            why that and not the other ("contrast"); None: as the index' rows are read.
        controls: Queries whose scores are the null, as `queries`; None draws rows of the index.
        max_new_tokens: Longest completion that is generated.
        temperature: Temperature of a generated completion; 0 is greedy.
        model: The model's directory, where it has moved since the index was built; for the method "replay" that of the
            model which the run was trained from.
        corpus: For the method "replay", what the run was trained on, where that is not where it was.
        curvature: A directory of `curvature`, for the method "ekfac", which is then used unless told otherwise;
            without it that method measures curvature for this call alone.
        options: The method's own options as in `select`, such as `{"refine": 2}` of "ekfac".
        engine: Where the index is scanned; see `runner`. An index that is open already is scanned as it was opened.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).
        settings: Fields of `TraceSettings` by name, such as `top=20, method="dot", exact=True, tokens=True`; and of
            `models.load_options.Loading`, such as `device="cuda"`.

    Returns:
        Scores in nats^2 per squared unit of weight (dot), or in -1 to 1 (cosine). Larger is more helpful.

    Raises:
        SettingError: No query, an unknown method, a query without a supervised token, a span that does not occur.
        ManifestMismatchError: The model is not the one that the index was built with.
    """
    loading, settings = split_loading(settings)
    settings.setdefault("method", catalogue.default_trace_method(has_curvature=curvature is not None))
    how = TraceSettings(**settings)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=how.seed)
    own = _own_options(how.method, options, curvature)
    if catalogue.trace_method(how.method).needs_run:
        _refuse_others(how, loading, controls)
        if isinstance(index, Index):
            raise SettingError(f"--method {how.method} reads a run's directory, in place of an index")
        from whence.tracing.replaying import replayed_trace  # which brings the Trainer

        texts = _queries(prompt, completion, queries, Query("", None, span, contrast), system, _plain(preferences))
        return replayed_trace(index, texts, method=how.method, top=how.top, sampling=sampling, corpus=corpus,
                              model=model, options=own, progress=progress)  # fmt: skip
    if corpus is not None:
        raise SettingError("--corpus belongs to --method replay: an index has its own copy of the rows")
    with shown_as(progress, "Tracing"), workers_kept(engine):
        opened = index if isinstance(index, Index) else open_index(index, engine=engine, model=model, **loading)
        reading: _Reading = {"columns": opened.columns, "preferences": preferences or opened.settings.preferences}
        texts = _queries(prompt, completion, queries, Query("", None, span, contrast), system, reading)
        opened.store.require_complete()
        _check_space(opened, how)
        rankable = len(ranked := opened.store.rankable())
        if not rankable:
            raise SettingError(_why_none(opened))
        encoded = encode_queries(texts, opened.model(), kind=opened.layout, sampling=sampling)
        passes = _passes(opened, ranked)  # while the last model is there
        own_notes = notes_on([query.answer for query in encoded], opened.model(), greedy=temperature == 0)
        control_queries = None
        if has_null(how, own) and controls is not None and (how.null or how.specific):
            control_texts = queries_of(controls, flag="--controls", **reading)
            control_queries = encode_queries(control_texts, opened.model(), kind=opened.layout, sampling=sampling)
        traced, seconds_a_row = _traced(opened, encoded, how, control_queries, own)
        described = _described_settings(opened, how, own, is_exact=bool(traced.rerankings)) | {
            "completion": _completion_origin(traced.answers, sampling)
        }
        if takes_list(how, own):
            described["scored"] = list_words(traced, rankable)
            own_notes = [list_note(traced, described["scored"]), *own_notes]
        if has_null(how, own):
            described["control queries"] = _control_origin(how, controls, traced)
            described["corrected for examples high for any question"] = "yes" if how.specific else "no"
        described["evidence"] = _evidence(opened, how, own, is_exact=bool(traced.rerankings), passes=passes)
        time_words = "" if passes is None or seconds_a_row is None else curvature_time(passes, seconds_a_row)
        if traced.levels:
            context = opened.model().context
            described["what chance reaches"] = f"measured by {cost([Shape.of(query, context) for query in encoded])}"
        notes = [*_notes(how, texts, rankable), *_without_null(how, opened, traced, own), *own_notes]
        if not how.reranks(opened, len(texts)) and how.reranks(opened, 1):
            notes.append(
                f"{len(texts):,} queries: their examples are ranked by the index alone. --exact ranks short lists by "
                "exact gradients, which takes about as long as indexing their rows again."
            )
        return replace(traced, rows=rankable, settings=described, notes=notes, curvature_time=time_words)


def _traced(
    index: Index,
    queries: list[EncodedQuery],
    settings: TraceSettings,
    control_queries: list[EncodedQuery] | None,
    options: Mapping[str, Any],
) -> tuple[Trace, float | None]:
    """A trace, and the seconds that each row's exact score took, where exact scores decided the order."""
    if catalogue.trace_method(settings.method).from_index:
        retrieval = Retrieval(index, queries, settings, control_queries, options)
        return retrieval.trace(), retrieval.seconds_a_row
    if takes_list(settings, options):
        return shortlisted_trace(index, queries, settings, control_queries, options), None
    traced = from_scorer(index, queries, method=settings.method, top=settings.top, objective=settings.objective,
                         seed=settings.seed, options=options)  # fmt: skip
    return traced, None


def has_null(settings: TraceSettings, options: Mapping[str, Any]) -> bool:
    """Whether scores of the index' vectors are among what a method reads, so that chance is known."""
    return catalogue.trace_method(settings.method).from_index or takes_list(settings, options)


def _own_options(method: str, options: Mapping[str, Any] | None, curvature: str | Path | None) -> dict[str, Any]:
    """Options of a method's scorer."""
    if curvature is not None and method != "ekfac":
        raise SettingError(f"--curvature belongs to --method ekfac, not to --method {method}")
    if options and curvature is not None and "curvature" in options:
        raise SettingError(f"--set curvature={options['curvature']}: --curvature {curvature} is given too")
    check_options(options or {}, catalogue.trace_method(method).scorer, method)
    return dict(options or {}) | ({} if curvature is None else {"curvature": str(curvature)})


def _refuse_others(settings: TraceSettings, loading: Mapping[str, Any], controls: Any) -> None:
    """Refuse what belongs to an index, where a run is read."""
    given = [name for name, value in loading.items() if value is not None and value is not False]
    given += ["controls"] * (controls is not None) + ["shortlist"] * (settings.shortlist is not None)
    given += ["basis"] * (settings.basis != TraceSettings.basis)
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise SettingError(f"{flag} belongs to the methods that read an index, not to --method {settings.method}")


def _plain(preferences: str | None) -> _Reading:
    """Queries as they stand."""
    return {"columns": {}, "preferences": preferences}


def _why_none(opened: Index) -> str:
    """Why no row of an index can be ranked."""
    root, info = opened.store.place.root, opened.store.info()
    masked = info["counts"].get("no_supervised_token", 0)
    if masked == info["rows"]:
        first = json.loads(opened.store.read_part(0)[0]["row"])
        why = reason(first, opened.model().tokenizer, opened.store.manifest.settings["max_tokens"])
        return (
            f"{root}: none of its {number_of(info['rows'], 'row')} has a supervised token, so none can be ranked: "
            f"the first ones {why}. Mend the corpus, and index it again."
        )
    more = f" ({masked:,} without a supervised token)" if masked else ""
    return (
        f"{root}: none of its {info['rows']:,} rows has a finite gradient, so none can be ranked{more}. See: whence "
        f"info {root}"
    )


def _notes(settings: TraceSettings, queries: list[Query], rankable: int) -> list[str]:
    """Settings that could not be followed."""
    notes = []
    if settings.top > rankable:
        notes.append(f"--top {settings.top}: only {number_of(rankable, 'row')} can be ranked; all are shown.")
    left_out = ignored_parts(settings.method)
    has_span, has_contrast = (any(getattr(query, part) is not None for query in queries) for part in PARTS)
    if "span" in left_out and (has_span or has_contrast):
        notes.append(f"--method {settings.method} compares whole texts: the span and the contrast are left out of it.")
    elif "contrast" in left_out and has_contrast:
        notes.append(f"--method {settings.method} is of one completion: the contrast is left out of it.")
    return notes


def ignored_parts(method: str) -> tuple[str, ...]:
    """Which `PARTS` of a question a method leaves out."""
    entry = catalogue.trace_method(method)
    scorer = entry.scorer
    if scorer is None or entry.is_solved or entry.needs_run:
        return ()
    reads_tokens = catalogue.SCORERS[scorer].is_signed or catalogue.SCORERS[scorer].needs_index
    return ("contrast",) if reads_tokens else PARTS


def _without_null(settings: TraceSettings, index: Index, traced: Trace, options: Mapping[str, Any]) -> list[str]:
    """Why there is neither a z nor a verdict, where nobody asked for none."""
    if traced.levels or not settings.null:
        return []
    if has_null(settings, options):
        return [
            f"no z and no verdict: {index.store.place.root} has fewer than {2 * nulls.LEAST} rows to draw control "
            "queries from. Give some with --controls."
        ]
    reason = "what chance reaches is measured of scores from the index' vectors alone"
    if settings.method == "reach":
        more = nulls.CONTROLS + MEANINGLESS
        reason = f"it takes a gradient for every token, and to measure chance asks {more} queries more"
    return [
        f"no z and no verdict with --method {settings.method}: {reason}. Whether an example stands above chance, see "
        "with --method cosine."
    ]


def _queries(
    prompt: str | None,
    completion: str | None,
    queries: Any,
    defaults: Query,
    system: str | None,
    reading: _Reading,
) -> list[Query]:
    if (prompt is None) == (queries is None):
        raise SettingError("give either --prompt TEXT or --queries FILE (or --messages FILE)")
    if prompt is not None:
        context = None if system is None else {"system": system}
        return [replace(defaults, prompt=prompt, completion=completion, context=context)]
    for flag, value in (("--completion", completion), ("--system", system)):
        if value is not None:
            raise SettingError(f"{flag} belongs to --prompt; a file of queries has a column for it")
    return queries_of(queries, defaults, **reading)


def _check_space(index: Index, settings: TraceSettings) -> None:
    """Refuse settings that an index of this gradient space cannot answer."""
    root, space = index.store.place.root, index.space
    exact_flags = [flag for flag in ("exact", "tokens") if getattr(settings, flag)]
    if exact_flags and space.view != "sgd":
        raise SettingError(
            f"--{exact_flags[0]} takes gradients as they are; {root} holds what an optimizer makes of them (--view "
            f"{space.view}). Leave --{exact_flags[0]} out, or index again with --view sgd."
        )
    scorer = catalogue.trace_method(settings.method).scorer
    if index.has_contrasts and scorer is not None and not catalogue.SCORERS[scorer].contrasts:
        raise SettingError(
            f"--method {settings.method} reads one answer of a row, and the rows of {root} are contrasts of two. Use "
            "--method cosine, or an index without --preferences contrast."
        )
    if settings.method == "rapidin" and (space.projection, space.normalise) != ("shuffle_sum", "layer"):
        raise SettingError(
            f"--method rapidin needs an index of RapidIn's gradients; {root} has --projection "
            f"{space.projection} --normalise {space.normalise}. "
            "Make one with: whence index MODEL CORPUS -o INDEX --projection shuffle_sum --normalise layer"
        )
    if settings.method == "rapidin" and len(index.weights) > 1:
        raise SettingError(
            f"--method rapidin is of one checkpoint; {root} has {len(index.weights)}. "
            "Index again with --checkpoints last, or use --method dot."
        )


def _completion_origin(answers: list[Answer], sampling: Sampling) -> str:
    """Where completions come from, in words."""
    sampled = f"temperature {sampling.temperature}, seed {sampling.seed}"
    generation = "greedy" if sampling.temperature == 0 else sampled
    is_generated = {answer.is_generated for answer in answers}
    if is_generated == {False}:
        return "given"
    return generation if is_generated == {True} else f"given, or {generation} where none was"


def _control_origin(settings: TraceSettings, controls: Any, traced: Trace) -> str:
    """Where control queries come from, in words."""
    if not (settings.null or settings.specific):
        return "none, as asked"
    if not traced.levels:
        return f"none, for there are fewer than {2 * nulls.LEAST} rows"
    if controls is None:
        return f"rows of the index, drawn with seed {settings.seed}"
    return str(controls) if isinstance(controls, str | Path) else "given"


def _passes(index: Index, ranked: Int64[Tensor, " m"]) -> tuple[int, int] | None:
    """How many rows `whence curvature` would measure, and how many a trace by it reads; None where it cannot."""
    if index.has_contrasts:
        return None
    drawn = sampled_rows(index.store.supervised_tokens()[ranked], index.layers(index.model()), seed=0)
    return len(drawn), min(2 * LISTED, len(ranked))


def _evidence(
    index: Index,
    settings: TraceSettings,
    options: Mapping[str, Any],
    *,
    is_exact: bool,
    passes: tuple[int, int] | None,
) -> str:
    """How well the method predicts retrainings, and what a better one costs here."""
    directory = Path(index.store.manifest.checkpoints[-1]["path"])
    run = next((str(path) for path in (directory, directory.parent) if (path / FOLDER / RECORD).exists()), None)
    is_plain = index.space.view == "sgd" and settings.objective == TraceSettings.objective and not settings.specific
    return trace_evidence(
        settings.method,
        index.store.place.root,
        is_exact=is_exact or index.space.sketch == "identity",
        is_as_measured=is_plain and not {*options} - {"curvature"},
        passes=passes,
        run=run,
    )


def _described_settings(
    index: Index, settings: TraceSettings, options: Mapping[str, Any], *, is_exact: bool
) -> dict[str, str]:
    """How a trace was made, for a person."""
    space, manifest = index.space, index.store.manifest
    described = {
        "index": index.store.place.root,
        "model": manifest.checkpoints[-1]["path"],
        "weights digest": manifest.checkpoints[-1]["digest"][:12],
        "checkpoints": str(len(manifest.checkpoints)),
        "corpus": ", ".join(entry["name"] for entry in manifest.corpora),
        "gradients": ", ".join(f"{name} {value}" for name, value in space.as_json().items() if value is not None),
        "codec": manifest.codec,
        "method": settings.method,
        "objective": settings.objective,
    }
    if options:
        described["options"] = ", ".join(f"{name}={value}" for name, value in options.items())
    if index.has_contrasts:
        described["pairs of answers"] = "contrasts"
    if is_exact:
        length = (
            f"up to {DEEPEST}, as the index' error asks," if settings.shortlist is None else str(settings.shortlist)
        )
        described["re-ranked"] = f"{length} on each side, by unprojected gradients"
    if settings.tokens:
        described["token matrix"] = f"by {settings.basis}"
    return described
