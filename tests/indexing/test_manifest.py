"""A manifest whose checksum is right is believed only where it can be true."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from json_changes import refusals, some_changed
from whence.errors import ChecksumError
from whence.indexing.build import verify
from whence.indexing.manifest import MANIFEST
from whence.indexing.opening import index_of, open_index
from whence.indexing.store import Store

WRITTEN = Path(__file__).parents[1] / "compatibility/written_by_5a17c86/index"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return Path(shutil.copytree(WRITTEN, tmp_path_factory.mktemp("manifest") / "index"))


def write(index, content):
    """Write a manifest with a checksum of its own, as anybody can."""
    content = {name: value for name, value in content.items() if name != "checksum"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    document = content | {"checksum": hashlib.sha256(canonical.encode()).hexdigest()}
    (index / MANIFEST).write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")


def content():
    return json.loads((WRITTEN / MANIFEST).read_text())


def ask(index):
    """Whatever of an index needs no model."""
    store = Store.open(index)
    store.info()
    opened = index_of(store)
    numbers = range(min(2, store.rows))
    store.read_rows(numbers)
    store.require_complete()
    store.vectors(store.rankable()[:2].tolist())
    assert sum(opened.weights) < len(opened.weights) + 1


@pytest.mark.parametrize("group, number", [("parts", 0), ("parts", 2), ("shards", 0), ("shards", 5)])
@pytest.mark.parametrize("name", ["../secret.parquet", "/etc/passwd", "memory://x/y", "corpus/part-00001.parquet"])
def test_a_file_has_the_name_of_its_place(index, group, number, name):
    manifest = content()
    manifest[group][number]["file"] = name
    write(index, manifest)
    for use in (open_index, Store.open):
        with pytest.raises(ChecksumError, match=r"manifest\.json is not as Whence writes it"):
            use(index)
    problems, _ = verify(index)
    assert [problem.file for problem in problems] == [MANIFEST]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m["parts"][1].update(first_row=15), "part 1 is corpus/part-00001.parquet, from row 15"),
        (lambda m: m["parts"][2].update(rows=9), "parts have 41 rows, corpora 40"),
        (lambda m: m["shards"].append(m["shards"][0]), "a shard is listed twice"),
        (lambda m: m["shards"][0].update(checkpoint=2), "is of none that it lists"),
        (lambda m: m["shards"][0].update(rows=15), "has 15 rows"),
        (lambda m: m["shards"][0]["counts"].update(ok=15), "for its 16 rows"),
        (lambda m: m.update(checkpoints=[]), "no checkpoint is listed"),
        (lambda m: m["checkpoints"][0].update(weight=-1), "checkpoints[0].weight is -1"),
        (lambda m: m["settings"].pop("layout"), "settings.layout is missing"),
        (lambda m: m["settings"]["space"].update(view="lion"), "--view lion"),
        (lambda m: m.update(codec="zip"), "no such codec"),
    ],
)
def test_numbers_agree(index, change, words):
    manifest = content()
    change(manifest)
    write(index, manifest)
    with pytest.raises(ChecksumError) as caught:
        open_index(index)
    assert words in str(caught.value)
    assert verify(index)[0]


def test_no_edit_is_a_traceback(index):
    manifest = content()
    edits = some_changed(manifest, 150)

    def use(edited):
        write(index, edited)
        ask(index)

    assert refusals(edits, use) > len(edits) / 2
    write(index, manifest)
    ask(index)


def test_a_part_has_the_rows_that_are_listed(index):
    document = content()
    document["parts"][0] |= {name: document["parts"][2][name] for name in ("bytes", "sha256")}
    write(index, document)
    part = index / "corpus/part-00000.parquet"
    shutil.copyfile(index / "corpus/part-00002.parquet", part)
    with pytest.raises(ChecksumError, match="8 rows of id, source, row; 16 are listed"):
        Store.open(index).read_part(0)
    shutil.copyfile(WRITTEN / "corpus/part-00000.parquet", part)
