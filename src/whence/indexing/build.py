"""A corpus, a run and a gradient space become an index; rows join it, files are mended.

`ingest` copies the corpus' rows into parts. From then on each pair of a part and a checkpoint is one job, which
tokenises the part's rows, groups them into batches of like length, and sketches their gradients. Jobs are idempotent
and their batches depend on the part alone, so a build that is killed and run again ends with the same bytes.

With `--view adam` rows are what the optimizer makes of their gradients, by the moments in each checkpoint's own
optimizer file. Queries are plain gradients, so asking needs no such file.
"""

import itertools
import json
import logging
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from whence import runner
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.tokens import Encoded, encode
from whence.errors import CorpusError, ManifestMismatchError, SettingError
from whence.gradients.capture import Transform
from whence.gradients.protocols import Projection
from whence.gradients.space import GradientSpace
from whence.indexing.ingest import check_conversations, copy_rows, fingerprint_of, part_again, refuse_known_ids
from whence.indexing.manifest import MANIFEST, read_manifest
from whence.indexing.repair import repair as mend
from whence.indexing.shards import ShardArrays
from whence.indexing.store import Problem, Store
from whence.indexing.store import verify as verify_store
from whence.indexing.vectors import (
    IndexSettings,
    absolute,
    batch_tokens,
    example_vectors,
    load_for,
    manifest_of,
    projection_for,
    transform_for,
    with_options,
)
from whence.models.loading import LoadedModel, check_files, directory_digest, tokenizer_digest
from whence.models.moments import moments_digest
from whence.models.runs import open_run
from whence.storage import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One shard."""

    checkpoint: int
    part: int
    rows: int

    def __str__(self):
        return f"shard {self.part} of checkpoint {self.checkpoint}"


class Index:
    """An index with the model that its vectors came from, which is loaded when first needed.

    Args:
        store: The directory.
        settings: How to load the model; what the manifest says, but for the device.
        model: Another path of the same model, where it has moved.
    """

    def __init__(self, store: Store, settings: IndexSettings, *, model: str | None = None):
        self.store = store
        self.settings = settings
        self._model_path = model
        self._loaded: tuple[int, LoadedModel] | None = None
        self._transform: tuple[int, Transform | None] | None = None
        self._checked: set[int] = set()
        """Checkpoints whose optimizer file is known to be the right one."""
        self.levels: dict[tuple, float] = {}
        """Of `nulls.needed_z`, by what it depends on: measured once while the index is open."""

    @cached_property
    def space(self) -> GradientSpace:
        """The gradient space that it was built in."""
        return GradientSpace(**self.store.manifest.settings["space"])

    @property
    def layout(self) -> str:
        """Layout of the corpus' first row, which a query follows."""
        return self.store.manifest.settings["layout"]

    @property
    def tokens_per_batch(self) -> int:
        """Of one pass, padding included; batches of another size would move vectors by rounding."""
        return self.store.manifest.settings["tokens_per_batch"]

    @property
    def weights(self) -> list[float]:
        """Share of each checkpoint in a score."""
        return [entry["weight"] for entry in self.store.manifest.checkpoints]

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

    def projection(self, model: LoadedModel) -> Projection:
        """The projection, the same for every checkpoint."""
        if self._projection is None:
            self._projection = projection_for(model, self.settings)
        return self._projection

    _projection: Projection | None = None

    def transform(self, checkpoint: int) -> Transform | None:
        """What becomes of a row's gradient under a checkpoint, in this index' view; None where it stays as it is.

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

    def check_moments(self, number: int) -> None:
        """See that a checkpoint's optimizer file is that which the index was built with, if the view needs one."""
        entry = self.store.manifest.checkpoints[number]
        if number in self._checked or (expected := entry.get("moments")) is None:
            return
        path = _moved(entry["path"], self._model_path)
        if (found := moments_digest(path)) != expected:
            raise ManifestMismatchError(
                f"{path}: its optimizer file has digest {found[:12]}, the index was built with {expected[:12]}. "
                f"Restore it, or index again with --restart into {self.store.place.root}."
            )
        self._checked.add(number)

    def adopt(self, model: LoadedModel, transform: Transform | None) -> None:
        """Take what is loaded already, and has just been looked at, as the last checkpoint's."""
        number = len(self.store.manifest.checkpoints) - 1
        self._loaded, self._transform = (number, model), (number, transform)
        self._checked.update(range(number + 1))

    def _checked_model(self, number: int) -> LoadedModel:
        entry = self.store.manifest.checkpoints[number]
        path = _moved(entry["path"], self._model_path)
        remedy = f"name it with --model, or index again with --restart into {self.store.place.root}"
        if Path(path).is_absolute() and not Path(path).exists():
            raise ManifestMismatchError(
                f"{path}: the model of this index (weights and configuration of digest {entry['digest'][:12]}) is not "
                f"there. If it has moved, {remedy}."
            )
        base = entry.get("base")
        found = directory_digest(path, base=base)
        if found != entry["digest"]:
            raise ManifestMismatchError(
                f"{path}: its weights and configuration have digest {found[:12]}, "
                f"the index was built with {entry['digest'][:12]}. "
                f"If the model has moved, {remedy}."
            )
        model = load_for(path, self.settings, base=base)
        words = tokenizer_digest(model.tokenizer)
        if words != (expected := self.store.manifest.settings["tokenizer"]):
            raise ManifestMismatchError(
                f"{path}: its tokenizer has digest {words[:12]}, the index was built with {expected[:12]}; "
                f"the same text would become other tokens. Restore it, or name the right one with --tokenizer."
            )
        self._check_layers(model)
        return model

    def _check_layers(self, model: LoadedModel) -> None:
        """See that the traced layers are those of the index: a layer's part of a sketch is drawn by its name.

        They change where a library names modules anew, or where Whence takes others of them for layers.
        """
        expected = self.store.manifest.settings["layer_names"]
        try:
            found = list(self.layers(model))
        except SettingError:  # the index' own pattern matches none any longer
            found = []
        for number, (then, now) in enumerate(itertools.zip_longest(expected, found)):
            if then != now:
                again = f"whence index MODEL CORPUS -o {shlex.quote(self.store.place.root)} --restart"
                raise ManifestMismatchError(
                    f"{model.path}: its traced layers are not those of the index: layer {number} of {len(expected)} "
                    f"was {then or 'not there'}, and is {now or 'not there'} now. Scores across the two would mean "
                    f"nothing. Index again with: {again}"
                )


def index(
    model: str | Path,
    corpus: str | Path | Corpus | list[Row],
    out: str | Path,
    *,
    settings: IndexSettings | None = None,
    restart: bool = False,
    progress: bool = True,
    **options: Any,
) -> Index:
    """Build an index of a corpus' gradients, or go on building it.

    Args:
        model: A model directory, a Trainer's output directory, an adapter directory, or a Hub name.
        corpus: Whatever `corpus.open_corpus` takes.
        out: Directory of the index, local or at an fsspec address.
        settings: How; or fields of `IndexSettings` and `GradientSpace` by name as `options`, such as
            `projection="count_sketch", width=8192, codec="int8"`.
        restart: Remove the index that is there and start over.
        progress: Show a bar on stderr.
        **options: See `settings`.

    Returns:
        The complete index.

    Raises:
        CorpusError: The corpus cannot be read; nothing has been written.
        ModelError: The model cannot be loaded, or has no moments for the view adam; nothing has been written.
        ManifestMismatchError: `out` was begun with other settings, which are named.
        StorageError: A file could not be written; the same command resumes.
    """
    chosen = with_options(settings or IndexSettings(), options)
    place = Place.at(out)  # an address that cannot be opened is told before a model is loaded
    texts = open_corpus(corpus)
    fingerprint = fingerprint_of(texts)
    run = open_run(model, which=chosen.checkpoints)
    loaded = load_for(run.checkpoints[-1].path, chosen)
    chosen = _sized(chosen, loaded, None if restart else place)
    check_conversations(texts, fingerprint.layouts, loaded.tokenizer)
    manifest = manifest_of(run.checkpoints, loaded, fingerprint, texts.name, chosen)
    transform = transform_for(loaded, chosen)  # moments that do not fit are told before anything is written
    for earlier in run.checkpoints[:-1]:  # the last is loaded already
        check_files(earlier.path)
    with place.locked():  # before anything is removed: another process may be writing
        if restart:
            Store.restart(out)
        store = Store.resume(out, manifest)
        _refuse_joining(store)
        built = Index(store, chosen)
        built.adopt(loaded, transform)
        copy_rows(store, texts, after=0)
        _fill(built, progress)
    return built


def _sized(settings: IndexSettings, loaded: LoadedModel, begun: Place | None) -> IndexSettings:
    """With the tokens of a pass: those given, those of the index that is gone on with, or what suits the device."""
    if settings.tokens_per_batch is None and begun is not None and begun.exists(MANIFEST):
        return replace(settings, tokens_per_batch=read_manifest(begun).settings["tokens_per_batch"])
    return replace(settings, tokens_per_batch=batch_tokens(settings, loaded.device))


def open_index(
    path: str | Path,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Index:
    """Open an index that is there.

    Args:
        path: Its directory.
        model: The model's directory, where it has moved since.
        tokenizer: Where the tokenizer is, if that has moved.
        device: Where to load the model.
        device_map: "auto" spreads a large model over all devices.
        trust_remote_code: Let the model's repository run its own code. An index never decides that by itself.

    Raises:
        SettingError: The index was built with the model's own code, and that is not allowed here.
        MissingIndexError: There is none.
        FormatVersionError: A newer Whence wrote it.
        ChecksumError: Its manifest is damaged.
    """
    store = Store.open(path)
    if store.manifest.settings["trust_remote_code"] and not trust_remote_code:
        raise SettingError(
            f"{path} was built with code from the model's own repository, {store.manifest.checkpoints[-1]['path']}. "
            "If you trust it, add --trust-remote-code."
        )
    loading = {"tokenizer": tokenizer, "device": device, "device_map": device_map}
    return _index_of(store, model=model, trust_remote_code=trust_remote_code, **loading)


def _index_of(
    store: Store,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    **placing: str | None,
) -> Index:
    """An index as `open_index` opens it, though it may need code that is not allowed: then its model cannot load."""
    kept = store.manifest.settings
    names = ("max_tokens", "tokens_per_batch", "dtype", "gradient_checkpointing")
    settings = IndexSettings(
        space=GradientSpace(**kept["space"]),
        codec=store.manifest.codec,
        tokenizer=tokenizer or kept["tokenizer_path"],
        trust_remote_code=kept["trust_remote_code"] and trust_remote_code,
        **placing,
        **{name: kept[name] for name in names},
    )
    return Index(store, settings, model=model)


def append(
    path: str | Path,
    corpus: str | Path | Corpus | list[Row] | None = None,
    *,
    undo: bool = False,
    progress: bool = True,
    **loading: Any,
) -> Index:
    """Let more rows join a complete index; no old part or shard is touched. Run again, it resumes.

    Args:
        path: Of the index.
        corpus: Whatever `corpus.open_corpus` takes.
        undo: In place of a corpus: drop the rows of an append that was not finished, whose corpus has changed or
            is gone. The index is then what it was before.
        progress: Show a bar on stderr.
        **loading: How to load the model: see `open_index`.

    Raises:
        MissingIndexError: The index is not complete.
        CorpusError: A row has the id of a row that is there, or cannot be read.
        SettingError: There is nothing to undo.
    """
    if (corpus is None) != undo:
        raise SettingError("append takes a corpus whose rows are to join, or --undo to drop those of an unfinished one")
    with Store.open(path).lock():
        if corpus is None:  # no model is needed, nor its code
            left = _index_of(Store.open(path), **loading)
            left.store.undo_extend()
            return left
        opened = open_index(path, **loading)
        first = _begin_joining(opened, corpus)
        opened.store.remove_leftovers()
        copy_rows(opened.store, open_corpus(corpus, first_number=first), after=first)
        _fill(opened, progress)
    return opened


def _begin_joining(opened: Index, corpus: str | Path | Corpus | list[Row]) -> int:
    """See that a corpus may join, and list it, unless that has been done; the number of its first row."""
    store = opened.store
    known = list(store.manifest.corpora)
    before = sum(entry["rows"] for entry in known)
    fingerprint = fingerprint_of(open_corpus(corpus))
    if len(known) > 1 and known[-1]["digest"] == fingerprint.digest:
        return before - known[-1]["rows"]
    store.require_complete()
    texts = open_corpus(corpus, first_number=before)
    refuse_known_ids(store, texts)
    check_conversations(texts, fingerprint.layouts, opened.model().tokenizer)  # before anything is written
    for number in range(len(store.manifest.checkpoints)):
        opened.check_moments(number)
    store.extend({"name": absolute(texts.name), "digest": fingerprint.digest, "rows": fingerprint.rows})
    return before


def verify(path: str | Path, *, repair: bool = False, **loading: Any) -> tuple[list[Problem], list[str]]:
    """Check every file of an index against its checksum, and mend what can be.

    Args:
        path: Of the index.
        repair: Recompute shards that are wrong, from the model and the index's own copy of the rows, and read a
            wrong part again from the corpus, where that is still there.
        **loading: How to load the model, to repair: see `open_index`.

    Returns:
        What was wrong (empty: nothing), and what was done about each.
    """
    problems = verify_store(path)
    if not repair or not problems or problems[0].file == "manifest.json":
        return problems, []
    with Store.open(path).lock():
        opened = open_index(path, **loading)
        notes = mend(
            opened.store,
            lambda checkpoint, part: _recomputed(opened, checkpoint, part),
            lambda part: part_again(opened.store, part),
        )
    return problems, notes


def _recomputed(opened: Index, checkpoint: int, part: int) -> ShardArrays:
    """The arrays of a shard that is there, by a job as a build's are: tried again, or told where memory runs out."""
    job = Job(checkpoint, part, opened.store.manifest.parts[part].rows)
    passes = f"the index was built with passes of {opened.tokens_per_batch:,} tokens; repair it on a larger device"

    def work(job: Job, tick: runner.Tick) -> ShardArrays:
        return _shard_arrays(opened, job.checkpoint, job.part, tick)

    ((_, arrays),) = runner.map(work, [job], engine=opened.settings.engine, less_memory=passes)
    return arrays


def _moved(path: str, now: str | None) -> str:
    """Where a checkpoint is now: `now` is its directory, or the run that it is in."""
    if now is None:
        return path
    inside = Path(now) / Path(path).name
    return str(inside) if inside.is_dir() else now


def _refuse_joining(store: Store) -> None:
    """An append that was stopped is finished by `append`: only it knows the rows that are still to come."""
    if store.manifest.joining is not None and not store.manifest.has_all_parts:
        store.require_complete()


def _fill(built: Index, progress: bool) -> None:
    """Compute every shard that is missing, checkpoint by checkpoint."""
    store = built.store
    parts = store.manifest.parts
    jobs = [Job(checkpoint, part, parts[part].rows) for checkpoint, part in store.missing()]
    total = store.rows * len(built.weights)
    done = total - sum(job.rows for job in jobs)
    with runner.progress("Indexing", total, done=done, shown=progress and bool(jobs)) as on_tick:

        def work(job: Job, tick: runner.Tick) -> Any:
            return store.write_shard_file(
                job.checkpoint, job.part, _shard_arrays(built, job.checkpoint, job.part, tick)
            )

        less = _less_memory(built)
        for _, entry in runner.map(work, jobs, engine=built.settings.engine, on_tick=on_tick, less_memory=less):
            store.add_shard(entry)


def _less_memory(built: Index) -> str:
    """What helps where a pass does not fit. Another batch size is another setting, so that finished shards are lost."""
    now = f"(now {built.tokens_per_batch:,})"
    if len(built.store.manifest.corpora) > 1:
        return f"the index was built with passes of {built.tokens_per_batch:,} tokens; append on a larger device"
    if len(built.store.manifest.shards):
        return f"lower --batch-tokens {now} and add --restart, or go on with the same command on a larger device"
    return f"lower --batch-tokens {now} and add --restart"


def _shard_arrays(built: Index, checkpoint: int, part: int, tick: runner.Tick) -> ShardArrays:
    model = built.model(checkpoint)
    longest = built.store.manifest.settings["max_tokens"]
    encoded = [_encoded(row, model, longest) for row in built.store.read_part(part)]
    arrays = example_vectors(
        model,
        built.layers(model),
        built.projection(model),
        encoded,
        settings=built.settings,
        transform=built.transform(checkpoint),
        tick=tick,
    )
    counts = {
        "truncated": sum(example.cut > 0 for example in encoded),
        "completion_truncated": sum(example.completion_cut > 0 for example in encoded),
    }
    return replace(arrays, counts=counts)


def _encoded(row: Row, model: LoadedModel, longest: int) -> Encoded:
    try:
        return encode(json.loads(row["row"]), model.tokenizer, longest)
    except CorpusError as error:
        raise CorpusError(f"row {row['id']}: {error}") from None
