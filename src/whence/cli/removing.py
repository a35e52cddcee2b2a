"""The verbs `evaluate removal` and `evaluate addition`: parse, call one library function, print."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from whence.cli.console import print_ending, print_json, print_part, waiting
from whence.cli.evaluation import TABLE_OR_PLOT
from whence.cli.grading import GRADED_FILE, GradedMethods, command_after, evaluate
from whence.cli.groups import flattened
from whence.cli.inputs import check_inputs
from whence.cli.options import EngineFlags, Force, Json
from whence.errors import SettingError

BankPath = Annotated[
    str, typer.Argument(metavar="BANK", help="Retrainings that `whence bank` made; these trainings join it.")
]


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """What is trained."""

    share: Annotated[float, typer.Option(help="Share of the training's rows that are at the top.")] = 0.01
    seeds: Annotated[int, typer.Option(help="Trainings of each line; the first has the run's own seed.")] = 3
    each_query: Annotated[
        bool, typer.Option("--each-query", help="Rank rows for each query and train for each: that many times more.")
    ] = False
    run: Annotated[str | None, typer.Option("--run", help="The bank's run, if it has moved.")] = None


@evaluate.command("removal")
@flattened
def remove_rows(
    bank: BankPath,
    graded: GradedMethods,
    settings: TrainingFlags,
    running: EngineFlags,
    model: Annotated[
        str | None, typer.Option(help="The model that the run was trained from, or another index', if it has moved.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random rows, of methods that draw, and of intervals.")] = 0,
    out: GRADED_FILE = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """What does leaving out the rows that a method ranks highest do? Trainings tell."""
    _grade("removal", bank, graded, settings, running, model, seed, out, force=force, as_json=as_json)


@evaluate.command("addition")
@flattened
def add_rows(
    bank: BankPath,
    graded: GradedMethods,
    settings: TrainingFlags,
    running: EngineFlags,
    model: Annotated[
        str | None, typer.Option(help="The model that the run was trained from, or another index', if it has moved.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random rows, of methods that draw, and of intervals.")] = 0,
    out: GRADED_FILE = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """What does training on nothing but the rows that a method ranks highest do? Trainings tell."""
    _grade("addition", bank, graded, settings, running, model, seed, out, force=force, as_json=as_json)


def _grade(
    way: Any, bank: str, graded: GradedMethods, flags: TrainingFlags, running: EngineFlags, model: str | None,
    seed: int, out: str | None, *, force: bool, as_json: bool,
) -> None:  # fmt: skip
    from whence.reports.existing_files import Output, check_outputs
    from whence.reports.files import write_page, write_rows

    names, indexes, files, costs = graded.checked_names(), graded.indexes, graded.files, graded.costs
    others = [bank, model, flags.run, *indexes.values()]
    check_outputs([Output("-o", out, TABLE_OR_PLOT)], rows=[*files.values()], others=others, force=force)
    check_inputs(bank=bank, models=[model, flags.run])
    for path in indexes.values():
        check_inputs(index=path)
    if not 0 < flags.share < 1:
        raise SettingError(f"--share {flags.share}: a share above 0 and below 1 is expected")
    engine = running.chosen()
    with waiting("Loading torch"):
        from whence.evaluation.removal import graded_by_training
        from whence.reports.removal_tables import removal_answer, removal_plot, removal_tables
    table = graded_by_training(
        bank, names, way, **vars(flags), index=indexes, scores=files, costs=costs, index_seconds=graded.index_seconds,
        model=model, seed=seed, engine=engine, progress=not as_json,
    )  # fmt: skip
    if out is not None:
        write_page(removal_plot(table), out) if out.endswith(".svg") else write_rows(table.rows(), out)
    if as_json:
        print_json({"settings": table.settings, "rows": table.rows(), "notes": table.notes})
        return
    print_part(removal_tables(table))
    if out is not None:
        print_part(f"written to {out}")
    print_ending(removal_answer(table), *command_after(table.marks[0].method, indexes, table.settings["run"], out, way))
