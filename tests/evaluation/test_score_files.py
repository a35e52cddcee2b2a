"""Scores from files: every format gives the same, and each defect is named in a line."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from whence.errors import SettingError
from whence.evaluation.method_scores import MethodScores
from whence.evaluation.score_files import scores_from_file, write_scores

ROWS, QUERIES = ["r0", "r1", "2"], ["qa", "qb"]
LINES = [{"query": q, "id": r, "score": 10.0 * n + m} for n, q in enumerate(QUERIES) for m, r in enumerate(ROWS)]
EXPECTED = torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])


def written(path, lines):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    elif path.suffix == ".csv":
        names = list(lines[0])
        path.write_text("\n".join([",".join(names), *(",".join(str(line[n]) for n in names) for line in lines)]) + "\n")
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("named", [True, False])
def test_every_format_and_order_gives_the_same(tmp_path, ending, named):
    lines = LINES[::-1] if named else [line | {"query": QUERIES.index(line["query"])} for line in LINES[::-1]]
    read = scores_from_file("m", written(tmp_path / f"s.{ending}", lines), ROWS, QUERIES)
    assert torch.equal(read.scores, EXPECTED) and read.seconds is None and read.name == "m"


def test_scores_without_a_query_are_those_of_every_query(tmp_path):
    lines = [{"id": r, "whence_score": float(m), "steps": 2, "seconds": 4.5} for m, r in enumerate(ROWS)]
    read = scores_from_file("in-run", written(tmp_path / "s.parquet", lines), ROWS, QUERIES)
    assert torch.equal(read.scores, EXPECTED[[0, 0]]) and read.seconds == 4.5


def test_a_null_is_no_score(tmp_path):
    lines = [line | ({"score": None} if line["id"] == "r1" else {}) for line in LINES]
    read = scores_from_file("m", written(tmp_path / "s.jsonl", lines), ROWS, QUERIES)
    assert read.scores.isnan().tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("seconds", [None, 3.5])
def test_scores_that_are_written_are_read_again(tmp_path, seconds):
    scores = EXPECTED.clone()
    scores[1, 2] = -torch.inf
    write_scores(MethodScores("m", scores, seconds), tmp_path / "s.parquet", ROWS, QUERIES)
    read = scores_from_file("m", str(tmp_path / "s.parquet"), ROWS, QUERIES)
    scores[1, 2] = torch.nan
    torch.testing.assert_close(read.scores, scores, equal_nan=True)
    assert read.seconds == seconds


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (LINES[1:], "1 of 6 rows for queries lack a score, such as row r0 for query qa"),
        ([*LINES, LINES[2]], "1 of 6 rows for queries have more than one, such as row 2 for query qa"),
        ([*LINES, {"query": "qa", "id": "x", "score": 1.0}],
         "1 line of 7 of a row that is none of the 3 that are graded, such as x"),
        ([*LINES, {"query": "qz", "id": "r0", "score": 1.0}], "1 line of 7 of a query that is none of the 2"),
        ([{"id": "r0", "value": 1.0}], "no column score; found id, value"),
        ([{"row": "r0", "score": 1.0}], "no column id; found row, score"),
        ([line | {"score": "high"} for line in LINES], "a score is no number, such as 'high'"),
        ([line | {"seconds": float(n)} for n, line in enumerate(LINES)], "column seconds has 6 values; one"),
        ([{"id": r, "score": 1.0} for r in ROWS[:2]], "1 of 3 rows lack a score, such as row 2"),
    ],
)  # fmt: skip
def test_defects_are_named(tmp_path, lines, words):
    with pytest.raises(SettingError, match=words) as raised:
        scores_from_file("m", written(tmp_path / "s.jsonl", lines), ROWS, QUERIES)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(SettingError, match="there is no such file"):
        scores_from_file("m", str(tmp_path / "none.csv"), ROWS, QUERIES)
    with pytest.raises(SettingError, match=r"a file of \.parquet, \.jsonl, \.csv is expected"):
        scores_from_file("m", str(tmp_path / "s.pkl"), ROWS, QUERIES)
    for name in ("bad.parquet", "bad.jsonl"):
        (tmp_path / name).write_bytes(b"\x80\x04K")
        with pytest.raises(SettingError, match="cannot be read"):
            scores_from_file("m", str(tmp_path / name), ROWS, QUERIES)
