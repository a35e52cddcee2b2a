"""Running a model's decoder so that hooks on its layers tell the truth, whatever the model's code does.

Three things that some models do: they write into a layer's output in place, which autograd refuses where a hook has
returned a view of it; they use an operation that no GPU does in a fixed order; they multiply by a layer's weight
without calling the layer. The first two are found by the error they raise, and the pass is made once more in another
way; the third is found by autograd, and refused. What was found of a model is remembered while it lives.
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
from whence.errors import ModelError
from whence.models.loading import LoadedModel

logger = logging.getLogger(__name__)


@contextmanager
def repeatable(model: LoadedModel) -> Iterator[None]:
    """On a GPU, only algorithms that give the same bytes every time: an index that resumes is built on that.

    Attention's backward pass adds in no fixed order there unless told. On a CPU nothing needs telling. A model whose
    forward pass has an operation without such an algorithm is told of, and runs as torch likes (see `decoded`).
    """
    if model.device.type != "cuda" or model.model in _UNREPEATABLE:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses to multiply without
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills: Any = torch.utils.deterministic
    filled = fills.fill_uninitialized_memory
    fills.fill_uninitialized_memory = False  # a pass over all memory, for who reads what was never written
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fills.fill_uninitialized_memory = filled


_WRITERS: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models whose code writes into a linear layer's output in place, such as Falcon's."""

_UNREPEATABLE: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models with an operation that no GPU does in a fixed order, such as Mamba2's sums along time."""

_VETTED: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()
"""Layers of a model that were not called in some pass, and whose weights nothing else used either."""


def vet(model: LoadedModel, uncalled: Mapping[str, nn.Module], batch: Batch) -> None:
    """See that layers which no hook was called for had no part in the loss: experts that were not chosen have none.

    Some models multiply by a layer's weight without calling the layer (Mamba's dt_proj): no hook can see that, and
    its gradient would be taken for zero. Autograd sees it, in one more pass over the batch's first example for each
    layer that was ever uncalled. A weight that is used so for some inputs alone, and not for that one, escapes.

    Raises:
        ModelError: Some weight was used behind the hooks' back.
    """
    vetted, head = _VETTED.setdefault(model.model, set()), model.base.get_output_embeddings()
    suspects = {name: layer for name, layer in uncalled.items() if name not in vetted and layer is not head}
    weights = {name: layer.get_parameter("weight") for name, layer in suspects.items()}
    weights = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    if not weights:
        return
    try:
        with torch.enable_grad():
            for weight in weights.values():
                weight.requires_grad_(True)
            states, _ = model.decode(batch.ids[:1], batch.mask[:1])
            total = states.float().square().sum()
            found = torch.autograd.grad(total, list(weights.values()), allow_unused=True) if total.requires_grad else ()
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    used = [name for name, gradient in zip(weights, found, strict=bool(found)) if gradient is not None]
    if used:
        raise ModelError(
            f"{model.path}: the model uses the weights of {', '.join(used[:3])}{' ...' if len(used) > 3 else ''} "
            f"without calling the layer{'s' if len(used) > 1 else ''}, so that no gradient of theirs can be seen. "
            f"Leave {'them' if len(used) > 1 else 'it'} out: --layers '!*{used[0].rsplit('.', 1)[-1]}'"
        )
    vetted.update(weights)


def writes_into_outputs(model: LoadedModel) -> bool:
    """Whether the model's code is known to: hooks must then return copies."""
    return model.model in _WRITERS


def decoded(model: LoadedModel, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`LoadedModel.decode`; once more, in another way, where the model's code does not bear the first."""
    try:
        return model.decode(batch.ids, batch.mask)
    except RuntimeError as error:
        if "is being modified inplace" in str(error) and model.model not in _WRITERS:
            _WRITERS.add(model.model)
        elif "does not have a deterministic implementation" in str(error) and model.model not in _UNREPEATABLE:
            logger.warning(
                "%s: on a GPU this model cannot be run in a fixed order (%s); an index of it will not come out byte "
                "for byte the same twice, only to rounding",
                model.path,
                str(error).split(".")[0],
            )
            _UNREPEATABLE.add(model.model)
            torch.use_deterministic_algorithms(False)  # of this pass; `repeatable` puts back what was
        else:
            raise
    return decoded(model, batch)
