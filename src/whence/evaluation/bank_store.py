"""A bank of real retrainings on disk: what the loss of every query became when some rows were left out of a training.

    BANK/bank.json                    protocol; files of rows and queries with their checksums; kinds of random subsets
    BANK/bank_rows.parquet            rows of the training in its order: id, source, tokens, and the corpus row as JSON
    BANK/queries/000.jsonl            corpus rows whose losses are measured; later commands add files
    BANK/members/NAME/member.json     a training: the rows that were left out, its seed, the loss of every query
    BANK/members/NAME/weights/        its final model, where the bank keeps weights
    BANK/scores/                      scores of methods that were graded (`kept_scores`)

A member is written once it is trained and measured, so that a bank that was stopped goes on member by member. Two of
them are always there: `full`, a training on all rows by the same code, and `parent`, the model before any training. A
query's loss is the mean over its supervised tokens, in nats: lower is better, and NaN where it cannot be measured.

The bank holds the rows and the queries themselves: a method is held against it without the corpus at hand.
"""

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, TypedDict, get_args

import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from whence.checksums import Written
from whence.corpus.layouts import Row
from whence.corpus.reading import row_json
from whence.corpus.row_files import parquet_file
from whence.counts import number_of
from whence.errors import FormatVersionError, ManifestMismatchError, MissingBankError
from whence.models.saved_files import directory_here
from whence.records import Count, FastDigest, read_record, unlike_written
from whence.storage import FileEntry, Place
from whence.training.recipe import LeaveOut

BANK, ROWS, MEMBERS = "bank.json", "bank_rows.parquet", "members"
FORMAT_VERSION = 1
FULL, PARENT = "full", "parent"
"""Names and kinds of the two members that every bank has."""
LEAVE_OUT: tuple[LeaveOut, ...] = get_args(LeaveOut)
REMEDY = "Restore it from a copy, or make the bank again in another directory."
Kind = Literal["parent", "full", "random", "group", "rows", "removal", "addition"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What all members of a bank have in common."""

    leave_out: LeaveOut
    """How rows leave. "zero": they keep their places in the batches and add nothing, so that steps, rates, order and
    denominators stay. "drop": a training on the other rows alone, by the same recipe."""
    run: str
    """Directory of the training that members repeat without some rows."""
    run_weights: str
    """Digest of its final weights."""
    model: str
    """Directory or Hub name of the model that every training starts from."""
    model_weights: str
    """Digest of that model."""
    corpus: str
    """Name of the corpus."""
    rows_digest: str
    """Digest of the rows' tokens, as the run's record has it."""
    training: Mapping[str, Any]
    """Settings of `train`, as the run's record has them."""
    keep_weights: bool
    """Whether the final weights of members are kept."""


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """Which random subsets a bank has: subset k keeps `round(fraction * n)` of n rows, whatever their number."""

    fraction: float
    seed: Count


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """How far the training on all rows, made again for the bank, ended from the run's own weights."""

    largest: float
    """Largest difference of a weight, as a share of the largest change of a weight by training; 0: the same bits."""
    cosine: float
    """Cosine of the two changes of all trained weights."""


class QueryFile(TypedDict):
    """A file of queries."""

    file: Annotated[str, re.compile(r"queries/[0-9]{3,}\.jsonl")]
    bytes: Count
    xxh3: FastDigest
    rows: Count


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of `bank.json`."""

    format_version: int = FORMAT_VERSION
    protocol: Protocol
    rows: FileEntry
    queries: tuple[QueryFile, ...]
    subsets: Subsets | None = None
    """None as long as no random subset was asked for."""
    repetition: Repetition | None = None
    """None until the training on all rows is made."""
    notes: tuple[str, ...] = ()
    """Sentences on the protocol that a reader of its numbers has to know."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One training without some rows, and what it did to the queries."""

    name: Annotated[str, re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")]
    kind: Kind
    label: str = ""
    """What was left out, in words: a group's value, or the name of a file of ids."""
    left_out: tuple[Count, ...] = ()
    """Numbers of the rows that were left out, ascending."""
    seed: Count
    """Seed of the training: order of rows, dropout, start of adapters."""
    losses: tuple[float, ...]
    """Mean loss over each query's supervised tokens, in nats; NaN where it has none or the loss is not finite."""
    steps: Count
    seconds: float
    """Wall time of the training."""
    weights: str | None = None
    """Directory of the final model below the bank; None where it was not kept."""


@dataclass(frozen=True)
class BankRow:
    """A row of the training."""

    id: str
    source: str | None
    tokens: int
    """All its tokens, as trained on."""
    supervised: int
    """Those of them that have a loss."""
    row: Row
    """The corpus row."""


LEAST_KEPT = 0.4
"""Share of the tokens from which on a training's time is by the tokens that it reads, not by what all trainings do."""


@dataclass(frozen=True)
class Bank:
    """Retrainings of one run, of which each left other rows out. Open one with `open_bank`."""

    place: Place
    description: Description
    rows: tuple[BankRow, ...]
    """Rows of the training, in its order (`training_rows.Rows`)."""
    queries: tuple[Row, ...]
    """Corpus rows whose losses are measured; each has an `id`."""
    full: Member
    """The training on all rows."""
    parent: Member
    """The model before training."""
    members: tuple[Member, ...]
    """The others, by name."""

    def __repr__(self) -> str:
        """Where it is, of what, and how to go on."""
        return (
            f"Bank({self.place.root}, {number_of(len(self.members), 'retraining')} of {self.protocol.run} on "
            f"{number_of(len(self.rows), 'row')}, {number_of(len(self.queries), 'query', 'queries')})\n"
            "  More: .included(), .losses(), .full_losses, .parent_losses, .members, .protocol"
        )

    @property
    def protocol(self) -> Protocol:
        """What all members have in common."""
        return self.description.protocol

    @cached_property
    def row_ids(self) -> tuple[str, ...]:
        """Ids of the rows, all different."""
        return tuple(row.id for row in self.rows)

    @property
    def corpus_rows(self) -> list[Row]:
        """The corpus rows, each with its id: the corpus of the training, where that is not at hand."""
        return [{**row.row, "id": row.id} for row in self.rows]

    @property
    def sources(self) -> tuple[str | None, ...]:
        """Sources of the rows, where they have one."""
        return tuple(row.source for row in self.rows)

    @property
    def query_ids(self) -> tuple[str, ...]:
        """Ids of the queries, all different."""
        return tuple(str(query["id"]) for query in self.queries)

    @property
    def full_losses(self) -> Float64[Tensor, " q"]:
        """Loss of each query after a training on all rows, by the same code as the members'."""
        return torch.tensor(self.full.losses, dtype=torch.float64)

    @property
    def parent_losses(self) -> Float64[Tensor, " q"]:
        """Loss of each query before training."""
        return torch.tensor(self.parent.losses, dtype=torch.float64)

    @cached_property
    def training_seconds(self) -> float:
        """Wall time of one training on all rows in seconds, the unit of what methods cost.

        One training beside other work says little: it is the median over all members that kept two fifths of the
        tokens or more. Each counts by the tokens that it kept; or as it is, where the median is then nearer to the time
        of the training on all rows (rows that leave keep their places where dropout draws masks).
        """
        tokens = [row.tokens for row in self.rows]
        every, total = (self.full, *self.members), sum(tokens)
        shares = [1 - sum(tokens[row] for row in member.left_out) / total for member in every]
        some = [(member.seconds, share) for member, share in zip(every, shares, strict=True) if share >= LEAST_KEPT]
        candidates = median(seconds / share for seconds, share in some), median(seconds for seconds, _ in some)
        return min(candidates, key=lambda seconds: abs(math.log(max(seconds, 1e-9) / max(self.full.seconds, 1e-9))))

    def of_kind(self, kind: Kind | None = None) -> tuple[Member, ...]:
        """Members of a kind, in the order of their names; None: all."""
        return tuple(member for member in self.members if kind in (None, member.kind))

    def included(self, kind: Kind | None = None) -> Bool[Tensor, "m n"]:
        """Whether a row was trained on, by member (of a kind, in the order of `of_kind`) and row."""
        members = self.of_kind(kind)
        included = torch.ones(len(members), len(self.rows), dtype=torch.bool)
        for line, member in zip(included, members, strict=True):
            line[list(member.left_out)] = False
        return included

    def losses(self, kind: Kind | None = None) -> Float64[Tensor, "m q"]:
        """Loss of each query in nats a token, by member (of a kind, in the order of `of_kind`) and query."""
        members = self.of_kind(kind)
        return torch.tensor([member.losses for member in members], dtype=torch.float64).reshape(
            len(members), len(self.queries)
        )

    def weights(self, member: Member) -> Path | None:
        """Directory of a member's final model; None where it was not kept."""
        return (
            None if member.weights is None else directory_here(self.place, member.weights, remove_member(member.name))
        )


def open_bank(path: str | Path) -> Bank:
    """Open a bank of which every member that is listed is whole.

    Raises:
        MissingBankError: There is no bank, or it has not come as far as its training on all rows.
        FormatVersionError: A newer Whence wrote it.
        ChecksumError: A file of it is damaged.
        ManifestMismatchError: Queries were added, and some members are not measured on them yet.
    """
    place = Place.at(path)
    description = read_description(place)
    queries, members = read_queries(place, description), read_members(place, description)
    for name in (PARENT, FULL):
        if name not in members:
            raise MissingBankError(
                f"{path}: a bank that was stopped before its training on all rows was done. Run the same `whence bank` "
                "command again: it goes on from there."
            )
    if unmeasured := [name for name, member in members.items() if len(member.losses) < len(queries)]:
        raise ManifestMismatchError(
            f"{path}: of its {len(queries):,} queries {number_of(len(unmeasured), 'member')} are not measured on all, "
            f"such as {unmeasured[0]}. Run the `whence bank` command that added queries again: it goes on from there."
        )
    rows = read_rows(place, description)
    for member in members.values():
        if member.left_out and member.left_out[-1] >= len(rows):
            what = f"row {member.left_out[-1]:,} of {len(rows):,} was left out"
            raise unlike_written(place.path(member_file(member.name)), what, remove_member(member.name))
    full, parent = members.pop(FULL), members.pop(PARENT)
    return Bank(place, description, rows, queries, full, parent, tuple(members.values()))


def read_description(place: Place) -> Description:
    """The content of a bank's `bank.json`; for errors see `open_bank`."""
    if not place.exists(BANK):
        raise MissingBankError.at(place.root)
    data, where = place.read_committed(BANK), place.path(BANK)
    found = read_record(_Format, data, where, REMEDY)["format_version"]
    if found != FORMAT_VERSION:
        raise FormatVersionError(
            f"{where}: format {found}, and this version of Whence reads {FORMAT_VERSION}: install the version that "
            "wrote it"
        )
    description = read_record(Description, data, where, REMEDY)
    if description.rows["file"] != ROWS or [entry["file"] for entry in description.queries] != [
        query_file(number) for number in range(len(description.queries))
    ]:
        raise unlike_written(where, "it names other files of rows or queries", REMEDY)
    return description


class _Format(TypedDict):
    format_version: int


def write_description(place: Place, description: Description) -> None:
    """Write `bank.json`, whole or not at all."""
    place.write_document(BANK, asdict(description), is_commit=True)


def query_file(number: int) -> str:
    """Name of a file of queries."""
    return f"queries/{number:03d}.jsonl"


def is_query_file(name: str) -> bool:
    """Whether a name is that of a file of queries."""
    return re.fullmatch(r"queries/[0-9]{3,}\.jsonl", name) is not None


def member_file(name: str) -> str:
    """Name of a member's file."""
    return f"{MEMBERS}/{name}/member.json"


def write_rows(place: Place, rows: Sequence[BankRow]) -> FileEntry:
    """Write the rows of the training, and return what `bank.json` says of the file."""
    columns = {
        "id": pyarrow.array([row.id for row in rows], pyarrow.string()),
        "source": pyarrow.array([row.source for row in rows], pyarrow.string()),
        "tokens": pyarrow.array([row.tokens for row in rows], pyarrow.int64()),
        "supervised": pyarrow.array([row.supervised for row in rows], pyarrow.int64()),
        "row": pyarrow.array([row_json(row.row) for row in rows], pyarrow.string()),
    }
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, compression="zstd")
    return _written(place, ROWS, sink.getvalue())


def read_rows(place: Place, description: Description) -> tuple[BankRow, ...]:
    """The rows of the training.

    Raises:
        ChecksumError: The file is damaged.
    """
    data = _checked(place, description.rows)
    table = parquet_file(pyarrow.BufferReader(data)).read(use_threads=False)
    columns = [table[name].to_pylist() for name in ("id", "source", "tokens", "supervised", "row")]
    return tuple(BankRow(*values[:-1], row=json.loads(values[-1])) for values in zip(*columns, strict=True))


def write_queries(place: Place, number: int, queries: Sequence[Row]) -> QueryFile:
    """Write a file of queries, and return what `bank.json` says of it."""
    return {**_written(place, query_file(number), query_data(queries)), "rows": len(queries)}


def query_data(queries: Sequence[Row]) -> bytes:
    """Queries as the bytes of a file of them."""
    return "".join(row_json(query) + "\n" for query in queries).encode()


def read_queries(place: Place, description: Description) -> tuple[Row, ...]:
    """All queries, in the order in which they were added.

    Raises:
        ChecksumError: A file is damaged.
    """
    lines = [line for entry in description.queries for line in _checked(place, entry).splitlines()]
    return tuple(json.loads(line) for line in lines)


def write_member(place: Place, member: Member) -> None:
    """Write what a training did, whole or not at all; with its weights, these are written first."""
    place.write_document(member_file(member.name), asdict(member))


def read_members(place: Place, description: Description) -> dict[str, Member]:
    """All members that are done, by name, sorted; the full one and the parent among them.

    Raises:
        ChecksumError: A file is damaged, is of another member, or says what no member can.
    """
    end = "/member.json"
    names = [name for name in place.names() if name.startswith(f"{MEMBERS}/") and name.endswith(end)]
    members = (_read_member(place, name.removeprefix(f"{MEMBERS}/").removesuffix(end)) for name in names)
    known = sum(entry["rows"] for entry in description.queries)
    out: dict[str, Member] = {}
    for member in members:
        if len(member.losses) > known:
            what = f"{number_of(len(member.losses), 'loss', 'losses')} of {known:,} queries"
            raise unlike_written(place.path(member_file(member.name)), what, remove_member(member.name))
        out[member.name] = member
    return out


def _read_member(place: Place, name: str) -> Member:
    file, remedy = member_file(name), remove_member(name)
    member = read_record(Member, place.read(file), place.path(file), remedy)
    left_out = list(member.left_out)
    if member.name != name or left_out != sorted(set(left_out)):
        what = f"it is of the member {member.name}, or its rows are not in their order"
        raise unlike_written(place.path(file), what, remedy)
    return member


def remove_member(name: str) -> str:
    """The remedy for a damaged member."""
    return f"Remove {MEMBERS}/{name}, and run the same `whence bank` command again: it trains that member alone."


def _written(place: Place, name: str, data: bytes) -> FileEntry:
    written = place.write(name, [data], total=len(data))
    assert written.xxh3 is not None
    return {"file": name, "bytes": written.bytes, "xxh3": written.xxh3}


def _checked(place: Place, entry: FileEntry | QueryFile) -> bytes:
    """The bytes of a file, once it is known that they are those that were written."""
    try:
        data = place.read(entry["file"])
    except (FileNotFoundError, NotADirectoryError):
        data = None
    place.check(entry["file"], Written(entry["bytes"], None, entry["xxh3"]), REMEDY, data=data)
    assert data is not None
    return data


def query_rows(examples: Iterable[Any]) -> list[Row]:
    """Examples of a corpus as queries: their rows, each with its id."""
    return [{**example.row, "id": example.id} for example in examples]
