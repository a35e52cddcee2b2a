"""Blocks that are recomputed give the numbers of blocks that are kept, whatever their own code does in training."""

import pytest
import torch
import transformers as t

from conftest import COMMON, VOCABULARY, random_examples
from whence.corpus.tokens import collate
from whence.gradients.capture import sketch
from whence.gradients.projections.identity import Identity
from whence.models import checkpointing
from whence.models.loading import LoadedModel, layer_shape

SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "dropout": 0.3}
WITH_DROPOUT = {
    "opt": t.OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16, **SMALL
    ),
    "bart": t.BartConfig(d_model=16, decoder_ffn_dim=24, decoder_layers=2, decoder_attention_heads=2,
                         decoder_layerdrop=0.5, is_decoder=True, is_encoder_decoder=False, **SMALL),
    "biogpt": t.BioGptConfig(**COMMON, hidden_dropout_prob=0.3, layerdrop=0.5),
    "falcon": t.FalconConfig(  # writes into the outputs of its linear layers
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY, hidden_dropout=0.3
    ),
    "dbrx": t.DbrxConfig(d_model=16, n_heads=2, n_layers=2, max_seq_len=64, vocab_size=VOCABULARY, resid_pdrop=0.3,
                         ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1, "moe_jitter_eps": .5},
                         attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}),
    "blenderbot": t.BlenderbotConfig(d_model=16, decoder_ffn_dim=24, decoder_layers=2, decoder_attention_heads=2,
                                     decoder_layerdrop=0.5, is_decoder=True, is_encoder_decoder=False, **SMALL),
}  # fmt: skip


def loaded(architecture):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(WITH_DROPOUT[architecture]).eval().requires_grad_(False)
    return LoadedModel(model, None, architecture)


@pytest.mark.parametrize("architecture", WITH_DROPOUT)
def test_dropout_stays_off_in_blocks_that_are_recomputed(architecture, monkeypatch):
    model, batch, calls = loaded(architecture), collate(random_examples(3, seed=3)), []
    layers = model.layers()
    projection = Identity({name: layer_shape(layer) for name, layer in layers.items()})
    plain, losses = sketch(model, layers, batch, projection)
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *args, **how: calls.append(how) or real(*args, **how))
    recomputed, again = sketch(model, layers, batch, projection, gradient_checkpointing=True)
    assert torch.equal(recomputed, plain) and torch.equal(again.loss, losses.loss)
    assert len(calls) >= len(checkpointing.blocks(model.base)) == 2
    assert not any(module.training or "forward" in vars(module) for module in model.base.modules())


real = checkpointing.checkpoint


def test_blocks_of_a_decoder_that_checkpoints_itself_are_the_members_of_its_lists():
    block = torch.nn.Linear(2, 2)
    decoder = torch.nn.Module()
    decoder.gradient_checkpointing, decoder.layers, decoder.head = False, torch.nn.ModuleList([block]), block
    assert checkpointing.blocks(torch.nn.Sequential(decoder)) == [block]
    block.gradient_checkpointing = True
    assert checkpointing.blocks(torch.nn.Sequential(block)) == []


def test_a_block_runs_as_it_did_where_it_would_add_to_a_cache(monkeypatch):
    model = loaded("opt")
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *args, **how: pytest.fail("recomputed"))
    with checkpointing.recomputing(model.base):
        model.base(input_ids=torch.tensor([[5, 6]]), past_key_values=t.DynamicCache(), use_cache=True)


def test_a_forward_set_on_a_block_runs_inside_and_stays():
    block = checkpointing.blocks(loaded("opt").base)[0]
    own = block.forward = lambda *args, **kwargs: "its own"  # as accelerate does where it spreads a model
    with checkpointing._recomputed(block):
        assert block(torch.ones(1)) == "its own"
    assert block.forward is own
