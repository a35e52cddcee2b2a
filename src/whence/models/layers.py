"""The linear layers of a model, and the layers that a pattern names."""

import difflib
import fnmatch
from collections.abc import Iterator

from torch import Tensor, nn

from whence.errors import SettingError


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers by name, in the model's order. Modules that share a weight are one layer, under its first name."""
    weights = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if is_linear(module) and isinstance(weight, Tensor) and id(weight) not in weights:
            weights.add(id(weight))
            yield name, module


def is_linear(module: nn.Module) -> bool:
    """Whether a module is `nn.Linear`, or the `Conv1D` of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def matching_layers(linear: dict[str, nn.Module], default: dict[str, nn.Module], patterns: str) -> dict[str, nn.Module]:
    """The layers that patterns name, in the model's own order.

    Args:
        linear: All linear layers by name.
        default: The layers to start from if patterns only leave layers out.
        patterns: Shell-style patterns with commas between; a "!" before one leaves its layers out.

    Raises:
        SettingError: A pattern matches no layer.
    """
    globs = [glob.strip() for glob in patterns.split(",")]
    for glob in globs:
        if not fnmatch.filter(linear, glob.removeprefix("!")):
            near = difflib.get_close_matches(glob, linear, n=3, cutoff=0.3) or list(linear)[:3]
            raise SettingError(f"--layers {glob}: no linear layer has such a name. Near: {', '.join(near)}")
    included = [glob for glob in globs if not glob.startswith("!")]
    excluded = [glob.removeprefix("!") for glob in globs if glob.startswith("!")]

    def matches_any(name: str, globs: list[str]) -> bool:
        return any(fnmatch.fnmatch(name, glob) for glob in globs)

    start = {name: layer for name, layer in linear.items() if matches_any(name, included)} if included else default
    return {name: layer for name, layer in start.items() if not matches_any(name, excluded)}
