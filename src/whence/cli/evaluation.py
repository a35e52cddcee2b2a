"""The verbs `evaluate selection` and `evaluate join`: parse, call one library function, print."""

from typing import Annotated

import typer

from whence import catalogue
from whence.cli.console import again, print_ending, print_json, print_part, waiting, working
from whence.cli.groups import reads_rows
from whence.cli.inputs import check_inputs, is_index
from whence.cli.options import EvalFiles, Force, Json, Parent, PoolCorpus, PoolPath, files, listed
from whence.errors import SettingError

evaluate = typer.Typer(
    help="Grade what attribution promised, by training.", no_args_is_help=True, rich_markup_mode="rich"
)
MOST_SEEDS = 1_000
TABLE_OR_PLOT = (".jsonl", ".csv", ".parquet", ".svg")
PointsFile = Annotated[
    str | None, typer.Option("-o", "--out", help="Write the points to .jsonl, .csv or .parquet, or a plot to .svg.")
]


@evaluate.command()
@reads_rows
def selection(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Every training starts from it.")],
    source: Annotated[
        str,
        typer.Argument(metavar="INDEX_OR_CORPUS", help="The pool that is chosen from."),
    ],
    tasks: Annotated[list[str], typer.Option(metavar="[NAME=]FILE", help="Examples to choose for. Repeat it.")],
    graded: Annotated[
        list[str], typer.Option(metavar="[NAME=]FILE", help="Other rows of the same tasks, to grade by.")
    ],
    methods: Annotated[
        str, typer.Option(help=f"Methods, with commas between: {', '.join(catalogue.SCORERS)}.")
    ] = "bm25,rds+",
    fraction: Annotated[float, typer.Option(help="Share of the pool's tokens that each method may choose.")] = 0.05,
    seeds: Annotated[int, typer.Option(help="Trainings of each choice.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of each training, whatever the choice's size.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank; all weights unless given.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest row in tokens.")] = 512,
    index_model: Annotated[
        str | None, typer.Option("--model", help="The model that the index is of, if it has moved since.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="For replay and source: a run of train --replayable on the pool's rows.")
    ] = None,
    parent: Parent = None,
    work: Annotated[str, typer.Option(help="Directory of finished cells: the same command goes on from there.")] = "",
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="Write the table to .jsonl, .csv or .parquet, or a plot to .svg.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train on what each method chooses, on chance's choice and on everything; grade all on held-out rows."""
    from whence.corpus.reading import open_corpus
    from whence.outputs import refuse_inputs
    from whence.reports.existing_files import Output, check_outputs
    from whence.reports.files import write_page, write_rows

    if not 2 <= seeds <= MOST_SEEDS:
        raise SettingError(f"--seeds {seeds}: a number from 2 to {MOST_SEEDS:,} is expected, as intervals need several")
    if not work:
        work = f"{out.rpartition('.')[0]}.work" if out is not None else "whence-evaluate.work"
    task_files, graded_files = files("--tasks", tasks), files("--graded", graded)
    if unmatched := sorted({*task_files} ^ {*graded_files}):
        raise SettingError(f"--tasks and --graded name different tasks: {', '.join(unmatched)} is in one of them alone")
    inputs, output = [source, *task_files.values(), *graded_files.values()], Output("-o", out, TABLE_OR_PLOT)
    check_outputs([output], rows=inputs, others=[model, index_model, run, parent], force=force)
    refuse_inputs(work, [*inputs, model, index_model, run, parent], flag="--work", is_directory=True)
    for name in methods.split(","):
        catalogue.scorer_entry(name.partition(":")[0])
    has_index = is_index(source)
    if index_model is not None and not has_index:
        raise SettingError(f"--model {index_model}: where an index' model is, and {source} is none: MODEL reads it")
    check_inputs(models=[model, index_model, parent], run=run, corpora=inputs[1:] if has_index else inputs)
    with waiting("Loading torch"):
        from whence.evaluation.choices import selection_methods
        from whence.evaluation.selection import Recipe, evaluate_selection
        from whence.reports.evaluate_tables import best_method, evaluate_answer, evaluate_plot, evaluate_tables
    rows = {name: [example.row for example in open_corpus(file)] for name, file in graded_files.items()}
    recipe = Recipe(steps=steps, batch_size=batch_size, lr=lr, lora_rank=lora_rank, max_tokens=max_tokens)
    with working("Scoring"):
        reader = index_model if has_index else model
        choosers, budget = selection_methods(
            methods.split(","),
            source,
            task_files,
            fraction=fraction,
            model=reader,
            work=work,
            run=run,
            parent=parent,
        )
    table = evaluate_selection(
        model,
        choosers,
        rows,
        work=work,
        recipe=recipe,
        seeds=range(seeds),
        say=lambda line: print_part(line, err=True),
    )
    if out is not None:
        write_page(evaluate_plot(table), out) if out.endswith(".svg") else write_rows(table.rows(), out)
    if as_json:
        print_json({"settings": table.settings | {"tokens_budget": budget}, "rows": table.rows()})
        return
    print_part(evaluate_tables(table))
    if out is not None:
        print_part(f"written to {out}")
    best, file = best_method(table), next(iter(task_files.values()))
    if run is not None and best is not None and catalogue.scorer_entry(best.partition(":")[0]).needs_run:
        source, reader = run, None
    command = again("--methods", "bm25") if best is None else (
        "whence", "select", source, *_method_words(best), "--tasks", file, "--tokens-budget", budget,
        *(() if reader is None else ("--model", reader)), "-o", "chosen.jsonl",
    )  # fmt: skip
    print_ending(evaluate_answer(table), *command)


def _method_words(name: str) -> list[str]:
    """Flags of `select` for a method as `--methods` names it, such as `less:within=mean_cosine`."""
    base, _, options = name.partition(":")
    return ["--method", base, *(word for option in options.split(",") if option for word in ("--set", option))]


@evaluate.command("join")
@reads_rows
def compare_with_pool(
    source: Annotated[str, typer.Argument(metavar="INDEX", help="Index of the pool's corpus.")],
    path: PoolPath,
    evaluated: EvalFiles,
    methods: Annotated[str, typer.Option(help="Scorers, with commas between.")] = "influence,bm25,rds+",
    queries: Annotated[int, typer.Option(help="Rows of each set that are asked for.")] = 16,
    model: Annotated[str | None, typer.Option(help="The index' model, if it has moved since.")] = None,
    corpus: PoolCorpus = None,
    run: Annotated[
        str | None,
        typer.Option(help="For replay and source: a run of train --replayable on the pool's corpus, from its parent."),
    ] = None,
    out: PointsFile = None,
    seed: Annotated[int, typer.Option(help="Seed of scorers and intervals.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Do scores of examples, summed by partition, say what leaving that partition out does?"""
    from whence.reports.existing_files import Output, check_outputs
    from whence.reports.files import write_page, write_rows

    for name in listed(methods):
        catalogue.scorer_entry(name)
    output = Output("-o", out, TABLE_OR_PLOT)
    check_outputs([output], rows=[*evaluated, corpus], others=[source, path, model, run], force=force)
    check_inputs(index=source, pool=path, run=run, corpora=[*evaluated, corpus])
    with waiting("Loading torch"):
        from whence.evaluation.joining import join
        from whence.reports.join_tables import join_answer, join_plot, join_tables
    result = join(source, path, evaluated, methods=list(listed(methods)), queries=queries,
                  model=model, corpus=corpus, run=run, seed=seed, progress=not as_json)  # fmt: skip
    if out is not None:
        write_page(join_plot(result), out) if out.endswith(".svg") else write_rows(result.points, out)
    if as_json:
        print_json({"rows": result.points, "correlations": result.correlations})
        return
    print_part(join_tables(result))
    if out is not None:
        print_part(f"written to {out}")
    command = ("whence", "ablate", path, *(word for file in evaluated for word in ("--eval", file)))
    print_ending(join_answer(result), *(again("-o", "join.svg") if out is None else command))
