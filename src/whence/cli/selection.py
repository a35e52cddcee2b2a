"""The verbs `select` and `evaluate selection`: parse, call one library function, print."""

from typing import Annotated, Any

import typer

from whence import catalogue
from whence.cli.console import Device, DeviceMap, Json, Tokenizer, Trust, print_json, print_part, waiting
from whence.errors import SettingError

evaluate = typer.Typer(
    help="Grade what attribution promised, by training.", no_args_is_help=True, rich_markup_mode="rich"
)

_METHODS = ", ".join(catalogue.SCORERS)
Tasks = Annotated[
    str | None, typer.Option(help="File of the task's examples; a column `task` makes several tasks of it.")
]
Fraction = Annotated[float | None, typer.Option(help="Choose this share of the rows.")]
Caps = Annotated[
    list[str] | None,
    typer.Option("--cap", metavar="SOURCE=AMOUNT", help="Most of a source: rows (300) or a share (0.3). Repeat it."),
]
Floors = Annotated[
    list[str] | None, typer.Option("--floor", metavar="SOURCE=AMOUNT", help="Least of a source. Repeat it.")
]
Duplicates = Annotated[
    float,
    typer.Option(help="Similarity from which a row repeats a chosen one: 1 for equal texts; 0 keeps duplicates."),
]


def select(
    source: Annotated[
        str, typer.Argument(metavar="INDEX_OR_CORPUS", help="An index, or a corpus for methods of text.")
    ],
    tasks: Tasks = None,
    method: Annotated[str, typer.Option(help=f"How to score: {_METHODS}.")] = "less",
    fraction: Fraction = None,
    count: Annotated[int | None, typer.Option(help="Or this number of rows.")] = None,
    tokens_budget: Annotated[int | None, typer.Option(help="Or rows of so many tokens together.")] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Write the rows to .jsonl, .csv or .parquet.")] = None,
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
    seed: Annotated[int, typer.Option(help="Of whatever is drawn.")] = 0,
    compare: Annotated[
        str | None, typer.Option(help="Methods, with commas between, whose choices are compared with this one.")
    ] = None,
    report: Annotated[
        str | None, typer.Option(help="Write what was chosen, and what was not, as one .html page.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="What scores of a corpus read; of an index, where its model has moved.")
    ] = None,
    gradients: Annotated[
        str | None,
        typer.Option("--view", help="frozen-v: read an index of plain gradients as Adam would use them."),
    ] = None,
    adam_mode: Annotated[
        str, typer.Option(help="Of --view frozen-v: torch, or less for LESS's released code.")
    ] = "torch",
    tokenizer: Tokenizer = None,
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Which training examples should be trained on for a task?"""
    with waiting("Loading torch"):
        from whence.reports.select_page import selection_page
        from whence.reports.select_tables import selection_report
        from whence.reports.tables import check_ending, write_page, write_rows
        from whence.selection.pipeline import compared, composition, open_view
        from whence.selection.pipeline import select as run
    if out is not None:
        check_ending(out)
    if report is not None:
        check_ending(report, (".html",), flag="--report")
    options: dict[str, Any] = {"options": pairs("--set", option), "selector": selector, "by": by}
    options |= {"caps": amounts("--cap", cap), "floors": amounts("--floor", floor)}
    options |= {"duplicates": duplicates or None, "temperature": temperature, "seed": seed}
    budget = {"fraction": fraction, "count": count, "tokens_budget": tokens_budget}
    with waiting("Scoring"):
        view = open_view(
            source,
            method,
            model=model,
            tokenizer=tokenizer,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            brings_model="model" in options["options"],
            view=gradients,
            adam_mode=adam_mode,
        )
        found = run(view, tasks, method=method, corpus=corpus, **budget, **options)
        others = {} if compare is None else compared(found, view, tasks, compare.split(","), seed=seed, **budget)
    if out is not None:
        write_rows(found.rows, out)
    if report is not None:
        write_page(selection_page(found, others), report)
    if as_json:
        more = {"composition": composition(found), "left_out": found.selection.tally(), "overlap": others}
        print_json({"settings": found.settings, "notes": found.selection.notes, **more, "rows": found.rows})
        return
    print_part(selection_report(found, others))
    if report is not None:
        print_part(f"report written to {report}")
    if out is not None:
        print_part(f"written to {out}. Next: whence train MODEL {out} -o RUN")


@evaluate.command()
def selection(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Every training starts from it.")],
    source: Annotated[str, typer.Argument(metavar="INDEX_OR_CORPUS", help="The pool that is chosen from.")],
    tasks: Annotated[list[str], typer.Option(metavar="[NAME=]FILE", help="Examples to choose for. Repeat it.")],
    graded: Annotated[
        list[str], typer.Option(metavar="[NAME=]FILE", help="Other rows of the same tasks, to grade by.")
    ],
    methods: Annotated[str, typer.Option(help=f"With commas between: {_METHODS}.")] = "bm25,rds+",
    fraction: Annotated[float, typer.Option(help="Share of the pool's tokens that each method may choose.")] = 0.05,
    seeds: Annotated[int, typer.Option(help="Trainings of each choice.")] = 3,
    steps: Annotated[int, typer.Option(help="Of each training, whatever the choice's size.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank; all weights unless given.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest row in tokens.")] = 512,
    work: Annotated[str, typer.Option(help="Directory of finished cells: the same command goes on from there.")] = "",
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="Write the table to .jsonl, .csv or .parquet, or a plot to .svg.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train on what each method chooses, on chance's choice and on everything; grade all on held-out rows."""
    with waiting("Loading torch"):
        from whence.evaluation.selection import Recipe, evaluate_selection, selection_methods
        from whence.reports.select_tables import table_of_methods, table_plot
        from whence.reports.tables import check_ending, write_page, write_rows
    if out is not None:
        check_ending(out, (".jsonl", ".csv", ".parquet", ".svg"))
    if not work:
        work = f"{out.rpartition('.')[0]}.work" if out is not None else "whence-evaluate.work"
    asked, marked = files("--tasks", tasks), files("--graded", graded)
    if missing := sorted({*asked} ^ {*marked}):
        raise SettingError(f"--tasks and --graded name different tasks: {', '.join(missing)} is in one of them alone")
    from whence.corpus.reading import open_corpus

    rows = {name: [example.row for example in open_corpus(file)] for name, file in marked.items()}
    recipe = Recipe(steps=steps, batch_size=batch_size, lr=lr, lora_rank=lora_rank, max_tokens=max_tokens)
    with waiting("Scoring"):
        made, budget = selection_methods(methods.split(","), source, asked, fraction=fraction, model=model, work=work)
    table = evaluate_selection(
        model,
        made,
        rows,
        work=work,
        recipe=recipe,
        seeds=range(seeds),
        progress=lambda line: print_part(line, err=True),
    )
    if out is not None:
        write_page(table_plot(table), out) if out.endswith(".svg") else write_rows(table.rows(), out)
    if as_json:
        print_json({"settings": table.settings | {"tokens_budget": budget}, "rows": table.rows()})
        return
    print_part(table_of_methods(table))
    if out is not None:
        print_part(f"written to {out}")


def pairs(flag: str, given: list[str] | None) -> dict[str, str]:
    """Of NAME=VALUE options."""
    out = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise SettingError(f"{flag} {text}: NAME=VALUE is expected")
        out[name] = value
    return out


def amounts(flag: str, given: list[str] | None) -> dict[str, int | float]:
    """Of SOURCE=AMOUNT options: rows as whole numbers, shares with a point."""
    out: dict[str, int | float] = {}
    for name, value in pairs(flag, given).items():
        try:
            out[name] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            raise SettingError(f"{flag} {name}={value}: rows (300) or a share (0.3) is expected") from None
    return out


def files(flag: str, given: list[str]) -> dict[str, str]:
    """Of [NAME=]FILE options; a file without a name is called `task`."""
    out: dict[str, str] = {}
    for text in given:
        name, equals, file = text.partition("=")
        name, file = (name, file) if equals else ("task", text)
        if name in out:
            raise SettingError(f"{flag}: two files for the task {name}; name them apart, as in a={out[name]}")
        out[name] = file
    return out
