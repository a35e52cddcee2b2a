"""Run a model's decoder so that hooks on its layers see every use of their weights, and the same bytes every time.

Some models do one of three things that hooks cannot bear. They write into a layer's output in place, which autograd
refuses if a hook has returned a view of it; or they use an operation that no GPU does in a fixed order. Both raise an
error, and the pass is repeated in another way. Or they multiply by a layer's weight without calling the layer: autograd
sees that, and the model is refused. What is known about a model is remembered while the model lives.
"""

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whence.corpus.tokens import Batch
from whence.models.loading import LoadedModel

logger = logging.getLogger(__name__)


@contextmanager
def repeatable(model: LoadedModel) -> Iterator[None]:
    """On a GPU, use only algorithms that give the same bytes every time, since an index that resumes relies on that.

    By default, attention's backward pass on a GPU adds in no fixed order. A CPU needs no setting. A model whose forward
    pass has an operation without such an algorithm runs in torch's default way, with a warning; see `decoder_states`.
    """
    if model.device.type != "cuda" or model.model in _UNREPEATABLE:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses to multiply without it
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills_memory = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # a pass over all memory, which nothing here needs
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fills_memory


_IN_PLACE_WRITERS: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models whose code writes into a linear layer's output in place, such as Falcon's."""

_UNREPEATABLE: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models with an operation that no GPU does in a fixed order, such as Mamba2's sums along time."""

_CLEARED: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()
"""Layers of a model that were not called in some pass, and whose weights nothing else used in it."""


def hidden_uses(model: LoadedModel, uncalled: Mapping[str, nn.Module], batch: Batch) -> list[str]:
    """Layers whose hooks did not run, but which contribute to the loss, unlike experts not chosen.

    Some models multiply by a layer's weight without calling the layer (Mamba's dt_proj), or compute gradients in a
    backward pass of their own (Reformer). No hook can see that, and the gradient would be taken for zero. Autograd sees
    it, in one more pass over the batch's first example when a layer is uncalled for the first time. A weight that is
    used so only for other inputs than that example escapes the check.

    Args:
        model: Frozen, in evaluation mode.
        uncalled: Layers whose hooks did not run with gradients on.
        batch: The batch of that pass.
    """
    cleared, head = _CLEARED.setdefault(model.model, set()), model.base.get_output_embeddings()
    suspects = {name: layer for name, layer in uncalled.items() if name not in cleared and layer is not head}
    weights = {name: layer.get_parameter("weight") for name, layer in suspects.items()}
    weights = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    if not weights:
        return []
    embedding = model.base.get_input_embeddings()
    # Reformer computes gradients in a backward pass of its own, and only if its input has one.
    hook = embedding.register_forward_hook(lambda module, args, out: out.detach().requires_grad_().clone())
    try:
        with torch.enable_grad():
            for weight in weights.values():
                weight.requires_grad_(True)
            states, _ = model.decode(batch.ids[:1], batch.mask[:1])
            try:
                states.float().square().sum().backward()
                used = [name for name, weight in weights.items() if weight.grad is not None]
            except AssertionError:  # Reformer's backward pass is of training mode alone
                used = list(weights)
    finally:
        hook.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    cleared.update(weights.keys() - used)
    return used


def writes_into_outputs(model: LoadedModel) -> bool:
    """Whether the model's code is known to write into layers' outputs, so that hooks must return copies."""
    return model.model in _IN_PLACE_WRITERS


def decoder_states(model: LoadedModel, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`LoadedModel.decode` of a batch, repeated in another way if the model's code fails under hooks or fixed order."""
    try:
        return model.decode(batch.ids, batch.mask)
    except RuntimeError as error:
        if "is being modified inplace" in str(error) and model.model not in _IN_PLACE_WRITERS:
            _IN_PLACE_WRITERS.add(model.model)
        elif "does not have a deterministic implementation" in str(error) and model.model not in _UNREPEATABLE:
            logger.warning(
                "%s: on a GPU this model cannot be run in a fixed order (%s); an index of it will not come out byte "
                "for byte the same twice, only to rounding",
                model.path,
                str(error).split(".")[0],
            )
            _UNREPEATABLE.add(model.model)
            torch.use_deterministic_algorithms(False)  # for this pass; `repeatable` restores the setting
        else:
            raise
    return decoder_states(model, batch)
