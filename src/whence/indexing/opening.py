"""An open index with the model that its vectors came from, which queries need in the same gradient space.

The store answers from vectors alone. A query's own vector needs the model, tokenizer, projection and layers of the
index; each is loaded when first needed, and checked against the manifest's digests, so that no score ever compares two
spaces.
"""

import itertools
import json
import logging
import shlex
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from whence.corpus.layouts import layout, shown_text
from whence.corpus.preferences import CONTRAST, same_preferences
from whence.corpus.shapes import Row, rejected_side
from whence.corpus.templates import same_date, same_supervision
from whence.corpus.tokens import with_text
from whence.counts import number_of
from whence.errors import ManifestMismatchError, SettingError
from whence.gradients.capture import Transform
from whence.gradients.embeddings import tied_embeddings
from whence.gradients.flat_width import FLAT
from whence.gradients.protocols import Projection
from whence.gradients.space import GradientSpace
from whence.indexing.layout_check import layout_notes
from whence.indexing.store import Store
from whence.indexing.stored_settings import check_settings
from whence.indexing.vectors import (
    IndexSettings,
    corrections,
    load_for,
    projection_for,
    transform_for,
)
from whence.models.load_options import IndexLoading
from whence.models.loading import LoadedModel, directory_digest, tokenizer_digest
from whence.models.moments import moments_digest
from whence.paths import absolute, exists, is_directory
from whence.runner import LOCAL, EngineOption
from whence.turns import one_at_a_time

if TYPE_CHECKING:
    from whence.selection.pipeline import Chosen
    from whence.tracing.results import Trace

logger = logging.getLogger(__name__)

FAULTS = {
    "slopes": "in float16 it lost the gradients of what the model is sure of",
    "dropout": "with --gradient-checkpointing some models had their dropout on",
}
"""What was wrong where a setting of `vectors.corrections` is missing."""


class Index:
    """An index with the model that its vectors came from, which is loaded when first needed.

    Args:
        store: The directory.
        settings: The settings in the manifest, and how to load the model.
        model: The model's path, where it has moved.
    """

    def __init__(self, store: Store, settings: IndexSettings, *, model: str | None = None):
        self.store = store
        self.settings = settings
        self._model_path = model
        self._loaded: tuple[int, LoadedModel] | None = None
        self._transform: tuple[int, Transform | None] | None = None
        self.layout_notes: list[str] | None = None
        """What its rows and today's layout differ in; None before a model is loaded."""
        self._checked: set[int] = set()
        """Checkpoints whose optimizer file is known to be the right one."""
        self.levels: dict[tuple, float] = {}
        """Results of `tracing.levels` by what they depend on: each is measured once while the index is open."""

    def __repr__(self) -> str:
        """Where it is, and how to go on."""
        more = "More: .trace(PROMPT), .select(TASKS, count=100), .store.info()"
        return f"Index({self.store.place.root}, {number_of(self.store.rows, 'row')})\n  {more}"

    def __reduce__(self) -> Any:
        """Another process opens it anew, and loads the model when it needs it."""
        how = self.settings
        names = ("date", "supervise", "preferences", "device", "device_map", "trust_remote_code")
        loading = {name: getattr(how, name) for name in names}
        loading |= {"tokenizer": absolute(how.tokenizer), "model": absolute(self._model_path)}
        loading["chat_template"] = None if how.chat_template is None else absolute(str(how.chat_template))
        return partial(open_index, self.store.place.root, **loading), ()

    def trace(self, prompt: str | None = None, completion: str | None = None, **arguments: Any) -> "Trace":
        """Training examples that made a model say something: `whence.trace` of this index, with its other arguments."""
        import whence  # what answers lies above indexing, and is imported when first asked for

        return whence.trace(self, prompt, completion, **arguments)

    def select(self, tasks: Any = None, **arguments: Any) -> "Chosen":
        """The rows that should help most with a task: `whence.select` of this index, with its other arguments."""
        import whence

        return whence.select(self, tasks, **arguments)

    @cached_property
    def space(self) -> GradientSpace:
        """The gradient space in which the index was built."""
        return GradientSpace(**self.store.manifest.settings["space"])

    def shown_row(self, stored: dict[str, Any]) -> Row:
        """A stored row as a person reads it: token ids with their text, for which the model is loaded."""
        row = json.loads(stored["row"])
        return with_text(row, self.model().tokenizer) if layout(row) == "tokens" else row

    def rejected_answer(self, stored: dict[str, Any]) -> str | None:
        """Text of the answer that a stored row is held against, where it is a contrast; None for any other row."""
        columns = rejected_side(json.loads(stored["row"])) if self.has_contrasts else None
        return None if columns is None else shown_text(columns).get("completion")

    @property
    def columns(self) -> dict[str, str]:
        """Names that Whence reads, and the last corpus' own in their place; see `corpus.columns`."""
        return self.store.manifest.corpora[-1].get("columns", {})

    @property
    def has_contrasts(self) -> bool:
        """Whether rows with a preferred and a rejected answer are contrasts of the two; see `corpus.preferences`."""
        return self.settings.preferences == CONTRAST

    @property
    def layout(self) -> str:
        """Layout of the corpus' first row, which a query follows."""
        return self.store.manifest.settings["layout"]

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of one pass, padding included; passes of another size would change vectors by rounding."""
        return self.store.manifest.settings["tokens_per_batch"]

    @property
    def weights(self) -> list[float]:
        """Share of each checkpoint in a score."""
        return [entry["weight"] for entry in self.store.manifest.checkpoints]

    @one_at_a_time
    def model(self, checkpoint: int = -1) -> LoadedModel:
        """The model of a checkpoint; the last one asked for stays loaded.

        Raises:
            ManifestMismatchError: Its weights or tokenizer are not those that the index was built with.
        """
        number = checkpoint % len(self.store.manifest.checkpoints)
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None  # two models need not fit in memory
            self._loaded = (number, self._checked_model(number))
        return self._loaded[1]

    def layers(self, model: LoadedModel) -> dict[str, nn.Module]:
        """The traced layers."""
        return model.layers(self.space.layers)

    @one_at_a_time
    def projection(self, model: LoadedModel) -> Projection:
        """The projection, the same for every checkpoint."""
        if self._projection is None:
            self._projection = projection_for(model, self.settings)
        return self._projection

    _projection: Projection | None = None

    @one_at_a_time
    def transform(self, checkpoint: int) -> Transform | None:
        """What the index' view makes of a row's gradient under a checkpoint; None where it stays as it is.

        Raises:
            ModelError: The checkpoint has no optimizer file, or one of another model.
            ManifestMismatchError: Its optimizer file is not that which the index was built with.
        """
        number = checkpoint % len(self.store.manifest.checkpoints)
        if self._transform is None or self._transform[0] != number:
            self._transform = None
            self.check_moments(number)
            self._transform = (number, transform_for(self.model(number), self.settings))
        return self._transform[1]

    @one_at_a_time
    def check_moments(self, number: int) -> None:
        """Check that a checkpoint's optimizer file is the one the index was built with, if the view needs it."""
        entry = self.store.manifest.checkpoints[number]
        if number in self._checked or (expected := entry.get("moments")) is None:
            return
        path = _current_path(entry["path"], self._model_path)
        if (digest := moments_digest(path)) != expected:
            raise ManifestMismatchError(
                f"{path}: its optimizer file has digest {digest[:12]}, the index was built with {expected[:12]}. "
                f"Restore it, or index again with --restart into {self.store.place.root}."
            )
        self._checked.add(number)

    def adopt(self, model: LoadedModel, transform: Transform | None) -> None:
        """Use a model and transform that are loaded and checked already as the last checkpoint's."""
        number = len(self.store.manifest.checkpoints) - 1
        self._loaded, self._transform = (number, model), (number, transform)
        self._checked.update(range(number + 1))

    def _checked_model(self, number: int) -> LoadedModel:
        entry = self.store.manifest.checkpoints[number]
        path = _current_path(entry["path"], self._model_path)
        remedy = f"name it with --model, or index again with --restart into {self.store.place.root}"
        if Path(path).is_absolute() and not exists(path):
            raise ManifestMismatchError(
                f"{path}: the model of this index (weights and configuration of digest {entry['digest'][:12]}) is not "
                f"there. If it has moved, {remedy}."
            )
        base = entry.get("base")
        digest = directory_digest(path, base=base)
        if digest != entry["digest"]:
            raise ManifestMismatchError(
                f"{path}: not the model that the index was built with, or changed since: its weights and configuration "
                f"have digest {digest[:12]}, the index was built with {entry['digest'][:12]}, {entry['path']} then. If "
                f"the model has moved, {remedy}."
            )
        model = load_for(path, self.settings, base=base)
        tokenizer = tokenizer_digest(model.tokenizer)
        if tokenizer != (expected := self.store.manifest.settings["tokenizer"]):
            raise ManifestMismatchError(
                f"{path}: its tokenizer has digest {tokenizer[:12]}, the index was built with {expected[:12]}; "
                f"the same text would become other tokens. Restore it, or name the right one with --tokenizer."
            )
        self._check_layers(model)
        self.check_layout(model)
        self._warn_of_faults(model)
        return model

    def check_layout(self, model: LoadedModel) -> None:
        """Say, once, what the index' rows and today's layout differ in."""
        if self.layout_notes is None:
            self.layout_notes = layout_notes(self.store, model.tokenizer, is_dated=self.settings.date is not None)
            for note in self.layout_notes:
                logger.warning(note)

    def _warn_of_faults(self, model: LoadedModel) -> None:
        """Say which faults of an earlier version the index may have."""
        for name in corrections(model, self.settings):
            if name not in self.store.manifest.settings:
                root = self.store.place.root
                again = f"whence index MODEL CORPUS -o {shlex.quote(root)} --restart"
                logger.warning(
                    "%s: an earlier version built it, and %s. Index again with: %s", root, FAULTS[name], again
                )

    def _check_layers(self, model: LoadedModel) -> None:
        """Check that the traced layers are those of the index: the projection of each layer is drawn by its name.

        They change when a library renames modules, or when Whence counts other modules as layers.
        """
        expected = self.store.manifest.settings["layer_names"]
        try:
            names = list(self.layers(model))
        except SettingError:  # the index' own pattern matches none any longer
            names = []
        for number, (then, now) in enumerate(itertools.zip_longest(expected, names)):
            if then != now:
                again = f"whence index MODEL CORPUS -o {shlex.quote(self.store.place.root)} --restart"
                raise ManifestMismatchError(
                    f"{model.path}: its traced layers are not those of the index: layer {number} of {len(expected)} "
                    f"was {then or 'not there'}, and is {now or 'not there'} now. Scores across the two would mean "
                    f"nothing. Index again with: {again}"
                )
        if any(tied_embeddings(model, self.layers(model))) and not self.store.manifest.settings.get("has_tied_head"):
            again = f"whence index MODEL CORPUS -o {shlex.quote(self.store.place.root)} --restart"
            raise ManifestMismatchError(
                f"{model.path}: the index is of a head that is tied to the embedding, with the head's "
                f"use of the weight alone, as an older Whence took it. Index again with: {again}"
            )


def open_index(path: str | Path, *, engine: EngineOption = LOCAL, **loading: Unpack[IndexLoading]) -> Index:
    """Open an index.

    Args:
        path: Directory of the index.
        engine: Where it is scanned; see `runner`.
        **loading: See `IndexLoading`. An index alone never lets a model's repository run its code.

    Raises:
        SettingError: The index was built with the model's own code, and that is not allowed here.
        MissingIndexError: There is no index.
        FormatVersionError: A newer Whence wrote it.
        ChecksumError: Its manifest is damaged, or says what no index can.
    """
    store = Store.open(path)
    store.engine = engine
    check_settings(store.place, store.manifest)
    if store.manifest.settings["trust_remote_code"] and not loading.get("trust_remote_code"):
        raise SettingError(
            f"{path} was built with code from the model's own repository, {store.manifest.checkpoints[-1]['path']}. "
            "If you trust it, add --trust-remote-code."
        )
    checkpoints = store.manifest.checkpoints
    if len(checkpoints) > 1 and not all("rates" in entry for entry in checkpoints):
        logger.warning(
            "%s: an earlier version weighted its checkpoints, by logged learning rates alone: wrong where they were "
            "logged no more often than checkpoints were saved. Then index again with --restart",
            path,
        )
    return index_of(store, **loading)


def index_of(store: Store, **loading: Unpack[IndexLoading]) -> Index:
    """An index as `open_index` returns it; if it needs code that is not allowed, its model cannot load."""
    check_settings(store.place, store.manifest)
    stored = store.manifest.settings
    names = ("max_tokens", "tokens_per_batch", "dtype", "gradient_checkpointing")
    settings = IndexSettings(
        space=GradientSpace(**stored["space"]),
        flat_width=store.manifest.width if GradientSpace(**stored["space"]).sketch in FLAT else None,
        codec=store.manifest.codec,
        blocks=tuple(stored["blocks"]) if "blocks" in stored else None,
        tokenizer=str(tokenizer) if (tokenizer := loading.get("tokenizer")) else stored["tokenizer_path"],
        chat_template=loading.get("chat_template") or _stored_template(store),
        date=same_date(loading.get("date"), stored.get("date"), store.place.root),
        supervise=same_supervision(loading.get("supervise"), stored.get("supervise"), store.place.root),
        preferences=same_preferences(loading.get("preferences"), stored.get("preferences"), store.place.root),
        device=loading.get("device"),
        device_map=loading.get("device_map"),
        trust_remote_code=stored["trust_remote_code"] and loading.get("trust_remote_code", False),
        **{name: stored[name] for name in names},
    )
    return Index(store, settings, model=loading.get("model"))


def _stored_template(store: Store) -> str | None:
    """The chat template that an index keeps, as text: a manifest names no files."""
    template = store.manifest.settings.get("chat_template")
    return template if isinstance(template, str) and "{" in template else None


def _current_path(path: str, moved_to: str | None) -> str:
    """The present path of a checkpoint: `moved_to` is its directory, or the run that holds it."""
    if moved_to is None:
        return path
    inside = Path(moved_to) / Path(path).name
    return str(inside) if is_directory(inside) else moved_to
