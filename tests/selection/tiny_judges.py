"""Tiny models that are asked a question: their tokenizer has single tokens for yes and no."""

import torch

from conftest import SIZES
from tiny_tokenizers import byte_level

MERGES = [("y", "e"), ("ye", "s"), ("n", "o"), ("Ġ", "yes"), ("N", "o"), ("Y", "E")]
"""Bytes, and: yes, no, a space and yes, No. (YE is on the way to nothing.)"""


def judge_tokenizer(chat=None):
    """One token a byte, and one for some ways to say yes and no."""
    return byte_level(MERGES, bos=True, chat=chat)


def _moved(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model


def save_tiny_judge(directory, *, context=512, chat=None):
    """A causal one."""
    import transformers as t

    torch.manual_seed(3)
    tokenizer = judge_tokenizer(chat)
    config = t.LlamaConfig(
        **SIZES, num_key_value_heads=1, vocab_size=len(tokenizer), max_position_embeddings=context,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    _moved(t.LlamaForCausalLM(config)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_tiny_t5(directory):
    """One from sequence to sequence."""
    import transformers as t

    torch.manual_seed(4)
    tokenizer = judge_tokenizer()
    config = t.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=len(tokenizer), decoder_start_token_id=1,
        eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    _moved(t.T5ForConditionalGeneration(config)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
