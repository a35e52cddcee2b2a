"""Scores of examples from unprojected gradients: of a short list, or of a whole corpus.

A query's gradient is held as the pairs it is made of. For a layer, it is `sum over r of g_r a_r^T` over the query's
positions r; a comparison with another completion is more positions, with a minus in their slopes. Its score with a
training example of pairs (a_s, g_s) is

    sum over r, s of (a_r . a_s)(g_r . g_s)                                                      (Gram identity)

What a score is made of differs by gradient space: layers divided by their norms (`normalise`), or vectors divided by
theirs (the cosine). Either way each layer's inner product has one factor, an `Inner.factors` entry. `tokenwise` shares
the same sum out among tokens.

Source: TracIn, Pruthi et al. 2020, https://arxiv.org/abs/2002.08484.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.corpus.tokens import Batch, Encoded, bucketed, collate
from whence.gradients.capture import Captured, backward, example_gradients, inner_products, inverse, squared_norms
from whence.gradients.protocols import Projection
from whence.gradients.space import GradientSpace
from whence.models.loading import LoadedModel


@dataclass(frozen=True)
class Part:
    """A sequence that a query is made of: a completion, or the one that it is compared with."""

    encoded: Encoded
    sign: float = 1.0
    """-1 for the completion that the query is compared with."""


class Span(NamedTuple):
    """The positions of one query token's slopes, from the first that is not 0 to the last."""

    token: int
    """Its number among those held."""
    first: int
    end: int


@dataclass(frozen=True)
class Pairs:
    """A layer's pairs of some positions r, for one or more query tokens."""

    a: Float32[Tensor, "r i"]
    g: Float32[Tensor, "w o"]
    """Slopes of each token at the positions of its span, one token after another."""
    spans: list[Span]

    @cached_property
    def sizes(self) -> list[int]:
        """Positions of each token."""
        return [end - first for _, first, end in self.spans]

    def by_token(self) -> Iterator[tuple[Float32[Tensor, "r i"], Float32[Tensor, "r o"]]]:
        """Each token's own pairs."""
        for (_, first, end), slopes in zip(self.spans, self.g.split(self.sizes), strict=True):
            yield self.a[first:end], slopes


Held = dict[str, list[Pairs]]
"""A query's gradient by layer, unprojected. Where a list has several, they add up."""


@dataclass(frozen=True)
class Inner:
    """Inner products of one query's gradient with `b` examples', by layer, and what they are divided by."""

    dots: Float32[Tensor, "l b"]
    query_squares: Float32[Tensor, " l"]
    squares: Float32[Tensor, "l b"]

    def factors(self, *, normalise: str, cosine: bool) -> Float32[Tensor, "l b"]:
        """What each layer's inner product is multiplied by, so that the sum is the score."""
        if normalise == "layer":
            factors = inverse(self.query_squares.sqrt())[:, None] * inverse(self.squares.sqrt())
            if not cosine:
                return factors
            # vectors of unit layers: their squared norm is the number of layers that have a gradient
            lengths = (self.query_squares > 0).sum() * (self.squares > 0).sum(0)
            return factors * inverse(lengths.float().sqrt())
        if not cosine:
            return torch.ones_like(self.dots)
        norms = self.query_squares.sum().sqrt() * self.squares.sum(0).sqrt()
        return inverse(norms).expand_as(self.dots)

    def scores(self, *, normalise: str, cosine: bool) -> Float32[Tensor, " b"]:
        """The examples' scores."""
        return (self.dots * self.factors(normalise=normalise, cosine=cosine)).sum(0)


# -- the query's side


def held_whole(
    model: LoadedModel, layers: Mapping[str, nn.Module], parts: Sequence[Part], space: GradientSpace, objective: str
) -> Held:
    """A query's gradient as the pairs of one token, 0."""
    held: Held = {name: [] for name in layers}
    for part in parts:
        keep = partial(_keep, held, torch.tensor([part.sign]))
        batch = collate([part.encoded])
        backward(model, layers, batch, keep, reduction=space.reduction, objective=objective, whole=True)
    return held


def _keep(held: Held, sign: Float32[Tensor, " 1"], seen: Captured) -> None:
    held[seen.layer].append(pairs_of(seen.a[0], seen.g, [0], sign))


def pairs_of(
    a: Float32[Tensor, "r i"], g: Float32[Tensor, "u r o"], tokens: Sequence[int], weights: Float32[Tensor, " u"]
) -> Pairs:
    """Pairs of query tokens that share their positions, slopes times the token's weight.

    A token has no slopes behind it, and in a model's last block (but for keys and values) at one position alone.
    """
    spans, slopes = [], []
    for token, reached, own, weight in zip(tokens, (g != 0).any(2).cpu(), g, weights.to(g), strict=True):
        places = reached.nonzero()[:, 0].tolist()
        first, end = (places[0], places[-1] + 1) if places else (0, 0)
        spans.append(Span(token, first, end))
        slopes.append(own[first:end] * weight)
    return Pairs(a, torch.cat(slopes), spans)


def joined(pairs: Sequence[Pairs]) -> tuple[Float32[Tensor, "1 r i"], Float32[Tensor, "1 r o"]]:
    """All pairs one after another, as one example's."""
    a = [own for some in pairs for own, _ in some.by_token()]
    return torch.cat(a)[None], torch.cat([some.g for some in pairs])[None]


def sketched(held: Held, projection: Projection, normalise: str) -> Float32[Tensor, " k"]:
    """The sketch of a held query, its layers divided by their norms where the space says so."""
    row = torch.zeros(projection.width)
    for layer, pairs in held.items():
        if pairs:
            a, g = joined(pairs)
            factor = inverse(squared_norms(a, g).clamp(min=0).sqrt()) if normalise == "layer" else 1.0
            row[projection.columns(layer)] += (projection(a, g, layer=layer)[0] * factor).cpu()
    return row


# -- against training examples


def batches(rows: Sequence[Encoded], tokens_per_batch: int) -> Iterator[tuple[list[int], Batch]]:
    """Numbers of rows and these rows as a batch, padded by a third at most.

    An index' batches may not change, for its bytes depend on them; these may.
    """
    lengths = [len(row.ids) for row in rows]
    for numbers in bucketed(lengths, tokens_per_batch):  # longest first
        alike = [numbers[0]]
        for number in numbers[1:]:
            if 4 * lengths[number] < 3 * lengths[alike[0]]:
                yield alike, collate([rows[each] for each in alike])
                alike = []
            alike.append(number)
        yield alike, collate([rows[each] for each in alike])


@dataclass
class InnerProducts:
    """Consumes a whole backward pass over `b` examples into the inner products with one held query."""

    held: Held
    b: int
    dots: dict[str, Tensor] = field(default_factory=dict)
    query_squares: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, seen: Captured) -> None:
        """Add one layer."""
        rows = torch.arange(self.b) if seen.rows is None else seen.rows.cpu()
        pairs = self.held[seen.layer]
        nothing = (seen.a.new_zeros(1, 1, seen.a.shape[2]), seen.g.new_zeros(1, 1, seen.g.shape[2]))
        query_a, query_g = joined(pairs) if pairs else nothing
        dots = inner_products(seen.a, seen.g, query_a, query_g)[0]
        if seen.layer not in self.query_squares:
            self.query_squares[seen.layer] = squared_norms(query_a, query_g).clamp(min=0).cpu()[0]
        for into, found in ((self.dots, dots), (self.squares, squared_norms(seen.a, seen.g).clamp(min=0))):
            into[seen.layer] = torch.zeros(self.b).index_add_(0, rows, found.cpu())

    def result(self) -> Inner:
        """By layer, in the held query's order; a layer that the loss does not reach has zeros."""
        none = torch.zeros(self.b)
        return Inner(
            torch.stack([self.dots.get(layer, none) for layer in self.held]),
            torch.stack([self.query_squares.get(layer, torch.zeros(())) for layer in self.held]),
            torch.stack([self.squares.get(layer, none) for layer in self.held]),
        )


def inner(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    held: Held,
    rows: Sequence[Encoded],
    *,
    reduction: str,
    tokens_per_batch: int,
) -> Inner:
    """Inner products of a held query with training examples, exact, in their order."""
    n, found = len(rows), []
    order: list[int] = []
    for numbers, batch in batches(rows, tokens_per_batch):
        consume = InnerProducts(held, len(numbers))
        backward(model, layers, batch, consume, reduction=reduction, whole=True)
        found.append(consume.result())
        order += numbers
    place = torch.empty(n, dtype=torch.int64)
    place[torch.tensor(order, dtype=torch.int64)] = torch.arange(n)
    return Inner(
        torch.cat([part.dots for part in found], 1)[:, place],
        found[0].query_squares,
        torch.cat([part.squares for part in found], 1)[:, place],
    )


# -- against a whole corpus


@dataclass
class _CorpusProducts:
    """Consumes a whole backward pass over `b` examples into their scores for held, materialised queries."""

    queries: Mapping[str, Float32[Tensor, "q d"]]
    squares: Float32[Tensor, " b"]
    dots: Float32[Tensor, "q b"]
    normalise: bool

    def __call__(self, seen: Captured) -> None:
        """Add one layer."""
        found = example_gradients(seen.a, seen.g).flatten(1)
        squares = found.square().sum(1)
        if self.normalise:
            found, squares = found * inverse(squares.sqrt())[:, None], (squares > 0).to(squares)
        rows = torch.arange(len(self.squares)) if seen.rows is None else seen.rows.cpu()
        self.squares.index_add_(0, rows, squares.cpu())
        self.dots.index_add_(1, rows, (self.queries[seen.layer] @ found.T).cpu())


def corpus_scores(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    queries: Sequence[Sequence[Part]],
    rows: Sequence[Encoded],
    space: GradientSpace,
    *,
    cosine: bool,
    objective: str,
    tokens_per_batch: int,
    tick: Callable[[int, int], None] = lambda examples, tokens: None,
) -> Float32[Tensor, "q n"]:
    """Exact scores of every row for every query, without an index: one backward pass over the corpus.

    The queries' gradients are held whole, q times the traced weights. Rows without a supervised token score -inf.
    """
    held = _materialised(model, layers, queries, space, cosine, objective)
    out = torch.full((len(queries), len(rows)), -torch.inf)
    usable = [number for number, row in enumerate(rows) if row.targets]
    for batch in bucketed([len(rows[number].ids) for number in usable], tokens_per_batch):
        numbers = [usable[place] for place in batch]
        consume = _CorpusProducts(
            held, torch.zeros(len(numbers)), torch.zeros(len(queries), len(numbers)), space.normalise == "layer"
        )
        examples = collate([rows[number] for number in numbers])
        backward(model, layers, examples, consume, reduction=space.reduction, whole=True)
        scores = consume.dots * inverse(consume.squares.sqrt()) if cosine else consume.dots
        out[:, numbers] = torch.where(scores.isfinite(), scores, -torch.inf)
        tick(len(numbers), sum(len(rows[number].ids) for number in numbers))
    return out


def _materialised(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    queries: Sequence[Sequence[Part]],
    space: GradientSpace,
    cosine: bool,
    objective: str,
) -> dict[str, Tensor]:
    """The queries' whole gradients by layer [q d], divided as the space says, and by their norms for the cosine."""
    held: dict[str, list[Tensor]] = {name: [] for name in layers}
    for parts in queries:
        pairs = held_whole(model, layers, parts, space, objective)
        for name, layer in layers.items():
            whole = example_gradients(*joined(pairs[name])).flatten() if pairs[name] else None
            weight = layer.get_parameter("weight")
            held[name].append(torch.zeros(weight.numel(), device=weight.device) if whole is None else whole)
    stacked = {name: torch.stack(found) for name, found in held.items()}
    if space.normalise == "layer":
        stacked = {name: x * inverse(x.norm(dim=1))[:, None] for name, x in stacked.items()}
    if cosine:
        squares = torch.stack([x.square().sum(1).to(model.device) for x in stacked.values()]).sum(0)
        stacked = {name: x * inverse(squares.sqrt()).to(x.device)[:, None] for name, x in stacked.items()}
    return stacked
