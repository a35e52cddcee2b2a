"""An index that an earlier version built wrongly says so when it is asked, and is not gone on with."""

import json
from dataclasses import replace

import pytest
import transformers as t

from conftest import corpus_rows, save_tiny_llama
from whence.errors import ManifestMismatchError
from whence.indexing.build import index
from whence.indexing.opening import open_index
from whence.indexing.store import Store
from whence.models.checkpointing import has_dropout

HOW = {"width": 4, "progress": False}


@pytest.mark.parametrize(
    ("options", "name", "fault"),
    [
        ({"dtype": "float16"}, "slopes", "lost the gradients"),
        ({"gradient_checkpointing": True}, "dropout", "dropout on"),
    ],
)
def test_an_index_of_a_version_with_a_fault_says_so(tmp_path, caplog, options, name, fault):
    config = save_tiny_llama(tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    out = tmp_path / "index"
    built = index(tmp_path / "model", corpus_rows(3), out, **HOW, **options)
    caplog.clear()
    open_index(out).model()
    assert "earlier version" not in caplog.text
    old = built.store.manifest
    settings = {key: value for key, value in old.settings.items() if key != name}
    assert len(settings) == len(old.settings) - 1
    (out / "manifest.json").write_bytes(replace(old, settings=settings).to_json())
    open_index(out).model()
    assert fault in caplog.text and "--restart" in caplog.text
    with pytest.raises(ManifestMismatchError, match=f"{name}` is not given there"):
        index(tmp_path / "model", corpus_rows(3), out, **HOW, **options)


def test_an_index_without_a_fault_has_no_mark(tiny_llama, tmp_path):
    index(tiny_llama, corpus_rows(3), tmp_path / "index", gradient_checkpointing=True, **HOW)
    assert not {"slopes", "dropout"} & Store.open(tmp_path / "index").manifest.settings.keys()


def test_dropout_is_found_in_a_configuration_and_inside_it():
    assert has_dropout(t.OPTConfig()) and not has_dropout(t.LlamaConfig())
    assert has_dropout(t.DbrxConfig(ffn_config={"moe_jitter_eps": 0.1})) and not has_dropout(t.DbrxConfig())
