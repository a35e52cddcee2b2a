"""theta_0 - theta_f against plain subtraction, peft's merge and autograd; and every model pair that must be refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SIZES, byte_tokenizer, plain_trainer_run, save_tiny_llama
from whence.errors import ModelError
from whence.models.difference import _base_minus_final, rounding_step, weight_difference
from whence.models.loading import load_model
from whence.models.weights import weights_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_model(directory, kind, seed=0, vocabulary=259):
    """A random model of 259 bytes, or more rows, with its tokenizer: llama, tied (a Llama), or gpt2 (tied)."""
    import transformers as t

    torch.manual_seed(seed)
    ids = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, n_positions=64, **ids))
    else:
        config = t.LlamaConfig(
            **SIZES, **ids, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=kind == "tied"
        )
        model = t.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def rewritten(source, directory, change, dtype=None):
    """A copy of a saved model whose every tensor is `change(name, tensor)`; None drops it."""
    shutil.copytree(source, directory)
    weights = {name: change(name, tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    kept = {name: tensor.to(dtype or tensor.dtype) for name, tensor in weights.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    return directory


def moved(name, tensor, size=1e-3):
    return tensor + size * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))


def configured(directory, **settings):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture(params=["llama", "tied", "gpt2"])
def pair(request, tmp_path):
    """Directories of a base and its fine-tune."""
    base = save_model(tmp_path / "base", request.param)
    return base, rewritten(base, tmp_path / "final", moved)


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base", "llama")


def parameters(directory, **options):
    loaded = load_model(directory, **options)
    return {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}


# -- numbers


def test_it_is_the_difference_of_the_loaded_parameters(pair):
    difference, (before, after) = weight_difference(*pair), (parameters(directory) for directory in pair)
    assert set(difference) == set(after)
    for name in difference:
        assert torch.equal(difference[name], before[name] - after[name]), name
        assert torch.equal(difference.base_weight(name), before[name])
        assert torch.equal(difference.final_weight(name), after[name])
    total = math.sqrt(sum(float((before[name] - after[name]).double().square().sum()) for name in before))
    assert difference.norm() == pytest.approx(total)
    assert math.hypot(*(layer.norm for layer in difference.report)) == pytest.approx(total)
    assert not difference.is_unlikely_parent
    assert difference.cosine is not None
    assert difference.cosine > 0.99


def test_the_sign_makes_a_training_rows_gradient_positive(pair, tmp_path):
    """One step of gradient descent on one row."""
    start, _ = pair
    loaded = load_model(start)
    ids = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(0))
    loaded.model.requires_grad_(True)
    loaded.model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in loaded.model.named_parameters()}
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight -= 0.1 * weight.grad
    loaded.model.save_pretrained(tmp_path / "stepped")
    difference = weight_difference(start, tmp_path / "stepped")
    for name, gradient in gradients.items():
        torch.testing.assert_close(difference[name], 0.1 * gradient, rtol=1e-3, atol=1e-6)
        assert float((difference[name] * gradient).sum()) > 0, name


def test_the_sign_is_base_minus_final():
    assert _base_minus_final(torch.tensor([3.0]), torch.tensor([1.0])).tolist() == [2.0]


def test_mapped_changes_entries_one_after_another(pair):
    difference = weight_difference(*pair)
    doubled = difference.mapped(lambda name, tensor: 2 * tensor)
    shifted = doubled.mapped(lambda name, tensor: tensor + difference.base_weight(name))
    for name in difference:
        assert torch.equal(shifted[name], 2 * difference[name] + difference.base_weight(name))
    assert doubled.norm() == pytest.approx(2 * difference.norm())
    assert doubled.report == difference.report


def test_rows_are_plain(pair):
    difference = weight_difference(*pair)
    rows = json.loads(json.dumps(difference.rows()))
    assert [row["name"] for row in rows] == list(difference)
    assert all(row["carries_signal"] and row["norm"] > 0 for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_steps_are_those_of_the_dtype(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[:4] = torch.tensor([0.0, 1.0, torch.finfo(dtype).smallest_normal, torch.finfo(dtype).smallest_normal / 2])
    above = torch.nextafter(values.abs(), torch.tensor(math.inf, dtype=dtype))
    assert torch.equal(rounding_step(values), above.float() - values.abs().float())


def test_noise_and_unchanged_share_by_hand(base, tmp_path):
    """Norm gains of 1 in bfloat16, whose step is 1/128 from 1 on: four of sixteen move by two steps."""
    start = rewritten(base, tmp_path / "start", lambda name, tensor: tensor, torch.bfloat16)
    move = torch.zeros(16).index_fill_(0, torch.arange(4), 2 / 128)
    final = rewritten(
        start,
        tmp_path / "final",
        lambda name, x: x.float() + move if name == "model.norm.weight" else x,
        torch.bfloat16,
    )
    (layer,) = (layer for layer in weight_difference(start, final).report if layer.name == "model.norm.weight")
    assert (layer.shape, layer.unchanged, layer.norm) == ((16,), 0.75, math.sqrt(4) * 2 / 128)
    assert layer.noise == pytest.approx(math.sqrt(4 / 12) / 128)
    assert layer.signal == pytest.approx(2 * math.sqrt(12))
    assert layer.relative == pytest.approx(layer.norm / 4)
    assert layer.cosine is None
    both = weight_difference(start, final, base_is_exact=False)
    (twice,) = (found for found in both.report if found.name == "model.norm.weight")
    assert twice.noise == pytest.approx(layer.noise * math.sqrt(2))
    assert [found.name for found in both.layers()] == ["model.norm.weight"]


def test_a_layer_that_was_only_rounded_carries_no_signal(base, tmp_path):
    """Saved in bfloat16 from float32, with one layer moved: the others' norms are the noise's."""
    one = "model.layers.0.mlp.up_proj.weight"
    final = rewritten(
        base, tmp_path / "final", lambda name, tensor: tensor + 0.01 if name == one else tensor, torch.bfloat16
    )
    difference = weight_difference(base, final)
    assert [layer.name for layer in difference.layers()] == [one]
    large = [layer for layer in difference.report if math.prod(layer.shape) >= 256 and layer.name != one]
    assert all(0.8 < layer.signal < 1.2 for layer in large)
    assert any("no more than rounding" in note for note in difference.notes)
    assert any("output head did not move" in note for note in difference.notes)


def test_moves_below_a_rounding_step_are_told(base, tmp_path):
    start = rewritten(base, tmp_path / "start", lambda name, tensor: tensor, torch.bfloat16)
    final = rewritten(start, tmp_path / "final", lambda name, tensor: moved(name, tensor.float(), 1e-5), torch.bfloat16)
    difference = weight_difference(start, final)
    assert any("% of the moved layers' entries did not change" in note for note in difference.notes)
    assert all(layer.signal > 2 for layer in difference.report if layer.norm > 0)


# -- files


def test_sharded_files_give_the_same(pair, tmp_path):
    start, final = pair
    loaded = load_model(final)
    loaded.model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    whole, sharded = weight_difference(start, final), weight_difference(start, tmp_path / "sharded")
    assert set(whole) == set(sharded)
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    next((tmp_path / "sharded").glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="names model-00002"):
        weight_difference(start, tmp_path / "sharded")


class Harm:
    """Creates a file when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_torch_files_are_read_as_tensors_alone(pair, tmp_path, monkeypatch):
    start, final = pair
    copied = shutil.copytree(final, tmp_path / "copied")
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    whole, found = weight_difference(start, final), weight_difference(start, copied)
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    torch.save({"weight": Harm()}, copied / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="not a readable file of tensors"):
        weight_difference(start, copied)
    assert not (tmp_path / "harmed").exists()


def test_a_cut_file_is_named(base, tmp_path):
    final = rewritten(base, tmp_path / "final", moved)
    data = (final / "model.safetensors").read_bytes()
    (final / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match=r"final/model\.safetensors: not a readable"):
        weight_difference(base, final)
    (final / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"there is no model\.safetensors"):
        weight_difference(base, final)


def test_a_run_is_its_last_checkpoint(tmp_path):
    plain_trainer_run(tmp_path / "run", "llama", 4)
    run, base = tmp_path / "run", tmp_path / "run-base"
    difference, last = weight_difference(base, run), parameters(run / "checkpoint-4")
    assert difference.final == str(run / "checkpoint-4")
    assert all(torch.equal(difference.final_weight(name), last[name]) for name in last)


def test_names_of_older_files_are_matched(tmp_path):
    """GPT-2 as the Hub has it: no leading `transformer.`, and the attention's mask among the weights."""
    base = save_model(tmp_path / "base", "gpt2")
    final = rewritten(base, tmp_path / "final", moved)
    old = shutil.copytree(base, tmp_path / "old")
    weights = {name.removeprefix("transformer."): x for name, x in load_file(base / "model.safetensors").items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(4, 4)}, old / "model.safetensors", {"format": "pt"})
    whole, found = weight_difference(base, final), weight_difference(old, final)
    assert set(whole) == set(found)
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    loaded = parameters(old)
    backwards = weight_difference(final, old)
    assert set(backwards) == set(loaded)
    assert all(torch.equal(backwards[name], -whole[name]) for name in whole)


# -- heads and vocabularies


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_a_tied_head_is_one_entry_even_where_the_file_has_a_copy(kind, tmp_path):
    base = save_model(tmp_path / "base", kind)
    final = rewritten(base, tmp_path / "final", moved)
    weights = load_file(final / "model.safetensors")
    embedding = EMBEDDING if kind == "tied" else "transformer.wte.weight"
    save_file(weights | {HEAD: weights[embedding].clone()}, final / "model.safetensors", {"format": "pt"})
    difference = weight_difference(base, final)
    assert HEAD not in difference
    assert any(f"tied to {embedding}" in note for note in difference.notes)


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_frozen_head_is_noticed(kind, tmp_path):
    base = save_model(tmp_path / "base", kind)
    frozen = HEAD if kind == "llama" else EMBEDDING
    final = rewritten(base, tmp_path / "final", lambda name, tensor: tensor if name == frozen else moved(name, tensor))
    difference = weight_difference(base, final)
    assert any("output head did not move" in note for note in difference.notes)
    assert any(f"did not change at all (frozen): {frozen}" in note for note in difference.notes)
    assert frozen not in [layer.name for layer in difference.layers()]
    assert len(difference.layers()) == len(difference) - 1


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_a_padded_vocabulary_is_aligned(kind, tmp_path):
    start = save_model(tmp_path / "base", kind)
    loaded = load_model(start)
    loaded.model.resize_token_embeddings(264, mean_resizing=False)
    loaded.model.save_pretrained(tmp_path / "padded")
    byte_tokenizer().save_pretrained(tmp_path / "padded")
    final = rewritten(tmp_path / "padded", tmp_path / "final", moved)
    difference, before, after = weight_difference(start, final), parameters(start), parameters(final)
    for name, tensor in difference.items():
        if tensor.shape == before[name].shape:
            assert torch.equal(tensor, before[name] - after[name])
        else:
            assert tensor.shape == (264, 16)
            assert torch.equal(tensor[:259], before[name] - after[name][:259])
            assert not tensor[259:].count_nonzero()
            assert not difference.base_weight(name)[259:].count_nonzero()
    assert any("259 rows are aligned by their tokens, 5 of the final" in note for note in difference.notes)
    for file in final.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="final has no readable tokenizer to align them by"):
        weight_difference(start, final)


def test_a_reordered_vocabulary_is_aligned(base, tmp_path):
    """Two tokens change places, and one gets another name."""
    final = rewritten(base, tmp_path / "final", moved)
    order = torch.arange(259)
    order[[5, 9]] = order[[9, 5]]
    plain = weight_difference(base, final)
    swapped = rewritten(
        final, tmp_path / "swapped", lambda name, tensor: tensor[order] if tensor.shape[0] == 259 else tensor
    )
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    words[5], words[9], words[20] = words[9], words[5], "other"
    tokenizer["model"]["vocab"] = {word: number for number, word in words.items()}
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    difference = weight_difference(base, swapped)
    for name, tensor in difference.items():
        expected = plain[name].clone()
        if tensor.shape[0] == 259:
            expected = expected[order]
            expected[20] = 0
        assert torch.equal(tensor, expected), name
    assert any("258 rows are aligned" in note and "1 of the base are left out" in note for note in difference.notes)


def test_equal_vocabularies_need_no_tokenizer(pair):
    for directory in pair:
        for file in directory.glob("tokenizer*"):
            file.unlink()
    assert any("are taken to have one order" in note for note in weight_difference(*pair).notes)


def test_a_head_of_its_own_beside_a_tied_base_is_another_architecture(tmp_path):
    base = save_model(tmp_path / "base", "tied")
    final = rewritten(base, tmp_path / "final", moved)
    weights = load_file(final / "model.safetensors")
    save_file(weights | {HEAD: weights[EMBEDDING] + 1}, final / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"final: it holds lm_head\.weight"):
        weight_difference(base, final)


def test_a_head_is_found_under_its_older_name(tmp_path):
    """GPT-NeoX calls it embed_out in its files, and lm_head once loaded."""
    import transformers as t

    config = t.GPTNeoXConfig(**SIZES, vocab_size=259, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
    t.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    final = rewritten(tmp_path / "base", tmp_path / "final", moved)
    before, after = parameters(tmp_path / "base"), parameters(final)
    difference = weight_difference(tmp_path / "base", final)
    assert set(difference) == set(after)
    assert all(torch.equal(difference[name], before[name] - after[name]) for name in after)


# -- adapters


def save_adapter(base, directory, seed=0, **settings):
    """An adapter with weights that are not 0, beside its base."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]} | settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(directory)
    return directory


def merged(directory):
    return dict(load_model(directory).model.merge_and_unload().named_parameters())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"alpha_pattern": {"q_proj": 2}, "rank_pattern": {"layers.1.mlp.down_proj": 2}}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
)
def test_low_rank_updates_equal_merged_minus_base(kind, settings, tmp_path):
    base = save_model(tmp_path / "base", kind)
    final = save_adapter(base, tmp_path / "final", **settings)
    difference, before, after = weight_difference(base, final), parameters(base), merged(final)
    names = {f"{layer}.weight" for layer in difference.adapted}
    assert len(names) == 4
    for name in names:
        dense = difference.low_rank(name.removesuffix(".weight")).dense()
        expected = before[name] - after[name]
        torch.testing.assert_close(dense.T if kind == "gpt2" else dense, expected, rtol=0, atol=1e-6)
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert unmoved == set(before) - names


def test_an_adapters_own_parameters_are_its_entries(base, tmp_path):
    final = save_adapter(base, tmp_path / "final")
    difference, loaded = weight_difference(base, final), load_model(final)
    factors = {name: weight for name, weight in loaded.model.named_parameters() if "lora_B" in name}
    assert set(difference) == set(factors)
    for name, weight in factors.items():
        assert torch.equal(difference[name], -weight)
        assert not difference.base_weight(name).count_nonzero()
        loaded.base.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight"))
    assert set(difference.adapted) < {name for name, _ in loaded.base.named_modules()}
    assert difference.cosine is None
    assert not difference.is_unlikely_parent
    assert all(layer.relative is None for layer in difference.report)
    assert any("lora_A" in note and "Left out" in note for note in difference.notes)
    assert any("output head did not move" in note for note in difference.notes)
    with pytest.raises(KeyError):
        difference.low_rank("lm_head")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_embeddings_factor_a_is_the_one_that_began_at_0(base, tmp_path):
    final = save_adapter(base, tmp_path / "final", target_modules=["embed_tokens"])
    difference, stored = weight_difference(base, final), load_file(final / "adapter_model.safetensors")
    (layer,) = difference.layers()
    assert layer.name == "base_model.model.model.embed_tokens.lora_embedding_A.default"
    assert torch.equal(difference[layer.name], -stored[layer.name.removesuffix(".default")])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_of_the_head_moves_it(base, tmp_path):
    """The head itself is saved beside its adapter, as it was."""
    final = save_adapter(base, tmp_path / "final", target_modules=["lm_head"])
    assert any(".base_layer." in name for name in load_file(final / "adapter_model.safetensors"))
    difference = weight_difference(base, final)
    assert not any("output head did not move" in note for note in difference.notes)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_whole_modules_beside_an_adapter_are_compared(kind, tmp_path):
    base = save_model(tmp_path / "base", kind)
    final = save_adapter(base, tmp_path / "final", modules_to_save=["lm_head"])
    difference, loaded = weight_difference(base, final), load_model(final)
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    begun = parameters(base)[HEAD if kind == "llama" else EMBEDDING]
    assert torch.equal(difference[name], begun - loaded.model.get_parameter(name))
    assert not any("output head did not move" in note for note in difference.notes)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("more", [2, -2])
def test_an_adapters_saved_vocabulary_of_another_size_is_compared_by_the_tokens_of_both(base, more, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    size = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(size + more, mean_resizing=False)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian", task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, config)
    next(weight for name, weight in made.named_parameters() if "lora_B" in name).data.normal_()
    made.save_pretrained(tmp_path / "final", save_embedding_layers=True)
    difference = weight_difference(base, tmp_path / "final")
    embedding = difference[f"base_model.model.{EMBEDDING}"]
    assert embedding.shape[0] == size + more and not embedding.any()


def test_two_adapters_of_one_base_are_compared_factor_by_factor(base, tmp_path):
    first, second = (save_adapter(base, tmp_path / str(seed), seed) for seed in (1, 2))
    difference, before, after = weight_difference(first, second), parameters(first), parameters(second)
    factors = {name for name in before if "lora_" in name}
    assert set(difference) == factors
    assert all(torch.equal(difference[name], before[name] - after[name]) for name in factors)
    for layer in difference.adapted:
        expected = merged(first)[f"{layer}.weight"] - merged(second)[f"{layer}.weight"]
        torch.testing.assert_close(difference.low_rank(layer).dense(), expected, rtol=0, atol=1e-6)


def test_adapters_that_do_not_fit_are_refused(base, tmp_path):
    final = save_adapter(base, tmp_path / "final")
    other = save_model(tmp_path / "other", "llama", seed=1)
    copied = shutil.copytree(base, tmp_path / "copied")
    assert set(weight_difference(copied, final)) == set(weight_difference(base, final))
    with pytest.raises(ModelError, match=r"an adapter of .*base, not of .*other"):
        weight_difference(other, final)
    with pytest.raises(ModelError, match=r"final: an adapter, but .*base is a whole model"):
        weight_difference(final, base)
    with pytest.raises(ModelError, match="only one of the two adapters has"):
        weight_difference(save_adapter(base, tmp_path / "few", target_modules=["q_proj"]), final)
    with pytest.raises(ModelError, match="with use_dora"):
        weight_difference(base, save_adapter(base, tmp_path / "dora", use_dora=True))
    with pytest.raises(ModelError, match="init_lora_weights is olora"):
        weight_difference(base, save_adapter(base, tmp_path / "olora", init_lora_weights="olora"))


# -- what is refused or flagged


def test_identical_weights_are_refused(pair, tmp_path):
    start, _ = pair
    with pytest.raises(ModelError, match=r"the same weights as .*nothing to find"):
        weight_difference(start, start)
    final = rewritten(start, tmp_path / "half", lambda name, tensor: tensor, torch.bfloat16)
    for models in ((start, final), (final, start)):
        with pytest.raises(ModelError, match="the same weights, rounded otherwise"):
            weight_difference(*models)


def test_an_adapter_that_was_not_trained_is_refused(base, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2)).save_pretrained(
        tmp_path / "new"
    )
    with pytest.raises(ModelError, match="nothing to find"):
        weight_difference(base, tmp_path / "new")


def test_other_architectures_and_shapes_are_named(base, tmp_path):
    with pytest.raises(ModelError, match=r"a gpt2 model, but .* is a llama model"):
        weight_difference(base, save_model(tmp_path / "gpt2", "gpt2"))
    deeper = rewritten(base, tmp_path / "deeper", moved)
    weights = load_file(deeper / "model.safetensors")
    extra = {name.replace(".1.", ".2."): x.clone() for name, x in weights.items() if ".1." in name}
    save_file(weights | extra, deeper / "model.safetensors", {"format": "pt"})
    assert "no place for 9 stored tensors: " in weight_difference(base, deeper).notes[0]
    configured(deeper, num_hidden_layers=3)
    for models, layers in (((base, deeper), "2 and 3"), ((deeper, base), "3 and 2")):
        with pytest.raises(ModelError, match=rf"models of different sizes \(layers {layers}\).*Give the model"):
            weight_difference(*models)
    name = "model.layers.1.mlp.up_proj.weight"
    wider = rewritten(base, tmp_path / "wider", lambda key, x: torch.ones(30, 16) if key == name else x)
    with pytest.raises(ModelError, match=r"up_proj\.weight has the shape \[30, 16\], in .*base it is \[24, 16\]"):
        weight_difference(base, wider)


def test_an_unrelated_base_is_flagged(base, tmp_path):
    other = save_tiny_llama(tmp_path / "other", seed=7)
    difference = weight_difference(base, other)
    assert difference.is_unlikely_parent
    assert difference.cosine is not None
    assert abs(difference.cosine) < 0.2
    assert any("hardly what" in note and "median cosine" in note for note in difference.notes)


def test_quantised_weights_are_refused(base, tmp_path):
    final = rewritten(base, tmp_path / "final", moved)
    configured(final, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"final: quantised weights \(gptq\)"):
        weight_difference(base, final)
    packed = rewritten(base, tmp_path / "packed", lambda name, x: x, torch.int8)
    with pytest.raises(ModelError, match="is stored as int8, so it is quantised"):
        weight_difference(base, packed)


def test_numbers_that_are_not_finite_are_named(base, tmp_path):
    final = rewritten(base, tmp_path / "final", lambda name, x: x * math.nan if name == HEAD else x)
    with pytest.raises(ModelError, match=r"lm_head\.weight .* not finite"):
        weight_difference(base, final)


@pytest.mark.parametrize("names", [["x"], {"w": 1}, {"w": "../x.safetensors"}, {"w": "/x.safetensors"}, None])
def test_an_index_of_weights_names_files_beside_it(tmp_path, names):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match="not an index of weight files"):
        weights_of(str(tmp_path), "model")
