"""The verbs `evaluate lds`, `evaluate retrieval` and `evaluate tail-patch`: parse, call one library function, print."""

from dataclasses import dataclass
from typing import Annotated

import typer

from whence import catalogue
from whence.cli.console import again, print_ending, print_json, print_part, waiting
from whence.cli.evaluation import TABLE_OR_PLOT, evaluate
from whence.cli.groups import flattened, reads_rows
from whence.cli.inputs import check_inputs, is_index
from whence.cli.options import Force, Json, Parent, listed, numbers, pairs
from whence.errors import SettingError

GRADED_FILE = Annotated[
    str | None, typer.Option("-o", "--out", help="Write the table to .jsonl, .csv or .parquet, or a plot to .svg.")
]


@dataclass(frozen=True, kw_only=True)
class GradedMethods:
    """What is graded, and what it cost."""

    methods: Annotated[
        str,
        typer.Option(
            help="Methods, with commas between; less@NAME reads the --index of that name. "
            f"There are {', '.join(catalogue.GRADED)}."
        ),
    ] = ""
    index: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]INDEX", help="Index of the rows, for methods that read its vectors. Repeat it."),
    ] = None
    scores: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Scores of any other method: query, id, score in .parquet, .jsonl or .csv. Repeat it.",
        ),
    ] = None
    cost: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SECONDS", help="What a method's scores cost, if that was measured elsewhere."),
    ] = None
    index_seconds: Annotated[
        float | None, typer.Option(help="What making the index took, added for methods that read its vectors.")
    ] = None

    def checked_names(self, source: str | None = None) -> list[str]:
        """Methods.

        Args:
            source: An index that is read where a method names none.

        Raises:
            UnknownNameError: There is no such method.
            SettingError: There is none at all, or an index is needed and there is none.
        """
        names, files = self._split(), pairs("--scores", self.scores)
        if not names and not files:
            raise SettingError("no method to grade: name some with --methods, or files with --scores NAME=FILE")
        for name in names:
            entry = catalogue.graded_entry(name.partition("@")[0].partition(":")[0])
            if entry.needs_index and not (self.index or source):
                raise SettingError(
                    f"--methods {name}: it reads the vectors of an index. Make one with: whence index MODEL CORPUS "
                    "-o INDEX, and add --index INDEX"
                )
        return names

    def _split(self) -> list[str]:
        """Methods; a comma before OPTION=VALUE belongs to the method before it."""
        names: list[str] = []
        for word in listed(self.methods):
            is_option = names and ":" in names[-1] and "=" in word and ":" not in word
            if is_option:
                names[-1] += f",{word}"
            elif word:
                names.append(word)
        return names

    @property
    def indexes(self) -> dict[str, str]:
        """Indexes by name; one without a name has the empty one.

        Raises:
            SettingError: Two have one name.
        """
        out: dict[str, str] = {}
        for text in self.index or []:
            name, equals, path = text.partition("=")
            name, path = (name, path) if equals else ("", text)
            if name in out:
                raise SettingError(f"--index {text}: there is another of that name; tell them apart as in adam={path}")
            out[name] = path
        return out

    @property
    def files(self) -> dict[str, str]:
        """Files of scores by the method's name."""
        return pairs("--scores", self.scores)

    @property
    def costs(self) -> dict[str, float]:
        """Seconds by method."""
        return numbers("--cost", self.cost)


@evaluate.command("lds")
@flattened
def grade_by_bank(
    bank: Annotated[str, typer.Argument(metavar="BANK", help="Retrainings that `whence bank` made.")],
    graded: GradedMethods,
    run: Annotated[str | None, typer.Option(help="The bank's run, if it has moved.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that the run was trained from, or another index', if it has moved.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of methods that draw, and of intervals.")] = 0,
    out: GRADED_FILE = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Do summed scores say how trainings without some rows end? (linear datamodeling score)."""
    from whence.reports.existing_files import Output, check_outputs
    from whence.reports.files import write_page, write_rows

    names, indexes, files, costs = graded.checked_names(), graded.indexes, graded.files, graded.costs
    output = Output("-o", out, TABLE_OR_PLOT)
    check_outputs([output], rows=[*files.values()], others=[bank, run, model, *indexes.values()], force=force)
    check_inputs(bank=bank, models=[run, model])
    for path in indexes.values():
        check_inputs(index=path)
    with waiting("Loading torch"):
        from whence.evaluation.bank_scores import evaluate_lds
        from whence.reports.lds_tables import lds_answer, lds_plot, lds_tables
    result = evaluate_lds(bank, names, index=indexes, scores=files, costs=costs, index_seconds=graded.index_seconds,
                          run=run, model=model, seed=seed, progress=not as_json)  # fmt: skip
    if out is not None:
        write_page(lds_plot(result), out) if out.endswith(".svg") else write_rows(result.rows(), out)
    if as_json:
        settings = {**result.settings, "training_seconds": result.training_seconds}
        print_json({"settings": settings, "rows": result.rows(), "notes": result.table.notes})
        return
    print_part(lds_tables(result))
    if out is not None:
        print_part(f"written to {out}")
    after = command_after(result.table.marks[0].method, indexes, result.settings["run"], out, "lds")
    print_ending(lds_answer(result), *after)


def command_after(best: str, indexes: dict[str, str], run: str, out: str | None, name: str) -> tuple[object, ...]:
    """The plot first; then a choice by the best method, if it reads an index that is given or the run.

    Args:
        best: The best method, as `method_scores.MethodName` has it.
        indexes: Indexes by name.
        run: The run that the bank is of.
        out: Where the table was written.
        name: Name of the file that is proposed, without its ending.
    """
    text, _, index = best.partition("@")
    base, _, options = text.partition(":")
    entry = catalogue.SCORERS.get(base)
    if out is None or entry is None or not entry.reads_tasks:
        return again("-o", f"{name}.svg" if out is None else f"{name}.jsonl")
    source = run if entry.needs_run else indexes.get(index, next(iter(indexes.values()), None))
    if source is None:
        return again("-o", f"{name}.jsonl")
    chosen = [word for option in options.split(",") if option for word in ("--set", option)]
    return ("whence", "select", source, "--method", base, *chosen, "--tasks", "TASKS.jsonl", "--count", 100, "-o",
            "chosen.jsonl")  # fmt: skip


@evaluate.command()
@flattened
@reads_rows
def retrieval(
    queries: Annotated[
        str, typer.Argument(metavar="QUERIES", help="Rows that ask, each with the ids of its `relevant` rows.")
    ],
    source: Annotated[str, typer.Argument(metavar="INDEX_OR_CORPUS", help="The rows that are ranked.")],
    graded: GradedMethods,
    relevant: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Rows that have the query's value in this column are relevant."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(help="The run of `whence train --replayable` that replay goes back through."),
    ] = None,
    parent: Parent = None,
    k: Annotated[str, typer.Option(help="Depths of recall and precision, with commas between.")] = "10,50",
    model: Annotated[
        str | None, typer.Option(help="For a corpus the model that methods read; for an index, where it has moved.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of methods that draw, and of intervals.")] = 0,
    out: GRADED_FILE = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Are the rows found that are known to be behind an answer?"""
    from whence.reports.existing_files import Output, check_outputs
    from whence.reports.files import write_page, write_rows

    has_index = is_index(source)
    names, files, costs = graded.checked_names(source if has_index else None), graded.files, graded.costs
    indexes, output = graded.indexes, Output("-o", out, TABLE_OR_PLOT)
    if not all(word.isdecimal() and int(word) for word in listed(k)):
        raise SettingError(f"--k {k}: numbers of rows from 1 on are expected, with commas between")
    rows = [queries, *files.values(), *([] if has_index else [source])]
    check_outputs([output], rows=rows, others=[source, run, parent, model, *indexes.values()], force=force)
    check_inputs(models=[model, parent], run=run, corpora=[queries] if has_index else [queries, source])
    for path in indexes.values():
        check_inputs(index=path)
    with waiting("Loading torch"):
        from whence.evaluation.retrieval import evaluate_retrieval
        from whence.reports.retrieval_tables import retrieval_answer, retrieval_plot, retrieval_tables
    table = evaluate_retrieval(
        queries, source, names, relevant=relevant, index=indexes, scores=files, costs=costs,
        index_seconds=graded.index_seconds, run=run, parent=parent, model=model,
        depths=[int(word) for word in listed(k)], seed=seed, progress=not as_json,
    )  # fmt: skip
    if out is not None:
        write_page(retrieval_plot(table), out) if out.endswith(".svg") else write_rows(table.rows(), out)
    if as_json:
        print_json({"rows": table.rows(), "relevant": table.relevant, "notes": table.notes})
        return
    print_part(retrieval_tables(table))
    if out is not None:
        print_part(f"written to {out}")
    print_ending(retrieval_answer(table), *again("-o", "retrieval.svg" if out is None else "retrieval.jsonl"))


@evaluate.command("tail-patch")
@flattened
@reads_rows
def tail_patch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run, or a model; steps start from its last weights.")],
    queries: Annotated[str, typer.Argument(metavar="QUERIES", help="Rows whose answers' probabilities are measured.")],
    source: Annotated[str, typer.Argument(metavar="INDEX_OR_CORPUS", help="The rows that are retrieved.")],
    graded: GradedMethods,
    top: Annotated[int, typer.Option(help="Rows of each query and method; each takes a step of its own.")] = 10,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the step; the run's, of its last interval, unless given.")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(metavar="adamw|sgd", help="AdamW's step where the run has its moments, else SGD's."),
    ] = None,
    parent: Annotated[
        str | None, typer.Option(help="For replay and source: the model that RUN was trained from, if it has moved.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random rows, methods that draw, and intervals.")] = 0,
    out: GRADED_FILE = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Does a step on the rows that a method retrieves make the answer more likely?"""
    from whence.reports.existing_files import Output, check_outputs
    from whence.reports.files import write_page, write_rows

    has_index = is_index(source)
    names, files, costs = graded.checked_names(source if has_index else None), graded.files, graded.costs
    indexes, output = graded.indexes, Output("-o", out, TABLE_OR_PLOT)
    rows = [queries, *files.values(), *([] if has_index else [source])]
    check_outputs([output], rows=rows, others=[source, run, parent, *indexes.values()], force=force)
    check_inputs(models=[run, parent], corpora=[queries] if has_index else [queries, source])
    for path in indexes.values():
        check_inputs(index=path)
    with waiting("Loading torch"):
        from whence.evaluation.tail_patch import evaluate_tail_patch
        from whence.reports.tail_patch_tables import tail_patch_answer, tail_patch_plot, tail_patch_tables
    table = evaluate_tail_patch(
        run, queries, source, names, top=top, lr=lr, step=step, index=indexes, scores=files, costs=costs,
        index_seconds=graded.index_seconds, parent=parent, seed=seed, progress=not as_json,
    )  # fmt: skip
    if out is not None:
        write_page(tail_patch_plot(table), out) if out.endswith(".svg") else write_rows(table.rows(), out)
    if as_json:
        print_json({"settings": table.settings, "rows": table.rows(), "notes": table.notes})
        return
    print_part(tail_patch_tables(table))
    if out is not None:
        print_part(f"written to {out}")
    print_ending(tail_patch_answer(table), *again("-o", "tail-patch.svg" if out is None else "tail-patch.jsonl"))
