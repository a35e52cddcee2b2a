"""Rows above the bound are refused before they are held, whatever the format; rows up to it are read."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from whence.corpus import bounds
from whence.corpus.bounds import rows_up_to
from whence.corpus.reading import open_corpus
from whence.errors import CorpusError

BOUND = 5_000
LARGE = 4_000_000


def write(path, text):
    """A file with a row of that text between two others."""
    rows = [{"text": "first"}, {"text": text}, {"text": "last"}]
    content = {
        ".jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows),
        ".json": lambda: json.dumps(rows, indent=1),
        ".csv": lambda: f'text\nfirst\n"{text}"\nlast\n',
    }
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, use_dictionary=path.stem == "dictionary")
    else:
        data = content["." + path.name.split(".")[1]]().encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


NAMES = ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet", "dictionary.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_above_the_bound_is_refused_and_never_held(name, tmp_path):
    path = write(tmp_path / name, "a" * LARGE)
    with rows_up_to(BOUND):
        tracemalloc.start()
        try:
            with pytest.raises(CorpusError, match=r"more than 5,000 bytes.* add --max-row-bytes \d+$"):
                list(open_corpus(path))
            assert tracemalloc.get_traced_memory()[1] < LARGE / 2
        finally:
            tracemalloc.stop()
    assert [len(example.row["text"]) for example in open_corpus(path)] == [5, LARGE, 4]
    small = write(tmp_path / f"small{name}", "é\n" * (BOUND // 3 - 20) if ".csv" in name else "a" * (BOUND - 20))
    with rows_up_to(BOUND):
        assert len(list(open_corpus(small))) == 3


def test_the_mean_of_a_group_of_rows_is_enough_to_refuse_it_undecoded(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": ["a" * LARGE]}), tmp_path / "a.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("it was decoded"))
    with rows_up_to(BOUND), pytest.raises(CorpusError, match=r"a.parquet\[0\]: the row of 4,000,0"):
        list(open_corpus(tmp_path / "a.parquet"))


def test_few_values_that_stand_in_many_rows_are_decoded_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "_BATCH_BYTES", 10_000)
    value = pa.array(["a" * 3_000]).take(pa.array([0] * 500))
    pq.write_table(pa.table({"text": value}), tmp_path / "a.parquet")
    sizes, real = [], pq.ParquetFile.iter_batches

    def recorded(*args, **options):
        sizes.append(options["batch_size"])
        return real(*args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
    assert len(list(open_corpus(tmp_path / "a.parquet"))) == 500
    assert sizes == [3]


@pytest.mark.parametrize("size", [1, 2, 7, 2**16])
def test_items_of_an_array_are_those_of_json_wherever_it_is_cut(size, tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "_CHUNK", size)
    rows = [{"text": 'é\n,]\\"['}, {"text": "x", "n": [1, {"k": None}], "m": -1.5e3}, {"text": ""}]
    for text in (json.dumps(rows), "\ufeff \n" + json.dumps(rows, indent=3, ensure_ascii=False) + "\n\n"):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        assert [example.row for example in open_corpus(tmp_path / "a.json")] == rows
    for text in ('[{"text": "a"}', '[{"text": "a"},]', '[{"text": "a"}] b', '[{"text": "a"} {"text": "b"}]', "[nul"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(CorpusError, match="not a JSON array"):
            list(open_corpus(tmp_path / "a.json"))
