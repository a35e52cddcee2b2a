"""The verb `trace`: parse, call one library function, print."""

from typing import Annotated, Any

import typer

from whence import catalogue
from whence.cli.console import again, print_ending, print_json, print_part, waiting, working
from whence.cli.inputs import check_inputs
from whence.cli.options import EngineFlags, Force, Json, LoadingFlags, ModelPath, Preferences, pairs
from whence.errors import SettingError

_CHOICE = ("--tasks", "EXAMPLES.jsonl", "--count", "100", "-o", "chosen.jsonl")
"""Of `select`, after what it chooses from."""


def trace(
    index: Annotated[
        str,
        typer.Argument(
            metavar="INDEX", help="Directory of the index; for replay and source a run of train --replayable."
        ),
    ],
    loading: LoadingFlags,
    running: EngineFlags,
    prompt: Annotated[str | None, typer.Option(help="What the model was asked.")] = None,
    completion: Annotated[str | None, typer.Option(help="What it said; without it, the model says it now.")] = None,
    system: Annotated[str | None, typer.Option(help="What the system said before the prompt.")] = None,
    messages: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="In place of these: a conversation as JSON, with or without the answer."),
    ] = None,
    queries: Annotated[str | None, typer.Option(help="In place of these: a file of prompts (and completions).")] = None,
    span: Annotated[str | None, typer.Option(help="Ask about this text of the completion alone.")] = None,
    span_tokens: Annotated[str | None, typer.Option(help="Ask about tokens FROM:TO of it alone, from 0.")] = None,
    contrast: Annotated[str | None, typer.Option(help="Why the completion, and not this one?")] = None,
    preferences: Preferences = None,
    top: Annotated[int, typer.Option(help="Examples on each side.")] = 10,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"How to score: {', '.join(catalogue.TRACE_METHODS)}. Unless given cosine, or ekfac with --curvature."
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the method. Repeat it.")
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="What the query is about: loss, or the log-odds margin, for answers that the model is sure of."
        ),
    ] = "loss",
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Rank a short list by unprojected gradients. Unless told: with cosine and dot, if they can.",
        ),
    ] = None,
    shortlist: Annotated[
        int | None,
        typer.Option(
            help="Length of the short list, on each side. Unless given: as the index' error asks, or 200 with ekfac."
        ),
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Influence of each training token on each token of the completion.")
    ] = False,
    basis: Annotated[
        str, typer.Option(help="What a training token stands for: position of its gradient, or its own loss (slower).")
    ] = "position",
    controls: Annotated[
        str | None,
        typer.Option(help="File of queries whose scores say what chance is; rows of the index unless given."),
    ] = None,
    specific: Annotated[
        bool, typer.Option("--specific", help="Rank by the score less the example's mean over control queries.")
    ] = False,
    null: Annotated[bool, typer.Option("--null/--no-null", help="Compare scores with what chance reaches.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer generated.")] = 64,
    temperature: Annotated[float, typer.Option(help="Temperature of a generated answer; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers and drawn controls.")] = 0,
    model: ModelPath = None,
    corpus: Annotated[
        str | None, typer.Option(help="For replay and source: what the run was trained on, if it has moved since.")
    ] = None,
    curvature: Annotated[
        str | None, typer.Option(metavar="DIRECTORY", help="Score by the curvature that whence curvature measured.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", help="Write rows to .jsonl, .csv or .parquet, a report to .html, or all to .json."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Which training examples, and which of their tokens, made the model say this?"""
    from whence.reports.existing_files import RESULT_ENDINGS, Output, check_outputs
    from whence.tracing.spans import span_of

    method = method or catalogue.default_trace_method(has_curvature=curvature is not None)
    needs_run = catalogue.trace_method(method).needs_run
    is_page = out is not None and out.endswith(".html")
    check_outputs(
        [Output("-o", out, RESULT_ENDINGS)],
        rows=[queries, controls, messages],
        others=[index, model, loading.tokenizer, corpus, curvature],
        force=force,
    )
    conversation = _conversation(messages, queries)
    engine = running.chosen(is_scan=not needs_run)
    place = span_of(span, span_tokens, "--span-tokens")
    check_inputs(**{"run" if needs_run else "index": index}, corpora=[queries, controls, corpus], curvature=curvature)
    with waiting("Loading torch"):
        from whence.indexing.opening import open_index
        from whence.reports.trace_tables import is_shallow, stands_out, trace_answer, trace_tables
        from whence.tracing.depth import DEEPEST
        from whence.tracing.pipeline import trace as run
        from whence.tracing.retrieval import can_rerank
    opening: dict[str, Any] = {"model": model, **vars(loading)}
    with working("Tracing"):
        opened: Any = index if needs_run else open_index(index, engine=engine, **opening)
        if is_page and catalogue.trace_method(method).has_gradients:  # a page shows tokens where there are any to show
            tokens |= opened.space.view == "sgd"
        result = run(
            opened, prompt, completion, queries=queries or conversation, system=system, span=place, contrast=contrast,
            preferences=preferences,
            top=top, method=method, objective=objective, exact=exact, shortlist=shortlist, tokens=tokens, basis=basis,
            controls=controls, specific=specific, null=null, max_new_tokens=max_new_tokens, temperature=temperature,
            seed=seed, corpus=corpus, curvature=curvature, options=pairs("--set", option),
            **(opening if needs_run else {}),
        )  # fmt: skip
    rows = [hit.as_row() for hit in result.hits]
    if out is not None:
        result.save(out, force=True)  # what may be overwritten was asked before the work
    if as_json:
        answers = [answer.as_json() for answer in result.answers]
        more = {"verdicts": result.verdicts, "overlaps": result.overlaps, "notes": result.notes}
        more["rerankings"] = [vars(reranking) for reranking in result.rerankings]
        more["stabilities"] = [vars(stability) for stability in result.stabilities]
        levels = {"needed_z": result.needed_z, "levels": result.levels}
        print_json({"answers": answers, "method": result.method, **levels, **more, "rows": rows})
        return
    print_part(trace_tables(result))
    if out is not None:
        print_part(f"written to {out}")
    asked = {"--prompt": prompt, "--queries": queries, "--messages": messages, "--completion": completion}
    given = [word for flag, value in asked.items() if value is not None for word in (flag, value)]
    numbers = range(len(result.answers))
    if needs_run:
        command = ("whence", "select", index, "--method", method, *_CHOICE)
    elif any(is_shallow(result, number) for number in numbers):
        command = again("--shortlist", 4 * (shortlist or DEEPEST))
    elif result.levels and not opened.has_contrasts and not any(stands_out(result, number) for number in numbers):
        command = ("whence", "trace", index, *given, "--method", "bm25")
    elif (
        exact is None and not result.rerankings and catalogue.trace_method(method).has_gradients and can_rerank(opened)
    ):
        command = again("--exact")
    else:
        command = again("-o", "trace.html") if not is_page else ("whence", "select", index, *_CHOICE)
    print_ending(trace_answer(result), *command)


def _conversation(messages: str | None, queries: str | None) -> list[Any] | None:
    """A conversation in a file, as a query."""
    from whence.corpus.reading import conversation_in

    if messages and queries:
        raise SettingError("give either --messages FILE or --queries FILE")
    return None if messages is None else [conversation_in(messages)]
