"""The training behind an index, for methods that go back through it: its rows are rows of the index.

The page answers with the index' model, so that the run has to end with those weights.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence.errors import ManifestMismatchError
from whence.explorer.corpus_rows import CorpusRows
from whence.indexing.opening import Index
from whence.models.loading import directory_digest
from whence.models.runs import open_run
from whence.runner import ProgressOption
from whence.tracing.queries import EncodedQuery
from whence.tracing.replaying import scores_of_run
from whence.training.replayed_run import ReplayableRun, open_replayable


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
    def of(cls, path: str | Path, index: Index, rows: CorpusRows) -> "IndexedRun":
        """Open the run that an index is of.

        Raises:
            ManifestMismatchError: It ends with other weights than the index' model has, or was trained on other rows.
            MissingLogError: It does not say what it did at each step.
        """
        last = open_run(str(path)).checkpoints[-1].path
        entry = index.store.manifest.checkpoints[-1]
        again = f"whence index {path} CORPUS -o INDEX"
        if directory_digest(last) != entry["digest"]:
            raise ManifestMismatchError(
                f"--run {path}: it ends with other weights than those that {index.store.place.root} is of, "
                f"{entry['path']}. Index this run: {again}"
            )
        opened = open_replayable(path)
        places = {name: number for number, name in enumerate(rows.ids)}
        if absent := [name for name in opened.ids if name not in places]:
            raise ManifestMismatchError(
                f"--run {path}: it was trained on row {absent[0]}, which {index.store.place.root} does not have. "
                f"Index the corpus of the run: {again}"
            )
        return cls(opened, str(path), torch.tensor([places[name] for name in opened.ids]), len(rows))

    def scores(
        self, query: EncodedQuery, method: str, *, progress: ProgressOption = False
    ) -> tuple[Float32[Tensor, " m"], list[str]]:
        """Scores of the index' rows, -inf where one was not trained on; and what is to be known of them.

        Larger is more helpful: by "replay" about how many nats a token the loss would rise without the row.
        """
        found = scores_of_run(self.run, [query.sequences], method, progress=progress)
        scores = torch.full((self.count,), -torch.inf)
        scores[self.rows] = found.scores[0].float()
        return scores, found.notes
