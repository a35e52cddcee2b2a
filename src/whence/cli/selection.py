"""The verb `select`: parse, call one library function, print."""

from typing import Annotated, Any

import typer

from whence import catalogue
from whence.cli.console import again, print_ending, print_json, print_part, waiting, working
from whence.cli.inputs import check_inputs, is_index
from whence.cli.options import EngineFlags, Force, Json, LoadingFlags, Preferences, RowsFile, amounts, listed, pairs

_METHODS = ", ".join(catalogue.SCORERS)
Tasks = Annotated[
    str | None,
    typer.Option(help="File of the task's examples; a column `task` makes several tasks of it."),
]
Fraction = Annotated[float | None, typer.Option(help="Choose this share of the rows.")]
Caps = Annotated[
    list[str] | None,
    typer.Option(
        "--cap", metavar="SOURCE=AMOUNT", help="At most so much of a source: rows (300) or a share (0.3). Repeat it."
    ),
]
Floors = Annotated[
    list[str] | None, typer.Option("--floor", metavar="SOURCE=AMOUNT", help="At least so much of a source. Repeat it.")
]
Duplicates = Annotated[
    float,
    typer.Option(help="Similarity from which a row repeats a chosen one: 1 for equal texts; 0 keeps duplicates."),
]


def select(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INDEX_OR_CORPUS", help="An index, or a corpus for methods of text; for replay and source a run."
        ),
    ],
    loading: LoadingFlags,
    running: EngineFlags,
    tasks: Tasks = None,
    preferences: Preferences = None,
    method: Annotated[str, typer.Option(help=f"How to score: {_METHODS}.")] = "less",
    fraction: Fraction = None,
    count: Annotated[int | None, typer.Option(help="Choose this number of rows.")] = None,
    tokens_budget: Annotated[int | None, typer.Option(help="Choose rows of so many tokens together.")] = None,
    out: RowsFile = None,
    corpus: Annotated[str | None, typer.Option(help="The rows, if not the copy that the index keeps.")] = None,
    selector: Annotated[
        str | None, typer.Option(help=f"What makes one order of several tasks: {', '.join(catalogue.SELECTORS)}.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="What is scored for: each task, or each example.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the method. Repeat it.")
    ] = None,
    cap: Caps = None,
    floor: Floors = None,
    duplicates: Duplicates = 1.0,
    temperature: Annotated[float, typer.Option(help="0: the best rows. Above: rows are drawn by their scores.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of whatever is drawn.")] = 0,
    compare: Annotated[
        str | None, typer.Option(help="Methods, with commas between, whose choices are compared with this one.")
    ] = None,
    report: Annotated[
        str | None, typer.Option(help="Write what was chosen, and what was not, as an .html page, or all as .json.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The model that scores of a corpus read; for an index, where its model is now."),
    ] = None,
    gradients: Annotated[
        str | None,
        typer.Option("--view", help="frozen-v: read an index of plain gradients as Adam would use them."),
    ] = None,
    adam_mode: Annotated[
        str, typer.Option(help="For --view frozen-v: torch, or less for LESS's released code.")
    ] = "torch",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Which training examples should be trained on for a task?"""
    from whence.corpus.columns import original
    from whence.reports.existing_files import REPORT_ENDINGS, Output, check_outputs
    from whence.reports.files import write_rows
    from whence.selection.budget import Budget, Limits, no_index_for

    entry = catalogue.scorer_entry(method)
    catalogue.selector_entry(selector or entry.selector)
    for name in listed(compare):
        catalogue.scorer_entry(name)
    Budget(fraction=fraction, count=count, tokens=tokens_budget)
    limits = {"caps": amounts("--cap", cap), "floors": amounts("--floor", floor)}
    Limits(**limits)
    if entry.needs_index and not is_index(source):
        raise no_index_for(method, source)
    options: dict[str, Any] = {"options": pairs("--set", option), "selector": selector, "by": by}
    models = [model, loading.tokenizer, *options["options"].values()]
    outputs = [Output("-o", out), Output("--report", report, REPORT_ENDINGS)]
    check_outputs(outputs, rows=[source, tasks, corpus], others=models, force=force)
    engine = running.chosen(is_scan=is_index(source) and not entry.needs_run)
    is_corpus = not (entry.needs_run or is_index(source))
    check_inputs(
        run=source if entry.needs_run else None, models=[model], corpora=[tasks, corpus, source if is_corpus else None]
    )
    with waiting("Loading torch"):
        from whence.reports.saved_results import write_report
        from whence.reports.select_page import select_page
        from whence.reports.select_tables import FEW_IN_COMMON, select_answer, select_tables
        from whence.selection.description import composition, method_overlaps
        from whence.selection.pipeline import open_view
        from whence.selection.pipeline import select as run
    options |= limits | {"duplicates": duplicates or None, "temperature": temperature, "seed": seed}
    shared = {"fraction": fraction, "count": count, "tokens_budget": tokens_budget, "preferences": preferences}
    with working("Scoring"):
        view = open_view(
            source,
            method,
            corpus=corpus,
            model=model,
            **vars(loading),
            brings_model="model" in options["options"],
            view=gradients,
            adam_mode=adam_mode,
            engine=engine,
        )
        chosen = run(view, tasks, method=method, corpus=corpus, **shared, **options)
        overlaps = {} if compare is None else method_overlaps(chosen, view, tasks, listed(compare), seed=seed, **shared)
    if out is not None:
        write_rows([original(row, view.columns) for row in chosen.rows], out)
    if report is not None:
        write_report(chosen, report, lambda: select_page(chosen, overlaps))
    if as_json:
        more = {"composition": composition(chosen), "answers": [share._asdict() for share in chosen.answers]}
        more |= {"left_out": chosen.selection.tally(), "overlap": overlaps}
        print_json({"settings": chosen.settings, "notes": chosen.selection.notes, **more, "rows": chosen.rows})
        return
    print_part(select_tables(chosen, overlaps))
    if report is not None:
        print_part(f"report written to {report}")
    if out is not None:
        print_part(f"written to {out}")
    others = [name for name, share in overlaps.items() if share < FEW_IN_COMMON]
    print_ending(
        select_answer(chosen, overlaps), *_next(source, tasks, model, out, [method, *others] if others else [])
    )


def _next(source: str, tasks: str | None, model: str | None, out: str | None, methods: list[str]) -> tuple[object, ...]:
    """The next command: write the rows, compare methods that differ by training, or train on the rows.

    What an index was made with need not be what is trained: LESS indexes by a warm-up run.
    """
    if out is None:
        return again("-o", "chosen.jsonl")
    moved = model if is_index(source) else None
    trained = "MODEL" if model is None or moved is not None else model
    if methods and tasks is not None:
        return ("whence", "evaluate", "selection", trained, source, "--tasks", tasks, "--graded", "HELDOUT.jsonl",
                "--methods", ",".join(methods), *(() if moved is None else ("--model", moved)))  # fmt: skip
    return "whence", "train", trained, out, "-o", "RUN"
