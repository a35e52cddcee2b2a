"""`verify` of directories that are no index: it says what it read, what is damaged, and how that is mended."""

import pytest

from whence.checksums import sealed
from whence.models.saved_files import list_files
from whence.storage import Place


@pytest.fixture
def pool(tmp_path):
    """A pool's files, as far as they have checksums, with a run in it."""
    place = Place.at(tmp_path / "pool")
    written = place.write("members/000.safetensors", [b"a member"], total=8)
    place.write_document("pool.json", {"members": [{"file": "members/000.safetensors", **vars(written)}]})
    place.write_document("losses/ab.json", {"key": [1], "nats": [0.5]})
    place.write_recorded("rows/part-00000.jsonl", b"{}\n")
    place.write("work/a/checkpoint-2/model.safetensors", [b"weights"], total=7)
    list_files(tmp_path / "pool" / "work" / "a" / "checkpoint-2")
    (tmp_path / "pool" / "notes.txt").write_text("mine")
    return tmp_path / "pool"


def test_verify_reads_every_kind_of_file(pool, command):
    code, out, _ = command("verify", pool)
    unchecked = "1 file without a checksum, not checked; the first is notes.txt"
    answer = f"This is a pool, of which 7 files are as written. Next: whence ablate {pool} --eval HELDOUT.jsonl"
    assert (code, out) == (0, f"{unchecked}\n{answer}\n")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pool.json", "from a copy"),
        ("members/000.safetensors", "rm {pool}/members/000.safetensors, then run whence pool train again"),
        ("losses/ab.json", "rm {pool}/losses/ab.json, then run the command that made it again"),
        ("part-00000.json", "rm {pool}/part-00000.json"),
        ("rows/part-00000.jsonl", "rm {pool}/rows/part-00000.jsonl"),
        ("work/a/checkpoint-2/model.safetensors", "rm -r {pool}/work/a/checkpoint-2, then run the training's command"),
        ("work/a/checkpoint-2/whence_checksums.json", "rm -r {pool}/work/a/checkpoint-2"),
    ],
)
def test_verify_names_the_damaged_file_and_the_command_that_mends_it(pool, command, name, remedy):
    data = bytearray((pool / name).read_bytes())
    data[1] ^= 1
    (pool / name).write_bytes(data)
    code, out, err = command("verify", pool)
    assert code == 1 and not err and out.startswith(f"{name}: wrong checksum. Mend it: ")
    assert remedy.format(pool=pool) in " ".join(out.split())


def test_what_nobody_recorded_is_no_directory_of_whences(tmp_path, command):
    (tmp_path / "a.json").write_bytes(sealed({"a": 1})[46:])
    code, _, err = command("verify", tmp_path)
    assert code == 2 and "There is no index at" in err and "nor has any of its files a checksum" in err
