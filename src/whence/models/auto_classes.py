"""Which class of transformers loads a checkpoint, and why none does, in one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whence.errors import ModelError, WhenceError

WHOLE_ONLY = ("emu3",)
"""Types whose causal class does not find its weights in a checkpoint of the whole model."""


def auto_class(source: str, *, trust_remote_code: bool = False) -> Any:
    """`AutoModelForCausalLM`; or that of image and text, if transformers has no class for a model's text alone.

    Raises:
        ModelError: No class of transformers is a causal language model of this type.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    is_whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if hasattr(config, "auto_map") or (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and config.model_type not in WHOLE_ONLY):
        return transformers.AutoModelForCausalLM
    if is_whole:
        return transformers.AutoModelForImageTextToText
    raise ModelError(f"{source}: transformers has no causal language model of the type {config.model_type}. Give another.")


@contextmanager
def loadable(path: str) -> Iterator[None]:
    """Whatever transformers and peft raise while they load a model becomes one line: foreign files make anything fail."""
    try:
        yield
    except WhenceError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300].removesuffix(".")
        reason = reason if isinstance(error, OSError | ValueError | RuntimeError) and reason else f"{type(error).__name__}: {reason}"
        if method := quantisation(path):
            raise ModelError(
                f"{path}: quantised ({method}), and not loadable here: {reason}. Install what that asks for, or give the "
                "model as it was before it was quantised."
            ) from error
        raise ModelError(f"{path}: not loadable as a causal language model ({reason})") from error


def quantisation(path: str) -> str | None:
    """The method by which a checkpoint is quantised; None if its configuration names none."""
    try:
        config = json.loads((Path(path) / "config.json").read_text())
        settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
        return str(settings.get("quant_method", "by a method that it does not name")) if settings else None
    except (OSError, ValueError, AttributeError):
        return None
