"""A plan says what a build then takes: bytes to the byte, memory within a fifth; a bound on memory is kept."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

from conftest import byte_tokenizer, contents, corpus_rows, cut_short, tiny_model, write_jsonl
from whence.corpus.tokens import Encoded
from whence.errors import ManifestMismatchError, SettingError
from whence.indexing import memory_bound, pilot, shards
from whence.indexing.build import index
from whence.indexing.codecs import CODECS, codec
from whence.indexing.memory import available_memory, forget_peak, peak_resident, resident
from whence.indexing.memory_bound import bounded, least_tokens
from whence.indexing.pilot import Pilot, Sample
from whence.indexing.planning import DISK, MEMORY, TIME, Phase, Plan, plan
from whence.indexing.vectors import IndexSettings
from whence.reports.plan_tables import plan_answer, plan_table
from whence.sizes import size_of

SPACES = [
    {"projection": "two_sided", "width": 4, "codec": "bfloat16"},
    {"projection": "count_sketch", "width": 300, "codec": "onebit"},
    {"projection": "tensor_sketch", "width": 128, "codec": "int4"},
]


def sizes(path):
    """Bytes of an index' files by part of a plan."""
    files = contents(path)
    return {
        "vectors": sum(len(data) for name, data in files.items() if name.startswith("checkpoint-")),
        "the corpus' copy": sum(len(data) for name, data in files.items() if name.startswith("corpus/")),
        "the manifest": len(files["manifest.json"]),
    }


# -- bytes


@pytest.mark.parametrize("space", SPACES, ids=[space["projection"] for space in SPACES])
@pytest.mark.usefixtures("small_parts")
def test_bytes_are_those_of_the_index(tiny_run, tmp_path, space):
    corpus = write_jsonl(tmp_path / "rows.jsonl", corpus_rows(70))
    found = plan(tiny_run, corpus, tmp_path / "index", checkpoints="all", **space)
    assert not (tmp_path / "index").exists()
    built = index(tiny_run, corpus, tmp_path / "index", checkpoints="all", progress=False, **space)
    written = sizes(tmp_path / "index")
    assert found.disk["vectors"] == written["vectors"]
    assert found.disk["the corpus' copy"] == written["the corpus' copy"]
    assert found.disk["the manifest"] == pytest.approx(written["the manifest"], rel=0.02)
    shard = built.store.shard(0, 0)
    row = sum(getattr(shard, name)[0].nbytes for name in ("vectors", "scale", "norm", "loss", "status", "tokens"))
    assert found.bytes_per_row == 2 * row
    assert [phase.name for phase in found.phases] == ["checking and loading", "copying rows", "gradients", "encoding"]
    assert found.phases[1].about == "70 rows" and all(phase.seconds > 0 for phase in found.phases)
    assert found.seconds == sum(phase.seconds for phase in found.phases)


@pytest.mark.usefixtures("small_parts")
def test_a_sample_stands_for_a_long_corpus(tiny_llama, tmp_path, monkeypatch):
    rows = [row | {"prompt": row["prompt"] * (1 + number // 40)} for number, row in enumerate(corpus_rows(320))]
    monkeypatch.setattr(pilot, "PARTS", 5)
    found = plan(tiny_llama, rows, tmp_path / "index", width=2)
    index(tiny_llama, rows, tmp_path / "index", width=2, progress=False)
    written = sizes(tmp_path / "index")
    assert found.disk["vectors"] == written["vectors"]
    assert found.disk["the corpus' copy"] == pytest.approx(written["the corpus' copy"], rel=0.1)
    tokens = int(found.phases[2].about.split()[0].replace(",", ""))
    longest = [len(byte_tokenizer()(row["prompt"] + row["completion"]).input_ids) + 1 for row in rows]
    assert tokens == pytest.approx(sum(min(96, length) for length in longest), rel=0.25)


@pytest.mark.usefixtures("small_parts")
def test_of_an_index_that_was_begun_the_rest_is_planned(tiny_llama, tmp_path, monkeypatch):
    rows, out = corpus_rows(64), tmp_path / "index"
    whole = plan(tiny_llama, rows, out, width=4, tokens_per_batch=64)
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        cut_short(stopping, "add_shard", 1)
        index(tiny_llama, rows, out, width=4, tokens_per_batch=64, progress=False)
    rest = plan(tiny_llama, rows, out, width=4)
    assert rest.about.endswith("passes of 64 tokens"), "an index keeps its own"
    assert rest.disk["vectors"] == pytest.approx(0.75 * whole.disk["vectors"], abs=2)
    assert rest.disk["the corpus' copy"] == 0 and rest.phases[1].seconds == 0
    assert "1 of 4 shards are there" in rest.notes[0]
    assert plan(tiny_llama, rows, out, width=4, restart=True).disk["vectors"] == whole.disk["vectors"]
    with pytest.raises(ManifestMismatchError, match="begun with other settings: --width is 4 there, 5 here"):
        plan(tiny_llama, rows, out, width=5)


# -- memory, in processes of their own, whose peak no other work has raised

MEASURED = """
import atexit, sys
from whence.indexing.memory import peak_resident
atexit.register(lambda: sys.stderr.write(f"peak {peak_resident()}"))
from whence.cli.app import main
main()
"""


def process(*words):
    """A command's JSON and the peak of its process, in bytes."""
    command = [sys.executable, "-c", MEASURED, *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout), int(done.stderr.rpartition("peak ")[2])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Directories of a model whose passes take as much memory as all libraries, and of a corpus for it."""
    home = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=259,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(home / "model")
    byte_tokenizer().save_pretrained(home / "model")
    rows = [{"id": str(n), "text": f"{n} " * (20 + n % 17)} for n in range(60)]
    return home / "model", write_jsonl(home / "rows.jsonl", rows)


def test_memory_is_that_of_the_build_and_a_bound_is_kept(wide, tmp_path):
    command = [*wide, "-o", tmp_path / "index", "--projection", "count_sketch", "--width", "20000"]
    planned, _ = process("plan", *command)
    assert planned["next"][1] == "index" and planned["limit"] == TIME
    info, peak = process("index", *command)
    assert info["settings"]["tokens_per_batch"] == 2048
    assert planned["memory"] == pytest.approx(peak, rel=0.2)
    bound = round(0.8 * peak)
    info, bounded_peak = process("index", *command[:2], "-o", tmp_path / "small", *command[4:], "--memory", bound)
    assert bounded_peak < bound < peak
    assert 128 <= info["settings"]["tokens_per_batch"] < 2048


class Straight(Pilot):
    """A pilot whose passes take so many bytes a token."""

    def __init__(self, loaded, tokens=None, per_token=100_000):
        self.model, self.settings = loaded, IndexSettings(tokens_per_batch=tokens)
        self.start, self.per_token, self.tried = 10**9, per_token, []

    def tokenised(self, rows):
        """An example for each length."""
        return [Encoded([5] * row["length"], [False] + [True] * (row["length"] - 1)) for row in rows]

    def peak(self, examples, tokens):
        """In a straight line."""
        self.tried.append(tokens)
        return self.start + self.per_token * tokens


def sample_of_lengths(*lengths):
    """A sample with a part of rows of these lengths."""
    return Sample(parts=[], widest=[{"length": length} for length in lengths], sizes=[1], characters=1, seconds=0.0)


def test_tokens_of_a_pass_are_the_most_that_the_bound_allows_and_none_more_are_tried():
    sample, loaded = sample_of_lengths(100, 3), tiny_model("llama")
    for memory, expected in ((2 * 10**9, 2048), (1_250_000_000, 2048), (1_150_000_000, 1024), (1_040_000_000, 128)):
        found = Straight(loaded)
        assert bounded(found, sample, memory) == expected
        assert found.tried == [128 * 2**power for power in range(len(found.tried))] and found.tried[-1] == expected
        assert memory >= found.start + found.per_token * expected
    assert bounded(Straight(loaded, 300), sample, 2 * 10**9) == 300
    examples = Straight(loaded).tokenised([{"length": 4000}])
    assert least_tokens(examples, 2048) == 2048, "a longer row is a pass of its own"


def test_a_bound_that_no_pass_keeps_is_refused_with_what_would():
    told = r"--memory 1.02 GB: with the longest row, of 100 tokens, .* takes 1.03 GB, of which 1 GB are the loaded "
    told += r"model and libraries. To mend it: --memory 1040M, or .*\(--max-tokens 50\), or --gradient-checkpointing\."
    loaded = tiny_model("llama")
    with pytest.raises(SettingError, match=told):
        bounded(Straight(loaded), sample_of_lengths(100), 1_020_000_000)
    assert bounded(Straight(loaded), sample_of_lengths(100), 1_040_000_000) == 128


def test_a_bound_decides_a_new_index_alone(tiny_llama, tmp_path, monkeypatch):
    rows, out, tried = corpus_rows(9), tmp_path / "index", []

    def four(pilot, sample, memory):
        tried.append(memory)
        return 4

    monkeypatch.setattr("whence.indexing.preparation.bounded", four)
    built = index(tiny_llama, rows, out, width=2, memory="2GiB", progress=False)
    assert built.tokens_per_batch == built.settings.tokens_per_batch == 4
    assert index(tiny_llama, rows, out, width=2, memory="1G", progress=False).tokens_per_batch == 4
    assert tried == [2**31]


@pytest.mark.parametrize("text", ["", "0", "-1", "2 apples", "G", "1e9", "800m b", "0.5"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(SettingError, match=f"--memory {text}: a size is expected, such as 800M"):
        size_of(text)


def test_memory_of_this_process_is_told():
    forget_peak()
    before = peak_resident()
    held = torch.ones(2**24)
    assert peak_resident() >= before + held.nbytes // 2 and resident() >= held.nbytes
    del held
    forget_peak()
    assert peak_resident() < before + 2**25
    assert (available_memory() or 0) > 2**20


@pytest.mark.parametrize("name", CODECS)
def test_rows_are_encoded_alike_however_many_at_a_time(name, monkeypatch):
    rows = torch.randn(9, 13)
    ones, status = torch.ones(9), torch.tensor([0, 1, 0, 0, 2, 0, 0, 0, 0], dtype=torch.uint8)
    rows[4, 2] = torch.nan
    arrays = shards.ShardArrays(vectors=rows, norm=ones, loss=ones, status=status, tokens=ones.int())
    whole = shards.encoded(arrays, codec(name))
    monkeypatch.setattr(shards, "ENCODED_NUMBERS", 30)
    some = shards.encoded(arrays, codec(name))
    assert torch.equal(whole.vectors, some.vectors) and torch.equal(whole.scale, some.scale)


# -- what is said


def planned(**changes):
    """A plan that fits."""
    facts = {
        "verb": "index", "about": "5 rows", "phases": (Phase("gradients", 90.0, "7 tokens"), Phase("encoding", 60.0)),
        "disk": {"vectors": 10**9, "manifest": 10**6}, "memory": 10**9, "free_disk": 10**10, "free_memory": 10**10,
        "bytes_per_row": 99, "remedies": {DISK: ("--codec", "onebit"), MEMORY: ("--memory", "5M")},
    }  # fmt: skip
    return Plan(**facts | changes)


def test_the_limit_is_what_there_is_too_little_of_else_time():
    assert planned().limit == planned(free_disk=None, free_memory=None).limit == TIME
    assert planned(free_disk=10**8).limit == planned(free_disk=10**8, free_memory=10**9 - 1).limit == DISK
    assert planned(free_memory=10**8).limit == MEMORY and not planned(free_memory=10**8).fits
    assert plan_answer(planned()) == (
        "It fits: time is the limit, about 2.5 minutes, with 1 GB of disk and 1 GB of memory."
    )
    assert plan_answer(planned(free_disk=10**8)) == (
        "It does not fit: disk is the limit, 1 GB are needed and 100 MB are free."
    )
    assert "memory is the limit, 1 GB are needed and 100 MB" in plan_answer(planned(free_memory=10**8))
    assert "GPU memory is the limit" in plan_answer(planned(free_memory=1, on_gpu=True))
    names, values = ([str(cell) for cell in column._cells] for column in plan_table(planned()).columns)
    lines = dict(zip(names, values, strict=True))
    assert lines["disk"] == "1 GB, of 10 GB that are free" and lines["memory"].startswith("1 GB at the peak, of 10 GB")
    assert lines["  gradients"] == "90 seconds (7 tokens)" and lines["  manifest"] == "1 MB"


def test_the_verb_and_the_dry_run_say_the_same_and_write_nothing(printed, tiny_llama, tiny_corpus, tmp_path):
    settings = ("--width", 4, "--codec", "int8")
    code, out, _ = printed("plan", tiny_llama, tiny_corpus, *settings)
    assert code == 0 and out.splitlines()[-1].endswith(
        f"Next: whence index {tiny_llama} {tiny_corpus} --width 4 --codec int8 -o INDEX"
    )
    code, dry, _ = printed("index", tiny_llama, tiny_corpus, "-o", tmp_path / "index", *settings, "--dry-run")
    assert code == 0 and dry.splitlines()[0] == out.splitlines()[0] and "bytes a row" in dry
    following = f"whence index {tiny_llama} {tiny_corpus} -o {tmp_path}/index --width 4 --codec int8"
    assert dry.splitlines()[-1].endswith(following)
    assert not [*tmp_path.iterdir()]
    _, document, _ = printed("plan", tiny_llama, tiny_corpus, *settings, "--json")
    assert json.loads(document)["bytes_per_row"] == 4 + 17 and json.loads(document)["fits"]


def test_a_limit_ends_with_the_flag_that_mends_it(printed, tiny_llama, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("whence.indexing.planning.free_bytes", lambda folder: 1000)
    command = ("index", tiny_llama, tiny_corpus, "-o", tmp_path / "index", "--projection", "two_sided", "--dry-run")
    assert printed(*command)[1].splitlines()[-1].endswith("--codec onebit --dry-run")
    assert printed(*command, "--codec", "onebit")[1].splitlines()[-1].endswith("-o ANOTHER_DISK/INDEX --dry-run")
    monkeypatch.undo()
    monkeypatch.setattr("whence.indexing.planning.available_memory", lambda: -resident() + 10**8)
    assert "--memory 90M --dry-run" in printed(*command)[1].splitlines()[-1]


def test_a_bound_that_is_no_size_is_refused_before_torch(command, tiny_llama, tiny_corpus):
    code, out, err = command("plan", tiny_llama, tiny_corpus, "--memory", "much")
    assert (code, out) == (2, "") and "--memory much: a size is expected" in err
    assert memory_bound.ROOM > 0


def test_a_plan_of_workers_says_what_is_of_one(tiny_llama, tiny_corpus, command):
    words = ["plan", tiny_llama, tiny_corpus, "--projection", "two_sided", "--width", 8]
    pytest.importorskip("ray")
    code, said, _ = command(*words, "--engine", "ray", "--workers", 4)
    assert code == 0 and "Of 4 workers each takes that memory" in said and "--engine ray --workers 4 -o INDEX" in said
    assert "workers" not in command(*words)[1]
