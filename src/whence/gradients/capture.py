"""Per-example gradients from one ordinary backward pass over a padded batch.

A linear layer's gradient for one example is `sum over t of g_t a_t^T` (o x i), with its inputs `a` and the loss
gradient `g` at its outputs. As the backward pass reaches the layer, `Tap` hands both to a `consume` function, which
projects, sums or compares them, and they are freed. All weights are frozen, so that no weight gradient is computed; the
graph begins at the first traced layer's output, so that nothing below it is differentiated either.

Logits and loss are computed only at positions that predict a supervised token, in chunks that bound the memory of the
vocabulary-sized arrays. The head is whatever the model does between its decoder's states and its logits (scaling, soft
caps): for each chunk a stub that returns it replaces the decoder, and the model's own forward runs.

The loss of an example is the mean or the sum over its supervised tokens, in nats; examples never mix. Of two answers
that are contrasted (`Batch.sides`) it is the difference of the two, and the example is handed over as one of twice the
positions, of which the later half are the rejected answer's, with slopes of the other sign: its gradient, and whatever
is not linear in it, needs no other code. Sums are in fp32 whatever the model's dtype.

Source: Goodfellow 2015, https://arxiv.org/abs/1510.01799 (norms from a and g); opacus' samplers for the general case.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from whence.corpus.tokens import Batch
from whence.errors import ModelError
from whence.gradients.embeddings import as_linear, tied_embeddings
from whence.gradients.objectives import OBJECTIVES, SlopeOf, cross_entropy
from whence.gradients.protocols import Projection
from whence.gradients.slope_scale import SlopeScale, scale_for
from whence.models.causality import not_by_example, refuse_dependent_rows
from whence.models.hook_safety import decoder_states, hidden_uses, repeatable, writes_into_outputs
from whence.models.layers import refuse_layers
from whence.models.loading import LoadedModel, layer_shape
from whence.numerics import inverse_or_zero, product
from whence.turns import one_at_a_time

LOGITS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**26}
"""Elements of one chunk of logits [s v]. On a CPU 4 MB, which stay in cache: an index is a twentieth faster so."""
LEAST_POSITIONS = 128
"""Fewest positions of a chunk, whatever the vocabulary: fewer would read the head's weight too often."""
FORMED_ENTRIES = {"cpu": 2**17, "cuda": 2**27}
"""Entries of the gradients [b o i] that are formed at a time to be transformed. On a CPU half a MB, in cache."""
FORMED_AT_LEAST = 2**24
"""At least so many entries if they are only sketched, which is one product: 64 MB, all examples of a small model."""

MIXED = "is called on positions that do not come example by example (time first, or mixed)"
UNCALLED = "is used out of sight of hooks, by its weight and without a call"


@dataclass(frozen=True)
class Captured:
    """Inputs and output gradients of one traced layer in the backward pass, for some examples of the batch."""

    layer: str
    a: Float[Tensor, "b t i"]
    """Inputs, in fp32 unless the pass keeps the model's dtype."""
    g: Float[Tensor, "b t o"]
    """Loss gradient at the outputs, likewise; 0 at padding."""
    rows: Int64[Tensor, " b"] | None
    """Which examples of the batch these are; None for all, in order. The output head comes in several chunks."""
    places: Int64[Tensor, "b t"] | None = None
    """Of the output head and of a layer used more than once, where in its example each position is.

    A position occurs once per use; of a tied head, the embedding's positions are among them.
    """


Consume = Callable[[Captured], None]
Transform = Callable[[Float32[Tensor, "b o i"], str], Float32[Tensor, "b o i"]]
"""From a layer's gradients and its name to what an optimizer makes of them, entry by entry; see `adam`."""


@dataclass(frozen=True)
class TokenLosses:
    """Loss of a batch, by example and by token."""

    loss: Float32[Tensor, " b"]
    """Nats, mean or sum over the example's supervised tokens; 0 if there are none. Of two answers, the difference."""
    nll: Float32[Tensor, "b t"]
    """Nats of each supervised token, -log p(token | tokens before it); 0 elsewhere. Of two answers, one after another.
    """


def example_gradients(a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"]) -> Float32[Tensor, "b o i"]:
    """Gradient of each example with respect to the layer's weight, materialised: `sum over t of g_t a_t^T`, in fp32."""
    return product(g.transpose(1, 2), a)


def squared_norms(a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"]) -> Float32[Tensor, " b"]:
    """Squared Frobenius norm of each example's gradient.

    The Gram identity `sum over s, t of (a_s . a_t)(g_s . g_t)` is used where t (i + o) is less than i o, else the
    gradient itself.
    """
    tokens, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
    if gram_is_cheaper(tokens, tokens, inputs, outputs):
        return (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2), dtype=torch.float32)
    return example_gradients(a, g).square().sum((1, 2), dtype=torch.float32)


def gram_is_cheaper(tokens: int, query_tokens: int, inputs: int, outputs: int) -> bool:
    """Multiplications per pair: t r (i + o) for Gram; t i o + r i o to form both gradients, i o to compare them."""
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
        """Keep the input; return the output as it is, or a copy if the model's code writes into it."""
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
    """State of one forward and backward pass: whose positions are in flight, and what was handed over."""

    model: LoadedModel
    batch_shape: tuple[int, int]
    """Sequences and positions."""
    sides: int
    """Sequences of an example."""
    consume: Consume
    whole: bool = False
    """Whether every layer is handed over once, with the output head's chunks and all uses of a layer joined."""
    parts: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    """Chunks and uses that are not handed over yet: (a, g, owners, places) by layer."""
    owners: tuple[Int64[Tensor, " s"], Int64[Tensor, " s"]] | None = None
    """Example and place of each position of the current chunk of the output head; None inside the decoder."""
    upcast: bool = True
    """Whether `(a, g)` is handed over in fp32; else in the model's dtype."""
    scale: SlopeScale = field(default_factory=SlopeScale)
    """Factors of the slopes, which are divided out before they are handed over."""
    calls: Counter[str] = field(default_factory=Counter)
    """How often each layer's hook ran."""
    faults: dict[str, str] = field(default_factory=dict)
    """Why a layer's gradient cannot be seen."""
    used_again: set[str] = field(default_factory=set)
    """Layers that the forward pass used more than once, known before the decoder's backward pass."""

    def hook(self, name: str) -> Callable[..., Tensor]:
        """Forward hook that taps one layer."""
        return partial(self._tap, name)  # under shape checks, a function of its own would be compiled for every layer

    def _tap(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Any) -> Any:
        if not torch.is_grad_enabled():
            return out
        self.calls[name] += 1
        if not isinstance(out, Tensor):
            self.faults[name] = f"is a {type(module).__name__}, which returns more than a linear layer's output"
            return out
        if not out.requires_grad:
            out.requires_grad_()
        owners, copy = self.owners, writes_into_outputs(self.model)
        return Tap.apply(out, args[0].detach(), lambda a, g: self._hand_over(name, a, g, owners), copy)

    @torch.no_grad()
    def _hand_over(self, name: str, a: Tensor, g: Tensor, owners: tuple[Tensor, Tensor] | None) -> None:
        dtype = torch.float32 if self.upcast else g.dtype
        a, g = a.to(g.device, dtype), g.to(dtype)  # accelerate moves inputs behind the hook
        if owners is not None:
            slopes = self.scale.undone_in_head(g.flatten(0, -2))
            chunk = (a.flatten(0, -2), slopes, *(tensor.to(a.device) for tensor in owners))
            if self.whole:
                self.parts.setdefault(name, []).append(chunk)
            else:
                self._hand_over_head(name, *chunk)
            return
        b, t = self.batch_shape
        if a.shape[:-1].numel() != b * t:
            self.faults[name] = f"is called on {a.shape[:-1].numel()} positions of a batch of {b} x {t}"
            return
        a, g = a.reshape(b, t, -1), self.scale.undone(g.reshape(b, t, -1))
        b, t = b // self.sides, t * self.sides
        a, g = a.reshape(b, t, -1), g.reshape(b, t, -1)
        if self.whole and name in self.used_again:
            rows, places = torch.meshgrid(torch.arange(b), torch.arange(t), indexing="ij")
            part = (a.flatten(0, 1), g.flatten(0, 1), rows.flatten().to(a.device), places.flatten().to(a.device))
            self.parts.setdefault(name, []).append(part)
        else:
            self.consume(Captured(name, a, g, None))

    def embedding_hook(self, name: str) -> Callable[..., Tensor]:
        """Forward hook that taps an embedding whose weight is that of the output head `name`."""
        return partial(self._tap_embedding, name)

    def _tap_embedding(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or self.owners is not None:  # for the head, a stub replaces the decoder
            return out
        if not out.requires_grad:
            out.requires_grad_()
        hand_over, copy = partial(self._hand_over_embedding, name, module), writes_into_outputs(self.model)
        return Tap.apply(out, args[0], hand_over, copy)  # type: ignore[return-value]

    @torch.no_grad()
    def _hand_over_embedding(self, name: str, module: nn.Module, ids: Tensor, g: Tensor) -> None:
        if ids.shape != self.batch_shape:
            raise ModelError(f"{name} is tied to an embedding that is read at {tuple(ids.shape)}. Leave {name} out.")
        slopes = self.scale.undone(g)
        slopes = slopes.float() if self.upcast else slopes
        for a, one_hot, *where in as_linear(module, ids, slopes, LOGITS_PER_CHUNK.get(g.device.type, 2**20)):
            chunk = (a, one_hot, *self.in_examples(*where))
            if self.whole:
                self.parts.setdefault(name, []).append(chunk)
            else:
                self._hand_over_head(name, *chunk)

    def in_examples(self, rows: Int64[Tensor, " s"], places: Int64[Tensor, " s"]) -> tuple[Tensor, Tensor]:
        """Examples and places in them of positions of the batch's sequences."""
        return rows // self.sides, places + self.batch_shape[1] * (rows % self.sides)

    def _hand_over_head(self, name: str, a: Tensor, g: Tensor, owners: Tensor, places: Tensor) -> None:
        self.consume(Captured(name, *_by_example(a, g, owners, places)))

    @torch.no_grad()
    def hand_over_parts(self) -> None:
        """Hand over, joined, what came in parts."""
        for name, parts in self.parts.items():
            a, g, owners, places = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            if (owners.diff() < 0).any():  # of a layer used again, or a tied embedding
                order = owners.argsort(stable=True)
                a, g, owners, places = a[order], g[order], owners[order], places[order]
            self._hand_over_head(name, a, g, owners, places)


def _by_example(a: Tensor, g: Tensor, owners: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From positions [s ...], sorted by owner, to padded examples [b t ...], their numbers, and positions' places."""
    rows, index, counts = torch.unique_consecutive(owners, return_inverse=True, return_counts=True)
    place = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[index]
    shape = (len(rows), int(counts.max()))
    padded_a, padded_g = a.new_zeros(*shape, a.shape[-1]), g.new_zeros(*shape, g.shape[-1])
    padded_places = places.new_zeros(shape)
    padded_a[index, place], padded_g[index, place], padded_places[index, place] = a, g, places
    return padded_a, padded_g, rows, padded_places


@one_at_a_time
def backward(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    consume: Consume,
    *,
    reduction: str = "mean",
    objective: str | SlopeOf = "loss",
    whole: bool = False,
    upcast: bool = True,
    shared: bool = True,
    gradient_checkpointing: bool = False,
    scale: SlopeScale | None = None,
) -> TokenLosses:
    """Run one batch forward and backward, handing every traced layer's `(a, g)` to `consume`.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name; see `LoadedModel.layers`.
        batch: Examples, on any device.
        consume: Called once per use of a layer (of the output head once per chunk), from the last to the first.
        reduction: "mean" over each example's own supervised tokens, or "sum".
        objective: What is differentiated at each token: its "loss", -log p; or its "margin", -log(p / (1 - p)), whose
            gradient does not vanish where the model is sure; see `objectives`. Or a function of the caller's own,
            which is called for the supervised positions in their order.
        whole: Hand every layer over once, with all of an example's positions and all of a layer's uses, as norms and
            products require: a gradient is the sum over uses, and its products have cross terms.
        upcast: Hand `(a, g)` over in fp32. Otherwise a GPU hands over the model's dtype: half the memory to move.
        shared: Trace every module that has a layer's weight, an embedding too, under that layer's name; otherwise only
            the given modules.
        gradient_checkpointing: Recompute activations instead of keeping them.
        scale: Takes up the factors of the pass, for taps of the caller's own, whose slopes still have them.

    Returns:
        The losses, whatever the objective.

    Raises:
        ModelError: The gradients of some layers cannot be seen; it names the pattern that leaves all of them out.
    """
    batch = batch.to(model.device)
    shape = (batch.ids.shape[0], batch.ids.shape[1])
    state = _Pass(model, shape, batch.sides, consume, whole, scale=scale or scale_for(model))
    state.upcast = upcast or model.device.type != "cuda" or state.scale.is_needed
    uses = [*(model.uses(layers) if shared else layers.items())]
    state.faults = {name: MIXED for name, module in uses if not_by_example(module)}
    hooks = [module.register_forward_hook(state.hook(name)) for name, module in uses]
    if shared:
        tied = tied_embeddings(model, layers)
        hooks += [module.register_forward_hook(state.embedding_hook(name)) for name, module in tied]
    checkpointed = model.gradient_checkpointing() if gradient_checkpointing else nullcontext()
    try:
        with checkpointed, repeatable(model), torch.enable_grad():
            slope_of = OBJECTIVES[objective] if isinstance(objective, str) else objective
            losses = _losses(model, batch, reduction, state, slope_of)
            state.hand_over_parts()
    finally:
        for hook in hooks:
            hook.remove()
    uncalled = {name: layer for name, layer in layers.items() if name not in state.calls}
    state.faults |= dict.fromkeys(hidden_uses(model, uncalled, batch), UNCALLED)
    refuse_layers(model.path, state.faults, state.calls, has_adapter=model.has_adapter)
    return losses


@one_at_a_time
@torch.no_grad()
def token_losses(model: LoadedModel, batch: Batch, *, reduction: str = "mean") -> TokenLosses:
    """Losses of a batch, without gradients."""
    batch = batch.to(model.device)
    return _losses(model, batch, reduction, None, cross_entropy)


def _losses(model: LoadedModel, batch: Batch, reduction: str, state: _Pass | None, slope_of: SlopeOf) -> TokenLosses:
    states, head = decoder_states(model, batch)
    refuse_dependent_rows(model, batch, states)
    owners, positions = batch.supervised[:, 1:].nonzero(as_tuple=True)  # position t predicts token t + 1
    labels = batch.ids[owners, positions + 1]
    counts = batch.supervised.sum(1)
    weights = 1 / counts[owners] if reduction == "mean" else torch.ones_like(owners, dtype=torch.float32)
    signs = torch.tensor([1.0, -1.0][: batch.sides], device=batch.ids.device)
    weights = weights * signs[owners % batch.sides]
    where = (owners.to(states.device), positions.to(states.device))
    leaf = states.detach()[where]
    slopes = torch.zeros_like(leaf, dtype=None if state is None else state.scale.dtype)
    nll = torch.zeros(batch.ids.shape, dtype=torch.float32, device=batch.ids.device)
    for chunk in _chunks(model, len(owners)):
        some = leaf[chunk].detach().requires_grad_(state is not None)
        if state is not None:
            state.owners = state.in_examples(owners[chunk], positions[chunk])
        logits = head(some)
        nll[owners[chunk], positions[chunk] + 1], slope = slope_of(logits, labels[chunk], weights[chunk])
        if state is not None:
            logits.backward(state.scale.in_head(slope).to(logits.dtype))
            slopes[chunk] = state.scale.undone_in_head(some.grad)  # type: ignore[arg-type]
            state.owners = None
        del logits, slope
    if state is not None and states.requires_grad and len(owners):
        state.used_again = {name for name, count in state.calls.items() if count > 1}
        slope = torch.zeros_like(states, dtype=slopes.dtype)
        slope[where] = slopes
        states.backward(state.scale.in_decoder(slope).to(states.dtype))
    total = nll.sum(1)
    losses = total / counts.clamp(min=1) if reduction == "mean" else total
    return TokenLosses((losses.view(-1, batch.sides) * signs).sum(1), nll.reshape(len(nll) // batch.sides, -1))


def _chunks(model: LoadedModel, positions: int) -> Iterator[slice]:
    vocabulary = model.base.get_output_embeddings().weight.shape[0]
    size = max(LEAST_POSITIONS, LOGITS_PER_CHUNK.get(model.device.type, 2**20) // vocabulary)
    return (slice(start, start + size) for start in range(0, positions, size))


@dataclass
class Sketches:
    """Consumes a backward pass into one row of `projection.width` numbers per example."""

    projection: Projection
    rows: Float32[Tensor, "b k"] = field(init=False)
    size: int
    device: torch.device
    normalise: bool = False
    """Whether each layer's gradient is divided by its norm, which needs a `whole` pass."""
    transform: Transform | None = None
    """Applied to each layer's gradient before its norm is taken; it needs a `whole` pass."""

    def __post_init__(self):
        self.rows = torch.zeros(self.size, self.projection.width, device=self.device)

    def __call__(self, captured: Captured) -> None:
        """Add one layer's block."""
        if self.transform is not None:
            block = self._transformed(captured, self.transform)
        else:
            block = self._projected(captured)
            if self.normalise:
                block = block * inverse_or_zero(squared_norms(captured.a, captured.g).clamp(min=0).sqrt())[:, None]
        block = block.to(self.device)
        columns = self.rows[:, self.projection.columns(captured.layer)]
        if captured.rows is None:
            columns += block
        else:
            columns.index_add_(0, captured.rows.to(self.device), block)

    def _projected(self, captured: Captured) -> Float32[Tensor, "b k"]:
        """Sketches of a layer's gradients. If the gradients must be formed, it is a few examples at a time."""
        if not self.projection.forms_gradient:
            return self.projection(captured.a, captured.g, layer=captured.layer)
        groups = self._few_at_a_time(captured, max(FORMED_ENTRIES.get(captured.a.device.type, 0), FORMED_AT_LEAST))
        return torch.cat([self.projection(a, g, layer=captured.layer) for a, g in groups])

    def _transformed(self, captured: Captured, transform: Transform) -> Float32[Tensor, "b k"]:
        """Sketches of a layer's transformed gradients, which are formed for a few examples at a time."""
        blocks = []
        for a, g in self._few_at_a_time(captured, FORMED_ENTRIES.get(captured.a.device.type, 2**17)):
            formed = transform(example_gradients(a, g), captured.layer)
            block = self.projection.flat(formed, layer=captured.layer)
            blocks.append(block * inverse_or_zero(formed.flatten(1).norm(dim=1))[:, None] if self.normalise else block)
        return torch.cat(blocks)

    @staticmethod
    def _few_at_a_time(captured: Captured, entries: int) -> Iterator[tuple[Tensor, Tensor]]:
        step = max(1, entries // (captured.g.shape[2] * captured.a.shape[2]))
        return zip(captured.a.split(step), captured.g.split(step), strict=True)


@dataclass
class Materialised:
    """Consumes a backward pass into every example's exact gradient, layer by layer, each as large as the model."""

    layers: dict[str, Float32[Tensor, "b o i"]]
    """Zeros at first, on the CPU; a layer that the loss does not reach stays zero."""

    def __call__(self, captured: Captured) -> None:
        """Add one layer's gradients."""
        sums = self.layers[captured.layer]
        rows = torch.arange(len(sums)) if captured.rows is None else captured.rows.cpu()
        sums.index_add_(0, rows, example_gradients(captured.a, captured.g).cpu())


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
        batch: Examples, on any device.
        projection: A projection of those layers.
        reduction: See `backward`.
        normalise: "layer" divides each layer's gradient by its norm before it is projected.
        objective: See `backward`.
        gradient_checkpointing: See `backward`.
        transform: Applied to each layer's gradient before it is normalised and projected: an optimizer's view.

    Returns:
        Sketches of the gradient of each example's own objective (nats, reduced by `reduction`) with respect to the
        traced weights, on the model's device; and the losses.
    """
    sketches = Sketches(projection, len(batch), model.device, normalise == "layer", transform)
    losses = backward(
        model,
        layers,
        batch,
        sketches,
        reduction=reduction,
        objective=objective,
        whole=sketches.normalise or transform is not None,
        upcast=sketches.normalise or transform is not None,
        gradient_checkpointing=gradient_checkpointing,
    )
    return sketches.rows, losses


def gradients(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    *,
    reduction: str = "mean",
    objective: str = "loss",
) -> tuple[dict[str, Float32[Tensor, "b o i"]], TokenLosses]:
    """Exact gradients of a batch by layer, unprojected, and its losses."""
    b = len(batch)
    materialised = Materialised({name: torch.zeros(b, *layer_shape(layer)) for name, layer in layers.items()})
    losses = backward(model, layers, batch, materialised, reduction=reduction, objective=objective)
    return materialised.layers, losses
