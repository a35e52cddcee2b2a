"""Scores from unprojected gradients token by token: which training token on which query token.

A query's gradient is held for each of its tokens u apart, with the slopes `g_r^(u)` of that token's own objective; a
comparison with another completion is more positions r, with a minus in their slopes. Against a training example with
pairs (a_s, g_s):

    token x position  M[u, s] = sum over r of (a_r . a_s)(g_r^(u) . g_s)                         basis `position`
    token x loss      M[u, v] = sum over r, s of (a_r . a_s)(g_r^(u) . g_s^(v))                  basis `loss`

where g_s^(v) are the slopes of the loss at training token v alone. Both matrices sum over their columns to the score
of token u, and as a whole to the example's score. `position` says where in the training text the gradient arises and
needs one backward pass; `loss` says which training token's own prediction it is and needs one row a supervised token.

Cost: `sum over u of r` times s times o multiplications a layer, over pairs whose slopes are not 0 alone: none of what
pads an example, and in the last block (but for keys and values) one position a query token. No token store is needed,
and memory is bounded: query tokens are held in groups of at most `HELD_BYTES`.

Source: Lin et al. 2024 (RapidIn, token-wise), https://arxiv.org/abs/2405.11724.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from whence.corpus.tokens import Batch, Encoded, bucketed, collate
from whence.gradients.capture import Captured, Consume, backward, inverse, squared_norms
from whence.gradients.exact import Held, Inner, Pairs, Part, Span, batches, inner, joined, pairs_of
from whence.models.loading import LoadedModel

HELD_BYTES = 2**31
"""Of one group of query tokens' slopes."""
POSITIONS_AT_ONCE = {"cpu": 512, "cuda": 8192}
"""Training positions of one array of products."""
PRODUCTS_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
"""Entries of such an array: on a CPU 1 MB, which stays in its cache."""
TOKENS_AT_ONCE = 8
"""Query tokens of one backward pass: a token's slopes are zero behind it, so that long groups multiply zeros."""
BASES = ("position", "loss")


@dataclass(frozen=True)
class Token:
    """One token of a query."""

    part: int
    place: int
    """In the part's ids."""
    weight: float
    """In the query's objective: the part's sign, over its supervised tokens where the reduction is their mean."""


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
    kept = _Kept({name: [] for name in layers}, {name: [] for name in layers})
    budget = min(tokens_per_batch, TOKENS_AT_ONCE * max((len(row.ids) for row in rows), default=0))
    for numbers in bucketed([len(row.ids) for row in rows], budget):
        batch, other = collate([rows[number] for number in numbers]), also(numbers) if also else None
        keep = partial(kept.add, numbers, torch.tensor([weights[number] for number in numbers]), other)
        backward(model, layers, batch, keep, reduction="sum", objective=objective, whole=True)
    return kept.joined()


@dataclass
class _Kept:
    """Pairs of some batches of tokens."""

    shared: Held
    """Of layers that see all positions: the rows are prefixes of the longest one, and so are their inputs."""
    of_head: Held

    def add(self, numbers: list[int], weights: Float32[Tensor, " u"], also: Consume | None, seen: Captured) -> None:
        """One layer's pairs of one batch."""
        if also is not None:
            also(seen)
        if seen.rows is None:
            self.shared[seen.layer].append(pairs_of(seen.a[0], seen.g, numbers, weights))
        else:
            self.of_head[seen.layer].append(_head_pairs(seen, numbers, weights))

    def joined(self) -> Held:
        """One `Pairs` a layer, by the inputs of the longest row, which came first."""
        for name, pairs in self.shared.items():
            if pairs:
                slopes, spans = torch.cat([some.g for some in pairs]), [span for some in pairs for span in some.spans]
                self.of_head[name].append(Pairs(pairs[0].a, slopes, spans))
            pairs.clear()
        return self.of_head


def _head_pairs(seen: Captured, numbers: list[int], scale: Float32[Tensor, " b"]) -> Pairs:
    """Of the output head, which saw the positions that predict each token and no others, one token after another."""
    b, t, _ = seen.g.shape
    slopes = seen.g * scale.to(seen.g)[seen.rows][:, None, None]
    owners = [numbers[row] for row in seen.rows.tolist()]  # type: ignore[union-attr]
    spans = [Span(owner, place * t, (place + 1) * t) for place, owner in zip(range(b), owners, strict=True)]
    return Pairs(seen.a.flatten(0, 1), slopes.flatten(0, 1), spans)


# -- against training examples


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


def factors_of(held: Held, *, normalise: str, cosine: bool) -> Factors:
    """Of a query that is held whole."""
    squares = {
        layer: float(squared_norms(*joined(pairs)).clamp(min=0)[0]) if pairs else 0.0 for layer, pairs in held.items()
    }
    return Factors(normalise, cosine, squares)


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
        kept = (seen.g != 0).any(2)
        a, g = seen.a[kept], seen.g[kept]
        factors = self._factors(seen)[:, None].expand_as(kept)[kept]
        places = self._places(seen)[kept.cpu()]
        flat = self.matrix.flatten(1)  # a view
        for pairs in self.held[seen.layer]:
            tokens = torch.tensor([span.token for span in pairs.spans], dtype=torch.int64)
            found = _token_products(pairs, a, g).mul_(factors)
            flat[tokens[:, None], places] += found.to(flat)

    def _places(self, seen: Captured) -> Int64[Tensor, "b t"]:
        """Columns of the flat matrix: of the output head those that predict a supervised token, in order."""
        b, s = self.matrix.shape[1:]
        if seen.rows is None:
            return torch.arange(b * s).view(b, s)
        places = torch.zeros(seen.g.shape[:2], dtype=torch.int64)
        for place, row in enumerate(seen.rows.tolist()):
            where = self.head_places[row]
            places[place, : len(where)] = row * s + torch.tensor(where)
        return places

    def _factors(self, seen: Captured) -> Float32[Tensor, " b"]:
        if not isinstance(self.factors, Factors):
            factors = self.factors[seen.layer].to(seen.g)
            return factors if seen.rows is None else factors[seen.rows]
        squares = squared_norms(seen.a, seen.g).clamp(min=0)
        rows = torch.arange(len(squares)) if seen.rows is None else seen.rows.cpu()
        all_squares = torch.zeros(self.matrix.shape[1]).index_add_(0, rows, squares.cpu())
        self.squares[seen.layer] = all_squares
        return self.factors.of_layer(seen.layer, squares)

    def result(self) -> Float32[Tensor, "u b s"]:
        """The matrices."""
        if not isinstance(self.factors, Factors):
            return self.matrix
        scale = self.factors.of_all(self.squares)
        return self.matrix * (scale[None, :, None] if isinstance(scale, Tensor) else scale)


def _token_products(pairs: Pairs, a: Float32[Tensor, "p i"], g: Float32[Tensor, "p o"]) -> Float32[Tensor, "u p"]:
    """`sum over r of (a_r . a_s)(g_r^(u) . g_s)`: by Gram, or by the tokens' gradients if i is less than their r."""
    out = a.new_zeros(len(pairs.spans), len(a))
    if a.shape[1] * len(pairs.spans) < len(pairs.g):
        for row, (own, slopes) in zip(out, pairs.by_token(), strict=True):
            torch.sum((g @ (slopes.T @ own)).mul_(a), 1, out=row)
        return out
    kind = a.device.type if a.device.type in POSITIONS_AT_ONCE else "cpu"
    groups = list(_groups(pairs.sizes, PRODUCTS_AT_ONCE[kind] // POSITIONS_AT_ONCE[kind]))
    positions = [sum(pairs.sizes[group]) for group in groups]
    for begin in range(0, len(a), POSITIONS_AT_ONCE[kind]):
        some = slice(begin, begin + POSITIONS_AT_ONCE[kind])
        alike, rows = pairs.a @ a[some].T, iter(out[:, some])  # [r p]
        for group, slopes in zip(groups, pairs.g.split(positions), strict=True):
            products = (slopes @ g[some].T).split(pairs.sizes[group])
            for (_, first, end), own in zip(pairs.spans[group], products, strict=True):
                torch.sum(own.mul_(alike[first:end]), 0, out=next(rows))
    return out


def _groups(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Tokens in their order, with at most so many positions together, or one token alone."""
    begin, together = 0, 0
    for number, size in enumerate(sizes):
        if number > begin and together + size > most:
            yield slice(begin, number)
            begin, together = number, 0
        together += size
    yield slice(begin, len(sizes))


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
        for numbers, batch in batches(rows, tokens_per_batch):
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
        for numbers, batch in batches(alone, tokens_per_batch):
            weight = torch.tensor([tokens[place].weight for place in numbers])
            scaled = _by_layer(layers, factors[:, [number] * len(numbers)] * weight)
            consume = TokenProducts(held, scaled, torch.zeros(u, *batch.ids.shape), _head_places(batch))
            backward(model, layers, batch, consume, reduction="sum", whole=True)
            matrix[:, numbers] = consume.matrix.sum(2)
        out[number] = matrix
    return out


def _by_layer(layers: Mapping[str, nn.Module], factors: Tensor) -> Mapping[str, Tensor]:
    return dict(zip(layers, factors, strict=True))


def _head_places(batch: Batch) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in batch.supervised[:, 1:].cpu()]
