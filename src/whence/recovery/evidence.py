"""The evidence of every row of a corpus against a weight difference, at one point between two models.

With g a row's loss gradient at a point theta, and T a direction in weight space (the weight difference
theta_0 - theta_f, as it is or with an optimizer's scaling undone), each row has

    loss     of the row at theta, in nats, the mean over its supervised tokens
    norm     |g|, exact, by traced layer
    dot      <g, T>, exact, by traced layer, for each direction that is given
    vector   if requested, a sketch of g; T has a sketch of the same kind, and rows are matched to it jointly

all from one forward and backward pass over the row, in which a layer's gradient is formed for a few rows at a time.
Positive dots are evidence of membership: descent takes gradients away, so T = theta_0 - theta_f is a positive sum of
those of the rows trained on.

Rows stream in parts. A part is one file, whole or absent, so that a gathering that was stopped goes on where it was.
Memory holds one part, two numbers a row, layer and direction, and the vectors of the rows that are requested.

Source: SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553, with the gradient exact, of any layers, and of all
supervised tokens.
"""

import itertools
import json
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn

from whence import runner
from whence.claims import claim_directory
from whence.corpus.reading import Corpus, Example
from whence.corpus.templates import writing_defaults, written_by
from whence.corpus.tokens import Encoded, bucketed, collate, encode
from whence.errors import ManifestMismatchError, ModelError, SettingError, StorageError
from whence.gradients.capture import FORMED_ENTRIES, Captured, backward, example_gradients
from whence.gradients.protocols import Projection
from whence.indexing.ingest import fingerprint_of
from whence.indexing.vectors import IndexSettings, batch_tokens, projection_for
from whence.models.loading import LoadedModel
from whence.numerics import inverse_or_zero
from whence.runner import Tick
from whence.storage import Place

ROWS_PER_PART = 512
"""Rows of a file: a stop loses at most so many."""
MANIFEST = "evidence.json"
LESS_MEMORY = "lower --max-tokens, and name another --work directory"
"""Advice where a pass does not fit."""

LayerDirection = Mapping[str, Float32[Tensor, "o i"]]
"""A direction in weight space by traced layer, laid out as the layer's gradient."""


@dataclass(frozen=True)
class PointEvidence:
    """Evidence of every row at one point, in the corpus' order."""

    place: Place
    parts: tuple[str, ...]
    layers: tuple[str, ...]
    width: int
    """`k` of the vectors; 0 if none were made."""
    loss: Float32[Tensor, " n"]
    norms: Float32[Tensor, "l n"]
    """|g| by layer."""
    tokens: Int64[Tensor, " n"]
    """Supervised tokens of each row."""
    dots: Mapping[str, Float32[Tensor, "l n"]]
    """<g, T> by direction's name and layer."""
    norms_by_direction: Mapping[str, Float32[Tensor, "l n"]] = field(default_factory=dict)
    """|g| by direction's name, where each direction has a gradient of its own: adapters that began at another A."""

    @property
    def norm(self) -> Float32[Tensor, " n"]:
        """|g| over the traced layers."""
        return self.norms.norm(dim=0)

    @property
    def usable(self) -> Bool[Tensor, " n"]:
        """Whether a row has a supervised token, and all its evidence is finite."""
        is_usable = (self.tokens > 0) & self.loss.isfinite() & self.norm.isfinite()
        for dots in self.dots.values():
            is_usable &= dots.isfinite().all(0)
        return is_usable

    def cosine(self, direction: str, length: float) -> Float32[Tensor, " n"]:
        """Cosine of g with a direction of this length over the traced layers, exact; 0 for a row without a gradient."""
        return self.dots[direction].sum(0) * inverse_or_zero(self.norm * length)

    def subset(self, rows: Int64[Tensor, " m"], dots: Mapping[str, str]) -> "PointEvidence":
        """Evidence of some rows, without vectors.

        Args:
            rows: Their numbers.
            dots: From the new name of each direction to the present one; one direction where they have own norms.
        """
        return replace(
            self,
            parts=(),
            width=0,
            loss=self.loss[rows],
            norms=next(
                (self.norms_by_direction[old] for old in dots.values() if old in self.norms_by_direction), self.norms
            )[:, rows],
            norms_by_direction={},
            tokens=self.tokens[rows],
            dots={new: self.dots[old][:, rows] for new, old in dots.items()},
        )

    def vectors(self, rows: Int64[Tensor, " m"]) -> Float32[Tensor, "m k"]:
        """Sketches of some rows, in their order.

        Raises:
            SettingError: No vectors were made at this point.
        """
        if not self.width:
            raise SettingError(f"{self.place.root}: no vectors were made of rows at this point")
        out = torch.zeros(len(rows), self.width)
        for number, part in enumerate(self.parts):
            inside = (rows // ROWS_PER_PART == number).nonzero()[:, 0]
            if len(inside):
                stored = _read(self.place, part)["vectors"]
                out[inside] = stored[rows[inside] % ROWS_PER_PART].float()
        return out


def gather_point(
    model: LoadedModel,
    corpus: Corpus,
    directions: Mapping[str, LayerDirection],
    *,
    rows: int,
    work: Place,
    settings: IndexSettings,
    provenance: Mapping[str, Any],
    sketched: bool = True,
    workers: "Workers | None" = None,
    tick: Tick = lambda examples, tokens: None,
) -> PointEvidence:
    """Gather a corpus' evidence at one point, or go on doing so.

    Args:
        model: The model at theta, frozen.
        corpus: Its rows, in order.
        directions: T by name; each covers every traced layer.
        rows: Number of rows.
        work: Directory of this point's parts.
        settings: Layers, reduction, sketch, longest row and batches, as of an index.
        provenance: What else decides the evidence, such as digests of the models: a directory of another is refused.
        sketched: Whether to make vectors.
        workers: Processes that gather parts, and how they open the point; None: this process does.
        tick: Called with the rows and tokens that are done.

    Raises:
        ManifestMismatchError: The directory holds other evidence.
        ChecksumError: A file of the directory is damaged.
        SettingError: A direction lacks a layer.
    """
    layers = model.layers(settings.space.layers)
    for name, direction in directions.items():
        if missing := layers.keys() - direction.keys():
            raise SettingError(f"the direction {name} has no matrix for the layer {min(missing)}")
    manifest = {
        **provenance,
        "space": settings.space.as_json(),
        "max_tokens": settings.max_tokens,
        "layers": list(layers),
        "targets": {name: round(length_of(direction, layers), 6) for name, direction in directions.items()},
        "sketched": sketched,
    }
    claim(work, manifest)
    point_pass = pass_at(model, layers, directions, settings, sketched=sketched)
    parts, columns = streamed(point_pass, corpus, work, rows=rows, workers=workers, tick=tick)
    return PointEvidence(
        place=work,
        parts=parts,
        layers=tuple(layers),
        width=point_pass.projection.width if point_pass.projection else 0,
        loss=columns["loss"],
        norms=columns["norm"],
        tokens=columns["tokens"].long(),
        dots={name: columns[f"dot {name}"] for name in directions},
    )


def streamed(
    point_pass: "Pass", corpus: Corpus, work: Place, *, rows: int, workers: "Workers | None", tick: Tick
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Make the parts that are not on the disk yet; all parts' names, and their arrays joined, vectors excepted."""
    starts = range(0, rows, ROWS_PER_PART)
    parts = [Part(number, first, min(ROWS_PER_PART, rows - first)) for number, first in enumerate(starts)]
    missing = [part for part in parts if not work.exists(part.file)]
    tick(sum(part.rows for part in parts) - sum(part.rows for part in missing), 0)
    part_work = PartWork(corpus, work, workers, point_pass)
    engine = "local" if workers is None else workers.engine
    for part, _ in runner.map(part_work, missing, engine=engine, on_tick=tick, less_memory=LESS_MEMORY):
        if not work.exists(part.file):
            raise StorageError(
                f"{work.path(part.file)}: a worker wrote it, and it is not here: the two do not share this disk. Let "
                "--work be a directory that all machines share"
            )
    arrays = [_read(work, part.file, but="vectors") for part in parts]
    joined = {name: torch.cat([part[name] for part in arrays], -1) for name in arrays[0]} if arrays else {}
    return tuple(part.file for part in parts), joined


def claim(work: Place, kept: Mapping[str, Any]) -> None:
    """Mark a new directory as of these settings; refuse one of others.

    Raises:
        ManifestMismatchError: It holds evidence of others.
    """

    def refusal(difference: str) -> ManifestMismatchError:
        return ManifestMismatchError(
            f"{work.root}: its evidence is of another {difference}. Name another --work directory, or remove that one."
        )

    claim_directory(work, MANIFEST, json.loads(json.dumps(kept, sort_keys=True, default=str)), refusal)


def length_of(direction: LayerDirection, layers: Iterable[str]) -> float:
    """|T| over some layers."""
    return float(torch.stack([direction[layer].norm() for layer in layers]).norm())


def sketch_of(direction: LayerDirection, model: LoadedModel, settings: IndexSettings) -> Float32[Tensor, " k"]:
    """Sketch of a direction, as rows' gradients are sketched."""
    projection = projection_for(model, settings)
    sketch = torch.zeros(projection.width)
    for layer in model.layers(settings.space.layers):
        sketch[projection.columns(layer)] += projection.flat(direction[layer][None], layer=layer)[0]
    return sketch


def direction_by_layer(
    model: LoadedModel, layers: Mapping[str, nn.Module], difference: Mapping[str, Tensor]
) -> dict[str, Float32[Tensor, "o i"]]:
    """A direction by parameter as one by traced layer, laid out as gradients are.

    With an adapter, a layer that the direction leaves out did not move: its matrix is 0.

    Raises:
        ModelError: The direction of a whole model leaves a layer out.
    """
    names = {id(weight): name for name, weight in model.model.named_parameters()}
    direction = {}
    for layer, module in layers.items():
        weight = module.get_parameter("weight")
        name = names[id(weight)]
        if name not in difference and not model.has_adapter:
            raise ModelError(
                f"{model.path}: the weight of {layer} ({name}) was found in no file, so how it moved is not known. "
                "Save the model anew: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW)"
            )
        matrix = difference[name] if name in difference else torch.zeros(weight.shape)
        direction[layer] = (matrix if isinstance(module, nn.Linear) else matrix.T).contiguous()
    return direction


@dataclass
class Pass:
    """Forward and backward passes over the rows of a part, a batch at a time."""

    model: LoadedModel
    layers: Mapping[str, nn.Module]
    directions: Mapping[str, LayerDirection]
    projection: Projection | None
    settings: IndexSettings

    def __post_init__(self):
        device = self.model.device
        self.placed = {
            name: {layer: direction[layer].to(device) for layer in self.layers}
            for name, direction in self.directions.items()
        }
        self.numbers = {layer: number for number, layer in enumerate(self.layers)}

    @property
    def longest(self) -> int | None:
        """Longest row, in tokens; None: no limit."""
        return min((limit for limit in (self.settings.max_tokens, self.model.context) if limit), default=None)

    def empty(self, n: int) -> dict[str, Tensor]:
        """Arrays of `n` rows that `take` adds to; those named "square" are stored as their roots, named "norm"."""
        arrays = {f"dot {name}": torch.zeros(len(self.layers), n) for name in self.directions}
        if self.projection is not None:
            arrays["vectors"] = torch.zeros(n, self.projection.width)
        return arrays | {"square": torch.zeros(len(self.layers), n)}

    def rows(self, encoded: Sequence[Encoded], tick: Tick) -> dict[str, Tensor]:
        """Arrays of a part's file."""
        n = len(encoded)
        self.arrays = {"loss": torch.full((n,), torch.nan)} | self.empty(n)
        usable = [number for number in range(n) if encoded[number].supervised_count]
        tick(n - len(usable), 0)
        lengths = [len(encoded[number].ids) for number in usable]
        for batch in bucketed(lengths, batch_tokens(self.settings, self.model.device)):
            self.batch_rows = torch.tensor([usable[place] for place in batch])
            losses = backward(
                self.model,
                self.layers,
                collate([encoded[number] for number in self.batch_rows.tolist()]),
                self.take,
                reduction=self.settings.space.reduction,
                whole=True,
            )
            self.arrays["loss"][self.batch_rows] = losses.loss.cpu()
            tick(len(batch), sum(len(encoded[number].ids) for number in self.batch_rows.tolist()))
        out = {name.replace("square", "norm"): array.sqrt() if name.startswith("square") else array
               for name, array in self.arrays.items()}  # fmt: skip
        out["tokens"] = torch.tensor([row.supervised_count for row in encoded], dtype=torch.int32)
        if "vectors" in out:
            out["vectors"] = out["vectors"].to(torch.bfloat16)
        return {name: tensor.contiguous() for name, tensor in out.items()}

    def take(self, captured: Captured) -> None:
        """Add one layer of a batch: gradients are formed for a few rows at a time, read, and freed."""
        rows, number = (
            self.batch_rows if captured.rows is None else self.batch_rows[captured.rows.cpu()],
            self.numbers[captured.layer],
        )
        entries = captured.g.shape[2] * captured.a.shape[2]
        step = max(1, FORMED_ENTRIES.get(captured.a.device.type, 2**17) // entries)
        for chunk, a, g in zip(rows.split(step), captured.a.split(step), captured.g.split(step), strict=True):
            formed = example_gradients(a, g)
            self.arrays["square"][number].index_add_(0, chunk, formed.square().sum((1, 2)).cpu())
            for name, direction in self.placed.items():
                dots = formed.flatten(1) @ direction[captured.layer].flatten()
                self.arrays[f"dot {name}"][number].index_add_(0, chunk, dots.cpu())
            if self.projection is not None:
                columns, block = (
                    self.projection.columns(captured.layer),
                    self.projection.flat(formed, layer=captured.layer),
                )
                self.arrays["vectors"][:, columns].index_add_(0, chunk, block.cpu())


def pass_at(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    directions: Mapping[str, LayerDirection],
    settings: IndexSettings,
    *,
    sketched: bool,
) -> Pass:
    """The pass over rows at a point, with vectors or without."""
    return Pass(model, layers, directions, projection_for(model, settings) if sketched else None, settings)


Opening = Callable[[], AbstractContextManager[Pass]]


@dataclass(frozen=True)
class Workers:
    """Processes that gather evidence."""

    engine: runner.EngineOption
    corpus_digest: str
    """That every one of them must read."""
    opening: Opening
    """How one of them opens the point; it is sent there."""


@dataclass(frozen=True)
class Part:
    """The work of one file."""

    number: int
    first: int
    """Number of its first row."""
    rows: int

    def __str__(self):
        return f"part {self.number} of the evidence"

    @property
    def file(self) -> str:
        """Its name."""
        return f"part-{self.number:05d}.safetensors"


@dataclass
class PartWork:
    """Gathers evidence of a part's rows, and writes it.

    A worker opens the point and reads the corpus itself, from the same places.
    """

    corpus: Corpus
    work: Place
    workers: Workers | None
    point_pass: Pass | None
    """None where it is yet to be opened."""
    written_as: tuple[Any, ...] = field(default_factory=writing_defaults)
    """How rows are written, for a tokenizer that is loaded elsewhere."""
    _open: ExitStack = field(default_factory=ExitStack)
    _rows: Iterator[Example] | None = None
    _next: int = 0
    """Number of the row at which `_rows` is."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"point_pass": None, "_open": ExitStack(), "_rows": None, "_next": 0}

    def __call__(self, part: Part, tick: Tick) -> None:
        """Write one part."""
        if self.point_pass is None:
            assert self.workers is not None
            if fingerprint_of(self.corpus).digest != self.workers.corpus_digest:
                raise ManifestMismatchError(
                    f"{self.corpus.name}: a worker on {socket.gethostname()} reads other rows there than this command. "
                    "Let all machines have the same corpus at this place"
                )
            with written_by(*self.written_as):
                self.point_pass = self._open.enter_context(self.workers.opening())
        tokenizer, longest = self.point_pass.model.tokenizer, self.point_pass.longest
        encoded = [encode(example.row, tokenizer, longest) for example in self._examples(part)]
        self.work.write_recorded(part.file, safetensors.torch.save(self.point_pass.rows(encoded, tick)))

    def _examples(self, part: Part) -> list[Example]:
        """Rows of a part: the corpus is read onwards, and anew for a part that lies behind."""
        if self._rows is None or part.first < self._next:
            self._rows, self._next = iter(self.corpus), 0
        rows, self._rows = self._rows, None  # a reading that fails is not gone on with
        skipped = part.first - self._next
        examples = list(itertools.islice(rows, skipped, skipped + part.rows))
        self._rows, self._next = rows, part.first + part.rows
        return examples


def parts_of(corpus: Corpus) -> Iterator[list[Example]]:
    """Rows of each part, in order."""
    stream = iter(corpus)
    while rows := list(itertools.islice(stream, ROWS_PER_PART)):
        yield rows


def _read(place: Place, name: str, *, but: str | None = None) -> dict[str, Tensor]:
    """A part's arrays but one; that one is not read from a local file.

    Raises:
        ChecksumError: The part is damaged.
    """
    if place.is_local:
        place.check_recorded(name)
        with safetensors.safe_open(place.path(name), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key != but}  # noqa: SIM118
    return {key: tensor for key, tensor in safetensors.torch.load(place.read_recorded(name)).items() if key != but}
