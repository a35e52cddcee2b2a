"""Scores of short lists of examples from unprojected gradients; those of a whole corpus are in `corpus_scores`.

A query's gradient is held as the pairs that make it up. For a layer, it is `sum over r of g_r a_r^T` over the query's
positions r; a comparison with another completion adds positions whose slopes have a minus sign. Its score with a
training example of pairs (a_s, g_s) is

    sum over r, s of (a_r . a_s)(g_r . g_s)                                                      (Gram identity)

A gradient space may divide layers by their norms (`normalise`), and a score may divide vectors by theirs (the cosine).
Either way, each layer's inner product has one factor, an entry of `LayerProducts.factors`. `tokenwise` divides the same
sum among tokens.

Source: TracIn, Pruthi et al. 2020, https://arxiv.org/abs/2002.08484.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from whence.corpus.tokens import Batch, Encoded, bucketed, collate
from whence.gradients.capture import Captured, backward, example_gradients, gram_is_cheaper, squared_norms
from whence.gradients.protocols import Projection
from whence.gradients.space import GradientSpace
from whence.models.loading import LoadedModel
from whence.numerics import inverse_or_zero
from whence.runner import counted

HELD_BYTES = 2**31
"""Largest size of the queries' pairs that are held for one pass, and of their formed gradients."""
FORMED_AT_ONCE = 2**24
"""Entries of examples' gradients that are formed at a time, at most, or one example's."""


def inner_products(
    a: Float[Tensor, "b t i"],
    g: Float[Tensor, "b t o"],
    query_a: Float[Tensor, "q r i"],
    query_g: Float[Tensor, "q r o"],
) -> Float32[Tensor, "q b"]:
    """Inner product of each query's gradient with each example's, for one layer, exact.

    The Gram identity `sum over r, t of (a_r . a_t)(g_r . g_t)` is used where it is cheaper, else the queries' gradients
    G: `sum over t of g_t^T G a_t`.
    """
    if gram_is_cheaper(a.shape[1], query_a.shape[1], a.shape[2], g.shape[2]):
        pairs = torch.einsum("qri,bti->qbrt", query_a, a) * torch.einsum("qro,bto->qbrt", query_g, g)
        return pairs.sum((2, 3), dtype=torch.float32)
    return example_gradients(query_a, query_g).flatten(1) @ example_gradients(a, g).flatten(1).T


@dataclass(frozen=True)
class SignedSequence:
    """A sequence of a query: the completion, or the completion that it is compared with."""

    encoded: Encoded
    sign: float = 1.0
    """-1 for the completion that the query is compared with."""


def sequences_of(encoded: Encoded) -> list[SignedSequence]:
    """An example's sequences: the answer, and the rejected one with a minus, where it has one."""
    if encoded.rejected is None:
        return [SignedSequence(encoded)]
    return [SignedSequence(replace(encoded, rejected=None)), SignedSequence(encoded.rejected, -1.0)]


class Span(NamedTuple):
    """The positions of one query token's slopes, from the first that is not 0 to the last."""

    token: int
    """Number of the token among those in the pairs."""
    first: int
    end: int


@dataclass(frozen=True)
class Pairs:
    """A layer's pairs at positions r, for one or more query tokens."""

    a: Float32[Tensor, "r i"]
    g: Float32[Tensor, "w o"]
    """Slopes of each token at the positions of its span, one token after another."""
    spans: list[Span]

    @cached_property
    def sizes(self) -> list[int]:
        """Positions of each token."""
        return [end - first for _, first, end in self.spans]

    def by_token(self) -> Iterator[tuple[Float32[Tensor, "r i"], Float32[Tensor, "r o"]]]:
        """The pairs of each token."""
        for (_, first, end), slopes in zip(self.spans, self.g.split(self.sizes), strict=True):
            yield self.a[first:end], slopes


QueryGradient = dict[str, list[Pairs]]
"""A query's gradient by layer, unprojected. The entries of a list add up."""


@dataclass(frozen=True)
class LayerProducts:
    """Inner products of one query's gradient with `b` examples', by layer, and both sides' squared norms."""

    dots: Float32[Tensor, "l b"]
    query_squares: Float32[Tensor, " l"]
    squares: Float32[Tensor, "l b"]

    def factors(self, *, normalise: str, cosine: bool) -> Float32[Tensor, "l b"]:
        """Factors of the layers' inner products with which their sum is the score."""
        if normalise == "layer":
            factors = inverse_or_zero(self.query_squares.sqrt())[:, None] * inverse_or_zero(self.squares.sqrt())
            if not cosine:
                return factors
            # layers have the norm 1, so a vector's squared norm is the number of its layers that have a gradient
            lengths = (self.query_squares > 0).sum() * (self.squares > 0).sum(0)
            return factors * inverse_or_zero(lengths.float().sqrt())
        if not cosine:
            return torch.ones_like(self.dots)
        norms = self.query_squares.sum().sqrt() * self.squares.sum(0).sqrt()
        return inverse_or_zero(norms).expand_as(self.dots)

    def scores(self, *, normalise: str, cosine: bool) -> Float32[Tensor, " b"]:
        """The examples' scores."""
        return (self.dots * self.factors(normalise=normalise, cosine=cosine)).sum(0)


# -- the query's side


def query_gradient(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    sequences: Sequence[SignedSequence],
    space: GradientSpace,
    objective: str,
) -> QueryGradient:
    """A whole query's gradient, as the pairs of one token with the number 0."""
    query: QueryGradient = {name: [] for name in layers}
    for sequence in sequences:
        consume = partial(_add_pairs, query, torch.tensor([sequence.sign]))
        batch = collate([sequence.encoded])
        backward(model, layers, batch, consume, reduction=space.reduction, objective=objective, whole=True)
    return query


def _add_pairs(query: QueryGradient, sign: Float32[Tensor, " 1"], captured: Captured) -> None:
    query[captured.layer].append(pairs_of(captured.a[0], captured.g, [0], sign))


def pairs_of(
    a: Float32[Tensor, "r i"], g: Float32[Tensor, "u r o"], tokens: Sequence[int], weights: Float32[Tensor, " u"]
) -> Pairs:
    """Pairs of query tokens that share their positions, with slopes multiplied by the token's weight.

    A token has no slopes at later positions, and in a model's last block (but for keys and values) at only one.
    """
    spans, slopes = [], []
    for token, is_reached, token_g, weight in zip(tokens, (g != 0).any(2).cpu(), g, weights.to(g), strict=True):
        places = is_reached.nonzero()[:, 0].tolist()
        first, end = (places[0], places[-1] + 1) if places else (0, 0)
        spans.append(Span(token, first, end))
        slopes.append(token_g[first:end] * weight)
    return Pairs(a, torch.cat(slopes), spans)


def joined(pairs: Sequence[Pairs]) -> tuple[Float32[Tensor, "1 r i"], Float32[Tensor, "1 r o"]]:
    """All pairs one after another, as if they were one example's."""
    a = [token_a for group in pairs for token_a, _ in group.by_token()]
    return torch.cat(a)[None], torch.cat([group.g for group in pairs])[None]


def query_sketch(query: QueryGradient, projection: Projection, normalise: str) -> Float32[Tensor, " k"]:
    """The sketch of a query's gradient; with `normalise` "layer", its layers are divided by their norms."""
    row = torch.zeros(projection.width)
    for layer, pairs in query.items():
        if pairs:
            a, g = joined(pairs)
            factor = inverse_or_zero(squared_norms(a, g).clamp(min=0).sqrt()) if normalise == "layer" else 1.0
            row[projection.columns(layer)] += (projection(a, g, layer=layer)[0] * factor).cpu()
    return row


# -- against training examples


def batches(rows: Sequence[Encoded], tokens_per_batch: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of rows with the rows' numbers, where padding adds at most a third to a row.

    An index' batches must not change, because its bytes depend on them; these may.
    """
    lengths = [row.positions for row in rows]
    for numbers in bucketed(lengths, tokens_per_batch):  # longest first
        group = [numbers[0]]
        for number in numbers[1:]:
            if 4 * lengths[number] < 3 * lengths[group[0]]:
                yield group, collate([rows[member] for member in group])
                group = []
            group.append(number)
        yield group, collate([rows[member] for member in group])


class Queries:
    """Gradients of some queries, laid out for products with training examples."""

    def __init__(self, queries: Sequence[QueryGradient]):
        self.pairs = {
            layer: [joined(query[layer]) if query[layer] else None for query in queries] for layer in queries[0]
        }
        """(a, g) of each query; None where the loss does not reach the layer."""
        self.formed: dict[str, Float32[Tensor, "q d"]] = {}
        self.squares: dict[str, Float32[Tensor, " q"]] = {}

    def __len__(self):
        return len(next(iter(self.pairs.values()), []))

    def products(
        self, captured: Captured, wanted: Bool[Tensor, "q b"], norms: bool
    ) -> tuple[Float32[Tensor, "q b"], Float32[Tensor, " b"]]:
        """Inner products with a layer's examples where they are wanted, and the examples' squared norms if asked for.

        The cheaper way is taken: Gram's identity for each wanted pair, or the gradients of all.
        """
        a, g, pairs = captured.a, captured.g, self.pairs[captured.layer]
        (b, t, i), o = a.shape, g.shape[2]
        positions = torch.tensor([0 if pair is None else pair[0].shape[1] for pair in pairs])
        gram = int((wanted.sum(1) * positions).sum()) * t * (i + o)
        to_form = 0 if captured.layer in self.formed else int(positions.sum())
        if gram >= (b * t + to_form + len(pairs) * b) * i * o:
            return self._formed_products(captured)
        if norms and captured.layer not in self.squares:
            squares = [torch.zeros(()) if pair is None else squared_norms(*pair)[0].cpu() for pair in pairs]
            self.squares[captured.layer] = torch.stack(squares).clamp(min=0)
        dots = torch.zeros(len(pairs), b)
        for number, pair in enumerate(pairs):
            some = wanted[number].nonzero()[:, 0].to(a.device)
            if pair is not None and len(some):
                dots[number, some.cpu()] = inner_products(a[some], g[some], *pair)[0].cpu()
        return dots, squared_norms(a, g).clamp(min=0).cpu() if norms else torch.zeros(b)

    def _formed_products(self, captured: Captured) -> tuple[Float32[Tensor, "q b"], Float32[Tensor, " b"]]:
        layer, size = captured.layer, captured.a.shape[2] * captured.g.shape[2]
        queries = self.formed.get(layer)
        if queries is None:
            zeros = captured.a.new_zeros(size)
            flat = [zeros if pair is None else example_gradients(*pair).flatten() for pair in self.pairs[layer]]
            queries = torch.stack(flat)
            self.squares[layer] = queries.square().sum(1).cpu()
            if sum(map(_bytes, [queries, *self.formed.values()])) <= HELD_BYTES:
                self.formed[layer] = queries
        dots, squares, step = [], [], max(1, FORMED_AT_ONCE // size)
        for a, g in zip(captured.a.split(step), captured.g.split(step), strict=True):
            gradients = example_gradients(a, g).flatten(1)
            dots.append((queries @ gradients.T).cpu())
            squares.append(gradients.square().sum(1).cpu())
        return torch.cat(dots, 1), torch.cat(squares)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


@dataclass
class InnerProducts:
    """Consumes a whole backward pass over `b` examples into their inner products with queries' gradients."""

    queries: Queries
    wanted: Bool[Tensor, "q b"]
    norms: bool = True
    """Whether squared norms are taken too."""
    dots: dict[str, Float32[Tensor, "q b"]] = field(default_factory=dict)
    squares: dict[str, Float32[Tensor, " b"]] = field(default_factory=dict)

    def __call__(self, captured: Captured) -> None:
        """Add one layer."""
        q, b = self.wanted.shape
        rows = torch.arange(b) if captured.rows is None else captured.rows.cpu()
        dots, squares = self.queries.products(captured, self.wanted[:, rows], self.norms)
        self.dots[captured.layer] = torch.zeros(q, b).index_add_(1, rows, dots)
        self.squares[captured.layer] = torch.zeros(b).index_add_(0, rows, squares)

    def result(self, query: int) -> LayerProducts:
        """One query's products by layer; a layer that the loss does not reach has zeros."""
        q, b = self.wanted.shape
        layers, nothing = self.queries.pairs, torch.zeros(q, b)
        return LayerProducts(
            torch.stack([self.dots.get(layer, nothing)[query] for layer in layers]),
            torch.stack([self.queries.squares.get(layer, torch.zeros(q))[query] for layer in layers]),
            torch.stack([self.squares.get(layer, torch.zeros(b)) for layer in layers]),
        )


def layer_products(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    query: QueryGradient,
    rows: Sequence[Encoded],
    *,
    reduction: str,
    tokens_per_batch: int,
) -> LayerProducts:
    """Exact inner products of a query's gradient with training examples, in the examples' order."""
    n, products = len(rows), []
    order: list[int] = []
    queries = Queries([query])
    steps = counted(batches(rows, tokens_per_batch), "Exact gradients", n, lambda step: len(step[0]))
    for numbers, batch in steps:
        consume = InnerProducts(queries, torch.ones(1, len(numbers), dtype=torch.bool))
        backward(model, layers, batch, consume, reduction=reduction, whole=True)
        products.append(consume.result(0))
        order += numbers
    place = torch.empty(n, dtype=torch.int64)
    place[torch.tensor(order, dtype=torch.int64)] = torch.arange(n)
    return LayerProducts(
        torch.cat([batch_products.dots for batch_products in products], 1)[:, place],
        products[0].query_squares,
        torch.cat([batch_products.squares for batch_products in products], 1)[:, place],
    )


# -- short lists of many queries


def list_scores(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    queries: Iterable[QueryGradient],
    lists: Sequence[Sequence[int]],
    rows: Mapping[int, Encoded],
    *,
    space: GradientSpace,
    cosine: bool,
    tokens_per_batch: int,
) -> list[Float32[Tensor, " n"]]:
    """Exact scores of each query for the rows of its own list, from one pass over the rows of all lists.

    Queries of more than `HELD_BYTES` together take several passes.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name.
        queries: A gradient for each list; taken as they are needed.
        lists: Numbers of rows, for each query.
        rows: The rows of all lists.
        space: The reduction of a row's loss, and whether layers are normalised.
        cosine: Whether scores are divided by both gradients' norms.
        tokens_per_batch: Budget of a backward pass.
    """
    out: list[Tensor] = []
    for group in _groups_that_fit(queries):
        some = lists[len(out) : len(out) + len(group)]
        place = {number: column for column, number in enumerate(sorted({*itertools.chain.from_iterable(some)}))}
        wanted = torch.zeros(len(group), len(place), dtype=torch.bool)
        for mask, numbers in zip(wanted, some, strict=True):
            mask[[place[number] for number in numbers]] = True
        scores, held = torch.zeros(len(group), len(place)), Queries(group)
        steps = batches([rows[number] for number in place], tokens_per_batch)
        for columns, batch in counted(steps, "Exact gradients", len(place), lambda step: len(step[0])):
            needs_norms = cosine or space.normalise == "layer"
            consume = InnerProducts(held, wanted[:, columns], needs_norms)
            backward(model, layers, batch, consume, reduction=space.reduction, whole=True)
            for query, query_scores in enumerate(scores):
                query_scores[columns] = consume.result(query).scores(normalise=space.normalise, cosine=cosine)
        out += [line[[place[number] for number in numbers]] for line, numbers in zip(scores, some, strict=True)]
    return out


def _groups_that_fit(queries: Iterable[QueryGradient]) -> Iterator[list[QueryGradient]]:
    group: list[QueryGradient] = []
    held = 0
    for query in queries:
        size = sum(_bytes(one.a) + _bytes(one.g) for pairs in query.values() for one in pairs)
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(query)
        held += size
    if group:
        yield group
