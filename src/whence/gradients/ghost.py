"""Inner products of each example's loss gradient with a fixed direction in weight space; no gradient is formed.

Every module that Whence knows to own weights (linear layers, `Conv1D`, a LoRA's A and B, embeddings, the gains and
biases of norms) is affine in them. With `f(x; w)` its output, its own parameters set to w, and g the loss gradient
there, an example's gradient has with the direction D the inner product

    <gradient, D> = sum over positions of g . (f(x; D) - f(x; 0))                                (ghost dot product)

which is `g^T D a` for a weight, two thin products if D is a low-rank pair; `g . D[id]` for an embedding's row; and
for a gain or a bias the sum over positions of g times the unit response, times D. One ordinary backward pass gives
every g (`gradients.backward`), so all layers cost about as much as training's forward and backward. A tied embedding
is one parameter of two uses, and both terms are added.

`head_scores` needs no backward pass: at the output head g is `softmax - one-hot`, so the head alone costs one more
product of the logits' size than a forward pass.

Sign: what is returned is the plain inner product with D, nothing turned. For "did this example make theta_f of
theta_0", give D = theta_0 - theta_f: descent moves weights against the gradient, so members tend to score above
0, and the score is to first order by how many nats the move lowers the example's loss.

Sums are in fp32. An example whose loss, gradient or score is not finite scores NaN, and only that one. Parameters of
other modules (fused experts, convolutions) are refused; a weight that is read without its module being called is not
noticed, and counts 0.

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
    OBJECTIVES,
    Captured,
    Tap,
    TokenLosses,
    backward,
    squared_norms,
)
from whence.models.loading import LoadedModel

Part = Float32[Tensor, "..."] | tuple[Float32[Tensor, "_ _"], Float32[Tensor, "_ _"]]
"""The direction's part of one parameter: a tensor of its shape; or for a matrix, left [o r] and right [r i], of which
the product is meant. A pair stands as the gradient does, [o i], also where `Conv1D` stores [i o]."""
Direction = Mapping[str, Part]
"""By name in `LoadedModel.model.named_parameters()`, where a tied weight stands once. On the model's devices, if moving
it at every batch is to be spared."""


@dataclass(frozen=True)
class Dots:
    """Inner products of a batch's gradients with a direction."""

    parameters: tuple[str, ...]
    """Rows of `dots`, in the direction's order."""
    dots: Float32[Tensor, "p b"]
    """By parameter: which layers speak. NaN for an example that has anything not finite."""
    losses: TokenLosses
    """Of the same pass."""
    squares: Float32[Tensor, "p b"] | None = None
    """Squared norm of each example's gradient by parameter, where asked for."""

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


def position_dots(a: Float[Tensor, "*s i"], g: Float[Tensor, "*s o"], weight: Part) -> Float[Tensor, "*s"]:
    """`g^T D a` of each position, for a direction D [o i] or its pair (left, right). The smaller middle is formed."""
    if isinstance(weight, tuple):
        left, right = weight
        return ((g @ left) * (a @ right.T)).sum(-1)
    if g.shape[-1] > a.shape[-1]:
        return ((g @ weight) * a).sum(-1)
    return ((a @ weight.T) * g).sum(-1)


def per_example_dot(
    model: LoadedModel, batch: Batch, direction: Direction, *, reduction: str = "mean", norms: bool = False
) -> Dots:
    """Inner product of each example's loss gradient with a direction, exact, by parameter.

    Args:
        model: Frozen, in evaluation mode.
        batch: On any device.
        direction: See `Direction`. What it leaves out counts as 0, and nothing below its first layer is
            differentiated.
        reduction: Of an example's loss, "mean" over its own supervised tokens, or "sum". Weights that a run trained
            on tokens' mean of a whole batch fit "sum".
        norms: Also take each gradient's squared norm. The head's slopes [b t v] are then kept until the pass ends.

    Returns:
        Nats (loss, times change of weight). Positive: a small step *against* the direction lowers the example's loss.

    Raises:
        SettingError: The direction is empty, or has a name or shape that the model does not.
        ModelError: A parameter's module has no closed form here, or is called on what cannot be told apart by
            example; with `norms`, also if it is used twice in a pass, except for a tied embedding.
    """
    batch = batch.to(model.device)
    ghost = Ghost(owners_of(model, direction), batch, direction, norms)
    linear = {where: owner.module for where, owner in ghost.owners.items() if owner.kind == "linear"}
    hooks = list(ghost.hooks())
    try:
        losses = backward(model, linear, batch, ghost.linear, reduction=reduction, whole=norms, shared=False)
    finally:
        for hook in hooks:
            hook.remove()
    return ghost.result(losses)


@torch.no_grad()
def head_scores(
    model: LoadedModel, batch: Batch, direction: Part, *, reduction: str = "mean"
) -> tuple[Float32[Tensor, " b"], TokenLosses]:
    """Inner product of each example's gradient with a direction, for the output head's weight alone.

    Equal to `per_example_dot` for an untied head; of a tied weight it is the head's use of it. There is no backward
    pass: with `g` the slope at the head's output, `g^T D` is the only product beyond a plain forward pass. A soft cap
    or a scale after the head is differentiated chunk by chunk.

    Args:
        model: Frozen, in evaluation mode.
        batch: On any device.
        direction: Of the head's weight [v i]; or a pair.
        reduction: See `per_example_dot`.

    Returns:
        The scores, in nats, and the losses of the same pass.

    Raises:
        SettingError: The direction does not have the shape of the head's weight.
        ModelError: The head is not a linear layer.
    """
    batch = batch.to(model.device)
    head = model.base.get_output_embeddings()
    head = getattr(head, "base_layer", head)  # an adapter on the head
    if all(head is not layer for layer in model.layers("*").values()):
        raise ModelError(f"{model.path}: its output head is a {type(head).__name__}, not a linear layer")
    _check("the output head's weight", direction, head, head.weight)
    weight = _placed(direction, head, head.weight.device)
    states, decode = model.decode(batch.ids, batch.mask)
    owners, positions = batch.supervised[:, 1:].nonzero(as_tuple=True)  # position t predicts token t + 1
    targets, counts = batch.ids[owners, positions + 1], batch.supervised.sum(1)
    weights = 1 / counts[owners] if reduction == "mean" else torch.ones_like(owners, dtype=torch.float32)
    states = states[owners.to(states.device), positions.to(states.device)]
    nll = torch.zeros(batch.ids.shape, dtype=torch.float32, device=batch.ids.device)
    scores = nll.new_zeros(len(batch.ids))
    size = max(LEAST_POSITIONS, LOGITS_PER_CHUNK.get(model.device.type, 2**20) // head.weight.shape[0])
    for start in range(0, len(owners), size):
        part = slice(start, start + size)
        a, out, logits = _seen_at_head(head, decode, states[part])
        nll[owners[part], positions[part] + 1], g = OBJECTIVES["loss"](logits, targets[part], weights[part])
        if logits.data_ptr() != out.data_ptr() or logits.shape != out.shape:  # a cap or scale; else logits are out
            (g,) = torch.autograd.grad(logits, out, g)
        scores.index_add_(0, owners[part], position_dots(a.float(), g.float(), weight).to(scores.device))
    loss = nll.sum(1) / counts.clamp(min=1) if reduction == "mean" else nll.sum(1)
    return torch.where(loss.isfinite() & scores.isfinite(), scores, torch.nan), TokenLosses(loss, nll)


def _seen_at_head(head: nn.Module, decode: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and outputs of the head's linear layer for states [s d], and the logits that the model makes of them."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        leaf = out.detach()[0].requires_grad_()
        seen.extend((args[0].detach()[0], leaf))
        return leaf[None]

    hook = head.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = decode(states)
    finally:
        hook.remove()
    a, out = seen
    return a, out, logits


@contextmanager
def interpolated(base: LoadedModel, final: LoadedModel, s: float) -> Iterator[LoadedModel]:
    """`base`, for a while, with the weights `theta_0 + s (theta_f - theta_0)`: a synthetic checkpoint.

    Weights are fp32 meanwhile, whatever dtype they are stored in: in 16 bits most steps of a fine-tune round away. At
    s = 0 and s = 1 they are exactly the two models'. Afterwards `base` has the very tensors that it had before. It
    costs one more copy of the weights.

    With D = theta_0 - theta_f over all parameters, the mean of the total score over s in [0, 1] is how far the loss
    falls, L(theta_0) - L(theta_f); but for an embedding's `padding_idx` row, to which autograd gives no gradient.

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
    """linear, embedding or norm."""
    module: nn.Module
    owned: dict[str, str]
    """From the module's own name of a parameter (weight, bias) to the direction's."""


def owners_of(model: LoadedModel, direction: Direction) -> dict[str, Owner]:
    """Every module that owns a parameter of the direction, by the module's name; a tied weight has several."""
    names = {id(weight): name for name, weight in model.model.named_parameters()}
    if not direction:
        raise SettingError("the direction has no parameter")
    if unknown := direction.keys() - names.values():
        raise SettingError(f"{model.path} has no parameter {min(unknown)}; a tied weight goes by its first name alone")
    linear = {id(module) for _, module in model.uses(model.layers("*"))}
    owners = {}
    for where, module in model.model.named_modules():
        mine = {local: names[id(weight)] for local, weight in module.named_parameters(recurse=False)}
        if owned := {local: name for local, name in mine.items() if name in direction}:
            owners[where] = Owner(_kind(module, owned, id(module) in linear), module, owned)
            for local, name in owned.items():
                _check(name, direction[name], module, module.get_parameter(local))
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


def _check(name: str, part: Part, module: nn.Module, weight: Tensor) -> None:
    shape = tuple(weight.shape)
    found = [tuple(x.shape) for x in (part if isinstance(part, tuple) else (part,))]
    if isinstance(part, tuple):
        ends = found[0][:1] + found[1][1:]
        is_stored_as_gradient = isinstance(module, nn.Linear | nn.Embedding)
        fits = found[0][1:] == found[1][:1] and (ends if is_stored_as_gradient else ends[::-1]) == shape
    else:
        fits = found == [shape]
    if not fits:
        raise SettingError(f"the direction's part is {' times '.join(map(str, found))} for {name}, which is {shape}")


def _placed(part: Part, module: nn.Module, device: torch.device) -> Part:
    """A matrix' direction on a device, as the gradient stands: [o i]."""
    if isinstance(part, tuple):
        return part[0].to(device), part[1].to(device)
    return (part if isinstance(module, nn.Linear | nn.Embedding) else part.T).to(device)


@dataclass
class Ghost:
    """Consumes one backward pass into inner products, and squared norms."""

    owners: dict[str, Owner]
    batch: Batch
    direction: Direction
    norms: bool
    dots: dict[str, Float32[Tensor, " b"]] = field(default_factory=dict)
    squares: dict[str, Float32[Tensor, " b"]] = field(default_factory=dict)
    embedded: dict[str, tuple[Int64[Tensor, "b t"], Float32[Tensor, "b t i"]]] = field(default_factory=dict)
    """By embedding, its ids and their slopes, which the norm needs if it is tied to the head: that comes last."""

    def hooks(self) -> Iterator[Any]:
        """Tap embeddings and norms; `backward` itself taps linear layers."""
        for owner in self.owners.values():
            if owner.kind == "embedding":
                yield owner.module.register_forward_pre_hook(self._by_example)
            if owner.kind != "linear":
                yield owner.module.register_forward_hook(partial(self._tap, owner), with_kwargs=True)

    def _by_example(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Position ids that all examples share [1 t], once for each, so that their slopes come apart."""
        if args and args[0].shape[:-1].numel() == 1:
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
        take = self.embedding if owner.kind == "embedding" else self.norm
        return Tap.apply(out, args[0].detach(), partial(take, owner), False)  # type: ignore[return-value]

    def linear(self, seen: Captured) -> None:
        """Add one linear layer's weight and bias, or a chunk of the output head's."""
        owner, a, g = self.owners[seen.layer], seen.a, seen.g
        if "bias" in owner.owned:
            self._add_vectors(owner.owned["bias"], g.sum(1), seen.rows)
        if "weight" not in owner.owned:
            return
        name = owner.owned["weight"]
        dots = position_dots(a, g, _placed(self.direction[name], owner.module, g.device)).sum(1)
        squares = squared_norms(a, g) if self.norms else None
        is_tied = seen.rows is not None and name in self.embedded
        if squares is not None and is_tied:  # |E + H|^2 = |E|^2 + |H|^2 + 2 <E, H>, of the embedding and the head
            ids, slopes = (x[seen.rows].to(g.device) for x in self.embedded.pop(name))
            own = g.gather(2, ids[:, None].expand(-1, g.shape[1], -1))  # [b s t]
            squares = squares + 2 * (torch.bmm(a, slopes.mT) * own).sum((1, 2))
        self._add(name, dots, squares, seen.rows, is_second=is_tied)

    @torch.no_grad()
    def embedding(self, owner: Owner, ids: Int64[Tensor, "b t"], g: Float[Tensor, "b t d"]) -> None:
        """Add an embedding's rows: of each example, those of its own tokens."""
        weight, name = owner.module.get_parameter("weight"), owner.owned["weight"]
        if ids.shape != self.batch.ids.shape:
            raise ModelError(f"{name} is read at ids of {tuple(ids.shape)}: leave it out of the direction")
        ones = torch.ones_like(weight[:1]).expand_as(weight)
        g = g.float() * functional_call(owner.module, {"weight": ones}, (ids[:1, :1],)).float()  # Gemma scales its rows
        if isinstance(padding := owner.module.padding_idx, int):
            g = g * (ids != padding)[:, :, None]  # a row to which autograd, too, gives no gradient
        part = _placed(self.direction[name], owner.module, g.device)
        rows = part[0][ids] @ part[1] if isinstance(part, tuple) else part[ids]
        squares = None
        if self.norms:  # positions of one token add up in its row
            squares = (torch.bmm(g, g.mT) * (ids[:, :, None] == ids[:, None])).sum((1, 2))
            self.embedded[name] = ids, g
        self._add(name, (g * rows).sum((1, 2)), squares)

    @torch.no_grad()
    def norm(self, owner: Owner, x: Float[Tensor, "..."], g: Float[Tensor, "..."]) -> None:
        """Add a norm's gain and bias, each of which touches its own channel alone."""
        zeros = {local: torch.zeros_like(weight).float() for local, weight in owner.module.named_parameters()}
        b, at_zero = len(self.batch.ids), functional_call(owner.module, zeros, (x.float(),))
        for local, name in owner.owned.items():
            shape = zeros[local].shape
            if len(g) not in (b, self.batch.ids.numel()) or g.shape[g.dim() - len(shape) :] != shape:
                raise ModelError(f"{name} shapes outputs of {tuple(g.shape)}, which cannot be told apart by example")
            unit = functional_call(owner.module, zeros | {local: torch.ones_like(zeros[local])}, (x.float(),)) - at_zero
            self._add_vectors(name, (g.float() * unit).reshape(b, -1, shape.numel()).sum(1))

    def _add_vectors(self, name: str, vectors: Float32[Tensor, "b d"], rows: Int64[Tensor, " b"] | None = None) -> None:
        """Gradients of a gain or a bias, which are no larger than an activation."""
        part = self.direction[name]
        assert not isinstance(part, tuple), name  # `_check` takes pairs for matrices alone
        squares = vectors.square().sum(1) if self.norms else None
        self._add(name, vectors @ part.to(vectors.device).flatten(), squares, rows)

    def _add(
        self, name: str, dots: Tensor, squares: Tensor | None, rows: Tensor | None = None, *, is_second: bool = False
    ) -> None:
        device, b = self.batch.ids.device, len(self.batch.ids)
        places = torch.arange(b, device=device) if rows is None else rows.to(device)
        if squares is not None and name in self.squares and not is_second:
            raise ModelError(f"{name} is used twice in a forward pass, so its gradient's norm is not known")
        for into, found in ((self.dots, dots), (self.squares, squares)):
            if found is not None:
                into.setdefault(name, torch.zeros(b, device=device)).index_add_(0, places, found.to(device))

    def result(self, losses: TokenLosses) -> Dots:
        """In the direction's order; zeros for a parameter that the loss does not reach."""
        zeros, finite = torch.zeros_like(losses.loss), losses.loss.isfinite()

        def table(found: dict[str, Tensor]) -> Tensor:
            stacked = torch.stack([found.get(name, zeros) for name in self.direction])
            return torch.where(finite & stacked.isfinite().all(0), stacked, torch.nan)

        squares = table(self.squares).clamp(min=0) if self.norms else None  # Gram sums can round below zero
        return Dots(tuple(self.direction), table(self.dots), losses, squares)
