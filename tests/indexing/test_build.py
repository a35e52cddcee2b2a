"""An index holds the right vectors, counts what it cannot use, grows and is mended; bad input leaves nothing."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OpenAIGPTConfig

from conftest import byte_tokenizer, contents, corpus_rows, cut_short, save_tiny_llama, save_tiny_run, write_jsonl
from whence.corpus.tokens import collate, encode
from whence.errors import (
    ChecksumError,
    CorpusError,
    JobError,
    ManifestMismatchError,
    MissingIndexError,
    ModelError,
    SettingError,
    StorageError,
)
from whence.gradients.capture import sketch
from whence.gradients.flat_width import flat_width
from whence.gradients.projections import count_sketch
from whence.indexing.build import append, index, verify
from whence.indexing.codecs import CODECS, codec
from whence.indexing.opening import open_index
from whence.indexing.shards import STATUSES
from whence.indexing.store import Store
from whence.indexing.vectors import IndexSettings, batch_tokens, projection_for
from whence.models import loading as model_module
from whence.models.loading import layer_shape, load_model
from whence.storage import Place
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query

QUIET = {"width": 4, "progress": False}


def vectors(store, checkpoint=0):
    """Every stored vector, decoded, and the status of each row."""
    shards = [store.shard(checkpoint, part) for part in range(len(store.manifest.parts))]
    rows = torch.cat([shard.decoded(store.codec, store.manifest.width) for shard in shards])
    return rows, torch.cat([shard.status for shard in shards])


def flip(file, where=-1):
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)


# -- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "slurm"}, "--engine slurm: one of local, ray is expected"),
        ({"max_tokens": 1}, "--max-tokens 1: at least 2"),
        ({"max_tokens": 97}, "--max-tokens 97: the model's context is 96 tokens"),
        ({"tokens_per_batch": 1}, "--batch-tokens 1: at least 2"),
        ({"checkpoints": "first"}, "--checkpoints first: choose all or last"),
        ({"layers": "*mpl*"}, r"--layers \*mpl\*: no linear layer has such a name. Near: "),
        ({"width": 0}, "--width 0"),
        ({"dtype": "float8"}, "--dtype float8: choose one of"),
        ({"view": "fisher"}, "--view fisher: choose one of sgd, adam"),
        ({"view": "frozen-v"}, "frozen-v is a view of `whence select`, on an index of --view sgd"),
        ({"adam_mode": "jax"}, "--adam-mode jax: choose one of torch, less"),
        ({"colour": "red"}, "colour: not a setting of an index"),
        ({"projection": "identity", "width": 4}, "--width 4: identity keeps every number"),
    ],
)
def test_a_setting_that_cannot_work_is_named_and_nothing_is_written(
    tiny_llama, tiny_corpus, tmp_path, options, message
):
    with pytest.raises(SettingError, match=message):
        index(tiny_llama, tiny_corpus, tmp_path / "index", **QUIET | options)
    assert not (tmp_path / "index").exists()


def test_tokens_of_a_pass_suit_the_device_and_an_index_that_is_begun_keeps_its_own(tiny_llama, tmp_path, monkeypatch):
    assert batch_tokens(IndexSettings(), torch.device("cpu")) == 2048
    assert batch_tokens(IndexSettings(), torch.device("cuda:1")) == 16384
    assert batch_tokens(IndexSettings(tokens_per_batch=7), torch.device("cuda")) == 7
    rows, out = corpus_rows(5), tmp_path / "index"
    assert index(tiny_llama, rows, out, **QUIET).tokens_per_batch == 2048
    monkeypatch.setattr("whence.indexing.vectors.TOKENS_ON_CPU", 512)
    again = index(tiny_llama, rows, out, **QUIET)
    assert again.tokens_per_batch == again.settings.tokens_per_batch == 2048
    assert open_index(out).settings.tokens_per_batch == 2048
    assert index(tiny_llama, rows, out, restart=True, **QUIET).tokens_per_batch == 512


def test_memory_that_runs_out_is_told_with_the_flag_that_mends_it(tiny_llama, tiny_index, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sys.modules["whence.indexing.build"], "example_vectors", full)
    with pytest.raises(
        JobError, match=r"shard 0 of .*: out of memory .* lower --batch-tokens \(now 2,048\) and add --re"
    ):
        index(tiny_llama, corpus_rows(20), tmp_path / "index", **QUIET)
    out = shutil.copytree(tiny_index, tmp_path / "copy")
    with pytest.raises(JobError, match="the index was built with passes of 2,048 tokens; append on a larger device"):
        append(out, corpus_rows(20, first=50), progress=False)


def test_memory_that_runs_out_in_a_repair_is_told_and_the_rest_of_the_index_kept(tiny_index, tmp_path, monkeypatch):
    out = shutil.copytree(tiny_index, tmp_path / "index")
    flip(out / "checkpoint-000" / "shard-00000.safetensors")
    harmed = contents(out)
    monkeypatch.setattr(
        sys.modules["whence.indexing.build"], "example_vectors", lambda *args, **kwargs: torch.empty(1 << 60)
    )
    told = r"shard 0 of checkpoint 0: out of memory \(.*\)\..* passes of 2,048 tokens; repair it on a larger device"
    with pytest.raises(JobError, match=told):
        verify(out, repair=True)
    assert contents(out) == harmed
    monkeypatch.undo()
    assert verify(out, repair=True)[1] and contents(out) == contents(tiny_index)


def test_every_checkpoint_is_looked_at_before_anything_is_written(tmp_path):
    run = save_tiny_run(tmp_path / "run")
    weights = run / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"checkpoint-2/model\.safetensors: not a readable"):
        index(run, corpus_rows(5), tmp_path / "index", checkpoints="all", **QUIET)
    assert not (tmp_path / "index").exists()
    index(run, corpus_rows(5), tmp_path / "index", **QUIET)


def test_more_places_than_rows_are_not_made(tiny_index):
    found = trace(tiny_index, "5 and 3?", " yes", top=500_000_000)
    assert len(found.hits) == 40
    assert "only 20 rows can be ranked" in found.notes[0]


# -- append


def test_append_touches_no_old_file_and_no_old_score(tiny_llama, tmp_path, small_parts):
    out = tmp_path / "index"
    built = index(tiny_llama, corpus_rows(20), out, **QUIET)
    before, queries = contents(out), [Query("5 and 3?", " yes")]
    scores = {hit.id: hit.score for hit in trace(built, queries=queries, top=20).hits}
    appended = append(out, write_jsonl(tmp_path / "more.jsonl", corpus_rows(20, first=20)), progress=False)
    after = contents(out)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert appended.store.info()["rows"] == 40
    later = {hit.id: hit.score for hit in trace(appended, queries=queries, top=40).hits}
    assert len(later) == 40
    assert {name: later[name] for name in scores} == pytest.approx(scores, abs=1e-6)
    whole = index(tiny_llama, corpus_rows(40), tmp_path / "whole", **QUIET)
    assert torch.allclose(vectors(appended.store)[0], vectors(whole.store)[0], rtol=1e-2, atol=1e-4)


def test_a_stopped_append_resumes_to_the_same_bytes(tiny_llama, tmp_path, small_parts, monkeypatch):
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": f"row without an id, {number % 5}"} for number in range(40)])
    for name in ("whole", "stopped"):
        index(tiny_llama, tiny := corpus_rows(20), tmp_path / name, **QUIET)
    append(tmp_path / "whole", more, progress=False)
    for name, calls in (("write_part", 1), ("add_shard", 1), ("add_shard", 0)):
        with monkeypatch.context() as patch:
            cut_short(patch, name, calls)
            with pytest.raises(KeyboardInterrupt):
                append(tmp_path / "stopped", more, progress=False)
        if name == "write_part":
            with pytest.raises(MissingIndexError, match=r"more\.jsonl are still joining it.*whence append"):
                index(tiny_llama, tiny, tmp_path / "stopped", **QUIET)
        with pytest.raises(MissingIndexError, match="not complete"):
            append(tmp_path / "stopped", corpus_rows(3, first=90), progress=False)
    append(tmp_path / "stopped", more, progress=False)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    append(tmp_path / "stopped", more, progress=False)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    ids = [row["id"] for part in range(4) for row in Store.open(tmp_path / "whole").read_part(part)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(("name", "calls"), [("write_part", 0), ("write_part", 1), ("add_shard", 0), ("add_shard", 1)])
def test_an_append_whose_corpus_is_gone_can_be_undone(tiny_llama, tmp_path, small_parts, monkeypatch, name, calls):
    out, more = tmp_path / "index", write_jsonl(tmp_path / "more rows.jsonl", corpus_rows(40, first=20))
    index(tiny_llama, corpus_rows(20), out, **QUIET)
    before = contents(out)
    with pytest.raises(SettingError, match="nothing to undo"):
        append(out, undo=True, progress=False)
    with monkeypatch.context() as patch:
        cut_short(patch, name, calls)
        with pytest.raises(KeyboardInterrupt):
            append(out, more, progress=False)
    write_jsonl(more, corpus_rows(39, first=20))
    told = (
        rf"rows of .*more rows\.jsonl are still joining it.*whence append {out} '.*more rows\.jsonl', or drop .*--undo"
    )
    assert "--undo" in Store.open(out).info()["to_do"]
    with pytest.raises(MissingIndexError, match=told):
        trace(out, "5 and 3?", " yes")
    with pytest.raises(MissingIndexError, match=told):
        append(out, more, progress=False)
    (out / "corpus" / "part-00004.parquet.tmp").write_bytes(b"half")
    assert append(out, undo=True, progress=False).store.rows == 20
    assert contents(out) == before
    assert append(out, more, progress=False).store.rows == 59
    assert verify(out) == ([], [])


@pytest.mark.parametrize("then", ["undo", "append", "index"])
def test_an_undo_that_was_killed_leaves_nothing_behind(tiny_llama, tmp_path, small_parts, monkeypatch, then):
    def stop(place, name):
        raise KeyboardInterrupt

    out, rows = tmp_path / "index", corpus_rows(20)
    index(tiny_llama, rows, out, **QUIET)
    before = contents(out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_short(patch, "add_shard", 1)
        append(out, corpus_rows(60, first=20), progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Place, "remove", stop)
        append(out, undo=True)
    assert len(contents(out)) > len(before), "files of the append are still there"
    if then == "undo":
        with pytest.raises(SettingError, match=r"nothing to undo \(removed 6 files that an earlier command left\)"):
            append(out, undo=True)
    elif then == "index":
        index(tiny_llama, rows, out, **QUIET)
    if then != "append":
        assert contents(out) == before
    append(out, corpus_rows(3, first=100), progress=False)
    assert verify(out) == ([], [])


def test_an_append_is_undone_without_the_code_of_the_model(tiny_llama, tmp_path, monkeypatch):
    out = tmp_path / "index"
    index(tiny_llama, corpus_rows(5), out, trust_remote_code=True, **QUIET)
    before = contents(out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_short(patch, "add_shard", 0)
        append(out, corpus_rows(5, first=30), progress=False, trust_remote_code=True)
    with pytest.raises(SettingError, match="--trust-remote-code"):
        append(out, corpus_rows(5, first=30), progress=False)
    left = append(out, undo=True)
    assert (contents(out), left.store.rows) == (before, 5)
    assert not left.settings.trust_remote_code, "nobody has allowed it"


def test_an_append_takes_a_corpus_or_undo(tiny_index):
    for options in ({}, {"corpus": corpus_rows(3, first=90), "undo": True}):
        with pytest.raises(SettingError, match="--undo"):
            append(tiny_index, **options)


def test_what_cannot_be_appended_leaves_the_index_as_it_was(tiny_index, tmp_path):
    out = shutil.copytree(tiny_index, tmp_path / "index")
    before = contents(out)
    with pytest.raises(CorpusError, match="the index has a row with the id 'row-19' already"):
        append(out, corpus_rows(5, first=19), progress=False)
    with pytest.raises(CorpusError, match="no rows"):
        append(out, [], progress=False)
    with pytest.raises(ManifestMismatchError, match="weights and configuration have digest"):
        append(out, corpus_rows(5, first=50), model=str(save_tiny_llama(tmp_path / "other", seed=9)), progress=False)
    assert contents(out) == before
    with pytest.raises(MissingIndexError, match="There is no index at"):
        append(tmp_path / "absent", corpus_rows(5), progress=False)
    assert not (tmp_path / "absent").exists()


def test_an_id_given_twice_is_refused(tiny_llama, tmp_path):
    rows = [*corpus_rows(3), *corpus_rows(1)]
    with pytest.raises(CorpusError, match=r"the id 'row-0' is given twice \(the second time at row 3\)"):
        index(tiny_llama, rows, tmp_path / "index", **QUIET)
    assert not (tmp_path / "index").exists()


# -- verify and repair


@pytest.mark.parametrize("name", ["corpus/part-00001.parquet", "checkpoint-001/shard-00001.safetensors"])
def test_verify_names_the_flipped_file_and_repair_restores_its_bytes(tiny_run, tmp_path, small_parts, name):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", corpus_rows(24))
    out = tmp_path / "index"
    index(tiny_run, corpus, out, checkpoints="all", **QUIET)
    before = contents(out)
    flip(out / name, len(before[name]) // 2)
    problems, notes = verify(out)
    assert ([problem.file for problem in problems], notes) == ([name], [])
    problems, (note,) = verify(out, repair=True)
    assert [problem.file for problem in problems] == [name]
    assert name in note
    assert "the same bytes as before" in note
    assert contents(out) == before


def test_a_flipped_manifest_is_named_and_left_alone(tiny_index, tmp_path):
    out = shutil.copytree(tiny_index, tmp_path / "index")
    flip(out / "manifest.json", 40)
    before = contents(out)
    for repair in (False, True):
        problems, notes = verify(out, repair=repair)
        assert [problem.file for problem in problems] == ["manifest.json"]
        assert "--restart" in problems[0].what
        assert notes == []
    assert contents(out) == before
    with pytest.raises(ChecksumError, match="is damaged"):
        open_index(out)


@pytest.mark.parametrize("gone", ["removed", "changed", "in memory"])
def test_a_part_is_not_mended_from_another_corpus(tiny_llama, tmp_path, gone):
    corpus, out = write_jsonl(tmp_path / "corpus.jsonl", corpus_rows(20)), tmp_path / "index"
    index(tiny_llama, corpus_rows(20) if gone == "in memory" else corpus, out, **QUIET)
    if gone == "removed":
        corpus.unlink()
    elif gone == "changed":
        write_jsonl(corpus, corpus_rows(20, first=1))
    flip(out / "corpus" / "part-00000.parquet", 60)
    flip(out / "checkpoint-000" / "shard-00000.safetensors")
    harmed = contents(out)
    _, notes = verify(out, repair=True)
    assert len(notes) == 2
    assert "cannot be read again from the corpus" in notes[0]
    assert "not recomputed, for its rows are in corpus/part-00000.parquet, which is wrong" in notes[1]
    assert contents(out) == harmed


# -- rows that cannot be used


def test_rows_of_a_model_with_nan_weights_never_rank(tiny_llama, tmp_path):
    broken = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    built = index(broken, corpus_rows(20), tmp_path / "index", **QUIET)
    info = built.store.info()
    assert (info["ok_rows"], info["counts"]["non_finite"]) == (0, 20)
    rows, status = vectors(built.store)
    assert (rows == 0).all()
    assert (status == STATUSES.index("non_finite")).all()
    with pytest.raises(SettingError, match="none of its 20 rows has a finite gradient"):
        trace(built, "5 and 3?", " yes")


def test_one_row_with_a_nan_gradient_harms_no_other(tiny_llama, tmp_path):
    broken = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][3 + ord("Z") - ord("!")] = torch.inf  # ids 0 to 2 are special
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    rows = [*corpus_rows(9), {"id": "bad", "text": "Z"}, *corpus_rows(9, first=9)]
    letter = load_model(broken).tokenizer("Z")["input_ids"][-1]
    assert letter == 3 + ord("Z") - ord("!")
    built = index(broken, rows, tmp_path / "index", **QUIET)
    sound = index(tiny_llama, rows, tmp_path / "sound", **QUIET)
    assert built.store.info()["counts"]["non_finite"] == 1
    kept = [number for number in range(19) if number != 9]
    assert torch.equal(vectors(built.store)[0][kept], vectors(sound.store)[0][kept])
    found = trace(built, "5 and 3?", " yes", top=19)
    assert "bad" not in {hit.id for hit in found.hits}
    assert (found.rows, len(found.hits)) == (18, 36)


def test_rows_without_a_supervised_token_are_counted_and_never_rank(tiny_llama, tmp_path):
    empty = [{"id": "null", "text": None}, {"id": "no turns", "messages": []}, {"id": "empty", "text": ""}]
    built = index(tiny_llama, [*corpus_rows(6), *empty], tmp_path / "index", **QUIET)
    counts = built.store.info()["counts"]
    # An empty text still has its end-of-sequence token to predict.
    assert (counts["ok"], counts["no_supervised_token"]) == (7, 2)
    found = trace(built, "5 and 3?", " yes", top=9)
    assert {"null", "no turns"}.isdisjoint(hit.id for hit in found.hits)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"text": None}, {"messages": []}], "1 of 2 have no `text`; 1 of 2 have no `messages`"),
        ([{"prompt": "a", "completion": "b", "label": False}], "1 of 1 are labelled false, as bad answers"),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}]}],
            "1 of 1 have no message of the role `assistant` (or gpt, model, bot, chatbot, chatgpt, ai), but `user`",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "gpt", "content": "b", "weight": 0}]}],
            "1 of 1 give every turn of the assistant the weight 0",
        ),
    ],
)
def test_a_corpus_without_a_supervised_token_is_refused_with_the_reason(tmp_path, chatty, rows, why):
    with pytest.raises(CorpusError, match=re.escape(f"no row has a supervised token, so none could be ranked: {why}")):
        index(chatty, rows, tmp_path / "index", **QUIET)
    assert not (tmp_path / "index" / "manifest.json").exists()


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model whose chat template writes any role."""
    return save_tiny_llama(tmp_path_factory.mktemp("chatty") / "model", chat=True)


def test_other_names_of_the_roles_are_the_same_rows(chatty, tmp_path):
    turns = [[("user", f"{n}?"), ("assistant", "yes" * n), ("user", "so?"), ("assistant", "no")] for n in range(1, 4)]
    names = {"user": "human", "assistant": "gpt"}
    plain = [{"id": str(n), "messages": [{"role": r, "content": c} for r, c in turn]} for n, turn in enumerate(turns)]
    other = [
        {"id": row["id"], "messages": [turn | {"role": names[turn["role"]]} for turn in row["messages"]]}
        for row in plain
    ]
    built = [index(chatty, rows, tmp_path / str(n), **QUIET) for n, rows in enumerate((plain, other))]
    assert all(map(torch.equal, *(vectors(one.store) for one in built)))
    found = [trace(built[0], queries=[{"messages": rows[0]["messages"]}]) for rows in (plain, other)]
    assert found[0].hits == found[1].hits


def test_an_older_index_says_that_no_row_is_supervised(chatty, tmp_path, monkeypatch):
    monkeypatch.setattr("whence.indexing.preparation.refuse_unsupervised", lambda *given: None)
    built = index(chatty, [{"id": "0", "text": None}], tmp_path / "index", **QUIET)
    with pytest.raises(SettingError, match=r"none of its 1 row has a supervised token.*the first ones have no `text`"):
        trace(built, "a", "b")


def test_over_long_rows_are_counted(tiny_llama, tmp_path):
    rows = [
        {"id": "fits", "prompt": "p" * 10, "completion": "c" * 10},
        {"id": "long prompt", "prompt": "p" * 50, "completion": "c" * 10},
        {"id": "long completion", "prompt": "p" * 10, "completion": "c" * 50},
        {"id": "long text", "text": "t" * 50},
    ]
    built = index(tiny_llama, rows, tmp_path / "index", max_tokens=32, **QUIET)
    counts = built.store.info()["counts"]
    assert (counts["ok"], counts["truncated"], counts["completion_truncated"]) == (4, 3, 1)
    # <s> and </s> are tokens. All 10 + 1 targets stay behind a long prompt; a long completion keeps its first 31.
    assert built.store.shard(0, 0).tokens.tolist() == [11, 11, 31, 31]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"id": "x", "text": ["a", "b"]}, "row x has a list as `text`, where text is expected"),
        ({"id": "x", "prompt": {"a": 1}, "completion": "b"}, "row x has a dict as `prompt`"),
        ({"id": "x", "instruction": "a", "input": ["b"], "output": "c"}, "row x has a list as `input`"),
        (
            {"id": "x", "messages": "hello"},
            "row 2: messages are a list of objects with `role` and `content`; found 'hello'",
        ),
    ],
)
def test_what_is_no_text_is_refused_before_anything_is_written(tiny_llama, tmp_path, row, told):
    with pytest.raises(CorpusError, match=told):
        index(tiny_llama, [*corpus_rows(2), row], tmp_path / "index", **QUIET)
    assert not (tmp_path / "index").exists()


def test_messages_that_a_template_refuses_are_named_by_row(tmp_path):
    model = save_tiny_llama(tmp_path / "model", chat=True)
    rows = [{"id": "fine", "messages": [{"role": "user", "content": "a"}]}, {"id": "x", "messages": [{"say": "a"}]}]
    with pytest.raises(CorpusError, match="row 1: messages are a list of objects"):
        index(model, rows, tmp_path / "index", **QUIET)


# -- the vectors


@pytest.mark.parametrize("name", ["identity", "two_sided", "count_sketch"])
@pytest.mark.parametrize("kind", sorted(CODECS))
def test_stored_vectors_are_single_example_sketches(tiny_llama, tmp_path, name, kind):
    width = {"identity": None, "two_sided": 4, "count_sketch": 64}[name]
    rows = corpus_rows(7)
    built = index(tiny_llama, rows, tmp_path / "index", projection=name, width=width, codec=kind, progress=False)
    loaded = load_model(tiny_llama)
    projection = projection_for(loaded, built.settings)
    encoded = [encode(row, loaded.tokenizer) for row in rows]
    single = [sketch(loaded, loaded.layers(), collate([example]), projection) for example in encoded]
    true = torch.cat([sketched for sketched, _ in single])
    stored, _ = vectors(built.store)
    bound = codec(kind).bound(true) + 1e-5 * true.abs().amax(1)
    assert ((stored - true).abs().amax(1) <= bound * 1.001).all()
    shard = built.store.shard(0, 0)
    assert torch.allclose(shard.norm, true.norm(dim=1), rtol=1e-4)
    assert torch.allclose(shard.loss, torch.cat([losses.loss for _, losses in single]), rtol=1e-4)
    assert shard.tokens.tolist() == [example.supervised_count for example in encoded]


def test_batches_of_another_size_agree_to_rounding(tiny_llama, tmp_path):
    rows = corpus_rows(30)
    found = [
        vectors(index(tiny_llama, rows, tmp_path / str(size), codec="float32", tokens_per_batch=size, **QUIET).store)[0]
        for size in (2, 100, 4096)
    ]
    for other in found[1:]:
        assert torch.allclose(found[0], other, rtol=1e-4, atol=1e-5 * found[0].abs().max())


def test_gradient_checkpointing_agrees_to_rounding(tiny_llama, tmp_path):
    options = QUIET | {"codec": "float32"}
    plain = index(tiny_llama, corpus_rows(9), tmp_path / "plain", **options)
    spared = index(tiny_llama, corpus_rows(9), tmp_path / "spared", gradient_checkpointing=True, **options)
    before, after = (vectors(built.store)[0] for built in (plain, spared))
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-5 * before.abs().max())


def test_every_checkpoint_of_a_run_is_indexed_with_its_weight(tiny_run, tmp_path):
    rows = corpus_rows(6)
    built = index(tiny_run, rows, tmp_path / "all", checkpoints="all", codec="float32", **QUIET)
    assert built.weights == pytest.approx([0.75, 0.25])  # learning rates 3e-4 and 1e-4
    assert [entry["step"] for entry in built.store.manifest.checkpoints] == [2, 4]
    for number, step in enumerate((2, 4)):
        alone = index(tiny_run / f"checkpoint-{step}", rows, tmp_path / str(step), codec="float32", **QUIET)
        assert torch.equal(vectors(built.store, number)[0], vectors(alone.store)[0])
    last = index(tiny_run, rows, tmp_path / "last", codec="float32", **QUIET)
    assert last.weights == [1.0]
    assert torch.equal(vectors(last.store)[0], vectors(alone.store)[0])


def test_a_status_under_one_checkpoint_keeps_a_row_out_of_every_ranking(tmp_path):
    run = save_tiny_run(tmp_path / "run")
    weights = load_file(run / "checkpoint-2" / "model.safetensors")
    weights["model.embed_tokens.weight"][3 + ord("Z") - ord("!")] = torch.nan
    save_file(weights, run / "checkpoint-2" / "model.safetensors", {"format": "pt"})
    rows = [*corpus_rows(5), {"id": "bad", "text": "Zz"}]
    built = index(run, rows, tmp_path / "index", checkpoints="all", **QUIET)
    assert "bad" not in {hit.id for hit in trace(built, "5 and 3?", " yes", top=9).hits}


def test_an_adapter_is_indexed_by_its_own_layers(tiny_llama, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    rows = corpus_rows(20)
    built = index(
        tmp_path / "adapter", rows, tmp_path / "index", projection="identity", codec="float32", progress=False
    )
    names = built.store.manifest.settings["layer_names"]
    assert len(names) == 2 * 2 * 2  # layers, targets, A and B
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    stored, _ = vectors(built.store)
    assert stored.shape[1] == sum(w.numel() for n, w in adapted.named_parameters() if "lora_" in n)
    example = encode(rows[3], load_model(tmp_path / "adapter").tokenizer)
    labels = torch.tensor(
        [[token if kept else -100 for token, kept in zip(example.ids, example.supervised, strict=True)]]
    )
    adapted.eval()(input_ids=torch.tensor([example.ids]), labels=labels).loss.backward()
    true = torch.cat([w.grad.flatten() for n, w in adapted.named_parameters() if "lora_" in n])
    assert stored[3].norm().item() == pytest.approx(true.norm().item(), rel=1e-4)
    assert trace(built, rows[3]["prompt"], rows[3]["completion"], top=1).hits[0].id == "row-3"


# -- the model behind an index


def test_a_tokenizer_that_has_moved_is_named(tiny_llama, tiny_corpus, tmp_path):
    """And a device map reaches the model, whatever it was built with."""
    words, out = tmp_path / "words", tmp_path / "index"
    byte_tokenizer().save_pretrained(words)
    index(tiny_llama, tiny_corpus, out, tokenizer=str(words), **QUIET)
    moved = words.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="--tokenizer"):
        trace(out, "5 and 3?", " yes")
    assert trace(out, "5 and 3?", " yes", tokenizer=str(moved), device_map="cpu", top=1).hits
    append(out, corpus_rows(3, first=70), tokenizer=str(moved), device="cpu", progress=False)
    flip(out / "checkpoint-000" / "shard-00001.safetensors")
    _, (note,) = verify(out, repair=True, tokenizer=str(moved), device_map="cpu")
    assert "the same bytes as before" in note
    assert open_index(out, device_map="auto").settings.device_map == "auto"


def test_an_index_of_an_adapter_finds_its_base_from_anywhere(tiny_llama, tmp_path, monkeypatch):
    """Its configuration names the base by a path that is true in the directory of the training alone."""
    shutil.copytree(tiny_llama, tmp_path / "home" / "base")
    monkeypatch.chdir(tmp_path / "home")
    base = AutoModelForCausalLM.from_pretrained("base")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    assert '"base_model_name_or_path": "base"' in Path("adapter/adapter_config.json").read_text()
    index("adapter", corpus_rows(5), "index", **QUIET)
    monkeypatch.chdir(tmp_path)
    assert trace("home/index", "5 and 3?", " yes", top=1).hits
    with pytest.raises(ModelError, match=r"base.*It is the base that .*adapter_config\.json names"):
        load_model("home/adapter")
    (tmp_path / "home" / "base").rename(tmp_path / "home" / "adapter" / "base")
    assert load_model("home/adapter").has_adapter
    index("home/adapter", corpus_rows(5), "home/index", **QUIET)  # where it was found is no setting


def test_a_changed_or_missing_model_is_refused(tiny_corpus, tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    index(model, tiny_corpus, tmp_path / "index", **QUIET)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    original = (model / "tokenizer.json").read_text()
    tokenizer["model"]["vocab"]["!"], tokenizer["model"]["vocab"]['"'] = 4, 3
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ManifestMismatchError, match="its tokenizer has digest"):
        open_index(tmp_path / "index").model()
    (model / "tokenizer.json").write_text(original)
    open_index(tmp_path / "index").model()
    model.rename(tmp_path / "moved")
    with pytest.raises(
        ManifestMismatchError, match=r"the model of this index .*digest [0-9a-f]{12}.* is not there.*--model"
    ):
        open_index(tmp_path / "index").model()
    assert open_index(tmp_path / "index", model=str(tmp_path / "moved")).model().path == str(tmp_path / "moved")
    with pytest.raises(ManifestMismatchError, match=r"nowhere: the model of this index .* is not there"):
        open_index(tmp_path / "index", model=str(tmp_path / "nowhere")).model()


def test_checkpoints_of_a_moved_run_are_found_in_it(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    index(run, corpus_rows(5), tmp_path / "index", checkpoints="all", **QUIET)
    moved = run.rename(tmp_path / "moved")
    opened = open_index(tmp_path / "index", model=str(moved))
    assert [opened.model(number).path for number in (0, 1)] == [str(moved / f"checkpoint-{step}") for step in (2, 4)]


@pytest.mark.parametrize("pattern", [None, "model.layers.0.*"])
@pytest.mark.parametrize(
    ("gone", "prefix", "was"), [(None, "decoder.layers.", "q_proj"), (2, "model.layers.", "v_proj")],
    ids=["renamed", "one fewer"],
)  # fmt: skip
def test_a_model_whose_traced_layers_are_others_now_is_refused(
    tiny_llama, tmp_path, monkeypatch, gone, prefix, was, pattern
):
    out, real = tmp_path / "index", model_module.linear_layers
    index(tiny_llama, corpus_rows(5), out, layers=pattern, **QUIET)

    def layers(model):
        found = enumerate(real(model))
        return [(name.replace("model.layers.", prefix), layer) for number, (name, layer) in found if number != gone]

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "linear_layers", layers)
        told = rf"was model\.layers\.0\.self_attn\.{was}, and is .* now\..* -o .*index --restart"
        with pytest.raises(ManifestMismatchError, match=told):
            trace(out, "5 and 3?", " yes")
        with pytest.raises(ManifestMismatchError, match=told):
            append(out, corpus_rows(5, first=9), progress=False)
    assert trace(out, "5 and 3?", " yes").hits


# -- a full disk


def test_a_full_disk_stops_a_build_which_then_resumes(tiny_llama, tmp_path, small_parts, monkeypatch):
    rows = corpus_rows(40)
    index(tiny_llama, rows, tmp_path / "whole", **QUIET)
    real, left = os.fsync, [4]

    def fsync(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    for room in (0, 4, 9, 14):
        left[0] = room
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(StorageError, match=r"No space left on device.*the same command again"):
                index(tiny_llama, rows, tmp_path / "full", **QUIET)
        assert not list((tmp_path / "full").rglob("*.tmp"))
    index(tiny_llama, rows, tmp_path / "full", **QUIET)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_settings_are_read_back_from_the_manifest(tiny_index):
    opened = open_index(tiny_index)
    assert opened.settings == IndexSettings(
        space=opened.space, codec="bfloat16", max_tokens=96, tokens_per_batch=2048, supervise="assistant",
        preferences="chosen",
    )  # fmt: skip
    assert (opened.space.width, opened.layout) == (8, "prompt")


def test_lambda_of_shuffle_sum_is_a_setting(tiny_llama, tiny_corpus, tmp_path):
    built = {
        rounds: index(tiny_llama, tiny_corpus, tmp_path / str(rounds), projection="shuffle_sum",
                      shuffle_rounds=rounds, **QUIET)
        for rounds in (None, 20, 3)
    }  # fmt: skip
    vectors = {rounds: one.store.vectors(range(5))[0] for rounds, one in built.items()}
    assert torch.equal(vectors[None], vectors[20]) and not torch.equal(vectors[None], vectors[3])
    assert "shuffle_rounds" not in built[None].store.manifest.settings["space"]
    assert open_index(tmp_path / "3").projection(built[3].model()).rounds == 3
    with pytest.raises(ManifestMismatchError, match="--shuffle-rounds is 3 there, 4 here"):
        index(tiny_llama, tiny_corpus, tmp_path / "3", projection="shuffle_sum", shuffle_rounds=4, **QUIET)
    with pytest.raises(SettingError, match="belongs to --projection shuffle_sum"):
        index(tiny_llama, tiny_corpus, tmp_path / "other", shuffle_rounds=4, **QUIET)


def test_an_index_keeps_the_blocks_of_its_sketch(tiny_llama, tiny_corpus, tmp_path):
    """They need not be those that the rule of today would choose."""
    flags = {"projection": "tensor_sketch", "width": 256} | QUIET
    built = index(tiny_llama, tiny_corpus, tmp_path / "index", **flags)
    layers = len(built.store.manifest.settings["layer_names"])
    assert built.store.manifest.settings["blocks"] == [1] * layers
    index(tiny_llama, tiny_corpus, tmp_path / "other", blocks=(2,) * layers, **flags)
    opened = open_index(tmp_path / "other")
    assert opened.projection(opened.model()).blocks == (2,) * layers
    hits = trace(opened, "5 and 3?", " yes").hits
    assert hits[0].rank_score > hits[-1].rank_score
    assert index(tiny_llama, tiny_corpus, tmp_path / "other", **flags).store.manifest.settings["blocks"] == [2] * layers
    with pytest.raises(ManifestMismatchError, match="blocks"):
        index(tiny_llama, tiny_corpus, tmp_path / "other", blocks=(1,) * layers, **flags)
    with pytest.raises(SettingError, match="belong to --projection tensor_sketch"):
        index(tiny_llama, tiny_corpus, tmp_path / "third", projection="sjlt", blocks=(2,) * layers, **QUIET)


def test_the_default_follows_the_models_size_and_an_older_index_keeps_its_own(tiny_llama, tiny_corpus, tmp_path):
    """Width k in one bit; what another version began with other defaults, the same command goes on with."""
    built = index(tiny_llama, tiny_corpus, tmp_path / "index", progress=False)
    model = built.model()
    k = flat_width({name: layer_shape(layer) for name, layer in model.layers().items()})
    manifest = built.store.manifest
    assert (manifest.settings["space"]["projection"], manifest.codec, manifest.width) == ("tensor_sketch", "onebit", k)
    assert open_index(tmp_path / "index").projection(model).width == k
    for number, options in enumerate((
        {"projection": "two_sided", "codec": "int8"},
        {"projection": "tensor_sketch", "codec": "float32", "blocks": (1,) * len(model.layers())},
    )):  # fmt: skip
        older = index(tiny_llama, tiny_corpus, tmp_path / f"older-{number}", **options, progress=False).store.manifest
        assert index(tiny_llama, tiny_corpus, tmp_path / f"older-{number}", progress=False).store.manifest == older


def test_a_flat_sketch_of_an_older_default_width_is_read_by_its_own(tiny_llama, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(count_sketch, "flat_width", lambda shapes: 8192)
    built = index(tiny_llama, tiny_corpus, tmp_path / "index", projection="count_sketch", progress=False)
    monkeypatch.undo()
    opened = open_index(tmp_path / "index")
    assert opened.space.width is None and opened.projection(opened.model()).width == 8192
    assert trace(opened, "5 and 3?", " yes").hits
    again = index(tiny_llama, tiny_corpus, tmp_path / "index", projection="count_sketch", progress=False)
    assert again.store.manifest == built.store.manifest, "the same command goes on with it"


def test_a_model_without_gradient_checkpointing_is_refused_before_anything_is_written(tmp_path):
    config = OpenAIGPTConfig(vocab_size=259, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="has no gradient checkpointing"):
        index(tmp_path / "model", corpus_rows(3), tmp_path / "index", gradient_checkpointing=True, **QUIET)
    assert not (tmp_path / "index").exists()


def test_an_index_of_zeros_is_not_complete(tiny_llama, tiny_corpus, tmp_path):
    """A head of zeros hands no gradient down to the blocks."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"the gradient of every row \(20\) is 0 over the traced layers"):
        index(model, tiny_corpus, tmp_path / "index", projection="two_sided", width=8, progress=False)
    assert not Store.open(tmp_path / "index").manifest.is_complete
    whole = index(
        model,
        tiny_corpus,
        tmp_path / "index",
        projection="two_sided",
        width=8,
        layers="lm_head",
        restart=True,
        progress=False,
    )
    assert "zero_gradient" not in whole.store.info()["counts"]


def test_an_older_index_of_a_tied_head_says_that_it_must_be_built_again(tiny_corpus, tmp_path):
    """It holds the head's use of the shared weight alone."""
    model = OpenAIGPTConfig(n_embd=16, n_layer=1, n_head=2, n_positions=96, vocab_size=259)
    AutoModelForCausalLM.from_config(model).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    built = index(
        tmp_path / "model",
        tiny_corpus,
        tmp_path / "index",
        projection="two_sided",
        width=8,
        layers="lm_head",
        progress=False,
    )
    assert trace(built, "a", completion="b", top=1).of(0)
    settings = {name: value for name, value in built.store.manifest.settings.items() if name != "has_tied_head"}
    built.store._save(replace(built.store.manifest, settings=settings))
    with pytest.raises(ManifestMismatchError, match=r"with the head's use of the weight alone.*--restart"):
        trace(open_index(tmp_path / "index"), "a", completion="b", top=1)
