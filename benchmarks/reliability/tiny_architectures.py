"""A tiny random model of every causal type that transformers knows, made from its configuration; nothing is downloaded.

A configuration begins as the class's own, and every size in it is made small by the first of `SIZES` whose pattern fits
its name. What the types' checks ask for beyond that, or what would leave a part of the architecture out, is in
`SPECIAL`. Weights are then moved at random, so that norms, gates and soft caps matter.

    python -m benchmarks.reliability.tiny_architectures DIR [TYPE ...]      makes them, and says what it cannot make
"""

import argparse
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 264
BOS, EOS, PAD = 0, 1, 2
SPREAD = 0.05
"""Standard deviation of the random moves away from an initialisation."""

SIZES: list[tuple[str, Any]] = [
    (r"(text_|audio_)?vocab_size(_per_layer_input)?", VOCABULARY),
    # Widths.
    (r"hidden_size_per_layer_input", 8),
    (r"(cross_attention_)?hidden_size|[dn]_model|n_embd|e?mb_dim|dim|d_embed|(input_)?embedding_size|embed_dim", 32),
    (r"word_embed_proj_dim|projection_dim|mm_hidden_size|lru_width|emb_dim", 32),
    (r".*(shared|moe|expert)\w*(intermediate|ffn_hidden)_size", 32),
    (r"(dense_|prefix_dense_)?intermediate_size\w*|\w*ffn_dim|ffn_hidden_size", 64),
    (r"d_ff|n_inner|d_inner|dim_ff|mamba_d_ssm", 64),
    (r"qk_head_dim", 16),
    # Depth and heads.
    (r"num_(hidden_|decoder_|encoder_)?layers|n_layers?|(de|en)coder_layers|depth", 2),
    (r"(swa_)?num_(key_value|kv)_heads|n_head_kv|num_global_key_value_heads", 2),
    (r"linear_num_key_heads|index_n_heads|n_mamba_heads", 2),
    (r"(swa_|linear_)?num_(attention_|value_)?heads|n_heads?|(num_)?(de|en)coder_attention_heads", 4),
    (r"(\w+_)?head_dim|attention_head_size|d_kv|d_head|(ssm_)?state_size|mamba_(d_state|d_head|headdim)", 8),
    (r"mamba_n(um)?_heads", 8),
    (r"(kv|q|o)_lora_rank", 16),
    (r"rotary_dim|laurel_rank|(mamba_dt|time_step)_rank", 4),
    # Experts.
    (r"num_experts_per_tok(en)?|moe_(k|topk|top_k)", 2),
    (r"(num_|n_)(local_|routed_)?experts|moe_num_experts", 4),
    (r"(num_|n_)shared_experts|n_group|topk_group|num_expert_group|mamba_n_?groups|n_groups|first_k_dense_replace", 1),
    # Lengths.
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_(target|source)_positions|seq_length", 128),
    (r"sliding_window|attention_(window_size|chunk_size)|mamba_chunk_size|chunk_size", 16),
    (r"index_topk", 8),
    (r"image_size", 32),
    (r"patch_size", 16),
]  # fmt: skip
"""What a number is set to by its name."""

LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "moe_layers", "attn_layer_indices",
         "full_attention_idxs", "hybrid_layer_ids", "per_layer_config")  # fmt: skip
"""Lists as long as the model is deep, which a configuration makes by itself."""

LATENT = {"num_key_value_heads": 4}
"""Attention by a latent has as many key as query heads."""
DEEPER = {"num_hidden_layers": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
BLT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
       "intermediate_size": 64, "head_dim": 8}  # fmt: skip
QWEN4 = DEEPER | {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
    "indexer_compress_ratio": 4, "hc_lowrank": 8, "ple_embed_dim": 32, "ngram_vocab_size_base": 500,
    "split_ngram_parts": 2, "output_gate_type": "sigmoid",
}  # fmt: skip
LINEAR = LATENT | {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
                   "linear_head_dim": 8, "linear_num_heads": 4}  # fmt: skip
ASSISTANT = {"num_hidden_layers": 2, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
ALTERNATING = DEEPER | {"layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA3N = ALTERNATING | {"num_kv_shared_layers": 2, "intermediate_size": [64] * 4,
                         "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}  # fmt: skip

WITH_LATENT = ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa",
               "longcat_flash", "minicpm3", "youtu")  # fmt: skip

SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(WITH_LATENT, LATENT),
    "deepseek_v2": LATENT | {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots3_note": {"text_config": LATENT, "vision_config": {"mlp_layer_types": ["dense"] * 2, "adapter_in_dim": 32,
                                                            "adapter_out_dim": 32},
                   "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32}},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm3", "recurrent_gemma"), DEEPER),
    **{kind: {"text_config": DEEPER} for kind in ("qwen3_5", "qwen3_5_moe")},
    **{kind: {"head_dim": 8} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "bailing_hybrid": LINEAR | {"num_nextn_predict_layers": 0},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "blt": {
        "vocab_size": VOCABULARY,
        "encoder_hash_byte_group_size": [2, 3],
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": BLT | {"num_hidden_layers": 2},
        "encoder_config": BLT | {"num_hidden_layers": 1, "hidden_size_global": 64},
        "decoder_config": BLT | {"num_hidden_layers": 2, "hidden_size_global": 64},
        "global_config": BLT | {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16},
    },
    "cohere_compass_text": LATENT | {"layer_types": ["sliding_attention", "full_attention"],
                                     "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "emu3": {"vocabulary_map": {"<image>": 5}, "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1],
                                                             "codebook_size": 64}},
    "gemma4_assistant": {"text_config": ASSISTANT | {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                                     "vocab_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {"text_config": ASSISTANT | {"model_type": "gemma4_unified_text"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
    "jamba": {"num_hidden_layers": 8},
    "kimi_linear": LINEAR | {"q_lora_rank": None},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1], "bos_token_id": BOS,
                               "eos_token_id": EOS, "pad_token_id": PAD}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"],
                 "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "num_buckets": 4},
    "roc_bert": {"shape_vocab_size": VOCABULARY, "pronunciation_vocab_size": VOCABULARY},
    "xlm": {"causal": True},
    "xlstm": {"num_blocks": 2, "embedding_dim": 32, "ffn_round_up_to_multiple_of": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"], "hybrid_layer_ids": [1, 2],
               "n_mamba_heads": 8, "num_mem_blocks": 1, "use_shared_attention_adapter": False},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What else a type's configuration is given, by the type and then as the configuration has it."""

WHOLE = {"emu3": "AutoModelForImageTextToText", "mllama": "AutoModelForImageTextToText",
         "musicgen": "AutoModelForTextToWaveform", "musicgen_melody": "AutoModelForTextToWaveform"}  # fmt: skip
"""Types of which `AutoModelForCausalLM` makes no model from their own configuration, and what makes the whole model."""


def tiny_config(kind: str) -> Any:
    """The configuration of a type, small."""
    settings = _small(CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))
    settings = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD} | settings
    if hasattr(_default(CONFIG_MAPPING[kind], SPECIAL.get(kind, {})), "is_decoder"):
        settings["is_decoder"] = True
    return CONFIG_MAPPING[kind](**settings)


def _small(cls: Any, special: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration's class; `special` goes before the rules, also in the configurations inside it."""
    inner, out = dict(getattr(cls, "sub_configs", {}) or {}), {}
    default = _default(cls, special)
    for name, value in default.to_dict().items():
        if name in inner or name in special:
            continue
        size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if size is not None:
                out[name] = size
            elif isinstance(value, int) and value >= VOCABULARY and name.endswith(("token_id", "_index", "_id")):
                out[name] = PAD
        elif name in LISTS and isinstance(value, list):
            out[name] = None
    for name, part in inner.items():
        if (held := getattr(default, name, None)) is None and name not in ("text_config", "decoder"):
            continue
        kind = getattr(held, "model_type", None)
        part = CONFIG_MAPPING[kind] if not inspect.isclass(part) or part.__name__ == "AutoConfig" else part
        out[name] = _small(part, special.get(name, {}))
    return out | {name: value for name, value in special.items() if name not in inner}


def _default(cls: Any, special: dict[str, Any]) -> Any:
    try:
        return cls()
    except Exception:  # some types have no default that passes their own checks
        return cls(**special)


def tiny_model(kind: str, seed: int = 0) -> Any:
    """A model of a type, in evaluation mode; of a type that is not causal by itself, that of image and text."""
    torch.manual_seed(seed)
    config = tiny_config(kind)
    other = "AutoModelForCausalLM" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "AutoModelForImageTextToText"
    model = getattr(transformers, WHOLE.get(kind, other)).from_config(config).eval().float()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(SPREAD * torch.randn(weight.shape, generator=generator))
        padding_to_zero(model)
    return model


@torch.no_grad()
def padding_to_zero(model: Any) -> None:
    """Zeros in the padding rows of embeddings, as training leaves them; some types write them on loading."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0


def pretrained(directory: Path) -> Any:
    """The model that transformers itself loads, by the class that its configuration names."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(directory, config=config, dtype=torch.float32).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, behind the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({piece: n for n, piece in enumerate(["<s>", "</s>", "<pad>", *alphabet])}, []))
    core.add_special_tokens(["<s>", "</s>", "<pad>"])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save(kind: str, directory: Path) -> Path:
    """A type's model with a tokenizer, in a directory."""
    tiny_model(kind).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def main() -> None:
    """Make the types named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("types", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for kind in options.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            model = pretrained(save(kind, options.directory / kind))
            with torch.no_grad():
                logits = model(input_ids=torch.arange(3, 60)[None], use_cache=False).logits
            assert logits.shape[:2] == (1, 57) and logits.isfinite().all()
            print(kind, "ok", sum(weight.numel() for weight in model.parameters()), flush=True)
        except Exception as error:
            print(kind, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)


if __name__ == "__main__":
    main()
