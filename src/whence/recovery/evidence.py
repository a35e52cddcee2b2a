"""What every row of a corpus says of a weight difference, at one point between two models: the stream under `recover`.

With g a row's loss gradient at a point theta, and T a target in weight space (the weight difference theta_0 - theta_f,
as it is or with an optimizer's scaling undone), each row has

    loss     of the row at theta, in nats, the mean over its supervised tokens
    norm     |g|, exact, by traced layer
    dot      <g, T>, exact, by traced layer, for each target that is given
    vector   where asked for a sketch of g, in which a target has a sketch too: what several rows are matched by

all from one forward and backward pass over the row, in which a layer's gradient is formed for a few rows at a time.
Positive dots are evidence of membership: descent takes gradients away, so T = theta_0 - theta_f is a positive sum of
those of the rows trained on.

Rows stream in parts. A part is one file, whole or not there, so that a gathering that was stopped goes on where it was;
memory holds one part, of every row two numbers a layer and target, and the vectors of rows that are asked for.

Source: SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553, with the gradient exact, of any layers, and of all
supervised tokens.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn

from whence.corpus.reading import Corpus, Example
from whence.corpus.tokens import Encoded, bucketed, collate, encode
from whence.errors import ManifestMismatchError, SettingError
from whence.gradients.capture import FORMED_ENTRIES, Captured, backward, example_gradients, inverse
from whence.gradients.protocols import Projection
from whence.indexing.vectors import IndexSettings, batch_tokens, projection_for
from whence.models.loading import LoadedModel
from whence.runner import Tick
from whence.storage import Place

ROWS_PER_PART = 512
"""Rows of a file: what a stop loses at most."""
MANIFEST = "evidence.json"

Target = Mapping[str, Float32[Tensor, "o i"]]
"""By traced layer, laid out as the layer's gradient."""


@dataclass(frozen=True)
class Evidence:
    """Of every row that has been gathered, in the corpus' order."""

    place: Place
    parts: tuple[str, ...]
    layers: tuple[str, ...]
    width: int
    """`k`; 0 where no vectors were made."""
    loss: Float32[Tensor, " n"]
    norms: Float32[Tensor, "l n"]
    """By layer."""
    tokens: Int64[Tensor, " n"]
    """Supervised."""
    dots: Mapping[str, Float32[Tensor, "l n"]]
    """By target and layer."""
    norms_of: Mapping[str, Float32[Tensor, "l n"]] = field(default_factory=dict)
    """By target, where gradients are of each target's own space, as of adapters that began at another A."""

    @property
    def norm(self) -> Float32[Tensor, " n"]:
        """|g| over the traced layers."""
        return self.norms.norm(dim=0)

    @property
    def usable(self) -> Bool[Tensor, " n"]:
        """Rows with a supervised token, and finite all through."""
        found = (self.tokens > 0) & self.loss.isfinite() & self.norm.isfinite()
        for dots in self.dots.values():
            found &= dots.isfinite().all(0)
        return found

    def cosine(self, target: str, length: float) -> Float32[Tensor, " n"]:
        """Of g and a target of this length over the traced layers, exact; 0 for a row without a gradient."""
        return self.dots[target].sum(0) * inverse(self.norm * length)

    def some(self, rows: Int64[Tensor, " m"], dots: Mapping[str, str]) -> "Evidence":
        """Of some rows, without vectors, and with these targets: names as they shall be, and as they are. Where targets
        have norms of their own, one is asked for.
        """
        return replace(
            self,
            parts=(),
            width=0,
            loss=self.loss[rows],
            norms=next((self.norms_of[old] for old in dots.values() if old in self.norms_of), self.norms)[:, rows],
            norms_of={},
            tokens=self.tokens[rows],
            dots={new: self.dots[old][:, rows] for new, old in dots.items()},
        )

    def vectors(self, rows: Int64[Tensor, " m"]) -> Float32[Tensor, "m k"]:
        """Sketches of some rows, in the order asked.

        Raises:
            SettingError: None were made here.
        """
        if not self.width:
            raise SettingError(f"{self.place.root}: no vectors were made of rows at this point")
        out = torch.zeros(len(rows), self.width)
        for number, part in enumerate(self.parts):
            inside = (rows // ROWS_PER_PART == number).nonzero()[:, 0]
            if len(inside):
                held = _read(self.place, part)["vectors"]
                out[inside] = held[rows[inside] % ROWS_PER_PART].float()
        return out


def gather(
    model: LoadedModel,
    corpus: Corpus,
    targets: Mapping[str, Target],
    *,
    work: Place,
    settings: IndexSettings,
    told: Mapping[str, Any],
    sketched: bool = True,
    tick: Tick = lambda examples, tokens: None,
) -> Evidence:
    """Gather a corpus' evidence at one point, or go on doing so.

    Args:
        model: At theta; frozen.
        corpus: Its rows, in order.
        targets: By name; each has a part for every traced layer.
        work: Directory of this point's parts.
        settings: Layers, reduction, sketch, longest row and batches, as of an index.
        told: What else decides the evidence, such as digests of the models: a directory with another is refused.
        sketched: Make vectors.
        tick: Told of rows and tokens done.

    Raises:
        ManifestMismatchError: The directory holds other evidence.
        SettingError: A target lacks a layer.
    """
    layers = model.layers(settings.space.layers)
    for name, target in targets.items():
        if missing := layers.keys() - target.keys():
            raise SettingError(f"the target {name} has no part for the layer {min(missing)}")
    kept = {
        **told,
        "space": settings.space.as_json(),
        "max_tokens": settings.max_tokens,
        "layers": list(layers),
        "targets": {name: round(length_of(target, layers), 6) for name, target in targets.items()},
        "sketched": sketched,
    }
    claim(work, kept)
    projection = projection_for(model, settings) if sketched else None
    names, joined = streamed(Pass(model, layers, targets, projection, settings), corpus, work, tick)
    return Evidence(
        place=work,
        parts=names,
        layers=tuple(layers),
        width=projection.width if projection else 0,
        loss=joined["loss"],
        norms=joined["norm"],
        tokens=joined["tokens"].long(),
        dots={name: joined[f"dot {name}"] for name in targets},
    )


def streamed(pass_over: "Pass", corpus: Corpus, work: Place, tick: Tick) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Parts of a corpus, those that are not on the disk made: their names, and all of them joined but for vectors."""
    names = []
    for number, rows in enumerate(parts_of(corpus)):
        name = f"part-{number:05d}.safetensors"
        names.append(name)
        if not work.exists(name):
            arrays = pass_over.rows(
                [encode(row.row, pass_over.model.tokenizer, pass_over.longest) for row in rows], tick
            )
            data = safetensors.torch.save(arrays)
            work.write(name, [data], total=len(data))
        else:
            tick(len(rows), 0)
    columns = [_read(work, name, but="vectors") for name in names]
    return tuple(names), {
        name: torch.cat([part[name] for part in columns], -1) for name in columns[0]
    } if columns else {}


def claim(work: Place, kept: Mapping[str, Any]) -> None:
    """Mark a new directory as of these settings; refuse one of others.

    Raises:
        ManifestMismatchError: It holds evidence of others.
    """
    document = json.loads(json.dumps(kept, sort_keys=True, default=str))
    if not work.exists(MANIFEST):
        data = json.dumps(document).encode()
        work.write(MANIFEST, [data], total=len(data))
        return
    before = json.loads(work.read(MANIFEST))
    for name in sorted({*document, *before}):
        if before.get(name) != document.get(name):
            raise ManifestMismatchError(
                f"{work.root}: its evidence is of another {name} (there {_short(before.get(name))}, here "
                f"{_short(document.get(name))}). Name another --work directory, or remove that one."
            )


def length_of(target: Target, layers: Iterable[str]) -> float:
    """|T| over some layers."""
    return float(torch.stack([target[layer].norm() for layer in layers]).norm())


def sketch_of(target: Target, model: LoadedModel, settings: IndexSettings) -> Float32[Tensor, " k"]:
    """A target as rows' gradients are sketched."""
    projection = projection_for(model, settings)
    row = torch.zeros(projection.width)
    for layer in model.layers(settings.space.layers):
        row[projection.columns(layer)] += projection.flat(target[layer][None], layer=layer)[0]
    return row


def targets_by_layer(
    model: LoadedModel, layers: Mapping[str, nn.Module], difference: Mapping[str, Tensor]
) -> dict[str, Float32[Tensor, "o i"]]:
    """A direction by parameter's name as one by traced layer, laid out as gradients are; zeros where it has no part."""
    names = {id(weight): name for name, weight in model.model.named_parameters()}
    out = {}
    for layer, module in layers.items():
        weight = module.get_parameter("weight")
        name = names[id(weight)]
        part = difference[name] if name in difference else torch.zeros(weight.shape)
        out[layer] = (part if isinstance(module, nn.Linear) else part.T).contiguous()
    return out


@dataclass
class Pass:
    """Passes over rows, a batch at a time."""

    model: LoadedModel
    layers: Mapping[str, nn.Module]
    targets: Mapping[str, Target]
    projection: Projection | None
    settings: IndexSettings

    def __post_init__(self):
        device = self.model.device
        self.placed = {
            name: {layer: target[layer].to(device) for layer in self.layers} for name, target in self.targets.items()
        }
        self.numbers = {layer: number for number, layer in enumerate(self.layers)}

    @property
    def longest(self) -> int | None:
        """In tokens."""
        return min((limit for limit in (self.settings.max_tokens, self.model.context) if limit), default=None)

    def empty(self, n: int) -> dict[str, Tensor]:
        """What `take` adds to, of so many rows; a name that begins with "square" is written as the root's."""
        arrays = {f"dot {name}": torch.zeros(len(self.layers), n) for name in self.targets}
        if self.projection is not None:
            arrays["vectors"] = torch.zeros(n, self.projection.width)
        return arrays | {"square": torch.zeros(len(self.layers), n)}

    def rows(self, encoded: Sequence[Encoded], tick: Tick) -> dict[str, Tensor]:
        """A part's file."""
        n = len(encoded)
        self.found = {"loss": torch.full((n,), torch.nan)} | self.empty(n)
        usable = [number for number in range(n) if encoded[number].targets]
        tick(n - len(usable), 0)
        lengths = [len(encoded[number].ids) for number in usable]
        for batch in bucketed(lengths, batch_tokens(self.settings, self.model.device)):
            self.now = torch.tensor([usable[place] for place in batch])
            losses = backward(
                self.model,
                self.layers,
                collate([encoded[number] for number in self.now.tolist()]),
                self.take,
                reduction=self.settings.space.reduction,
                whole=True,
            )
            self.found["loss"][self.now] = losses.loss.cpu()
            tick(len(batch), sum(len(encoded[number].ids) for number in self.now.tolist()))
        out = {name.replace("square", "norm"): part.sqrt() if name.startswith("square") else part
               for name, part in self.found.items()}  # fmt: skip
        out["tokens"] = torch.tensor([row.targets for row in encoded], dtype=torch.int32)
        if "vectors" in out:
            out["vectors"] = out["vectors"].to(torch.bfloat16)
        return {name: tensor.contiguous() for name, tensor in out.items()}

    def take(self, seen: Captured) -> None:
        """One layer's share of a batch: gradients are formed a few examples at a time, read for all, and freed."""
        rows, number = self.now if seen.rows is None else self.now[seen.rows.cpu()], self.numbers[seen.layer]
        entries = seen.g.shape[2] * seen.a.shape[2]
        step = max(1, FORMED_ENTRIES.get(seen.a.device.type, 2**17) // entries)
        for some, a, g in zip(rows.split(step), seen.a.split(step), seen.g.split(step), strict=True):
            formed = example_gradients(a, g)
            self.found["square"][number].index_add_(0, some, formed.square().sum((1, 2)).cpu())
            for name, target in self.placed.items():
                dots = formed.flatten(1) @ target[seen.layer].flatten()
                self.found[f"dot {name}"][number].index_add_(0, some, dots.cpu())
            if self.projection is not None:
                columns, block = self.projection.columns(seen.layer), self.projection.flat(formed, layer=seen.layer)
                self.found["vectors"][:, columns].index_add_(0, some, block.cpu())


def parts_of(corpus: Corpus) -> Iterator[list[Example]]:
    """Rows in files' worth."""
    stream = iter(corpus)
    while rows := list(itertools.islice(stream, ROWS_PER_PART)):
        yield rows


def _read(place: Place, name: str, *, but: str | None = None) -> dict[str, Tensor]:
    """A part's arrays; what is left out of a local file is not read from the disk."""
    if place.is_local:
        with safetensors.safe_open(place.path(name), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key != but}  # noqa: SIM118
    return {key: tensor for key, tensor in safetensors.torch.load(place.read(name)).items() if key != but}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
