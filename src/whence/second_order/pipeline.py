"""Measure the curvature of a model's loss over the rows of an index, and keep it: the job of `whence curvature`.

Two passes over rows drawn at random (`sampled_rows`), one for K-FAC's factors and one for EK-FAC's eigenvalues, in the
order of the index and in pieces of `ROWS_AT_ONCE` rows, so that a measurement which was stopped goes on from its last
writing and ends with the same bytes. It is of the index' last checkpoint, and of the gradients as they are, whatever
the view of its vectors.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from torch import Tensor, nn

from whence import runner
from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.indexing.opening import Index, open_index
from whence.indexing.parts import encoded_row
from whence.models.layers import matching_layers
from whence.models.load_options import IndexLoading
from whence.models.loading import LoadedModel
from whence.outputs import refuse_inputs
from whence.second_order.eigen import ekfac_sums, kfac
from whence.second_order.factors import Factors, kfac_factors
from whence.second_order.fisher import Drawing
from whence.second_order.sampled_rows import sampled_rows
from whence.second_order.store import CurvatureStore, Kind, Measured, kind_of
from whence.storage import Place

READING = ("tokenizer", "max_tokens", "dtype", "supervise", "date", "layout_version")
"""Settings of an index that say what the tokens of its rows are, and how its model is loaded."""
ROWS_AT_ONCE = 256
"""Rows whose sums are added at once."""
EVERY = 60.0
"""Seconds between two writings of unfinished sums, at least."""
PATIENCE = 10.0
"""The same, in times of what a writing takes."""


def curvature(
    index: str | Path | Index,
    out: str | Path,
    *,
    kind: str = "ekfac",
    rows: int | None = None,
    layers: str | None = None,
    empirical: bool = False,
    seed: int = 0,
    restart: bool = False,
    progress: runner.ProgressOption = True,
    **loading: Unpack[IndexLoading],
) -> CurvatureStore:
    """Measure curvature, or go on where a measurement was stopped.

    Args:
        index: A complete index.
        out: Directory to write to.
        kind: "kfac" takes one pass over the rows, and "ekfac" two.
        rows: The most rows to measure; if the index has more, so many are drawn. None: as many as
            `sampled_rows` finds enough.
        layers: Names of the layers to measure, as patterns; None: those of the index. Scores read these alone.
        empirical: Take the rows' own answers in place of drawn ones.
        seed: Of the answers that the model draws, and of the rows.
        restart: Remove what is in `out`, and begin anew.
        progress: Show a bar on stderr; or a function to call with (done, total, what is being done).
        **loading: How the model is loaded.

    Raises:
        MissingIndexError: The index is not complete.
        SettingError: No row can be measured, the rows are contrasts of two answers, or `out` is an input.
        ManifestMismatchError: `out` was begun with other settings, which are named.
        StorageError: A file could not be written; the same command resumes.
    """
    chosen = kind_of(kind)
    subject = Subject.of(index, rows=rows, layers=layers, seed=seed, **loading)
    refuse_inputs(out, [subject.index.store.place.root], is_directory=True)
    measured = subject.measured(chosen, empirical=empirical, seed=seed)
    with Place.at(out).locked():
        store = CurvatureStore.begin(out, measured, restart=restart)
        return _Measurement(subject, store, progress).completed()


@dataclass(frozen=True)
class Subject:
    """What a measurement reads."""

    index: Index
    layers: Mapping[str, nn.Module]
    numbers: tuple[int, ...]
    """Rows that are measured, ascending."""
    of_rows: int
    """Rows of the index that can be ranked."""

    @staticmethod
    def of(
        index: str | Path | Index, *, rows: int | None, layers: str | None, seed: int, **loading: Unpack[IndexLoading]
    ) -> "Subject":
        """Open an index and its model; for arguments and errors see `curvature`."""
        if rows is not None and rows < 1:
            raise SettingError(f"--rows {rows}: at least 1 is expected")
        opened = index if isinstance(index, Index) else open_index(index, **loading)
        opened.store.require_complete()
        root = opened.store.place.root
        if opened.has_contrasts:
            raise SettingError(
                f"{root}: its rows are contrasts of two answers (--preferences contrast), and curvature is of one "
                "answer's loss. Index the corpus without that flag."
            )
        rankable = opened.store.rankable()
        if not len(rankable):
            raise SettingError(f"{root}: none of its rows can be measured. See: whence info {root}")
        model = opened.model()
        traced = opened.layers(model)
        chosen = traced if layers is None else matching_layers(traced, traced, layers)
        if not chosen:
            raise SettingError(f"--layers {layers}: it leaves all layers of {root} out")
        drawn = rankable[sampled_rows(opened.store.supervised_tokens()[rankable], chosen, seed=seed, rows=rows)]
        return Subject(opened, chosen, tuple(drawn.tolist()), len(rankable))

    @property
    def model(self) -> LoadedModel:
        """The last checkpoint's."""
        return self.index.model()

    def measured(self, kind: Kind, *, empirical: bool, seed: int) -> Measured:
        """What a document says of it."""
        manifest = self.index.store.manifest
        return Measured(
            kind=kind,
            seed=seed,
            is_empirical=empirical,
            model=manifest.checkpoints[-1]["path"],
            model_digest=manifest.checkpoints[-1]["digest"],
            index=self.index.store.place.root,
            corpora=tuple(corpus["digest"] for corpus in manifest.corpora),
            rows=len(self.numbers),
            of_rows=self.of_rows,
            layers=tuple(self.layers),
            reading={name: manifest.settings.get(name) for name in READING},
        )

    def encoded(self, numbers: Sequence[int]) -> list[Encoded]:
        """Rows of the index as token ids."""
        store, tokenizer = self.index.store, self.model.tokenizer
        longest = store.manifest.settings["max_tokens"]
        return [encoded_row(row, tokenizer, longest) for row in store.read_rows(numbers)]

    def pieces(self, done: int) -> Iterator[tuple[int, list[Encoded]]]:
        """The rows after the first `done`, in pieces, each with the number of rows that are done after it."""
        for first in range(done, len(self.numbers), ROWS_AT_ONCE):
            some = self.numbers[first : first + ROWS_AT_ONCE]
            yield first + len(some), self.encoded(some)


@dataclass
class _Measurement:
    """The stages that a measurement has left."""

    subject: Subject
    store: CurvatureStore
    progress: runner.ProgressOption
    started: float = field(default_factory=time.perf_counter)
    due: float = field(default_factory=lambda: time.perf_counter() + EVERY)
    """When unfinished sums are written next."""
    before: float = 0.0
    """Seconds of the commands before this one."""

    def completed(self) -> CurvatureStore:
        """Go through them."""
        self.before = self.store.description.seconds
        if self.store.description.stage == "factors":
            self.store.save_kfac(kfac(self._factors()), self._seconds)
        if self.store.description.stage == "eigenvalues":
            eigenvalues = {name: total.div_(self.store.measured.rows) for name, total in self._squares().items()}
            self.store.save_eigenvalues(eigenvalues, self._seconds)
        return self.store

    @property
    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def _save(self, write: Callable[[], None]) -> None:
        """Write unfinished sums if it is time to: not for a minute after the last time, nor ten times what it took."""
        start = time.perf_counter()
        if start < self.due:
            return
        write()
        end = time.perf_counter()
        self.due = end + max(EVERY, PATIENCE * (end - start))

    @property
    def _how(self) -> Drawing:
        measured = self.store.measured
        return {"seed": measured.seed, "is_empirical": measured.is_empirical,
                "tokens_per_batch": self.subject.index.tokens_per_batch}  # fmt: skip

    def _factors(self) -> dict[str, Factors]:
        subject, done, layers = self.subject, self.store.description.done, self.store.measured.layers
        sums = self.store.factors(subject.model.device) if done else {}
        with runner.progress("Measuring covariances", self.store.measured.rows, done=done, shown=self.progress) as tick:
            for end, rows in subject.pieces(done):
                some = kfac_factors(subject.model, subject.layers, rows, **self._how)
                for name in layers:  # one layer's at a time: all of them twice may not fit
                    layer = some.pop(name)
                    sums[name] = layer if name not in sums else sums[name].grown_by(layer)
                tick(len(rows), sum(len(row.ids) for row in rows))
                if end < self.store.measured.rows:
                    self._save(lambda end=end: self.store.save_factors(sums, end, self._seconds))
        return sums

    def _squares(self) -> dict[str, Tensor]:
        subject, done, device = self.subject, self.store.description.done, self.subject.model.device
        layers = self.store.measured.layers
        bases, sums = self.store.curvature(device=device), self.store.squares(device) if done else {}
        with runner.progress("Measuring eigenvalues", self.store.measured.rows, done=done, shown=self.progress) as tick:
            for end, rows in subject.pieces(done):
                some = ekfac_sums(subject.model, subject.layers, bases, rows, **self._how)
                for name in layers:
                    total = some.pop(name)
                    sums[name] = total if name not in sums else sums[name].add_(total)
                tick(len(rows), sum(len(row.ids) for row in rows))
                if end < self.store.measured.rows:
                    self._save(lambda end=end: self.store.save_squares(sums, end, self._seconds))
        return sums
