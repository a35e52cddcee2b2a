"""Inner products of each example's gradient with a direction, from a forward and backward pass that a training runs.

`ghost.per_example_dot` runs its own pass. A training runs one already, and its direction is known only afterwards,
because it depends on the batch's gradient, the clipping and the optimizer's moments. So the input x and the output
slope g of every module that owns a trained weight are recorded during the pass and multiplied afterwards, by the closed
forms of `ghost`. No second pass is needed, and dropout's masks are those of the training itself.

g is the slope of the loss that was differentiated. If that loss is the mean over a batch's supervised tokens, g holds
each example's share w (its tokens over the batch's), and the result is w <D, gradient of the example's mean loss>.

Memory: inputs and slopes of all owners, until they are dropped. The recorded pass keeps every bit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.corpus.tokens import Batch
from whence.errors import ModelError
from whence.gradients.capture import Captured, Tap
from whence.gradients.ghost import Direction, Ghost, Owner


class _Repeat(torch.autograd.Function):
    """Repeat an output that all examples share [1 t d] for each [b t d], to get at its slopes before they are added.

    Autograd adds them anyway where such an output meets the others, in the same order, so no bit changes.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, b: int, hand_over: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.b, ctx.hand_over = b, hand_over
        return out.expand(b, *out.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, g = ctx.saved_tensors[0], gradients[0]
        ctx.hand_over(x.expand(ctx.b, *x.shape[1:]), g)
        return g.sum(0, keepdim=True), None, None, None


@dataclass
class RecordedPass:
    """Inputs and output slopes of the owners of some weights, in one forward and backward pass over a batch."""

    owners: Mapping[str, Owner]
    """Owners by module name; see `ghost.owners_of`."""
    batch: Batch
    """The batch of the pass, on the model's device."""
    records: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    """Owner, input and output slope, from the last owner to the first."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the passes that run within the context.

        Raises:
            ModelError: An owner reads more than one input, or its inputs cannot be told apart by example.
        """
        hooks = [
            owner.module.register_forward_hook(partial(self._tap, name), with_kwargs=True)
            for name, owner in self.owners.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def dots(self, direction: Direction) -> Float32[Tensor, " b"]:
        """Inner product of a direction with the gradient of each example's share of the differentiated loss.

        Args:
            direction: A direction for all weights of the owners.

        Returns:
            Nats. Positive: a small step *against* the direction lowers the example's share of the loss.
        """
        ghost = Ghost(dict(self.owners), self.batch, direction, norms=False)
        for name, x, g in self.records:
            owner = self.owners[name]
            if owner.kind == "linear":
                ghost.add_linear(Captured(name, x.float(), g.float(), None))
            elif owner.kind == "embedding":
                ghost.add_embedding(owner, x, g)
            else:
                ghost.add_norm(owner, x, g)
        zeros = torch.zeros(len(self.batch.ids), device=self.batch.ids.device)
        return torch.stack([zeros, *ghost.dots.values()]).sum(0)

    def _tap(self, owner_name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return out
        owner, (b, t) = self.owners[owner_name], self.batch.ids.shape
        name = next(iter(owner.owned.values()))
        if len(args) != 1 or kwargs:
            raise ModelError(f"the module of {name} reads more than its input, so its gradient has no closed form here")
        x, record = args[0].detach(), partial(self._record, owner_name)
        if owner.kind == "embedding" and b > 1 and x.shape == (1, t):  # position ids that all examples share
            return _Repeat.apply(out, x, b, record)  # type: ignore[return-value]
        if owner.kind == "linear" and x.shape[:-1].numel() != b * t:
            raise ModelError(
                f"the module of {name} is called on {x.shape[:-1].numel()} positions of a batch of {b} x {t}, so its "
                "inputs cannot be told apart by example"
            )
        return Tap.apply(out, x, record, False)  # type: ignore[return-value]

    def _record(self, owner_name: str, x: Tensor, g: Tensor) -> None:
        if self.owners[owner_name].kind == "linear":
            b, t = self.batch.ids.shape
            x, g = x.reshape(b, t, -1), g.reshape(b, t, -1)
        self.records.append((owner_name, x, g))
