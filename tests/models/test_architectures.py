"""Architectures of many kinds: gradients are those of autograd, at once or after the layers that one refusal names."""

import json
import re

import peft
import pytest
import torch

from conftest import save_tiny_llama
from whence.corpus.tokens import Encoded, collate
from whence.errors import ModelError, SettingError
from whence.gradients.capture import gradients
from whence.models.auto_classes import auto_class
from whence.models.causality import refuse_not_causal, refuse_other_logits
from whence.models.loading import LoadedModel, load_model

pytest.importorskip("benchmarks.reliability.tiny_architectures")
from benchmarks.reliability.tiny_architectures import tiny_config, tiny_model

LEFT_OUT = {
    "blt": (
        "!*global_transformer.*,!*patch_embedding_projection,!*local_encoder.cross_attn_layers.*.o_proj,"
        "!*local_encoder.cross_attn_layers.*.q_proj,!*local_decoder.cross_attn_layers.*.k_proj,"
        "!*local_decoder.cross_attn_layers.*.v_proj"
    ),
    "deepseek_v4": "!*o_a_proj",
    "llama4_text": "!*router",
    "mamba": "!*dt_proj",
    "phimoe": "!*router",
}
"""What a refusal leaves out, by type. The others are right at once."""
RIGHT = ["bart", "gemma3n_text", "llava", "mixtral", "mllama", "modernbert-decoder", "qwen3_next", "zamba2"]
UNREACHED = {"bart": "encoder_attn", "llava": "vision_tower", "mllama": "cross_attn"}
"""A part that no text reaches."""
ROWS = [Encoded([5, 60, 7, 8, 40, 90], [False, False, True, True, False, True]), Encoded([9, 100], [False, True])]


def loaded(kind):
    """A tiny model, checked as `load_model` checks it."""
    model = LoadedModel(model=tiny_model(kind).requires_grad_(False), tokenizer=None, path=kind)
    refuse_not_causal(model.base, kind, model.device, {0, 1, 2})
    refuse_other_logits(model, {0, 1, 2})
    return model


def autograd(model, layers, row):
    """Gradients of a row's mean loss, by layer; 0 where the loss does not reach."""
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    ids = torch.tensor([row.ids])
    nll = -model.base(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    nll = nll.gather(1, ids[0, 1:, None])[:, 0][torch.tensor(row.supervised[1:])]
    found = torch.autograd.grad(nll.mean(), weights, allow_unused=True)
    model.model.requires_grad_(False)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, found, strict=True)])


@pytest.mark.parametrize("kind", [*LEFT_OUT, *RIGHT])
def test_gradients_equal_autograd(kind):
    model, pattern = loaded(kind), None
    if kind in LEFT_OUT:
        with pytest.raises(ModelError) as error:
            gradients(model, model.layers(), collate(ROWS))
        assert "\n" not in str(error.value)
        pattern = re.search(r"Leave out: --layers '(\S+)' ", str(error.value))[1]
        assert set(pattern.split(",")) == set(LEFT_OUT[kind].split(","))
    layers = model.layers(pattern)
    found, _ = gradients(model, layers, collate(ROWS))
    for number, row in enumerate(ROWS):
        one = torch.cat([found[name][number].flatten() for name in layers])
        expected = autograd(model, layers, row)
        assert (one - expected).norm() < 1e-5 * expected.norm()
    if kind in UNREACHED:
        assert not any(UNREACHED[kind] in name for name in (*layers, *model.layers("*")))
        with pytest.raises(SettingError, match=rf"--layers \*{UNREACHED[kind]}\*: no text reaches these layers"):
            model.layers(f"*{UNREACHED[kind]}*")
        assert model.layers(f"!*{UNREACHED[kind]}*").keys() == layers.keys()


def test_a_model_that_is_causal_only_beside_a_padded_row_is_refused():
    """As PaliGemma without the kinds of its tokens."""
    with pytest.raises(ModelError, match=r"PaliGemmaForConditionalGeneration is not causal"):
        loaded("paligemma")


def with_lora(**targets):
    """A mixture of experts with an adapter whose B is not 0."""
    base = tiny_model("mixtral")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **targets))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data)
    return LoadedModel(model=adapted.requires_grad_(False).eval(), tokenizer=None, path="lora", has_adapter=True)


def test_lora_on_fused_experts_is_refused_with_what_leaves_it_out():
    """The advice was to leave out every layer."""
    experts = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = with_lora(target_modules=["q_proj"], **experts)
    with pytest.raises(ModelError, match=r"\(and 7 more\) cannot be seen.*Leave out: --layers '!\*experts\.\*'"):
        gradients(model, model.layers(), collate(ROWS))
    found, _ = gradients(model, model.layers("!*experts.*"), collate(ROWS))
    assert len(found) == 4
    model = with_lora(target_modules=[], **experts)
    with pytest.raises(ModelError, match=r"So it is for every traced layer. Merge the adapter into its base"):
        gradients(model, model.layers(), collate(ROWS))


def test_all_layers_of_a_model_with_an_adapter_can_be_traced():
    """The wrapper of peft shows its layer's weight as its own, and was taken for another module that shares it."""
    model = with_lora(target_modules=["q_proj"])
    layers = model.layers("*q_proj*")
    found, _ = gradients(model, layers, collate(ROWS))
    expected = autograd(model, layers, ROWS[0])
    assert (torch.cat([found[name][0].flatten() for name in layers]) - expected).norm() < 1e-5 * expected.norm()
    assert any("base_layer" in name for name in layers)


def test_the_class_of_a_checkpoint(tmp_path):
    """Emu3's causal class finds none of its weights in a published checkpoint; T5 has no such class."""
    import transformers

    for kind, auto in (("emu3", "AutoModelForImageTextToText"), ("mixtral", "AutoModelForCausalLM")):
        tiny_config(kind).save_pretrained(tmp_path / kind)
        assert auto_class(str(tmp_path / kind)) is getattr(transformers, auto)
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"t5: transformers has no causal language model of the type t5\. Give a"):
        auto_class(str(tmp_path / "t5"))


def test_a_quantised_model_without_its_library_is_refused_in_one_line(tmp_path):
    directory = save_tiny_llama(tmp_path / "model")
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "vptq"}}))
    refusal = (
        r"model: a quantised model \(vptq\), which does not load here \(ImportError: .*\)\. .* before it was quanti"
    )
    with pytest.raises(ModelError, match=refusal):
        load_model(directory)
