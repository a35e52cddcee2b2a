"""The verb `curvature`: parse, call one library function, print."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from whence.cli.console import print_ending, print_json, print_part, waiting
from whence.cli.inputs import check_inputs
from whence.cli.options import DryRun, IndexPath, Json, LoadingFlags, ModelPath
from whence.cli.plans import print_plan
from whence.errors import UnknownNameError

if TYPE_CHECKING:
    from whence.second_order.store import CurvatureStore

KINDS = ("ekfac", "kfac")


def curvature(
    index: IndexPath,
    loading: LoadingFlags,
    out: Annotated[str, typer.Option("-o", "--out", help="Directory; the same command goes on from there.")],
    kind: Annotated[str, typer.Option(help="ekfac: two passes over the rows; kfac: one, and coarser.")] = "ekfac",
    rows: Annotated[
        int | None,
        typer.Option(
            help="The most rows to measure; of more, so many are drawn.",
            show_default="24 tokens for each input of the widest layer",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Patterns of layers' names, as of index; those of the index unless given.")
    ] = None,
    empirical: Annotated[
        bool, typer.Option("--empirical", help="Take the rows' own answers, in place of ones that the model draws.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of drawn answers and rows.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Remove what is there, and begin anew.")] = False,
    model: ModelPath = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure the curvature of the loss over an index' rows, for --method ekfac."""
    from whence.outputs import refuse_inputs

    if kind not in KINDS:
        raise UnknownNameError(f"--kind {kind}: there is no such kind. Known: {', '.join(KINDS)}")
    refuse_inputs(out, [index, model, loading.tokenizer], is_directory=True)
    check_inputs(index=index, models=[model])
    options: dict[str, Any] = {"kind": kind, "rows": rows, "layers": layers, "empirical": empirical, "seed": seed,
                               "restart": restart, "model": model, **vars(loading)}  # fmt: skip
    if dry_run:
        with waiting("Loading torch"):
            from whence.second_order.dry_run import plan_curvature
        with waiting("Timing a few passes"):
            planned = plan_curvature(index, out, **options)
        if ending := print_plan(planned, as_json):
            print_ending(*ending)
        return
    with waiting("Loading torch"):
        from whence.second_order.pipeline import curvature as measure
    print_curvature(measure(index, out, progress=not as_json, **options), as_json)


def print_curvature(store: "CurvatureStore", as_json: bool) -> None:
    """Print what a directory with curvature holds, as `info` does."""
    from whence.reports.curvature_tables import curvature_answer, curvature_facts, curvature_table

    facts = curvature_facts(store)
    if as_json:
        print_json(facts)
        return
    print_part(curvature_table(facts))
    command = ("whence", "trace", store.measured.index, "--prompt", "TEXT")
    print_ending(curvature_answer(facts), *command, "--curvature", store.place.root)
