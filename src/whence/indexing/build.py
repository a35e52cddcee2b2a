"""Build an index of a corpus under a run in a gradient space, append rows to it, and repair its files.

`ingest` copies the corpus' rows into parts. From then on each pair of a part and a checkpoint is one job, which
tokenises the part's rows, groups them into batches of like length, and sketches their gradients. Jobs are idempotent
and their batches depend on the part alone, so a build that is killed and run again ends with the same bytes.

With `--view adam` an index holds what the optimizer makes of the rows' gradients, by the moments in each checkpoint's
own optimizer file. Queries are plain gradients, so asking needs no such file.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from whence import runner
from whence.corpus.layouts import Row
from whence.corpus.plain_text import LINE
from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.unsupervised import refuse_unsupervised
from whence.errors import ChecksumError, ManifestMismatchError, ModelError, SettingError, StorageError
from whence.indexing.directories import verified
from whence.indexing.ingest import (
    check_conversations,
    copy_rows,
    fingerprint_of,
    reading_of,
    refuse_known_ids,
    reread_part,
)
from whence.indexing.manifest import MANIFEST, ShardEntry
from whence.indexing.opening import Index, index_of, open_index
from whence.indexing.parts import encoded_row
from whence.indexing.preparation import prepared
from whence.indexing.repair import repair as repair_store
from whence.indexing.shards import ShardArrays
from whence.indexing.store import Store
from whence.indexing.stored_settings import check_settings
from whence.indexing.vectors import (
    IndexSettings,
    corpus_entry,
    example_vectors,
    with_options,
)
from whence.indexing.verification import Problem, problems_at
from whence.models.load_options import IndexLoading
from whence.sizes import size_of
from whence.storage import Place

logger = logging.getLogger(__name__)

ZERO = "zero_gradient"
"""Count of rows that are ok and whose vector is 0, in the manifest where there are any."""


@dataclass(frozen=True)
class Job:
    """The work of one shard."""

    checkpoint: int
    part: int
    rows: int

    def __str__(self):
        return f"shard {self.part} of checkpoint {self.checkpoint}"


def index(
    model: str | Path,
    corpus: str | Path | Corpus | list[Row],
    out: str | Path,
    *,
    settings: IndexSettings | None = None,
    restart: bool = False,
    memory: int | str | None = None,
    progress: runner.ProgressOption = True,
    **options: Any,
) -> Index:
    """Build an index of a corpus' gradients, or go on with one that was stopped.

    Args:
        model: A model directory, a Trainer's output directory, an adapter directory, or a Hub name.
        corpus: Whatever `corpus.open_corpus` takes.
        out: Directory of the index, local or at an fsspec address.
        settings: Settings of the index; or fields of `IndexSettings` and `GradientSpace` by name as `options`, such as
            `projection="count_sketch", width=8192, codec="int8"`.
        restart: Remove the index in `out` and start over.
        memory: The most that the process may take at its peak, as bytes or as "800M" or "2GiB" (of a GPU, where passes
            run on one). It sets the tokens of a pass, `tokens_per_batch` at most, by a pilot on the longest rows. An
            index that was begun keeps its own.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).
        **options: See `settings`.

    Returns:
        The complete index.

    Raises:
        CorpusError: The corpus cannot be read; nothing has been written.
        ModelError: The model cannot be loaded, or has no moments for the view adam, and nothing has been written; or no
            row has a gradient, and the index is left incomplete.
        SettingError: `out` is or holds an input, a setting has a value that cannot work, or `memory` does not suffice.
        ManifestMismatchError: `out` was begun with other settings, which are named.
        StorageError: A file could not be written; the same command resumes.
    """
    chosen = with_options(settings or IndexSettings(), options)
    limit = None if memory is None else size_of(memory)
    made = prepared(model, corpus, out, chosen, restart=restart, memory=limit)
    with Place.at(out).locked():  # before anything is removed: another process may be writing
        if restart:
            Store.restart(out)
        store = Store.resume(out, made.manifest)
        _refuse_joining(store)
        built = Index(store, made.settings)
        built.adopt(made.loaded, made.transform)
        built.check_layout(made.loaded)
        copy_rows(store, made.texts, after=0)
        _fill(built, built.settings.engine, progress)
    return built


def append(
    path: str | Path,
    corpus: str | Path | Corpus | list[Row] | None = None,
    *,
    undo: bool = False,
    engine: runner.EngineOption = "local",
    progress: runner.ProgressOption = True,
    **loading: Unpack[IndexLoading],
) -> Index:
    """Append more rows to a complete index; its old files stay as they are. Run again after a stop, it resumes.

    Args:
        path: Directory of the index.
        corpus: Whatever `corpus.open_corpus` takes.
        undo: In place of a corpus: drop the rows of an unfinished append, whose corpus has changed or is gone. The
            index is then what it was before.
        engine: Where jobs run; see `runner`.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).
        **loading: How the model is loaded: see `models.load_options.IndexLoading`.

    Raises:
        MissingIndexError: The index is not complete.
        CorpusError: A row cannot be read, or has the id of a row in the index.
        SettingError: There is nothing to undo.
    """
    if (corpus is None) != undo:
        raise SettingError("append takes a corpus whose rows are to join, or --undo to drop those of an unfinished one")
    with Store.open(path).lock():
        if corpus is None:  # no model is needed, nor its code
            shortened = index_of(Store.open(path), **loading)
            shortened.store.undo_extend()
            return shortened
        opened = open_index(path, **loading)
        first = _begin_joining(opened, corpus)
        opened.store.remove_leftovers()
        reading = reading_of(opened.store.manifest, opened.store.manifest.corpora[-1])
        copy_rows(opened.store, open_corpus(corpus, first_number=first, **reading), after=first)
        _fill(opened, engine, progress)
    return opened


def _begin_joining(opened: Index, corpus: str | Path | Corpus | list[Row]) -> int:
    """Check that a corpus may join and list it, unless that has been done; returns the number of its first row."""
    store = opened.store
    known = list(store.manifest.corpora)
    before = sum(entry["rows"] for entry in known)
    asked, reading = open_corpus(corpus), reading_of(store.manifest, known[-1])
    reading |= {"columns": asked.columns} if asked.columns else {}
    reading |= {"text_rows": asked.text_rows} if asked.text_rows != LINE else {}
    fingerprint = fingerprint_of(open_corpus(corpus, **reading))
    if len(known) > 1 and known[-1]["digest"] == fingerprint.digest:
        return before - known[-1]["rows"]
    store.require_complete()
    texts = open_corpus(corpus, first_number=before, **reading)
    refuse_known_ids(store, texts)
    check_conversations(texts, fingerprint.layouts, opened.model().tokenizer)  # before anything is written
    refuse_unsupervised(texts, opened.model().tokenizer, store.manifest.settings["max_tokens"])
    for number in range(len(store.manifest.checkpoints)):
        opened.check_moments(number)
    store.extend(corpus_entry(texts, fingerprint))
    return before


def verify(
    path: str | Path,
    *,
    repair: bool = False,
    engine: runner.EngineOption = "local",
    **loading: Unpack[IndexLoading],
) -> tuple[list[Problem], list[str]]:
    """Check every file of an index against its checksum, and repair those that can be.

    Any other directory that Whence writes is checked as `directories.verified` does, and not repaired.

    Args:
        path: Directory of the index, or of a pool, a run, the work of `recover` or `evaluate`, or a merged model.
        repair: Recompute damaged shards from the model and the index's own copy of the rows, and read damaged parts
            again from the corpus, if it still exists.
        engine: Where shards are recomputed; see `runner`.
        **loading: How the model is loaded, to repair: see `models.load_options.IndexLoading`.

    Returns:
        The problems (empty: none), and a note on the repair of each.
    """
    if not Place.at(path).exists(MANIFEST):
        return verified(path).problems, []
    problems = problems_at(path) or _setting_problems(path)
    if not repair or not problems or problems[0].file == "manifest.json":
        return problems, []
    with Store.open(path).lock():
        opened = open_index(path, **loading)
        notes = repair_store(
            opened.store,
            lambda wrong: _recomputed(opened, wrong, engine),
            lambda part: reread_part(opened.store, part),
        )
    return problems, notes


def _setting_problems(path: str | Path) -> list[Problem]:
    store = Store.open(path)
    try:
        check_settings(store.place, store.manifest)
    except ChecksumError as error:
        return [Problem(MANIFEST, str(error))]
    return []


def _recomputed(opened: Index, wrong: Sequence[tuple[int, int]], engine: runner.EngineOption) -> Iterator[ShardEntry]:
    """Shards of (checkpoint, part), computed and written again by jobs like a build's."""
    jobs = [Job(checkpoint, part, opened.store.manifest.parts[part].rows) for checkpoint, part in wrong]
    advice = f"the index was built with passes of {opened.tokens_per_batch:,} tokens; repair it on a larger device"
    for _, entry in runner.map(ShardWork(opened, is_repair=True), jobs, engine=engine, less_memory=advice):
        yield entry


@dataclass(frozen=True)
class ShardWork:
    """Computes and writes shards of an index; who gives out the jobs lists them.

    A worker in another process opens the index there, whose place it must reach by the same address.
    """

    built: Index
    is_repair: bool = False
    """Whether rows must be laid out as they were when the index was built."""

    def __call__(self, job: Job, tick: runner.Tick) -> ShardEntry:
        """Write one shard."""
        built = self.built
        built.model(job.checkpoint)
        if self.is_repair and built.layout_notes:
            raise ManifestMismatchError(f"shard {job.part} cannot be computed as it was. {built.layout_notes[0]}")
        arrays = _shard_arrays(built, job.checkpoint, job.part, tick)
        return built.store.write_shard_file(job.checkpoint, job.part, arrays)


def _refuse_joining(store: Store) -> None:
    """Refuse to build on an unfinished append: only `append` knows the rows that are still to come."""
    if store.manifest.joining is not None and not store.manifest.has_all_parts:
        store.require_complete()


def _fill(built: Index, engine: runner.EngineOption, progress: runner.ProgressOption) -> None:
    """Compute every shard that is missing, checkpoint by checkpoint."""
    store = built.store
    parts = store.manifest.parts
    jobs = [Job(checkpoint, part, parts[part].rows) for checkpoint, part in store.missing()]
    total = store.rows * len(built.weights)
    done = total - sum(job.rows for job in jobs)
    with runner.progress("Indexing", total, done=done, shown=progress if jobs else False) as on_tick:
        advice = _memory_advice(built)
        try:
            for _, entry in runner.map(ShardWork(built), jobs, engine=engine, on_tick=on_tick, less_memory=advice):
                _refuse_unshared(store, entry)
                _refuse_zeros(store, entry)
                store.add_shard(entry)
        finally:
            store.flush()
    if runner.check_engine(engine).name != runner.LOCAL:
        store.remove_leftovers()  # of workers that were lost in the middle of a file


def _refuse_unshared(store: Store, entry: ShardEntry) -> None:
    """Refuse a shard that a worker wrote to a disk of its own.

    Raises:
        StorageError: It is not here.
    """
    if not store.place.exists(entry.file):
        raise StorageError(
            f"{store.place.path(entry.file)}: a worker wrote it, and it is not here: the two do not share this disk. "
            "Give a directory that all machines share, or an address such as s3://bucket/name."
        )


def _refuse_zeros(store: Store, last: ShardEntry) -> None:
    """Refuse to complete a checkpoint under which every vector is 0.

    Raises:
        ModelError: There are rows with supervised tokens, and not one has a gradient.
    """
    parts = range(len(store.manifest.parts))
    if sum(entry.checkpoint == last.checkpoint for entry in store.manifest.shards) + 1 < len(parts):
        return
    others = (store.manifest.shard(last.checkpoint, part) for part in parts if part != last.part)
    counts = [entry.counts for entry in (*others, last) if entry is not None]
    ok = sum(count["ok"] for count in counts)
    if len(counts) == len(parts) and ok and sum(count.get(ZERO, 0) for count in counts) == ok:
        path = store.manifest.checkpoints[last.checkpoint]["path"]
        raise ModelError(
            f"{path}: the gradient of every row ({ok:,}) is 0 over the traced layers, so the index could rank "
            "nothing and is left incomplete. Choose other layers with --layers, and add --restart."
        )


def _memory_advice(built: Index) -> str:
    """Advice for a pass that does not fit. Another batch size is another setting, so that finished shards are lost."""
    now = f"(now {built.tokens_per_batch:,})"
    if len(built.store.manifest.corpora) > 1:
        return f"the index was built with passes of {built.tokens_per_batch:,} tokens; append on a larger device"
    if len(built.store.manifest.shards):
        return f"lower --batch-tokens {now} and add --restart, or go on with the same command on a larger device"
    return f"lower --batch-tokens {now} and add --restart"


def _shard_arrays(built: Index, checkpoint: int, part: int, tick: runner.Tick) -> ShardArrays:
    model = built.model(checkpoint)
    longest = built.store.manifest.settings["max_tokens"]
    encoded = [encoded_row(row, model.tokenizer, longest) for row in built.store.read_part(part)]
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
    zeros = int(((arrays.norm == 0) & (arrays.status == 0)).sum())
    return replace(arrays, counts=counts | ({ZERO: zeros} if zeros else {}))
