"""The training behind an index, for methods that go back through it: its rows are rows of the index.

The page answers with the index' model, so that the run has to end with those weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence.corpus.reading import row_json
from whence.errors import ManifestMismatchError
from whence.explorer.corpus_rows import CorpusRows
from whence.indexing.opening import Index
from whence.models.loading import directory_digest
from whence.models.runs import open_run
from whence.runner import ProgressOption
from whence.tracing.queries import EncodedQuery
from whence.tracing.replaying import scores_of_run
from whence.training.replayed_run import ReplayableRun


@dataclass(frozen=True)
class IndexedRun:
    """A run that can be replayed."""

    run: ReplayableRun
    path: str
    """Its directory, as it was given."""
    rows: Int64[Tensor, " n"]
    """Row of the index for each row that was trained on."""
    count: int
    """Rows of the index."""

    @classmethod
    def of(cls, path: str | Path, index: Index, rows: CorpusRows, opened: ReplayableRun) -> "IndexedRun":
        """An open run beside the index that is of it.

        Raises:
            ManifestMismatchError: It was trained on other rows than the index has: of other ids, or other contents.
        """
        again = f"Index the corpus of the run: whence index {path} CORPUS -o INDEX"
        places = {name: number for number, name in enumerate(rows.ids)}
        trained = dict(zip(opened.places.tolist(), opened.ids, strict=True))
        for place, example in enumerate(opened.corpus):
            if (name := trained.get(place)) is None:
                continue
            if name not in places:
                what = "does not have"
            elif rows.row(places[name]) != json.loads(row_json(example.row)):
                what = "has with another content"
            else:
                continue
            raise ManifestMismatchError(
                f"--run {path}: it was trained on row {name}, which {index.store.place.root} {what}. {again}"
            )
        return cls(opened, str(path), torch.tensor([places[name] for name in opened.ids]), len(rows))

    @staticmethod
    def require_weights(path: str | Path, index: Index) -> None:
        """Refuse a run that an index is not of.

        Raises:
            ManifestMismatchError: It ends with other weights than the index' model has.
        """
        last = open_run(str(path)).checkpoints[-1].path
        entry = index.store.manifest.checkpoints[-1]
        if directory_digest(last) != entry["digest"]:
            raise ManifestMismatchError(
                f"--run {path}: it ends with other weights than those that {index.store.place.root} is of, "
                f"{entry['path']}. Index this run: whence index {path} CORPUS -o INDEX"
            )

    def scores(
        self, query: EncodedQuery, method: str, *, progress: ProgressOption = False
    ) -> tuple[Float32[Tensor, " m"], list[str]]:
        """Scores of the index' rows, -inf where one was not trained on; and what is to be known of them.

        Larger is more helpful: by "replay" about how many nats a token the loss would rise without the row.
        """
        # Every stretch that somebody points at is a replay: what is left behind of those given up would fill the disk.
        found = scores_of_run(self.run, [query.sequences], method, is_resumable=False, progress=progress)
        scores = torch.full((self.count,), -torch.inf)
        scores[self.rows] = found.scores[0].float()
        return scores, found.notes
