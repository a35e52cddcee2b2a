"""The linear layers of a model, and which of them a pattern names."""

import difflib
import fnmatch
from collections.abc import Iterator

from torch import Tensor, nn

from whence.errors import SettingError


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Of modules that share a weight the first: what they have in common is one layer."""
    from transformers.pytorch_utils import Conv1D

    weights = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | Conv1D) and isinstance(weight, Tensor) and id(weight) not in weights:
            weights.add(id(weight))
            yield name, module


def matching_layers(found: dict[str, nn.Module], chosen: dict[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    """Those of the layers found that a pattern names, in their order; `chosen` less some where it only leaves out.

    Raises:
        SettingError: A part of the pattern matches no layer.
    """
    patterns = [part.strip() for part in pattern.split(",")]
    for part in patterns:
        if not fnmatch.filter(found, part.removeprefix("!")):
            near = difflib.get_close_matches(part, found, n=3, cutoff=0.3) or list(found)[:3]
            raise SettingError(f"--layers {part}: no linear layer has such a name. Near: {', '.join(near)}")
    wanted = [part for part in patterns if not part.startswith("!")]
    unwanted = [part.removeprefix("!") for part in patterns if part.startswith("!")]

    def is_any(name: str, parts: list[str]) -> bool:
        return any(fnmatch.fnmatch(name, part) for part in parts)

    start = {name: layer for name, layer in found.items() if is_any(name, wanted)} if wanted else chosen
    return {name: layer for name, layer in start.items() if not is_any(name, unwanted)}
