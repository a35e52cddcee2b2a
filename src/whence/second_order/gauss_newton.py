"""Exact products with the Gauss-Newton matrix of a corpus, and its damped inverse by conjugate gradients.

For a row with logits z_t at its supervised positions and p_t their softmax, the Gauss-Newton matrix of its loss, the
sum of -log p over those positions, is

    sum over t of J_t^T (diag(p_t) - p_t p_t^T) J_t        J_t = derivative of z_t by the traced weights

Its product with a direction x is one forward pass with a derivative along x, then one backward pass. H is the mean over
rows. EK-FAC's inverse P (with its own damping) is the preconditioner of

    (H + d) y = x,    d = `damping` times the mean of EK-FAC's eigenvalues over all layers

whose steps need one product each. A few of them mend what K-FAC leaves out: that layers and positions depend on one
another.

Sources: Schraudolph 2002 (products with the Gauss-Newton matrix); Martens 2010 (in Hessian-free optimisation); Hestenes
and Stiefel 1952 (conjugate gradients).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.corpus.tokens import Batch, Encoded
from whence.errors import SettingError
from whence.gradients.exact import batches
from whence.models.loading import LoadedModel
from whence.second_order.eigen import DAMPING, Curvature

Direction = dict[str, Float32[Tensor, "o i"]]
"""By layer."""


class _Logits(nn.Module):
    """A model whose output is the logits at a batch's supervised positions."""

    def __init__(self, model: LoadedModel):
        super().__init__()
        self.loaded, self.inner = model, model.model

    def forward(self, batch: Batch) -> Tensor:
        """Logits [s v]."""
        states, head = self.loaded.decode(batch.ids, batch.mask)
        owners, positions = batch.supervised[:, 1:].nonzero(as_tuple=True)  # position t predicts token t + 1
        return head(states[owners.to(states.device), positions.to(states.device)]).float()


def gauss_newton_product(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    rows: Sequence[Encoded],
    direction: Direction,
    *,
    tokens_per_batch: int,
) -> Direction:
    """Product of the mean of rows' Gauss-Newton matrices with a direction.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name.
        rows: Rows, each with a supervised token.
        direction: One matrix for each layer.
        tokens_per_batch: The most tokens of a pass, padding included.

    Raises:
        SettingError: Weights are quantised, or in float16, whose range is too small.
    """
    if odd := [module for module in layers.values() if _kind_of(module) not in (torch.float32, torch.bfloat16)]:
        raise SettingError(
            f"{model.path}: exact Gauss-Newton products take weights in float32 or bfloat16, and these are "
            f"{str(_kind_of(odd[0])).removeprefix('torch.')}. Leave refine out, or load them with --dtype float32"
        )
    logits_of, names = _Logits(model), _parameter_names(model, layers)
    weights = {names[layer]: model.model.get_parameter(names[layer].partition(".")[2]).detach() for layer in layers}
    along = {names[layer]: _stored(module, direction[layer]).to(weights[names[layer]])
             for layer, module in layers.items()}  # fmt: skip
    total = {layer: torch.zeros_like(matrix) for layer, matrix in direction.items()}
    for _, batch in batches(rows, tokens_per_batch):
        some = batch.to(model.device)

        def at(values: dict[str, Tensor], some: Batch = some) -> Tensor:
            return functional_call(logits_of, values, (some,))

        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its own formulas when it is first asked
            logits, moved = jvp(at, (weights,), (along,))[:2]
            p = logits.softmax(1)
            slope = p * (moved - (p * moved).sum(1, keepdim=True))
            (found,) = vjp(at, weights)[1](slope.detach())
        for layer in total:
            total[layer] += _stored(layers[layer], found[names[layer]]).to(total[layer]) / len(rows)
    return total


def _kind_of(layer: nn.Module) -> torch.dtype:
    return next(layer.parameters()).dtype


def _stored(layer: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [o i] as a layer stores its weight, or back: `Conv1D` has it as [i o]."""
    return matrix if isinstance(layer, nn.Linear) else matrix.T


def _parameter_names(model: LoadedModel, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name of each layer's weight in `_Logits`."""
    known = {id(weight): f"inner.{name}" for name, weight in model.model.named_parameters()}
    return {layer: known[id(module.weight)] for layer, module in layers.items()}


def damped_solution(
    product: Callable[[Direction], Direction], curvature: Curvature, target: Direction, *, steps: int,
    damping: float = DAMPING
) -> Direction:  # fmt: skip
    """Solve (H + d) y = x by some steps of conjugate gradients, from EK-FAC's solution on.

    Args:
        product: Product with H.
        curvature: EK-FAC's, the preconditioner, whose damping is by layer.
        target: x.
        steps: Steps, of a product each and one more at the start; 0 gives EK-FAC's solution.
        damping: See the module's text.
    """
    count = sum(layer.eigenvalues.numel() for layer in curvature.values())
    d = damping * sum(float(layer.eigenvalues.sum()) for layer in curvature.values()) / count

    def inverse(x: Direction) -> Direction:
        return {name: curvature[name].power(matrix, -1.0, damping=damping) for name, matrix in x.items()}

    def damped(x: Direction) -> Direction:
        return {name: matrix + d * x[name] for name, matrix in product(x).items()}

    solution = inverse(target)
    if steps == 0:
        return solution
    residual = _sum(target, damped(solution), -1.0)
    conjugate = search = inverse(residual)
    length = _dot(residual, conjugate)
    for _ in range(steps):
        if length <= 0:  # nothing is left to solve
            break
        image = damped(search)
        step = length / _dot(search, image)
        solution, residual = _sum(solution, search, step), _sum(residual, image, -step)
        conjugate = inverse(residual)
        length, before = _dot(residual, conjugate), length
        search = _sum(conjugate, search, length / before)
    return solution


def _dot(x: Direction, y: Direction) -> float:
    return float(sum((matrix.double() * y[name].double()).sum() for name, matrix in x.items()))


def _sum(x: Direction, y: Direction, factor: float) -> Direction:
    return {name: matrix + factor * y[name] for name, matrix in x.items()}
