"""What a bank is of, and whether a call is about the same bank: its protocol, its queries, its random subsets.

The protocol is written when a bank is begun, and compared in every later call: members that were trained in two ways
are no bank. Queries and members may join, random subsets only of the kind that the bank has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whence.checksums import digest
from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus
from whence.errors import CorpusError, ManifestMismatchError, SettingError
from whence.evaluation.bank_store import (
    BANK,
    LEAVE_OUT,
    ROWS,
    BankRow,
    Description,
    Protocol,
    Subsets,
    is_query_file,
    query_data,
    query_rows,
    read_description,
    read_queries,
    read_rows,
    write_description,
    write_queries,
    write_rows,
)
from whence.evaluation.left_out import MemberPlan, full_plan, group_plans, listed_plan, random_plans
from whence.evaluation.member_training import encoded_queries, require_measurable
from whence.local_files import TEMPORARY
from whence.models.loading import directory_digest
from whence.models.runs import open_run
from whence.storage import Place
from whence.training.recipe import check_seed
from whence.training.repetition import Repeatable

FRACTION = 0.5
"""Share of the rows that a random subset keeps, unless a call says otherwise."""


@dataclass(frozen=True, kw_only=True)
class BankSettings:
    """What to leave out, and how. None leaves the word to the bank, where there is one, else to the default."""

    subsets: int = 0
    """Random subsets that the bank is to have; 0: none are added."""
    fraction: float | None = None
    """Share of the rows that a random subset keeps; 0.5."""
    by: str | None = None
    """Column of whose groups each is left out in turn."""
    rows: Sequence[str | Path] = ()
    """Files whose column `id` lists rows; those of one file are left out together."""
    leave_out: str | None = None
    """How rows leave: "zero" or "drop"; see `bank_store.Protocol`. "zero"."""
    keep_weights: bool | None = None
    """Keep members' final weights, on which other queries can be measured later; False."""
    seed: int | None = None
    """Seed of the random subsets; 0."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, by the name of their flag."""
        if self.subsets < 0 or self.subsets == 1:
            raise SettingError(f"--subsets {self.subsets}: two or more are expected, as one says nothing of others")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise SettingError(f"--fraction {self.fraction}: a share above 0 and below 1 is expected")
        if self.leave_out not in (None, *LEAVE_OUT):
            raise SettingError(f"--leave-out {self.leave_out}: choose one of {', '.join(LEAVE_OUT)}")
        if self.seed is not None:
            check_seed(self.seed)
        for name in ("fraction", "seed"):
            if not self.subsets and (value := getattr(self, name)) is not None:
                raise SettingError(f"--{name} {value}: it is of random subsets: add --subsets N, or leave it out")

    @property
    def asks_for_members(self) -> bool:
        """Whether anything is to be left out."""
        return bool(self.subsets or self.by is not None or self.rows)


def require_work(place: Place, chosen: BankSettings, *, has_queries: bool) -> None:
    """Refuse a call by which a bank could not be begun, or would not change.

    Raises:
        SettingError: There is nothing to leave out, or there are no queries.
    """
    is_begun = place.exists(BANK)
    if not is_begun and not has_queries:
        raise SettingError("--queries: a file of held-out rows is expected, whose losses the bank keeps")
    if not chosen.asks_for_members and not (is_begun and has_queries):
        raise SettingError("nothing to leave out: give --subsets N, --by COLUMN or --rows FILE")
    if not is_begun and (others := [name for name in place.names() if not _is_beginning(name)]):
        raise SettingError(
            f"-o {place.root}: it holds {others[0]} already, and no {BANK}. Name another directory, or an empty one."
        )


def _is_beginning(name: str) -> bool:
    """Whether a file is one that a bank has before its `bank.json`."""
    return name.removesuffix(TEMPORARY) in (ROWS, BANK) or is_query_file(name.removesuffix(TEMPORARY))


def claimed(
    place: Place, training: Repeatable, corpus: Corpus, chosen: BankSettings, asked: Corpus | None
) -> tuple[Description, list[MemberPlan]]:
    """What the bank is from now on, begun or as it was with what joins it; and all members that are asked for.

    Nothing is written before it is known that all of it can be.

    Raises:
        ManifestMismatchError: The bank there is another one.
    """
    queries = [] if asked is None else checked_queries(asked)
    known = read_description(place) if place.exists(BANK) else None
    if known is not None:
        refuse_differences(place, known, training, chosen)
    subsets = subsets_of(chosen, None if known is None else known.subsets, place.root)
    rows = bank_rows(training, corpus) if known is None else read_rows(place, known)
    plans = requested_plans(rows, subsets, chosen, training.opened.settings.seed)
    if known is None:
        require_measurable(encoded_queries(training, queries), "--queries" if asked is None else asked.name)
        description = Description(
            protocol=_protocol(training, chosen.leave_out or "zero", keep_weights=bool(chosen.keep_weights)),
            rows=write_rows(place, rows),
            queries=(write_queries(place, 0, queries),),
            subsets=subsets,
        )
    else:
        description = replace(known, subsets=subsets)
        if asked is not None:
            description = _with_queries(place, description, queries, asked.name)
    write_description(place, description)
    return description, plans


def requested_plans(
    rows: Sequence[BankRow], subsets: Subsets | None, chosen: BankSettings, seed: int
) -> list[MemberPlan]:
    """All members that a call asks for, the training on all rows first."""
    plans = [full_plan(seed)]
    if chosen.subsets:
        assert subsets is not None
        plans += random_plans(len(rows), chosen.subsets, subsets, seed)
    if chosen.by is not None:
        plans += group_plans(rows, chosen.by, seed)
    plans += [listed_plan(file, rows, seed) for file in chosen.rows]
    return [*{plan.name: plan for plan in plans}.values()]


def _protocol(training: Repeatable, leave_out: Any, *, keep_weights: bool) -> Protocol:
    opened = training.opened
    return Protocol(
        leave_out=leave_out,
        run=str(training.run.resolve()),
        run_weights=directory_digest(open_run(training.run).checkpoints[-1].path),
        model=str(opened.source),
        model_weights=directory_digest(opened.source),
        corpus=opened.corpus,
        rows_digest=training.record["rows_digest"],
        training=opened.settings.record(),
        keep_weights=keep_weights,
    )


def refuse_differences(place: Place, known: Description, training: Repeatable, chosen: BankSettings) -> None:
    """Refuse a bank of another run or protocol, naming each difference; a place that has moved is none."""
    before = known.protocol
    keeps = before.keep_weights if chosen.keep_weights is None else chosen.keep_weights
    now = _protocol(training, chosen.leave_out or before.leave_out, keep_weights=keeps)
    found = [
        (name, getattr(before, name), getattr(now, name))
        for name in ("leave_out", "keep_weights", "run_weights", "model_weights", "rows_digest")
    ]
    names = sorted(before.training.keys() | now.training.keys())
    found += [(name, before.training.get(name), now.training.get(name)) for name in names]
    differing = [f"{name} {_short(old)} there, {_short(new)} here" for name, old, new in found if old != new]
    if differing:
        raise ManifestMismatchError(
            f"{place.root}: the bank there has other settings: {'; '.join(differing).replace('_', ' ')}. Give the "
            "same, or name another directory."
        )


def _short(value: Any) -> str:
    return str(value) if len(str(value)) <= 24 else f"{str(value)[:12]}..."


def subsets_of(chosen: BankSettings, known: Subsets | None, where: str = "") -> Subsets | None:
    """The random subsets of a bank: those that it has, or those that are asked for first."""
    if not chosen.subsets:
        return known
    seed, fraction = chosen.seed, chosen.fraction
    if known is None:
        return Subsets(fraction=FRACTION if fraction is None else fraction, seed=seed or 0)
    asked = Subsets(
        fraction=known.fraction if fraction is None else fraction, seed=known.seed if seed is None else seed
    )
    if asked != known:
        raise ManifestMismatchError(
            f"{where}: its random subsets have --fraction {known.fraction} and --seed {known.seed}, not "
            f"{asked.fraction} and {asked.seed}. Give the same, or name another directory."
        )
    return known


def checked_queries(corpus: Corpus) -> list[Row]:
    """The rows of a corpus as queries.

    Raises:
        CorpusError: An id is given twice.
    """
    queries = query_rows(corpus)
    _refuse_twice([str(query["id"]) for query in queries], corpus.name)
    return queries


def _refuse_twice(ids: Sequence[str], where: str) -> None:
    if len(set(ids)) < len(ids):
        known: set[str] = set()
        twice = next(id for id in ids if id in known or known.add(id))
        raise CorpusError(
            f"{where}: the id {twice!r} is given twice, and a bank tells rows by their ids. Make them unique."
        )


def bank_rows(training: Repeatable, corpus: Corpus) -> list[BankRow]:
    """The rows of the training, with the corpus rows that they were made of."""
    rows = training.opened.rows
    _refuse_twice(rows.ids, corpus.name)
    wanted = set(rows.ids)
    texts = {example.id: example.row for example in corpus if example.id in wanted}
    return [
        BankRow(id, source, len(row["input_ids"]), int(row["supervised"].sum()), texts[id])
        for id, source, row in zip(rows.ids, rows.sources, rows.rows, strict=True)
    ]


def _with_queries(place: Place, known: Description, queries: list[Row], name: str) -> Description:
    """The bank with queries that are not in it yet.

    Raises:
        SettingError: They are others, and the bank's members have no weights to measure them on.
        CorpusError: Some of them are in the bank already.
    """
    if digest([query_data(queries)]) in (entry["xxh3"] for entry in known.queries):
        return known
    if not known.protocol.keep_weights:
        raise SettingError(
            f"--queries {name}: other queries than the bank's, whose members have no weights to measure them on. Begin "
            "a bank with --keep-weights, or leave --queries out."
        )
    ids = {str(query["id"]) for query in read_queries(place, known)}
    if again := [str(query["id"]) for query in queries if str(query["id"]) in ids]:
        raise CorpusError(f"--queries {name}: {again[0]!r} is in the bank already. Give the other queries alone.")
    entry = write_queries(place, len(known.queries), queries)
    return replace(known, queries=(*known.queries, entry))
