"""Scores of every row of a corpus against whole matrices in weight space, layer by layer, without an index.

A query's gradient, or what curvature makes of one, is held as a matrix for each traced layer: a *direction*. Rows'
gradients are formed layer by layer and a few rows at a time, and compared with all directions in one product.
Directions of more than `HELD_BYTES` together take several passes over the corpus.

    score = <direction, gradient of the row's loss>, for the cosine divided by the norms of both

Larger is more helpful. A direction that is a query's gradient gives nats^2 per squared unit of weight, or -1 to 1.

Source: TracIn, Pruthi et al. 2020, https://arxiv.org/abs/2002.08484.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.corpus.tokens import Encoded, collate
from whence.gradients.capture import Captured, backward, example_gradients
from whence.gradients.exact import FORMED_AT_ONCE, HELD_BYTES, SignedSequence, batches
from whence.gradients.space import GradientSpace
from whence.models.loading import LoadedModel, device_of, layer_shape
from whence.numerics import inverse_or_zero

Directions = Mapping[str, Float32[Tensor, "s o i"]]
"""Of s targets, by layer."""


def corpus_scores(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    queries: Sequence[Sequence[SignedSequence]],
    rows: Sequence[Encoded],
    space: GradientSpace,
    *,
    cosine: bool,
    objective: str,
    tokens_per_batch: int,
    tick: Callable[[int, int], None] = lambda examples, tokens: None,
) -> Float32[Tensor, "q n"]:
    """Exact scores of every row for every query. Rows without a supervised token score -inf.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name.
        queries: Each the signed sum of its sequences' objectives.
        rows: The corpus.
        space: The reductions of losses, and whether layers are normalised.
        cosine: Whether scores are divided by both gradients' norms.
        objective: Of the queries; name in `capture.OBJECTIVES`.
        tokens_per_batch: The most tokens of a pass, padding included.
        tick: Called with the rows and tokens of each batch when it is done, in each of the passes (`groups_that_fit`).
    """
    out = torch.full((len(queries), len(rows)), -torch.inf)
    usable = [number for number, row in enumerate(rows) if row.supervised_count]
    for group in groups_that_fit(layers, len(queries)):
        some = queries[group.start : group.stop]
        directions = query_directions(model, layers, some, space, objective=objective, cosine=cosine)
        scores = direction_scores(
            model,
            layers,
            directions,
            [rows[number] for number in usable],
            reduction=space.reduction,
            normalise=space.normalise,
            cosine=cosine,
            tokens_per_batch=tokens_per_batch,
            tick=tick,
        )
        out[group.start : group.stop, usable] = torch.where(scores.isfinite(), scores, -torch.inf)
    return out


def groups_that_fit(layers: Mapping[str, nn.Module], count: int, *, copies: int = 1) -> list[range]:
    """Numbers of so many directions, in groups that are held at once.

    Args:
        layers: Traced layers by name.
        count: Directions.
        copies: Of each, that are needed at once.
    """
    size = 4 * copies * sum(o * i for o, i in map(layer_shape, layers.values()))
    step = max(1, HELD_BYTES // max(1, size))
    return [range(first, min(first + step, count)) for first in range(0, count, step)]


def query_directions(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    queries: Sequence[Sequence[SignedSequence]],
    space: GradientSpace,
    *,
    objective: str = "loss",
    cosine: bool = False,
) -> dict[str, Float32[Tensor, "q o i"]]:
    """Whole gradients of queries by layer, each the signed sum of its sequences' objectives.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name.
        queries: Their sequences.
        space: The reduction of a sequence's tokens; with `normalise` "layer", layers are divided by their norms.
        objective: Name in `capture.OBJECTIVES`.
        cosine: Whether queries are divided by their norms.
    """
    out = {name: torch.zeros(len(queries), *layer_shape(layer), device=device_of(layer))
           for name, layer in layers.items()}  # fmt: skip
    for number, sequences in enumerate(queries):
        for sequence in sequences:

            def add(captured: Captured, number: int = number, sign: float = sequence.sign) -> None:
                formed = example_gradients(captured.a, captured.g).sum(0)
                out[captured.layer][number] += sign * formed.to(out[captured.layer])

            batch = collate([sequence.encoded])
            backward(model, layers, batch, add, reduction=space.reduction, objective=objective, whole=True)
    if space.normalise == "layer":
        out = {name: each * inverse_or_zero(each.flatten(1).norm(dim=1))[:, None, None] for name, each in out.items()}
    if cosine:
        lengths = torch.stack([each.flatten(1).square().sum(1).to(model.device) for each in out.values()]).sum(0).sqrt()
        out = {name: each * inverse_or_zero(lengths).to(each)[:, None, None] for name, each in out.items()}
    return out


@dataclass
class _Products:
    """Consumes a backward pass over b rows into inner products with directions."""

    directions: Directions
    normalise: bool
    dots: Float32[Tensor, "b s"]
    squares: Float32[Tensor, " b"]

    def __call__(self, captured: Captured) -> None:
        """Add one layer."""
        direction = self.directions[captured.layer].to(captured.a.device)
        step = max(1, FORMED_AT_ONCE // direction[0].numel())
        dots, squares = [], []
        for a, g in zip(captured.a.split(step), captured.g.split(step), strict=True):
            gradients = example_gradients(a, g).flatten(1)
            squares.append(gradients.square().sum(1))
            dots.append(gradients @ direction.flatten(1).T)
        dot, square = torch.cat(dots).to(self.dots), torch.cat(squares).to(self.dots)
        if self.normalise:
            dot, square = dot * inverse_or_zero(square.sqrt())[:, None], (square > 0).to(square)
        rows = torch.arange(len(self.dots)) if captured.rows is None else captured.rows
        rows = rows.to(self.dots.device)
        self.dots.index_add_(0, rows, dot)
        self.squares.index_add_(0, rows, square)


def direction_scores(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    directions: Directions,
    rows: Sequence[Encoded],
    *,
    reduction: str,
    normalise: str = "none",
    cosine: bool = False,
    tokens_per_batch: int,
    tick: Callable[[int, int], None] | None = None,
) -> Float32[Tensor, "s n"]:
    """Inner products of rows' gradients with directions.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name.
        directions: Directions by layer.
        rows: Rows; one without a supervised token has the score 0.
        reduction: Of a row's loss over its supervised tokens: "sum", as it counts in a training whose loss is the mean
            over a batch's tokens, or "mean".
        normalise: "layer" divides each layer's gradient of a row by its norm.
        cosine: Whether scores are divided by the norms of rows' gradients; directions are taken as they are.
        tokens_per_batch: The most tokens of a pass, padding included.
        tick: Called with the rows and tokens of each batch when it is done.
    """
    targets = len(next(iter(directions.values())))
    out = torch.zeros(targets, len(rows))
    for numbers, batch in batches(rows, tokens_per_batch):
        dots = torch.zeros(len(numbers), targets, device=model.device)
        products = _Products(directions, normalise == "layer", dots, dots.new_zeros(len(numbers)))
        backward(model, layers, batch, products, reduction=reduction, whole=True)
        scores = dots * inverse_or_zero(products.squares.sqrt())[:, None] if cosine else dots
        out[:, numbers] = scores.T.cpu()
        if tick is not None:
            tick(len(numbers), sum(rows[number].positions for number in numbers))
    return out
