"""What Adam makes of an example's gradient: the features of LESS, one layer at a time.

A checkpoint's moments m1 and m2 after t steps are the same for every example; g is the example's own gradient, of a
mean loss, as the gradients that the moments come from:

    n1 = b1 m1 + (1 - b1) g                     n2 = b2 m2 + (1 - b2) g^2
    torch    (n1 / (1 - b1^(t+1))) / (sqrt(n2 / (1 - b2^(t+1))) + eps)         minus the step / lr that AdamW takes next
    less     n1 / sqrt(n2 + eps)                                               the formula of LESS' released code

Betas, eps and t are those of the checkpoint (LESS always uses .9, .999 and 1e-8). `less` does not correct for the
moments' start at 0, and its eps under the root keeps the denominator above 1e-4: if n2 is below eps, as for most
weights of a large adapter, the result is momentum, hardly scaled. `torch` is what training does, and the default.

With the second moment frozen, g^2 is left out of n2, and f = offset + factor * g is linear in g; see `FrozenGamma`.

Source: Xia et al. 2024, LESS, https://arxiv.org/abs/2402.04333, section 3.1 and its code; Kingma and Ba 2015, Adam,
https://arxiv.org/abs/1412.6980. Weight decay and the clipping of a batch's gradient have no part in either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.models.moments import Moments


@dataclass(frozen=True)
class _Terms:
    """Constants of one layer in f = (base1 + share1 g) / (sqrt(base2 + share2 g^2) + eps)."""

    base1: Float32[Tensor, "o i"]
    base2: Float32[Tensor, "o i"]
    share1: float
    share2: float
    eps: float

    def to(self, device: torch.device) -> "_Terms":
        """The same constants on another device."""
        return replace(self, base1=self.base1.to(device), base2=self.base2.to(device))


def _terms(moments: Moments, mode: str) -> _Terms:
    first, second = moments.betas
    if mode == "less":
        base2 = (second * moments.m2).add_(moments.eps)
        return _Terms(first * moments.m1, base2, 1 - first, 1 - second, 0.0)
    correction1, correction2 = 1 - first ** (moments.step + 1), 1 - second ** (moments.step + 1)
    return _Terms(
        moments.m1 * (first / correction1),
        moments.m2 * (second / correction2),
        (1 - first) / correction1,
        (1 - second) / correction2,
        moments.eps,
    )


class Gamma:
    """From a layer's gradients to what Adam makes of them. A gradient of 0 becomes the momentum's own step, not 0.

    Args:
        moments: Moments of every traced layer at one checkpoint.
        mode: "torch" or "less".
    """

    def __init__(self, moments: Mapping[str, Moments], *, mode: str):
        self._terms = {layer: _terms(layer_moments, mode) for layer, layer_moments in moments.items()}

    def __call__(self, gradient: Float32[Tensor, "b o i"], layer: str) -> Float32[Tensor, "b o i"]:
        """Each example's step alone, negated and divided by the learning rate (`torch`); see the module's text."""
        terms = self._terms[layer] = self._terms[layer].to(gradient.device)
        denominator = torch.addcmul(terms.base2, gradient, gradient, value=terms.share2).sqrt_()
        if terms.eps:
            denominator += terms.eps
        return torch.add(terms.base1, gradient, alpha=terms.share1).div_(denominator)


class FrozenGamma:
    """The same with the second moment held fixed: f = offset + factor * g.

    Args:
        moments: Moments of every traced layer at one checkpoint.
        mode: "torch" or "less".
    """

    def __init__(self, moments: Mapping[str, Moments], *, mode: str):
        self.offsets: dict[str, Float32[Tensor, "o i"]] = {}
        self.factors: dict[str, Float32[Tensor, "o i"]] = {}
        for layer, layer_moments in moments.items():
            terms = _terms(layer_moments, mode)
            denominator = terms.base2.sqrt() + terms.eps
            self.offsets[layer], self.factors[layer] = terms.base1 / denominator, terms.share1 / denominator

    def __call__(self, gradient: Float32[Tensor, "b o i"], layer: str) -> Float32[Tensor, "b o i"]:
        """`factor * g`, without the offset."""
        factor = self.factors[layer] = self.factors[layer].to(gradient.device)
        return gradient * factor
