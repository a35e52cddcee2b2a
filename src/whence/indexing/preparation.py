"""What an index is made from: a corpus that was checked, a run, the model of its last checkpoint, complete settings.

All that is refused of a build's inputs is refused here, before anything is written. `build.index` goes on to write from
what is prepared; `planning.plan` measures on it what that would cost.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.templates import same_date, supervision, today
from whence.corpus.unsupervised import refuse_unsupervised
from whence.gradients.capture import Transform
from whence.indexing.ingest import Fingerprint, check_conversations, fingerprint_of, refuse_without_pairs
from whence.indexing.manifest import MANIFEST, Manifest, read_manifest
from whence.indexing.memory_bound import bounded
from whence.indexing.pilot import Pilot, sample_of
from whence.indexing.stored_settings import check_settings
from whence.indexing.vectors import IndexSettings, batch_tokens, load_for, manifest_of, transform_for
from whence.models.loading import LoadedModel, check_files
from whence.models.runs import Run, open_run
from whence.models.training_state import date_of_training, warn_of_another_day, warn_of_run
from whence.outputs import refuse_inputs
from whence.storage import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Inputs of a build that were checked."""

    texts: Corpus
    fingerprint: Fingerprint
    run: Run
    loaded: LoadedModel
    """The last checkpoint."""
    settings: IndexSettings
    """With the tokens of a pass."""
    manifest: Manifest
    """Of the index as it begins."""
    transform: Transform | None


def prepared(
    model: str | Path,
    corpus: str | Path | Corpus | list[Row],
    out: str | Path,
    settings: IndexSettings,
    *,
    restart: bool = False,
    memory: int | None = None,
) -> Prepared:
    """Open, check and load what an index is made from. Nothing is written.

    Args:
        model: See `build.index`.
        corpus: See `build.index`.
        out: Directory of the index; if one was begun there, its date and tokens of a pass hold.
        settings: Settings of the index.
        restart: The index in `out` does not count.
        memory: Bytes that the process may take at its peak: they set the tokens of a pass of a new index.

    Raises:
        CorpusError: The corpus cannot be read.
        ModelError: The model cannot be loaded, or has no moments for the view adam.
        SettingError: `out` is or holds an input, a setting has a value that cannot work, or `memory` does not suffice.
    """
    place = Place.at(out)  # an address that cannot be opened fails before a model is loaded
    refuse_inputs(out, [model, corpus, settings.tokenizer], is_directory=True)
    begun = None if restart or not place.exists(MANIFEST) else place
    texts = open_corpus(corpus, preferences=settings.preferences)
    fingerprint = fingerprint_of(texts)
    refuse_without_pairs(texts)
    run = open_run(model, which=settings.checkpoints)
    for note in run.notes:
        logger.warning("%s", note)
    warn_of_run(model)
    settings = replace(settings, date=_date(settings, model, begun))
    loaded = load_for(run.checkpoints[-1].path, settings)
    settings = replace(settings, supervise=supervision(loaded.tokenizer))
    check_conversations(texts, fingerprint.layouts, loaded.tokenizer)
    settings = _as_begun(settings, loaded, begun)
    manifest = manifest_of(run.checkpoints, loaded, fingerprint, texts, settings)
    refuse_unsupervised(texts, loaded.tokenizer, manifest.settings["max_tokens"])
    warn_of_another_day(model, manifest.settings.get("date"))
    transform = transform_for(loaded, settings)  # moments that do not fit fail before anything is written
    for earlier in run.checkpoints[:-1]:  # the last is loaded already
        check_files(earlier.path)
    made = Prepared(
        texts=texts,
        fingerprint=fingerprint,
        run=run,
        loaded=loaded,
        settings=settings,
        manifest=manifest,
        transform=transform,
    )
    return made if memory is None or begun is not None else _within(made, memory)


def _within(made: Prepared, memory: int) -> Prepared:
    """The same with passes of as many tokens as the memory allows."""
    longest = made.manifest.settings["max_tokens"]
    sample = sample_of(made.texts, made.fingerprint.rows, made.manifest.width)
    pilot = Pilot(made.loaded, made.settings, made.transform, longest=longest)
    tokens = bounded(pilot, sample, memory)
    stored = made.manifest.settings | {"tokens_per_batch": tokens}
    return replace(
        made,
        settings=replace(made.settings, tokens_per_batch=tokens),
        manifest=replace(made.manifest, settings=stored),
    )


def _as_begun(settings: IndexSettings, loaded: LoadedModel, begun: Place | None) -> IndexSettings:
    """Settings where what nobody gave is that of the index begun, or else what suits the device.

    So an index that another version began, with another default, goes on as it is.
    """
    if begun is not None:
        manifest = read_manifest(begun)
        check_settings(begun, manifest)
        stored = manifest.settings
        settings = replace(settings, tokens_per_batch=settings.tokens_per_batch or stored["tokens_per_batch"])
        if settings.space.projection is None:
            settings = replace(settings, space=replace(settings.space, projection=stored["space"]["projection"]))
        if settings.space.sketch == stored["space"]["projection"]:
            settings = replace(settings, codec=settings.codec or manifest.codec)
            blocks = tuple(stored.get("blocks", ()))
            if settings.blocks is None and len(blocks) == len(loaded.layers(settings.space.layers)):
                settings = replace(settings, blocks=blocks)
    return replace(settings, tokens_per_batch=batch_tokens(settings, loaded.device))


def _date(settings: IndexSettings, model: str | Path, begun: Place | None) -> str:
    """The day that a chat template writes: the given one, that of the index begun, of the training, or today."""
    stored = read_manifest(begun).settings.get("date") if begun is not None else None
    chosen = same_date(settings.date, stored, begun.root if begun is not None else "")
    return chosen or date_of_training(model) or today()
