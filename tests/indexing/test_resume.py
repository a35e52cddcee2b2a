"""A build that is killed or stopped resumes to the same bytes, and only with the same settings."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import contents, corpus_rows, cut_short, save_tiny_llama, save_tiny_run, write_jsonl
from forks import forked
from whence.errors import CorpusError, ManifestMismatchError, SettingError
from whence.indexing import ingest
from whence.indexing.build import index, verify
from whence.indexing.opening import open_index
from whence.indexing.store import Store
from whence.models.loading import load_model
from whence.storage import Place

MODULE = sys.modules["whence.indexing.build"]
QUIET = {"width": 4, "progress": False}
KILLS, KILLED_COPYING = 20, 6
WRITING = "local_files.py"


# -- killed builds


def drive(model, corpus, home):
    """Kill builds of an index at random points, in a process of its own; prints what happened as JSON.

    Each child is a fork of this process, which has loaded everything once and runs one thread.
    """
    torch.set_num_threads(1)
    ingest.ROWS_PER_SHARD = 16
    load_model(f"{model}/checkpoint-2")  # what transformers imports when first used is then in every child
    home, dice = Path(home), random.Random(0)
    arguments = (model, corpus)
    calls = forked(_counted_build, *arguments, home / "whole")
    seen, built = [], [home / "build-0"]
    while len(seen) < KILLS:
        kind = WRITING if len(seen) % 3 == 2 else ""
        limit = calls["copying" + kind] if len(seen) < KILLED_COPYING else calls[kind] // 3
        if forked(_counted_build, *arguments, built[-1], dice.randrange(1, limit), kind) is None:
            seen.append(_progress(built[-1]))
        else:
            built.append(home / f"build-{len(built)}")
    forked(_counted_build, *arguments, built[-1])
    sys.stdout.write(json.dumps({"calls": calls, "seen": seen, "built": [path.name for path in built]}))


def _counted_build(model, corpus, out, kill_after=None, kind=""):
    """Build, and be killed before call number `kill_after` from the moment that anything may be written.

    Counted are calls into and out of Whence's functions ("") or of those that write (`WRITING`). Returns the counts
    at the end, and under "copying..." those when all rows were copied.
    """
    package, made, real = str(Path(MODULE.__file__).parents[1]), Counter(), Store.resume

    def count(frame, event, argument):
        if not event.endswith("call") or not (file := frame.f_code.co_filename).startswith(package):
            return
        for each in ("", WRITING):
            made[each] += file.endswith(each)
        if made[kind] == kill_after and file.endswith(kind):
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "call" and frame.f_code.co_name == "finish_parts":
            made.update({"copying" + each: made[each] for each in ("", WRITING)})

    def resume(*arguments):
        sys.setprofile(count)
        return real(*arguments)

    Store.resume = staticmethod(resume)
    try:
        index(model, corpus, out, checkpoints="all", tokens_per_batch=128, **QUIET)
    except BaseException:
        sys.setprofile(None)
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    sys.setprofile(None)
    return made


def _progress(path):
    """What a killed build has left: parts listed, whether those are all, shards listed, temporary files."""
    names = [str(file) for file in path.rglob("*.tmp")]
    if not (path / "manifest.json").exists():
        return [0, False, 0, len(names)]
    manifest = Store.open(path).manifest
    return [len(manifest.parts), manifest.has_all_parts, len(manifest.shards), len(names)]


def test_builds_killed_at_20_random_points_resume_to_the_same_bytes(tiny_run, tmp_path):
    """SIGKILL at 20 random points of builds of 5 parts under 2 checkpoints, the copying of the rows included.

    The points: an uninterrupted build's calls into and out of Whence's functions are counted, from the first moment
    that anything is written; a `write`, `fsync` or `rename` that Whence asks for is such a call. Each child is killed
    before a call whose number is drawn (seed 0): for the first six kills from as many as copying the rows takes, for
    the others from a third of the whole; for every third, only the calls of `local_files` count, so that files are left
    half written. The next child resumes where it was killed, so that the points wander over the whole build; a child
    that completes one early is followed by a build elsewhere, until 20 were killed.
    """
    corpus = write_jsonl(tmp_path / "corpus.jsonl", corpus_rows(72))
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import test_resume; test_resume.drive({str(tiny_run)!r}, {str(corpus)!r}, '{tmp_path}')",
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found["seen"]) == KILLS
    copying = [parts for parts, all_parts, _, _ in found["seen"] if not all_parts]
    assert len(copying) >= 2, f"not spread over the copying of the rows: {found}"
    assert any(temporary for _, _, _, temporary in found["seen"]), f"no file was left half written: {found}"
    assert len({shards for _, _, shards, _ in found["seen"]}) >= 4, f"not spread over the shards: {found}"
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == sorted(
        [
            "manifest.json",
            *(f"corpus/part-{part:05d}.parquet" for part in range(5)),
            *(f"checkpoint-{c:03d}/shard-{part:05d}.safetensors" for c in range(2) for part in range(5)),
        ]
    )
    for name in found["built"]:
        assert contents(tmp_path / name) == whole


def test_a_stopped_copy_of_the_rows_resumes_to_the_same_bytes(tiny_llama, tmp_path, small_parts, monkeypatch):
    rows = corpus_rows(40)
    index(tiny_llama, rows, tmp_path / "whole", **QUIET)
    for calls in (0, 1, 2):
        with monkeypatch.context() as patch:
            cut_short(patch, "write_part", calls)
            with pytest.raises(KeyboardInterrupt):
                index(tiny_llama, rows, tmp_path / "stopped", **QUIET)
        assert not Store.open(tmp_path / "stopped").manifest.is_complete
        if calls < 2:
            shutil.rmtree(tmp_path / "stopped")
    index(tiny_llama, rows, tmp_path / "stopped", **QUIET)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_complete_index_is_not_computed_again(tiny_llama, tiny_corpus, tiny_index, monkeypatch):
    before = contents(tiny_index)
    cut_short(monkeypatch, "_save", 0)
    again = index(tiny_llama, tiny_corpus, tiny_index, projection="two_sided", width=8, progress=False)
    assert again.store.manifest.is_complete
    assert contents(tiny_index) == before


def test_restart_starts_over(tiny_llama, tmp_path):
    out = tmp_path / "index"
    index(tiny_llama, corpus_rows(20), out, **QUIET)
    built = index(tiny_llama, corpus_rows(8), out, restart=True, codec="int8", **QUIET)
    assert (built.store.rows, built.store.manifest.codec) == (8, "int8")
    assert verify(out) == ([], [])


def test_a_restart_removes_no_other_tools_manifest(tiny_llama, tmp_path):
    (tmp_path / "manifest.json").write_text('{"a": 1}')
    with pytest.raises(SettingError, match=r"manifest\.json is not an index's"):
        index(tiny_llama, corpus_rows(8), tmp_path, restart=True, **QUIET)
    assert (tmp_path / "manifest.json").read_text() == '{"a": 1}'


def test_a_second_builder_is_refused_and_removes_nothing(tiny_llama, tiny_corpus, tmp_path):
    out = tmp_path / "index"
    in_flight = out / "corpus" / "part-00000.parquet.tmp"
    with Place.at(out).locked():
        in_flight.parent.mkdir()
        in_flight.write_bytes(b"half")
        for restart in (False, True):
            with pytest.raises(ManifestMismatchError, match="Another process is writing"):
                index(tiny_llama, tiny_corpus, out, restart=restart, **QUIET)
        assert in_flight.exists()
    index(tiny_llama, tiny_corpus, out, **QUIET)
    assert not in_flight.exists()


# -- other settings


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"projection": "count_sketch"},
            '--projection is "two_sided" there, "count_sketch" here',
        ),
        ({"width": 3}, "--width is 8 there, 3 here"),
        ({"codec": "int8"}, '--codec is "bfloat16" there, "int8" here'),
        ({"seed": 1}, "--seed is 0 there, 1 here"),
        ({"reduction": "sum"}, '--reduction is "mean" there, "sum" here'),
        ({"layers": "*mlp*"}, '--layers is not given there, "*mlp*" here'),
        ({"max_tokens": 20}, "--max-tokens is 96 there, 20 here"),
        ({"tokens_per_batch": 64}, "--batch-tokens is 2048 there, 64 here"),
        ({"dtype": "bfloat16"}, '--dtype is not given there, "bfloat16" here'),
    ],
)
def test_resuming_with_another_setting_names_it(tiny_llama, tiny_corpus, tiny_index, changed, told, caplog):
    before = contents(tiny_index)
    with pytest.raises(ManifestMismatchError) as caught:
        index(tiny_llama, tiny_corpus, tiny_index, **{"width": 8, "progress": False} | changed)
    assert told in str(caught.value)
    assert "--restart" in str(caught.value)
    assert contents(tiny_index) == before


def test_resuming_with_other_files_names_them(tiny_llama, tiny_corpus, tiny_index, tmp_path):
    other = save_tiny_llama(tmp_path / "weights", seed=5)
    with pytest.raises(
        ManifestMismatchError,
        match=r"settings: the model is \S+ \(digest \w{12}\) there, \S+/weights \(digest \w{12}\) here\. Use",
    ):
        index(other, tiny_corpus, tiny_index, projection="two_sided", width=8, progress=False)
    chat = save_tiny_llama(tmp_path / "chat", chat=True)
    with pytest.raises(ManifestMismatchError, match="the tokenizer is of digest"):
        index(tiny_llama, tiny_corpus, tiny_index, projection="two_sided", width=8, tokenizer=str(chat), progress=False)
    with pytest.raises(
        ManifestMismatchError, match=r"the corpus is .*, rows 20\) there, 19 rows in memory \(.*, rows 19\) here"
    ):
        index(tiny_llama, corpus_rows(19), tiny_index, projection="two_sided", width=8, progress=False)
    with pytest.raises(ManifestMismatchError, match="number of checkpoints is 1 there, 2 here"):
        index(
            save_tiny_run(tmp_path / "run"),
            tiny_corpus,
            tiny_index,
            projection="two_sided",
            width=8,
            checkpoints="all",
            progress=False,
        )


def test_a_directory_with_other_files_is_refused_and_left_as_it_is(tiny_llama, tmp_path):
    out = tmp_path / "home"
    (out / "thesis").mkdir(parents=True)
    (out / "thesis" / "draft.tmp").write_text("years of work")
    (out / "notes.txt").write_text("more")
    before = contents(out)
    for restart in (False, True):
        with pytest.raises(SettingError, match="Nothing was changed"):
            index(tiny_llama, corpus_rows(4), out, restart=restart, **QUIET)
        assert contents(out) == before


def test_restart_beside_a_strange_file_changes_nothing(tiny_llama, tmp_path):
    out = tmp_path / "index"
    index(tiny_llama, corpus_rows(4), out, **QUIET)
    (out / "hits.jsonl").write_text("{}")
    before = contents(out)
    with pytest.raises(SettingError, match=r"hits\.jsonl"):
        index(tiny_llama, corpus_rows(4), out, restart=True, codec="int8", **QUIET)
    assert contents(out) == before


def test_messages_without_a_role_are_refused_before_anything_is_written(tiny_llama, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}]
    with pytest.raises(CorpusError, match="row "):
        index(tiny_llama, rows, tmp_path / "index", **QUIET)
    assert not any((tmp_path / "index").glob("**/*.json"))


def test_an_index_does_not_decide_to_run_a_models_own_code(tiny_llama, tmp_path):
    out = tmp_path / "index"
    index(tiny_llama, corpus_rows(4), out, trust_remote_code=True, **QUIET)
    with pytest.raises(SettingError, match="--trust-remote-code"):
        open_index(out)
    assert open_index(out, trust_remote_code=True).store.rows == 4


def test_a_lock_leaves_no_empty_directory_where_none_was(tmp_path):
    for name, is_there, writes in (("new", False, False), ("old", True, False), ("full", False, True)):
        place = tmp_path / name
        if is_there:
            place.mkdir()
        with pytest.raises(ZeroDivisionError), Place.at(place).locked():
            assert place.is_dir()
            if writes:
                (place / "part").write_text("kept")
            raise ZeroDivisionError
        assert place.exists() == (is_there or writes)
