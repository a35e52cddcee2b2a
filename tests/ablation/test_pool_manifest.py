"""A pool's manifest is believed only where it can be true: its members' files are written to."""

import json
import shutil
from pathlib import Path

import pytest

from conftest import contents
from json_changes import changed, refusals, some_changed
from whence.ablation.gram_matrices import open_grams
from whence.ablation.heldout_losses import content_name, stored_losses
from whence.ablation.member_training import recipe_of
from whence.ablation.pool import MANIFEST, begin_pool, open_pool
from whence.checksums import sealed
from whence.errors import ChecksumError, FormatVersionError
from whence.storage import AGAIN, Place

WRITTEN = Path(__file__).parents[1] / "compatibility/written_by_5a17c86"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pool and its parent."""
    home = tmp_path_factory.mktemp("manifest")
    shutil.copytree(WRITTEN / "pool", home / "pool")
    shutil.copytree(WRITTEN / "base", home / "base")
    return home


def content(home):
    return json.loads((WRITTEN / "pool" / MANIFEST).read_text()) | {"parent": str(home / "base")}


def write(home, document):
    (home / "pool" / MANIFEST).write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["../../outside/x.safetensors", "/tmp/x.safetensors", "members/001.safetensors"])
def test_a_member_has_the_name_of_its_place(home, name):
    document = content(home)
    document["members"][0]["file"] = name
    write(home, document)
    before = contents(home)
    for use in (open_pool, lambda path: begin_pool(path, home / "base", document["recipe"])):
        with pytest.raises(ChecksumError, match=r"pool\.json is not as Whence writes it"):
            use(home / "pool")
    assert contents(home) == before


def test_a_partition_has_one_member(home):
    document = content(home)
    document["members"][1]["partition"] = "s0"
    write(home, document)
    with pytest.raises(ChecksumError, match=r"member 1 is 's0' in members/001"):
        open_pool(home / "pool")


def test_members_are_in_the_order_of_their_files(home):
    """Numbers may be missing, of members that are yet to be trained; none stands twice, or before a lower one."""
    document = content(home)
    document["members"].reverse()
    write(home, document)
    with pytest.raises(ChecksumError, match=r"member 1 is 's0' in members/000"):
        open_pool(home / "pool")
    document["members"] = document["members"][:1]
    write(home, document)
    assert next(open_pool(home / "pool").free_numbers()) == 0


def test_another_format_is_told_before_its_entries(home):
    write(home, {"format_version": 3, "other": []})
    with pytest.raises(FormatVersionError, match="format 3"):
        open_pool(home / "pool")


def test_no_edit_is_a_traceback(home):
    edits = some_changed(content(home), 100)

    def use(edited):
        write(home, edited)
        pool = open_pool(home / "pool")
        recipe_of(pool)
        pool.verify()

    assert refusals(edits, use) > len(edits) / 2
    write(home, content(home))
    assert open_pool(home / "pool").partitions == ["s0", "s1"]


def test_stored_losses_are_of_one_length(tmp_path):
    place, key = Place.at(tmp_path), ["a"]

    def unmeasured():
        raise AssertionError

    file = tmp_path / f"{content_name(key)}.json"
    good = {"key": key, "nats": [1.0, 2.5], "tokens": [3, 4], "bytes": [9, 9]}
    file.write_bytes(sealed(good))
    assert stored_losses(place, key, unmeasured).tokens.tolist() == [3, 4]
    for words, edited in changed(good):
        if words.startswith(("('nats', ", "('tokens', ")) and words.endswith(("0.5", "nan", "1000000000000")):
            continue  # another loss that could be one
        file.write_bytes(sealed(edited))
        try:
            stored_losses(place, key, unmeasured)
        except ChecksumError as error:
            assert AGAIN in str(error)
        except AssertionError:
            pytest.fail(words)


def test_a_record_of_matrices_is_checked(home, tmp_path):
    write(home, content(home))
    pool = open_pool(home / "pool")
    (home / "pool/grams").mkdir(exist_ok=True)
    (home / "pool/grams/000.json").write_text('{"member": "../x"}')
    with pytest.raises(ChecksumError, match=r"000\.json is not as Whence writes it"):
        open_grams(pool)
