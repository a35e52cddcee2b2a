"""Models whose tokens see later ones, or other rows, are refused at load; and layers that are laid out time first."""

import json

import pytest
import torch
import transformers as t

from conftest import SIZES, byte_tokenizer, save_tiny_llama
from whence.corpus.tokens import Encoded, collate
from whence.errors import ModelError
from whence.gradients.capture import gradients
from whence.models.causality import refuse_not_causal
from whence.models.loading import load_model

IDS = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def saved(config, directory):
    """A random model of a configuration, with its tokenizer."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (t.BertConfig(**SIZES, **IDS), {"is_decoder": True}),
        (t.XLMConfig(**IDS, emb_dim=16, n_layers=2, n_heads=2), {"causal": True}),
    ],
    ids=["bert", "xlm"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_is_refused_and_the_setting_that_is_named_mends_it(config, setting, dtype, tmp_path):
    directory = saved(config, tmp_path / "model")
    ((name, value),) = setting.items()
    with pytest.raises(ModelError, match=rf'is not causal.* set "{name}": {json.dumps(value)} in .*config\.json'):
        load_model(directory, dtype=dtype)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    load_model(directory, dtype=dtype)


def test_an_encoder_without_such_a_setting_is_refused(tmp_path):
    config = t.XLNetConfig(**IDS, d_model=16, n_layer=2, n_head=2, d_inner=24)
    with pytest.raises(ModelError, match=r"is not causal.*Give a causal model\.$"):
        load_model(saved(config, tmp_path / "model"))


def test_a_layer_that_takes_time_first_is_refused(tmp_path):
    """Its positions are as many as a batch's, but not in a batch's order."""
    model = load_model(save_tiny_llama(tmp_path / "model"))
    block = model.base.model.layers[0].mlp
    forward = block.forward
    block.forward = lambda x: forward(x.transpose(0, 1)).transpose(0, 1)
    refuse_not_causal(model.base, "model", model.device, {0, 1, 2})
    batch = collate([Encoded([5, 6, 7, 8], [False, False, True, True]), Encoded([9, 10, 11], [False, True, True])])
    with pytest.raises(
        ModelError,
        match=r"mlp\.\w+ \(and 2 more\).* positions that do not come example by.*'!model\.layers\.0\.mlp\.\*'",
    ):
        gradients(model, model.layers(), batch)
    gradients(model, model.layers("!model.layers.0.mlp.*"), batch)


def test_rows_that_depend_on_longer_ones_are_refused(tmp_path):
    """As of an attention that chooses tokens, which a few tokens do not show; one row at a time, none is."""
    model = load_model(save_tiny_llama(tmp_path / "model"))
    block = model.base.model.layers[0].mlp
    forward = block.forward
    block.forward = lambda x: forward(x) * (1 + x.shape[1] / 10)
    rows = [Encoded([5, 6, 7, 8], [False, False, True, True]), Encoded([9, 10, 11], [False, True, True])]
    gradients(model, model.layers(), collate(rows[:1]))
    with pytest.raises(ModelError, match=r"other numbers beside longer rows.*--batch-tokens 2"):
        gradients(model, model.layers(), collate(rows))


def test_a_model_whose_layers_hooks_cannot_see_is_refused(tmp_path):
    """Reformer computes gradients in a backward pass of its own: every vector was 0."""
    config = t.ReformerConfig(
        **IDS, is_decoder=True, attention_head_size=8, num_attention_heads=2, hidden_size=16, feed_forward_size=24,
        attn_layers=["local"], axial_pos_embds=False, max_position_embeddings=64, local_attn_chunk_length=8,
    )  # fmt: skip
    model = load_model(saved(config, tmp_path / "model"))
    batch = collate([Encoded([5, 6, 7, 8], [False, False, True, True])])
    with pytest.raises(ModelError, match=r"out of sight of hooks.*So it is for every traced layer\. Give another"):
        gradients(model, model.layers(), batch)


def test_a_model_whose_logits_need_more_than_last_states_is_refused(tmp_path):
    config = t.ProphetNetConfig(
        **IDS, hidden_size=16, decoder_ffn_dim=24, encoder_ffn_dim=24, num_decoder_layers=1, num_encoder_layers=1,
        num_decoder_attention_heads=2, num_encoder_attention_heads=2, is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    with pytest.raises(ModelError, match="makes its logits of more than its decoder's last states"):
        load_model(saved(config, tmp_path / "model"))


def test_a_decoder_that_is_not_where_its_model_says_is_found(tmp_path):
    """ModernBERT gives its output head for its decoder."""
    sizes = SIZES | {"num_attention_heads": 2, "max_position_embeddings": 64}
    model = load_model(saved(t.ModernBertDecoderConfig(**sizes, **IDS), tmp_path / "model"))
    ids = torch.tensor([[5, 6, 7, 8]])
    states, head = model.decode(ids, torch.ones_like(ids))
    torch.testing.assert_close(head(states[0]), model.base(input_ids=ids).logits[0])
