"""Methods held against a bank of retrainings: their scores of its rows, what they cost, and how well they predict it.

A method's cost is told as a multiple of one training of the bank on all rows: what it costs to know a row's influence
by training once more. (A training without half of the rows is shorter, as their passes are left out.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whence.corpus.reading import open_corpus
from whence.errors import SettingError
from whence.evaluation.bank_store import Bank, open_bank
from whence.evaluation.lds import LdsTable, lds
from whence.evaluation.method_scores import MethodName, MethodScores, score_methods, with_costs
from whence.evaluation.score_files import scores_from_file
from whence.indexing.opening import open_index
from whence.models.loading import load_model
from whence.models.runs import open_run
from whence.runner import ProgressOption, shown_as
from whence.selection.views import CorpusView, IndexView


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
    model: str | None = None,
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
        model: Where the bank's run has moved; with an index, where the index' model has.
        seed: Seed of methods that draw, and of the intervals.
        resamples: Number of resamples of an interval.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).

    Raises:
        SettingError: Fewer than two subsets, no method, or one that cannot score the bank's rows.
        MissingBankError: There is no bank.
    """
    opened = bank if isinstance(bank, Bank) else open_bank(bank)
    with shown_as(progress, "Scoring"):
        scored = bank_scores(opened, methods, index=index, scores=scores, given=given, costs=costs,
                             index_seconds=index_seconds, model=model, seed=seed)  # fmt: skip
    by_name = {method.name: method.scores for method in scored}
    included, losses = opened.included("random"), opened.losses("random")
    table = lds(by_name, included, losses, seed=seed, resamples=resamples)
    settings = {"bank": opened.place.root, "subsets": len(losses), "queries": len(opened.queries),
                "rows": len(opened.rows), "leave_out": opened.protocol.leave_out, "seed": seed,
                "resamples": resamples}  # fmt: skip
    seconds = {method.name: method.seconds for method in scored}
    return LdsResult(table, seconds, training_seconds(opened), settings)


def bank_scores(
    bank: Bank,
    methods: Sequence[str],
    *,
    index: Mapping[str, str] | str | None = None,
    scores: Mapping[str, str] | None = None,
    given: Sequence[MethodScores] = (),
    costs: Mapping[str, float] | None = None,
    index_seconds: float | None = None,
    model: str | None = None,
    seed: int = 0,
) -> list[MethodScores]:
    """Scores of a bank's rows for each of its queries, by methods and files; for the arguments see `evaluate_lds`.

    Raises:
        SettingError: No method, two of one name, or one that cannot score the bank's rows.
    """
    names = [*dict.fromkeys(methods)]
    if twice := [name for name in names if name in (scores or {})]:
        raise SettingError(f"--scores {twice[0]}: --methods has that name too; give the file's another")
    if not names and not scores and not given:
        raise SettingError("no method to grade: name some with --methods, or files with --scores NAME=FILE")
    scored: list[MethodScores] = []
    if names:
        indexes = {"": index} if isinstance(index, str) else dict(index or {})
        views = {name: IndexView(_complete_index(path, model)) for name, path in indexes.items()}
        first = views.get("", next(iter(views.values()), None))
        view = first or bank_view(bank, names, model)
        ids = bank.row_ids if isinstance(view, IndexView) else None
        scored = score_methods(names, bank.queries, view, ids, indexes=views, index_seconds=index_seconds, seed=seed)
    scored += [scores_from_file(name, path, bank.row_ids, bank.query_ids) for name, path in (scores or {}).items()]
    scored += given
    return with_costs(scored, costs or {})


def bank_view(bank: Bank, methods: Sequence[str], model: str | None = None) -> CorpusView:
    """The bank's rows as scorers read them; the run's last model is loaded where a method needs one."""
    loaded = None
    if any(MethodName.of(name).entry.needs_model for name in methods):
        loaded = load_model(open_run(model or bank.protocol.run).checkpoints[-1].path)
    rows = [row.row for row in bank.rows]
    return CorpusView(open_corpus(rows), loaded, max_tokens=bank.protocol.training.get("max_tokens"))


def training_seconds(bank: Bank) -> float:
    """Wall time of one training on all rows: mean over the members that left none out."""
    seconds = [member.seconds for member in (bank.full, *bank.members) if not member.left_out]
    return sum(seconds) / len(seconds)


def _complete_index(path: str, model: str | None):
    opened = open_index(path, model=model)
    opened.store.require_complete()
    return opened
