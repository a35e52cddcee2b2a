"""JSON becomes a dataclass only where every value is of the annotated kind."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from whence.errors import ChecksumError
from whence.records import Between, Count, Digest, read_record


class Inner(TypedDict):
    """An open record."""

    share: Annotated[float, Between(0.0, 1.0)]
    note: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A record of every kind."""

    file: Annotated[str, re.compile(r"part-[0-9]{2}")]
    kind: Literal["a", "b"]
    inner: tuple[Inner, ...]
    counts: Mapping[str, Count]
    is_done: bool
    loss: float | None = None
    digest: Digest | None = None
    anything: Any = None


GOOD = {"file": "part-01", "kind": "a", "inner": [{"share": 1, "more": []}], "counts": {"x": 3}, "is_done": True}


def read(content):
    return read_record(Outer, json.dumps(content).encode(), "DIR/outer.json", "Mend it")


def test_what_fits_is_read():
    record = read(GOOD | {"loss": math.nan, "digest": "0" * 64, "anything": [None]})
    assert record.inner == ({"share": 1, "more": []},) and record.counts == {"x": 3}
    assert math.isnan(record.loss) and read(GOOD).loss is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"file": "../part-01"}, 'file is "../part-01"'),
        ({"file": "part-01\n"}, "file is"),
        ({"kind": "c"}, 'kind is "c"'),
        ({"kind": ["a"]}, "kind is"),
        ({"inner": {}}, "inner is {}"),
        ({"inner": [{"share": 1.1}]}, "inner[0].share is 1.1"),
        ({"inner": [{"share": math.nan}]}, "inner[0].share is NaN"),
        ({"inner": [{}]}, "inner[0].share is missing"),
        ({"inner": [{"share": 0.5, "note": 1}]}, "inner[0].note is 1"),
        ({"counts": {"x": -1}}, "counts.x is -1"),
        ({"counts": {"x": True}}, "counts.x is true"),
        ({"counts": {"x": 1.0}}, "counts.x is 1.0"),
        ({"counts": {"x": 10**30}}, "counts.x is 1"),
        ({"is_done": 1}, "is_done is 1"),
        ({"is_done": None}, "is_done is null"),
        ({"loss": "1"}, 'loss is "1"'),
        ({"digest": "x" * 64}, "digest is"),
        ({"other": 1}, "other is none of its entries"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(change, words):
    with pytest.raises(ChecksumError) as caught:
        read(GOOD | change)
    assert str(caught.value).startswith(f"DIR/outer.json is not as Whence writes it: {words}")
    assert str(caught.value).endswith(". Mend it")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"null", b"1", b"[" * 100_000, b'{"file": ' + b"1" * 5000])
def test_what_is_no_json_object_is_refused_in_one_line(data):
    with pytest.raises(ChecksumError) as caught:
        read_record(Outer, data, "file", "Mend it")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_missing_entry_is_named():
    with pytest.raises(ChecksumError, match="kind is missing"):
        read({name: value for name, value in GOOD.items() if name != "kind"})
