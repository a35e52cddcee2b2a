"""Scores of another tool, or of a method that is no scorer, as a file: .parquet, .jsonl or .csv.

    query     number of the query, from 0, or its id; without this column the scores are the same for every query
    id        id of the row
    score     larger is more helpful; `whence_score` too, as `whence select` and `whence train --in-run` write it. A row
              without a score has none (null, NaN)
    seconds   what all of them cost, the same in every line; may be left out

Every row that is graded has a line for every query, in any order; other rows are not expected. Nothing of the file is
taken on trust: an id that is not known, a pair that is missing or comes twice is named.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whence.counts import number_of
from whence.errors import SettingError
from whence.evaluation.method_scores import MethodScores
from whence.storage import Place

ENDINGS = (".parquet", ".jsonl", ".csv")
SCORES = ("score", "whence_score")


def scores_from_file(name: str, path: str, row_ids: Sequence[str], query_ids: Sequence[str]) -> MethodScores:
    """Read a file of scores.

    Args:
        name: The method's name.
        path: The file, here or at an fsspec address.
        row_ids: Ids of the rows, in the order of the scores' columns.
        query_ids: Ids of the queries, in the order of the scores' rows.

    Raises:
        SettingError: It cannot be read, lacks a column or a score, or is of other rows or queries.
    """
    table = _table(path)
    column = next((column for column in SCORES if column in table), None)
    if column is None or "id" not in table:
        found = ", ".join(table) or "none"
        raise SettingError(
            f"--scores {path}: no column {'score' if column is None else 'id'}; found {found}. Expected are query, id "
            "and score, a line for each query and row"
        )
    rows, values = _places(table["id"], row_ids, path, "row"), _numbers(table[column], path)
    if "query" in table:
        queries = _query_places(table["query"], query_ids, path)
        taken = np.zeros((len(query_ids), len(row_ids)), dtype=np.int64)
        np.add.at(taken, (queries, rows), 1)
        scores = np.full(taken.shape, np.nan, dtype=np.float32)
        scores[queries, rows] = values
    else:
        taken = np.bincount(rows, minlength=len(row_ids))[None]
        scores = np.full(len(row_ids), np.nan, dtype=np.float32)
        scores[rows] = values
        scores = np.repeat(scores[None], len(query_ids), 0)
    _check_taken(taken, row_ids, query_ids, path, has_queries="query" in table)
    return MethodScores(name, torch.from_numpy(scores), _seconds(table, path), str(path), is_signed=True)


def write_scores(scored: MethodScores, path: str | Path, row_ids: Sequence[str], query_ids: Sequence[str]) -> None:
    """Write a method's scores as a .parquet that `scores_from_file` reads; whole or not at all.

    Args:
        scored: The scores; one that is not finite is written as null.
        path: The file, here or at an fsspec address.
        row_ids: Ids of the rows, in the order of the scores' columns.
        query_ids: Ids of the queries, in the order of the scores' rows.

    Raises:
        StorageError: It cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    values = scored.scores.float().numpy().ravel()
    columns = {
        "query": pyarrow.array(np.repeat(np.array(query_ids, dtype=object), len(row_ids)), pyarrow.string()),
        "id": pyarrow.array(list(row_ids) * len(query_ids), pyarrow.string()),
        "score": pyarrow.array(values, mask=~np.isfinite(values)),
    }
    if scored.seconds is not None:
        columns["seconds"] = pyarrow.array(np.full(len(values), scored.seconds))
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, compression="zstd")
    place, name = _parts(str(path))
    place.write(name, [sink.getbuffer()], total=sink.getbuffer().nbytes)


def _parts(path: str) -> tuple[Place, str]:
    """The directory of a file, and its name there."""
    file = Place.at(path)
    folder, _, name = file.root.rpartition("/")
    return Place(file.fs, folder), name


def _table(path: str) -> dict[str, Any]:
    """Columns of a file by name."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    if Path(path).suffix not in ENDINGS:
        raise SettingError(f"--scores {path}: a file of {', '.join(ENDINGS)} is expected")
    place, name = _parts(path)
    if not place.exists(name):
        raise SettingError(f"--scores {path}: there is no such file")
    source = pyarrow.BufferReader(place.read(name))
    try:
        if path.endswith(".parquet"):
            table = pyarrow.parquet.read_table(source, use_threads=False)
        elif path.endswith(".csv"):
            ids = pyarrow.csv.ConvertOptions(column_types={"id": pyarrow.string(), "query": pyarrow.string()})
            table = pyarrow.csv.read_csv(source, convert_options=ids)
        else:
            table = pyarrow.json.read_json(source)
    except pyarrow.ArrowException as error:
        raise SettingError(f"--scores {path}: cannot be read ({str(error).splitlines()[0]})") from None
    return {column: table[column].to_numpy(zero_copy_only=False) for column in table.column_names}


def _numbers(values: Any, path: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64).astype(np.float32)
    except (TypeError, ValueError):
        raise SettingError(f"--scores {path}: a score is no number, such as {str(values[0])[:40]!r}") from None


def _places(texts: Any, known: Sequence[str], path: str, noun: str) -> np.ndarray:
    """Places of ids among those that are known."""
    places = {id: place for place, id in enumerate(known)}
    found = [places.get(str(text), -1) for text in texts]
    if -1 in found:
        number = found.count(-1)
        raise SettingError(
            f"--scores {path}: {number_of(number, 'line')} of {len(found):,} of a {noun} that is none of the "
            f"{len(known):,} that are graded, such as {texts[found.index(-1)]}"
        )
    return np.array(found, dtype=np.int64)


def _query_places(values: Any, query_ids: Sequence[str], path: str) -> np.ndarray:
    """Places of queries, which are named by their ids, or else numbered from 0."""
    by_id = {*query_ids}
    if any(str(value) in by_id for value in values):
        return _places(values, query_ids, path, "query")
    return _places(values, [str(number) for number in range(len(query_ids))], path, "query")


def _check_taken(
    taken: np.ndarray, row_ids: Sequence[str], query_ids: Sequence[str], path: str, *, has_queries: bool
) -> None:
    """Refuse pairs of a query and a row that are missing, or come twice."""
    for is_wrong, words in ((taken == 0, "lack a score"), (taken > 1, "have more than one")):
        if is_wrong.any():
            query, row = (int(places[0]) for places in is_wrong.nonzero())
            pairs = "rows for queries" if has_queries else "rows"
            whose = f"row {row_ids[row]}" + (f" for query {query_ids[query]}" if has_queries else "")
            raise SettingError(
                f"--scores {path}: {int(is_wrong.sum()):,} of {taken.size:,} {pairs} {words}, such as {whose}"
            )


def _seconds(table: Mapping[str, Any], path: str) -> float | None:
    if "seconds" not in table:
        return None
    values = {float(value) for value in table["seconds"]}
    if len(values) != 1:
        raise SettingError(f"--scores {path}: its column seconds has {len(values)} values; one is expected")
    return values.pop()
