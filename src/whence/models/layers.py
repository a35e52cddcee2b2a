"""The linear layers of a model, and the layers that a pattern names."""

import difflib
import fnmatch
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from whence.errors import ModelError, SettingError


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


def matching_layers(
    linear: dict[str, nn.Module], default: dict[str, nn.Module], patterns: str, unreached: Collection[str] = ()
) -> dict[str, nn.Module]:
    """The layers that patterns name, in the model's own order.

    Args:
        linear: All linear layers by name.
        default: The layers to start from if patterns only leave layers out.
        patterns: Shell-style patterns with commas between; a "!" before one leaves its layers out.
        unreached: Names of layers that no text reaches; they are left out anyway.

    Raises:
        SettingError: A pattern matches no layer.
    """
    globs = [glob.strip() for glob in patterns.split(",")]
    for glob in globs:
        if not fnmatch.filter(linear, glob.removeprefix("!")):
            if fnmatch.filter(unreached, glob.removeprefix("!")):
                if glob.startswith("!"):
                    continue
                raise SettingError(f"--layers {glob}: no text reaches these layers, so their gradients are always 0.")
            near = difflib.get_close_matches(glob, linear, n=3, cutoff=0.3) or list(linear)[:3]
            raise SettingError(f"--layers {glob}: no linear layer has such a name. Near: {', '.join(near)}")
    included = [glob for glob in globs if not glob.startswith("!")]
    excluded = [glob.removeprefix("!") for glob in globs if glob.startswith("!")]

    def matches_any(name: str, globs: list[str]) -> bool:
        return any(fnmatch.fnmatch(name, glob) for glob in globs)

    start = {name: layer for name, layer in linear.items() if matches_any(name, included)} if included else default
    return {name: layer for name, layer in start.items() if not matches_any(name, excluded)}


def refuse_layers(path: str, reasons: Mapping[str, str], called: Collection[str], *, has_adapter: bool) -> None:
    """Refuse traced layers whose gradients cannot be seen, all at once, with the pattern that leaves them out.

    Args:
        path: Where the model is from.
        reasons: What is wrong, by layer.
        called: All traced layers that the pass called.
        has_adapter: Whether the model has an adapter.

    Raises:
        ModelError: There is such a layer.
    """
    if not reasons:
        return
    (first, reason), more = next(iter(reasons.items())), len(reasons) - 1
    also = f" (and {more} more)" if more else ""
    message = f"{path}: the gradient of layer {first}{also} cannot be seen: it {reason}."
    good = [name for name in called if name not in reasons]
    if good:
        glob = leaving_out(reasons, good)
        raise ModelError(f"{message} Leave out: --layers '{glob}' (behind a comma, if you gave --layers already)")
    way = "Merge the adapter into its base (peft's merge_and_unload), and give that" if has_adapter else "Give another"
    raise ModelError(f"{message} So it is for every traced layer. {way} model.")


def leaving_out(bad: Collection[str], good: Collection[str]) -> str:
    """Patterns that leave layers out, as few as a greedy choice finds, and no layer of `good`.

    >>> bad = [f"model.layers.{n}.mixer.{name}" for n in (0, 1) for name in ("dt_proj", "x_proj")]
    >>> leaving_out(bad, ["model.layers.0.mixer.out_proj"])
    '!*dt_proj,!*x_proj'
    >>> leaving_out(bad, ["model.layers.0.mlp.x_proj"])
    '!*mixer.*'
    """
    left, chosen = list(bad), []
    while left:
        choices = {glob: len(fnmatch.filter(left, glob)) for name in left for glob in _globs(name)}
        fitting = [glob for glob in choices if not fnmatch.filter(good, glob)]
        best = max(fitting, key=choices.__getitem__)  # the first of these
        chosen.append(best)
        left = [name for name in left if not fnmatch.fnmatch(name, best)]
    return ",".join(f"!{glob}" for glob in chosen)


def _globs(name: str) -> Iterator[str]:
    """Patterns that match a layer: by its name's end, with numbers left open; by a part; by a beginning; its name."""
    own = name.split(".")
    parts = ["*" if part.isdigit() else part for part in own]
    for start in reversed(range(len(parts))):
        if parts[start] != "*":
            yield f"*{'.'.join(parts[start:])}"
    yield from (f"*{part}.*" for part in reversed(parts[:-1]) if part != "*")
    yield from (f"{'.'.join(own[:end])}.*" for end in reversed(range(1, len(own))))
    yield name
