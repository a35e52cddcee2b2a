"""Merged models: the weights of a mixture that nobody trained, one parameter at a time.

With theta_0 the parent, theta_u the members of a pool, and w_u >= 0 a mixture's weights,

    theta(w) = theta_0 + scale * sum over u of w_u (theta_u - theta_0)                            (weighted mean)

`scale` is task arithmetic's; 1 gives the plain weighted mean of weights that sum to 1. Linear layers may be averaged by
RegMean instead (`averages`).

Sums are in fp32, one tensor at a time, in the order of the members. One member at weight 1 is that member bit for bit.

Sources: Na et al. 2024, https://arxiv.org/abs/2410.15661 (uniform means); task arithmetic, Ilharco et al. 2023,
https://arxiv.org/abs/2212.04089.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxtyping import Float32
from torch import Tensor

from whence.ablation.averages import RegMean, mean
from whence.ablation.mixtures import Mixture, checked_mixture
from whence.ablation.pool import MemberWeights, Pool
from whence.errors import SettingError
from whence.models.weights import Weights

LARGEST_SCALE = 1_000
"""Factors that are of use are about 1."""


def merged_tensors(
    pool: Pool, mixture: Mixture, *, scale: float = 1.0, regmean: RegMean | None = None
) -> Iterator[tuple[str, Float32[Tensor, "..."]]]:
    """A mixture's parameters, one at a time, by their names in the parent's files.

    Args:
        pool: Parent and members.
        mixture: Weights that sum to 1.
        scale: Factor of the move away from the parent.
        regmean: Averages linear layers; None: the mean does.
    """
    model = MergedModel.of(pool, mixture, scale, regmean)
    for name in model.start.files:
        yield name, model.tensor(name)


@dataclass(frozen=True)
class MergedModel:
    """A mixture's merged model; each parameter is computed when it is read."""

    start: Weights
    members: Mapping[str, MemberWeights]
    weights: Mixture
    scale: float
    regmean: RegMean | None

    @staticmethod
    def of(pool: Pool, mixture: Mixture, scale: float, regmean: RegMean | None) -> "MergedModel":
        """The merged model of a mixture, which is checked."""
        weights = checked_mixture(mixture, pool.members)
        members = {partition: pool.member(partition) for partition in weights}
        return MergedModel(pool.start(), members, weights, scale, regmean)

    def tensor(self, name: str) -> Float32[Tensor, "..."]:
        """A merged parameter in fp32; memory holds one tensor a member meanwhile."""
        parent = self.start.read(name).float()
        stored = {partition: member.read(name, parent) for partition, member in self.members.items()}
        tensors = {partition: parent if tensor is None else tensor for partition, tensor in stored.items()}
        has_moved = any(tensor is not None for tensor in stored.values())
        merged = self.regmean.merged(name, tensors, self.weights) if self.regmean and has_moved else None
        if merged is None:
            merged = mean(tensors, self.weights)
        return merged if self.scale == 1.0 else parent + self.scale * (merged - parent)


def check_scale(scale: float) -> None:
    """Check that a scale is a number, and not so large that no weight would be left of the parent's size.

    Raises:
        SettingError: It is not.
    """
    if not abs(scale) <= LARGEST_SCALE:
        raise SettingError(f"--scale {scale:g}: a number from -{LARGEST_SCALE:,} to {LARGEST_SCALE:,} is expected")
