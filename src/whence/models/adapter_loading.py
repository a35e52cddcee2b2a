"""A LoRA adapter on its base, as `AutoPeftModelForCausalLM` loads it: on a base with as many tokens as in the training.

Tokens that were added before the training enlarge the base's vocabulary, and the enlarged base is seldom saved. The
adapter's own tokenizer, and the embedding where the adapter holds it whole, say how many there were. Rows of new tokens
that the adapter does not hold are the mean of the others here: where peft draws them at random, they are in no file.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whence.errors import ModelError
from whence.models.weights import weights_of

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
"""Prefix that peft puts before every name."""


def with_adapter(model: Any, directory: str, tokenizer: Any, modules: list[str]) -> Any:
    """The adapter of a directory on a base, which is enlarged if the adapter was trained with more tokens.

    Args:
        model: The base.
        directory: The adapter's.
        tokenizer: That of the rows.
        modules: Modules that the adapter replaces whole, as its configuration says.

    Raises:
        ModelError: The adapter lacks weights that its configuration names, or holds a module that the base lacks.
    """
    import peft

    stored = weights_of(directory, "adapter_model")
    names = [name for name, _ in model.named_modules()]
    for module in modules:
        held = next((name for name in stored.files if f".{module}." in name), None)
        if held and not any(name == module or name.endswith(f".{module}") for name in names):
            raise ModelError(
                f"{directory}: the adapter holds {held.removeprefix(PREFIX)}, which its base has no place for: it was "
                "trained with another head. Whence traces the loss of a causal language model."
            )
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    shapes = {name: stored.shape(name) for name in stored.files if name.startswith(f"{PREFIX}{embedding}.")}
    rows = [shape[1 if "lora_embedding_A" in name else 0] for name, shape in shapes.items()
            if "lora_embedding_A" in name or ("lora_" not in name and "trainable_tokens" not in name)]  # fmt: skip
    if any(Path(directory).glob("tokenizer*")):
        rows.append(len(tokenizer))
    if rows and (most := max(rows)) > len(model.get_input_embeddings().weight):
        _enlarge(model, most, directory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # by peft
        # An adapter's weight that its file lacks keeps its random start, and peft only warns.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return peft.PeftModel.from_pretrained(model, directory)
        except UserWarning as warning:
            raise ModelError(f"{directory}: {str(warning)[:300]} Its adapter_config.json names more.") from None


@torch.no_grad()
def _enlarge(model: Any, rows: int, directory: str) -> None:
    """Give the base a vocabulary of `rows`; new rows are the mean of the old ones."""
    before = len(model.get_input_embeddings().weight)
    logger.warning(
        "%s was trained with %d tokens, and its base has %d: the base's embedding and head are enlarged; a new token's "
        "row that the adapter does not hold is the mean of the others",
        directory,
        rows,
        before,
    )
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            weight[before:] = weight[:before].float().mean(0).to(weight)
