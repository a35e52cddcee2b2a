"""The verbs `mix law` and `mix suggest`: parse, call one library function, print."""

import shlex
import sys
from typing import Annotated

import typer

from whence import catalogue
from whence.cli.ablation import mixture_words
from whence.cli.console import again, print_ending, print_json, print_part, waiting
from whence.cli.groups import reads_tables
from whence.cli.inputs import check_inputs
from whence.cli.options import EvalFiles, Force, Json, PoolPath, Report, numbers
from whence.errors import SettingError

mix = typer.Typer(
    help="Which mixture of data to train on, from the losses of others.", no_args_is_help=True, rich_markup_mode="rich"
)
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="SET=WEIGHT", help="Evaluation set to do well on; all alike unless given. Repeat it."
    ),
]


@mix.command()
@reads_tables
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
    target: Targets = None,
    cap: Annotated[
        list[str] | None, typer.Option(metavar="DOMAIN=SHARE", help="At most so much of a domain. Repeat it.")
    ] = None,
    before: Annotated[
        list[str] | None,
        typer.Option(metavar="SET=LOSS", help="The parent's loss: what share of each domain keeps it? Repeat it."),
    ] = None,
    within: Annotated[
        bool,
        typer.Option(
            "--within/--extrapolate", help="Suggest of each domain what some mixture of the table had, or any share."
        ),
    ] = True,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of folds, starts, drawn mixtures and intervals.")] = 0,
    mixture_prefix: Annotated[
        str | None, typer.Option(help="How columns of shares begin; train_ or mixture/ unless given.")
    ] = None,
    loss_prefix: Annotated[
        str | None, typer.Option(help="How columns of losses begin; metric/ or loss/ unless given.")
    ] = None,
    predict: Annotated[
        str | None,
        typer.Option(metavar="TABLE", help="Predict these mixtures too, and grade the law by their losses, if known."),
    ] = None,
    predict_losses: Annotated[str | None, typer.Option(help="File of their losses, if they are not in TABLE.")] = None,
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="Write the mixture, a row a domain, to .jsonl, .csv or .parquet.")
    ] = None,
    report: Report = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fit a mixing law to a table of mixtures and losses: what is it worth, and which mixture is best?"""
    from whence.reports.existing_files import Output, check_outputs
    from whence.reports.files import write_page, write_rows

    catalogue.law_entry(law)
    outputs = [Output("-o", out), Output("--report", report, (".html",))]
    check_outputs(outputs, rows=[table, losses, predict, predict_losses], force=force)
    if predict_losses is not None and predict is None:
        raise SettingError("--predict-losses belongs to --predict TABLE")
    targets, caps, parent = numbers("--target", target), numbers("--cap", cap), numbers("--before", before)
    check_inputs(corpora=[table, losses, predict, predict_losses])
    with waiting("Loading"):
        from whence.mixing.pipeline import mix_law
        from whence.mixing.prediction import predict as predict_mixtures
        from whence.mixing.prediction import read_others
        from whence.reports.mix_page import mix_page
        from whence.reports.mix_tables import mix_answer, mix_tables, prediction_tables
    prefixes = {"mixture_prefix": mixture_prefix, "loss_prefix": loss_prefix}
    others = None if predict is None else read_others(predict, predict_losses, **prefixes)
    with waiting("Fitting"):
        result = mix_law(
            table, losses, law=law, targets=targets, caps=caps, before=parent, within=within, folds=folds, seed=seed,
            **prefixes,
        )  # fmt: skip
        prediction = None if others is None else predict_mixtures(result, others)
    if out is not None:
        write_rows(result.rows, out)
    if report is not None:
        write_page(mix_page(result, shlex.join(["whence", *sys.argv[1:]])), report)
    if as_json:
        predictions = {} if prediction is None else {"predictions": prediction.document()}
        print_json(result.document() | predictions)
        return
    print_part(mix_tables(result))
    if prediction is not None:
        print_part(prediction_tables(prediction))
    if report is not None:
        print_part(f"report written to {report}")
    if out is not None:
        print_part(f"written to {out}")
    suggested = mixture_words({row["domain"]: row["suggested"] for row in result.rows if row["suggested"] > 0})
    if out is None:
        command = again("-o", "mixture.jsonl")
    elif result.table.column == "merged":  # of a pool's averages, which can be made
        command = ("whence", "pool", "merge", "POOL", "--mixture", suggested, "-o", "MERGED")
    else:
        command = again("--law", next(name for name in catalogue.MIXING_LAWS if name != law))
    print_ending(mix_answer(result), *command)


@mix.command()
@reads_tables
def suggest(
    pool: PoolPath,
    evaluated: EvalFiles,
    target: Targets = None,
    cap: Annotated[
        list[str] | None, typer.Option(metavar="PARTITION=SHARE", help="At most so much of a partition. Repeat it.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the descent.")] = 20,
    rate: Annotated[float, typer.Option(help="Rate of the first step.")] = 0.5,
    rows: Annotated[int, typer.Option(help="Rows of every set that a step reads.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed by which these rows are drawn.")] = 0,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", help="Write the mixture, a row a partition, to .jsonl, .csv or .parquet."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Find the best mixture of a pool's partitions, by descent through the averages of its members."""
    from whence.reports.existing_files import Output, check_outputs
    from whence.reports.files import write_rows

    check_outputs([Output("-o", out)], rows=evaluated, others=[pool], force=force)
    caps, targets = numbers("--cap", cap), numbers("--target", target)
    check_inputs(pool=pool, corpora=evaluated)
    with waiting("Loading torch"):
        from whence.ablation.suggestion import suggest as run
        from whence.reports.suggest_tables import suggest_answer, suggest_tables
    result = run(
        pool, evaluated, steps=steps, rate=rate, rows=rows, caps=caps, targets=targets, seed=seed, progress=not as_json
    )  # fmt: skip
    if out is not None:
        write_rows(result.rows(), out)
    if as_json:
        losses = {"losses": result.losses, "uniform": result.uniform, "best_alone": result.best_alone}
        more = {"gain": dict(zip(("nats", "low", "high"), result.gain, strict=True))}
        more |= {"alone": result.alone, "parent": result.parent, "steps": result.steps}
        print_json({"rows": result.rows(), **losses, **more})
        return
    print_part(suggest_tables(result))
    if out is not None:
        print_part(f"written to {out}")
    mixture = mixture_words(result.mixture) if result.gain[0] > 0 else "macro"
    print_ending(suggest_answer(result), "whence", "pool", "merge", pool, "--mixture", mixture, "-o", "MERGED")
