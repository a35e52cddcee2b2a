"""Rows come out of every kind of file in order, each with its id; what cannot be read is named, with its place."""

import bz2
import gzip
import json
import lzma

import datasets
import fsspec
import huggingface_hub
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from whence.corpus.layouts import layout
from whence.corpus.reading import Corpus, open_corpus, row_json
from whence.errors import CorpusError, MissingExtraError

ROWS = [{"text": "first", "id": "a"}, {"text": "sécond 😀", "id": "b"}, {"text": "third\nline", "id": "c"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = 'text,id\nfirst,a\nsécond 😀,b\n"third\nline",c\n'.encode()


def rows(origin):
    return [example.row for example in open_corpus(origin)]


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(origin, *words):
    """The message of the one `CorpusError` that reading raises, which has these words and is one line."""
    with pytest.raises(CorpusError) as caught:
        rows(origin)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.ndjson", JSONL),
        ("a.json", JSONL),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.csv", CSV),
        ("a.tsv", CSV.replace(b",", b"\t")),
        ("a.csv", CSV.replace(b"\n", b"\r\n").replace(b"third\r\n", b"third\n")),
        ("a.jsonl.gz", gzip.compress(JSONL)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("a.csv.bz2", bz2.compress(CSV)),
        ("a.jsonl.xz", lzma.compress(JSONL)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_text_file_gives_the_same_rows(tmp_path, name, content):
    assert rows(written(tmp_path / name, content)) == ROWS


def test_parquet_gives_the_same_rows_and_nested_messages(tmp_path):
    table = [row | {"messages": [{"role": "user", "content": row["text"]}]} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    assert rows(str(tmp_path / "a.parquet")) == table


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_mark_and_blank_lines_are_not_rows(tmp_path, name):
    content = CSV.replace(b"sec", b"\r\nsec") if name == "a.csv" else b"\n  \n" + JSONL.replace(b"\n", b"\r\n\r\n")
    marked = b"\xef\xbb\xbf" + (content if name == "a.csv" else JSONL.split(b"\n", 1)[0] + b"\n\n \n" + content)
    found = rows(written(tmp_path / name, marked))
    assert [row["id"] for row in found] == (["a", "b", "c"] if name == "a.csv" else ["a", "a", "b", "c"])
    assert list(found[0]) == ["text", "id"]


def test_json_array_may_begin_with_a_byte_order_mark(tmp_path):
    assert rows(written(tmp_path / "a.json", b"\xef\xbb\xbf " + json.dumps(ROWS).encode())) == ROWS


def test_directory_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    written(tmp_path / "c.jsonl", '{"text": "3"}\n')
    written(tmp_path / "a.csv", "text\n1\n")
    written(tmp_path / "b" / "x.jsonl.gz", gzip.compress(b'{"text": "2"}\n'))
    written(tmp_path / "README.md", "no corpus")
    assert [row["text"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_endings_are_compared_case_blind(tmp_path):
    written(tmp_path / "A.JSONL", '{"text": "1"}\n')
    written(tmp_path / "B.Csv.GZ", gzip.compress(b"text\n2\n"))
    assert [row["text"] for row in rows(tmp_path)] == ["1", "2"]
    assert rows(tmp_path / "A.JSONL") == [{"text": "1"}]


def test_directory_leaves_out_hidden_files_and_metadata_of_data_sets(tmp_path):
    folder = tmp_path / ".data"  # named by the person, so it is read
    for name in (".ipynb_checkpoints", "saved"):
        (folder / name).mkdir(parents=True)
    for name in ("a.jsonl", ".hidden.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "saved/b.jsonl"):
        written(folder / name, json.dumps({"text": name}))
    for name in ("dataset_info.json", "dataset_infos.json", "saved/dataset_dict.json"):
        written(folder / name, '{"alpaca": {"file_name": "a.jsonl"}}')
    assert [row["text"] for row in rows(folder)] == ["a.jsonl", "saved/b.jsonl"]


def test_state_json_is_metadata_only_beside_dataset_info(tmp_path):
    (tmp_path / "saved").mkdir()
    written(tmp_path / "state.json", '{"text": "Ohio"}')
    written(tmp_path / "saved" / "state.json", '{"_fingerprint": "abc"}')
    written(tmp_path / "saved" / "dataset_info.json", "{}")
    assert rows(tmp_path) == [{"text": "Ohio"}]


def test_links_to_directories_are_followed_and_one_upwards_ends(tmp_path):
    (tmp_path / "data" / "z").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    written(tmp_path / "data" / "a.jsonl", '{"text": "1"}\n')
    written(tmp_path / "data" / "z" / "b.jsonl", '{"text": "2"}\n')
    written(tmp_path / "elsewhere" / "c.jsonl", '{"text": "3"}\n')
    for name, target in {"b": "../elsewhere", "c": ".", "y": "z", "z/up": ".."}.items():
        (tmp_path / "data" / name).symlink_to(target, target_is_directory=True)
    assert [row["text"] for row in rows(tmp_path / "data")] == ["1", "3", "2"]


def test_files_left_out_for_their_ending_are_told_once(tmp_path, caplog):
    for name in ("a.jsonl", "b.txt", "c.arrow"):
        written(tmp_path / name, '{"text": "1"}\n')
    assert rows(tmp_path) == rows(tmp_path) == [{"text": "1"}]
    assert caplog.messages == [f"{tmp_path}: files left out for their endings: 2, such as {tmp_path}/b.txt"]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").unlink()
    refused(tmp_path, "no corpus file in this directory (1 of other kinds, such as", "c.arrow", ".jsonl")


def test_saved_dataset_gives_its_rows(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "data")
    assert rows(tmp_path / "data") == ROWS


def test_saved_splits_give_train_or_the_only_one_or_are_asked_for(tmp_path):
    one, two = datasets.Dataset.from_list(ROWS[:1]), datasets.Dataset.from_list(ROWS[1:])
    datasets.DatasetDict({"test": one, "train": two}).save_to_disk(tmp_path / "with_train")
    datasets.DatasetDict({"test": one}).save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"test": one, "validation": two}).save_to_disk(tmp_path / "neither")
    assert rows(tmp_path / "with_train") == ROWS[1:]
    assert rows(tmp_path / "single") == ROWS[:1]
    refused(tmp_path / "neither", "splits are test, validation", f"{tmp_path}/neither/test")
    assert rows(tmp_path / "neither" / "validation") == ROWS[1:]


def test_empty_train_split_is_told_and_no_other_is_read_for_it(tmp_path):
    rows_, none = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_dict({"text": []})
    datasets.DatasetDict({"test": rows_, "train": none}).save_to_disk(tmp_path / "data")
    refused(tmp_path / "data", f"{tmp_path}/data/train: no rows in this split")
    assert rows(tmp_path / "data" / "test") == ROWS
    datasets.DatasetDict({"test": none, "train": rows_}).save_to_disk(tmp_path / "other")
    assert rows(tmp_path / "other") == ROWS
    none.save_to_disk(tmp_path / "single")
    refused(tmp_path / "single", "no rows")


def test_damaged_saved_dataset_is_named(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "data")
    arrow = next((tmp_path / "data").glob("*.arrow"))
    arrow.write_bytes(b"junk" * 10)
    refused(tmp_path / "data", str(tmp_path / "data"))
    (tmp_path / "data" / "state.json").unlink()
    refused(tmp_path / "data", str(tmp_path / "data"))


def test_addresses_of_other_file_systems_are_read(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/whence-corpus/a.jsonl.gz", gzip.compress(JSONL))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "data")
    memory.put(str(tmp_path / "data"), "/whence-saved", recursive=True)
    assert rows("memory://whence-corpus/a.jsonl.gz") == rows("memory://whence-corpus") == ROWS
    assert rows("memory://whence-saved") == ROWS
    refused("memory://whence-nothing/a.jsonl", "memory://whence-nothing/a.jsonl", "no such file")
    refused("nosuchprotocol://a/b.jsonl", "nosuchprotocol")


def test_rows_in_memory_can_come_from_any_iterable():
    assert rows(iter(ROWS)) == rows(ROWS) == rows(datasets.Dataset.from_list(ROWS)) == ROWS


@pytest.mark.parametrize(
    "line", ['{"text": ', "text", "{'text': 'a'}", '{"text": "a"} {"text": "b"}', "[" * 100_000], ids=len
)
def test_line_that_is_not_json_is_named_by_file_and_line(tmp_path, line):
    path = written(tmp_path / "a.jsonl", '{"text": "a"}\n\n' + line + "\n")
    refused(path, f"{path}:3:", "not a line of JSON")


@pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ('"text"', "str"), ("null", "NoneType"), ("3", "int")])
def test_line_that_is_no_object_is_named_by_file_and_line(tmp_path, line, kind):
    path = written(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{line}\n')
    refused(path, f"{path}:2:", kind)
    path = written(tmp_path / "b.json", f'[{{"text": "a"}}, {line}]')
    refused(path, f"{path}[1]", kind)


def test_json_array_cut_short_names_the_file(tmp_path):
    path = written(tmp_path / "a.json", '[{"text": "a"},')
    refused(path, str(path), "not a JSON array")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_bytes_that_are_not_utf8_are_named_by_file_and_line(tmp_path, name):
    lines = [b"text" if name == "a.csv" else b'{"text": "a"}', *[b'{"text": "a"}'] * 3, b'{"text": "\xff"}']
    if name == "a.csv":
        lines = [line.replace(b'{"text": "', b"").replace(b'"}', b"") for line in lines]
    path = written(tmp_path / name, b"\n".join(lines) + b"\n")
    refused(path, f"{path}:5:", "utf-8" if name == "a.jsonl" else "UTF-8")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('text,id\nok,1\n"oops,2\nok,3\nok,4\n', 3),  # a quote never closed would swallow the rest into one cell
        ("text,id\nok,1\nok,2,3\n", 3),
        ('text,id\nok,1\n"a"b,2\n', 3),
    ],
)
def test_malformed_csv_is_named_by_file_and_line(tmp_path, content, line):
    path = written(tmp_path / "a.csv", content)
    refused(path, f"{path}:{line}:")


def test_short_csv_row_has_nulls_and_long_cells_are_read(tmp_path):
    long = "x" * 200_000
    assert rows(written(tmp_path / "a.csv", f"prompt,completion\n{long}\n")) == [{"prompt": long, "completion": None}]


@pytest.mark.parametrize(
    ("kind", "value"),
    [(pyarrow.timestamp("ms"), 400_000_000_000_000), (pyarrow.date32(), 4_000_000), (pyarrow.duration("s"), 2**62)],
    ids=str,
)
def test_value_of_parquet_that_python_cannot_hold_is_named_by_row_and_column(tmp_path, kind, value):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "when": pyarrow.array([1, value], kind)}), path)
    refused(path, f"{path}[1]: the column `when` holds a {kind}", "Leave the column out")


def test_missing_values_are_none_whatever_wrote_them(tmp_path):
    table = pandas.DataFrame(
        {"id": ["1", "2"], "prompt": ["a", "b"], "completion": ["c", float("nan")], "score": [1.5, float("nan")],
         "when": [pandas.NaT, pandas.NaT], "flag": pandas.array([True, None], "boolean")}
    )  # fmt: skip
    expected = ["c", None]
    written(tmp_path / "a.jsonl", "".join(json.dumps(row, default=str) + "\n" for row in table.to_dict("records")))
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    for origin in (table, table.to_dict("records"), *(tmp_path / f"a.{end}" for end in ("jsonl", "csv", "parquet"))):
        assert [row["completion"] for row in rows(origin)] == expected, origin
        assert rows(origin)[1]["score"] is None
    assert (rows(table)[0]["when"], rows(table)[1]["flag"]) == (None, None)


def test_layout_of_a_joined_table_is_that_with_an_answer(tmp_path):
    csv = "prompt,completion,text\nWhat?, four,\n, unasked,\n,,A plain document.\nOpen?,,\n"
    found = rows(written(tmp_path / "a.csv", csv))
    assert [layout(row) for row in found] == ["prompt", "prompt", "text", "prompt"]
    assert [row["completion"] for row in found] == [" four", " unasked", None, None]
    assert found[1]["prompt"] == ""
    filled = {"instruction": "", "input": "", "output": "", "messages": [], "text": "A plain document."}
    assert layout(filled) == "text"


def test_nulls_of_arrow_inside_objects_are_no_part_of_a_row(tmp_path):
    def row(arguments):
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": arguments}}]}
        return {"messages": [{"role": "user", "content": "x"}, call]}

    plain = [row({"city": "Oslo"}), row({"x": 1, "y": 2})]
    table = datasets.Dataset.from_list(plain)
    assert table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["x"] is None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    table.to_json(tmp_path / "a.jsonl")
    frame = pandas.read_parquet(tmp_path / "a.parquet")
    for origin in (table, list(table), frame, *(tmp_path / name for name in ("a.parquet", "saved", "a.jsonl"))):
        assert rows(origin) == plain
    own = [row({"city": None})]
    assert rows(own) == own, "a null of JSON is the row's own"


def test_names_that_are_no_text_become_text():
    frame = pandas.DataFrame([["a b c d", "x y z w"]])
    with pytest.raises(CorpusError, match=r"columns are 0, 1; .*--map prompt=0,completion=1"):
        rows(frame)
    assert rows(open_corpus(frame, columns={"prompt": "0", "completion": "1"})) == [
        {"prompt": "a b c d", "completion": "x y z w"}
    ]
    assert rows(pandas.DataFrame({"text": ["a"], 0: ["c d e f"]})) == [{"text": "a", "0": "c d e f"}]
    row = {"prompt": "a", "completion": "b", "info": {0: "c d", None: [{1: "e"}]}}
    assert rows([row])[0]["info"] == {"0": "c d", "None": [{"1": "e"}]}


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = written(tmp_path / "a.csv", "text,id,text\na,1,b\n")
    refused(path, f"{path}:1: the column `text` is there 2 times")
    assert rows(written(tmp_path / "b.csv", "text,,\na,,\n")) == [{"text": "a", "": None}]  # as spreadsheets write
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", f"{tmp_path}/a.parquet: the column `text` is there 2 times")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", JSONL),
        ("a.jsonl.gz", gzip.compress(JSONL)[:-9]),
        ("a.jsonl.gz", gzip.compress(JSONL)[:12] + b"\xff" * 40),
        ("a.jsonl.xz", JSONL),
        ("a.jsonl.bz2", JSONL),
        ("a.parquet", b"PAR1 and then nothing of the kind"),
        ("a.parquet", b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_compressed_file_is_named(tmp_path, name, content):
    path = written(tmp_path / name, content)
    refused(path, str(path))


def test_zstd_without_its_package_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(fsspec, "available_compressions", lambda: [None, "gzip"])
    with pytest.raises(MissingExtraError, match="pip install zstandard"):
        rows(written(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd"))


def test_missing_columns_list_those_that_exist(tmp_path):
    path = written(tmp_path / "a.jsonl", '{"text": "a"}\n{"article": "p", "summary": "r"}\n')
    refused(path, f"{path}:2:", "columns are article, summary", "`messages`", "--map prompt=article,completion=summary")
    refused([{}], "columns are none")


def test_layouts_are_looked_for_from_the_most_to_the_least_telling():
    row = {"text": "t", "instruction": "i", "output": "o", "prompt": "p", "completion": "c", "messages": [{}]}
    found = []
    for dropped in ("", "messages", "completion", "output"):
        row.pop(dropped, None)
        found.append(layout(row))
    assert found == ["messages", "prompt", "instruction", "text"]
    assert layout({"instruction": "i", "input": "x", "output": "o", "text": "t"}) == "instruction"


def test_layout_whose_columns_are_filled_comes_before_one_with_nulls(tmp_path):
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    joined = {
        "messages": pyarrow.array([None, said, None, None]),
        "prompt": ["p", None, None, "p"],
        "completion": ["c", None, None, None],
        "text": [None, "t", "t", None],
    }
    pyarrow.parquet.write_table(pyarrow.table(joined), tmp_path / "a.parquet")
    found = [layout(example.row) for example in open_corpus(tmp_path / "a.parquet")]
    assert found == ["prompt", "messages", "text", "messages"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "instruction,input,output,text\n , , ,real\n"),
        ("a.jsonl", '{"instruction": "", "input": "", "output": " ", "text": "real"}\n'),
    ],
)
def test_blanks_fill_no_column(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (example,) = open_corpus(tmp_path / name)
    assert layout(example.row) == "text"


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff\n", "text,id\n", "[]"])
def test_empty_file_is_refused(tmp_path, content):
    name = "a.csv" if "," in content else "a.json"
    refused(written(tmp_path / name, content), "no rows", name)


def test_empty_corpora_of_other_kinds_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "no rows")
    refused([], "no rows")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no corpus file")
    written(tmp_path / "empty" / "notes.md", "text")
    refused(tmp_path / "empty", "no corpus file", ".jsonl")


def test_unknown_ending_and_missing_path_say_what_a_corpus_is(tmp_path):
    refused(written(tmp_path / "a.docx", "text"), "a.docx", ".parquet")
    refused(tmp_path / "nothing", "no such file", ".parquet")
    refused("nothing-here.jsonl.gz", "no such file")
    refused("./nothing", "no such file")


def test_name_that_the_hub_cannot_give_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused("whence-tests/nothing", "whence-tests/nothing", "Hugging Face Hub", ".jsonl")
    refused("whence-tests/nothing:validation[:10]", "Hugging Face Hub")


def test_hub_is_asked_once_without_a_network(monkeypatch):
    asked = []

    def unreachable(name, **options):
        asked.append((name, options))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    refused("whence-tests/nothing:test", "no network")
    assert asked == [("whence-tests/nothing", {"repo_type": "dataset", "allow_patterns": []})]


@pytest.fixture
def hub(monkeypatch):
    """A hub of one data set with the configurations main and socratic; answers what it was asked."""
    asked = []

    def load_dataset(name, configuration=None, *, split, streaming):
        asked.append((name, configuration, split))
        if configuration is None:
            known = "Please pick one among the available configs: ['main', 'socratic']"
            raise ValueError(f"Config name is missing.\n{known}\nExample of usage:\n\t`load_dataset('gsm8k', 'main')`")
        if configuration not in ("main", "socratic"):
            raise ValueError(f"BuilderConfig '{configuration}' not found. Available: ['main', 'socratic']")
        return [{"text": f"{configuration} {split}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return asked


def test_data_set_of_the_hub_is_named_with_its_configuration_and_split(hub):
    assert rows("openai/gsm8k:main:test") == [{"text": "main test"}]
    assert rows("openai/gsm8k:socratic:") == [{"text": "socratic train"}]
    assert rows("openai/gsm8k:main:test[:10]") == [{"text": "main test[:10]"}]
    refused("openai/gsm8k:a:b:c", "3 colons", "NAME:CONFIGURATION:SPLIT")


def test_configurations_are_listed_where_one_is_needed_or_wrong(hub):
    refused("openai/gsm8k", "['main', 'socratic']. Name one as openai/gsm8k:CONFIGURATION:train")
    refused("openai/gsm8k:test", "['main', 'socratic']. Name one as openai/gsm8k:CONFIGURATION:test")
    refused("openai/gsm8k:other:test", "'other' not found. Available: ['main', 'socratic']. Name one as")
    assert hub == [("openai/gsm8k", None, "train"), ("openai/gsm8k", None, "test"), ("openai/gsm8k", "other", "test")]


def test_lone_surrogates_are_read_and_hashed(tmp_path):
    path = written(tmp_path / "a.jsonl", r'{"text": "a \ud800 b"}' + "\n")
    (example,) = open_corpus(path)
    assert example.row == {"text": "a \ud800 b"}
    assert example.id == next(iter(open_corpus(path))).id


def test_ids_are_the_rows_own_or_made_from_content_and_number():
    made = [example.id for example in open_corpus([{"text": "a"}, {"text": "a"}, {"text": "b", "id": ""}])]
    assert len(set(made)) == 3
    assert [name[-2:] for name in made] == ["-0", "-1", "-2"]
    assert made[0][:12] == made[1][:12] != made[2][:12]
    own = [example.id for example in open_corpus([{"text": "a", "id": 0}, {"text": "a", "id": "x y"}])]
    assert own == ["0", "x y"]


def test_ids_are_the_same_at_every_reading_and_from_every_kind_of_file(tmp_path):
    plain = [{"text": row["text"]} for row in ROWS]
    corpus = Corpus(written(tmp_path / "a.jsonl", "".join(row_json(row) + "\n" for row in plain)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "a.parquet")
    first = [example.id for example in corpus]
    assert first == [example.id for example in corpus] == [example.id for example in open_corpus(plain)]
    assert first == [example.id for example in open_corpus(tmp_path / "a.parquet")]


def test_first_number_continues_the_numbers_of_an_index():
    first, second = open_corpus([{"text": "a"}]), open_corpus([{"text": "a"}], first_number=7)
    (zero,), (seven,) = first, second
    assert (zero.id[:12], zero.id[12:], seven.id[12:]) == (seven.id[:12], "-0", "-7")
    (again,) = open_corpus(first, first_number=7)
    assert again.id == seven.id


def test_source_and_other_columns_travel_along():
    (one, two) = open_corpus([{"text": "a", "source": 3, "year": 2001}, {"text": "b", "source": None}])
    assert (one.source, one.row["year"], two.source) == ("3", 2001, None)
