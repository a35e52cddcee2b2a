"""An output that is an input, under whatever name, is refused."""

import json
import os

import fsspec
import pytest

from whence.errors import SettingError
from whence.outputs import refuse_inputs


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "data" / "rows.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    return file


@pytest.fixture(params=["itself", "relative", "link", "hard link", "linked directory", "file://", "cached", "draft"])
def name(request, rows, tmp_path, monkeypatch):
    """A name of the file."""
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "link.jsonl"
    if request.param == "link":
        link.symlink_to(rows)
    if request.param == "hard link":
        os.link(rows, link)
    if request.param == "linked directory":
        (tmp_path / "other").symlink_to(rows.parent)
    if request.param == "draft":  # what is written before it is renamed
        os.link(rows, tmp_path / "new.jsonl.tmp")
    names = {
        "itself": rows,
        "relative": "data/../data/rows.jsonl",
        "linked directory": tmp_path / "other/rows.jsonl",
        "file://": f"file://{rows}",
        "cached": f"simplecache::file://{rows}",
        "draft": tmp_path / "new.jsonl",
    }
    return names.get(request.param, link)


def test_a_file_is_an_input_under_every_name(name, rows):
    with pytest.raises(SettingError, match=r"--report .*: it is the input .*rows\.jsonl"):
        refuse_inputs(name, [None, [{"text": "in memory"}], "org/name:train", rows], flag="--report")


def test_a_file_of_an_input_directory_is_one_too(name, rows):
    with pytest.raises(SettingError, match="a file of the input"):
        refuse_inputs(name, [rows.parent])


def test_the_input_may_be_the_link(rows, tmp_path):
    (tmp_path / "link").symlink_to(rows.parent)
    with pytest.raises(SettingError, match="it is the input"):
        refuse_inputs(rows, [tmp_path / "link/rows.jsonl"])
    with pytest.raises(SettingError, match="a file of the input"):
        refuse_inputs(rows, [tmp_path / "link"])


def test_other_stores_have_addresses_alone():
    store = fsspec.filesystem("memory")
    store.pipe_file("/outputs/rows.jsonl", b"{}")
    with pytest.raises(SettingError, match="it is the input"):
        refuse_inputs("memory://outputs/rows.jsonl", ["memory://outputs/rows.jsonl"])
    with pytest.raises(SettingError, match="a file of the input"):
        refuse_inputs("memory://outputs/rows.jsonl", ["memory://outputs"])
    refuse_inputs("memory://outputs/other.jsonl", ["memory://outputs", "/outputs/other.jsonl"])


def test_what_overwrites_nothing_may_lie_beside_an_input(rows):
    refuse_inputs(rows.parent / "new.jsonl", [rows.parent, rows])
    refuse_inputs(rows.parent / "index", [rows.parent, rows], is_directory=True)


def test_a_directory_may_neither_be_nor_hold_an_input(rows, tmp_path):
    for out, relation in ((rows.parent, "is"), (tmp_path, "holds")):
        with pytest.raises(SettingError, match=f"it {relation} the input"):
            refuse_inputs(out, [rows.parent], is_directory=True)


@pytest.mark.parametrize(
    "file, content",
    [
        ("manifest.json", {"corpora": [{"name": "ROWS"}], "format_version": 1}),
        ("pool.json", {"corpus": "ROWS"}),
        ("adapter_config.json", {"base_model_name_or_path": "ROWS"}),
        ("whence_train.json", {"model": "a name", "corpus": "ROWS"}),
    ],
)
def test_a_directory_stands_for_what_its_files_name(rows, tmp_path, file, content):
    made = tmp_path / "made"
    made.mkdir()
    (made / file).write_text(json.dumps(content).replace("ROWS", str(rows)))
    with pytest.raises(SettingError, match=r"it is the input .*rows\.jsonl"):
        refuse_inputs(rows, [made])
