"""The verbs `index`, `info`, `verify`, `append` and `bench`: parse, call one library function, print."""

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whence import catalogue
from whence.cli.banking import print_bank
from whence.cli.console import print_ending, print_json, print_part, quoted, waiting
from whence.cli.inputs import check_inputs, is_bank, is_curvature
from whence.cli.options import (
    CORPUS,
    BuildFlags,
    CorpusPath,
    DryRun,
    EngineFlags,
    IndexFlags,
    IndexPath,
    Json,
    LoadingFlags,
    Model,
    ModelPath,
    Preferences,
)
from whence.cli.plans import print_plan
from whence.cli.second_order import print_curvature
from whence.counts import number_of
from whence.errors import MissingIndexError

if TYPE_CHECKING:
    from whence.indexing.store import Store


def index(
    model: Model,
    corpus: CorpusPath,
    out: Annotated[str, typer.Option("-o", "--out", help="Directory of the index.")],
    settings: IndexFlags,
    loading: LoadingFlags,
    building: BuildFlags,
    running: EngineFlags,
    preferences: Preferences = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Turn a corpus' gradients into an index. Run again after a stop, it resumes."""
    options = _checked(model, corpus, out, settings, loading, building, preferences)
    options["engine"] = running.chosen()
    if dry_run:
        _plan(model, corpus, out, options, as_json)
        return
    with waiting("Loading torch"):
        from whence.indexing.build import index as build
    _print_info(build(model, corpus, out, **options).store, out, as_json)


def plan(
    model: Model,
    corpus: CorpusPath,
    settings: IndexFlags,
    loading: LoadingFlags,
    building: BuildFlags,
    running: EngineFlags,
    out: Annotated[str, typer.Option("-o", "--out", help="Directory of the index, for the disk it is on.")] = "INDEX",
    preferences: Preferences = None,
    as_json: Json = False,
) -> None:
    """What would an index take? Bytes a row, disk, memory and time, by a pilot. Nothing is written."""
    options = _checked(model, corpus, out, settings, loading, building, preferences)
    options["engine"] = running.chosen()
    _plan(model, corpus, out, options, as_json)


def _checked(
    model: str,
    corpus: str,
    out: str,
    settings: IndexFlags,
    loading: LoadingFlags,
    building: BuildFlags,
    preferences: str | None,
) -> dict[str, Any]:
    """The arguments of an index, of which all that can be is checked before torch is imported."""
    from whence.outputs import refuse_inputs
    from whence.sizes import size_of

    options: dict[str, Any] = vars(settings) | vars(loading) | vars(building) | {"preferences": preferences}
    if building.memory is not None:
        size_of(building.memory)
    _check_settings(settings)
    refuse_inputs(out, [model, corpus, loading.tokenizer], is_directory=True)
    check_inputs(models=[model], corpora=[corpus])
    return options


def _plan(model: str, corpus: str, out: str, options: dict[str, Any], as_json: bool) -> None:
    with waiting("Loading torch"):
        from whence.indexing.planning import plan as run
    with waiting("Timing a few passes"):
        result = run(model, corpus, out, **options)
    if ending := print_plan(result, as_json):
        print_ending(*ending)


def info(
    index: Annotated[
        str, typer.Argument(metavar="PATH", help="Directory of an index, of a bank of retrainings, or of curvature.")
    ],
    as_json: Json = False,
) -> None:
    """Show what an index, a bank of retrainings or curvature holds."""
    if is_bank(index):
        print_bank(index, as_json)
        return
    if is_curvature(index):
        with waiting("Loading torch"):
            from whence.second_order.store import open_curvature
        print_curvature(open_curvature(index), as_json)
        return
    check_inputs(index=index)
    from whence.indexing.store import Store

    _print_info(Store.open(index), index, as_json)


def verify(
    index: Annotated[str, typer.Argument(metavar="PATH", help="An index, pool, run, or work directory of Whence's.")],
    loading: LoadingFlags,
    running: EngineFlags,
    repair: Annotated[bool, typer.Option("--repair", help="Recompute what is wrong, and only that.")] = False,
    model: ModelPath = None,
    as_json: Json = False,
) -> None:
    """Check every file of an index, pool, run or work directory against its checksum."""
    from whence.storage import Place

    engine = running.chosen()
    if not Place.at(index).names():
        raise MissingIndexError.at(Place.at(index).root)
    with waiting("Reading every file"):
        from whence.indexing.build import verify as check
        from whence.indexing.manifest import MANIFEST

        if not Place.at(index).exists(MANIFEST):
            _print_verified(index, as_json)
            return
        problems, repairs = check(index, repair=repair, model=model, engine=engine, **vars(loading))
        remaining = check(index)[0] if repairs else problems
    if as_json:
        rows = [{"file": problem.file, "what": problem.what} for problem in problems]
        print_json({"rows": rows, "repairs": repairs, "left": [problem.file for problem in remaining]})
    else:
        for problem in problems:
            print_part(f"{problem.file}: {problem.what}")
        for repair_line in repairs:
            print_part(repair_line)
        if not remaining:
            mended = f"{number_of(len(problems), 'file')} of it is mended, and every" if problems else "Every"
            print_ending(f"{mended} file of the index is as it was written.", *_asking(index))
        else:
            about = f"{number_of(len(remaining), 'file')} of the index {'is' if len(remaining) == 1 else 'are'} wrong."
            forbidden = [problem.file for problem in remaining if problem.is_forbidden]
            if forbidden:
                names = " ".join(quoted(f"{index.rstrip('/')}/{file}") for file in forbidden[:3])
                about += f" Those that may not be read need a permission first: chmod u+r {names}"
                about += "." if len(forbidden) <= 3 else " and the others."
            is_mendable = not repair and len(forbidden) < len(remaining)
            if remaining[0].file == MANIFEST:  # without which nothing can be repaired
                print_ending(about, "whence", "index", "MODEL", "CORPUS", "-o", index, "--restart")
            else:
                print_ending(about, "whence", "verify", index, *(["--repair"] if is_mendable else []))
    if remaining:
        raise typer.Exit(1)


def _print_verified(path: str, as_json: bool) -> None:
    """Check a directory that is no index, and print what is wrong with it and how to mend that."""
    from whence.indexing.directories import remedy, verified

    result = verified(path)
    remedies = [remedy(path.rstrip("/"), problem) for problem in result.problems]
    if as_json:
        rows = [
            {"file": problem.file, "what": problem.what, "remedy": how}
            for problem, how in zip(result.problems, remedies, strict=True)
        ]
        facts = {"kind": result.kind, "checked": result.checked, "unchecked": result.unchecked}
        print_json({"rows": rows, "repairs": [], "left": [problem.file for problem in result.problems]} | facts)
    else:
        for problem, how in zip(result.problems, remedies, strict=True):
            print_part(f"{problem.file}: {problem.what}. Mend it: {how}")
        if result.unchecked:
            count, first = len(result.unchecked), result.unchecked[0]
            print_part(f"{number_of(count, 'file')} without a checksum, not checked; the first is {first}")
        if result.problems:
            wrong = number_of(len(result.problems), "file")
            answer = f"{wrong} of {result.checked} not as written; how to mend it stands above."
            print_ending(answer, "whence", "verify", path)
        else:
            next_words = [path if word == "PATH" else word for word in _NEXT.get(result.kind, _NEXT["a model"])]
            print_ending(
                f"This is {result.kind}, of which {number_of(result.checked, 'file is', 'files are')} as written.",
                *next_words,
            )
    if result.problems:
        raise typer.Exit(1)


def append(
    index: IndexPath,
    loading: LoadingFlags,
    running: EngineFlags,
    corpus: Annotated[str | None, typer.Argument(metavar="CORPUS", help=CORPUS)] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="In place of a corpus: drop the rows of an append that was not finished.")
    ] = False,
    model: ModelPath = None,
    preferences: Preferences = None,
    as_json: Json = False,
) -> None:
    """Let more rows join a complete index."""
    check_inputs(index=index, corpora=[corpus])
    options: dict[str, Any] = {"undo": undo, "model": model, "preferences": preferences, "engine": running.chosen()}
    with waiting("Loading torch"):
        from whence.indexing.build import append as run
    _print_info(run(index, corpus, **options, **vars(loading)).store, index, as_json)


def bench(
    model: Model,
    corpus: CorpusPath,
    settings: IndexFlags,
    loading: LoadingFlags,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples a batch; as many as --batch-tokens hold, or 16 rows as they are.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens an example; 0 takes the rows as they are.")] = 128,
    batches: Annotated[int, typer.Option(help="Batches that are timed in every way.")] = 8,
    as_json: Json = False,
) -> None:
    """Time index building against a training step of the same model on the same batches."""
    _check_settings(settings)
    check_inputs(models=[model], corpora=[corpus])
    with waiting("Loading torch"):
        from whence.indexing.speed import bench as run
        from whence.reports.index_tables import bench_answer, bench_table
    options: dict[str, Any] = vars(settings) | vars(loading)
    with waiting("Timing"):
        result = run(model, corpus, batch_size=batch_size, length=length or None, batches=batches, **options)
    if as_json:
        print_json(vars(result))
        return
    print_part(bench_table(result))
    print_ending(bench_answer(result), "whence", "index", model, corpus, "-o", "INDEX")


def _check_settings(settings: IndexFlags) -> None:
    """Refuse values that cannot be before torch is imported."""
    from whence.gradients.space import GradientSpace

    names = {field.name for field in fields(GradientSpace)}
    space = GradientSpace(**{name: value for name, value in vars(settings).items() if name in names})
    catalogue.projection_entry(space.sketch)
    if settings.codec is not None:
        catalogue.check_codec(settings.codec)


_NEXT = {
    "a pool": ("whence", "ablate", "PATH", "--eval", "HELDOUT.jsonl"),
    "a bank": ("whence", "evaluate", "lds", "PATH", "--methods", "bm25,random"),
    "curvature": ("whence", "trace", "INDEX", "--prompt", "TEXT", "--curvature", "PATH"),
    "a run": ("whence", "index", "PATH", "CORPUS", "-o", "INDEX"),
    "a model": ("whence", "index", "PATH", "CORPUS", "-o", "INDEX"),
    "recover's work": ("whence", "recover", "BASE", "FINAL", "CORPUS", "--work", "PATH"),
    "an evaluation": ("whence", "evaluate", "selection", "MODEL", "INDEX_OR_CORPUS", "--tasks", "FILE", "--graded",
                      "FILE", "--work", "PATH"),
}  # fmt: skip
"""What a directory that is as written can be used for, by `directories.KINDS`."""


def _print_info(store: "Store", path: str, as_json: bool) -> None:
    from whence.reports.index_tables import info_answer, info_table

    facts = store.info()
    if as_json:
        print_json(facts)
        return
    print_part(info_table(facts))
    if not facts["complete"]:
        print_ending(info_answer(facts), *_finishing(store, path))
    elif not facts["ok_rows"]:
        print_ending(info_answer(facts), "whence", "verify", path)
    else:
        print_ending(info_answer(facts), *_asking(path))


def _finishing(store: "Store", path: str) -> tuple[str, ...]:
    """The command that finishes an index."""
    joining = store.manifest.joining
    return (
        ("whence", "append", path, joining["name"]) if joining else ("whence", "index", "MODEL", "CORPUS", "-o", path)
    )


def _asking(path: str) -> tuple[str, ...]:
    """A trace of what the index' first row asks, or of how its text begins: a question that it can answer."""
    from whence.corpus.layouts import question_in
    from whence.indexing.store import Store

    store = Store.open(path)
    text = question_in(json.loads(store.read_rows([0])[0]["row"])) if store.rows else None
    words = (text or "").strip().split("\n")[0].split()[:10]
    return ("whence", "trace", path, "--prompt", " ".join(words) or "TEXT")
