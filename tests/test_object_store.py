"""An index in an object store: the local one's bytes, one writer, and nothing lost to faults of network and service."""

import errno
import json
import os
import socket
import time

import pytest
import torch
from benchmarks.reliability.faulty_store import FAULTS, Faults, endpoint, faulty, s3_store, stored
from safetensors.torch import save

from conftest import contents, corpus_rows, write_jsonl
from whence import leases, local_cache, remote_calls, uploads
from whence.ablation.member_training import train_pool
from whence.ablation.pipeline import ablate
from whence.ablation.pool import open_pool
from whence.checksums import Written, digest
from whence.errors import ChecksumError, ManifestMismatchError, SettingError, StorageError
from whence.evaluation.bank_pipeline import bank
from whence.evaluation.bank_store import open_bank
from whence.evaluation.removal import evaluate_removal
from whence.indexing.build import append, index, verify
from whence.models.saved_files import directory_here
from whence.opened_tensors import opened_tensors
from whence.recovery.pipeline import recover
from whence.storage import Place
from whence.tracing.pipeline import trace
from whence.training.trainer import train

S3FileSystem = pytest.importorskip("s3fs").S3FileSystem
pytest.importorskip("moto.server")
pytestmark = pytest.mark.timeout(240)
BUILT = {"projection": "two_sided", "width": 8, "progress": False}


@pytest.fixture(scope="module")
def store():
    """Port of an S3 store."""
    with pytest.MonkeyPatch.context() as patch, s3_store(patch) as port:
        yield port


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setenv("WHENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_calls, "FIRST", 0.01)
    monkeypatch.setattr(leases, "SETTLED", 0.05)


@pytest.fixture
def place(store, tmp_path):
    """A directory of its own in the store."""
    return Place.at(f"s3://bucket/{tmp_path.name}")


# -- large files


def test_a_large_file_goes_through_a_draft_on_this_disk(place, monkeypatch, tmp_path):
    """Nothing of it is left; the store has the same bytes."""
    monkeypatch.setattr(uploads, "IN_MEMORY", 1000)
    piece, asked, real = os.urandom(2**20), [], place.fs.put_file
    monkeypatch.setattr(place.fs, "put_file", lambda file, *args: (asked.append(file), real(file, *args)))
    written = place.write("large", (piece for _ in range(3)), total=3 * 2**20)
    assert (written.bytes, written.xxh3) == (3 * 2**20, digest(piece for _ in range(3)))
    assert place.defect("large", written) is None
    assert len(asked) == 1 and [*(tmp_path / "cache").iterdir()] == []
    place.write("small", [b"x" * 1000], total=1000)
    assert len(asked) == 1


def test_no_room_for_a_draft_says_where_to_have_one(place, monkeypatch, tmp_path):
    monkeypatch.setattr(uploads, "IN_MEMORY", 10)

    def full(pieces, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(uploads, "copied", full)
    with pytest.raises(StorageError, match=r"a draft of its 11 bytes .* to .*cache: No space.*WHENCE_CACHE name a dir"):
        place.write("large", [b"x" * 11], total=11)
    assert not place.exists("large") and [*(tmp_path / "cache").iterdir()] == []
    monkeypatch.undo()
    monkeypatch.setattr(uploads, "IN_MEMORY", 10)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WHENCE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"cannot be written to .*file/cache: Not a directory. Let WHENCE_CACHE"):
        place.write("large", [b"x" * 11], total=11)


# -- an index


def test_an_index_there_is_the_one_here(store, tiny_llama, tmp_path, small_parts):
    there, here = f"s3://bucket/{tmp_path.name}", tmp_path / "here"
    for out in (there, here):
        index(tiny_llama, corpus_rows(50), out, **BUILT)
        append(out, corpus_rows(20, first=50), progress=False)
    assert stored(tmp_path.name) == contents(here)
    asked = [trace(out, "5 and 3?", " yes, 12", top=3) for out in (there, here)]
    assert [hit.as_row() for hit in asked[0].hits] == [hit.as_row() for hit in asked[1].hits]
    place = Place.at(there)
    place.write("checkpoint-000/shard-00001.safetensors", [b"damaged"], total=7)
    problems, notes = verify(there, repair=True)
    assert len(problems) == 1 and "the same bytes as before" in notes[0]
    assert stored(tmp_path.name) == contents(here)


def test_faults_lose_nothing(store, tiny_llama, tmp_path, small_parts, monkeypatch):
    faults, here = Faults(every=4), tmp_path / "here"
    index(tiny_llama, corpus_rows(50), here, **BUILT)
    with faulty(store, faults) as port:
        endpoint(monkeypatch, port)
        index(tiny_llama, corpus_rows(50), f"s3://bucket/{tmp_path.name}", **BUILT)
        traced = trace(f"s3://bucket/{tmp_path.name}", "5 and 3?", " yes, 12", top=3)
        assert verify(f"s3://bucket/{tmp_path.name}") == ([], [])
    endpoint(monkeypatch, store)
    assert min(faults.injected.values()) > 0 and {*faults.injected} == {*FAULTS}
    assert stored(tmp_path.name) == contents(here)
    assert [hit.id for hit in traced.hits] == [hit.id for hit in trace(here, "5 and 3?", " yes, 12", top=3).hits]


def test_a_store_that_never_answers_is_told_of(store, place, monkeypatch):
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with faulty(store, Faults(every=1, kinds=("503",))) as port:
        endpoint(monkeypatch, port)
        with pytest.raises(StorageError, match=r"Cannot read s3://bucket/\S+/x: .*run the same command again"):
            Place.at(place.root).read("x")
    endpoint(monkeypatch, store)


def test_messages_name_an_address_that_can_be_typed(place):
    assert place.root.startswith("s3://bucket/") and place.path("x") == f"{place.root}/x"
    with pytest.raises(FileNotFoundError):
        place.read("x")


# -- pools, banks, evidence


def test_a_pool_there_is_the_one_here(store, tiny_llama, tmp_path):
    """Members, matrices of inputs and losses; trainings are made on this machine's disk, which is left clean."""
    rows = [row | {"source": f"s{number % 2}"} for number, row in enumerate(corpus_rows(12))]
    corpus = write_jsonl(tmp_path / "rows.jsonl", rows)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", corpus_rows(3, first=50))
    settings = {"tokens": 200, "steps": 4, "warmup_steps": 1, "max_tokens": 32, "lr": 5e-3, "progress": False}
    there, here = f"s3://bucket/{tmp_path.name}", tmp_path / "here"
    tables = []
    for out in (there, here):
        train_pool(tiny_llama, corpus, out, **settings)
        found = ablate(out, held_out, method="regmean", truth=True, progress=False)
        tables.append(list(found.rows()))
    assert tables[0] == tables[1]
    mine, theirs = contents(here), stored(tmp_path.name)
    assert {*mine} == {*theirs} and all(mine[name] == theirs[name] for name in mine if "safetensors" in name)
    assert not [*(tmp_path / "cache" / "work").glob("*/work/*")]
    Place.at(there).write("members/000.safetensors", [b"damaged"], total=7)
    with pytest.raises(ChecksumError, match=r"members/000\.safetensors is not what was written .*Remove the file"):
        open_pool(there).verify()
    open_pool(there).member("s0")  # of its copy here, which is whole


def test_a_bank_there_has_the_losses_of_the_one_here(store, tiny_llama, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", corpus_rows(12))
    recipe = {"batch_size": 4, "epochs": 1, "lr": 5e-3, "max_tokens": 32, "checkpoints": 1, "progress": False}
    run = train(tiny_llama, rows, tmp_path / "run", **recipe)
    there, here, made = f"s3://bucket/{tmp_path.name}", tmp_path / "here", []
    for out in (there, here):
        bank(run, rows, out, queries=corpus_rows(3, first=50), subsets=2, keep_weights=True, progress=False)
        bank(run, rows, out, queries=corpus_rows(2, first=60), progress=False)  # measured on the weights that were kept
        removed = evaluate_removal(str(out), ["bm25"], share=0.2, seeds=1)
        made.append((open_bank(out), [(row["method"], row["effect"]) for row in removed.rows()]))
    (first, first_removed), (second, second_removed) = made
    assert torch.equal(first.losses(), second.losses()) and first_removed == second_removed
    assert first.losses().shape[1] == 5 and {*contents(here)} == {*stored(tmp_path.name)}
    weights = first.weights(first.members[0])
    assert (
        weights.is_relative_to(tmp_path / "cache")
        and (weights / "model.safetensors").read_bytes()
        == (second.weights(second.members[0]) / "model.safetensors").read_bytes()
    )
    assert not [*(tmp_path / "cache" / "work").glob("*/training-*")]


def test_evidence_there_is_the_one_here(store, tiny_llama, tmp_path):
    rows = corpus_rows(40)
    final = train(tiny_llama, rows[:20], tmp_path / "final", optimizer="sgd", lr=0.05, batch_size=4, epochs=1,
                  max_tokens=32, checkpoints=1, progress=False)  # fmt: skip
    how = {"count": 20, "epochs": 1.0, "batch_size": 4, "optimizer": "sgd", "lr": 0.05, "max_tokens": 32}
    there, here = f"s3://bucket/{tmp_path.name}", tmp_path / "here"
    scores = [recover(tiny_llama, final, rows, work=out, mixture="none", progress=False, **how).scores
              for out in (there, here, there)]  # fmt: skip
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[2], scores[0])
    names = {name for name in contents(here) if name.startswith("evidence/") or "/evidence/" in name}
    assert set(stored(tmp_path.name)) - {"template_date.json"} == names and len(names) > 6
    assert not [*tmp_path.glob("s3:*")]


def test_what_is_used_of_a_store_is_what_was_checked(place, monkeypatch, tmp_path):
    """Not a copy that was checked, and then the store's own bytes; without room for a copy a file is checked too."""
    place.write_recorded("rows.bin", b"whole")
    recorded = Written(5, None, digest([b"whole"], fast=True))
    place.check("rows.bin", recorded, "Mend it.", also=lambda file: file.read_bytes())  # there is a copy now
    place.write("rows.bin", [b"wrong"], total=5)
    for read in (lambda: place.read_recorded("rows.bin"), lambda: place.read_checked("rows.bin", recorded, "Mend it."),
                 lambda: place.check("rows.bin", recorded, "Mend it.")):  # fmt: skip
        with pytest.raises(ChecksumError, match=r"rows\.bin is not what was written \(wrong checksum\)"):
            read()
    place.write("rows.bin", [b"whole"], total=5)
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("WHENCE_CACHE", str(blocked / "cache"))
    place.check("rows.bin", recorded, "Mend it.")
    assert place.read_recorded("rows.bin") == b"whole"
    with pytest.raises(StorageError, match=r"no room for a copy of its 5 bytes .*WHENCE_CACHE_SIZE"):
        place.here("rows.bin", recorded, "Mend it.")


def test_tensors_of_a_store_are_fetched_once_however_little_room_there_is(place, monkeypatch):
    data = save({"a": torch.ones(1000), "b": torch.zeros(1000)})
    names = ("x.safetensors", "y.safetensors", "z.safetensors")
    files = {name: place.write(name, [save({"a": torch.full((1000,), float(n)), "b": torch.zeros(1000)})], total=0)
             for n, name in enumerate(names)}  # fmt: skip
    monkeypatch.setenv("WHENCE_CACHE_SIZE", str(2 * len(data)))
    fetched, fetch = [], Place._fetch
    monkeypatch.setattr(Place, "_fetch", lambda self, name, file: (fetched.append(name), fetch(self, name, file)))
    for tensor in ("a", "b") * 3:
        for n, (name, recorded) in enumerate(files.items()):
            with opened_tensors(place, name, recorded, "Mend it.") as opened:
                assert float(opened.get_tensor(tensor)[0]) == (n if tensor == "a" else 0)
    assert sorted(fetched) == sorted(files)


def test_a_directory_that_lacks_its_list_is_told_of(place):
    with pytest.raises(ChecksumError, match=r"whence_checksums\.json is not what was written \(missing\)\. Mend it\."):
        directory_here(place, "members/x/weights", "Mend it.")


def test_what_is_made_in_place_is_made_on_a_disk(place, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=r"^-o s3://bucket/\S+: this writes to a disk alone"):
        train(tiny_llama, corpus_rows(8), place.root, progress=False)
    assert not [*tmp_path.glob("s3*")]


def test_a_lease_holds_for_what_is_below(place):
    with place.locked():
        assert place.below("evidence", "base")._lease() is place._lease() is not None
        assert Place.at(f"{place.root}-other")._lease() is None


# -- one writer


def test_a_second_writer_is_refused_until_the_first_is_done(place):
    with place.locked():
        place.write("x", [b"1"], total=1)
        with pytest.raises(ManifestMismatchError, match=rf"is writing {place.root} \(process {os.getpid()} of "):
            Place.at(place.root)._leased().__enter__()
        assert place.names() == ["x"]
    with place.locked():
        assert place.read("x") == b"1"
    assert "whence.lease" not in stored(place.root.removeprefix("s3://bucket/"))


def lease_of(place, **changed):
    holder = {"token": "t", "host": "elsewhere", "process": 7, "space": "p", "started": "s", "expires": 60} | changed
    holder["expires"] += time.time()
    place.fs.pipe_file(place.path(leases.NAME), json.dumps(holder).encode())


@pytest.mark.parametrize(
    "holder, is_taken",
    [
        ({}, False),
        ({"expires": -5}, False),  # clocks may differ
        ({"expires": -3600}, True),
        ({"host": socket.gethostname(), "process": 2**22 + 1, "space": leases._space()}, True),  # it is gone
        ({"host": socket.gethostname(), "process": 2**22 + 1}, False),  # of a container of the same name
    ],
)
def test_a_lease_is_taken_over_when_it_has_run_out_or_its_process_is_gone(place, holder, is_taken):
    lease_of(place, **holder)
    if is_taken:
        with place.locked():
            place.write("x", [b"1"], total=1)
    else:
        with pytest.raises(ManifestMismatchError, match=r"\(process \d+ of \S+\)"), place.locked():
            pass


def test_a_lease_is_renewed(place, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED", 0.05)
    with place.locked():
        first = json.loads(place.read(leases.NAME))["expires"]
        limit = time.monotonic() + 20
        while json.loads(place.read(leases.NAME))["expires"] <= first:
            assert time.monotonic() < limit
            time.sleep(0.02)


def test_who_has_lost_the_lease_commits_nothing(place):
    with place.locked():
        lease_of(place)
        with pytest.raises(ManifestMismatchError, match=r"has lost its lease, whence.lease \(it was cut off"):
            place.write("manifest.json", [b"{}"], total=2, is_commit=True)
        assert not place.exists("manifest.json")
    assert place.exists(leases.NAME)  # the other's


def test_who_was_cut_off_writes_nothing_more(place, monkeypatch):
    with place.locked():
        monkeypatch.setattr(leases, "LASTS", -1.0)
        with pytest.raises(ManifestMismatchError, match="cut off"):
            place.write("x", [b"1"], total=1)


def test_a_commit_replaces_only_what_was_read(place):
    place.write("m", [b"1"], total=1, is_commit=True)
    place.write("m", [b"2"], total=1, is_commit=True)
    place.fs.pipe_file(place.path("m"), b"another's")
    with pytest.raises(ManifestMismatchError, match="another process has written it meanwhile"):
        place.write("m", [b"3"], total=1, is_commit=True)
    assert place.read_committed("m") == b"another's"
    place.write("m", [b"4"], total=1, is_commit=True)
    assert place.read("m") == b"4"
    place.remove("m")
    place.write("m", [b"5"], total=1, is_commit=True)


@pytest.mark.parametrize(
    "error, takes",
    [(OSError(errno.EINVAL, "412"), "PreconditionFailed"), (OSError(errno.ENOSYS, "501"), "NotImplemented")],
)
def test_stores_refuse_conditions_in_their_own_words(place, monkeypatch, error, takes):
    """s3fs makes an error of a number of what another store than Amazon's answers."""
    real, code = type(place.fs).pipe_file, 412 if takes == "PreconditionFailed" else 501
    error.__cause__ = type("Answer", (Exception,), {"response": {"ResponseMetadata": {"HTTPStatusCode": code}}})()

    def pipe(self, path, data, **more):
        if more and (code == 501 or self.exists(path)):
            raise error
        return real(self, path, data)

    monkeypatch.setattr(type(place.fs), "pipe_file", pipe)
    with place.locked():
        with pytest.raises(ManifestMismatchError, match="Another process is writing"), place.locked():
            pass
        place.write("m", [b"1"], total=1, is_commit=True)
        if code == 501:
            place.write("m", [b"2"], total=1, is_commit=True)
    lease_of(place, expires=-3600)
    with place.locked():
        assert place.names() == ["m"]


def test_a_store_without_conditions_has_leases_too():
    place = Place.at("memory://leases/index")
    with place.locked():
        with pytest.raises(ManifestMismatchError, match="Another process is writing"), place.locked():
            pass
        place.write("x", [b"1"], total=1)
    assert place.names() == ["x"]


# -- the copy on this machine


def test_a_file_is_fetched_once_and_mapped(place, tmp_path, monkeypatch):
    data = bytes(range(256)) * 40
    written = place.write("x", [data], total=len(data))
    assert bytes(place.mapped("x", written).tolist()) == data
    monkeypatch.setattr(type(place.fs), "get_file", None)
    assert bytes(place.mapped("x", written).tolist()) == data
    assert [file.stat().st_size for file in (tmp_path / "cache").iterdir()] == [len(data)]


def test_a_file_that_came_short_is_fetched_again(tmp_path):
    data, calls = b"0123456789", []

    def fetch(file):
        calls.append(file)
        file.write_bytes(data[: 5 * len(calls)])

    file = local_cache.cached(Written(10, None, digest([data])), fetch)
    assert file.read_bytes() == data and len(calls) == 2
    other = local_cache.cached(Written(10, None, digest([b"another"])), lambda file: file.write_bytes(data))
    assert other is None and [*(tmp_path / "cache").iterdir()] == [file]


def test_a_damaged_copy_is_fetched_again(tmp_path, monkeypatch):
    data = b"0123456789"
    written = Written(10, None, digest([data]))
    file = local_cache.cached(written, lambda file: file.write_bytes(data))
    monkeypatch.setattr(local_cache, "_whole", set())  # another process
    file.write_bytes(bytes(10))
    assert local_cache.cached(written, lambda file: file.write_bytes(data)).read_bytes() == data


def test_where_there_is_no_room_nothing_is_kept(tmp_path, place):
    def fetch(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert local_cache.cached(Written(10, None, digest([b"x"])), fetch) is None
    assert [*(tmp_path / "cache").iterdir()] == []


def test_what_is_not_a_copy_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WHENCE_CACHE_SIZE", "15")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_bytes(bytes(1000))
    left = tmp_path / "cache" / f"{local_cache.DRAFT}old"
    left.write_bytes(b"")
    os.utime(left, (1, 1))
    for number in range(3):
        data = bytes([number]) * 10
        local_cache.cached(Written(10, None, digest([data])), lambda file, data=data: file.write_bytes(data))
    assert len([*(tmp_path / "cache").iterdir()]) == 2 and (tmp_path / "cache" / "thesis.txt").exists()


def test_files_used_longest_ago_make_room(tmp_path, monkeypatch):
    monkeypatch.setenv("WHENCE_CACHE_SIZE", "25")

    def keep(number):
        data = bytes([number]) * 10
        file = local_cache.cached(Written(10, None, digest([data])), lambda file: file.write_bytes(data))
        os.utime(file, (number, number))
        return file

    first, second = keep(1), keep(2)
    os.utime(first, (3, 3))
    third = keep(4)
    assert {*(tmp_path / "cache").iterdir()} == {first, third} and not second.exists()
    assert local_cache.cached(Written(26, None, "x"), lambda file: None) is None  # it alone is too large
    monkeypatch.setenv("WHENCE_CACHE_SIZE", "much")
    with pytest.raises(SettingError, match="WHENCE_CACHE_SIZE much: a size is expected"):
        local_cache.most_bytes()
