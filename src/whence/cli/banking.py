"""The verb `bank`: parse, call one library function, print."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whence.cli.console import print_ending, print_json, print_part, waiting
from whence.cli.inputs import check_inputs
from whence.cli.options import CorpusPath, DryRun, EngineFlags, Json
from whence.cli.plans import print_plan
from whence.counts import duration, number_of

if TYPE_CHECKING:
    from whence.evaluation.bank_store import Bank

NEXT_METHODS = "bm25,random"
"""Methods that need no index, for the command that goes on from a bank."""


@dataclass(frozen=True, kw_only=True)
class BankFlags:
    """What to leave out, and how; names as in `BankSettings`."""

    subsets: Annotated[int, typer.Option(help="Random subsets that the bank is to have.", show_default=False)] = 0
    fraction: Annotated[
        float | None, typer.Option(help="Share of the rows that a random subset keeps.", show_default="0.5")
    ] = None
    by: Annotated[str | None, typer.Option(help="Leave each group out in turn: the rows of one value.")] = None
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Leave out the rows whose ids a file lists, as trace and select write it. Repeat it."
        ),
    ] = None
    leave_out: Annotated[
        str | None,
        typer.Option(
            metavar="zero|drop",
            help="How rows leave: keep their places and add nothing, or a training on the others alone.",
            show_default="zero",
        ),
    ] = None
    keep_weights: Annotated[
        bool | None,
        typer.Option("--keep-weights", help="Keep each final model, so that other --queries can be measured later."),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of the random subsets.", show_default="0")] = None


def bank(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Directory that `whence train` wrote.")],
    corpus: CorpusPath,
    out: Annotated[str, typer.Option("-o", "--out", help="The bank's directory; the same command goes on from there.")],
    settings: BankFlags,
    running: EngineFlags,
    queries: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out rows whose losses are kept; required at first.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The model that the run was trained from, if it has moved since.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a run again without some of its rows, many times: the truth that attribution is graded by."""
    from whence.outputs import refuse_inputs

    options: dict[str, Any] = vars(settings) | {"rows": settings.rows or []}
    refuse_inputs(out, [run, corpus, queries, model, *options["rows"]], is_directory=True)
    check_inputs(models=[run, model], corpora=[corpus, queries])
    engine = running.chosen()
    if dry_run:
        with waiting("Loading torch"):
            from whence.evaluation.bank_plan import plan_bank
        with waiting("Timing a few steps"):
            planned = plan_bank(run, corpus, out, queries=queries, model=model, **options)
        if ending := print_plan(planned, as_json):
            print_ending(*ending)
        return
    with waiting("Loading torch"):
        from whence.evaluation.bank_pipeline import make_bank
        from whence.reports.bank_tables import bank_answer, bank_tables
    start = time.perf_counter()
    made = make_bank(run, corpus, out, queries=queries, model=model, engine=engine, progress=not as_json, **options)
    if as_json:
        print_json(_document(made.bank) | {"trained": list(made.trained), "measured": made.measured})
        return
    print_part(bank_tables(made.bank))
    if made.trained or made.measured:
        members = f"{number_of(made.measured, 'member')} measured on other queries"
        what = number_of(len(made.trained), "training") if made.trained else members
        print_part(f"{what}; this took {duration(time.perf_counter() - start)}")
    print_ending(bank_answer(made.bank, len(made.trained) + made.measured), *_next(out))


def print_bank(path: str, as_json: bool) -> None:
    """Print what a bank holds, as `info` does."""
    with waiting("Loading torch"):
        from whence.evaluation.bank_store import open_bank
        from whence.reports.bank_tables import bank_answer, bank_tables
    opened = open_bank(path)
    if as_json:
        print_json(_document(opened))
        return
    print_part(bank_tables(opened))
    print_ending(bank_answer(opened), *_next(path))


def _document(opened: "Bank") -> dict[str, Any]:
    from dataclasses import asdict

    from whence.reports.bank_tables import bank_rows_of

    return {"bank": opened.place.root, "rows": bank_rows_of(opened), **asdict(opened.description.protocol),
            "subsets": opened.description.subsets and asdict(opened.description.subsets),
            "repetition": opened.description.repetition and asdict(opened.description.repetition),
            "notes": list(opened.description.notes)}  # fmt: skip


def _next(path: str) -> tuple[str, ...]:
    return "whence", "evaluate", "lds", path, "--methods", NEXT_METHODS
