"""Trace: a prompt and a completion in, the training examples behind it out.

The query's gradient is taken by the same code as a training example's, in the index's own space. The score of an
example is `sum over checkpoints of weight * <query, example>`, or the cosine of the two: to first order, what a step of
gradient descent on the example takes off the query's objective. Positive is helpful, negative opposing.

A score says which examples move this answer, not how sure the model was of it, nor whether another answer would have
had the same ones: a model that babbles has gradients too. So every answer carries the model's probability of each of
its tokens, and every example where its score stands among those for control queries (`nulls`).

Source: TracIn, Pruthi et al. 2020, https://arxiv.org/abs/2002.08484, equation 1 and section 3; RapidIn, Lin et al.
2024, https://arxiv.org/abs/2405.11724, for token-wise retrieval and the method of that name.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from whence import catalogue
from whence.corpus.layouts import Row
from whence.errors import SettingError
from whence.indexing.build import Index, open_index
from whence.tracing import nulls
from whence.tracing.baselines import from_scorer
from whence.tracing.queries import Query, Sampling, ask, queries_of
from whence.tracing.results import Answer, Trace
from whence.tracing.retrieval import Retrieval, TraceSettings


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
    tokenizer: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Trace:
    """Training examples that made a model say something.

    Args:
        index: Complete, as a path or open.
        prompt: What the model was asked; laid out like the rows of the corpus (chat template included).
        completion: What it said; None lets the model say it now.
        queries: In place of these, many: a file of `queries.COLUMNS`, rows in memory, or queries.
        span: The part of the completion that is asked about: its text, or tokens from, to.
        contrast: Another completion: why the one and not this.
        controls: Queries whose scores are the null, as `queries`; None draws rows of the index.
        max_new_tokens: Longest completion generated.
        temperature: Of a generated completion; 0 is greedy.
        model: The model's directory, where it has moved since the index was built.
        tokenizer: Where the tokenizer is, if that has moved.
        device: Where to load the model.
        device_map: "auto" spreads a large model over all devices.
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
        else open_index(
            index,
            model=model,
            tokenizer=tokenizer,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
    )
    opened.store.require_complete()
    _check_space(opened, chosen)
    rankable = len(opened.store.rankable())
    if not rankable:
        raise SettingError(
            f"{opened.store.place.root}: none of its {opened.store.rows:,} rows has a finite gradient, so none can "
            f"be ranked. See: whence info {opened.store.place.root}"
        )
    found = ask(asked, opened.model(), kind=opened.layout, sampling=sampling)
    given = None
    if catalogue.trace_method(chosen.method).from_index:
        if controls is not None and (chosen.null or chosen.specific):
            theirs = queries_of(controls, flag="--controls")
            given = ask(theirs, opened.model(), kind=opened.layout, sampling=sampling)
        traced = Retrieval(opened, found, chosen, given).trace()
    else:
        traced = from_scorer(
            opened, found, method=chosen.method, top=chosen.top, objective=chosen.objective, seed=chosen.seed
        )
    told = _told(opened, chosen) | {"completion": _said(traced.answers, sampling)}
    if catalogue.trace_method(chosen.method).from_index:
        told["control queries"] = _compared(chosen, controls, traced)
        told["corrected for generic examples"] = "yes" if chosen.specific else "no"
    return replace(traced, rows=rankable, settings=told, notes=_notes(chosen, asked, rankable))


def _notes(settings: TraceSettings, asked: list[Query], rankable: int) -> list[str]:
    """What was asked for and is not so."""
    notes = []
    if settings.top > rankable:
        notes.append(f"--top {settings.top}: only {rankable} rows can be ranked; all are shown.")
    scorer = catalogue.trace_method(settings.method).scorer
    if scorer is None:
        return notes
    if catalogue.SCORERS[scorer].needs_index:
        if any(query.contrast is not None for query in asked):
            notes.append(f"--method {settings.method} is of one completion: the contrast is left out of it.")
    elif any(query.span is not None or query.contrast is not None for query in asked):
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
    """Refuse what an index of this gradient space cannot answer."""
    root, space = index.store.place.root, index.space
    closer = [flag for flag in ("exact", "tokens") if getattr(settings, flag)]
    if closer and space.view != "sgd":
        raise SettingError(
            f"--{closer[0]} takes gradients as they are; {root} holds what an optimizer makes of them (--view "
            f"{space.view}). Leave --{closer[0]} out, or index again with --view sgd."
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


def _said(answers: list[Answer], sampling: Sampling) -> str:
    """Where completions come from."""
    drawn = f"temperature {sampling.temperature}, seed {sampling.seed}"
    own = "greedy" if sampling.temperature == 0 else drawn
    generated = {answer.is_generated for answer in answers}
    return "given" if generated == {False} else own if generated == {True} else f"given, or {own} where none was"


def _compared(settings: TraceSettings, controls: Any, traced: Trace) -> str:
    """Which control queries scores stand against."""
    if not (settings.null or settings.specific):
        return "none, as asked"
    if traced.needed_z is None:
        return f"none, for there are fewer than {2 * nulls.LEAST} rows"
    if controls is None:
        return f"rows of the index, drawn with seed {settings.seed}"
    return str(controls) if isinstance(controls, str | Path) else "given"


def _told(index: Index, settings: TraceSettings) -> dict[str, str]:
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
    }
    if settings.exact:
        told["re-ranked"] = f"{settings.shortlist} on each side, by unprojected gradients"
    if settings.tokens:
        told["token matrix"] = f"by {settings.basis}"
    return told
