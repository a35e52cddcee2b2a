"""The verb `train`: parse, call one library function, print."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from whence.cli.console import print_ending, print_json, print_part, waiting
from whence.cli.inputs import check_inputs
from whence.cli.options import (
    ChatTemplate,
    CorpusPath,
    Date,
    DryRun,
    Json,
    Model,
    NoPreferences,
    Supervise,
    Tokenizer,
    pairs,
)
from whence.cli.plans import print_plan
from whence.corpus.preferences import refuse_contrast
from whence.counts import number_of


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """How to train; names as in `TrainSettings`. None leaves the word to the preset, or to the settings' default."""

    lora_rank: Annotated[int | None, typer.Option(help="Train adapters of this rank; all weights unless given.")] = None
    lora_alpha: Annotated[int | None, typer.Option(help="Adapters' scale times their rank; twice the rank.")] = None
    lora_dropout: Annotated[
        float | None, typer.Option(help="Share of an adapter's inputs dropped in training.", show_default="0")
    ] = None
    lora_targets: Annotated[
        str | None,
        typer.Option(help="Layers that get an adapter, such as q_proj,v_proj; all linear ones of the blocks."),
    ] = None
    epochs: Annotated[float | None, typer.Option(help="Passes over the corpus.", show_default="4")] = None
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="2e-05")] = None
    fraction: Annotated[float | None, typer.Option(help="Share of the corpus, chosen at random.", show_default="1")] = (
        None
    )
    max_steps: Annotated[int | None, typer.Option(help="Number of steps, in place of epochs.")] = None
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest row in tokens, at most the model's context.", show_default="2048")
    ] = None
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.", show_default="16")] = None
    micro_batch: Annotated[
        int | None, typer.Option(help="Rows a pass, of which a step adds up several; all of the step's.")
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(help="Schedule of the learning rate: linear, cosine, constant, ...", show_default="linear"),
    ] = None
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps over which the rate rises from 0.", show_default="0.03")
    ] = None
    weight_decay: Annotated[
        float | None, typer.Option(help="Share of a weight lost a step, for each unit of rate.", show_default="0")
    ] = None
    order: Annotated[
        str | None,
        typer.Option(
            help="length: rows of like length share a batch. random: a Trainer's own order.", show_default="length"
        ),
    ] = None
    optimizer: Annotated[str | None, typer.Option(help="adamw, or sgd without momentum.", show_default="adamw")] = None
    checkpoints: Annotated[
        int | None, typer.Option(help="Checkpoints to keep, evenly spaced; one an epoch unless given.")
    ] = None
    tokenizer: Tokenizer = None
    chat_template: ChatTemplate = None
    supervise: Supervise = None
    date: Date = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of the chosen rows, their order, and dropout.", show_default="0")
    ] = None
    in_run: Annotated[
        str | None,
        typer.Option(metavar="VALIDATION", help="Score each row by what training on it did to these rows' loss."),
    ] = None
    in_run_every: Annotated[
        int | None, typer.Option(help="Steps for which one draw of validation rows serves.", show_default="10")
    ] = None
    in_run_order: Annotated[
        int | None, typer.Option(help="Order of the expansion: 1, or 2 at several times the cost.", show_default="1")
    ] = None
    in_run_rows: Annotated[int | None, typer.Option(help="Validation rows of a draw.", show_default="16")] = None
    replayable: Annotated[
        bool | None,
        typer.Option("--replayable", help="Keep what replay needs: trace and select by --method replay."),
    ] = None
    replay_every: Annotated[
        int | None, typer.Option(help="Steps between states that are kept for it.", show_default="by size")
    ] = None
    mix: Annotated[
        str | None, typer.Option(help="online: each step's rows are of one domain, drawn by the losses so far.")
    ] = None
    by: Annotated[str | None, typer.Option(help="Column that says a row's domain; source unless given.")] = None
    mix_set: Annotated[
        list[str] | None, typer.Option("--mix-set", metavar="NAME=VALUE", help="An option of the mixer. Repeat it.")
    ] = None


def train(
    model: Model,
    corpus: CorpusPath,
    out: Annotated[str, typer.Option("-o", "--out", help="Directory of the run.")],
    settings: TrainFlags,
    preset: Annotated[
        str | None, typer.Option(help="A recipe, whose settings hold where a flag does not say otherwise: less.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="RUN", help="Refuse to be another training than this Trainer's run was.")
    ] = None,
    preferences: NoPreferences = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model, keeping what attribution needs. Run again after a stop, it goes on."""
    from whence.outputs import refuse_inputs
    from whence.training.recipe import settings_of

    refuse_contrast(
        preferences,
        "training on it is DPO, and train fine-tunes on the chosen answers. Train with TRL's DPOTrainer, and index its "
        "output with this flag.",
    )
    options = vars(settings) | {"mix_set": pairs("--mix-set", settings.mix_set) or None}
    options = {name: value for name, value in options.items() if value is not None}
    settings_of(preset, options)
    refuse_inputs(out, [model, corpus, settings.in_run, settings.tokenizer, like], is_directory=True)
    check_inputs(models=[model, like], corpora=[corpus, settings.in_run])
    if dry_run:
        with waiting("Loading torch"):
            from whence.training.dry_run import plan_training
        with waiting("Timing a few steps"):
            planned = plan_training(model, corpus, out, preset=preset, **options)
        if ending := print_plan(planned, as_json):
            print_ending(*ending)
        return
    with waiting("Loading torch"):
        from whence.training.trainer import train as run
    start = time.perf_counter()
    path = run(model, corpus, out, preset=preset, like=like, progress=not as_json, **options)
    seconds = time.perf_counter() - start
    in_run = _in_run(path) if settings.in_run is not None else None
    if as_json:
        print_json({"run": str(path)} | ({} if in_run is None else {"in_run": in_run}))
        return
    if in_run is not None:
        for line in _in_run_lines(in_run):
            print_part(line)
    if like is not None:
        print_part(_alike(path))
    print_ending(f"{_training(path)}; this took {seconds:,.0f} s.", "whence", "index", out, corpus, "-o", "INDEX")


def _training(run: Path) -> str:
    """What a run was trained on, in how many steps, and what that did to its loss."""
    from whence.models.runs import open_run
    from whence.training.resuming import RECORD

    record, last = json.loads((run / RECORD).read_text()), open_run(run).checkpoints[-1]
    state = json.loads((Path(last.path) / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state.get("log_history", []) if "loss" in entry]
    some = max(1, len(losses) // 10)
    first, final = (math.fsum(part) / some if losses else math.nan for part in (losses[:some], losses[-some:]))
    few = "first and last steps" if some == 1 else "first and last tenth of the steps"
    return (
        f"Trained on {number_of(record['rows'], 'row')} in {number_of(last.step or 0, 'step')} of "
        f"{record['batch_size']:,}: the loss went from {first:.3f} to {final:.3f} nats a token ({few})"
    )


def _alike(run: Path) -> str:
    """How far it is the training that it was to be like."""
    from whence.training.likeness import FILE

    found = json.loads((run / FILE).read_text())
    return (
        f"The training of {found['like']}: the cosine of the two weight changes is {found['cosine']:.5f}, and the "
        f"weights differ by {found['difference']:.1e} of its change."
    )


def _in_run(run: Path) -> dict[str, Any]:
    """Where a run's in-run scores are, and how they were measured."""
    from whence.training.in_run import SCORES, SETTINGS

    return {"scores": str(run / SCORES), **json.loads((run / SETTINGS).read_text())}


def _in_run_lines(scores: dict[str, Any]) -> Iterator[str]:
    """What they say, in sentences."""
    lengths = scores["relative_step"]
    yield (
        f"In-run scores of {number_of(scores['trained_rows'], 'row')} are in {scores['scores']}; larger is more "
        "helpful. A step "
        f"was {lengths['median']:.2g} of the weights' length (median; at most {lengths['largest']:.2g}): they hold for "
        "small steps."
    )
    if scores["impossible_steps"]:
        yield (
            f"Of {scores['impossible_steps']:,} of {scores['steps']:,} steps the scores add up to more than the whole "
            "validation loss: these steps were too large for them. Try a lower --lr, or a longer warm-up."
        )
