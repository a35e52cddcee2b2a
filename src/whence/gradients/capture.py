"""Per-example gradients from one ordinary backward pass over a padded batch.

A linear layer's gradient for one example is `sum over t of g_t a_t^T` (o x i): `a` its inputs, `g` the loss gradient
at its outputs. `Tap` hands both to a `consume` function as the backward pass reaches the layer, where they are
projected, summed or compared, and freed. All weights are frozen, so that no weight gradient is computed; the graph
begins at the first traced layer's output, so that nothing below it is differentiated either.

Logits and loss are computed only at positions that predict a supervised token, in chunks that bound the memory of
the vocabulary-sized arrays. The head is whatever the model does between its decoder's states and its logits (scaling,
soft caps): the decoder is replaced for a moment by a stub that returns the chunk, and the model's own forward runs.

The loss of an example is the mean or the sum over its supervised tokens, in nats; examples never mix. Sums are in
fp32 whatever the model's dtype.

Source: Goodfellow 2015, https://arxiv.org/abs/1510.01799 (norms from a and g); opacus' samplers for the general case.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from whence.corpus.tokens import Batch
from whence.errors import ModelError
from whence.gradients.protocols import Projection
from whence.models.hooking import decoded, repeatable, vet, writes_into_outputs
from whence.models.loading import LoadedModel, layer_shape
from whence.numerics import product

LOGITS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**26}
"""Elements of one chunk of logits [s v]. On a CPU, 4 MB: an index is a twentieth faster where they stay in cache."""
LEAST_POSITIONS = 128
"""Positions of a chunk, whatever the vocabulary: fewer would read the head's weight too often."""
FORMED_ENTRIES = {"cpu": 2**17, "cuda": 2**27}
"""Entries of the gradients [b o i] that are formed at a time to be transformed. On a CPU, half a MB: in cache."""
FORMED_AT_LEAST = 2**24
"""The same where they are only to be sketched, which is one product: 64 MB, for all examples of a small model."""


@dataclass(frozen=True)
class Captured:
    """What one traced layer saw in the backward pass, for some examples of the batch."""

    layer: str
    a: Float[Tensor, "b t i"]
    """Inputs, in fp32 unless the pass was told to leave them as they are."""
    g: Float[Tensor, "b t o"]
    """Loss gradient at the outputs, likewise; 0 at padding."""
    rows: Int64[Tensor, " b"] | None
    """Which examples of the batch these are; None for all, in order. The output head comes in several parts."""


Consume = Callable[[Captured], None]
Transform = Callable[[Float32[Tensor, "b o i"], str], Float32[Tensor, "b o i"]]
"""From a layer's gradients and its name to what an optimizer makes of them, entry by entry; see `adam`."""


@dataclass(frozen=True)
class TokenLosses:
    """Loss of a batch, by example and by token."""

    loss: Float32[Tensor, " b"]
    """Nats, mean or sum over the example's supervised tokens; 0 where there is none."""
    nll: Float32[Tensor, "b t"]
    """Nats of each supervised token, -log p(token | what is before it); 0 elsewhere."""


def example_gradients(a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"]) -> Float32[Tensor, "b o i"]:
    """Gradient of each example with respect to the layer's weight, materialised: `sum over t of g_t a_t^T`, in fp32."""
    return product(g.transpose(1, 2), a)


def squared_norms(a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"]) -> Float32[Tensor, " b"]:
    """Squared Frobenius norm of each example's gradient.

    By the Gram identity, `sum over s, t of (a_s . a_t)(g_s . g_t)`, where t (i + o) is less than i o, else from the
    gradient itself.
    """
    tokens, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
    if _gram_is_cheaper(tokens, tokens, inputs, outputs):
        return (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2), dtype=torch.float32)
    return example_gradients(a, g).square().sum((1, 2), dtype=torch.float32)


def inverse(norm: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """1 / norm; 0 where the norm is 0, so that what has no gradient scores 0."""
    return torch.where(norm > torch.finfo(norm.dtype).tiny, 1 / norm, 0.0)


def inner_products(
    a: Float[Tensor, "b t i"],
    g: Float[Tensor, "b t o"],
    query_a: Float[Tensor, "q r i"],
    query_g: Float[Tensor, "q r o"],
) -> Float32[Tensor, "q b"]:
    """Inner product of each query's gradient with each example's, for one layer, exact.

    By the Gram identity, `sum over r, t of (a_r . a_t)(g_r . g_t)`, where that is cheaper, else from the queries'
    gradients: `sum over t of g_t^T G a_t`.
    """
    if _gram_is_cheaper(a.shape[1], query_a.shape[1], a.shape[2], g.shape[2]):
        pairs = torch.einsum("qri,bti->qbrt", query_a, a) * torch.einsum("qro,bto->qbrt", query_g, g)
        return pairs.sum((2, 3), dtype=torch.float32)
    return example_gradients(query_a, query_g).flatten(1) @ example_gradients(a, g).flatten(1).T


def _gram_is_cheaper(tokens: int, query_tokens: int, inputs: int, outputs: int) -> bool:
    """Multiplications a pair: t r (i + o) for Gram; t i o + r i o to form both gradients, i o to compare them."""
    gram = tokens * query_tokens * (inputs + outputs)
    return gram < (tokens + query_tokens + 1) * inputs * outputs


HandOver = Callable[[Tensor, Tensor], None]


class Tap(torch.autograd.Function):
    """Identity on a layer's output that remembers the input and hands `(a, g)` over on the way back.

    The input is kept with `save_for_backward`, not in a closure, so that gradient checkpointing can drop and
    recompute it like any other activation.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, a: Tensor, hand_over: HandOver, copy: bool) -> Tensor:
        """Keep the input; return the output as it is, or a copy where a model's code writes into it."""
        ctx.save_for_backward(a)
        ctx.hand_over = hand_over
        return out.clone() if copy else out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Hand `(a, g)` over; pass the gradient on."""
        ctx.hand_over(ctx.saved_tensors[0], gradients[0])
        return gradients[0], None, None, None


@dataclass
class _Pass:
    """One forward and backward pass: which examples the positions now in flight belong to."""

    model: LoadedModel
    batch_shape: tuple[int, int]
    consume: Consume
    whole: bool = False
    """Hand a layer of the output head over once, its chunks joined."""
    waiting: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    """Chunks of the output head: (a, g, owners) by layer."""
    owners: Int64[Tensor, " s"] | None = None
    """Example of each position while a chunk of the output head is in flight; None inside the decoder."""
    upcast: bool = True
    """Hand `(a, g)` over in fp32; else in the type that the model has."""
    called: set[str] = field(default_factory=set)
    """Layers whose hook ran."""
    handed_over: set[str] = field(default_factory=set)
    """Layers of the decoder that have been."""

    def hook(self, name: str) -> Callable[..., Tensor]:
        """Forward hook that taps one layer."""
        return partial(self._tap, name)  # a function of its own would be compiled for every layer, under shape checks

    def _tap(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return out
        if not out.requires_grad:
            out.requires_grad_()
        self.called.add(name)
        owners, copy = self.owners, writes_into_outputs(self.model)
        return Tap.apply(out, args[0].detach(), lambda a, g: self._hand_over(name, a, g, owners), copy)  # type: ignore[return-value]

    @torch.no_grad()
    def _hand_over(self, name: str, a: Tensor, g: Tensor, owners: Tensor | None) -> None:
        dtype = torch.float32 if self.upcast else g.dtype
        a, g = a.to(g.device, dtype), g.to(dtype)  # accelerate moves inputs behind the hook
        if owners is not None:
            chunk = (a.flatten(0, -2), g.flatten(0, -2), owners.to(a.device))
            if self.whole:
                self.waiting.setdefault(name, []).append(chunk)
            else:
                self._hand_over_head(name, *chunk)
            return
        b, t = self.batch_shape
        if a.shape[:-1].numel() != b * t:
            raise ModelError(
                f"layer {name} is called on {a.shape[:-1].numel()} positions of a batch of {b} x {t}, so its "
                "inputs cannot be told apart by example. Leave it out with --layers."
            )
        if self.whole and name in self.handed_over:
            raise ModelError(
                f"layer {name} is used twice in a forward pass, so its gradient comes in parts, which a norm, an "
                "optimizer's view or a token's share cannot be taken of. Leave it out with --layers."
            )
        self.handed_over.add(name)
        self.consume(Captured(name, a.reshape(b, t, -1), g.reshape(b, t, -1), None))

    def _hand_over_head(self, name: str, a: Tensor, g: Tensor, owners: Tensor) -> None:
        rows, a, g = _by_example(a, g, owners)
        self.consume(Captured(name, a, g, rows))

    @torch.no_grad()
    def hand_over_waiting(self) -> None:
        """The output head's chunks, joined."""
        for name, chunks in self.waiting.items():
            a, g, owners = (torch.cat(parts) for parts in zip(*chunks, strict=True))
            self._hand_over_head(name, a, g, owners)


def _by_example(a: Tensor, g: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions in a row [s ...], sorted by owner, to padded examples [b t ...]; and which examples they are."""
    rows, index, counts = torch.unique_consecutive(owners, return_inverse=True, return_counts=True)
    place = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[index]
    shape = (len(rows), int(counts.max()))
    padded_a, padded_g = a.new_zeros(*shape, a.shape[-1]), g.new_zeros(*shape, g.shape[-1])
    padded_a[index, place], padded_g[index, place] = a, g
    return rows, padded_a, padded_g


def backward(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    consume: Consume,
    *,
    reduction: str = "mean",
    objective: str = "loss",
    whole: bool = False,
    upcast: bool = True,
    shared: bool = True,
    gradient_checkpointing: bool = False,
) -> TokenLosses:
    """Run one batch forward and backward, handing every traced layer's `(a, g)` to `consume`.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name; see `LoadedModel.layers`.
        batch: On any device.
        consume: Called once a layer (the output head: once a chunk), from the last layer to the first.
        reduction: "mean" over each example's own supervised tokens, or "sum".
        objective: Of each token, what is differentiated: its "loss", -log p; or its "margin", -log(p / (1 - p)), whose
            gradient does not vanish where the model is sure (TRAK, Park et al. 2023, https://arxiv.org/abs/2303.14186).
        whole: Hand the output head over once, with all of an example's positions: what needs norms needs that.
        upcast: Hand `(a, g)` over in fp32. If not, on a GPU, in the model's own type: half the memory to move.
        shared: Follow every module that has a layer's weight, under that layer's name; else only the modules given.
        gradient_checkpointing: Recompute activations instead of keeping them.

    Returns:
        The losses: those whose gradients were taken, if that is the objective.
    """
    batch = batch.to(model.device)
    state = _Pass(model, (batch.ids.shape[0], batch.ids.shape[1]), consume, whole)
    state.upcast = upcast or model.device.type != "cuda"
    uses = model.uses(layers) if shared else layers.items()
    hooks = [module.register_forward_hook(state.hook(name)) for name, module in uses]
    checkpointed = model.gradient_checkpointing() if gradient_checkpointing else nullcontext()
    try:
        with checkpointed, repeatable(model), torch.enable_grad():
            losses = _losses(model, batch, reduction, state, OBJECTIVES[objective])
            state.hand_over_waiting()
    finally:
        for hook in hooks:
            hook.remove()
    vet(model, {name: layer for name, layer in layers.items() if name not in state.called}, batch)
    return losses


@torch.no_grad()
def token_losses(model: LoadedModel, batch: Batch, *, reduction: str = "mean") -> TokenLosses:
    """Losses of a batch, without gradients."""
    batch = batch.to(model.device)
    return _losses(model, batch, reduction, None, _cross_entropy)


def _losses(model: LoadedModel, batch: Batch, reduction: str, state: _Pass | None, slope_of: "SlopeOf") -> TokenLosses:
    states, head = decoded(model, batch)
    owners, positions = batch.supervised[:, 1:].nonzero(as_tuple=True)  # position t predicts token t + 1
    targets = batch.ids[owners, positions + 1]
    counts = batch.supervised.sum(1)
    weights = 1 / counts[owners] if reduction == "mean" else torch.ones_like(owners, dtype=torch.float32)
    where = (owners.to(states.device), positions.to(states.device))
    leaf = states.detach()[where].requires_grad_(state is not None)
    nll = torch.zeros(batch.ids.shape, dtype=torch.float32, device=batch.ids.device)
    for part in _chunks(model, len(owners)):
        if state is not None:
            state.owners = owners[part]
        logits = head(leaf[part])
        nll[owners[part], positions[part] + 1], slope = slope_of(logits, targets[part], weights[part])
        if state is not None:
            logits.backward(slope)
            state.owners = None
        del logits, slope
    if states.requires_grad and len(owners):
        slope = torch.zeros_like(states)
        slope[where] = leaf.grad  # type: ignore[assignment]
        states.backward(slope)
    total = nll.sum(1)
    return TokenLosses(total / counts.clamp(min=1) if reduction == "mean" else total, nll)


@torch.no_grad()
def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each position in nats, unweighted, and the weighted sum's gradient with respect to the logits.

    The gradient, `weight * (softmax - one-hot of the target)`, is made in place of the probabilities: autograd would
    fill two more arrays of the vocabulary's size.
    """
    targets = targets.to(logits.device)[:, None]
    log_p = F.log_softmax(logits.float(), dim=1)
    nll = -log_p.gather(1, targets)[:, 0]
    slope = log_p.exp_()
    slope.scatter_(1, targets, slope.gather(1, targets) - 1)
    slope *= weights.to(slope)[:, None]
    return nll.to(weights.device), slope.to(logits.dtype)


@torch.no_grad()
def _margin(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each position in nats, unweighted, and the gradient of the weighted sum of -log(p / (1 - p)).

    -log(p / (1 - p)) = logsumexp of the other logits - the target's, so the gradient is the softmax over the others,
    and -1 at the target. Dividing the loss's slope by 1 - p would lose all digits where p is near 1.
    """
    targets = targets.to(logits.device)[:, None]
    nll = -F.log_softmax(logits.float(), dim=1).gather(1, targets)[:, 0]
    slope = logits.float().scatter(1, targets, -torch.inf).softmax(1)
    slope.scatter_(1, targets, -1.0)
    slope *= weights.to(slope)[:, None]
    return nll.to(weights.device), slope.to(logits.dtype)


SlopeOf = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
OBJECTIVES: dict[str, SlopeOf] = {"loss": _cross_entropy, "margin": _margin}
"""What of a token is differentiated."""


def _chunks(model: LoadedModel, positions: int) -> Iterator[slice]:
    vocabulary = model.base.get_output_embeddings().weight.shape[0]
    size = max(LEAST_POSITIONS, LOGITS_PER_CHUNK.get(model.device.type, 2**20) // vocabulary)
    return (slice(start, start + size) for start in range(0, positions, size))


@dataclass
class Sketches:
    """Consumes a backward pass into one row of `projection.width` numbers an example."""

    projection: Projection
    rows: Float32[Tensor, "b k"] = field(init=False)
    size: int
    device: torch.device
    normalise: bool = False
    """Divide each layer's gradient by its norm: the pass must be `whole`."""
    transform: Transform | None = None
    """Of each layer's gradient, before its norm is taken: the pass must be `whole`."""

    def __post_init__(self):
        self.rows = torch.zeros(self.size, self.projection.width, device=self.device)

    def __call__(self, seen: Captured) -> None:
        """Add one layer's block."""
        if self.transform is not None:
            block = self._transformed(seen, self.transform)
        else:
            block = self._projected(seen)
            if self.normalise:
                block = block * inverse(squared_norms(seen.a, seen.g).clamp(min=0).sqrt())[:, None]
        block = block.to(self.device)
        columns = self.rows[:, self.projection.columns(seen.layer)]
        if seen.rows is None:
            columns += block
        else:
            columns.index_add_(0, seen.rows.to(self.device), block)

    def _projected(self, seen: Captured) -> Float32[Tensor, "b k"]:
        """Sketches of a layer's gradients; where they must be formed, a few examples' at a time."""
        if not self.projection.forms_gradient:
            return self.projection(seen.a, seen.g, layer=seen.layer)
        parts = self._few_at_a_time(seen, max(FORMED_ENTRIES.get(seen.a.device.type, 0), FORMED_AT_LEAST))
        return torch.cat([self.projection(a, g, layer=seen.layer) for a, g in parts])

    def _transformed(self, seen: Captured, transform: Transform) -> Float32[Tensor, "b k"]:
        """Sketches of what becomes of a layer's gradients, of which a few examples' are formed at a time."""
        blocks = []
        for a, g in self._few_at_a_time(seen, FORMED_ENTRIES.get(seen.a.device.type, 2**17)):
            formed = transform(example_gradients(a, g), seen.layer)
            block = self.projection.flat(formed, layer=seen.layer)
            blocks.append(block * inverse(formed.flatten(1).norm(dim=1))[:, None] if self.normalise else block)
        return torch.cat(blocks)

    @staticmethod
    def _few_at_a_time(seen: Captured, entries: int) -> Iterator[tuple[Tensor, Tensor]]:
        step = max(1, entries // (seen.g.shape[2] * seen.a.shape[2]))
        return zip(seen.a.split(step), seen.g.split(step), strict=True)


@dataclass
class Materialised:
    """Consumes a backward pass into every example's gradient, layer by layer: exact, and as large as the model."""

    layers: dict[str, Float32[Tensor, "b o i"]]
    """Zeros to begin with, on the CPU; a layer that the loss does not reach stays so."""

    def __call__(self, seen: Captured) -> None:
        """Add one layer's gradients."""
        held = self.layers[seen.layer]
        rows = torch.arange(len(held)) if seen.rows is None else seen.rows.cpu()
        held.index_add_(0, rows, example_gradients(seen.a, seen.g).cpu())


@dataclass
class Norms:
    """Consumes a whole backward pass into every example's exact squared gradient norm."""

    squared: Float32[Tensor, " b"]

    def __call__(self, seen: Captured) -> None:
        """Add one layer's squared norms."""
        rows = torch.arange(len(self.squared)) if seen.rows is None else seen.rows.cpu()
        found = squared_norms(seen.a, seen.g).clamp(min=0)  # a sum of Gram products can round below zero
        self.squared.index_add_(0, rows.to(self.squared.device), found.to(self.squared))


def sketch(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    projection: Projection,
    *,
    reduction: str = "mean",
    normalise: str = "none",
    objective: str = "loss",
    gradient_checkpointing: bool = False,
    transform: Transform | None = None,
) -> tuple[Float32[Tensor, "b k"], TokenLosses]:
    """Projected gradients of a batch, and its losses.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name.
        batch: On any device.
        projection: Of those layers.
        reduction: See `backward`.
        normalise: "layer" divides each layer's gradient by its norm before it is projected.
        objective: See `backward`.
        gradient_checkpointing: See `backward`.
        transform: Of each layer's gradient, before it is normalised and projected: an optimizer's view.

    Returns:
        The sketches of the gradient of each example's own objective (nats, by `reduction`) with respect to the traced
        weights, on the model's device; and the losses.
    """
    rows = Sketches(projection, len(batch.ids), model.device, normalise == "layer", transform)
    losses = backward(
        model,
        layers,
        batch,
        rows,
        reduction=reduction,
        objective=objective,
        whole=rows.normalise or transform is not None,
        upcast=rows.normalise or transform is not None,
        gradient_checkpointing=gradient_checkpointing,
    )
    return rows.rows, losses


def gradients(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    *,
    reduction: str = "mean",
    objective: str = "loss",
) -> tuple[dict[str, Float32[Tensor, "b o i"]], TokenLosses]:
    """Exact gradients of a batch by layer, unprojected, and its losses."""
    b = len(batch.ids)
    held = Materialised({name: torch.zeros(b, *layer_shape(layer)) for name, layer in layers.items()})
    losses = backward(model, layers, batch, held, reduction=reduction, objective=objective)
    return held.layers, losses


def gradient_norms(
    model: LoadedModel, layers: Mapping[str, nn.Module], batch: Batch, *, reduction: str = "mean"
) -> tuple[Float32[Tensor, " b"], TokenLosses]:
    """Exact norm of each example's gradient over the traced layers, and the losses."""
    norms = Norms(torch.zeros(len(batch.ids), device=model.device))
    losses = backward(model, layers, batch, norms, reduction=reduction, whole=True)
    return norms.squared.sqrt(), losses
