"""Which class of transformers loads a checkpoint."""

from typing import Any

from whence.errors import ModelError

WHOLE_ONLY = ("emu3",)
"""Types whose causal class does not find its weights in a checkpoint of the whole model."""


def auto_class(source: str, *, trust_remote_code: bool = False) -> Any:
    """`AutoModelForCausalLM`; or that of image and text, if transformers has no class for a model's text alone.

    Raises:
        ModelError: transformers has neither for this type of model.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and config.model_type not in WHOLE_ONLY
    if is_causal or hasattr(config, "auto_map"):
        return transformers.AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    kind = config.model_type
    raise ModelError(f"{source}: transformers has no causal language model of the type {kind}. Give a causal model.")
