"""The settings of an index, the vectors that examples become under them, and the manifest that records them.

An example's vector is the sketch of its gradient under the optimizer's view. An example without a supervised token, or
with a non-finite gradient, gets a status and is never ranked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whence import __version__, catalogue, runner
from whence.brief import brief
from whence.corpus import preferences
from whence.corpus.plain_text import LINE
from whence.corpus.reading import Corpus
from whence.corpus.templates import ASSISTANT, supervision, writes_date
from whence.corpus.tokens import LAYOUT_VERSION, Encoded, bucketed, collate
from whence.errors import SettingError
from whence.gradients.adam import Gamma
from whence.gradients.capture import Transform, sketch
from whence.gradients.embeddings import tied_embeddings
from whence.gradients.flat_width import FLAT
from whence.gradients.projections.tensor_sketch import TensorSketch
from whence.gradients.protocols import Projection
from whence.gradients.slope_scale import scale_for
from whence.gradients.space import GradientSpace
from whence.indexing.codecs import codec as codec_of
from whence.indexing.ingest import Fingerprint
from whence.indexing.manifest import CorpusEntry, Manifest
from whence.indexing.shards import STATUSES, ShardArrays
from whence.models.checkpointing import has_dropout
from whence.models.loading import (
    LoadedModel,
    adapter_config,
    base_of,
    directory_digest,
    layer_shape,
    load_model,
    local_directory,
    tokenizer_digest,
)
from whence.models.moments import moments_digest, read_moments
from whence.models.runs import Checkpoint
from whence.paths import absolute

DEFAULT_CONTEXT = 2048
"""Longest row in tokens, where neither the caller nor the model's configuration says."""
TOKENS_ON_CPU, TOKENS_ON_GPU = 2048, 16384
"""Default tokens of one forward and backward pass: as few as suit a CPU would leave a GPU idle."""


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """How to build an index. All but the last three fields decide its bytes, and a resumed build must agree on them.

    Another device or number of threads moves a vector by rounding: "the same bytes" holds on one machine.
    """

    __repr__ = brief

    space: GradientSpace = field(default_factory=GradientSpace)
    blocks: tuple[int, ...] | None = None
    """R of each layer, for the projection `tensor_sketch`, as a manifest records it; None: chosen by cost."""
    flat_width: int | None = None
    """Numbers of a flat sketch whose width nobody gave, as a manifest records them; None: by the model's size."""
    codec: str | None = None
    """Name in `codecs.CODECS`: how vectors are stored. None: as the catalogue says for the projection."""
    checkpoints: str = "last"
    """Checkpoints of the run to use: "all", or the "last"."""
    max_tokens: int | None = None
    """Longest row in tokens; a longer one is cut (`tokens.encode`). None: the model's context."""
    tokens_per_batch: int | None = None
    """Tokens of one forward and backward pass, padding included. None: as suits the device (`batch_tokens`)."""
    dtype: str | None = None
    """Load the weights as float32, bfloat16 or float16; None: as stored."""
    tokenizer: str | None = None
    """Directory or Hub name, where it is not the model's own."""
    chat_template: str | Path | None = None
    """File of a chat template, or its text, in place of the tokenizer's own."""
    date: str | None = None
    """Day that a chat template writes that writes the date, as YYYY-MM-DD; None: that of the model's
    training, if `whence train` wrote it, else the day of the build."""
    supervise: str | None = None
    """Which tokens of a row are supervised: one of `corpus.templates.SUPERVISED`. None: as in the model's training, if
    `whence train` wrote it, else "assistant"."""
    preferences: str | None = None
    """What a row with a preferred and a rejected answer is: one of `corpus.preferences.PREFERENCES`. None: "chosen"."""
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    """Recompute activations: less memory, a third more time."""
    device: str | None = None
    device_map: str | None = None
    engine: runner.EngineOption = "local"
    """Where jobs run; see `runner`."""

    def __post_init__(self):
        for flag, value in (("--max-tokens", self.max_tokens), ("--batch-tokens", self.tokens_per_batch)):
            if value is not None and value < 2:
                raise SettingError(f"{flag} {value}: at least 2 is expected")
        preferences.checked(self.preferences)
        runner.check_engine(self.engine)
        catalogue.projection(self.space.sketch)
        codec_of(self.codec_name)
        if self.blocks is not None and self.space.sketch != "tensor_sketch":
            raise SettingError(f"blocks {list(self.blocks)}: they belong to --projection tensor_sketch alone")

    @property
    def codec_name(self) -> str:
        """Name of the codec, with the default filled in."""
        return self.codec or catalogue.projection_entry(self.space.sketch).codec


def with_options(settings: IndexSettings, options: dict[str, Any]) -> IndexSettings:
    """Settings with some fields replaced by name, those of the gradient space included."""
    in_space = {name: options.pop(name) for name in list(options) if name in GradientSpace.__dataclass_fields__}
    unknown = [name for name in options if name not in IndexSettings.__dataclass_fields__]
    if unknown:
        raise SettingError(f"{', '.join(unknown)}: not a setting of an index")
    return replace(settings, space=replace(settings.space, **in_space), **options)


def batch_tokens(settings: IndexSettings, device: torch.device) -> int:
    """Tokens of one pass: as set, or as suits the device."""
    return settings.tokens_per_batch or (TOKENS_ON_CPU if device.type == "cpu" else TOKENS_ON_GPU)


def load_for(path: str, settings: IndexSettings, *, base: str | None = None) -> LoadedModel:
    """Load a model as an index with these settings does."""
    loaded = load_model(
        path,
        base=base,
        tokenizer=settings.tokenizer,
        chat_template=settings.chat_template,
        date=settings.date,
        supervise=settings.supervise,
        dtype=settings.dtype,
        device=settings.device,
        device_map=settings.device_map,
        trust_remote_code=settings.trust_remote_code,
    )
    preferences.take_preferences(loaded.tokenizer, settings.preferences)
    return loaded


def projection_for(model: LoadedModel, settings: IndexSettings) -> Projection:
    """The projection that an index of this model would use."""
    space = settings.space
    shapes = {name: layer_shape(layer) for name, layer in model.layers(space.layers).items()}
    extra: dict[str, Any] = {} if space.shuffle_rounds is None else {"rounds": space.shuffle_rounds}
    extra |= {} if settings.blocks is None else {"blocks": settings.blocks}
    width = settings.flat_width if space.width is None and space.sketch in FLAT else space.width
    return catalogue.projection(space.sketch)(shapes, width=width, seed=space.seed, **extra)


def transform_for(model: LoadedModel, settings: IndexSettings) -> Transform | None:
    """What the view makes of an example's gradient under this checkpoint; None where that stays as it is.

    Raises:
        ModelError: The view needs moments, and the checkpoint has none that fit.
    """
    if settings.space.view == "sgd":
        return None
    return Gamma(read_moments(model, model.layers(settings.space.layers)), mode=settings.space.adam_mode)


def manifest_of(
    checkpoints: Sequence[Checkpoint], loaded: LoadedModel, corpus: Fingerprint, texts: Corpus, settings: IndexSettings
) -> Manifest:
    """The manifest of a new index, with all settings on which a resumed build must agree."""
    layers = loaded.layers(settings.space.layers)
    if not layers:
        raise SettingError(f"{loaded.path}: no linear layer to trace. Choose some with --layers.")
    if settings.gradient_checkpointing:
        loaded.require_gradient_checkpointing()
    longest = settings.max_tokens
    if longest is not None and loaded.context is not None and longest > loaded.context:
        raise SettingError(f"--max-tokens {longest}: the model's context is {loaded.context} tokens")
    stored: dict[str, Any] = {
        "space": settings.space.as_json(),
        "layer_names": list(layers),
        "traced_fraction": round(loaded.traced_fraction(layers), 4),
        "layout": corpus.layout,
        "tokenizer": tokenizer_digest(loaded.tokenizer),
        "tokenizer_path": absolute(settings.tokenizer),
        "max_tokens": longest or loaded.context or DEFAULT_CONTEXT,
    }
    if any(tied_embeddings(loaded, layers)):
        stored["has_tied_head"] = True
    projection = projection_for(loaded, settings)
    if isinstance(projection, TensorSketch):
        stored["blocks"] = list(projection.blocks)
    stored["tokens_per_batch"] = batch_tokens(settings, loaded.device)
    stored |= {name: getattr(settings, name) for name in ("dtype", "trust_remote_code", "gradient_checkpointing")}
    stored |= _layout_settings(loaded, corpus, settings) | corrections(loaded, settings)
    entries = [_checkpoint_entry(checkpoint, settings.space.view) for checkpoint in checkpoints]
    return Manifest(
        whence_version=__version__,
        codec=settings.codec_name,
        width=projection.width,
        settings=stored,
        checkpoints=tuple(entries),
        corpora=(corpus_entry(texts, corpus),),
    )


def corpus_entry(texts: Corpus, fingerprint: Fingerprint) -> CorpusEntry:
    """A corpus' entry in the manifest of an index."""
    name = absolute(texts.name) or texts.name
    entry: CorpusEntry = {"name": name, "digest": fingerprint.digest, "rows": fingerprint.rows}
    if texts.columns:
        entry["columns"] = texts.columns
    if texts.text_rows != LINE:
        entry["text_rows"] = texts.text_rows
    return entry


def _layout_settings(loaded: LoadedModel, corpus: Fingerprint, settings: IndexSettings) -> dict[str, Any]:
    """What decides the text of rows that go through a chat template, if there are any."""
    tokenizer = loaded.tokenizer
    stored = {} if settings.chat_template is None else {"chat_template": tokenizer.chat_template}
    stored |= {} if supervision(tokenizer) == ASSISTANT else {"supervise": supervision(tokenizer)}
    stored |= {"preferences": preferences.CONTRAST} if settings.preferences == preferences.CONTRAST else {}
    if not tokenizer.chat_template or not {"messages", "instruction"} & {*corpus.layouts}:
        return stored
    stored |= {"date": tokenizer.template_date} if writes_date(tokenizer) else {}
    return stored | {"layout_version": LAYOUT_VERSION}


def corrections(loaded: LoadedModel, settings: IndexSettings) -> dict[str, str]:
    """Settings that tell an index from one of the same settings by Whence 0.1.0 up to commit 5a17c86, which was wrong.

    They are in no other index, so that one which was right goes on as it was.
    """
    out = {"slopes": "scaled"} if scale_for(loaded).is_needed else {}
    return out | {"dropout": "off"} if settings.gradient_checkpointing and has_dropout(loaded.base.config) else out


def _checkpoint_entry(checkpoint: Checkpoint, view: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "path": absolute(checkpoint.path),
        "step": checkpoint.step,
        "learning_rate": checkpoint.learning_rate,
        "weight": checkpoint.weight,
        "digest": directory_digest(checkpoint.path),
    }
    if checkpoint.rates is not None:
        entry["rates"] = checkpoint.rates
    if config := adapter_config(local_directory(checkpoint.path)):
        entry["base"] = absolute(base_of(config))
    return entry if view == "sgd" else entry | {"moments": moments_digest(checkpoint.path)}


def example_vectors(
    model: LoadedModel,
    layers: dict[str, nn.Module],
    projection: Projection,
    encoded: list[Encoded],
    *,
    settings: IndexSettings,
    transform: Transform | None = None,
    tick: Callable[[int, int], None] = lambda examples, tokens: None,
) -> ShardArrays:
    """Sketched gradients of examples, in their order, with norms, losses and statuses.

    They are plain gradients, as queries are under any view, unless `transform` says what the optimizer makes of them.

    The loss is in nats, reduced over the example's supervised tokens as the gradient space says; the norm is the
    sketch's, before it is stored: over seeds, its square is an unbiased estimate of the gradient's.
    """
    n = len(encoded)
    vectors, loss = torch.zeros(n, projection.width), torch.zeros(n)
    supervised = torch.tensor([example.supervised_count for example in encoded], dtype=torch.int32)
    status = torch.where(supervised > 0, STATUSES.index("ok"), STATUSES.index("no_supervised_token"))
    usable = [number for number in range(n) if supervised[number] > 0]
    tick(n - len(usable), 0)
    lengths = [encoded[number].positions for number in usable]
    for batch in bucketed(lengths, batch_tokens(settings, model.device)):
        numbers = [usable[position] for position in batch]
        rows, losses = sketch(
            model,
            layers,
            collate([encoded[number] for number in numbers]),
            projection,
            reduction=settings.space.reduction,
            normalise=settings.space.normalise,
            gradient_checkpointing=settings.gradient_checkpointing,
            transform=transform,
        )
        vectors[numbers], loss[numbers] = rows.cpu(), losses.loss.cpu()
        tick(len(numbers), sum(encoded[number].positions for number in numbers))
    norm = vectors.norm(dim=1)
    finite = torch.isfinite(norm) & torch.isfinite(loss)  # a norm is not, if an entry is not
    status[~finite] = STATUSES.index("non_finite")
    norm = torch.where(finite, norm, 0.0)
    return ShardArrays(
        vectors=vectors,
        norm=norm,
        loss=loss.nan_to_num(0, 0, 0),
        status=status.to(torch.uint8),
        tokens=supervised,
    )
