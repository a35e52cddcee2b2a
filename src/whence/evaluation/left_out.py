"""Which rows each member of a bank leaves out: random subsets, one group after another, rows that files list.

Random subset k keeps `round(fraction * n)` of n rows, drawn by its own seed, and is the same however many there are: a
bank grows, and no member of it is trained again.

A member's name tells its rows, so that the same request finds the member that is there already.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from whence.corpus.reading import rows_with_place
from whence.counts import number_of
from whence.errors import CorpusError, SettingError
from whence.evaluation.bank_store import FULL, BankRow, Kind, Subsets
from whence.numerics import generator


@dataclass(frozen=True)
class MemberPlan:
    """A member to train."""

    name: str
    kind: Kind
    label: str
    left_out: tuple[int, ...]
    """Numbers of rows, ascending."""
    seed: int
    """Seed of the training."""

    def __str__(self) -> str:
        """Its name, in messages."""
        return f"the training {self.name}"


def full_plan(seed: int) -> MemberPlan:
    """The training on all rows."""
    return MemberPlan(FULL, "full", "", (), seed)


def random_plans(n: int, count: int, subsets: Subsets, seed: int) -> list[MemberPlan]:
    """Random subsets of n rows.

    Args:
        n: Rows of the training.
        count: Subsets.
        subsets: Which ones.
        seed: Seed of the trainings.

    Raises:
        SettingError: A subset would keep no row, or all.

    >>> [plan.left_out for plan in random_plans(5, 2, Subsets(fraction=0.6, seed=0), 0)]
    [(0, 2), (3, 4)]
    """
    kept = round(subsets.fraction * n)
    if not 0 < kept < n:
        raise SettingError(
            f"--fraction {subsets.fraction} of {number_of(n, 'row')} keeps {kept:,}; from 1 to {n - 1:,} are expected"
        )
    plans = []
    for number in range(count):
        order = torch.randperm(n, generator=generator(subsets.seed, "bank", str(number)))
        left_out = tuple(order[kept:].sort().values.tolist())
        plans.append(MemberPlan(f"random-{number:04d}", "random", f"subset {number}", left_out, seed))
    return plans


def group_plans(rows: Sequence[BankRow], by: str, seed: int) -> list[MemberPlan]:
    """Every group of rows left out in turn: the rows of one value of a column. A row without a value has no group.

    Raises:
        SettingError: There are fewer than two groups.
    """
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        value = row.source if by == "source" else row.id if by == "id" else row.row.get(by)
        if value is not None:
            groups.setdefault(value if isinstance(value, str) else json.dumps(value, default=str), []).append(number)
    if not groups:
        columns = ", ".join(sorted({name for row in rows[:100] for name in row.row}))
        raise SettingError(f"--by {by}: no row of the training has this column. The first rows have {columns}.")
    if len(groups) == 1:
        value, numbers = next(iter(groups.items()))
        raise SettingError(
            f"--by {by}: all {number_of(len(numbers), 'row')} with a value have {value!r}; two groups or more are "
            "expected"
        )
    return [
        MemberPlan(f"group-{_slug(f'{by}={value}')}", "group", f"{by} {value}", tuple(numbers), seed)
        for value, numbers in groups.items()
    ]


def listed_plan(file: str | Path, rows: Sequence[BankRow], seed: int) -> MemberPlan:
    """The rows that a file lists left out together: its column `id`, as `trace` and `select` write it.

    Raises:
        CorpusError: The file cannot be read, a row of it has no id, or an id is of no row of the training.
        SettingError: It lists all rows.
    """
    numbers = {row.id: number for number, row in enumerate(rows)}
    listed: dict[str, str] = {}
    for where, row in rows_with_place(str(file), columns={}):
        if row.get("id") is None:
            raise CorpusError(f"{where}: no `id`, which says which row is to be left out.")
        listed.setdefault(str(row["id"]), where)
    if not listed:
        raise CorpusError(f"{file}: no rows. A file of rows to leave out lists one or more.")
    if unknown := [id for id in listed if id not in numbers]:
        raise CorpusError(
            f"{listed[unknown[0]]}: the id {unknown[0]!r} is of no row that the run was trained on, as are "
            f"{len(unknown):,} of {number_of(len(listed), 'id')} there. Give rows of the run's corpus."
        )
    return rows_plan(Path(file).name, [numbers[id] for id in listed], len(rows), seed, where=str(file))


def rows_plan(label: str, left_out: Iterable[int], n: int, seed: int, *, where: str = "") -> MemberPlan:
    """Some rows of n left out together, under a label; the message of a refusal says where they were listed."""
    numbers = tuple(sorted({*left_out}))
    if len(numbers) == n:
        raise SettingError(
            f"{where or label}: it lists all {number_of(n, 'row')} of the training, and none would be left"
        )
    digest = hashlib.sha256(json.dumps([*numbers, seed]).encode()).hexdigest()[:10]
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", label.partition(".")[0]).strip("-")[:40]
    return MemberPlan(f"rows-{plain}-{digest}" if plain else f"rows-{digest}", "rows", label, numbers, seed)


def _slug(name: str) -> str:
    """A directory's name for a group.

    >>> _slug("source=code/C++")
    'source-code-C-5d22cc852d'
    """
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:40]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
