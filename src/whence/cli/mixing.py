"""The verbs of `mix`: parse, call one library function, print."""

import shlex
import sys
from typing import Annotated

import typer

from whence import catalogue
from whence.cli.console import Json, print_json, print_part, waiting
from whence.errors import SettingError

mix = typer.Typer(
    help="Which mixture of data to train on, from the losses of others.", no_args_is_help=True, rich_markup_mode="rich"
)


@mix.command()
def law(
    table: Annotated[
        str,
        typer.Argument(
            metavar="TABLE",
            help="Mixtures with losses as columns metric/NAME, or what `ablate -o` wrote: csv, jsonl, ...",
        ),
    ],
    losses: Annotated[str | None, typer.Option(help="File of the losses, if they are not in TABLE.")] = None,
    law: Annotated[str, typer.Option(help=f"What predicts: {', '.join(catalogue.MIXING_LAWS)}.")] = "exp",
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="SET=WEIGHT", help="Evaluation set to do well on; all alike unless given. Repeat it."),
    ] = None,
    cap: Annotated[
        list[str] | None, typer.Option(metavar="DOMAIN=SHARE", help="Most of a domain that there is. Repeat it.")
    ] = None,
    before: Annotated[
        list[str] | None,
        typer.Option(metavar="SET=LOSS", help="The parent's loss: what share of each domain keeps it? Repeat it."),
    ] = None,
    within: Annotated[
        bool, typer.Option("--within", help="Suggest of no domain more than some mixture of the table had.")
    ] = False,
    folds: Annotated[int, typer.Option(help="Of the cross-validation.")] = 10,
    seed: Annotated[int, typer.Option(help="Of folds, starts, drawn mixtures and intervals.")] = 0,
    mixture_prefix: Annotated[
        str | None, typer.Option(help="How columns of shares begin; train_ or mixture/ unless given.")
    ] = None,
    loss_prefix: Annotated[
        str | None, typer.Option(help="How columns of losses begin; metric/ or loss/ unless given.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="Write the mixture, a row a domain, to .jsonl, .csv or .parquet.")
    ] = None,
    report: Annotated[str | None, typer.Option(help="Write an HTML report.")] = None,
    as_json: Json = False,
) -> None:
    """Fit a mixing law to a table of mixtures and losses: what is it worth, and which mixture is best?"""
    with waiting("Loading"):
        from whence.mixing.pipeline import mix_law
        from whence.reports.mix_page import law_page
        from whence.reports.mix_tables import mix_report
        from whence.reports.tables import check_ending, write_page, write_rows
    if out is not None:
        check_ending(out)
    if report is not None:
        check_ending(report, (".html",), flag="--report")
    targets, caps, parent = numbers("--target", target), numbers("--cap", cap), numbers("--before", before)
    with waiting("Fitting"):
        found = mix_law(
            table, losses, law=law, targets=targets, caps=caps, before=parent, within=within, folds=folds, seed=seed,
            mixture_prefix=mixture_prefix, loss_prefix=loss_prefix,
        )  # fmt: skip
    if out is not None:
        write_rows(found.rows, out)
    if report is not None:
        write_page(law_page(found, shlex.join(["whence", *sys.argv[1:]])), report)
    if as_json:
        print_json(found.document())
        return
    print_part(mix_report(found))
    if report is not None:
        print_part(f"report written to {report}")
    if out is not None:
        print_part(f"written to {out}")


@mix.command()
def suggest(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Of `whence pool train`.")],
    evaluated: Annotated[list[str], typer.Option("--eval", help="Held-out rows: a file, or a directory of files.")],
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="SET=WEIGHT", help="Evaluation set to do well on; all alike unless given. Repeat it."),
    ] = None,
    cap: Annotated[
        list[str] | None, typer.Option(metavar="PARTITION=SHARE", help="Most of a partition. Repeat it.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the descent.")] = 20,
    rate: Annotated[float, typer.Option(help="Of its first step.")] = 0.5,
    rows: Annotated[int, typer.Option(help="Of every set, that a step reads.")] = 64,
    seed: Annotated[int, typer.Option(help="Of those rows.")] = 0,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", help="Write the mixture, a row a partition, to .jsonl, .csv or .parquet."),
    ] = None,
    as_json: Json = False,
) -> None:
    """The best mixture of a pool's partitions, by descent through the averages of its members."""
    with waiting("Loading torch"):
        from whence.ablation.suggestion import suggest as run
        from whence.reports.ablate_tables import suggestion_report
        from whence.reports.tables import check_ending, write_rows
    if out is not None:
        check_ending(out)
    found = run(
        pool, evaluated, steps=steps, rate=rate, rows=rows, caps=numbers("--cap", cap),
        targets=numbers("--target", target), seed=seed, shown=not as_json,
    )  # fmt: skip
    if out is not None:
        write_rows(found.rows(), out)
    if as_json:
        losses = {"losses": found.losses, "uniform": found.uniform, "best_alone": found.best_alone}
        print_json({"rows": found.rows(), **losses, "alone": found.alone, "parent": found.parent, "steps": found.steps})
        return
    print_part(suggestion_report(found))
    if out is not None:
        print_part(f"written to {out}. Confirm it by a real training: whence ablate {pool} --mixtures FILE --truth")


def numbers(flag: str, given: list[str] | None) -> dict[str, float]:
    """Of NAME=NUMBER options; a name may hold `=`."""
    out: dict[str, float] = {}
    for text in given or []:
        name, equals, value = text.rpartition("=")
        if name in out:
            raise SettingError(f"{flag} {text}: {name} is given twice")
        try:
            out[name] = float(value)
        except ValueError:
            equals = ""
        if not (name and equals):
            raise SettingError(f"{flag} {text}: NAME=NUMBER is expected")
    return out
