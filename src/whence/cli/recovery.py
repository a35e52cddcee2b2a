"""The verb `recover`: parse, call one library function, print."""

import shlex
import sys
from typing import Annotated

import typer

from whence import catalogue
from whence.cli.console import again, print_ending, print_json, print_part, waiting
from whence.cli.inputs import check_inputs
from whence.cli.options import (
    ChatTemplate,
    Date,
    DryRun,
    EngineFlags,
    Force,
    Json,
    NoPreferences,
    RowsFile,
    Supervise,
    WholeReport,
    listed,
)
from whence.cli.plans import print_plan
from whence.corpus.preferences import refuse_contrast

_METHODS = ", ".join(catalogue.RECOVER_METHODS)


def recover(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before: a directory or a Hub name.")],
    final: Annotated[str, typer.Argument(metavar="FINAL", help="The model after, or an adapter on it.")],
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Rows that it may have been trained on.")],
    count: Annotated[int | None, typer.Option(help="Rows to choose: about as many as it was trained on.")] = None,
    method: Annotated[
        str | None, typer.Option(help=f"How rows are scored: {_METHODS}.", show_default="calibrated")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Fine-tune a shadow to learn what members look like; else the method is nnls.")
    ] = True,
    out: RowsFile = None,
    report: WholeReport = None,
    layers: Annotated[
        str | None, typer.Option(help="Patterns of layer names; the blocks' linear ones, or an adapter's B.")
    ] = None,
    points: Annotated[int, typer.Option(help="Synthetic checkpoints between the two models.")] = 0,
    checkpoints: Annotated[
        str,
        typer.Option(help="Checkpoints of a FINAL that is a Trainer's directory: last, or all as points on the way."),
    ] = "last",
    undo: Annotated[
        str, typer.Option(help="How AdamW's scaling is undone on the weight difference: none, by moments, or by rows.")
    ] = "none",
    remove_decay: Annotated[bool, typer.Option("--remove-decay", help="Take off what weight decay took.")] = False,
    choices: Annotated[
        str | None, typer.Option(help="Labels, with commas between: rows are labelled by FINAL, a classifier.")
    ] = None,
    template: Annotated[str, typer.Option(help="Prompt for --choices, with the row's text at {text}.")] = "{text}",
    labels: Annotated[str, typer.Option(help="The likeliest label, hard, or one sampled by its probability.")] = "hard",
    balanced: Annotated[
        bool | None,
        typer.Option(
            "--balanced/--no-balanced",
            help="Choose equally many rows of each label.",
            show_default="with --choices and --count",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Rounds of training on the chosen rows and matching again; for nnls, matching, cosine.")
    ] = 0,
    mixture: Annotated[
        str | None,
        typer.Option(
            help="Shares of sources by gradients, by runs (a model trained on each source), or none.",
            show_default="runs where a shadow is trained",
        ),
    ] = None,
    short_list: Annotated[int, typer.Option(help="Rows that are matched jointly, at most.")] = 12_000,
    optimizer: Annotated[
        str | None, typer.Option(help="Optimizer of the shadow, as of FINAL: adamw or sgd; guessed unless given.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Epochs of the shadow, as of FINAL; guessed unless given.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak rate of the shadow, as of FINAL; guessed unless given.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows a step of the shadow, as of FINAL; guessed unless given.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where to find the tokenizer, if not with FINAL.")] = None,
    chat_template: ChatTemplate = None,
    supervise: Supervise = None,
    date: Date = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest row in tokens; the model's context.")] = None,
    work: Annotated[str, typer.Option(help="Directory of the evidence: the same command goes on from there.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the shadow's rows and training.")] = 0,
    preferences: NoPreferences = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    *,
    running: EngineFlags,
) -> None:
    """Which rows was this model trained on? From its weights and those it began with."""
    from whence.corpus.columns import current, original
    from whence.outputs import refuse_inputs
    from whence.recovery.settings import RecoverSettings, check_count
    from whence.reports.existing_files import REPORT_ENDINGS, Output, check_outputs
    from whence.reports.files import write_rows

    refuse_contrast(
        preferences,
        "recover looks for rows of a fine-tuning, and reads the chosen answers of pairs. Leave it out.",
    )
    settings = {
        "method": method or ("calibrated" if calibrate else "nnls"), "optimizer": optimizer, "epochs": epochs, "lr": lr,
        "batch_size": batch_size, "max_tokens": max_tokens, "seed": seed, "short_list": short_list, "points": points,
        "checkpoints": checkpoints, "undo": undo, "remove_decay": remove_decay, "choices": listed(choices),
        "template": template.replace("\\n", "\n"), "labels": labels, "balanced": balanced, "rounds": rounds,
        "mixture": mixture, "tokenizer": tokenizer, "chat_template": chat_template, "date": date, "layers": layers,
        "supervise": supervise,
    }  # fmt: skip
    check_count(count, RecoverSettings(**settings))
    engine = running.chosen()
    outputs = [Output("-o", out), Output("--report", report, REPORT_ENDINGS)]
    check_outputs(outputs, rows=[corpus], others=[base, final, tokenizer], force=force)
    if not work:
        work = f"{out.rpartition('.')[0]}.work" if out is not None else "whence-recover.work"
    refuse_inputs(work, [base, final, corpus, tokenizer], flag="--work", is_directory=True)
    check_inputs(models=[base, final], corpora=[corpus])
    if dry_run:
        with waiting("Loading torch"):
            from whence.recovery.dry_run import plan_recovery
        with waiting("Timing some rows and steps"):
            planned = plan_recovery(base, final, corpus, count=count, work=work, **settings)
        if ending := print_plan(planned, as_json):
            print_ending(*ending)
        return
    with waiting("Loading torch"):
        from whence.recovery.pipeline import recover as run
        from whence.reports.recover_page import recover_page
        from whence.reports.recover_tables import recover_answer, recover_tables
        from whence.reports.saved_results import write_report
    result = run(base, final, corpus, count=count, work=work, engine=engine, progress=not as_json, **settings)
    if out is not None:
        write_rows([original(row, current()) for row in result.rows], out)
    if report is not None:
        write_report(result, report, lambda: recover_page(result, shlex.join(["whence", *sys.argv[1:]])))
    if as_json:
        keys = ("expected", "low", "high")
        members = None if result.members is None else dict(zip(keys, result.members, strict=True))
        more = {"members": members, "mixture": result.mixture, "layers": result.layers}
        print_json({"settings": result.settings, "notes": result.notes, **more, "rows": result.rows})
        return
    print_part(recover_tables(result))
    if report is not None:
        print_part(f"report written to {report}")
    if out is not None:
        print_part(f"written to {out}")
    command = again("-o", "found.jsonl") if out is None else ("whence", "index", final, out, "-o", "INDEX")
    print_ending(recover_answer(result), *command)
