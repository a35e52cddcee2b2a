"""How two models differ in size, by their configurations, in the words of a model card."""

from collections.abc import Mapping
from typing import Any

SIZES = {
    "hidden size": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "feed-forward width": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "attention heads": ("num_attention_heads", "n_head", "n_heads"),
    "key and value heads": ("num_key_value_heads",),
    "head size": ("head_dim",),
    "vocabulary": ("vocab_size",),
}
"""Names that configurations give each size."""


def differing_sizes(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The sizes that two configurations give and that differ, the first one's number first; "" if none does.

    >>> differing_sizes({"hidden_size": 16, "n_layer": 2}, {"hidden_size": 32, "n_layer": 2, "vocab_size": 9})
    'hidden size 16 and 32'
    """
    pairs = {size: (_size(first, names), _size(second, names)) for size, names in SIZES.items()}
    differing = {size: pair for size, pair in pairs.items() if None not in pair and pair[0] != pair[1]}
    return ", ".join(f"{size} {a:,} and {b:,}" for size, (a, b) in differing.items())


def _size(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    text = config.get("text_config")  # of a model that reads pictures too
    for level in (config, text if isinstance(text, Mapping) else {}):
        for name in names:
            if isinstance(value := level.get(name), int):
                return value
    return None
