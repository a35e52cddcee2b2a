"""Inner products of each example's gradient with a direction, from a pass that somebody else runs.

`ghost.per_example_dot` runs a pass of its own. While a model trains there is one already, and a direction that is only
known when it is over: the batch's own gradient, its clipping and the optimizer's moments are part of it. So what every
module that owns a trained weight read and got back is kept, `(x, g)`, and multiplied afterwards, by the closed forms of
`ghost`. No second pass is needed, and dropout's masks are the ones of the training itself.

g is the slope of the loss that was differentiated. A loss that is a mean over a batch's supervised tokens gives it each
example's share w already (its tokens over the batch's): what comes out is w <D, gradient of the example's mean loss>.

Memory: inputs and slopes of all owners, until they are dropped. The pass itself does not change by a bit.
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


class _Spread(torch.autograd.Function):
    """An output that all examples share [1 t d], once for each [b t d]: its slopes are handed over before they add up.

    Adding them is what autograd does where such an output joins the others, in the same order: not a bit changes.
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
class Overheard:
    """What the owners of some weights read and got back, in one forward and backward pass over a batch."""

    owners: Mapping[str, Owner]
    """By name; see `ghost.owners_of`."""
    batch: Batch
    """What the pass is over, on the model's device."""
    kept: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    """Owner, input, slope at its output; from the last owner to the first."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what owners read and get back of passes that are run meanwhile.

        Raises:
            ModelError: An owner reads more than one input, or is called on what cannot be told apart by example.
        """
        hooks = [
            owner.module.register_forward_hook(partial(self._tap, where), with_kwargs=True)
            for where, owner in self.owners.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def dots(self, direction: Direction) -> Float32[Tensor, " b"]:
        """Inner product of each example's part of the loss that was differentiated with a direction.

        Args:
            direction: Of all weights of the owners.

        Returns:
            Nats. Positive: a small step *against* the direction lowers the example's part of the loss.
        """
        ghost = Ghost(dict(self.owners), self.batch, direction, norms=False)
        for where, x, g in self.kept:
            owner = self.owners[where]
            if owner.kind == "linear":
                ghost.linear(Captured(where, x.float(), g.float(), None))
            elif owner.kind == "embedding":
                ghost.embedding(owner, x, g)
            else:
                ghost.norm(owner, x, g)
        zeros = torch.zeros(len(self.batch.ids), device=self.batch.ids.device)
        return torch.stack([zeros, *ghost.dots.values()]).sum(0)

    def _tap(self, where: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return out
        owner, (b, t) = self.owners[where], self.batch.ids.shape
        name = next(iter(owner.owned.values()))
        if len(args) != 1 or kwargs:
            raise ModelError(f"the module of {name} reads more than its input, so its gradient has no closed form here")
        x, keep = args[0].detach(), partial(self._keep, where)
        if owner.kind == "embedding" and b > 1 and x.shape == (1, t):  # position ids that all examples share
            return _Spread.apply(out, x, b, keep)  # type: ignore[return-value]
        if owner.kind == "linear" and x.shape[:-1].numel() != b * t:
            raise ModelError(
                f"the module of {name} is called on {x.shape[:-1].numel()} positions of a batch of {b} x {t}, so its "
                "inputs cannot be told apart by example"
            )
        return Tap.apply(out, x, keep, False)  # type: ignore[return-value]

    def _keep(self, where: str, x: Tensor, g: Tensor) -> None:
        if self.owners[where].kind == "linear":
            b, t = self.batch.ids.shape
            x, g = x.reshape(b, t, -1), g.reshape(b, t, -1)
        self.kept.append((where, x, g))
