"""The flags that several verbs have, each declared once: its name, its help text and its default."""

from dataclasses import dataclass
from typing import Annotated

import typer

from whence import catalogue
from whence.corpus.preferences import checked
from whence.errors import SettingError
from whence.runner.engines import LOCAL, Engine

CORPUS = "jsonl, csv or Parquet, a directory of them, or a Hub data set."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, to stdout.")]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Model directory, Trainer output directory, LoRA adapter, or Hub name."),
]
CorpusPath = Annotated[str, typer.Argument(metavar="CORPUS", help=CORPUS)]
IndexPath = Annotated[str, typer.Argument(metavar="INDEX", help="Directory of an index.")]
PoolPath = Annotated[str, typer.Argument(metavar="POOL", help="Directory that `whence pool train` wrote.")]
PoolCorpus = Annotated[str | None, typer.Option("--corpus", help="The pool's corpus, if it has moved since.")]
EvalFiles = Annotated[list[str], typer.Option("--eval", help="Held-out rows: a file, or a directory of files.")]
RowsFile = Annotated[str | None, typer.Option("-o", "--out", help="Write the rows to .jsonl, .csv or .parquet.")]
Report = Annotated[str | None, typer.Option(help="Write an HTML report.")]
WholeReport = Annotated[
    str | None, typer.Option("--report", help="Write an HTML report; or to .json all, for whence.open_result.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Overwrite a file that Whence did not write. An input is never overwritten.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what it would take (time, disk, memory), by a pilot; write nothing.")
]
ModelPath = Annotated[str | None, typer.Option("--model", help="The model's directory, if it has moved since.")]
Parent = Annotated[str | None, typer.Option(help="The model that --run was trained from, if it has moved since.")]
Tokenizer = Annotated[str | None, typer.Option(help="Where to find the tokenizer, if not with the model.")]
ChatTemplate = Annotated[
    str | None, typer.Option(metavar="FILE", help="Chat template to use in place of the tokenizer's own.")
]
Date = Annotated[
    str | None,
    typer.Option(metavar="YYYY-MM-DD", help="Day that a chat template with a date writes; the training's, else today."),
]
Supervise = Annotated[
    str | None,
    typer.Option(
        metavar="assistant|last|all",
        help="Which tokens of a row are trained on; as in the model's training by Whence, else the assistant's.",
    ),
]


def _known_preferences(preferences: str | None) -> str | None:
    """The flag's value.

    Raises:
        SettingError: There is no such choice.
    """
    checked(preferences)
    return preferences


Preferences = Annotated[
    str | None,
    typer.Option(
        metavar="chosen|contrast",
        callback=_known_preferences,
        help="What a row with a preferred and a rejected answer is: the one, or the two compared, as in DPO.",
    ),
]
NoPreferences = Annotated[str | None, typer.Option("--preferences", hidden=True)]
"""For verbs that read the preferred answer alone: they refuse anything else, in words."""


@dataclass(frozen=True, kw_only=True)
class LoadingFlags:
    """How a model is loaded: flags for `models.load_options.Loading`."""

    tokenizer: Tokenizer = None
    chat_template: ChatTemplate = None
    date: Date = None
    supervise: Supervise = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU where there is one.")] = None
    device_map: Annotated[str | None, typer.Option(help="auto spreads a large model over all devices.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a model repository run its own code.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class IndexFlags:
    """What decides the vectors of an index; names as in `IndexSettings` and `GradientSpace`."""

    projection: Annotated[
        str | None,
        typer.Option(
            help=f"How gradients are compressed: {', '.join(catalogue.PROJECTIONS)}. Unless given "
            f"{catalogue.default_projection('sgd')}, but {catalogue.default_projection('adam')} with --view adam."
        ),
    ] = None
    width: Annotated[
        int | None,
        typer.Option(
            help="Side of two_sided (16: 256 numbers a layer), total of the others; each has its own default, that of "
            "tensor_sketch and count_sketch by the model's size."
        ),
    ] = None
    codec: Annotated[
        str | None,
        typer.Option(
            help="How vectors are stored: float32, bfloat16, float16, int8, int4, onebit. Unless given onebit for "
            "tensor_sketch and count_sketch, bfloat16 for the others."
        ),
    ] = None
    view: Annotated[
        str,
        typer.Option(
            help="What an example's gradient is taken for: sgd, as it is; adam, what Adam makes of it (needs "
            "optimizer files)."
        ),
    ] = "sgd"
    adam_mode: Annotated[
        str, typer.Option(help="torch: the step that AdamW takes; less: as LESS' released code has it.")
    ] = "torch"
    layers: Annotated[
        str | None,
        typer.Option(help="Patterns of layers' names, with commas between: '*mlp*,lm_head'; '!*dt_proj' leaves out."),
    ] = None
    reduction: Annotated[str, typer.Option(help="Loss of an example: mean or sum over its supervised tokens.")] = "mean"
    normalise: Annotated[
        str, typer.Option(help="layer: divide each layer's gradient by its norm, as RapidIn does; none.")
    ] = "none"
    shuffle_rounds: Annotated[
        int | None, typer.Option(help="RapidIn's lambda, for --projection shuffle_sum; 20 unless given.")
    ] = None
    max_tokens: Annotated[int | None, typer.Option(help="Longest row in tokens; the model's context unless given.")] = (
        None
    )
    tokens_per_batch: Annotated[
        int | None,
        typer.Option("--batch-tokens", help="Tokens of one pass, padding included; 2048 on a CPU, 16384 on a GPU."),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the projection.")] = 0
    dtype: Annotated[
        str | None, typer.Option(help="Load weights as float32, bfloat16 or float16; as stored unless given.")
    ] = None
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Where jobs run."""

    engine: Annotated[str, typer.Option(help="local: in this process. ray: on workers.")] = "local"
    workers: Annotated[
        str, typer.Option(metavar="NUMBER", help="Of Ray's; auto: one a GPU, or one a core where there is none.")
    ] = "auto"
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Of a Ray cluster; else RAY_ADDRESS, or workers of this machine."),
    ] = None
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="Of each worker of Ray's; 1 where there are any.", show_default=False)
    ] = None

    def chosen(self, *, is_scan: bool = True) -> Engine:
        """The engine.

        Args:
            is_scan: Whether there is anything that workers could do.

        Raises:
            SettingError: No engine has what is asked, or there is nothing to do for its workers.
            MissingExtraError: Ray is not installed.
        """
        if not (self.workers == "auto" or self.workers.isdecimal()):
            raise SettingError(f"--workers {self.workers}: a number or auto is expected")
        number = None if self.workers == "auto" else int(self.workers)
        engine = Engine(self.engine, number, self.address, self.gpus_per_worker)
        if not (is_scan or engine.name == LOCAL):
            raise SettingError(f"--engine {self.engine}: workers scan an index, and there is none here; leave it out")
        return engine


@dataclass(frozen=True, kw_only=True)
class BuildFlags:
    """How an index is built: what `index` and `plan` take beside the settings of its vectors."""

    checkpoints: Annotated[
        str, typer.Option(help="Checkpoints to take from a Trainer's directory: all, or the last.")
    ] = "last"
    restart: Annotated[bool, typer.Option("--restart", help="Remove the index that is there and start over.")] = False
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The most memory to take, as 800M or 2G: sets the tokens of a pass; --batch-tokens at most.",
        ),
    ] = None


def listed(words: str | None) -> tuple[str, ...]:
    """Words with commas between.

    >>> listed("yes, no")
    ('yes', 'no')
    """
    return tuple(word.strip() for word in words.split(",")) if words else ()


def pairs(flag: str, texts: list[str] | None) -> dict[str, str]:
    """NAME=VALUE options as a dictionary.

    Raises:
        SettingError: One of them is not NAME=VALUE.
    """
    out = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise SettingError(f"{flag} {text}: NAME=VALUE is expected")
        out[name] = value
    return out


def numbers(flag: str, texts: list[str] | None) -> dict[str, float]:
    """NAME=NUMBER options as a dictionary; a name may hold `=`.

    Raises:
        SettingError: One of them is not NAME=NUMBER, or a name comes twice.
    """
    out: dict[str, float] = {}
    for text in texts or []:
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


def amounts(flag: str, texts: list[str] | None) -> dict[str, int | float]:
    """SOURCE=AMOUNT options as a dictionary: rows as whole numbers, shares with a point.

    Raises:
        SettingError: One of them is not SOURCE=AMOUNT.
    """
    out: dict[str, int | float] = {}
    for name, value in pairs(flag, texts).items():
        try:
            out[name] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            raise SettingError(f"{flag} {name}={value}: rows (300) or a share (0.3) is expected") from None
    return out


def files(flag: str, texts: list[str]) -> dict[str, str]:
    """[NAME=]FILE options as a dictionary; a file without a name is called `task`.

    Raises:
        SettingError: Two files have one name.
    """
    out: dict[str, str] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        name, file = (name, file) if equals else ("task", text)
        if name in out:
            raise SettingError(f"{flag}: two files for the task {name}; name them apart, as in a={out[name]}")
        out[name] = file
    return out
