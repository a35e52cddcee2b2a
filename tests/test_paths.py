"""What an operating system refuses is told in one line: which path, and what mends it."""

import errno
import os

import pytest
import safetensors
import torch

from conftest import corpus_rows, write_jsonl
from whence import paths
from whence.ablation.merging import check_scale
from whence.corpus import templates
from whence.corpus.reading import open_corpus
from whence.errors import CorpusError, ModelError, SettingError, StorageError
from whence.mixing.tables import read_mixture_table
from whence.models.loading import adapter_config, load_model
from whence.outputs import refuse_inputs
from whence.reports.files import write_rows
from whence.training.trainer import train


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 22016 vs 21904"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_is_one_line_whoever_writes(tmp_path, error):
    told = pytest.raises(StorageError, match=rf"Cannot write {tmp_path}: .* free there.*run the same command again")
    with told as caught, paths.writing_to(tmp_path):
        raise error
    assert "No space left on device" in str(caught.value) or ": a file was cut short;" in str(caught.value)


def test_a_directory_that_is_removed_meanwhile_is_named(tmp_path):
    for error in (RuntimeError(f"Parent directory {tmp_path}/a does not exist."), FileNotFoundError(2, "No such file")):
        told = pytest.raises(StorageError, match=rf"{tmp_path} was removed while it was in use. Run the same command")
        with told, paths.writing_to(tmp_path):
            raise error
    with pytest.raises(RuntimeError, match="another"), paths.writing_to(tmp_path):
        raise RuntimeError("another")


def test_a_training_without_room_ends_in_one_line_and_goes_on(tmp_path, tiny_llama, monkeypatch):
    corpus, settings = write_jsonl(tmp_path / "c.jsonl", corpus_rows(4)), {"max_steps": 1, "progress": False}
    real = torch.save

    def full(*arguments, **options):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match=f"Cannot write {tmp_path / 'run'}"):
        train(tiny_llama, corpus, tmp_path / "run", **settings)
    monkeypatch.setattr(torch, "save", real)
    run = train(tiny_llama, corpus, tmp_path / "run", **settings)
    before, after = (load_model(path).model.lm_head.weight for path in (tiny_llama, run / "checkpoint-1"))
    assert not torch.equal(before, after), "the only step of a training has a rate above 0"


def test_files_that_may_not_be_read_are_named(tmp_path, tiny_llama, monkeypatch):
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).endswith("model.safetensors") and real(path, mode)
    )
    with pytest.raises(StorageError, match=r"model.safetensors: this user may not read it .*chmod"):
        load_model(tiny_llama)


def test_an_output_that_cannot_be_made_is_refused_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    messages = {"file": "a file, where a directory", "file/run": "is a file, and no directory",
                "a\0b": "null character", "x" * 300: "300 characters", "\udcff": "not UTF-8"}  # fmt: skip
    for out, message in messages.items():
        with pytest.raises(SettingError, match=message):
            refuse_inputs(f"{tmp_path}/{out}", [], is_directory=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SettingError, match="may not write"):
        refuse_inputs(tmp_path / "run", [], is_directory=True)


def test_any_row_is_a_row_of_every_table(tmp_path):
    import datetime

    import pyarrow.parquet

    values = [1, "odd", 2**70, None, "\ud800", 0.5, True, datetime.date(2026, 1, 2), {"a": 2**70}, b"\xff"]
    rows = [{"v": value, "big": 2**64, "\ud800": 1} for value in values]
    for ending in (".parquet", ".csv", ".jsonl"):
        write_rows(rows, tmp_path / f"rows{ending}")
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet", use_threads=False).to_pydict()
    assert table["v"][:5] == ["1", "odd", str(2**70), None, "?"] and table["big"][0] == str(2**64)


def test_an_endless_template_and_one_without_bounds_are_refused(monkeypatch):
    from conftest import byte_tokenizer

    monkeypatch.setattr(templates, "SECONDS", 0.2)
    tokenizer, messages = byte_tokenizer(), [{"role": "user", "content": "a"}]
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for template, reason in ((loop, "endless loop"), ("{{ 'a' * 10**18 }}", "MemoryError"),
                             ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
                             ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion")):  # fmt: skip
        tokenizer.chat_template = template
        with pytest.raises(CorpusError, match=reason):
            templates.templated(messages, tokenizer)


def test_deep_rows_and_messages_of_another_form_are_refused_with_their_place(tmp_path):
    deep = tmp_path / "deep.jsonl"
    deep.write_text('{"text": "a", "x": ' + "[" * 300 + "]" * 300 + "}\n")
    with pytest.raises(CorpusError, match=r"deep.jsonl:1: .*100 levels"):
        list(open_corpus(deep))
    with pytest.raises(CorpusError, match="row 0: messages are a list"):
        list(open_corpus([{"messages": "text", "instruction": "x"}]))


@pytest.mark.parametrize("scale", [1e18, -1e308, float("nan")])
def test_a_scale_without_sense_is_refused(scale):
    with pytest.raises(SettingError, match="from -1,000 to 1,000"):
        check_scale(scale)


@pytest.mark.parametrize("loss", [1e308, 10**401])
def test_a_loss_that_none_can_be_is_refused(loss):
    rows = [{"train_a": n / 8, "train_b": 1 - n / 8, "metric/x": loss} for n in range(8)]
    with pytest.raises(SettingError, match="above 1e"):
        read_mixture_table(rows)


@pytest.mark.parametrize("change", [{"r": {}}, {"target_modules": [[1]]}, {"modules_to_save": 3}])
def test_an_adapters_configuration_is_checked(tmp_path, change):
    write_jsonl(
        tmp_path / "adapter_config.json", [{"peft_type": "LORA", "base_model_name_or_path": "x", "r": 2} | change]
    )
    with pytest.raises(ModelError, match=f"not the configuration of a peft adapter .{min(change)} is"):
        adapter_config(str(tmp_path))


def test_a_lone_surrogate_in_a_tools_name_is_no_crash():
    from conftest import byte_tokenizer

    tokenizer = byte_tokenizer(chat=True)
    assert templates.templated([{"role": "\ud800", "content": "a"}], tokenizer) == "[?]a</s>"
