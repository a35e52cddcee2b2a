"""What a training did at each step, so that it can be gone through again: `RUN/replay`.

    steps.parquet                   a row for each pass of a step: step, learning rate, row numbers
    state-00000050.safetensors      trained weights and moments after so many steps
    replay.json                     the optimizer's constants, the norm that gradients are clipped to, checksums

Row numbers count the rows that were trained on, in the corpus' order. While the training goes on its steps are in every
checkpoint (`replay_steps.parquet`), so that one that was stopped goes on with all of them.
"""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow
import pyarrow.parquet
import torch
from safetensors import safe_open
from torch import Tensor, nn

from whence.checksums import Written, digest
from whence.corpus.row_files import parquet_file
from whence.errors import ChecksumError, MissingLogError, ModelError, SettingError
from whence.models.weights import in_pieces
from whence.records import Between, Count, fitting, read_record
from whence.storage import FileEntry, Place
from whence.training.update_rules import SGD, AdamW, State, UpdateRule

FOLDER = "replay"
"""In a run's directory."""
RECORD, STEPS, IN_CHECKPOINT = "replay.json", "steps.parquet", "replay_steps.parquet"
VERSION = 1
_KNOWN = "whence"
PARTS = ("weights", "first", "second")
"""Parts of a state, in the names of its tensors."""
ALL_STATES = 2**30
"""Bytes up to which every state is stored."""
_DROPOUTS = re.compile(r"(attention_|attn_|hidden_|resid_|embd_|classifier_)?(p_)?dropout(_p|_prob|_rate)?|drop_path")


class Step(NamedTuple):
    """One step of the optimizer."""

    rate: float
    """Learning rate."""
    passes: tuple[tuple[int, ...], ...]
    """Row numbers of each pass."""

    @property
    def rows(self) -> list[int]:
        """Row numbers of all passes, in their order."""
        return [row for numbers in self.passes for row in numbers]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer's constants."""

    name: Literal["adamw", "sgd"]
    beta1: Annotated[float, Between(0.0, 1.0)] = 0.0
    beta2: Annotated[float, Between(0.0, 1.0)] = 0.0
    eps: float = 0.0
    clip: float | None = None
    """The norm that gradients are clipped to."""
    decays: dict[str, float] = field(default_factory=dict)
    """Weight decay by the weight's name; 0 for others."""

    @property
    def rule(self) -> UpdateRule:
        """How it steps."""
        if self.name == "sgd":
            return SGD(decays=self.decays)
        return AdamW(beta1=self.beta1, beta2=self.beta2, eps=self.eps, decays=self.decays)

    @staticmethod
    def of(optimizer: Any, weights: Mapping[str, Tensor], clip: float | None) -> "Optimizer":
        """Of torch's AdamW or plain SGD.

        Raises:
            SettingError: It is another, or does what a replay cannot follow.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        kinds = {"AdamW": "adamw", "SGD": "sgd"}
        name, groups = kinds.get(type(inner).__name__), inner.param_groups
        odd = [key for group in groups for key in ("amsgrad", "maximize", "momentum", "nesterov") if group.get(key)]
        if name is None or odd:
            raise SettingError(
                f"--replayable follows AdamW, and SGD without momentum; this optimizer is {type(inner).__name__}"
                f"{f' with {odd[0]}' if odd else ''}"
            )
        names = {id(weight): key for key, weight in weights.items()}
        decays = {names[id(w)]: float(group["weight_decay"]) for group in groups for w in group["params"]
                  if group["weight_decay"] and id(w) in names}  # fmt: skip
        if name == "sgd":
            return Optimizer(name="sgd", clip=clip, decays=decays)
        beta1, beta2 = groups[0]["betas"]
        return Optimizer(name="adamw", beta1=beta1, beta2=beta2, eps=groups[0]["eps"], clip=clip, decays=decays)


@dataclass(frozen=True, kw_only=True)
class _Record:
    format_version: Count
    optimizer: Optimizer
    steps: Count
    every: Count
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class _Known:
    """What a checkpoint says beside the steps."""

    optimizer: Optimizer | None
    weights: list[str]
    """Names of those that have gradients."""
    stored: list[FileEntry]


@dataclass(frozen=True)
class StepLog:
    """The steps of a finished training."""

    place: Place
    """`RUN/replay`."""
    optimizer: Optimizer
    steps: tuple[Step, ...]
    stored: tuple[int, ...]
    """Numbers of steps after which the state is stored, in order; the first is 0, the last that of the steps."""
    digest: str = ""
    """Of all that is stored."""

    @property
    def rule(self) -> UpdateRule:
        """How the optimizer stepped."""
        return self.optimizer.rule

    def state(self, after: int, device: torch.device | str = "cpu") -> State:
        """The state after so many steps, one of `stored`."""
        with safe_open(self.place.path(_state_file(after)), "pt", device=str(device)) as file:
            names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118
            parts = [{name.partition(".")[2]: file.get_tensor(name) for name in names}]
            for part in PARTS[1:]:
                every = {name.partition(".")[2]: file.get_tensor(name) for name in file.keys()  # noqa: SIM118
                         if name.startswith(f"{part}.")}  # fmt: skip
                parts.append({name: every[name] for name in parts[0] if name in every})
        if self.optimizer.name == "adamw" and not parts[1]:  # before the first step
            parts[1:] = [{name: torch.zeros_like(w) for name, w in parts[0].items()} for _ in PARTS[1:]]
        return State(*parts)


def open_log(run: str | Path) -> StepLog:
    """The steps of a run of `whence train --replayable`, whose files are all as they were written.

    Raises:
        MissingLogError: It has none.
        ChecksumError: A file is damaged or missing.
    """
    place = Place.at(Path(run) / FOLDER)
    if not place.exists(RECORD):
        raise MissingLogError.at(run)
    remedy = "Restore it from a copy, or train again with --replayable."
    record = read_record(_Record, place.read(RECORD), place.path(RECORD), remedy)
    if record.format_version != VERSION:
        raise SettingError(f"{place.path(RECORD)}: format {record.format_version}, and this Whence reads {VERSION}")
    for entry in record.files:
        place.check(entry["file"], Written(entry["bytes"], None, entry["xxh3"]), remedy)
    steps, _ = _steps_of(place.read(STEPS), place.path(STEPS))
    stored = sorted(number for entry in record.files if (number := _number_of(entry["file"])) is not None)
    if len(steps) != record.steps or stored[:1] != [0] or stored[-1] != len(steps):
        raise ChecksumError(f"{place.path(RECORD)} is not as Whence writes it: states or steps are missing. {remedy}")
    whole = digest([entry["xxh3"].encode() for entry in record.files])
    return StepLog(place, record.optimizer, tuple(steps), tuple(stored), whole)


@dataclass
class StepRecorder:
    """Follows a training, and keeps what a replay needs."""

    weights: Mapping[str, Tensor]
    """The trained weights by name, in the training model."""
    directory: Path
    """Of the run."""
    every: int
    """Steps between stored states."""
    clip: float | None
    """The norm that gradients are clipped to."""
    steps: list[Step] = field(default_factory=list)
    optimizer: Optimizer | None = None
    """Known from the first step on."""
    stored: list[FileEntry] = field(default_factory=list)
    """Files of states, as they were written."""

    def __post_init__(self):
        self._passes: list[tuple[int, ...]] = []
        self._place = Place.at(self.directory / FOLDER)

    def begin(self) -> None:
        """Store the weights before the first step."""
        self._store(0, State(dict(self.weights), {}, {}))

    def add_pass(self, rows: Tensor) -> None:
        """Note the rows [b] of a pass of the step that is about to be made."""
        self._passes.append(tuple(rows.tolist()))

    def step(self, optimizer: Any) -> None:
        """Note a step that is about to be made.

        Raises:
            SettingError: The optimizer does what a replay cannot follow.
        """
        reached = [name for name, weight in self.weights.items() if weight.grad is not None]
        if self.optimizer is None:
            self.weights = {name: self.weights[name] for name in reached}  # torch passes over the others
            self.optimizer = Optimizer.of(optimizer, self.weights, self.clip)
        elif len(reached) < len(self.weights):
            lost = next(name for name, weight in self.weights.items() if weight.grad is None)
            raise SettingError(
                f"--replayable: step {len(self.steps) + 1} has no gradient for {lost}, and others had one"
            )
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        if len(rates) > 1:
            raise SettingError(f"--replayable follows one learning rate, and this step has {len(rates)}")
        self.steps.append(Step(rates.pop(), tuple(self._passes)))
        self._passes.clear()

    def close(self, optimizer: Any, done: int, *, is_last: bool) -> None:
        """Store the state after `done` steps if it is its turn."""
        if done % self.every and not is_last:
            return
        states = getattr(optimizer, "optimizer", optimizer).state
        moments = [{name: states[w][key] for name, w in self.weights.items() if key in states.get(w, {})}
                   for key in ("exp_avg", "exp_avg_sq")]  # fmt: skip
        self._store(done, State(dict(self.weights), *moments))

    def save(self, checkpoint: Path) -> None:
        """Write the steps so far into a checkpoint."""
        data = _parquet(self.steps, _Known(self.optimizer, [*self.weights], self.stored))
        Place.at(checkpoint).write(IN_CHECKPOINT, [data], total=len(data))

    def load(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, if there is one.

        Raises:
            SettingError: The checkpoint does not say what was done before it.
            ChecksumError: A state from before it is damaged or missing.
        """
        if checkpoint is None:
            self.begin()
            return
        file = checkpoint / IN_CHECKPOINT
        done = int(checkpoint.name.rpartition("-")[2])
        steps, known = _steps_of(file.read_bytes(), str(file)) if file.exists() else ([], None)
        if len(steps) != done or known is None or known.optimizer is None:
            raise SettingError(f"{file} is not whole: the training cannot go on as a replayable one. Train anew.")
        for entry in known.stored:
            self._place.check(entry["file"], Written(entry["bytes"], None, entry["xxh3"]), "Train anew, elsewhere.")
        self.steps, self.optimizer, self.stored = steps, known.optimizer, known.stored
        self.weights = {name: self.weights[name] for name in known.weights}

    def write(self) -> None:
        """Write the log when the training is done."""
        assert self.optimizer is not None, "a training has a step"
        data = _parquet(self.steps)
        steps = self._place.write(STEPS, [data], total=len(data))
        files = [{"file": STEPS, "bytes": steps.bytes, "xxh3": steps.xxh3}, *self.stored]
        record = _Record(
            format_version=VERSION, optimizer=self.optimizer, steps=len(self.steps), every=self.every, files=()
        )
        self._place.write_document(RECORD, asdict(record) | {"files": files})

    def _store(self, number: int, state: State) -> None:
        tensors = {f"{part}.{name}": tensor.detach() for part, found in zip(PARTS, state, strict=True)
                   for name, tensor in found.items()}  # fmt: skip
        described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        pieces, total = in_pieces(described, lambda name: tensors[name].cpu())
        written = self._place.write(_state_file(number), pieces, total=total)
        assert written.xxh3 is not None, "what is written has a checksum"
        self.stored = [entry for entry in self.stored if entry["file"] != _state_file(number)]
        self.stored.append({"file": _state_file(number), "bytes": written.bytes, "xxh3": written.xxh3})


def default_interval(trained: int, steps: int) -> int:
    """Steps between stored states: 1 where all of them take `ALL_STATES` bytes at the most, else the steps' root.

    Args:
        trained: Bytes of the trained weights.
        steps: Number of steps.
    """
    return 1 if steps * len(PARTS) * trained <= ALL_STATES else math.ceil(math.sqrt(steps))


def states_stored(steps: int, every: int) -> list[int]:
    """Numbers of steps after which the state is stored."""
    return sorted({0, steps, *range(0, steps, every)})


def remove_dropout(net: nn.Module) -> list[str]:
    """Set every dropout of a network to 0; the names of those that were not."""
    changed = []
    for name, module in net.named_modules():
        for attribute, value in list(vars(module).items()):
            is_one = (attribute == "p" and "Dropout" in type(module).__name__) or _DROPOUTS.fullmatch(attribute)
            if is_one and isinstance(value, float) and value > 0:
                setattr(module, attribute, 0.0)
                changed.append(f"{name}.{attribute}")
    return changed


@torch.no_grad()
def require_no_chance(net: nn.Module, inputs: Mapping[str, Tensor], path: str) -> None:
    """Refuse a model that draws random numbers in training.

    Raises:
        ModelError: Its outputs in training are not those in evaluation.
    """
    was_training, state = net.training, torch.get_rng_state()
    try:
        one, other = (net.train(mode)(**inputs).logits for mode in (True, False))
    finally:
        net.train(was_training)
        torch.set_rng_state(state)
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
        raise ModelError(
            f"{path}: it computes something else in training than in evaluation, such as dropout that could not be "
            "turned off, so a training of it cannot be replayed"
        )


def _state_file(number: int) -> str:
    return f"state-{number:08d}.safetensors"


def _number_of(file: str) -> int | None:
    found = re.fullmatch(r"state-(\d{8,})\.safetensors", file)
    return int(found[1]) if found else None


def _parquet(steps: Sequence[Step], known: _Known | None = None) -> bytes:
    rows = [(number, step.rate, list(numbers)) for number, step in enumerate(steps) for numbers in step.passes]
    kinds = {"step": pyarrow.int64(), "rate": pyarrow.float64(), "rows": pyarrow.list_(pyarrow.int64())}
    columns = {name: pyarrow.array([row[place] for row in rows], kind)
               for place, (name, kind) in enumerate(kinds.items())}  # fmt: skip
    metadata = None if known is None else {_KNOWN: json.dumps(asdict(known))}
    sink = io.BytesIO()
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _steps_of(data: bytes, where: str) -> tuple[list[Step], _Known | None]:
    """Steps, and of a checkpoint what it says beside them."""
    try:
        table = parquet_file(pyarrow.BufferReader(data)).read(use_threads=False)
        columns, metadata = table.to_pydict(), table.schema.metadata or {}
        numbers, rates, rows = (columns[name] for name in ("step", "rate", "rows"))
        described = metadata.get(_KNOWN.encode())
        known = None if described is None else fitting(_Known, json.loads(described))
    except (pyarrow.ArrowException, KeyError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ChecksumError(f"{where} is not a table of steps ({reason}). Train anew.") from None
    steps: list[Step] = []
    for number, rate, passed in zip(numbers, rates, rows, strict=True):
        if number == len(steps):
            steps.append(Step(rate, ()))
        steps[-1] = Step(rate, (*steps[-1].passes, tuple(passed)))
    return steps, known
