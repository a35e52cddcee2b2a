"""Recompute a model's blocks in the backward pass instead of keeping their activations.

transformers checkpoints a block only if the block's `training` is set, and that flag also turns on whatever the block's
own code does in training: dropout called as a function (OPT, XGLM, BioGPT, Falcon), dropped layers (BART), a router's
noise (DBRX). So its switch is not used. Each block's `forward` runs under `torch.utils.checkpoint` by itself, no module
leaves evaluation mode, and no number changes.

Cost: a third more time. Memory: the inputs of all blocks and the activations of one.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Recompute the blocks of a model within the context."""
    with ExitStack() as stack:
        for block in blocks(model):
            stack.enter_context(_recomputed(block))
        yield


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that can be recomputed, in the model's order.

    They are those that transformers marks as such. In a model whose decoder checkpoints by itself, as some still do,
    they are the members of the decoder's lists.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    marked = [
        (name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    marked = marked or [
        (f"{name}.{place}", member)
        for name, module in model.named_modules()
        if hasattr(module, "gradient_checkpointing")
        for place, members in module.named_children()
        if isinstance(members, nn.ModuleList)
        for member in members
    ]
    names = {name for name, _ in marked}
    return [module for name, module in marked if not any(name.startswith(f"{outer}.") for outer in names)]


@contextmanager
def _recomputed(block: Any) -> Iterator[None]:
    """Run one block under a checkpoint. A forward that accelerate has set on the instance stays inside it."""
    forward, own = block.forward, block.__dict__.get("forward")

    def recompute(*args: Any, **kwargs: Any) -> Any:
        if any(_is_cache(value) for value in (*args, *kwargs.values())):
            return forward(*args, **kwargs)  # a second call would add to it again
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

    block.forward = recompute
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _is_cache(value: Any) -> bool:
    from transformers import Cache

    return isinstance(value, Cache)


def has_dropout(config: Any) -> bool:
    """Whether a model's configuration, or one inside it, sets a dropout or a router's noise above 0."""
    parts = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    is_set = any(
        isinstance(value, int | float) and value > 0 and any(word in name for word in ("drop", "jitter"))
        for name, value in vars(config).items()
    )
    return is_set or any(map(has_dropout, parts))
