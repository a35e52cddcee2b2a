"""Gram matrices of the inputs of members' linear layers, by which RegMean averages.

    G_u = X_u^T X_u / tokens    X_u [tokens, i]: a layer's inputs under the member's own weights, over the real tokens
                                (no padding) of the first rows that it was trained on; summed in fp32

    POOL/grams/000.safetensors  member 000: a matrix for each distinct input
    POOL/grams/000.json         written after it: member, tokens, checksum, and which parameter reads which input

Modules that read one tensor (q, k and v; gate and up) share a matrix; a pass over one short sequence shows which do.
Weights that are stored as [i o], as `Conv1D`'s are, are listed. Embeddings, a head tied to one, norms, biases, experts
fused into one parameter, and layers that are not called on every token have no matrix, and are averaged by the mean. A
pool of adapters has the matrices of its base's layers.

Cost: a forward pass over `tokens` tokens a member, with i^2 products a token and input. In memory, while collecting,
and on disk: 4 i^2 bytes an input, 16 GB for a member of 7B parameters. Read one matrix at a time, from a mapped file.

Source: Jin et al. 2023, https://arxiv.org/abs/2212.09849; its released code counts padding too, and each module alone.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float32
from torch import Tensor, nn

from whence import runner
from whence.ablation.averages import ALPHA, RegMean
from whence.ablation.member_training import pool_partitions, recipe_of
from whence.ablation.mixed_model import MixedModel, mixed_model, placed_sources
from whence.ablation.pool import Member, Pool
from whence.corpus.layouts import Row
from whence.corpus.partitions import Partition
from whence.corpus.reading import Corpus
from whence.corpus.tokens import Batch, Encoded, encode
from whence.errors import ChecksumError, ManifestMismatchError, MissingIndexError, SettingError
from whence.gradients.forward_passes import batches
from whence.models.loading import LoadedModel, layer_shape
from whence.models.weights import Weights, in_pieces
from whence.opened_tensors import opened_tensors
from whence.records import Count, Digest, FastDigest, read_record
from whence.turns import one_at_a_time

logger = logging.getLogger(__name__)

METHODS = ("mean", "regmean")
GRAM_TOKENS = 16_384
"""Tokens to read of each member, by default."""
_COLLECT = "Remove the file, and collect it again with: whence pool grams {pool}"
HEAD_POSITIONS = 256
"""Positions of the output head at a time: its logits are as wide as the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Description of a file of matrices, stored beside it."""

    member: Digest
    """Checksum of the member under whose weights it was collected."""
    tokens: Count
    """Tokens that were requested."""
    counted: Count
    """Tokens that were read, in whole rows."""
    sha256: Digest
    bytes: Count
    xxh3: FastDigest | None = None
    """XXH3-128; None where an older Whence wrote it, and `sha256` is checked."""
    file: str | None = None
    """The file that it describes; None where an older Whence wrote it."""
    inputs: Mapping[str, str]
    """Name of each parameter's matrix."""
    transposed: list[str]
    """Parameters stored as [i o]."""


@dataclass(frozen=True)
class StoredGrams(Mapping[str, Tensor]):
    """A member's matrices by parameter, each read when it is used."""

    open: Callable[[], Any]
    """Opens their file."""
    inputs: Mapping[str, str]

    def __getitem__(self, parameter: str) -> Float32[Tensor, "i i"]:
        with self.open() as opened:
            return opened.get_tensor(self.inputs[parameter])

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.inputs

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)


def averaging(
    pool: Pool,
    method: str,
    *,
    alpha: float = ALPHA,
    corpus: str | Path | Corpus | Iterable[Row] | None = None,
    progress: runner.ProgressOption = True,
) -> RegMean | None:
    """RegMean for a pool, its matrices collected if they are not there yet; None for the mean.

    Args:
        pool: The pool whose members are averaged.
        method: One of `METHODS`.
        alpha: See `RegMean`.
        corpus: Corpus that the pool was trained on; None: the address that the pool stores.
        progress: Show a bar on stderr.

    Raises:
        SettingError: The method is unknown, alpha is out of range, or the corpus is not there.
    """
    if method not in METHODS:
        raise SettingError(f"--method {method}: choose one of {', '.join(METHODS)}")
    if method == "mean":
        return None
    RegMean(grams={}, alpha=alpha)  # refuses a wrong alpha before anything is collected
    collect(pool, corpus, progress=progress)
    return open_grams(pool, alpha=alpha)


def open_grams(pool: Pool, *, alpha: float = ALPHA) -> RegMean:
    """RegMean over a pool's members.

    Raises:
        MissingIndexError: A member has no matrices.
        ManifestMismatchError: A member was trained again since, or members differ in the tokens that were requested.
        ChecksumError: A file of matrices is damaged.
    """
    remedy = f"Collect them with: whence pool grams {pool.place.root}"
    records: dict[str, Record] = {}
    for partition, member in pool.members.items():
        record = _record(pool, member)
        if record is None:
            raise MissingIndexError(f"{pool.place.root}: the member {partition} has no matrices of inputs. {remedy}")
        if record.member != member.sha256:
            raise ManifestMismatchError(
                f"{pool.place.path(_file(member))}: collected under other weights than the member {partition} has "
                f"now. {remedy}"
            )
        pool.place.check(_file(member), record, _COLLECT.format(pool=pool.place.root))
        records[partition] = record
    if len(lengths := {record.tokens for record in records.values()}) > 1:
        listed = ", ".join(map(str, sorted(lengths)))
        raise ManifestMismatchError(f"{pool.place.root}: matrices of {listed} tokens, which do not compare. {remedy}")
    remedy = _COLLECT.format(pool=pool.place.root)
    files = {partition: partial(opened_tensors, pool.place, _file(pool.members[partition]), record, remedy)
             for partition, record in records.items()}  # fmt: skip
    return RegMean(
        grams={partition: StoredGrams(files[partition], record.inputs) for partition, record in records.items()},
        transposed=frozenset(name for record in records.values() for name in record.transposed),
        alpha=alpha,
        digests={partition: record.sha256 for partition, record in records.items()},
    )


def verify_grams(pool: Pool) -> int:
    """Read every file of matrices again, and count them.

    Raises:
        ChecksumError: One is not as it was written.
    """
    count = 0
    for member in pool.members.values():
        if (record := _record(pool, member)) is None:
            continue
        count += 1
        if (what := pool.place.defect(_file(member), record)) is not None:
            remedy = _COLLECT.format(pool=pool.place.root)
            raise ChecksumError(f"{pool.place.path(_file(member))} is not what was written ({what}). {remedy}")
    return count


def collect(
    pool: Pool,
    corpus: str | Path | Corpus | Iterable[Row] | None = None,
    *,
    tokens: int | None = None,
    tokens_per_batch: int = 4096,
    progress: runner.ProgressOption = True,
) -> None:
    """Collect the matrices of every member that has none, or has those of other weights or another number of tokens.

    Args:
        pool: The pool whose members are read.
        corpus: Corpus that they were trained on; None: the address that the pool stores.
        tokens: Real tokens to read of each member, rounded up to whole rows, at most its training's budget. None: as
            many as other members have, or `GRAM_TOKENS`.
        tokens_per_batch: Tokens of a pass.
        progress: Show a bar on stderr.

    Raises:
        SettingError: `tokens` is below 1, or the corpus is not there, or not the members' own.
        ChecksumError: A member's file is not what its training wrote.
    """
    if tokens is not None and tokens < 1:
        raise SettingError(f"--tokens {tokens}: 1 or more are expected")
    with pool.place.locked():
        records = {partition: _record(pool, member) for partition, member in pool.members.items()}
        length = tokens or max((record.tokens for record in records.values() if record), default=GRAM_TOKENS)
        todo = [partition for partition, member in pool.members.items()
                if not _is_current(pool, member, records[partition], length)]  # fmt: skip
        if not todo:
            return
        pool.check(todo)
        rows = pool_partitions(pool, corpus, todo)
        model = mixed_model(pool)
        inputs = inputs_of(model.model, pool.start())
        done = len(pool.members) - len(todo)
        with runner.progress("Reading inputs", len(pool.members), unit="members", done=done, shown=progress) as tick:

            def work(partition: str, report: runner.Tick) -> None:
                counted = _collect_member(pool, model, inputs, rows[partition], length, tokens_per_batch)
                report(1, counted)

            for _ in runner.map(work, todo, on_tick=tick):
                pass


def _collect_member(
    pool: Pool, mixed: MixedModel, inputs: "Inputs", rows: Partition, tokens: int, tokens_per_batch: int
) -> int:
    """Collect and store one member's matrices; the record is written last, and so marks them as complete."""
    settings, member = recipe_of(pool), pool.members[rows.name]
    model = mixed.become({rows.name: 1.0})
    longest = min(limit for limit in (settings.max_tokens, model.context) if limit)
    drawn = rows.draw(min(tokens, settings.tokens), seed=settings.seed)  # what its training read first
    encoded = (encode(row, model.tokenizer, longest) for row in drawn)
    grams, counted = gram_matrices(model, inputs, encoded, tokens_per_batch)
    described = {name: (gram.dtype, tuple(gram.shape)) for name, gram in grams.items()}
    pieces, total = in_pieces(described, grams.__getitem__)
    written = pool.place.write(_file(member), pieces, total=total)
    record = Record(member=member.sha256, tokens=tokens, counted=counted, **vars(written),
                    file=Path(_file(member)).name, inputs=inputs.readers,
                    transposed=sorted(inputs.transposed))  # fmt: skip
    pool.place.write_document(_record_file(member), asdict(record))
    return counted


# -- which layer reads which input


@dataclass(frozen=True)
class Inputs:
    """The distinct inputs of a model's linear layers, each by the name of the first weight that it is multiplied by."""

    modules: Mapping[str, nn.Module]
    """A module that reads each input."""
    readers: Mapping[str, str]
    """Name of each weight's input."""
    transposed: frozenset[str]
    """Weights stored as [i o]."""


def inputs_of(model: LoadedModel, start: Weights) -> Inputs:
    """Inputs of the layers whose weights are in a model's files, by weights' names in these files."""
    layers = _named_layers(model, start)
    recorder = _CallRecorder()
    ids = torch.zeros(1, 3, dtype=torch.int64, device=model.device)
    hooks = {name: partial(recorder.record, name) for name in layers}
    _forward(model, layers, hooks, Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids).bool()))
    readers: dict[str, str] = {}
    first: dict[Any, str] = {}
    unmatched = []
    for name in layers:
        calls = recorder.calls.get(name)
        if calls and all(positions == ids.numel() for _, positions, _ in calls):
            readers[name] = first.setdefault(tuple(calls), name)
        else:
            unmatched.append(name)
    if unmatched:
        logger.warning("RegMean: %d layers are not called on every token and are averaged by the mean, %s first",
                       len(unmatched), unmatched[0])  # fmt: skip
    transposed = {name for name in readers if not isinstance(layers[name], nn.Linear)}
    return Inputs({name: layers[name] for name in first.values()}, readers, frozenset(transposed))


def _named_layers(model: LoadedModel, start: Weights) -> dict[str, nn.Module]:
    """Linear layers by their weights' names in the files, without those that share a weight with another module."""
    names = {
        parameter.data_ptr(): source.stored[0]
        for parameters, source in placed_sources(model, start.files)
        for parameter in parameters.values()
        if source.converter is None
    }
    layers = model.layers("*")
    pointers = [layer.weight.data_ptr() for layer in layers.values()]  # type: ignore[union-attr]
    tied = {model.base.get_input_embeddings().weight.data_ptr()}
    tied |= {pointer for pointer in pointers if pointers.count(pointer) > 1}
    return {names[pointer]: layer for pointer, layer in zip(pointers, layers.values(), strict=True)
            if pointer in names and pointer not in tied}  # fmt: skip


@dataclass
class _CallRecorder:
    """Records which tensor each module is called on; tensors are kept alive, so that no address comes twice."""

    calls: dict[str, list[tuple[int, int, tuple[int, ...]]]] = field(default_factory=dict)
    """Calls of each module: address of the input, its positions, its shape and strides."""
    tensors: list[Tensor] = field(default_factory=list)

    def record(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook: record the module's input."""
        if args:
            a = args[0].flatten(0, -2)
            self.tensors += [args[0], a]
            self.calls.setdefault(name, []).append((a.data_ptr(), len(a), (*a.shape, *a.stride())))


# -- a pass


@dataclass
class _Sums:
    """Sums of a a^T over real tokens."""

    grams: dict[str, Float32[Tensor, "i i"]]
    real: Bool[Tensor, " s"] | None = None
    """Mask of the batch's positions that are not padding; None: all are real, as in the head's pass."""

    def add(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook: add the module's input."""
        a = args[0].flatten(0, -2)
        a = (a if self.real is None else a[self.real.to(a.device)]).float()
        self.grams[name] += (a.T @ a).cpu()


def gram_matrices(
    model: LoadedModel, inputs: Inputs, rows: Iterable[Encoded], tokens_per_batch: int
) -> tuple[dict[str, Float32[Tensor, "i i"]], int]:
    """Matrices of every input over rows' real tokens, and the number of these tokens."""
    sizes = {name: layer_shape(module)[1] for name, module in inputs.modules.items()}
    sums, counted = _Sums({name: torch.zeros(size, size) for name, size in sizes.items()}), 0
    hooks = {name: partial(sums.add, name) for name in inputs.modules}
    for _, batch in batches(rows, tokens_per_batch):
        counted += int(batch.mask.sum())
        _forward(model, inputs.modules, hooks, batch.to(model.device), sums)
    for gram in sums.grams.values():
        gram /= max(counted, 1)
    return sums.grams, counted


@one_at_a_time
@torch.no_grad()
def _forward(
    model: LoadedModel,
    modules: Mapping[str, nn.Module],
    hooks: Mapping[str, Any],
    batch: Batch,
    sums: _Sums | None = None,
) -> None:
    """Run a forward pass with pre-hooks on some modules; if the output head is one, it runs on real tokens alone."""
    head = model.base.get_output_embeddings()
    with _hooked({name: module for name, module in modules.items() if module is not head}, hooks):
        if sums is not None:
            sums.real = batch.mask.flatten()
        states, logits = model.decode(batch.ids, batch.mask)
    if sums is not None:
        sums.real = None
    with _hooked({name: module for name, module in modules.items() if module is head}, hooks) as has_head:
        for positions in states[batch.mask.to(states.device)].split(HEAD_POSITIONS) if has_head else ():
            logits(positions)


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], hooks: Mapping[str, Any]) -> Iterator[bool]:
    """Pre-hooks on modules for a while; the value is whether there are any modules."""
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hooks[name]).remove)
        yield bool(modules)


# -- on disk


def _file(member: Member) -> str:
    return f"grams/{Path(member.file).stem}.safetensors"


def _record_file(member: Member) -> str:
    return f"grams/{Path(member.file).stem}.json"


def _record(pool: Pool, member: Member) -> Record | None:
    name = _record_file(member)
    if not pool.place.exists(name):
        return None
    remedy = _COLLECT.format(pool=pool.place.root)
    record = read_record(Record, pool.place.read(name), pool.place.path(name), remedy)
    if record.file not in (None, Path(_file(member)).name):
        raise ChecksumError(f"{pool.place.path(name)} is the record of {record.file}. {remedy}")
    return record


def _is_current(pool: Pool, member: Member, record: Record | None, tokens: int) -> bool:
    if record is None or not pool.place.exists(_file(member)):
        return False
    return (record.member, record.tokens) == (member.sha256, tokens) and pool.place.size(_file(member)) == record.bytes
