"""Scores from unprojected gradients: of whole queries, of each token, and token by token.

A query's gradient is held as the pairs it is made of. For a layer, `sum over r of g_r a_r^T` over the query's
positions r, and for query token u the same sum with that token's own slopes `g_r^(u)`; a comparison with another
completion is more positions, with a minus in their slopes. Against a training example with pairs (a_s, g_s):

    score             sum over r, s of (a_r . a_s)(g_r . g_s)                                    (Gram identity)
    token x position  M[u, s] = sum over r of (a_r . a_s)(g_r^(u) . g_s)                         basis `position`
    token x loss      M[u, v] = sum over r, s of (a_r . a_s)(g_r^(u) . g_s^(v))                  basis `loss`

where g_s^(v) are the slopes of the loss at training token v alone. Both matrices sum over their columns to the score
of token u, and as a whole to the example's score. `position` says where in the training text the gradient arises and
needs one backward pass; `loss` says which training token's own prediction it is and needs one row a supervised token.

What a score is made of differs by gradient space: layers divided by their norms (`normalise`), or vectors divided by
theirs (the cosine). Either way each layer's inner product has one factor, an `Inner.factors` entry.

No token store is needed, and memory is bounded: query tokens are held in groups of at most `HELD_BYTES`.
Source: Pruthi et al. 2020 (TracIn), https://arxiv.org/abs/2002.08484; Lin et al. 2024 (RapidIn, token-wise),
https://arxiv.org/abs/2405.11724.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.gradients import Captured, Consume, backward, example_gradients, inner_products, inverse, squared_norms
from whence.interfaces import GradientSpace, Projection
from whence.model import LoadedModel
from whence.tokens import Batch, Encoded, bucketed, collate

HELD_BYTES = 2**31
"""Of one group of query tokens' slopes."""
PRODUCT_ENTRIES = 2**20
"""Of one array of products of query positions and training positions: 4 MB, which stay in a CPU's cache."""
TOKENS_AT_ONCE = 8
"""Query tokens of one backward pass: a token's slopes are zero behind it, so that long groups multiply zeros."""
BASES = ("position", "loss")


@dataclass(frozen=True)
class Part:
    """A sequence that a query is made of: a completion, or the one that it is compared with."""

    encoded: Encoded
    sign: float = 1.0
    """-1 for the completion that the query is compared with."""


@dataclass(frozen=True)
class Token:
    """One token of a query."""

    part: int
    place: int
    """In the part's ids."""
    weight: float
    """In the query's objective: the part's sign, over its supervised tokens where the reduction is their mean."""


@dataclass(frozen=True)
class Pairs:
    """A layer's pairs of some positions r for `u` query tokens."""

    a: Float32[Tensor, "r i"]
    g: Float32[Tensor, "u r o"]
    tokens: list[int]
    """Numbers of the `u` tokens among those held."""


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


def tokens_of(parts: Sequence[Part], reduction: str) -> list[Token]:
    """A query's tokens, part by part."""
    return [
        Token(number, place, part.sign / (part.encoded.targets if reduction == "mean" else 1))
        for number, part in enumerate(parts)
        for place, is_target in enumerate(part.encoded.supervised)
        if is_target
    ]


def token_rows(parts: Sequence[Part], tokens: Sequence[Token]) -> list[Encoded]:
    """Each token as an example of its own: what is before it, and itself supervised."""
    rows = []
    for token in tokens:
        ids = parts[token.part].encoded.ids[: token.place + 1]
        rows.append(Encoded(ids, [False] * token.place + [True]))
    return rows


def held_whole(
    model: LoadedModel, layers: Mapping[str, nn.Module], parts: Sequence[Part], space: GradientSpace, objective: str
) -> Held:
    """A query's gradient as pairs with u = 1."""
    held: Held = {name: [] for name in layers}
    for part in parts:

        def keep(seen: Captured, sign: float = part.sign) -> None:
            held[seen.layer].append(Pairs(seen.a[0], sign * seen.g, [0]))

        batch = collate([part.encoded])
        backward(model, layers, batch, keep, reduction=space.reduction, objective=objective, whole=True)
    return held


def _joined(pairs: Sequence[Pairs]) -> tuple[Float32[Tensor, "1 r i"], Float32[Tensor, "1 r o"]]:
    """Pairs of one query one after another."""
    return torch.cat([pair.a for pair in pairs])[None], torch.cat([pair.g.sum(0) for pair in pairs])[None]


def sketched(held: Held, projection: Projection, normalise: str) -> Float32[Tensor, " k"]:
    """The sketch of a held query, its layers divided by their norms where the space says so."""
    row = torch.zeros(projection.width)
    for layer, pairs in held.items():
        if pairs:
            a, g = _joined(pairs)
            factor = inverse(squared_norms(a, g).clamp(min=0).sqrt()) if normalise == "layer" else 1.0
            row[projection.columns(layer)] += (projection(a, g, layer=layer)[0] * factor).cpu()
    return row


def each_group_of_tokens(
    parts: Sequence[Part], tokens: Sequence[Token], layers: Mapping[str, nn.Module]
) -> Iterator[list[int]]:
    """Numbers of tokens whose pairs fit in memory together; never of two parts, whose positions are not shared."""
    widths = sum(layer.weight.numel() // layer.weight.shape[1] for layer in layers.values())  # type: ignore[operator,union-attr]
    group: list[int] = []
    for number, token in enumerate(tokens):
        size = 4 * max(widths, 1) * (token.place + 1) * (len(group) + 1)
        if group and (size > HELD_BYTES or tokens[group[0]].part != token.part):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def held_tokens(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    rows: Sequence[Encoded],
    weights: Sequence[float],
    *,
    objective: str,
    tokens_per_batch: int,
    also: Callable[[list[int]], Consume] | None = None,
) -> Held:
    """Pairs of query tokens that share a sequence, each token an example of `token_rows`.

    Args:
        model: Frozen.
        layers: Traced layers.
        rows: Of the tokens; one is a prefix of the next.
        weights: What each token's slopes are multiplied by.
        objective: See `gradients.backward`.
        tokens_per_batch: Of a backward pass.
        also: Given the numbers of a batch's tokens, another consumer of the same pass.
    """
    held: Held = {name: [] for name in layers}
    budget = min(tokens_per_batch, TOKENS_AT_ONCE * max((len(row.ids) for row in rows), default=0))
    for numbers in bucketed([len(row.ids) for row in rows], budget):
        batch, other = collate([rows[number] for number in numbers]), also(numbers) if also else None
        scale = torch.tensor([weights[number] for number in numbers])

        def keep(seen: Captured, numbers: list[int] = numbers, scale: Tensor = scale, other: Consume | None = other):
            if other is not None:
                other(seen)
            held[seen.layer].append(_pairs(seen, numbers, scale.to(seen.g)))

        backward(model, layers, batch, keep, reduction="sum", objective=objective, whole=True)
    return held


def _pairs(seen: Captured, numbers: list[int], scale: Tensor) -> Pairs:
    """A batch's pairs, its slopes times `scale`."""
    if seen.rows is None:  # the rows are prefixes of the longest one, and so are their inputs
        return Pairs(seen.a[0], seen.g * scale[:, None, None], numbers)
    # the output head saw one position of each token: positions one after another, each with its own token's slopes
    b, t, o = seen.g.shape
    g = seen.g.new_zeros(b, b, t, o)
    g[range(b), range(b)] = seen.g * scale[seen.rows][:, None, None]
    return Pairs(seen.a.flatten(0, 1), g.flatten(1, 2), [numbers[row] for row in seen.rows.tolist()])


# -- against training examples


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
        query_a, query_g = _joined(pairs) if pairs else nothing
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
    for numbers in bucketed([len(row.ids) for row in rows], tokens_per_batch):
        consume = InnerProducts(held, len(numbers))
        batch = collate([rows[number] for number in numbers])
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


@dataclass(frozen=True)
class Factors:
    """How a query's inner products become scores, where the examples' norms are found in the same pass."""

    normalise: str
    cosine: bool
    query_squares: dict[str, float]
    """Squared norm of the query's gradient, by layer."""

    def of_layer(self, layer: str, squares: Float32[Tensor, " b"]) -> Float32[Tensor, " b"]:
        """What a layer's inner products are multiplied by."""
        if self.normalise != "layer":
            return torch.ones_like(squares)
        square = torch.tensor(self.query_squares[layer]).to(squares)
        return inverse(square.sqrt()) * inverse(squares.sqrt())

    def of_all(self, squares: Mapping[str, Float32[Tensor, " b"]]) -> Float32[Tensor, " b"] | float:
        """What the sum over layers is multiplied by."""
        if not self.cosine:
            return 1.0
        by_layer = torch.stack(list(squares.values()))
        query = torch.tensor(list(self.query_squares.values()))
        if self.normalise == "layer":
            by_layer, query = (by_layer > 0).float(), (query > 0).float()
        return inverse(by_layer.sum(0).sqrt()) * inverse(query.sum().sqrt())


@dataclass
class TokenProducts:
    """Consumes a whole backward pass over `b` examples into `M[u, b, s]`, layer by layer."""

    held: Held
    factors: Factors | Mapping[str, Float32[Tensor, " b"]]
    """What each layer is multiplied by, for each example of the batch."""
    matrix: Float32[Tensor, "u b s"]
    head_places: list[list[int]]
    """Of each example: positions whose logits predict a supervised token."""
    squares: dict[str, Float32[Tensor, " b"]] = field(default_factory=dict)

    def __call__(self, seen: Captured) -> None:
        """Add one layer."""
        factors = self._factors(seen)
        for pairs in self.held[seen.layer]:
            found = (_token_products(pairs, seen.a, seen.g) * factors[None, :, None]).to(self.matrix)
            if seen.rows is None:
                self.matrix[pairs.tokens] += found
            else:
                self._add_head(pairs.tokens, seen.rows.tolist(), found)

    def _factors(self, seen: Captured) -> Float32[Tensor, " b"]:
        if not isinstance(self.factors, Factors):
            factors = self.factors[seen.layer].to(seen.g)
            return factors if seen.rows is None else factors[seen.rows]
        squares = squared_norms(seen.a, seen.g).clamp(min=0)
        rows = torch.arange(len(squares)) if seen.rows is None else seen.rows.cpu()
        all_squares = torch.zeros(self.matrix.shape[1]).index_add_(0, rows, squares.cpu())
        self.squares[seen.layer] = all_squares
        return self.factors.of_layer(seen.layer, squares)

    def _add_head(self, tokens: list[int], rows: list[int], found: Tensor) -> None:
        """The output head: its positions are those that predict a supervised token, in order."""
        for place, row in enumerate(rows):
            where = self.head_places[row]
            self.matrix[torch.tensor(tokens)[:, None], row, torch.tensor(where)] += found[:, place, : len(where)]

    def result(self) -> Float32[Tensor, "u b s"]:
        """The matrices."""
        if not isinstance(self.factors, Factors):
            return self.matrix
        scale = self.factors.of_all(self.squares)
        return self.matrix * (scale[None, :, None] if isinstance(scale, Tensor) else scale)


def _token_products(pairs: Pairs, a: Tensor, g: Tensor) -> Tensor:
    """`sum over r of (a_r . a_s)(g_r^(u) . g_s)` [u b s]: by Gram, or by the tokens' gradients if i < r."""
    (b, s, i), (u, r, o) = a.shape, pairs.g.shape
    flat_a, flat_g = a.flatten(0, 1), g.flatten(0, 1)
    if i < r:
        whole = torch.einsum("uro,ri->uoi", pairs.g, pairs.a)
        out = [torch.einsum("uoi,pi,po->up", whole, x, y) for x, y in _split(flat_a, flat_g, u * o)]
    else:
        out = []
        for x, y in _split(flat_a, flat_g, u * r):
            slopes = (pairs.g.flatten(0, 1) @ y.T).view(u, r, -1)
            out.append((slopes * (pairs.a @ x.T)).sum(1))
    return torch.cat(out, 1).view(u, b, s)


def _split(a: Tensor, g: Tensor, entries: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some training positions at a time, so that products with `entries` numbers each stay small."""
    step = max(1, PRODUCT_ENTRIES // max(1, entries))
    return zip(a.split(step), g.split(step), strict=True)


def token_products(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    held: Held,
    u: int,
    rows: Sequence[Encoded],
    factors: Factors | Float32[Tensor, "l b"],
    *,
    basis: str,
    reduction: str,
    tokens_per_batch: int,
) -> list[Float32[Tensor, "u s"]]:
    """Token x token matrices of held query tokens with training examples.

    Args:
        model: Frozen.
        layers: Traced layers, in the order of `factors`.
        held: Pairs of `u` query tokens.
        u: Their number.
        rows: Training examples.
        factors: How inner products become scores: found in the same pass, or of each layer and example.
        basis: "position": columns are all tokens of the example; "loss": its supervised tokens.
        reduction: Of a training example's loss.
        tokens_per_batch: Of a backward pass.
    """
    out: list[Tensor] = [torch.zeros(0)] * len(rows)
    if basis == "position":
        for numbers in bucketed([len(row.ids) for row in rows], tokens_per_batch):
            batch = collate([rows[number] for number in numbers])
            some = factors if isinstance(factors, Factors) else _by_layer(layers, factors[:, numbers])
            consume = TokenProducts(held, some, torch.zeros(u, *batch.ids.shape), _head_places(batch))
            backward(model, layers, batch, consume, reduction=reduction, whole=True)
            found = consume.result()
            for place, number in enumerate(numbers):
                out[number] = found[:, place, : len(rows[number].ids)].clone()
        return out
    if isinstance(factors, Factors):  # of whole examples, which single tokens do not know
        nothing: Held = {name: [] for name in layers}
        found = inner(model, layers, nothing, rows, reduction=reduction, tokens_per_batch=tokens_per_batch)
        squares = torch.tensor([factors.query_squares[name] for name in layers])
        factors = Inner(found.dots, squares, found.squares).factors(normalise=factors.normalise, cosine=factors.cosine)
    for number, row in enumerate(rows):
        tokens = tokens_of([Part(row)], reduction)
        alone = token_rows([Part(row)], tokens)
        matrix = torch.zeros(u, len(tokens))
        for numbers in bucketed([len(example.ids) for example in alone], tokens_per_batch):
            batch = collate([alone[place] for place in numbers])
            weight = torch.tensor([tokens[place].weight for place in numbers])
            scaled = _by_layer(layers, factors[:, [number] * len(numbers)] * weight)
            consume = TokenProducts(held, scaled, torch.zeros(u, *batch.ids.shape), _head_places(batch))
            backward(model, layers, batch, consume, reduction="sum", whole=True)
            matrix[:, numbers] = consume.matrix.sum(2)
        out[number] = matrix
    return out


def factors_of(held: Held, *, normalise: str, cosine: bool) -> Factors:
    """Of a query that is held whole."""
    squares = {
        layer: float(squared_norms(*_joined(pairs)).clamp(min=0)[0]) if pairs else 0.0 for layer, pairs in held.items()
    }
    return Factors(normalise, cosine, squares)


def _by_layer(layers: Mapping[str, nn.Module], factors: Tensor) -> Mapping[str, Tensor]:
    return dict(zip(layers, factors, strict=True))


def _head_places(batch: Batch) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in batch.supervised[:, 1:].cpu()]


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
            whole = [example_gradients(pair.a[None], pair.g).flatten() for pair in pairs[name]]
            held[name].append(sum(whole) if whole else torch.zeros(layer.weight.numel()))  # type: ignore[arg-type,operator,union-attr]
    stacked = {name: torch.stack(found) for name, found in held.items()}
    if space.normalise == "layer":
        stacked = {name: x * inverse(x.norm(dim=1))[:, None] for name, x in stacked.items()}
    if cosine:
        squares = torch.stack([x.square().sum(1) for x in stacked.values()]).sum(0)
        stacked = {name: x * inverse(squares.sqrt())[:, None] for name, x in stacked.items()}
    return stacked
