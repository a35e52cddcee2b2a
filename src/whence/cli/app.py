"""The command line: parse, call one library function, print.

Results go to stdout (with `--json` one document and nothing else), progress and messages to stderr. Exit code 0; 2 for
a user's mistake, with one clear message; 1 for a failure. Only names are imported here: torch comes with the verb.
"""

import io
import logging
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.exceptions import TyperException

from whence import __version__, catalogue
from whence.cli import ablation as cli_pool
from whence.cli import mixing as cli_mix
from whence.cli import recovery as cli_recover
from whence.cli import selection as cli_select
from whence.cli.console import Device, DeviceMap, Json, Tokenizer, Trust, complain, print_json, print_part, waiting
from whence.cli.training import CorpusPath, Model, train
from whence.errors import SettingError, WhenceError

STOPPED = 130
"""What the parser makes of Ctrl-C, as a shell does."""

app = typer.Typer(
    name="whence",
    help="Whence traces a language model back to its data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

IndexPath = Annotated[str, typer.Argument(metavar="INDEX", help="Directory of an index.")]
ModelPath = Annotated[str | None, typer.Option("--model", help="The model's directory, if it has moved since.")]
Projection = Annotated[
    str | None,
    typer.Option(
        help=f"How gradients are compressed: {', '.join(catalogue.PROJECTIONS)}. Unless given two_sided, but "
        "count_sketch with --view adam."
    ),
]
Width = Annotated[
    int | None,
    typer.Option(help="Side of two_sided (16: 256 numbers a layer), total of the others; its own default."),
]
CodecName = Annotated[str, typer.Option(help="How vectors are stored: float32, bfloat16, float16, int8, int4, onebit.")]
Layers = Annotated[
    str | None,
    typer.Option(help="Patterns of layers' names, with commas between: '*mlp*,lm_head'; '!*dt_proj' leaves out."),
]
Reduction = Annotated[str, typer.Option(help="Loss of an example: mean or sum over its supervised tokens.")]
Normalise = Annotated[str, typer.Option(help="layer: divide each layer's gradient by its norm, as RapidIn does; none.")]
View = Annotated[
    str,
    typer.Option(help="Of an example's gradient: sgd, as it is; adam, what Adam makes of it (needs optimizer files)."),
]
AdamMode = Annotated[str, typer.Option(help="torch: the step that AdamW takes; less: as LESS' released code has it.")]
ShuffleRounds = Annotated[int | None, typer.Option(help="RapidIn's lambda, of shuffle_sum; 20 unless given.")]
Seed = Annotated[int, typer.Option(help="Of the projection.")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest row in tokens; the model's context unless given.")]
BatchTokens = Annotated[
    int | None,
    typer.Option("--batch-tokens", help="Tokens of one pass, padding included; 4096 on a CPU, 16384 on a GPU."),
]
Dtype = Annotated[
    str | None, typer.Option(help="Load weights as float32, bfloat16 or float16; as stored unless given.")
]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")]


def main() -> None:
    """Run the command line and exit with its code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Handler()])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # corpora hold lone surrogates, and terminals may lack UTF-8
    try:
        code = app(prog_name="whence", standalone_mode=False)
    except WhenceError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing more to say
        sys.exit(0)
    except TyperException as error:  # a missing argument, an unknown flag
        if message := error.format_message():  # empty: the help was printed
            verb = getattr(getattr(error, "ctx", None), "command_path", "whence")
            complain(f"{message}{'' if message.endswith(('.', '?')) else '.'} See: {verb} --help")
        sys.exit(error.exit_code)
    if code == STOPPED:
        complain("stopped. What was finished is kept: the same command goes on from there.")
    sys.exit(code or 0)


class _Handler(RichHandler):
    """Log lines to stderr, without time or path."""

    def __init__(self):
        super().__init__(console=Console(stderr=True), show_time=False, show_path=False, show_level=True)


def _version(shown: bool) -> bool:
    if shown:
        sys.stdout.write(f"whence {__version__}\n")
        raise typer.Exit()
    return shown


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Directory for all that it makes.")] = "whence-demo",
    seed: Annotated[int, typer.Option(help="Of the chosen docstrings, the weights and the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a small model on Python's own docstrings, and ask which of them taught it each answer."""
    with waiting("Loading torch"):
        from whence.cli.demonstration import demo as run
    result = run(out, seed=seed, say=Console(stderr=as_json).print)
    if as_json:
        print_json(result)


app.command()(train)


@app.command()
def index(
    model: Model,
    corpus: CorpusPath,
    out: Annotated[str, typer.Option("-o", "--out", help="Directory of the index.")],
    projection: Projection = None,
    width: Width = None,
    codec: CodecName = "bfloat16",
    view: View = "sgd",
    adam_mode: AdamMode = "torch",
    checkpoints: Annotated[str, typer.Option(help="Of a Trainer's directory: all, or the last.")] = "last",
    layers: Layers = None,
    reduction: Reduction = "mean",
    normalise: Normalise = "none",
    shuffle_rounds: ShuffleRounds = None,
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    tokenizer: Tokenizer = None,
    trust_remote_code: Trust = False,
    gradient_checkpointing: Checkpointing = False,
    engine: Annotated[str, typer.Option(help="Where jobs run: local.")] = "local",
    workers: Annotated[int, typer.Option(help="Of the engine; local is one.")] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Remove the index that is there and start over.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a corpus' gradients into an index. Run again after a stop, it resumes."""
    if workers != 1:
        raise SettingError(f"--workers {workers}: --engine {engine} is one process; leave it out")
    with waiting("Loading torch"):
        from whence.indexing.build import index as build
    options = {"projection": projection, "width": width, "codec": codec, "view": view, "layers": layers}
    options |= {"normalise": normalise, "adam_mode": adam_mode, "shuffle_rounds": shuffle_rounds}
    options |= {"reduction": reduction, "seed": seed, "checkpoints": checkpoints, "max_tokens": max_tokens}
    options |= {"tokens_per_batch": batch_tokens, "dtype": dtype, "device": device, "device_map": device_map}
    options |= {"tokenizer": tokenizer, "trust_remote_code": trust_remote_code, "engine": engine}
    built = build(model, corpus, out, restart=restart, gradient_checkpointing=gradient_checkpointing, **options)
    _print_info(built.store.info(), as_json)


@app.command()
def trace(
    index: IndexPath,
    prompt: Annotated[str | None, typer.Option(help="What the model was asked.")] = None,
    completion: Annotated[str | None, typer.Option(help="What it said; without it, the model says it now.")] = None,
    queries: Annotated[str | None, typer.Option(help="In place of these: a file of prompts (and completions).")] = None,
    span: Annotated[str | None, typer.Option(help="Ask about this text of the completion alone.")] = None,
    span_tokens: Annotated[str | None, typer.Option(help="Or about its tokens FROM:TO, from 0.")] = None,
    contrast: Annotated[str | None, typer.Option(help="Why the completion, and not this one?")] = None,
    top: Annotated[int, typer.Option(help="Examples on each side.")] = 10,
    method: Annotated[str, typer.Option(help=f"How to score: {', '.join(catalogue.TRACE_METHODS)}.")] = "cosine",
    objective: Annotated[
        str, typer.Option(help="Of the query: loss, or the log-odds margin, for answers that the model is sure of.")
    ] = "loss",
    exact: Annotated[bool, typer.Option("--exact", help="Rank a short list by unprojected gradients.")] = False,
    shortlist: Annotated[int, typer.Option(help="Its length, on each side.")] = 100,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Influence of each training token on each token of the completion.")
    ] = False,
    basis: Annotated[
        str, typer.Option(help="Of a training token: position of its gradient, or its own loss (slower).")
    ] = "position",
    controls: Annotated[
        str | None, typer.Option(help="File of queries whose scores are the null; rows of the index unless given.")
    ] = None,
    specific: Annotated[
        bool, typer.Option("--specific", help="Rank by the score less the example's mean over control queries.")
    ] = False,
    null: Annotated[bool, typer.Option("--null/--no-null", help="Compare scores with those for controls.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer generated.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of a generated answer; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampled answers and drawn controls.")] = 0,
    model: ModelPath = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="Write rows to .jsonl, .csv or .parquet, or a report to .html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Which training examples, and which of their tokens, made the model say this?"""
    with waiting("Loading torch"):
        from whence.indexing.build import open_index
        from whence.reports.tables import check_ending, trace_tables, write_page, write_rows
        from whence.reports.trace_page import trace_page
        from whence.tracing.pipeline import trace as run
        from whence.tracing.queries import span_of
    is_page = out is not None and out.endswith(".html")
    if out is not None:
        check_ending(out, (".jsonl", ".csv", ".parquet", ".html"))
    options = {"top": top, "method": method, "objective": objective, "exact": exact, "shortlist": shortlist}
    options |= {"tokens": tokens, "basis": basis}
    options |= {"specific": specific, "seed": seed, "null": null, "controls": controls, "contrast": contrast}
    asked = span_of(span, span_tokens, "--span-tokens")
    with waiting("Tracing"):
        opened = open_index(
            index, model=model, tokenizer=tokenizer, device=device, device_map=device_map,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if is_page and method in catalogue.index_methods():  # a page shows tokens where there are any to show
            options["tokens"] |= opened.space.view == "sgd"
        found = run(
            opened, prompt, completion, queries=queries, span=asked,
            max_new_tokens=max_new_tokens, temperature=temperature, **options,
        )  # fmt: skip
    rows = [hit.as_row() for hit in found.hits]
    if out is not None:
        write_page(trace_page(found), out) if is_page else write_rows(rows, out)
    if as_json:
        answers = [vars(answer) | {"perplexity": answer.perplexity} for answer in found.answers]
        more = {"verdicts": found.verdicts, "overlaps": found.overlaps, "notes": found.notes}
        print_json({"answers": answers, "method": found.method, "needed_z": found.needed_z, **more, "rows": rows})
        return
    print_part(trace_tables(found))
    if out is not None:
        print_part(f"written to {out}")


@app.command()
def info(index: IndexPath, as_json: Json = False) -> None:
    """What an index holds."""
    from whence.indexing.store import Store

    _print_info(Store.open(index).info(), as_json)


@app.command()
def verify(
    index: IndexPath,
    repair: Annotated[bool, typer.Option("--repair", help="Recompute what is wrong, and only that.")] = False,
    model: ModelPath = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Check every file of an index against its checksum."""
    loading: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "device": device, "device_map": device_map}
    with waiting("Reading every file"):
        from whence.indexing.build import verify as check

        problems, notes = check(index, repair=repair, trust_remote_code=trust_remote_code, **loading)
        left = check(index)[0] if notes else problems
    if as_json:
        rows = [{"file": problem.file, "what": problem.what} for problem in problems]
        print_json({"rows": rows, "repairs": notes, "left": [problem.file for problem in left]})
    else:
        for problem in problems:
            print_part(f"{problem.file}: {problem.what}")
        for note in notes:
            print_part(note)
        if not problems:
            print_part("every file is as it was written")
        elif not repair and problems[0].file != "manifest.json":
            print_part(f"Mend it with: whence verify {index} --repair")
    if left:
        raise typer.Exit(1)


@app.command()
def append(
    index: IndexPath,
    corpus: Annotated[
        str | None,
        typer.Argument(metavar="CORPUS", help="jsonl, csv or Parquet, a directory of them, or a Hub data set."),
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="In place of a corpus: drop the rows of an append that was not finished.")
    ] = False,
    model: ModelPath = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Let more rows join a complete index."""
    with waiting("Loading torch"):
        from whence.indexing.build import append as run
    loading: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "device": device, "device_map": device_map}
    built = run(index, corpus, undo=undo, trust_remote_code=trust_remote_code, **loading)
    _print_info(built.store.info(), as_json)


@app.command()
def bench(
    model: Model,
    corpus: CorpusPath,
    projection: Projection = None,
    width: Width = None,
    codec: CodecName = "bfloat16",
    view: View = "sgd",
    adam_mode: AdamMode = "torch",
    layers: Layers = None,
    reduction: Reduction = "mean",
    normalise: Normalise = "none",
    shuffle_rounds: ShuffleRounds = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples a batch; as many as --batch-tokens hold, or 16 rows as they are.")
    ] = None,
    batch_tokens: BatchTokens = None,
    length: Annotated[int, typer.Option(help="Tokens an example; 0 takes the rows as they are.")] = 128,
    batches: Annotated[int, typer.Option(help="Timed in every way.")] = 8,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    tokenizer: Tokenizer = None,
    trust_remote_code: Trust = False,
    gradient_checkpointing: Checkpointing = False,
    as_json: Json = False,
) -> None:
    """Time index building against a training step of the same model on the same batches."""
    with waiting("Loading torch"):
        from whence.indexing.speed import bench as run
        from whence.reports.tables import bench_table
    options = {
        "projection": projection,
        "width": width,
        "codec": codec,
        "view": view,
        "adam_mode": adam_mode,
        "layers": layers,
        "reduction": reduction,
        "normalise": normalise,
        "shuffle_rounds": shuffle_rounds,
        "tokens_per_batch": batch_tokens,
    }
    options |= {
        "max_tokens": max_tokens,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "tokenizer": tokenizer,
    }
    options |= {"trust_remote_code": trust_remote_code, "gradient_checkpointing": gradient_checkpointing}
    with waiting("Timing"):
        result = run(model, corpus, batch_size=batch_size, length=length or None, batches=batches, **options)
    print_json(vars(result)) if as_json else print_part(bench_table(result))


app.command()(cli_select.select)
app.command()(cli_recover.recover)
cli_select.evaluate.command("join")(cli_pool.joined)
app.add_typer(cli_select.evaluate, name="evaluate")
app.add_typer(cli_mix.mix, name="mix")
app.add_typer(cli_pool.pool, name="pool")
app.command()(cli_pool.ablate)


def _print_info(info: dict[str, Any], as_json: bool) -> None:
    from whence.reports.tables import info_table

    if as_json:
        print_json(info)
        return
    print_part(info_table(info))
    if info["complete"]:
        print_part(f'Ask it: whence trace {info["path"]} --prompt "..."')
