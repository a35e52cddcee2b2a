"""The index on disk survives kills, flipped bytes and full disks, and its scans equal brute force."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file

import whence
from missing_packages import without_s3fs
from whence.errors import (
    ChecksumError,
    FormatVersionError,
    ManifestMismatchError,
    MissingExtraError,
    MissingIndexError,
    SettingError,
    StorageError,
)
from whence.indexing import codecs, scan
from whence.indexing.directories import remedy
from whence.indexing.manifest import Manifest
from whence.indexing.repair import repair
from whence.indexing.shards import ShardArrays, encoded
from whence.indexing.store import Store
from whence.indexing.verification import problems_at
from whence.storage import Place

WIDTH = 24
PART_ROWS = (7, 5, 9)


def manifest(**changes) -> Manifest:
    values = {
        "whence_version": "0",
        "codec": "float32",
        "width": WIDTH,
        "settings": {"projection": {"name": "sjlt", "seed": 0}, "reduction": "mean"},
        "checkpoints": ({"name": "a", "step": 1}, {"name": "b", "step": 2}),
        "corpora": ({"name": "a.jsonl", "digest": "c0", "rows": sum(PART_ROWS)},),
    }
    return Manifest(**{**values, **changes})


def corpus_rows(part: int) -> list[dict]:
    return [
        {"id": f"{part}-{i}", "source": None if i % 2 else "s", "row": json.dumps({"text": "é" * i})}
        for i in range(PART_ROWS[part % 3])
    ]


def all_ok(vectors):
    """A shard of these rows."""
    n = len(vectors)
    return ShardArrays(
        vectors=vectors,
        norm=vectors.norm(dim=1),
        loss=torch.zeros(n),
        status=torch.zeros(n, dtype=torch.uint8),
        tokens=torch.ones(n, dtype=torch.int32),
    )


def arrays(checkpoint: int, part: int, width: int = WIDTH) -> ShardArrays:
    n = PART_ROWS[part % 3]
    rng = torch.Generator().manual_seed(100 * checkpoint + part)
    vectors = torch.randn(n, width, generator=rng)
    status = torch.zeros(n, dtype=torch.uint8)
    status[2] = part % 3
    vectors[2] = vectors[2] if part % 3 == 0 else torch.nan
    return ShardArrays(
        vectors=vectors,
        norm=vectors.norm(dim=1),
        loss=torch.rand(n, generator=rng),
        status=status,
        tokens=torch.arange(n, dtype=torch.int32),
        counts={"truncated": part},
    )


def build(path, upto: int = 10**9, **changes) -> Store:
    """Build or resume an index of three parts, stopping after so many files."""
    store = Store.resume(path, manifest(**changes))
    with store.lock():
        for part in range(len(store.manifest.parts), len(PART_ROWS)):
            if (upto := upto - 1) < 0:
                return store
            store.write_part(part, corpus_rows(part))
        store.finish_parts()
        for checkpoint, part in store.missing():
            if (upto := upto - 1) < 0:
                return store
            store.write_shard(checkpoint, part, arrays(checkpoint, part))
    return store


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def flip(file: Path, where: int) -> None:
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)


def brute_force(
    store: Store, queries: torch.Tensor, weights: torch.Tensor, cosine: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """All scores, and which rows are ok in every checkpoint."""
    total, ok = 0, True
    for c in range(len(weights)):
        shards = [store.shard(c, part) for part in range(len(store.manifest.parts))]
        rows = torch.cat([shard.decoded(store.codec, store.manifest.width) for shard in shards])
        norm = torch.cat([shard.norm for shard in shards])
        scores = queries[c].double() @ rows.double().T
        if cosine:
            size = norm.double() * queries[c].double().norm(dim=1)[:, None]
            scores = torch.where(size > 0, scores / size, 0.0)
        total = total + weights[c] * scores
        ok = ok & torch.cat([shard.status == 0 for shard in shards])
    return total, ok


def test_what_is_written_is_read_back(tmp_path):
    store = build(tmp_path / "index")
    again = Store.open(tmp_path / "index")
    assert again.manifest == store.manifest
    assert again.manifest.is_complete
    for part in range(3):
        assert again.read_part(part) == corpus_rows(part)
        shard, given = again.shard(1, part), arrays(1, part)
        ok = given.status == 0
        assert torch.equal(shard.vectors[ok], given.vectors[ok])
        assert (shard.vectors[~ok] == 0).all()
        assert torch.equal(shard.loss, given.loss)
        assert torch.equal(shard.tokens, given.tokens)
    everything = [row for part in range(3) for row in corpus_rows(part)]
    assert again.read_rows([20, 0, 7, 6]) == [everything[i] for i in (20, 0, 7, 6)]
    assert problems_at(tmp_path / "index") == []


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "float16", "int8", "int4", "onebit"])
def test_any_safetensors_reader_opens_a_shard(tmp_path, codec):
    store = build(tmp_path / "index", codec=codec)
    file = store.place.path(store.manifest.shards[0].file)
    loaded, shard = load_file(file), store.shard(0, 0)
    others = {name: tensor for name, tensor in vars(shard).items() if name != "scale"}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in others.items())
    unbiased = codecs.codec(codec).unbiased(loaded["scale"], loaded["norm"], WIDTH)
    assert torch.equal(shard.scale, unbiased) and torch.equal(unbiased, loaded["scale"]) == (codec != "onebit")
    assert len(loaded) == len(vars(shard))


def test_info_counts_rows_by_status(tmp_path):
    info = build(tmp_path / "index").info()
    assert (info["rows"], info["ok_rows"], info["width"]) == (21, 19, WIDTH)
    assert info["counts"] == {"ok": 19, "no_supervised_token": 1, "non_finite": 1, "truncated": 3}
    assert info["bytes"] == sum(len(data) for name, data in contents(tmp_path / "index").items() if "/" in name)


def test_a_row_counts_as_ok_only_under_every_checkpoint(tmp_path):
    """Part 0: rows 1 and 2 fail under another checkpoint each; part 1: row 2 under both; part 2: under the second."""
    store = Store.resume(tmp_path / "index", manifest())
    bad = {(0, 0): {1: 1}, (1, 0): {2: 2, 1: 2}, (0, 1): {2: 1}, (1, 1): {2: 1}, (0, 2): {}, (1, 2): {4: 2, 5: 2}}
    for part in range(3):
        store.write_part(part, corpus_rows(part))
    store.finish_parts()
    assert store.info()["ok_rows"] == 0
    for (checkpoint, part), rows in sorted(bad.items()):
        given = arrays(checkpoint, part)
        given.vectors[2], given.status[2] = 1.0, 0
        given.status[[*rows]] = torch.tensor([*rows.values()], dtype=torch.uint8)
        store.write_shard(checkpoint, part, given)
    info = store.info()
    assert info["ok_rows"] == len(store.rankable()) == 5 + 4 + 7
    assert info["counts"] == {"ok": 16, "no_supervised_token": 2, "non_finite": 3, "truncated": 3}
    assert whence.info(tmp_path / "index") == info


def test_a_resumed_build_has_the_same_bytes(tmp_path):
    build(tmp_path / "whole")
    for stop in range(9):
        build(tmp_path / "parts", upto=stop)
        (tmp_path / "parts" / "corpus").mkdir(exist_ok=True)
        (tmp_path / "parts" / "corpus" / "part-00009.parquet.tmp").write_bytes(b"half")
    build(tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def build_until_killed(path: Path, syncs: int) -> None:
    real, left = os.fsync, [syncs]

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    os.fsync = fsync
    build(path)


def test_a_killed_build_resumes_to_the_same_bytes(tmp_path):
    build(tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")  # a clean process to fork from: torch has threads here
    context.set_forkserver_preload(["whence.indexing.store"])
    for syncs in (*range(14), 0, 1, 20, 30):
        child = context.Process(target=build_until_killed, args=(tmp_path / "killed", syncs))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
    build(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_shards_in_another_order_give_the_same_manifest(tmp_path):
    build(tmp_path / "whole")
    store = build(tmp_path / "other", upto=3)
    entries = [store.write_shard_file(c, p, arrays(c, p)) for c, p in reversed(store.missing())]
    for entry in entries:
        store.add_shard(entry)
    assert contents(tmp_path / "other") == contents(tmp_path / "whole")


def test_resuming_with_other_settings_names_each(tmp_path):
    build(tmp_path / "index", upto=4)
    other = manifest(
        codec="int8",
        settings={"projection": {"name": "sjlt", "seed": 7}, "reduction": "mean"},
        checkpoints=({"name": "a", "step": 1}, {"name": "b", "step": 3}),
    )
    with pytest.raises(ManifestMismatchError) as caught:
        Store.resume(tmp_path / "index", other)
    for words in (
        '--codec is "float32" there, "int8" here',
        "projection.seed is 0 there, 7 here",
        "checkpoint 2 is b (step 2) there, b (step 3) here",
        "--restart",
    ):
        assert words in str(caught.value)
    assert "reduction" not in str(caught.value)


def test_one_writer_at_a_time(tmp_path):
    store = build(tmp_path / "index", upto=1)
    with store.lock(), pytest.raises(ManifestMismatchError, match="Another process"), store.lock():
        pass
    with store.lock():
        pass


@pytest.mark.parametrize("path", ["absent", "file"])
def test_no_index_is_said_with_the_command_that_makes_one(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingIndexError, match="whence index MODEL CORPUS -o"):
        Store.open(tmp_path / path)


def test_a_newer_format_is_refused(tmp_path):
    build(tmp_path / "index")
    file = tmp_path / "index" / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "format_version": 3, "whence_version": "9.1"}))
    with pytest.raises(FormatVersionError, match=r"version 3, .* 9\.1; .* up to 2.*pip install 'whence>=9\.1'"):
        Store.open(tmp_path / "index")


def test_every_flipped_byte_of_the_manifest_is_seen(tmp_path):
    build(tmp_path / "index", upto=4)
    file = tmp_path / "index" / "manifest.json"
    for where in range(0, file.stat().st_size, 5):
        flip(file, where)
        with pytest.raises((ChecksumError, FormatVersionError)):
            Store.open(tmp_path / "index")
        flip(file, where)
    flip(file, 100)
    assert [problem.file for problem in problems_at(tmp_path / "index")] == ["manifest.json"]


@pytest.mark.parametrize("name", ["corpus/part-00001.parquet", "checkpoint-001/shard-00002.safetensors"])
@pytest.mark.parametrize("harm", ["flip first", "flip middle", "flip last", "cut", "remove"])
def test_verify_names_the_harmed_file(tmp_path, name, harm):
    build(tmp_path / "index")
    file = tmp_path / "index" / name
    size = file.stat().st_size
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "remove":
        file.unlink()
    else:
        flip(file, {"flip first": 0, "flip middle": size // 2, "flip last": size - 1}[harm])
    assert [problem.file for problem in problems_at(tmp_path / "index")] == [name]


@pytest.mark.parametrize("is_old", [False, True])
def test_damage_is_refused_when_the_file_is_first_used(tmp_path, is_old):
    """A list of an older Whence has no fast checksum: the slower one is checked."""
    build(tmp_path / "index")
    if is_old:
        store = Store.open(tmp_path / "index")
        shards = tuple(replace(shard, xxh3=None) for shard in store.manifest.shards)
        parts = tuple(replace(part, xxh3=None) for part in store.manifest.parts)
        store._save(replace(store.manifest, shards=shards, parts=parts))
    queries, weights = torch.ones(2, 1, WIDTH), torch.ones(2)
    Store.open(tmp_path / "index").top_k(queries, weights, m=2)
    flip(tmp_path / "index" / "checkpoint-001" / "shard-00002.safetensors", 900)
    flip(tmp_path / "index" / "corpus" / "part-00001.parquet", 50)
    store = Store.open(tmp_path / "index")
    with pytest.raises(ChecksumError, match=r"shard-00002.safetensors is not what was written .*--repair"):
        store.top_k(queries, weights, m=2)
    with pytest.raises(ChecksumError, match=r"part-00001.parquet is not what was written .*--repair"):
        store.read_rows([8])


def test_shards_that_have_changed_places_are_refused(tmp_path):
    build(tmp_path / "index")
    first, second = (tmp_path / "index" / f"checkpoint-00{c}" / "shard-00000.safetensors" for c in (0, 1))
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    with pytest.raises(ChecksumError, match="wrong checksum"):
        Store.open(tmp_path / "index").shard(0, 0)


def rewritten(store):
    """What writes shards again."""
    return lambda wrong: [store.write_shard_file(*place, arrays(*place)) for place in wrong]


def test_repair_mends_shards_and_parts_and_nothing_else(tmp_path):
    store = build(tmp_path / "index")
    before = contents(tmp_path / "index")
    flip(tmp_path / "index" / "checkpoint-000" / "shard-00001.safetensors", 900)
    (tmp_path / "index" / "checkpoint-001" / "shard-00000.safetensors").unlink()
    flip(tmp_path / "index" / "corpus" / "part-00000.parquet", 50)
    (tmp_path / "index" / "checkpoint-001" / "shard-00007.safetensors").write_bytes(b"stray")
    (tmp_path / "index" / "notes.txt").write_text("mine")
    recomputed = []

    def recompute(wrong):
        recomputed.extend(wrong)
        return rewritten(store)(wrong)

    notes = repair(store, recompute)
    assert recomputed == [(0, 1)]  # the other shard's rows are in the bad part
    assert any("cannot be mended from shards" in note for note in notes)
    assert any("shard-00000" in note and "not recomputed" in note for note in notes)
    assert sum("the same bytes as before" in note for note in notes) == 1
    repair(store, recompute, reread=corpus_rows)
    assert recomputed == [(0, 1), (1, 0)]
    (tmp_path / "index" / "notes.txt").unlink()
    assert contents(tmp_path / "index") == before
    assert problems_at(tmp_path / "index") == []


def test_repair_says_when_the_bytes_differ(tmp_path):
    store = build(tmp_path / "index")
    flip(tmp_path / "index" / "checkpoint-000" / "shard-00000.safetensors", 900)
    (note,) = repair(store, lambda wrong: [store.write_shard_file(0, 0, arrays(1, 0))])
    assert "its bytes differ" in note
    assert problems_at(tmp_path / "index") == []


def test_a_cut_shard_is_refused_when_opened(tmp_path):
    store = build(tmp_path / "index")
    for size in (0, 5, 200, 600):
        file = tmp_path / "index" / "checkpoint-000" / "shard-00000.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ChecksumError, match=r"shard-00000.*--repair"):
            Store.open(store.place.root).shard(0, 0)


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path):
    store = build(tmp_path / "index", upto=3)
    before = contents(tmp_path / "index")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(StorageError, match=r"shard-00000\.safetensors.*bytes; .* free.*resumes"):
            store.write_shard(0, 0, arrays(0, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "index") == before
    assert build(tmp_path / "index").manifest.is_complete


def test_no_permission_is_a_storage_error(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        Store.create(tmp_path / "index", manifest())


def refusing(code, text):
    """A function that an operating system refuses."""

    def refuse(*args, **kwargs):
        raise OSError(code, text)

    return refuse


@pytest.mark.parametrize(("code", "text"), [(13, "Permission denied"), (5, "Input/output error")])
def test_what_cannot_be_read_is_a_storage_error(tmp_path, monkeypatch, code, text):
    store = build(tmp_path / "index")
    for name in ("cat_file", "info", "open", "find", "exists"):
        monkeypatch.setattr(LocalFileSystem, name, refusing(code, text))
    place, name = store.place, store.manifest.parts[0].file
    for read in (place.names, *(partial(getattr(place, verb), name) for verb in ("exists", "size", "read"))):
        with pytest.raises(StorageError, match=rf"Cannot read {place.root}.*: {text}\. Mend that"):
            read()
    for opened in (lambda: Store.open(place.root), lambda: store.read_part(0), lambda: store.shard(0, 0)):
        with pytest.raises(StorageError, match=text):
            opened()


def test_a_directory_in_place_of_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "index" / "manifest.json").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"Cannot read .*manifest\.json: Is a directory"):
        Store.open(tmp_path / "index")


def test_a_file_that_may_not_be_read_is_not_written_anew(tmp_path, monkeypatch):
    store = build(tmp_path / "index")
    real, bad = LocalFileSystem.open, store.manifest.shards[0].file

    def opened(self, path, *args, **kwargs):
        if path.endswith(bad):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "open", opened)
    (problem,) = problems_at(tmp_path / "index")
    assert problem.is_forbidden and remedy("place", problem).startswith(f"chmod u+r place/{bad}, ")
    before = contents(tmp_path / "index")
    assert repair(store, rewritten(store)) == [
        f"{bad}: left alone, for it may not be read; allow that, and verify again"
    ]
    assert contents(tmp_path / "index") == before


def test_verify_tells_of_a_file_that_cannot_be_read_and_goes_on(tmp_path, monkeypatch):
    store = build(tmp_path / "index")
    real, bad = LocalFileSystem.open, store.manifest.parts[0].file

    def opened(self, path, *args, **kwargs):
        if path.endswith(bad):
            raise OSError(5, "Input/output error")
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "open", opened)
    flip(tmp_path / "index" / store.manifest.shards[-1].file, -1)
    flip(tmp_path / "index" / store.manifest.shards[0].file, -1)
    found = {problem.file: problem.what for problem in problems_at(tmp_path / "index")}
    shards = [store.manifest.shards[n].file for n in (0, -1)]
    assert found == {bad: "cannot be read: Input/output error", **dict.fromkeys(shards, "wrong checksum")}
    assert not any(problem.is_forbidden for problem in problems_at(tmp_path / "index"))
    notes = repair(store, rewritten(store))
    assert sum(f"its rows are in {bad}, which is wrong" in note for note in notes) == 1
    assert sum("recomputed, the same bytes" in note for note in notes) == 1


def test_a_restart_where_nothing_can_be_removed_removes_nothing(tmp_path, monkeypatch):
    build(tmp_path / "index")
    before = contents(tmp_path / "index")
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "checkpoint-000")
    with pytest.raises(StorageError, match=r"checkpoint-000: it is read-only here\. Nothing was removed"):
        Store.restart(tmp_path / "index")
    assert contents(tmp_path / "index") == before
    monkeypatch.setattr(LocalFileSystem, "rm_file", refusing(30, "Read-only file system"))
    (tmp_path / "index" / "manifest.json.tmp").write_bytes(b"half")
    with pytest.raises(StorageError, match=r"Cannot remove .*manifest\.json\.tmp: Read-only file system\. Mend"):
        Store.resume(tmp_path / "index", manifest())


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", refusing(37, "No locks available"))
    with pytest.raises(StorageError, match=r"Cannot lock .*: No locks available"), Place.at(tmp_path).locked():
        pass


def test_what_a_store_elsewhere_refuses_is_a_storage_error(monkeypatch):
    """Their clients raise errors of their own, for missing credentials and the like."""
    address = f"memory://{uuid.uuid4()}/index"
    build(address)

    def refuse(*args, **kwargs):
        raise LookupError("Unable to locate credentials")

    for name in ("cat_file", "pipe_file"):
        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), name, refuse)
    with pytest.raises(StorageError, match=r"Cannot read .*manifest\.json: Unable to locate credentials"):
        Store.open(address)
    with pytest.raises(StorageError, match=r"Cannot write .*manifest\.json: Unable to locate credentials"):
        Store.create(f"{address}-2", manifest())


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s3://bucket/index", r"s3://bucket/index: addresses s3:// need a package .*: pip install s3fs"),
        ("gdrive://index", "addresses gdrive:// need a package that is not installed"),
        ("nothing://x/y", "nothing://x/y: not an address that can be opened"),
    ],
)
def test_an_address_that_cannot_be_opened_is_told(address, told, monkeypatch):
    without_s3fs(monkeypatch)
    monkeypatch.setitem(sys.modules, "gdrivefs", None)
    for use in (Place.at, Store.open, problems_at):
        with pytest.raises((SettingError, MissingExtraError), match=told):
            use(address)


def test_restart_removes_only_an_index(tmp_path):
    build(tmp_path / "index")
    (tmp_path / "index" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "index")
    with pytest.raises(SettingError, match="Nothing was changed"):
        Store.restart(tmp_path / "index")
    assert contents(tmp_path / "index") == before
    (tmp_path / "index" / "notes.txt").unlink()
    Store.restart(tmp_path / "index")
    assert contents(tmp_path / "index") == {}
    (tmp_path / "index").mkdir(exist_ok=True)
    (tmp_path / "index" / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match="not empty"):
        Store.create(tmp_path / "index", manifest())
    Store.restart(tmp_path / "absent")


STRANGERS = (
    "notes.txt", "corpus/part-mine.parquet", "corpus/part-00000-ab12.parquet", "corpus/part-0001.parquet",
    "other/corpus/part-00009.parquet", "checkpoint-500/shard-mine.safetensors",
    "checkpoint-000/a/shard-00009.safetensors",
    "corpus/part-00009.parquet.bak", "checkpoint-000/model-00001-of-00002.safetensors", "notes.tmp",
)  # fmt: skip


def test_leftovers_are_files_that_whence_names_and_does_not_list(tmp_path):
    build(tmp_path / "index")
    before = contents(tmp_path / "index")
    left = ("corpus/part-00009.parquet", "checkpoint-001/shard-00009.safetensors", "corpus/part-00000.parquet.tmp")
    for name in (*STRANGERS, *left):
        (tmp_path / "index" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "index" / name).write_text("mine")
    build(tmp_path / "index")
    assert contents(tmp_path / "index") == before | dict.fromkeys(STRANGERS, b"mine")
    with pytest.raises(SettingError, match="not an index's alone"):
        Store.restart(tmp_path / "index")


def test_whole_leftovers_stay_where_another_process_may_be_writing_them():
    address = f"memory://{uuid.uuid4()}/index"
    build(address)
    other = Store.open(address)
    other.place.write("checkpoint-001/shard-00009.safetensors", [b"in flight"], total=9)
    build(address).remove_leftovers()
    assert [problem.what for problem in problems_at(address)] == ["not listed in the manifest"]


def test_files_with_an_indexs_names_are_not_written_over_where_no_index_is(tmp_path):
    build(tmp_path / "index")
    (tmp_path / "index" / "manifest.json").unlink()
    before = contents(tmp_path / "index")
    with pytest.raises(SettingError, match=r"such as checkpoint-000/shard-00000.*Nothing was changed.*--restart"):
        build(tmp_path / "index")
    assert contents(tmp_path / "index") == before
    Store.restart(tmp_path / "index")
    assert build(tmp_path / "index").manifest.is_complete


def test_append_leaves_old_files_alone(tmp_path):
    store = build(tmp_path / "index")
    before = contents(tmp_path / "index")
    queries, weights = torch.randn(2, 1, WIDTH), torch.ones(2)
    asked = store.top_k(queries, weights, m=40)[0]  # what a scan keeps must not outlive the rows it saw
    with store.lock():
        store.extend({"name": "b.jsonl", "digest": "c1", "rows": 7})
        assert not store.manifest.is_complete
        store.write_part(3, corpus_rows(0))
        store.finish_parts()
        for checkpoint, part in store.missing():
            assert part == 3
            store.write_shard(checkpoint, part, arrays(checkpoint, part))
    after = contents(tmp_path / "index")
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert store.manifest.is_complete
    assert store.rows == 28
    assert store.read_rows([21]) == corpus_rows(0)[:1]
    found = store.top_k(queries, weights, m=40)[0]
    total, ok = brute_force(store, queries, weights, False)
    assert found.rows.shape[1] == int(ok.sum()) > asked.rows.shape[1]
    expected = total[0, ok].sort(descending=True).values.float()
    torch.testing.assert_close(found.scores[0], expected, rtol=1e-5, atol=1e-5)


def test_an_incomplete_index_is_not_scanned(tmp_path):
    store = build(tmp_path / "index", upto=5)
    with pytest.raises(MissingIndexError, match="4 shards are missing"):
        store.top_k(torch.randn(2, 1, WIDTH), torch.ones(2), m=3)
    with pytest.raises(SettingError, match="vectors of 5 numbers under 2 checkpoints, where the index has"):
        build(tmp_path / "index").top_k(torch.randn(2, 1, 5), torch.ones(2), m=3)


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "float16", "int8", "int4", "onebit"])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("checkpoints", [1, 2])
@pytest.mark.parametrize("settled", ["after each block", "at the end"])
def test_top_k_equals_brute_force(tmp_path, codec, cosine, checkpoints, settled, monkeypatch):
    monkeypatch.setattr(scan, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(scan, "_LEAST_ROWS", 3)
    if settled == "after each block":
        monkeypatch.setattr(scan, "_BLOCK_SCORES", 1)
        monkeypatch.setattr(scan, "_WAITING_PAIRS", 0)
    names = tuple({"name": str(c)} for c in range(checkpoints))
    store = build(tmp_path / "index", codec=codec, checkpoints=names)
    queries, weights = torch.randn(checkpoints, 5, WIDTH), torch.tensor([0.5, 2.0])[:checkpoints]
    queries[:, 4] = 0
    true, ok = brute_force(store, queries, weights, cosine)
    for m in (1, 4, 100):
        for side, ranking in enumerate(store.top_k(queries, weights, m=m, cosine=cosine)):
            signed = torch.where(ok, true * (1 - 2 * side), -torch.inf)
            count = min(m, int(ok.sum()))
            assert ranking.scores.shape == (5, count)
            expected = signed.sort(dim=1, descending=True, stable=True)
            assert torch.allclose(ranking.scores.double() * (1 - 2 * side), expected.values[:, :count], atol=2e-3)
            assert torch.equal(ranking.rows[4], expected.indices[4, :count])
            at = true.gather(1, ranking.rows)
            assert torch.allclose(ranking.scores.double(), at, atol=2e-3)
            if codec in ("float32", "bfloat16", "float16"):
                assert torch.equal(ranking.rows, expected.indices[:, :count])
                assert torch.allclose(ranking.scores.double(), at, atol=1e-5)
    pieces = list(store.scores(queries, weights, cosine=cosine))
    assert [first for first, _ in pieces] == [0, 7, 12]
    scores = torch.cat([scores for _, scores in pieces], 1)
    assert (scores[:, ~ok] == -torch.inf).all()
    assert torch.allclose(scores[:, ok].double(), true[:, ok], atol=2e-3)


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "onebit"])
def test_ties_rank_by_the_lower_row(tmp_path, codec, monkeypatch):
    monkeypatch.setattr(scan, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(scan, "_LEAST_ROWS", 2)
    store = Store.create(tmp_path / "index", manifest(codec=codec, checkpoints=({},)))
    for part in range(3):
        store.write_part(part, corpus_rows(part))
        vectors = torch.ones(PART_ROWS[part], WIDTH)
        vectors[3] = 2
        store.write_shard(
            0,
            part,
            all_ok(vectors),
        )
    store.finish_parts()
    helpful, opposing = store.top_k(torch.ones(1, 2, WIDTH), torch.ones(1), m=5)
    assert helpful.rows.tolist() == [[3, 10, 15, 0, 1]] * 2
    assert opposing.rows.tolist() == [[0, 1, 2, 4, 5]] * 2


def test_bfloat16_ranks_rows_that_its_products_cannot_tell_apart(tmp_path):
    store = Store.create(tmp_path / "index", manifest(codec="bfloat16", width=512, checkpoints=({},)))
    n = 3000
    rng = torch.Generator().manual_seed(5)
    vectors = 1 + torch.randn(n, 512, generator=rng) / 50  # scores near 512, where bfloat16 has steps of 2
    store.write_part(0, [{"id": str(i), "source": None, "row": "{}"} for i in range(n)])
    store.write_shard(
        0,
        0,
        all_ok(vectors),
    )
    store.finish_parts()
    queries = 1 + torch.randn(1, 20, 512, generator=rng) / 50
    true, _ = brute_force(store, queries, torch.ones(1), False)
    helpful, opposing = store.top_k(queries, torch.ones(1), m=25)
    assert torch.allclose(helpful.scores.double(), true.topk(25).values, rtol=1e-6)
    assert torch.allclose(opposing.scores.double(), true.topk(25, largest=False).values, rtol=1e-6)


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "onebit"])
@pytest.mark.parametrize("cosine", [False, True])
def test_a_row_whose_norm_overflows_hides_no_other(codec, cosine):
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(300, 64, generator=rng)
    whole = all_ok(vectors)
    queries = torch.randn(1, 2, 64, generator=rng)
    queries[0, 1] = 0
    queries = scan.unit(queries) if cosine else queries
    found = []
    for norm in (whole.norm[7].item(), torch.inf):
        whole.norm[7] = norm
        scan_query = scan.ScanQuery(queries=queries, weights=torch.ones(1), cosine=cosine, codec=codecs.codec(codec))
        found.append(
            scan.top_k(scan_query, scan.batches_of([(0, [encoded(whole, scan_query.codec)])], queries.shape[1]), 3)
        )
    for before, after in zip(*found, strict=True):
        assert after.rows.shape == (2, 3) and (after.rows >= 0).all()
        assert after.rows[1].tolist() == [0, 1, 2], "a query of zeros scores all alike"
        assert 7 in before.rows[0] or torch.equal(before.rows[0], after.rows[0])


def test_zeros_rank_where_subnormal_numbers_are_taken_for_zero():
    vectors = torch.zeros(2000, 64)
    vectors[5] = 1
    whole = all_ok(vectors)
    scan_query = scan.ScanQuery(
        queries=torch.ones(1, 1, 64), weights=torch.ones(1), cosine=False, codec=codecs.codec("float32")
    )
    batches = list(scan.batches_of([(0, [encoded(whole, scan_query.codec)])], 1))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers to zero")
    try:
        helpful, opposing = scan.top_k(scan_query, batches, 3)
    finally:
        torch.set_flush_denormal(False)
    assert helpful.rows.tolist() == [[5, 0, 1]]
    assert opposing.rows.tolist() == [[0, 1, 2]]


def test_a_long_manifest_is_not_written_for_every_file_and_ends_the_same(tmp_path, monkeypatch):
    """Else an index of n files takes a time that grows as n^2."""
    expected, written = build(tmp_path / "one"), []
    real = Place.write
    monkeypatch.setattr(Place, "write", lambda self, name, *a, **b: written.append(name) or real(self, name, *a, **b))
    monkeypatch.setattr("whence.indexing.store.FILES_PER_WRITE", 2)
    store = build(tmp_path / "two", upto=8)
    assert len(store.manifest.shards) == 5 > len(Store.open(tmp_path / "two").manifest.shards)
    store.flush()
    assert Store.open(tmp_path / "two").manifest == store.manifest
    build(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert written.count("manifest.json") < 1 + len(expected.manifest.parts) + len(expected.manifest.shards)


def test_open_shards_hold_no_file_handle(tmp_path):
    """An index has more shards than a process may have handles."""
    build(tmp_path / "index")
    store, (soft, hard) = Store.open(tmp_path / "index"), resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 3, hard))
    try:
        ranking, _ = store.top_k(torch.ones(2, 1, WIDTH), torch.ones(2), m=3)
        assert len(store.vectors(list(range(store.rows)))[0]) == 2
        assert len(store.read_rows(ranking.rows[0].tolist())) == 3
        assert problems_at(tmp_path / "index") == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_query_is_answered_by_nothing(tmp_path):
    helpful, opposing = build(tmp_path / "index", codec="int8").top_k(torch.zeros(2, 0, WIDTH), torch.ones(2), m=3)
    assert helpful.rows.shape[0] == opposing.rows.shape[0] == 0


@pytest.mark.parametrize("codec", ["bfloat16", "int8"])
def test_an_index_lives_at_any_fsspec_address(codec):
    address = f"memory://{uuid.uuid4()}/index"
    store = build(address, codec=codec)
    again = Store.open(address)
    assert again.manifest.is_complete
    assert problems_at(address) == []
    assert again.read_rows([8]) == corpus_rows(1)[1:2]
    queries = torch.randn(2, 3, WIDTH)
    true, ok = brute_force(store, queries, torch.ones(2), False)
    helpful, _ = again.top_k(queries, torch.ones(2), m=4)
    expected = torch.where(ok, true, -torch.inf).topk(4).values
    assert torch.allclose(helpful.scores.double(), expected, atol=2e-3)
    name = again.manifest.shards[0].file
    fs = fsspec.filesystem("memory")
    fs.pipe_file(again.place.path(name), again.place.read(name)[:-1])
    assert [problem.file for problem in problems_at(address)] == [name]
    Store.restart(address)
    assert Store.resume(address, manifest()).manifest == manifest()
