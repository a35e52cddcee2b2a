"""Architectures of many kinds: gradients are those of autograd, at once or after the layers that one refusal names."""

import re

import pytest
import torch

from whence.corpus.tokens import Encoded, collate
from whence.errors import ModelError, SettingError
from whence.gradients.capture import gradients
from whence.models.causality import refuse_not_causal, refuse_other_logits
from whence.models.loading import LoadedModel

pytest.importorskip("benchmarks.reliability.tiny_architectures")
from benchmarks.reliability.tiny_architectures import tiny_model

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
RIGHT = ["bart", "gemma3", "gemma3n_text", "mixtral", "mllama", "modernbert-decoder", "qwen3_next", "zamba2"]
UNREACHED = {"bart": "encoder_attn", "gemma3": "vision_tower", "mllama": "cross_attn"}
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
