"""Averages of one parameter over the members of a mixture: the weighted mean, and RegMean for linear layers.

    mean      sum over u of w_u theta_u
    RegMean   of a linear layer with inputs X_u, G_u = X_u^T X_u over the real tokens of u, off-diagonals times alpha:
              W^T = (sum of w_u G_u)^-1 sum of w_u G_u W_u^T, damped by `DAMPING` of the mean diagonal

which at alpha 1 is the layer with the smallest sum of w_u |X_u W^T - X_u W_u^T|^2. RegMean takes weights of linear
layers alone: embeddings, a head tied to one, norms, biases, and layers without a matrix of inputs (`gram_matrices`) are
averaged by the mean. Of an adapter it takes the layer with B A added.

Means are in fp32, in the order of the weights; RegMean's sums and its solution in float64.

Source: RegMean, Jin et al. 2023, https://arxiv.org/abs/2212.09849.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from whence.ablation.mixtures import Mixture
from whence.errors import SettingError

DAMPING = 1e-6
"""Share of the mean diagonal that is added to the diagonal."""
ALPHA = 0.1
"""RegMean's factor of off-diagonals in the configurations of its released code."""

Grams = Mapping[str, Mapping[str, Float32[Tensor, "i i"]]]
"""Matrices of inputs by partition and parameter."""


@dataclass(frozen=True, kw_only=True)
class RegMean:
    """Averages linear layers by the matrices of their inputs."""

    grams: Grams
    """Matrices of members' inputs, each read when used; the mean averages a parameter that lacks one in a member."""
    transposed: Collection[str] = ()
    """Parameters that are stored as [i o], as GPT-2's are."""
    alpha: float = ALPHA
    """Factor of off-diagonals, from 0 (a mean by input feature) to 1."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Digest of each member's matrices, for losses that are stored by content."""

    def __post_init__(self):
        _check_alpha(self.alpha)

    def merged(self, name: str, tensors: Mapping[str, Tensor], weights: Mixture) -> Tensor | None:
        """A parameter of a mixture; None if it has no matrices, or the mixture is of a single member."""
        if len(weights) == 1 or not all(name in self.grams[partition] for partition in weights):
            return None
        grams = {partition: self.grams[partition][name] for partition in weights}
        if name not in self.transposed:
            return regmean(tensors, grams, weights, alpha=self.alpha)
        transposed = {partition: tensor.T for partition, tensor in tensors.items()}
        return regmean(transposed, grams, weights, alpha=self.alpha).T.contiguous()


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise SettingError(f"--alpha {alpha} of RegMean: a number from 0 to 1 is expected")


def mean(tensors: Mapping[str, Float32[Tensor, "*s"]], weights: Mixture) -> Float32[Tensor, "*s"]:
    """Sum of w_u theta_u, in fp32 and in the order of the weights."""
    total: Tensor | None = None
    for partition, weight in weights.items():
        tensor = tensors[partition]
        if total is None:
            total = tensor * weight if weight != 1.0 else tensor.clone()
        else:
            total.add_(tensor, alpha=weight)
    assert total is not None
    return total


def regmean(
    tensors: Mapping[str, Float32[Tensor, "o i"]],
    grams: Mapping[str, Float32[Tensor, "i i"]],
    weights: Mixture,
    *,
    alpha: float = ALPHA,
) -> Float32[Tensor, "o i"]:
    """The linear layer that is nearest to every member's on that member's own inputs; the mean if that is singular.

    Args:
        tensors: Members' weights as torch lays out a linear layer.
        grams: X^T X of each member's inputs over their number.
        weights: Mixture of the members.
        alpha: Factor of the grams' off-diagonals.
    """
    _check_alpha(alpha)
    total, right = torch.zeros(()), torch.zeros(())
    for partition, weight in weights.items():  # not stacked: each has i^2 numbers
        shrunk = weight * shrunk_gram(grams[partition], alpha)
        total, right = total + shrunk, right + shrunk @ tensors[partition].double().T
    damping = DAMPING * total.diagonal().mean()
    right = right + damping * mean(tensors, weights).double().T
    factor, info = torch.linalg.cholesky_ex(total + damping * torch.eye(len(total), dtype=torch.float64))
    if int(info) or not float(damping) > 0:
        return mean(tensors, weights)
    return torch.cholesky_solve(right, factor).T.float()


def shrunk_gram(gram: Float32[Tensor, "i i"], alpha: float) -> Float64[Tensor, "i i"]:
    """The matrix with off-diagonals times alpha."""
    wide = gram.double()
    return alpha * wide + (1 - alpha) * torch.diag(wide.diagonal())
