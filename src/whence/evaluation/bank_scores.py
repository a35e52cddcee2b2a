"""Methods held against a bank of retrainings: their scores of its rows, what they cost, and how well they predict it.

A method's cost is told as a multiple of one training of the bank on all rows: what it costs to know a row's influence
by training once more. (A training without half of the rows is shorter, as their passes are left out.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from whence.corpus.reading import open_corpus
from whence.errors import ManifestMismatchError
from whence.evaluation.bank_spread import measured
from whence.evaluation.bank_store import Bank, open_bank
from whence.evaluation.lds import LdsTable, lds
from whence.evaluation.method_scores import (
    MethodName,
    MethodScores,
    check_costs,
    check_methods,
    kept_note,
    score_methods,
    with_costs,
)
from whence.evaluation.score_files import scores_from_file
from whence.indexing.opening import Index, open_index
from whence.models.loading import directory_digest, load_model
from whence.models.runs import open_run
from whence.paths import exists
from whence.runner import ProgressOption, shown_as
from whence.selection.views import CorpusView, IndexView

if TYPE_CHECKING:
    from whence.selection.run_view import RunView  # which brings the Trainer


@dataclass(frozen=True)
class LdsResult:
    """What `evaluate_lds` returns."""

    table: LdsTable
    """Methods side by side, best first."""
    seconds: Mapping[str, float | None]
    """What each method's scores cost; None where nobody knows."""
    training_seconds: float
    """What one training of the bank costs."""
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        """The table, and how to go on."""
        return f"LdsResult\n{self.table!r}\n  More: .rows(), .table.difference(METHOD, OTHER), .seconds"

    @property
    def costs(self) -> dict[str, float | None]:
        """Costs as multiples of one training of the bank."""
        return {name: None if seconds is None or not self.training_seconds else seconds / self.training_seconds
                for name, seconds in self.seconds.items()}  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """Plain rows, best first."""
        return self.table.rows(seconds=self.seconds, trainings=self.costs)


def evaluate_lds(
    bank: str | Path | Bank,
    methods: Sequence[str] = (),
    *,
    index: Mapping[str, str] | str | None = None,
    scores: Mapping[str, str] | None = None,
    given: Sequence[MethodScores] = (),
    costs: Mapping[str, float] | None = None,
    index_seconds: float | None = None,
    run: str | Path | None = None,
    model: str | Path | None = None,
    seed: int = 0,
    resamples: int = 2000,
    progress: ProgressOption = False,
) -> LdsResult:
    """Grade methods by the linear datamodeling score of a bank's random subsets.

    Args:
        bank: A bank of `whence bank`.
        methods: Names in `catalogue.GRADED`, with options (`less:within=mean_cosine`) or an index (`less@adam`).
        index: An index of the bank's rows, or several by name; the one without a name (or the only one) is read where a
            method names none.
        scores: Files of scores by the name of the method; see `score_files`.
        given: Scores that are at hand, of the bank's queries and rows in their order.
        costs: Seconds by method, where they were measured elsewhere.
        index_seconds: What making an index took, added for methods that read its vectors.
        run: Where the bank's run is, if it has moved.
        model: Where the model is that the run was trained from, or that of an index of another model, if it has moved.
        seed: Seed of methods that draw, and of the intervals.
        resamples: Number of resamples of an interval.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).

    Raises:
        SettingError: Fewer than two subsets, no method, or one that cannot score the bank's rows.
        ManifestMismatchError: The run or a model is not there, or has changed since.
        MissingBankError: There is no bank.
    """
    opened = bank if isinstance(bank, Bank) else open_bank(bank)
    with shown_as(progress, "Scoring"):
        scored = bank_scores(opened, methods, index=index, scores=scores, given=given, costs=costs,
                             index_seconds=index_seconds, run=run, model=model, seed=seed)  # fmt: skip
    by_name = {method.name: method.scores for method in scored}
    included, losses = opened.included("random"), opened.losses("random")
    table = lds(by_name, included, losses, seed=seed, resamples=resamples)
    settings = {"bank": opened.place.root, "run": str(run or opened.protocol.run), "subsets": len(losses),
                "queries": len(opened.queries), "rows": len(opened.rows), "leave_out": opened.protocol.leave_out,
                "seed": seed, "resamples": resamples}  # fmt: skip
    seconds = {method.name: method.seconds for method in scored}
    table.notes.extend(kept_note(scored, opened.place.root))
    return LdsResult(table, seconds, opened.training_seconds, settings)


def bank_scores(
    bank: Bank,
    methods: Sequence[str],
    *,
    index: Mapping[str, str] | str | None = None,
    scores: Mapping[str, str] | None = None,
    given: Sequence[MethodScores] = (),
    costs: Mapping[str, float] | None = None,
    index_seconds: float | None = None,
    run: str | Path | None = None,
    model: str | Path | None = None,
    seed: int = 0,
) -> list[MethodScores]:
    """Scores of a bank's rows for each of its queries, by methods and files; for the arguments see `evaluate_lds`.

    A query that has no loss in any member has no score: NaN.

    Raises:
        SettingError: No method, two of one name, or one that cannot score the bank's rows. All is known before the
            first method scores.
    """
    names, files = [*dict.fromkeys(methods)], scores or {}
    graded = [*names, *(method.name for method in given)]
    check_methods(graded, files)
    check_costs(costs or {}, [*graded, *files])
    read = [scores_from_file(name, path, bank.row_ids, bank.query_ids) for name, path in files.items()]
    scored, has_loss = list[MethodScores](), measured(bank)
    if names:
        indexes = {"": index} if isinstance(index, str) else dict(index or {})
        views = {name: IndexView(_complete_index(path, bank, run, model)) for name, path in indexes.items()}
        view = views.get("", next(iter(views.values()), None)) or bank_view(bank, names, run)
        replays = any(MethodName.of(name).entry.needs_run for name in names)
        queries = [query for query, asks in zip(bank.queries, has_loss.tolist(), strict=True) if asks]
        scored = score_methods(
            names, queries, view, bank.row_ids, indexes=views, run=_replayed_run(bank, run, model) if replays else None,
            index_seconds=index_seconds, max_tokens=bank.protocol.training.get("max_tokens"), seed=seed,
            place=bank.place,
        )  # fmt: skip
    return with_costs([*(_for_all(method, has_loss) for method in scored), *read, *given], costs or {})


def _for_all(method: MethodScores, has_loss: Bool[Tensor, " q"]) -> MethodScores:
    """Scores for the queries that have a loss, with lines of NaN for the others."""
    scores = torch.full((len(has_loss), method.scores.shape[1]), torch.nan)
    scores[has_loss] = method.scores.float()
    return replace(method, scores=scores)


def bank_view(bank: Bank, methods: Sequence[str], run: str | Path | None = None) -> CorpusView:
    """The bank's rows as scorers read them; the run's last model is loaded where a method needs one."""
    loaded = None
    if any(MethodName.of(name).entry.needs_model for name in methods):
        loaded = load_model(open_run(run_of(bank, run)).checkpoints[-1].path)
    return CorpusView(open_corpus(bank.corpus_rows), loaded, max_tokens=bank.protocol.training.get("max_tokens"))


def run_of(bank: Bank, moved: str | Path | None = None) -> str:
    """The run that members repeat, where it is now.

    Raises:
        ManifestMismatchError: It is not there, or has other weights.
    """
    where = str(moved or bank.protocol.run)
    found = directory_digest(open_run(where).checkpoints[-1].path) if exists(where) else None
    if found != bank.protocol.run_weights:
        what = "no run is there" if found is None else "it has other weights than the run"
        raise ManifestMismatchError(f"{where}: {what} that {bank.place.root} is the bank of. Name that run by --run.")
    return where


def _replayed_run(bank: Bank, run: str | Path | None, model: str | Path | None) -> "RunView":
    """The bank's run as methods that replay it read it: from the rows in the bank, wherever the corpus is now."""
    from whence.selection.run_view import RunView

    return RunView.of(run_of(bank, run), bank.corpus_rows, model=model, is_sampled=True)


def _complete_index(path: str, bank: Bank, run: str | Path | None, model: str | Path | None) -> Index:
    """An index whose model is looked for where the bank's run is now, if it was made of that run."""
    opened = open_index(path, model=None if model is None else str(model))
    if run is not None and Path(opened.store.manifest.checkpoints[-1]["path"]).is_relative_to(bank.protocol.run):
        opened = open_index(path, model=str(run))
    opened.store.require_complete()
    return opened
