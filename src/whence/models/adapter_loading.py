"""A LoRA adapter on its base, as `AutoPeftModelForCausalLM` loads it: on a base with as many tokens as in the training.

Tokens that were added before the training enlarge the base's vocabulary, and the enlarged base is seldom saved. The
embedding or head says how many there were, where the adapter holds one or an update of it; else the adapter's own
tokenizer and the new tokens that it trains. peft looks at the tokenizer alone. Rows of new tokens
that the adapter does not hold are the mean of the others here: where peft draws them at random, they are in no file.
"""

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whence.errors import ModelError
from whence.models.weights import Weights, weights_of

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
"""Prefix that peft puts before every name."""
_OTHER_SHAPE = re.compile(
    rf"size mismatch for (?:{re.escape(PREFIX)})?(\S+?): .*?\[([\d, ]+)\].*?\[([\d, ]+)\]", re.DOTALL
)
"""torch's words of the first weight whose shape is another: its name, its shape in the file and in the model."""


def with_adapter(model: Any, directory: str, tokenizer: Any, config: dict[str, Any]) -> Any:
    """The adapter of a directory on a base, which is given as many tokens as the adapter was trained with.

    Args:
        model: The base.
        directory: The adapter's.
        tokenizer: That of the rows.
        config: The adapter's configuration.

    Raises:
        ModelError: The adapter lacks weights that its configuration names, or holds a module that the base lacks.
    """
    import peft

    stored = weights_of(directory, "adapter_model")
    names = [name for name, _ in model.named_modules()]
    for module in config.get("modules_to_save") or []:
        held = next((name for name in stored.files if f".{module}." in name), None)
        if held and not any(name == module or name.endswith(f".{module}") for name in names):
            raise ModelError(
                f"{directory}: the adapter holds {held.removeprefix(PREFIX)}, which its base has no place for: it was "
                "trained with another head. Whence traces the loss of a causal language model."
            )
    before = len(model.get_input_embeddings().weight)
    held = _vocabularies(stored, model)
    tokens = [len(tokenizer)] if any(Path(directory).glob("tokenizer*")) else []
    rows = max(held) if held else max([before, *tokens, *_trained_tokens(config)])
    if rows != before:
        _resize(model, rows, directory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # by peft
        # An adapter's weight that its file lacks keeps its random start, and peft only warns.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        base = f"its base {config['base_model_name_or_path']}"
        remedy = "In that file base_model_name_or_path is to name the base that the adapter was trained on."
        try:
            return peft.PeftModel.from_pretrained(model, directory)
        except UserWarning as warning:
            lacking = re.search(rf"'{re.escape(PREFIX)}([^']+)'", str(warning))
            raise ModelError(
                f"{directory}: the adapter has no weights for a layer that its adapter_config.json adapts in {base} "
                f"({lacking[1] if lacking else str(warning)[:300]}): another base, of more layers, or a file that is "
                f"not whole. {remedy}"
            ) from None
        except RuntimeError as error:
            if (other := _OTHER_SHAPE.search(str(error))) is None:
                raise
            raise ModelError(
                f"{directory}: the adapter's weights do not fit {base}, or the rank r in its adapter_config.json: "
                f"{other[1]} is [{other[2]}] in the adapter, and would be [{other[3]}]. {remedy}"
            ) from None


def _vocabularies(stored: Weights, model: Any) -> list[int]:
    """Numbers of tokens that the adapter's own embedding or head has, whole or as a low-rank update."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [f"{PREFIX}{name}." for name, module in model.named_modules() if any(module is end for end in ends)]
    rows = {"lora_embedding_A": 1, "lora_embedding_B": None, "lora_A": None, "lora_B": 0, "trainable_tokens": None}
    sizes = []
    for name in (name for name in stored.files if name.startswith((*names,)) and not name.endswith(".bias")):
        dimension = next((dimension for word, dimension in rows.items() if word in name), 0)
        if dimension is not None and len(shape := stored.shape(name)) == 2:
            sizes.append(shape[dimension])
    return sizes


def _trained_tokens(config: dict[str, Any]) -> list[int]:
    """Numbers of tokens that a vocabulary must have for the new tokens that the adapter trains."""
    indices = config.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return [max(numbers) + 1 for numbers in lists if numbers]


@torch.no_grad()
def _resize(model: Any, rows: int, directory: str) -> None:
    """Give the base a vocabulary of `rows`; new rows are the mean of the old ones."""
    before = len(model.get_input_embeddings().weight)
    logger.warning(
        "%s was trained with %d tokens, and its base has %d: the base's embedding and head are resized%s",
        directory,
        rows,
        before,
        "; a new token's row that the adapter does not hold is the mean of the others" if rows > before else "",
    )
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and rows > before:
            weight[before:] = weight[:before].float().mean(0).to(weight)
