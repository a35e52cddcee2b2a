"""Inner products of each example's loss gradient with a fixed direction in weight space; no gradient is formed.

Every module that this covers (linear layers, `Conv1D`, a LoRA's A and B, embeddings, the gains and biases of norms) is
affine in its own weights. Let `f(x; w)` be its output with its parameters set to w, and g the loss gradient there. Then
the inner product of an example's gradient with the direction D is

    <gradient, D> = sum over positions of g . (f(x; D) - f(x; 0))                                (ghost dot product)

which is `g^T D a` for a weight, two thin products if D is a low-rank pair; `g . D[id]` for an embedding's row; and
for a gain or a bias the sum over positions of g times the unit response, times D. One ordinary backward pass gives
every g (`capture.backward`), so all layers cost about as much as training's forward and backward. A tied embedding is
one parameter with two uses, and both terms are added.

`head_scores` needs no backward pass: at the output head g is `softmax - one-hot`, so the head alone costs one more
product of the logits' size than a forward pass.

Sign: the result is the plain inner product with D. To ask whether an example helped to make theta_f of theta_0, give
D = theta_0 - theta_f: descent moves weights against the gradient, so members tend to score above 0, and to first order
the score is by how many nats the move lowers the example's loss.

Sums are in fp32. An example whose loss, gradient or score is not finite scores NaN, and no other example does.
Parameters of other modules (fused experts, convolutions) are refused. A weight that is read without a call of its
module goes unnoticed, and counts 0.

Sources: the ghost dot product, In-Run Data Shapley, Wang et al. 2024, https://arxiv.org/abs/2406.11011; scores against
a weight difference, SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553. SELECT projects the gradient of the
head's weight for one token a row; here it is exact, over all supervised tokens and any layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.func import functional_call

from whence.corpus.tokens import Batch
from whence.errors import ModelError, SettingError
from whence.gradients.capture import (
    LEAST_POSITIONS,
    LOGITS_PER_CHUNK,
    Captured,
    Tap,
    TokenLosses,
    backward,
    squared_norms,
)
from whence.gradients.embeddings import embedding_slopes
from whence.gradients.objectives import cross_entropy
from whence.gradients.slope_scale import SlopeScale, scale_for
from whence.models.loading import LoadedModel
from whence.turns import one_at_a_time

ParameterDirection = Float32[Tensor, "..."] | tuple[Float32[Tensor, "_ _"], Float32[Tensor, "_ _"]]
"""The direction for one parameter: a tensor of its shape; or for a matrix the pair left [o r] and right [r i], which
stands for their product. A pair is laid out as the gradient is, [o i], even if `Conv1D` stores [i o]."""
Direction = Mapping[str, ParameterDirection]
"""A direction in weight space, by name in `LoadedModel.model.named_parameters()`, where a tied weight has one name. It
is moved to the model's devices at every batch unless it is there already."""


@dataclass(frozen=True)
class Dots:
    """Inner products of a batch's gradients with a direction."""

    parameters: tuple[str, ...]
    """Names of the rows of `dots`, in the direction's order."""
    dots: Float32[Tensor, "p b"]
    """Inner products by parameter. All are NaN for an example with anything that is not finite."""
    losses: TokenLosses
    """Losses of the same pass."""
    squares: Float32[Tensor, "p b"] | None = None
    """Squared norm of each example's gradient by parameter, if requested."""

    @property
    def total(self) -> Float32[Tensor, " b"]:
        """Inner product with the whole direction."""
        return self.dots.sum(0)

    @property
    def norms(self) -> Float32[Tensor, " b"]:
        """Norm of each example's gradient over the direction's parameters."""
        if self.squares is None:
            raise SettingError("no norms were taken: call per_example_dot with norms=True")
        return self.squares.sum(0).sqrt()


def position_dots(
    a: Float[Tensor, "*s i"], g: Float[Tensor, "*s o"], weight: ParameterDirection
) -> Float[Tensor, "*s"]:
    """`g^T D a` at each position, for a direction D [o i] or its pair (left, right), by way of the smaller product."""
    if isinstance(weight, tuple):
        left, right = weight
        return ((g @ left) * (a @ right.T)).sum(-1)
    if g.shape[-1] > a.shape[-1]:
        return ((g @ weight) * a).sum(-1)
    return ((a @ weight.T) * g).sum(-1)


@one_at_a_time
def per_example_dot(
    model: LoadedModel, batch: Batch, direction: Direction, *, reduction: str = "mean", norms: bool = False
) -> Dots:
    """Inner product of each example's loss gradient with a direction, exact, by parameter.

    Args:
        model: Frozen, in evaluation mode.
        batch: Examples, on any device.
        direction: See `Direction`. A parameter that it leaves out counts as 0, and nothing below its first layer is
            differentiated.
        reduction: "mean" of an example's loss over its own supervised tokens, or "sum". For a training whose loss is
            the mean over the tokens of a whole batch, "sum" fits.
        norms: Also compute each gradient's squared norm. The head's slopes [b t v] are then held until the pass ends.

    Returns:
        Nats (loss, times change of weight). Positive: a small step *against* the direction lowers the example's loss.

    Raises:
        SettingError: The direction is empty, or has a name or shape that the model does not have.
        ModelError: A parameter's module has no closed form here, or its inputs cannot be told apart by example; with
            `norms`, also if several modules of a pass share it, except for a tied embedding.
    """
    batch = batch.to(model.device)
    ghost = Ghost(owners_of(model, direction), batch, direction, norms, scale_for(model))
    linear = {name: owner.module for name, owner in ghost.owners.items() if owner.kind == "linear"}
    hooks = list(ghost.hooks())
    try:
        losses = backward(
            model, linear, batch, ghost.add_linear, reduction=reduction, whole=norms, shared=False, scale=ghost.scale
        )
    finally:
        for hook in hooks:
            hook.remove()
    return ghost.result(losses)


@one_at_a_time
@torch.no_grad()
def head_scores(
    model: LoadedModel, batch: Batch, direction: ParameterDirection, *, reduction: str = "mean"
) -> tuple[Float32[Tensor, " b"], TokenLosses]:
    """Inner product of each example's gradient with a direction, for the output head's weight alone.

    For an untied head it equals `per_example_dot`; for a tied weight it covers only the head's use. There is no
    backward pass: with `g` the slope at the head's output, `g^T D` is the only product beyond a plain forward pass. A
    soft cap or a scale after the head is differentiated chunk by chunk.

    Args:
        model: Frozen, in evaluation mode.
        batch: Examples, on any device.
        direction: The direction for the head's weight [v i], or a pair.
        reduction: See `per_example_dot`.

    Returns:
        The scores, in nats, and the losses of the same pass.

    Raises:
        SettingError: The direction does not have the shape of the head's weight.
        ModelError: The head is not a linear layer.
    """
    batch = batch.to(model.device)
    head = model.base.get_output_embeddings()
    head = getattr(head, "base_layer", head)  # inside an adapter
    if all(head is not layer for layer in model.layers("*").values()):
        raise ModelError(f"{model.path}: its output head is a {type(head).__name__}, not a linear layer")
    _check_shape("the output head's weight", direction, head, head.weight)
    weight = _placed(direction, head, head.weight.device)
    states, decode = model.decode(batch.ids, batch.mask)
    owners, positions = batch.supervised[:, 1:].nonzero(as_tuple=True)  # position t predicts token t + 1
    labels, counts = batch.ids[owners, positions + 1], batch.supervised.sum(1)
    weights = 1 / counts[owners] if reduction == "mean" else torch.ones_like(owners, dtype=torch.float32)
    states = states[owners.to(states.device), positions.to(states.device)]
    nll = torch.zeros(batch.ids.shape, dtype=torch.float32, device=batch.ids.device)
    scores = nll.new_zeros(len(batch.ids))
    size = max(LEAST_POSITIONS, LOGITS_PER_CHUNK.get(model.device.type, 2**20) // head.weight.shape[0])
    for start in range(0, len(owners), size):
        chunk = slice(start, start + size)
        a, out, logits = _head_pass(head, decode, states[chunk])
        nll[owners[chunk], positions[chunk] + 1], g = cross_entropy(logits, labels[chunk], weights[chunk])
        if logits.data_ptr() != out.data_ptr() or logits.shape != out.shape:  # a cap or a scale
            scale = scale_for(model)
            (g,) = torch.autograd.grad(logits, out, scale.in_head(g).to(logits.dtype))
            g = scale.undone_in_head(g)
        scores.index_add_(0, owners[chunk], position_dots(a.float(), g.float(), weight).to(scores.device))
    loss = nll.sum(1) / counts.clamp(min=1) if reduction == "mean" else nll.sum(1)
    return torch.where(loss.isfinite() & scores.isfinite(), scores, torch.nan), TokenLosses(loss, nll)


def _head_pass(head: nn.Module, decode: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and outputs of the head's linear layer for states [s d], and the logits that the model makes of them."""
    recorded: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        leaf = out.detach()[0].requires_grad_()
        recorded.extend((args[0].detach()[0], leaf))
        return leaf[None]

    hook = head.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = decode(states)
    finally:
        hook.remove()
    a, out = recorded
    return a, out, logits


@contextmanager
def interpolated(base: LoadedModel, final: LoadedModel, s: float) -> Iterator[LoadedModel]:
    """`base` with the weights `theta_0 + s (theta_f - theta_0)` within the context: a synthetic checkpoint.

    The weights are fp32 there, whatever dtype they are stored in: in 16 bits most steps of a fine-tuning round away.
    At s = 0 and s = 1 they are exactly the two models'. Afterwards `base` has the same tensors as before. The context
    costs one more copy of the weights.

    With D = theta_0 - theta_f over all parameters, the mean of the total score over s in [0, 1] is how far the loss
    falls, L(theta_0) - L(theta_f), except for an embedding's `padding_idx` row, to which autograd gives no gradient.

    Raises:
        ModelError: The two models have parameters of different names or shapes.
    """
    ends = [{name: w for name, w in end.model.named_parameters() if w.is_floating_point()} for end in (base, final)]
    shapes = [{name: tuple(weight.shape) for name, weight in end.items()} for end in ends]
    if shapes[0] != shapes[1]:
        name = min(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise ModelError(
            f"{base.path} and {final.path} have no line between them: {name} is {shapes[0].get(name, 'absent')} in one "
            f"and {shapes[1].get(name, 'absent')} in the other"
        )
    before = {name: weight.data for name, weight in ends[0].items()}
    try:
        for name, weight in ends[0].items():
            weight.data = torch.lerp(before[name].float(), ends[1][name].data.to(weight.device).float(), s)
        yield base
    finally:
        for name, weight in ends[0].items():
            weight.data = before[name]


@dataclass(frozen=True)
class Owner:
    """A module that owns some of the direction's parameters."""

    kind: str
    """One of "linear", "embedding" and "norm"."""
    module: nn.Module
    owned: dict[str, str]
    """From the module's own name of a parameter (weight, bias) to the direction's name."""


def owners_of(model: LoadedModel, direction: Direction) -> dict[str, Owner]:
    """Every module that owns a parameter of the direction, by the module's name; a tied weight has several owners."""
    names = {id(weight): name for name, weight in model.model.named_parameters()}
    if not direction:
        raise SettingError("the direction has no parameter")
    if unknown := direction.keys() - names.values():
        raise SettingError(f"{model.path} has no parameter {min(unknown)}; a tied weight goes by its first name alone")
    linear = {id(module) for _, module in model.uses(model.layers("*"))}
    owners = {}
    for module_name, module in model.model.named_modules():
        parameters = {local: names[id(weight)] for local, weight in module.named_parameters(recurse=False)}
        if owned := {local: name for local, name in parameters.items() if name in direction}:
            owners[module_name] = Owner(_kind(module, owned, id(module) in linear), module, owned)
            for local, name in owned.items():
                _check_shape(name, direction[name], module, module.get_parameter(local))
    return owners


def _kind(module: nn.Module, owned: dict[str, str], is_linear: bool) -> str:
    if is_linear and owned.keys() <= {"weight", "bias"}:
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "Norm" in type(module).__name__ and not any(module.children()):
        return "norm"
    raise ModelError(
        f"no closed form for the gradient of {next(iter(owned.values()))}, a parameter of a {type(module).__name__}: "
        "leave it out of the direction"
    )


def _check_shape(name: str, direction: ParameterDirection, module: nn.Module, weight: Tensor) -> None:
    shape = tuple(weight.shape)
    shapes = [tuple(x.shape) for x in (direction if isinstance(direction, tuple) else (direction,))]
    if isinstance(direction, tuple):
        ends = shapes[0][:1] + shapes[1][1:]
        is_stored_as_gradient = isinstance(module, nn.Linear | nn.Embedding)
        fits = shapes[0][1:] == shapes[1][:1] and (ends if is_stored_as_gradient else ends[::-1]) == shape
    else:
        fits = shapes == [shape]
    if not fits:
        raise SettingError(f"the direction is {' times '.join(map(str, shapes))} for {name}, which is {shape}")


def _placed(direction: ParameterDirection, module: nn.Module, device: torch.device) -> ParameterDirection:
    """A matrix' direction on a device, laid out as the gradient: [o i]."""
    if isinstance(direction, tuple):
        return direction[0].to(device), direction[1].to(device)
    return (direction if isinstance(module, nn.Linear | nn.Embedding) else direction.T).to(device)


@dataclass
class Ghost:
    """Consumes one backward pass into inner products with a direction, and squared norms if requested."""

    owners: dict[str, Owner]
    batch: Batch
    direction: Direction
    norms: bool
    scale: SlopeScale = field(default_factory=SlopeScale)
    """Factors that slopes of embeddings and norms still have."""
    dots: dict[str, Float32[Tensor, " b"]] = field(default_factory=dict)
    squares: dict[str, Float32[Tensor, " b"]] = field(default_factory=dict)
    embedded: dict[str, tuple[Int64[Tensor, "b t"], Float32[Tensor, "b t i"]]] = field(default_factory=dict)
    """Ids and slopes by embedding: the norm of one that is tied to the head needs them when the head comes, last."""

    def hooks(self) -> Iterator[Any]:
        """Tap embeddings and norms; `backward` itself taps linear layers."""
        for owner in self.owners.values():
            if owner.kind == "embedding":
                yield owner.module.register_forward_pre_hook(self._by_example)
            if owner.kind != "linear":
                yield owner.module.register_forward_hook(partial(self._tap, owner), with_kwargs=True)

    def _by_example(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Repeat position ids that all examples share [1 t] for each example, so that their slopes stay separate."""
        if torch.is_grad_enabled() and args and args[0].shape[:-1].numel() == 1:
            return args[0].expand(len(self.batch.ids), -1), *args[1:]
        return args

    def _tap(self, owner: Owner, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return out
        if len(args) != 1 or kwargs:
            name = next(iter(owner.owned.values()))
            raise ModelError(f"the module of {name} reads more than its input: leave it out of the direction")
        if not out.requires_grad:
            out.requires_grad_()
        add = self.add_embedding if owner.kind == "embedding" else self.add_norm
        return Tap.apply(out, args[0].detach(), partial(add, owner), False)  # type: ignore[return-value]

    def add_linear(self, captured: Captured) -> None:
        """Add one linear layer's weight and bias, or a chunk of the output head's."""
        owner, a, g = self.owners[captured.layer], captured.a, captured.g
        if "bias" in owner.owned:
            self._add_vectors(owner.owned["bias"], g.sum(1), captured.rows)
        if "weight" not in owner.owned:
            return
        name = owner.owned["weight"]
        dots = position_dots(a, g, _placed(self.direction[name], owner.module, g.device)).sum(1)
        squares = squared_norms(a, g) if self.norms else None
        is_tied = captured.rows is not None and name in self.embedded
        if squares is not None and is_tied:  # |E + H|^2 = |E|^2 + |H|^2 + 2 <E, H>, of the embedding and the head
            ids, slopes = (x[captured.rows].to(g.device) for x in self.embedded.pop(name))
            slopes_at_ids = g.gather(2, ids[:, None].expand(-1, g.shape[1], -1))  # [b s t]
            squares = squares + 2 * (torch.bmm(a, slopes.mT) * slopes_at_ids).sum((1, 2))
        self._add(name, dots, squares, captured.rows, is_second=is_tied)

    @torch.no_grad()
    def add_embedding(self, owner: Owner, ids: Int64[Tensor, "b t"], g: Float[Tensor, "b t d"]) -> None:
        """Add an embedding's weight: each example touches the rows of its own tokens."""
        name = owner.owned["weight"]
        if ids.shape != self.batch.ids.shape:
            raise ModelError(f"{name} is read at ids of {tuple(ids.shape)}: leave it out of the direction")
        g = embedding_slopes(owner.module, ids, self.scale.undone(g))
        direction = _placed(self.direction[name], owner.module, g.device)
        rows = direction[0][ids] @ direction[1] if isinstance(direction, tuple) else direction[ids]
        squares = None
        if self.norms:  # positions of one token add up in its row
            squares = (torch.bmm(g, g.mT) * (ids[:, :, None] == ids[:, None])).sum((1, 2))
            self.embedded[name] = ids, g
        self._add(name, (g * rows).sum((1, 2)), squares)

    @torch.no_grad()
    def add_norm(self, owner: Owner, x: Float[Tensor, "..."], g: Float[Tensor, "..."]) -> None:
        """Add a norm's gain and bias, whose entries each touch one channel."""
        zeros = {local: torch.zeros_like(weight).float() for local, weight in owner.module.named_parameters()}
        b, at_zero = len(self.batch.ids), functional_call(owner.module, zeros, (x.float(),))
        for local, name in owner.owned.items():
            shape = zeros[local].shape
            if len(g) not in (b, self.batch.ids.numel()) or g.shape[g.dim() - len(shape) :] != shape:
                raise ModelError(f"{name} shapes outputs of {tuple(g.shape)}, which cannot be told apart by example")
            unit = functional_call(owner.module, zeros | {local: torch.ones_like(zeros[local])}, (x.float(),)) - at_zero
            self._add_vectors(name, (self.scale.undone(g).float() * unit).reshape(b, -1, shape.numel()).sum(1))

    def _add_vectors(self, name: str, vectors: Float32[Tensor, "b d"], rows: Int64[Tensor, " b"] | None = None) -> None:
        """Add the gradients of a gain or a bias, which are no larger than an activation."""
        direction = self.direction[name]
        assert not isinstance(direction, tuple), name  # `_check_shape` takes pairs only for matrices
        squares = vectors.square().sum(1) if self.norms else None
        self._add(name, vectors @ direction.to(vectors.device).flatten(), squares, rows)

    def _add(
        self, name: str, dots: Tensor, squares: Tensor | None, rows: Tensor | None = None, *, is_second: bool = False
    ) -> None:
        device, b = self.batch.ids.device, len(self.batch.ids)
        places = torch.arange(b, device=device) if rows is None else rows.to(device)
        if squares is not None and name in self.squares and not is_second:
            raise ModelError(f"several modules use {name} in a forward pass, so its gradient's norm is not known")
        for table, values in ((self.dots, dots), (self.squares, squares)):
            if values is not None:
                table.setdefault(name, torch.zeros(b, device=device)).index_add_(0, places, values.to(device))

    def result(self, losses: TokenLosses) -> Dots:
        """The inner products in the direction's order; zeros for a parameter that the loss does not reach."""
        zeros, finite = torch.zeros_like(losses.loss), losses.loss.isfinite()

        def table(by_name: dict[str, Tensor]) -> Tensor:
            stacked = torch.stack([by_name.get(name, zeros) for name in self.direction])
            return torch.where(finite & stacked.isfinite().all(0), stacked, torch.nan)

        squares = table(self.squares).clamp(min=0) if self.norms else None  # Gram sums can round below zero
        return Dots(tuple(self.direction), table(self.dots), losses, squares)
