"""What is differentiated at a token, and its slope with respect to the logits, in fp32 whatever the model's dtype.

With p the softmax of logits and y the label, the slope of the loss -log p_y is `p - 1` at y and p elsewhere. Near p = 1
a subtraction leaves no digit (in fp32 it gives a multiple of 6e-8), so 1 - p is summed over the other tokens there. The
slope of the margin -log(p_y / (1 - p_y)) is -1 at y, and the softmax over the others elsewhere; dividing the loss's
slope by 1 - p would lose all digits in the same place.

Source of the margin: TRAK, Park et al. 2023, https://arxiv.org/abs/2303.14186.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SURE = 0.9
"""Probability above which 1 - p is summed. Below it a subtraction has six digits, and the bits of earlier versions."""


@torch.no_grad()
def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each position in nats, unweighted, and the weighted sum's gradient with respect to the logits.

    The gradient replaces the probabilities in place: autograd would fill two more arrays of the vocabulary's size.
    """
    labels = labels.to(logits.device)[:, None]
    log_p = F.log_softmax(logits.float(), dim=1)
    nll = -log_p.gather(1, labels)[:, 0]
    slope = log_p.exp_()
    p = slope.gather(1, labels)
    others = slope.scatter_(1, labels, 0.0).sum(1, keepdim=True)
    slope.scatter_(1, labels, torch.where(p > SURE, -others, p - 1))
    slope *= weights.to(slope)[:, None]
    return nll.to(weights.device), slope


@torch.no_grad()
def margin(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each position in nats, unweighted, and the gradient of the weighted sum of -log(p / (1 - p))."""
    labels = labels.to(logits.device)[:, None]
    nll = -F.log_softmax(logits.float(), dim=1).gather(1, labels)[:, 0]
    slope = logits.float().scatter(1, labels, -torch.inf).softmax(1)
    slope.scatter_(1, labels, -1.0)
    slope *= weights.to(slope)[:, None]
    return nll.to(weights.device), slope


def sure_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each position in nats, as log(1 + (1 - p) / p), whose slope by autograd has its digits near p = 1."""
    logits, labels = logits.float(), labels[:, None]
    others = logits.scatter(1, labels, -torch.inf).logsumexp(1)
    return F.softplus(others - logits.gather(1, labels)[:, 0])


SlopeOf = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From logits [s v], labels [s] and weights [s] to losses [s] and the objective's gradient [s v], both in fp32."""
OBJECTIVES: dict[str, SlopeOf] = {"loss": cross_entropy, "margin": margin}
"""What is differentiated at a token, by name."""
