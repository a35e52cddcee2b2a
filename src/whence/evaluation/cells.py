"""The cells of an evaluation as files: one training's marks on one task, and beside them the seconds that it took.

A cell is stored as soon as it is graded, and its file is named after all that it depends on, so that an evaluation that
was stopped goes on. Wall times differ from run to run: they stand in `costs.json` alone, so that the cells of two runs
are the same bytes.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from whence.records import Count, MisfitError, fitting, read_record, unlike_written
from whence.storage import AGAIN, Place

COSTS = "costs.json"
SECONDS = ("train_seconds", "select_seconds")
"""Entries of a cell that an older Whence wrote."""


@dataclass(frozen=True)
class Cell:
    """The marks of one trained model, or of the untrained one, on one task."""

    method: str
    task: str
    seed: int
    rows: Count
    """Rows of the choice that it was trained on; they have `tokens` tokens."""
    tokens: Count
    loss: list[float]
    exact: list[float]
    inputs: str = ""
    """Digest of the model that was trained and of the rows of the choice."""

    @property
    def file(self) -> str:
        """Its file's name; a method's and a task's names may hold any character."""
        digest = hashlib.sha256(f"{self.method}\n{self.task}\n{self.inputs}".encode()).hexdigest()[:16]
        return f"cell-{digest}-{self.seed}.json"


@dataclass(frozen=True)
class Seconds:
    """Wall time."""

    train: float = 0.0
    select: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Wall times by the name of the file that they made."""

    seconds: dict[str, Seconds] = field(default_factory=dict)

    @staticmethod
    def read(place: Place) -> "Costs":
        """The costs of a directory; none where there is no file of them."""
        if not place.exists(COSTS):
            return Costs()
        return read_record(Costs, place.read(COSTS), place.path(COSTS), AGAIN)

    def of(self, file: str) -> Seconds:
        """The cost of a file; zero where it is not known."""
        return self.seconds.get(file, Seconds())


def add_costs(place: Place, costs: Mapping[str, Seconds]) -> None:
    """Add wall times to a directory's."""
    place.write_document(COSTS, asdict(Costs({**Costs.read(place).seconds, **costs})))


def store_cells(place: Place, cells: Sequence[Cell], seconds: Seconds) -> None:
    """Write the cells of one training, which took so long."""
    add_costs(place, dict.fromkeys((cell.file for cell in cells), seconds))
    for cell in cells:
        place.write_document(cell.file, asdict(cell))


def stored_cells(
    place: Place, method: str, seed: int, inputs: str, tasks: Mapping[str, Collection[object]]
) -> list[Cell] | None:
    """The cells of one training on tasks of so many graded rows; None unless all are stored.

    Raises:
        ChecksumError: A file is damaged, or is of another training.
    """
    cells = [_stored_cell(place, Cell(method, task, seed, 0, 0, [], [], inputs), len(tasks[task])) for task in tasks]
    stored = [cell for cell in cells if cell is not None]
    return stored if len(stored) == len(cells) else None


def _stored_cell(place: Place, expected: Cell, rows: int) -> Cell | None:
    name = expected.file
    if not place.exists(name):
        return None
    where = place.path(name)
    document = read_record(dict[str, object], place.read(name), where, AGAIN)
    try:
        cell = fitting(Cell, {key: value for key, value in document.items() if key not in SECONDS})
    except MisfitError as error:
        raise unlike_written(where, error, AGAIN) from None
    if document.keys() & {*SECONDS} and name not in Costs.read(place).seconds:
        add_costs(place, {name: Seconds(*(float(str(document.get(key, 0))) for key in SECONDS))})
    if cell.file != name or not len(cell.loss) == len(cell.exact) == rows:
        what = (
            f"it has {len(cell.loss)} losses of {cell.method}, seed {cell.seed}; {rows} of {expected.method} are graded"
        )
        raise unlike_written(where, what, AGAIN)
    return cell
