"""A bank as files: what is written is read, arrays follow from members, and damage or another version is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch

from whence.errors import ChecksumError, FormatVersionError, ManifestMismatchError, MissingBankError
from whence.evaluation.bank_store import (
    BankRow,
    Description,
    Member,
    Protocol,
    open_bank,
    read_members,
    write_description,
    write_member,
    write_queries,
    write_rows,
)
from whence.storage import Place

ROW = {"prompt": "a", "completion": "b"}
ROWS = [BankRow(f"r{n}", None if n % 2 else "wiki", 9, 4, {"id": f"r{n}", **ROW}) for n in range(4)]
QUERIES = [{"text": "x\u2028y", "id": "q0"}, {"text": "z", "id": "q1"}]
PROTOCOL = Protocol(
    leave_out="zero", run="/run", run_weights="0" * 64, model="/m", model_weights="1" * 64, corpus="c.jsonl",
    rows_digest="2" * 64, training={"lr": 1e-3, "epochs": 2}, keep_weights=False,
)  # fmt: skip


def member(name, kind="random", left_out=(), losses=(1.0, 2.0), **more):
    rest = {"seed": 0, "steps": 3, "seconds": 1.5} | more
    return Member(name=name, kind=kind, left_out=left_out, losses=losses, **rest)


@pytest.fixture
def place(tmp_path):
    """A bank of two subsets and a group."""
    place = Place.at(tmp_path / "bank")
    rows, queries = write_rows(place, ROWS), write_queries(place, 0, QUERIES)
    write_description(place, Description(protocol=PROTOCOL, rows=rows, queries=(queries,)))
    write_member(place, member("parent", "parent", losses=(4.0, 5.0), steps=0))
    write_member(place, member("full", "full", losses=(1.0, 2.0)))
    write_member(place, member("random-0001", left_out=(0, 3), losses=(1.5, math.nan)))
    write_member(place, member("random-0000", left_out=(1, 2), losses=(1.25, 2.5)))
    write_member(place, member("group-wiki", "group", (0, 2), (3.0, 3.0), label="wiki"))
    return place


def test_arrays_follow_the_members(place):
    bank = open_bank(place.root)
    assert [member.name for member in bank.members] == ["group-wiki", "random-0000", "random-0001"]
    assert bank.included("random").tolist() == [[True, False, False, True], [False, True, True, False]]
    assert bank.included().shape == (3, 4) and bank.losses().shape == (3, 2)
    torch.testing.assert_close(
        bank.losses("random"), torch.tensor([[1.25, 2.5], [1.5, torch.nan]]).double(), equal_nan=True
    )
    assert bank.losses("rows").shape == (0, 2) and bank.included("rows").shape == (0, 4)
    assert (bank.full_losses.tolist(), bank.parent_losses.tolist()) == ([1.0, 2.0], [4.0, 5.0])


def test_rows_queries_and_protocol_come_back(place):
    bank = open_bank(place.root)
    assert bank.rows == tuple(ROWS) and bank.queries == tuple(QUERIES) and bank.protocol == PROTOCOL
    assert (bank.row_ids[3], bank.sources[:2], bank.query_ids) == ("r3", ("wiki", None), ("q0", "q1"))
    assert repr(bank).startswith(f"Bank({place.root}, 3 retrainings of /run on 4 rows, 2 queries)")


@pytest.mark.parametrize(
    "name", ["bank_rows.parquet", "queries/000.jsonl", "members/random-0000/member.json", "bank.json"]
)
def test_damage_is_found(place, name):
    data = bytearray(place.read(name))
    data[len(data) // 2] ^= 1
    place.write(name, [bytes(data)], total=len(data))
    with pytest.raises(ChecksumError, match=name.rpartition("/")[2]):
        open_bank(place.root)


def test_a_member_of_another_name_or_of_no_rows_is_refused(place):
    place.write_document("members/random-0002/member.json", json.loads(json.dumps(vars(member("random-0000")))))
    with pytest.raises(ChecksumError, match="random-0000, or its rows"):
        open_bank(place.root)
    place.remove("members/random-0002/member.json")
    write_member(place, member("random-0002", left_out=(4,)))
    with pytest.raises(ChecksumError, match="row 4 of 4 was left out"):
        open_bank(place.root)


def test_what_is_no_bank_or_not_yet_one_is_refused(place, tmp_path):
    with pytest.raises(MissingBankError, match=r"no bank here.*whence bank RUN CORPUS"):
        open_bank(tmp_path / "none")
    place.remove("members/full/member.json")
    with pytest.raises(MissingBankError, match="before its training on all rows was done"):
        open_bank(place.root)


def test_a_newer_format_is_refused(place):
    place.write_document("bank.json", place.read_document("bank.json") | {"format_version": 2, "more": 1})
    with pytest.raises(FormatVersionError, match="format 2, and this version of Whence reads 1"):
        open_bank(place.root)


def test_members_that_lack_added_queries_are_named(place):
    from whence.evaluation.bank_store import read_description

    before = read_description(place)
    more = write_queries(place, 1, [{"text": "w", "id": "q2"}])
    write_description(place, replace(before, queries=(*before.queries, more)))
    with pytest.raises(ManifestMismatchError, match="of its 3 queries 5 members are not measured on all"):
        open_bank(place.root)
    for one in read_members(place, before).values():
        write_member(place, replace(one, losses=(*one.losses, 7.0)))
    assert open_bank(place.root).losses()[:, 2].tolist() == [7.0, 7.0, 7.0]
