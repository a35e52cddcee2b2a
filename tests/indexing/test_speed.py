"""A bench times what it says it times, on the batches that it says."""

import pytest
import torch

from conftest import corpus_rows, save_tiny_llama
from whence.corpus.tokens import encode
from whence.errors import CorpusError, SettingError, UnknownNameError
from whence.indexing.build import index
from whence.indexing.speed import BenchResult, _optimizer, bench, make_batches, training_pass
from whence.indexing.vectors import IndexSettings
from whence.models.loading import load_model
from whence.reports.index_tables import bench_table

SIZES = {"batch_size": 4, "length": 16, "batches": 3, "projection": "two_sided", "width": 4}


@pytest.fixture(scope="module")
def result(tiny_llama):
    return bench(tiny_llama, corpus_rows(20), **SIZES, memory=False)


def test_ratios_are_those_of_the_seconds(result):
    assert isinstance(result, BenchResult)
    assert result.ratio == pytest.approx(result.index_seconds / result.step_seconds)
    assert result.ratio_to_forward_backward == pytest.approx(result.index_seconds / result.forward_backward_seconds)
    assert result.examples_per_second == pytest.approx(4 / result.index_seconds)
    assert result.tokens_per_second == pytest.approx(64 / result.index_seconds)
    assert (result.batches, result.examples_per_batch, result.tokens_per_example) == (3, 4, 16)
    least, most = result.spread["index"]
    assert 0 < least <= result.index_seconds <= most


def test_bytes_of_an_example_are_those_of_an_index(tiny_llama, result, tmp_path):
    built = index(tiny_llama, corpus_rows(20), tmp_path / "index", projection="two_sided", width=4, progress=False)
    assert result.width == built.store.manifest.width
    shard = built.store.shard(0, 0)
    assert 20 * result.bytes_per_example == sum(tensor.numel() * tensor.itemsize for tensor in vars(shard).values())


def test_peak_memory_is_that_of_two_fresh_processes(tiny_llama):
    found = bench(tiny_llama, corpus_rows(20), **SIZES | {"batches": 1})
    for peak in (found.peak_bytes, found.step_peak_bytes):
        assert 50e6 < peak < 8e9
    assert "peak memory" in bench_table(found).columns[0]._cells


def test_examples_are_the_corpus_joined_and_cut(tiny_llama):
    loaded = load_model(tiny_llama)
    rows = corpus_rows(3)
    batches = make_batches(loaded, rows, 2, 16, 3, IndexSettings())
    assert len(batches) == 3
    ids = [token for row in rows for token in encode(row, loaded.tokenizer).ids]
    examples = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    expected = [examples[number % len(examples)] for number in range(6)]
    assert torch.cat([batch.ids for batch in batches]).tolist() == expected
    assert all(batch.mask.all() and batch.supervised[:, 1:].all() for batch in batches)


def test_without_a_length_examples_are_the_rows(tiny_llama):
    loaded = load_model(tiny_llama)
    rows = corpus_rows(2)
    (batch,) = make_batches(loaded, rows, 3, None, 1, IndexSettings())
    encoded = [encode(rows[number], loaded.tokenizer) for number in (0, 1, 0)]
    assert [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)] == [e.ids for e in encoded]
    assert batch.supervised.sum(1).tolist() == [example.supervised_count for example in encoded]


def test_a_training_pass_computes_every_weights_gradient_and_a_step_moves_them(tiny_llama):
    loaded = load_model(tiny_llama)
    (batch,) = make_batches(loaded, corpus_rows(5), 2, 16, 1, IndexSettings())
    seen = set()
    for name, weight in loaded.model.named_parameters():
        weight.requires_grad_()
        weight.register_post_accumulate_grad_hook(lambda weight, name=name: seen.add(name))
    before = {name: weight.detach().clone() for name, weight in loaded.model.named_parameters()}
    training_pass(loaded, batch, None)
    assert seen == set(before)
    assert all(torch.equal(before[name], weight) for name, weight in loaded.model.named_parameters())
    training_pass(loaded, batch, torch.optim.AdamW(loaded.model.parameters(), lr=0.1))
    assert not any(torch.equal(before[name], weight) for name, weight in loaded.model.named_parameters())
    assert all(weight.grad is None for weight in loaded.model.parameters())


def test_the_result_is_shown_in_a_few_lines(result):
    cells = [str(cell) for column in bench_table(result).columns for cell in column._cells]
    assert any(f"{result.ratio:.3f} of a training step" in cell for cell in cells)
    assert any("4 examples of 16 tokens, 3 batches each" in cell for cell in cells)


def test_a_batch_is_what_an_index_takes_in_one_pass_unless_given(tiny_llama):
    options = {"width": 4, "batches": 1, "memory": False, "length": 16}
    rows = corpus_rows(20)
    assert bench(tiny_llama, rows, tokens_per_batch=100, normalise="layer", **options).examples_per_batch == 6
    assert bench(tiny_llama, rows, tokens_per_batch=10, **options).examples_per_batch == 1
    assert bench(tiny_llama, rows, **options | {"length": 96}).examples_per_batch == 2048 // 96
    assert bench(tiny_llama, rows, **options | {"length": None}).examples_per_batch == 16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, SettingError, "a number from 1 to"),
        ({"batches": 0}, SettingError, "a number from 1 to"),
        ({"length": 1}, SettingError, "--length 1: a number from 2 to"),
        ({"length": 97}, SettingError, "--length 97: the model's context is 96 tokens"),
        ({"length": 96}, CorpusError, "too little text for a batch"),
        ({"projection": "two_side"}, UnknownNameError, "--projection two_side: no such method. Did you mean"),
        ({"colour": "red"}, SettingError, "colour: not a setting of an index"),
    ],
)
def test_what_cannot_be_timed_is_said(tiny_llama, options, error, message):
    with pytest.raises(error, match=message):
        bench(tiny_llama, corpus_rows(2), **SIZES | options, memory=False)


def test_an_adapter_is_timed_with_its_own_weights_alone(tiny_llama, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "base"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter")
    optimizer = _optimizer(loaded)
    assert sum(weight.numel() for group in optimizer.param_groups for weight in group["params"]) == sum(
        weight.numel() for name, weight in loaded.model.named_parameters() if "lora_" in name
    )
    assert bench(tmp_path / "adapter", corpus_rows(20), **SIZES, memory=False).width == 4 * 4 * 4
