"""The verbs `pool` and `ablate`: parse, call one library function, print."""

import json
import math
import shlex
import sys
from collections.abc import Mapping
from typing import Annotated

import typer

from whence.cli.console import print_ending, print_json, print_part, waiting
from whence.cli.groups import flattened, reads_rows
from whence.cli.inputs import check_inputs
from whence.cli.options import DryRun, EngineFlags, EvalFiles, Force, Json, PoolCorpus, PoolPath, WholeReport
from whence.cli.plans import print_plan
from whence.counts import number_of
from whence.errors import SettingError

pool = typer.Typer(help="One model for each partition of a corpus, from one parent; and their averages.")
Mixtures = Annotated[
    str | None,
    typer.Option(help="File of mixtures, partitions as columns; unless given each alone, all pairs, all together."),
]
Scale = Annotated[float, typer.Option(help="Factor of the members' moves away from the parent (task arithmetic).")]
Method = Annotated[str, typer.Option(help="How to average: mean, or regmean, by what goes into linear layers.")]
Alpha = Annotated[float, typer.Option(help="RegMean's alpha, from 0 (by single features) to 1 (by all pairs).")]


@pool.command()
@reads_rows
@flattened
def train(
    parent: Annotated[str, typer.Argument(metavar="PARENT", help="theta_0: a directory or a Hub name.")],
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Rows with the column to partition by.")],
    out: Annotated[str, typer.Option("-o", "--out", help="The pool's directory; the same command goes on from there.")],
    running: EngineFlags,
    by: Annotated[str, typer.Option(help="Column that partitions the corpus; file: its files.")] = "source",
    unit_tokens: Annotated[int | None, typer.Option(help="Cut partitions into members of so many tokens.")] = None,
    tokens: Annotated[int, typer.Option(help="Token budget of a member; small partitions are read again.")] = 100_000,
    steps: Annotated[int, typer.Option(help="Steps of a member's training.")] = 48,
    lr: Annotated[float, typer.Option(help="Learning rate, constant after the warm-up.")] = 3e-4,
    warmup_steps: Annotated[int, typer.Option(help="Steps over which the rate rises.")] = 10,
    max_tokens: Annotated[int, typer.Option(help="Longest row; longer texts are cut into several.")] = 128,
    lora_rank: Annotated[int | None, typer.Option(help="Train adapters of this rank.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the stored delta: bfloat16, or float32, exact.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Seed of rows, order and adapters.")] = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a model for each partition that has none in the pool yet."""
    from whence.outputs import refuse_inputs

    refuse_inputs(out, [parent, corpus], is_directory=True)
    check_inputs(models=[parent], corpora=[corpus])
    settings = {
        "by": by, "unit_tokens": unit_tokens, "tokens": tokens, "steps": steps, "lr": lr, "warmup_steps": warmup_steps,
        "max_tokens": max_tokens, "lora_rank": lora_rank, "dtype": dtype, "seed": seed,
    }  # fmt: skip
    engine = running.chosen()
    if dry_run:
        with waiting("Loading torch"):
            from whence.ablation.dry_run import plan_pool
        with waiting("Timing a few steps"):
            planned = plan_pool(parent, corpus, out, **settings)
        if ending := print_plan(planned, as_json):
            print_ending(*ending)
        return
    with waiting("Loading torch"):
        from whence.ablation.member_training import train_pool
    result = train_pool(parent, corpus, out, engine=engine, progress=not as_json, **settings)
    members = [dict(member.__dict__) for member in result.members.values()]
    if as_json:
        print_json({"pool": out, "parent": result.parent, "recipe": dict(result.recipe), "rows": members})
        return
    for member in members:
        loss = "" if member["loss"] is None else f", last loss {member['loss']:.2f}"
        print_part(
            f"{member['partition']}: {number_of(member['rows'], 'row')}, {number_of(member['tokens'], 'token')}{loss}"
        )
    answer = f"The pool has {number_of(len(members), 'member')}, each a model of one partition of {corpus}."
    print_ending(answer, "whence", "ablate", out, "--eval", "HELDOUT.jsonl")


@pool.command()
def merge(
    path: PoolPath,
    mixture: Annotated[
        str, typer.Option(help="Weights that sum to 1, as a=0.5,b=0.5; or micro, by size; or macro, all alike.")
    ],
    out: Annotated[str, typer.Option("-o", "--out", help="Directory of the merged model.")],
    scale: Scale = 1.0,
    method: Method = "mean",
    alpha: Alpha = 0.1,
    corpus: PoolCorpus = None,
    yaml: Annotated[str | None, typer.Option(help="Write the mixture as a mergekit recipe, too.")] = None,
    force: Force = False,
) -> None:
    """Write a mixture's average as a model that `from_pretrained` loads."""
    from whence.reports.existing_files import Output, check_outputs
    from whence.reports.files import write_page

    weights = parsed_mixture(mixture) if "=" in mixture else None
    if yaml is not None and method != "mean":
        raise SettingError(f"--yaml: mergekit has no {method}; leave one of the two out")
    check_outputs([Output("--yaml", yaml, None)], rows=[corpus], others=[path], force=force)
    check_inputs(pool=path, corpora=[corpus])
    with waiting("Loading torch"):
        from whence.ablation.gram_matrices import averaging
        from whence.ablation.merged_files import mergekit_yaml, write_merged
        from whence.ablation.mixtures import checked_mixture, named_mixture
        from whence.ablation.pool import open_pool
    opened = open_pool(path)
    weights = checked_mixture(named_mixture(opened, mixture) if weights is None else weights, opened.members)
    regmean = averaging(opened, method, alpha=alpha, corpus=corpus)
    directory = write_merged(opened, weights, out, scale=scale, regmean=regmean, force=force)
    if yaml is not None:
        write_page(mergekit_yaml(opened, weights, scale=scale), yaml)
        print_part(f"recipe written to {yaml}; it reads each member from a directory: whence pool merge {path} "
                   "--mixture NAME=1 -o members/NAME")  # fmt: skip
    answer = f"The average of {number_of(len(weights), 'member')} is a model in {directory}."
    print_ending(answer, "whence", "train", out, "CORPUS", "-o", "RUN")


@pool.command()
@reads_rows
def grams(
    path: PoolPath,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens read of each member; 16,384 unless the pool has another number.")
    ] = None,
    corpus: PoolCorpus = None,
) -> None:
    """Collect what goes into members' linear layers, for --method regmean, which else does it when first used."""
    check_inputs(pool=path, corpora=[corpus])
    with waiting("Loading torch"):
        from whence.ablation.gram_matrices import collect, open_grams
        from whence.ablation.pool import open_pool
    opened = open_pool(path)
    collect(opened, corpus, tokens=tokens)
    answer = f"Inputs of {number_of(len(open_grams(opened).grams), 'member')} are in {path}/grams."
    print_ending(answer, "whence", "ablate", path, "--eval", "HELDOUT.jsonl", "--method", "regmean")


@pool.command()
def verify(path: PoolPath) -> None:
    """Read every member's file again and compare its checksum, and the files of its input matrices."""
    check_inputs(pool=path)
    with waiting("Loading torch"):
        from whence.ablation.gram_matrices import verify_grams
        from whence.ablation.pool import open_pool
    opened = open_pool(path)
    opened.verify()
    verify_grams(opened)
    answer = f"Checked {number_of(len(opened.members), 'member')}: every file is as it was written."
    print_ending(answer, "whence", "ablate", path, "--eval", "HELDOUT.jsonl")


def ablate(
    path: PoolPath,
    evaluated: EvalFiles,
    mixtures: Mixtures = None,
    truth: Annotated[
        bool, typer.Option("--truth", help="Train every mixture for real, and tell how proxies rank.")
    ] = False,
    corpus: PoolCorpus = None,
    scale: Scale = 1.0,
    method: Method = "mean",
    alpha: Alpha = 0.1,
    max_tokens: Annotated[int | None, typer.Option(help="Windows of evaluation; the members' longest row.")] = None,
    bits: Annotated[bool, typer.Option("--bits", help="Show bits per byte.")] = False,
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="Write a row each mixture and set, which `mix law` reads.")
    ] = None,
    report: WholeReport = None,
    seed: Annotated[int, typer.Option(help="Seed of intervals.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """What would another mixture of data have given? Losses of averages, none of them trained."""
    from whence.reports.existing_files import REPORT_ENDINGS, Output, check_outputs
    from whence.reports.files import write_rows

    outputs = [Output("-o", out), Output("--report", report, REPORT_ENDINGS)]
    check_outputs(outputs, rows=[*evaluated, mixtures, corpus], others=[path], force=force)
    check_inputs(pool=path, corpora=[*evaluated, mixtures, corpus])
    with waiting("Loading torch"):
        from whence.ablation.pipeline import ablate as run
        from whence.reports.ablate_page import ablate_page
        from whence.reports.ablate_tables import ablate_answer, ablate_tables
        from whence.reports.saved_results import write_report
    result = run(path, evaluated, mixtures=mixtures, truth=truth, corpus=corpus, scale=scale, method=method,
                alpha=alpha, max_tokens=max_tokens, seed=seed, progress=not as_json)  # fmt: skip
    rows = result.rows()
    if out is not None:
        write_rows(rows, out)
    if report is not None:
        write_report(result, report, lambda: ablate_page(result, shlex.join(["whence", *sys.argv[1:]]), bits=bits))
    if as_json:
        agreements = {
            name: {
                group: {proxy: marks.row() for proxy, marks in by_proxy.items()} for group, by_proxy in groups.items()
            }
            for name, groups in result.agreements.items()
        }
        print_json({"rows": rows, "agreements": agreements, "cost": result.cost, "notes": result.notes})
        return
    print_part(ablate_tables(result, bits=bits))
    if report is not None:
        print_part(f"report written to {report}")
    if out is not None:
        print_part(f"written to {out}")
    best = next(iter(result.gained("truth") or result.gained()))
    weights = next(candidate.weights for candidate in result.candidates if candidate.name == best)
    how = (*(("--scale", scale) if scale != 1 else ()), *(("--method", method) if method != "mean" else ()))
    print_ending(
        ablate_answer(result),
        "whence",
        "pool",
        "merge",
        path,
        "--mixture",
        mixture_words(weights),
        *how,
        "-o",
        "MERGED",
    )


def mixture_words(mixture: Mapping[str, float]) -> str:
    """Weights as `--mixture` takes them, rounded.

    >>> mixture_words({"a": 1 / 3, "b": 2 / 3})
    'a=0.33333,b=0.66667'
    """
    return ",".join(f"{name}={weight:.5g}" for name, weight in mixture.items())


def parsed_mixture(text: str) -> dict[str, float]:
    """Weights from the command line.

    >>> parsed_mixture("a=0.5, b=0.5")
    {'a': 0.5, 'b': 0.5}
    """
    mixture: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = part.strip().rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not sign or not name or not math.isfinite(weight) or name in mixture:
            raise SettingError(f"--mixture {json.dumps(text)}: {part.strip()!r} is not NAME=WEIGHT, each name once")
        mixture[name] = weight
    return mixture
