"""The gradient of an embedding's weight, example by example, and what it adds to an output head that is tied to it.

An embedding hands out rows E[id_t] of its weight [v d], so with g_t the loss gradient at its outputs, its weight's
gradient is the sum over t of e(id_t) g_t^T, where e(id) is 1 at id and 0 elsewhere. That is the form of a linear layer
from d to v with inputs g_t and output gradients e(id_t). A head that is tied to the embedding is such a layer, with
more positions; the gradient of the shared weight is the sum over both.

Cost: e(id_t) has v entries a token, as the head's own output gradients have.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.func import functional_call

from whence.errors import ModelError
from whence.models.loading import LoadedModel


def embedding_slopes(
    module: nn.Module, ids: Int64[Tensor, "b t"], g: Float[Tensor, "b t d"]
) -> Float32[Tensor, "b t d"]:
    """Loss gradient at the rows of the weight that were handed out: 0 for `padding_idx`, as autograd has it."""
    weight = module.get_parameter("weight")
    ones = torch.ones_like(weight[:1]).expand_as(weight)
    slopes = g.float() * functional_call(module, {"weight": ones}, (ids[:1, :1],)).float()  # Gemma scales its rows
    if isinstance(padding := getattr(module, "padding_idx", None), int):
        slopes = slopes * (ids != padding)[:, :, None]
    return slopes


def as_linear(
    module: nn.Module, ids: Int64[Tensor, "b t"], g: Float[Tensor, "b t d"], entries: int
) -> Iterator[tuple[Float[Tensor, "s d"], Float[Tensor, "s v"], Int64[Tensor, " s"], Int64[Tensor, " s"]]]:
    """An embedding's `(a, g)` as if it were the head that is tied to it, with each position's example and place.

    They come in chunks of whole examples, with about so many entries of g.
    """
    (b, t), v = ids.shape, module.get_parameter("weight").shape[0]
    for rows in torch.arange(b, device=g.device).split(max(1, entries // (t * v))):
        one_hot = F.one_hot(ids[rows].flatten(), v).to(g)
        slopes = embedding_slopes(module, ids[rows], g[rows]).to(g).flatten(0, 1)
        yield slopes, one_hot, rows.repeat_interleave(t), torch.arange(t, device=g.device).repeat(len(rows))


def tied_embeddings(model: LoadedModel, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Embeddings that share the weight of a traced layer, with the layer's name.

    Raises:
        ModelError: The weight is also that of another kind of module, whose gradient is not known here.
    """
    names = {id(layer.weight): name for name, layer in layers.items()}
    for other_name, module in model.base.named_modules():
        own = dict(module.named_parameters(recurse=False)).get("weight")  # peft's wrapper shows its layer's as its own
        name = None if own is None else names.get(id(own))
        if name is None or isinstance(module, type(layers[name])) or isinstance(layers[name], type(module)):
            continue
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            raise ModelError(
                f"layer {name} shares its weight with {other_name}, a {type(module).__name__}, which adds to its "
                f"gradient in a way that Whence does not know. Leave it out: --layers '!{name}'"
            )
        yield name, module
