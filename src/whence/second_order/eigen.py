"""The eigenbases of K-FAC's factors, EK-FAC's eigenvalues in them, and products with powers of the damped curvature.

With A = U_a diag(alpha) U_a^T and S = U_s diag(sigma) U_s^T, a matrix Q (o x i) has in the eigenbasis the entries
U_s^T Q U_a, and the curvature multiplies each by its eigenvalue

    K-FAC     sigma_j alpha_k / (M N)
    EK-FAC    E_n[(U_s^T G_n U_a)_jk^2]

EK-FAC's are the best there are in this basis (in the Frobenius norm), and cost a second pass. The damped inverse
divides by the eigenvalue plus d: `damping` times the mean of the layer's eigenvalues.

Source: George et al. 2018, https://arxiv.org/abs/1806.03884 (EK-FAC); Grosse et al. 2023,
https://arxiv.org/abs/2308.03296, section 3 (damping of .1 of the mean).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from whence.corpus.tokens import Encoded
from whence.gradients.capture import Captured, example_gradients
from whence.gradients.exact import FORMED_AT_ONCE
from whence.models.loading import LoadedModel, device_of
from whence.second_order.factors import Factors
from whence.second_order.fisher import TOKENS_PER_BATCH, fisher_passes

DAMPING = 0.1
"""Of the mean eigenvalue of a layer."""


@dataclass(frozen=True)
class LayerCurvature:
    """One layer's curvature: an orthogonal basis, and an eigenvalue for each pair of its vectors."""

    inputs: Float32[Tensor, "i i"]
    """U_a, a vector a column."""
    slopes: Float32[Tensor, "o o"]
    """U_s."""
    eigenvalues: Float32[Tensor, "o i"]
    """Of the Fisher matrix of a row's loss, which is the sum over its tokens; nats squared over weights squared."""

    def to(self, device: torch.device) -> "LayerCurvature":
        """The same on a device."""
        return LayerCurvature(self.inputs.to(device), self.slopes.to(device), self.eigenvalues.to(device))

    def rotated(self, gradients: Float[Tensor, "*b o i"]) -> Float[Tensor, "*b o i"]:
        """Matrices in the eigenbasis."""
        return self.slopes.T @ gradients @ self.inputs

    def power(
        self, gradients: Float[Tensor, "*b o i"], exponent: float, *, damping: float = DAMPING
    ) -> Float[Tensor, "*b o i"]:
        """Product of a power of the damped curvature with some matrices.

        Args:
            gradients: The matrices.
            exponent: -1 for the inverse, -0.5 for its root.
            damping: See the module's text.

        Where the damped eigenvalue is 0, as in a layer that no row reaches, the product is 0.
        """
        damped = self.eigenvalues + damping * self.eigenvalues.mean()
        factors = torch.where(damped > 0, damped.clamp(min=1e-38).pow(exponent), 0.0)
        here = self.to(gradients.device)
        return here.slopes @ (here.rotated(gradients) * factors.to(gradients.device)) @ here.inputs.T


Curvature = dict[str, LayerCurvature]
"""By layer."""


def kfac(factors: Mapping[str, Factors]) -> Curvature:
    """The curvature as K-FAC has it."""
    return {name: _kfac(layer) for name, layer in factors.items()}


def _kfac(factors: Factors) -> LayerCurvature:
    (alpha, inputs), (sigma, slopes) = (
        torch.linalg.eigh((matrix + matrix.T).double() / 2) for matrix in (factors.inputs, factors.slopes)
    )
    pairs = max(1, factors.positions) * max(1, factors.rows)
    eigenvalues = torch.outer(sigma.clamp_(min=0), alpha.clamp_(min=0)) / pairs
    return LayerCurvature(inputs.float(), slopes.float(), eigenvalues.float())


@dataclass
class _Squares:
    """Consumes backward passes into sums of squared entries in the eigenbasis."""

    curvature: Curvature
    sums: dict[str, Tensor]

    def __call__(self, captured: Captured) -> None:
        layer, sums = self.curvature[captured.layer], self.sums[captured.layer]
        a, g = (
            captured.a.float() @ layer.inputs.to(captured.a.device),
            captured.g.float() @ layer.slopes.to(captured.a.device),
        )
        step = max(1, FORMED_AT_ONCE // sums.numel())
        for some_a, some_g in zip(a.split(step), g.split(step), strict=True):
            sums += example_gradients(some_a, some_g).square_().sum(0).to(sums)


def ekfac_sums(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    curvature: Curvature,
    rows: Sequence[Encoded],
    *,
    seed: int = 0,
    is_empirical: bool = False,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> dict[str, Float32[Tensor, "o i"]]:
    """Sums over rows of (U_s^T G_n U_a)^2, by layer; those of parts of a corpus add up.

    For the arguments see `fisher.fisher_passes`.
    """
    squares = _Squares(
        curvature,
        {
            name: torch.zeros_like(curvature[name].eigenvalues, device=device_of(layer))
            for name, layer in layers.items()
        },
    )
    for _ in fisher_passes(model, layers, rows, squares, seed=seed, is_empirical=is_empirical,
                           tokens_per_batch=tokens_per_batch):  # fmt: skip
        pass
    return squares.sums


def ekfac(curvature: Curvature, sums: Mapping[str, Float32[Tensor, "o i"]], rows: int) -> Curvature:
    """K-FAC's curvature with EK-FAC's eigenvalues, from `ekfac_sums` over so many rows."""
    return {name: LayerCurvature(layer.inputs, layer.slopes, sums[name] / max(1, rows))
            for name, layer in curvature.items()}  # fmt: skip
