"""K-FAC's factors: the covariance of a layer's inputs, and that of its slopes.

A row's gradient in a layer is G_n = sum over t of g_t a_t^T (o x i). Over N rows with M positions t at which there is a
slope, with A = sum of a_t a_t^T and S = sum of g_t g_t^T over those positions,

    E[vec(G) vec(G)^T]  is about  (A (x) S) / (M N)                                                          (K-FAC)

as if positions were independent of one another, and inputs of slopes. Factors are sums in fp32, so that those of parts
of a corpus add up to those of the whole.

Source: Martens and Grosse 2015, https://arxiv.org/abs/1503.05671; for language models, Grosse et al. 2023,
https://arxiv.org/abs/2308.03296, section 2.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from whence.corpus.tokens import Encoded
from whence.gradients.capture import Captured
from whence.models.loading import LoadedModel, device_of, layer_shape
from whence.second_order.fisher import TOKENS_PER_BATCH, fisher_passes

ROUNDING = 1e-5
"""A slope's share of its row's largest below which it counts as none."""


@dataclass(frozen=True)
class Factors:
    """Sums of one layer over rows and positions."""

    inputs: Float32[Tensor, "i i"]
    """A."""
    slopes: Float32[Tensor, "o o"]
    """S."""
    positions: int
    """M."""
    rows: int
    """N."""

    def grown_by(self, other: "Factors") -> "Factors":
        """The same sums with another's added to them, in place."""
        return Factors(self.inputs.add_(other.inputs), self.slopes.add_(other.slopes),
                       self.positions + other.positions, self.rows + other.rows)  # fmt: skip

    def __add__(self, other: "Factors") -> "Factors":
        """Those of two parts of a corpus together."""
        return Factors(self.inputs + other.inputs, self.slopes + other.slopes, self.positions + other.positions,
                       self.rows + other.rows)  # fmt: skip


def positions_with_slope(g: Float[Tensor, "b t o"]) -> Bool[Tensor, "b t"]:
    """Where a row has a slope that is more than the rounding of its largest one.

    A prompt has none in a model's last layers, and the query of the first position of attention has none anywhere.
    """
    lengths = g.norm(dim=2)
    return lengths > ROUNDING * lengths.amax(1, keepdim=True)


@dataclass
class _Sums:
    """Consumes backward passes into factors."""

    inputs: dict[str, Tensor]
    slopes: dict[str, Tensor]
    positions: dict[str, int]

    def __call__(self, captured: Captured) -> None:
        has_slope = positions_with_slope(captured.g)
        a, g = captured.a[has_slope].float(), captured.g[has_slope].float()
        self.inputs[captured.layer] += (a.T @ a).to(self.inputs[captured.layer])
        self.slopes[captured.layer] += (g.T @ g).to(self.slopes[captured.layer])
        self.positions[captured.layer] += len(a)


def kfac_factors(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    rows: Sequence[Encoded],
    *,
    seed: int = 0,
    is_empirical: bool = False,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> dict[str, Factors]:
    """Factors of every layer over some rows; for the arguments see `fisher.fisher_passes`."""
    shapes = {name: layer_shape(layer) for name, layer in layers.items()}
    sums = _Sums(
        {name: torch.zeros(inputs, inputs, device=device_of(layers[name])) for name, (_, inputs) in shapes.items()},
        {name: torch.zeros(outputs, outputs, device=device_of(layers[name])) for name, (outputs, _) in shapes.items()},
        dict.fromkeys(shapes, 0),
    )
    for _ in fisher_passes(model, layers, rows, sums, seed=seed, is_empirical=is_empirical,
                           tokens_per_batch=tokens_per_batch):  # fmt: skip
        pass
    return {name: Factors(sums.inputs[name], sums.slopes[name], sums.positions[name], len(rows)) for name in shapes}
