"""What the fields of a result have in common, beyond their kinds: lengths, numbers of rows, keys that reports read.

A file is not believed (`result_json`): what would fail only when it is shown is refused when it is opened. Each
function here raises `MisfitError`, which says where the file is not as Whence writes it.
"""

from collections.abc import Iterable, Sized
from typing import TYPE_CHECKING, Annotated, NotRequired, TypedDict

from whence.corpus.layouts import Row, shown_text
from whence.errors import CorpusError
from whence.records import Between, MisfitError, fitting

if TYPE_CHECKING:
    from whence.ablation.pipeline import Ablation
    from whence.recovery.pipeline import Recovered
    from whence.selection.pipeline import Chosen
    from whence.tracing.results import Answer, Hit, Trace


class _SelectSettings(TypedDict):
    method: str
    selector: str


class _RecoverSettings(TypedDict):
    method: str
    shadow: NotRequired[str]


class _RecoveredRow(TypedDict):
    whence_score: float
    whence_p: float
    whence_weight: NotRequired[float]


class _SourceShare(TypedDict):
    source: str
    share: float
    low: float
    high: float
    tokens: float
    tokens_low: float
    tokens_high: float


class _Layer(TypedDict):
    name: str
    norm: float
    noise: float
    signal: float
    relative: float | None
    unchanged: float
    carries_signal: bool


_Amount = Annotated[float, Between(0.0, 1e300)]
_Cost = TypedDict(
    "_Cost",
    {
        "candidates": _Amount,
        "reading seconds": _Amount,
        "pool tokens": _Amount,
        "tokens of training every candidate": _Amount,
        "break-even candidates": _Amount,
    },
)


def check_trace(trace: "Trace") -> None:
    """Refuse a trace whose hits are of other answers, or whose lists are not one entry an answer."""
    count = len(trace.answers)
    for name in ("verdicts", "levels", "overlaps", "rerankings", "stabilities"):
        _one_each(f"fields.{name}", getattr(trace, name), count, "answer", or_none=True)
    if trace.verdicts and not trace.levels:
        raise MisfitError("fields.levels is empty, and fields.verdicts is not")
    for number, answer in enumerate(trace.answers):
        _check_answer(answer, f"fields.answers[{number}]")
    for number, hit in enumerate(trace.hits):
        place = f"fields.hits[{number}]"
        _within(f"{place}.query", hit.query, count)
        _check_text(hit.row, f"{place}.row")
        _check_tokens(hit, f"{place}.tokens")


def _check_answer(answer: "Answer", place: str) -> None:
    count = len(answer.tokens)
    _one_each(f"{place}.probabilities", answer.probabilities, count, "token")
    _one_each(f"{place}.asked", answer.asked, count, "token", or_none=True)
    count = len(answer.contrast_tokens)
    _one_each(f"{place}.contrast_probabilities", answer.contrast_probabilities, count, "token")


def _check_tokens(hit: "Hit", place: str) -> None:
    if hit.tokens is not None:
        train = len(hit.tokens.train)
        _one_each(f"{place}.supervised", hit.tokens.supervised, train, "token")
        if hit.tokens.matrix.shape != (len(hit.tokens.query), train):
            raise MisfitError(f"{place}.matrix is of the shape {[*hit.tokens.matrix.shape]}")


def check_selection(chosen: "Chosen") -> None:
    """Refuse a selection of rows that are not there, or whose lists are of other lengths."""
    fitting(_SelectSettings, chosen.settings, "fields.settings")
    selection, total = chosen.selection, len(chosen.selection.reasons)
    _one_each("fields.candidates.sources", chosen.candidates.sources, total, "row")
    for name in ("scores", "targets"):
        _one_each(f"fields.selection.{name}", getattr(selection, name), len(selection.rows), "chosen row")
    _one_each("fields.rows", chosen.rows, len(selection.rows), "chosen row")
    if unknown := {*selection.targets} - {None, *chosen.candidates.targets}:
        raise MisfitError(f"fields.candidates.targets is without {sorted(map(str, unknown))[0]}")
    for number in selection.rows:
        _within("fields.selection.rows", number, total)
    _check_texts(chosen.rows)


def check_recovery(recovery: "Recovered") -> None:
    """Refuse a recovery of rows that are not there, or whose dictionaries lack what is read of them."""
    fitting(_RecoverSettings, recovery.settings, "fields.settings")
    fitting(list[_RecoveredRow], recovery.rows, "fields.rows")
    fitting(list[_SourceShare], recovery.mixture, "fields.mixture")
    fitting(list[_Layer], recovery.layers, "fields.layers")
    _one_each("fields.numbers", recovery.numbers, len(recovery.rows), "row")
    _one_each("fields.p_values", recovery.p_values, len(recovery.scores), "row of the corpus")
    if recovery.learned is not None:
        calibration, known = recovery.learned.calibration, recovery.scores[recovery.scores.isfinite()]
        _one_each("fields.learned.calibration.names", calibration.names, len(calibration.weights), "weight")
        if not ((known >= 0) & (known <= 1)).all():
            raise MisfitError("fields.scores has a value that is no probability")
    for number in recovery.numbers:
        _within("fields.numbers", number, len(recovery.scores))
    _check_texts(recovery.rows)


def check_ablation(ablation: "Ablation") -> None:
    """Refuse an ablation that lacks a mixture's loss on a set, or the weights of a mixture."""
    sets = {cell.set for cell in ablation.cells}
    pairs = {(cell.mixture, cell.set) for cell in ablation.cells}
    mixtures = {mixture for mixture, _ in pairs}
    if len(pairs) != len(mixtures) * len(sets) or len(pairs) != len(ablation.cells):
        raise MisfitError("fields.cells is not one of each mixture and set")
    if unknown := mixtures - {candidate.name for candidate in ablation.candidates}:
        raise MisfitError(f"fields.candidates is without {min(unknown)}")
    if "break-even candidates" in ablation.cost:
        fitting(_Cost, ablation.cost, "fields.cost")


def _check_texts(rows: Iterable[Row]) -> None:
    for number, row in enumerate(rows):
        _check_text(row, f"fields.rows[{number}]")


def _check_text(row: Row, place: str) -> None:
    """Refuse a row that no layout reads."""
    try:
        shown_text(row)
    except CorpusError as error:
        raise MisfitError(f"{place} is no row of a corpus: {error}") from None


def _one_each(place: str, values: Sized, count: int, thing: str, *, or_none: bool = False) -> None:
    if len(values) != count and not (or_none and not len(values)):
        raise MisfitError(f"{place} has {len(values)} entries, not one for each {thing}, {count}")


def _within(place: str, number: int, count: int) -> None:
    if not 0 <= number < count:
        raise MisfitError(f"{place} names {number}, of {count}")
