"""Seeded mutations: of the bytes of a file, of the rows of a corpus, of a JSON document, and values of flags."""

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz")
OTHERS: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**12, 10**30, 2**63, 0.5, 1e308, float("nan"), float("inf"), "", " ", "odd", "../../x",
    "/etc/passwd", "a" * 64, "\x1b]0;owned\x07", "a\nb", "\u202e", "\ud800", "\x00", "-1", "nan", "1e308", "9" * 401,
    [], {}, [[1]], [None], {"": {}}, [{}], {"a": "\x1b["}, [{"role": "user", "content": None}], "[[\"a\", \"b\"]]",
)  # fmt: skip
"""Values that come in the place of others."""
NUMBERS = (
    *("0", "1", "2", "-1", "-0.5", "0.5", "1e308", "-1e308", "1e-320", "nan", "inf", "-inf", "9" * 18, "9" * 30),
    *("9" * 401, "9" * 5000, str(2**31), str(2**63), "-" + "9" * 18, "1e18", "0x10", "1_000", "٣", "", " ", "one"),
)
TEXTS = (
    *("", " ", "-", "--", "=", "=1", "a=", "a=b=c", "a=nan", "a=1e308", "a=-1", "a=" + "9" * 401, ",", ",,", ":"),
    *(
        "0:1",
        "5:2",
        "9:" + "9" * 30,
        "a:b:c:d",
        "\x1b]0;x\x07",
        "a\nb",
        "\u202ex",
        "e\u0301",
        "日本語",
        "\x00",
        "\udcff",
    ),
    *("x" * 5000, "%s{}[0]", "{text", "{0}", "*", "!*", "[", "(", "\\", "s3://bucket/x", "memory://x", "http://["),
    *("~", ".", "..", "/dev/null", "/dev/full", "./none/such", "none.jsonl", "none.parquet", "x.html", "2026-13-01"),
)
NAMES = ("rows", "r\x1b]0;x", "r\nw", "日本", "r.work")
SUFFIXES = (".jsonl", ".csv", ".parquet", ".html", ".svg", "")
LAYOUTS: tuple[Row, ...] = (
    {"id": "a", "text": "one two three four", "source": "s"},
    {"id": 7, "prompt": "1 and 1?", "completion": " 2", "source": "s", "label": True},
    {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "Be short.", "history": [["a", "b"]]},
    {"messages": [{"role": "user", "content": "1 and 1?"}, {"role": "assistant", "content": "2", "weight": 1}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]},
                  {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"prompt": "1?", "completion": "2", "span": "2", "contrast": "3", "span_tokens": "0:1"},
    {"train_a": 0.5, "train_b": 0.5, "metric/x": 2.0},
    {"mixture/a": 0.25, "mixture/b": 0.75, "loss/x": 1.5},
    {"s0": 0.5, "s1": 0.5, "name": "half"},
)  # fmt: skip
"""Rows of every kind that a file may hold."""


def table(rng: random.Random) -> list[Any]:
    """Rows of one layout, mostly."""
    row = rng.choice(LAYOUTS)
    rows: list[Any] = [copied(row) for _ in range(rng.choice((1, 3, 12)))]
    for number, item in enumerate(rows):
        item |= {name: value + number / 16 for name, value in item.items() if isinstance(value, float)}
    if rng.random() < 0.1:
        rows.append(copied(rng.choice(LAYOUTS)))
    return rows


def changed_json(document: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one change somewhere: another value, a removal, a repetition, a nest."""
    document = copied(document)
    places = _places(document)
    if not places:
        return rng.choice(OTHERS)
    parent, key = rng.choice(places)
    how = rng.randrange(10)
    if how < 6:
        parent[key] = copied(rng.choice(OTHERS))
    elif how == 6:
        del parent[key]
    elif how == 7 and isinstance(parent, dict):
        parent[str(rng.choice(OTHERS))] = parent.pop(key)
    elif how == 8:
        parent[key] = nested(rng.choice((3, 400)), parent[key])
    elif isinstance(parent, list):
        parent.append(copied(parent[key]))
    else:
        parent[f"{key} 2"] = copied(parent[key])
    return document


def copied(value: Any) -> Any:
    """A copy of a JSON value; `copy.deepcopy` does not follow the deepest ones."""
    return json.loads(json.dumps(value))


def nested(depth: int, value: Any) -> Any:
    """A value within lists."""
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container within a value with each of its keys."""
    out, queue = [], [value]
    while queue:
        item = queue.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        out += [(item, key) for key in keys]
        queue += [item[key] for key in keys]
    return out


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one accident."""
    how, place = rng.randrange(7), rng.randrange(len(data) + 1)
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 64)))) + data[place:]
    if how == 2:
        return data[:place] + data[place + rng.choice((1, 2, 30)) :]
    if how == 3:
        return (
            data[:place]
            + rng.choice((b"\x00", b"\x1b]0;owned\x07", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b'"'))
            + data[place:]
        )
    if how == 4:
        return (
            data[:place]
            + rng.choice((b"[" * 100_000, b'{"a":' * 20_000, b"9" * 5_000, b"1e999", b"NaN"))
            + data[place:]
        )
    if how == 5:
        return data + data[:place]
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 8))):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def file_bytes(rows: list[Any], suffix: str, rng: random.Random) -> bytes:
    """Rows as a file of a format; what the format cannot hold becomes text."""
    if suffix.endswith(".gz"):
        return gzip.compress(file_bytes(rows, suffix.removesuffix(".gz"), rng), mtime=0)
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows, indent=rng.choice((None, 1))).encode()
    records = [row if isinstance(row, dict) else {"text": row} for row in rows]
    names = list(dict.fromkeys(str(name) for row in records for name in row))
    if suffix == ".parquet":
        return _parquet(records, names, rng)
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",")
    cells = [[_cell(row.get(name)) for name in names] for row in records]
    for line in [names, *cells]:
        writer.writerow(line)
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _typed_column(count: int, rng: random.Random) -> Any:
    """A column of a type that JSON lacks."""
    import datetime
    import decimal

    import pyarrow

    day = datetime.date(2026, 2, 28)
    columns = [
        pyarrow.array([day] * count),
        pyarrow.array([decimal.Decimal("1.50")] * count),
        pyarrow.array([b"\xff\x00"] * count),
        pyarrow.array([2**64 - 1] * count, pyarrow.uint64()),
        pyarrow.array([10**17] * count, pyarrow.timestamp("us", "UTC")),
        pyarrow.array([3] * count, pyarrow.duration("ns")),
        pyarrow.array([{"day": day, "rest": [None, 1]}] * count),
        pyarrow.array(["a"] * count).dictionary_encode(),
        pyarrow.array([None] * count),
        pyarrow.array([[b"x"]] * count),
    ]
    return rng.choice(columns)


def _parquet(rows: list[Row], names: list[str], rng: random.Random) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[_utf8(name)] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, ValueError):
            columns[_utf8(name)] = [None if value is None else _utf8(_cell(value)) for value in values]
    if rng.random() < 0.3:
        columns |= {rng.choice(("extra", "id", "text", "source")): _typed_column(len(rows), rng)}
    sink = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    except pyarrow.ArrowException:  # a struct without fields
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), sink)
    return sink.getvalue()


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def write_file(folder: Path, rng: random.Random) -> Path:
    """A file with a mutation of its rows, of its bytes, or of both, under one of the formats' endings."""
    rows, suffix = table(rng), rng.choice(FORMATS)
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        rows = changed_json(rows, rng)
        rows = rows if isinstance(rows, list) else [rows]
    data = file_bytes(rows, suffix, rng)
    if rng.random() < 0.4:
        inner = gzip.decompress(data) if suffix.endswith(".gz") and rng.random() < 0.5 else None
        data = changed_bytes(data, rng) if inner is None else gzip.compress(changed_bytes(inner, rng), mtime=0)
    if rng.random() < 0.05:
        suffix = rng.choice(FORMATS)
    path = folder / (rng.choice(NAMES) + suffix)
    path.write_bytes(data)
    return path


TEMPLATES = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}",
    "{% for i in range(10**12) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[0]['content'] * 10**10 }}",
    "{{ 'a' * 10**12 }}",
    "{{ raise_exception('\x1b]0;x\ny') }}",
    "{{ messages.__class__ }}{{ messages[99].content }}",
    "{{ 1 / 0 }}",
    "{% include 'x' %}",
    "{% for m in messages",
    "{{ strftime_now('%Q') }}{{ strftime_now(3) }}",
    "{% set x = messages %}{% for m in x %}{{ x.append(m) }}{% endfor %}",
)  # fmt: skip
"""Chat templates, most of which do what none should."""


def write_template(folder: Path, rng: random.Random) -> Path:
    """A chat template, perhaps with an accident."""
    data = rng.choice(TEMPLATES).encode()
    path = folder / "template.jinja"
    path.write_bytes(changed_bytes(data, rng) if rng.random() < 0.3 else data)
    return path
