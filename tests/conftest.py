"""Tiny random models of each architecture, made from configurations; nothing is downloaded."""

import functools

import torch

from whence.model import LoadedModel
from whence.tokens import Encoded

VOCABULARY = 61
ARCHITECTURES = ["llama", "gpt2", "neox", "qwen2", "gemma", "lora"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}


def _config(architecture):
    import transformers as t

    configs = {
        "llama": lambda: t.LlamaConfig(**COMMON, num_key_value_heads=1),
        "lora": lambda: t.LlamaConfig(**COMMON, num_key_value_heads=1),
        "gpt2": lambda: t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, n_positions=64, vocab_size=VOCABULARY),
        "neox": lambda: t.GPTNeoXConfig(**COMMON),
        "qwen2": lambda: t.Qwen2Config(**COMMON, num_key_value_heads=1),
        "gemma": lambda: t.Gemma2Config(**COMMON, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0),
    }
    return configs[architecture]()


def tiny_model(architecture, seed=0):
    """A fresh two-layer model with weights large enough that attention and soft caps matter."""
    import transformers as t

    torch.manual_seed(seed)
    config = _config(architecture)
    config._attn_implementation = "eager" if architecture == "gemma" else "sdpa"
    model = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if architecture == "lora":
        model = _with_adapter(model)
    model.requires_grad_(False).eval()
    return LoadedModel(model=model, tokenizer=None, path=architecture, has_adapter=architecture == "lora")


def _with_adapter(model):
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_dropout=0.5, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # peft begins with B = 0, where A has no gradient
                parameter.normal_()
    return model


def random_examples(count, seed, longest=14):
    """Examples of different lengths with random targets, at least one each."""
    rng = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randint, generator=rng)
    examples = []
    for _ in range(count):
        length = int(draw(2, longest, ()))
        supervised = [False, *(bool(x) for x in draw(0, 2, (length - 1,)))]
        supervised[int(draw(1, length, ()))] = True
        examples.append(Encoded(draw(0, VOCABULARY, (length,)).tolist(), supervised))
    return examples
