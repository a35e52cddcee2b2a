"""A run that can be replayed, as scorers read it: the corpus that it was trained on, and the model at its end."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from whence.brief import brief
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus
from whence.selection.views import CorpusView
from whence.training.replayed_run import ReplayableRun, open_replayable


@dataclass(frozen=True)
class RunView(CorpusView):
    """All rows of the corpus, also those that the training did not read."""

    __repr__ = brief

    run: ReplayableRun = field(kw_only=True)

    @staticmethod
    def of(
        run: str | Path,
        corpus: str | Path | Corpus | Iterable[Row] | None = None,
        *,
        model: str | Path | None = None,
        is_sampled: bool = False,
        flag: str = "--model",
    ) -> "RunView":
        """Open a run; for arguments and errors see `open_replayable`."""
        opened = open_replayable(run, corpus, model=model, is_sampled=is_sampled, flag=flag)
        return RunView(opened.corpus, opened.model, opened.settings.max_tokens, run=opened)
