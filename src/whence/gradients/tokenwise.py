"""Scores from unprojected gradients, token by token: which training token acts on which query token.

A query's gradient is held separately for each of its tokens u, with the slopes `g_r^(u)` of that token's own objective;
a comparison with another completion adds positions r whose slopes have a minus sign. Against a training example with
pairs (a_s, g_s):

    token x position  M[u, s] = sum over r of (a_r . a_s)(g_r^(u) . g_s)                         basis `position`
    token x loss      M[u, v] = sum over r, s of (a_r . a_s)(g_r^(u) . g_s^(v))                  basis `loss`

where g_s^(v) are the slopes of the loss at training token v alone. Both matrices sum over their columns to the score
of token u, and as a whole to the example's score. `position` shows where in the training text the gradient arises and
needs one backward pass; `loss` shows which training token's prediction it comes from and needs one row per supervised
token.

Cost: `sum over u of r` times s times o multiplications per layer, only over pairs whose slopes are not 0: no padding,
and in the last block (but for keys and values) one position per query token. No token store is needed, and memory is
bounded: query tokens are held in groups of at most `HELD_BYTES`.

Source: Lin et al. 2024 (RapidIn, token-wise), https://arxiv.org/abs/2405.11724.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from whence.corpus.tokens import Encoded, bucketed, collate
from whence.gradients.capture import Captured, Consume, backward, squared_norms
from whence.gradients.exact import (
    LayerProducts,
    Pairs,
    QueryGradient,
    SignedSequence,
    Span,
    batches,
    joined,
    layer_products,
    pairs_of,
    sequences_of,
)
from whence.models.loading import LoadedModel
from whence.numerics import inverse_or_zero

HELD_BYTES = 2**31
"""Largest size of the slopes of one group of query tokens."""
POSITIONS_AT_ONCE = {"cpu": 512, "cuda": 8192}
"""Training positions in one array of products."""
PRODUCTS_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
"""Entries of such an array: on a CPU 1 MB, which stays in cache."""
TOKENS_AT_ONCE = 8
"""Query tokens in one backward pass: a token's slopes are zero after it, so longer groups would multiply zeros."""
BASES = ("position", "loss")


@dataclass(frozen=True)
class Token:
    """One token of a query."""

    sequence: int
    place: int
    """Position in the sequence's ids."""
    weight: float
    """Weight in the query's objective: the sequence's sign, over its supervised tokens if the reduction is "mean"."""


def tokens_of(sequences: Sequence[SignedSequence], reduction: str) -> list[Token]:
    """A query's tokens, sequence by sequence."""
    return [
        Token(number, place, sequence.sign / (sequence.encoded.supervised_count if reduction == "mean" else 1))
        for number, sequence in enumerate(sequences)
        for place, is_supervised in enumerate(sequence.encoded.supervised)
        if is_supervised
    ]


def token_rows(sequences: Sequence[SignedSequence], tokens: Sequence[Token]) -> list[Encoded]:
    """Each token as an example of its own: the tokens before it, and itself, supervised."""
    rows = []
    for token in tokens:
        ids = sequences[token.sequence].encoded.ids[: token.place + 1]
        rows.append(Encoded(ids, [False] * token.place + [True]))
    return rows


def token_groups(
    sequences: Sequence[SignedSequence], tokens: Sequence[Token], layers: Mapping[str, nn.Module]
) -> Iterator[list[int]]:
    """Numbers of tokens of one sequence, so that they share positions, whose pairs fit in memory together."""
    widths = sum(layer.weight.numel() // layer.weight.shape[1] for layer in layers.values())  # type: ignore[operator,union-attr]
    group: list[int] = []
    for number, token in enumerate(tokens):
        size = 4 * max(widths, 1) * (token.place + 1) * (len(group) + 1)
        if group and (size > HELD_BYTES or tokens[group[0]].sequence != token.sequence):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def token_gradients(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    rows: Sequence[Encoded],
    weights: Sequence[float],
    *,
    objective: str,
    tokens_per_batch: int,
    also: Callable[[list[int]], Consume] | None = None,
) -> QueryGradient:
    """Pairs of query tokens that share a sequence, each token an example of `token_rows`.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name.
        rows: The tokens' examples; each is a prefix of the next.
        weights: Factors of the tokens' slopes.
        objective: See `capture.backward`.
        tokens_per_batch: Budget of a backward pass.
        also: From the numbers of a batch's tokens to another consumer of the same pass.
    """
    collected = _TokenPairs({name: [] for name in layers}, {name: [] for name in layers})
    budget = min(tokens_per_batch, TOKENS_AT_ONCE * max((len(row.ids) for row in rows), default=0))
    for numbers in bucketed([len(row.ids) for row in rows], budget):
        batch, other = collate([rows[number] for number in numbers]), also(numbers) if also else None
        consume = partial(collected.add, numbers, torch.tensor([weights[number] for number in numbers]), other)
        backward(model, layers, batch, consume, reduction="sum", objective=objective, whole=True)
    return collected.joined()


@dataclass
class _TokenPairs:
    """Pairs collected from batches of tokens."""

    shared: QueryGradient
    """Pairs of layers that see all positions: the rows are prefixes of the longest one, and so are their inputs."""
    of_head: QueryGradient
    """Pairs of the output head; after `joined`, of all layers."""

    def add(self, numbers: list[int], weights: Float32[Tensor, " u"], also: Consume | None, captured: Captured) -> None:
        """Add one layer's pairs of one batch."""
        if also is not None:
            also(captured)
        if captured.rows is None:
            self.shared[captured.layer].append(pairs_of(captured.a[0], captured.g, numbers, weights))
        else:
            self.of_head[captured.layer].append(_head_pairs(captured, numbers, weights))

    def joined(self) -> QueryGradient:
        """One `Pairs` per layer, with the inputs of the longest row, which came first."""
        for name, pairs in self.shared.items():
            if pairs:
                slopes, spans = torch.cat([some.g for some in pairs]), [span for some in pairs for span in some.spans]
                self.of_head[name].append(Pairs(pairs[0].a, slopes, spans))
            pairs.clear()
        return self.of_head


def _head_pairs(captured: Captured, numbers: list[int], scale: Float32[Tensor, " b"]) -> Pairs:
    """Pairs of the output head, which sees only the positions that predict each token, one token after another."""
    b, t, _ = captured.g.shape
    slopes = captured.g * scale.to(captured.g)[captured.rows][:, None, None]
    owners = [numbers[row] for row in captured.rows.tolist()]  # type: ignore[union-attr]
    spans = [Span(owner, place * t, (place + 1) * t) for place, owner in zip(range(b), owners, strict=True)]
    return Pairs(captured.a.flatten(0, 1), slopes.flatten(0, 1), spans)


# -- against training examples


@dataclass(frozen=True)
class Factors:
    """How a query's inner products become scores if the examples' norms come from the same pass."""

    normalise: str
    cosine: bool
    query_squares: dict[str, float]
    """Squared norm of the query's gradient, by layer."""

    def of_layer(self, layer: str, squares: Float32[Tensor, " b"]) -> Float32[Tensor, " b"]:
        """Factors of a layer's inner products."""
        if self.normalise != "layer":
            return torch.ones_like(squares)
        square = torch.tensor(self.query_squares[layer]).to(squares)
        return inverse_or_zero(square.sqrt()) * inverse_or_zero(squares.sqrt())

    def of_all(self, squares: Mapping[str, Float32[Tensor, " b"]]) -> Float32[Tensor, " b"] | float:
        """Factors of the sum over layers."""
        if not self.cosine:
            return 1.0
        by_layer = torch.stack(list(squares.values()))
        query = torch.tensor(list(self.query_squares.values()))
        if self.normalise == "layer":
            by_layer, query = (by_layer > 0).float(), (query > 0).float()
        return inverse_or_zero(by_layer.sum(0).sqrt()) * inverse_or_zero(query.sum().sqrt())


def factors_of(query: QueryGradient, *, normalise: str, cosine: bool) -> Factors:
    """Factors from a whole query's gradient."""
    squares = {
        layer: float(squared_norms(*joined(pairs)).clamp(min=0)[0]) if pairs else 0.0 for layer, pairs in query.items()
    }
    return Factors(normalise, cosine, squares)


@dataclass
class TokenProducts:
    """Consumes a whole backward pass over `b` examples into `M[u, b, s]`, layer by layer."""

    query: QueryGradient
    factors: Factors | Mapping[str, Float32[Tensor, " b"]]
    """Factors of each layer, for each example of the batch."""
    matrix: Float32[Tensor, "u b s"]
    squares: dict[str, Float32[Tensor, " b"]] = field(default_factory=dict)

    def __call__(self, captured: Captured) -> None:
        """Add one layer."""
        has_slope = (captured.g != 0).any(2)
        a, g = captured.a[has_slope], captured.g[has_slope]
        factors = self._factors(captured)[:, None].expand_as(has_slope)[has_slope]
        places = self._places(captured)[has_slope.cpu()]
        flat = self.matrix.flatten(1)  # shares memory with the matrix
        for pairs in self.query[captured.layer]:
            tokens = torch.tensor([span.token for span in pairs.spans], dtype=torch.int64)
            products = _token_products(pairs, a, g).mul_(factors)
            # a tied head has a position twice: its own and the embedding's
            flat.index_put_((tokens[:, None], places[None]), products.to(flat), accumulate=True)

    def _places(self, captured: Captured) -> Int64[Tensor, "b t"]:
        """Columns of the flat matrix."""
        b, s = self.matrix.shape[1:]
        if captured.rows is None or captured.places is None:
            return torch.arange(b * s).view(b, s)
        return (captured.rows[:, None] * s + captured.places).cpu()

    def _factors(self, captured: Captured) -> Float32[Tensor, " b"]:
        if not isinstance(self.factors, Factors):
            factors = self.factors[captured.layer].to(captured.g)
            return factors if captured.rows is None else factors[captured.rows]
        squares = squared_norms(captured.a, captured.g).clamp(min=0)
        rows = torch.arange(len(squares)) if captured.rows is None else captured.rows.cpu()
        all_squares = torch.zeros(self.matrix.shape[1]).index_add_(0, rows, squares.cpu())
        self.squares[captured.layer] = all_squares
        return self.factors.of_layer(captured.layer, squares)

    def result(self) -> Float32[Tensor, "u b s"]:
        """The token x token matrices of the batch."""
        if not isinstance(self.factors, Factors):
            return self.matrix
        scale = self.factors.of_all(self.squares)
        return self.matrix * (scale[None, :, None] if isinstance(scale, Tensor) else scale)


def _token_products(pairs: Pairs, a: Float32[Tensor, "p i"], g: Float32[Tensor, "p o"]) -> Float32[Tensor, "u p"]:
    """`sum over r of (a_r . a_s)(g_r^(u) . g_s)`: by Gram, or by the tokens' gradients if i is less than their r."""
    out = a.new_zeros(len(pairs.spans), len(a))
    if a.shape[1] * len(pairs.spans) < len(pairs.g):
        for row, (token_a, slopes) in zip(out, pairs.by_token(), strict=True):
            torch.sum((g @ (slopes.T @ token_a)).mul_(a), 1, out=row)
        return out
    kind = a.device.type if a.device.type in POSITIONS_AT_ONCE else "cpu"
    groups = list(_groups(pairs.sizes, PRODUCTS_AT_ONCE[kind] // POSITIONS_AT_ONCE[kind]))
    positions = [sum(pairs.sizes[group]) for group in groups]
    for begin in range(0, len(a), POSITIONS_AT_ONCE[kind]):
        window = slice(begin, begin + POSITIONS_AT_ONCE[kind])
        input_products, rows = pairs.a @ a[window].T, iter(out[:, window])  # [r p]
        for group, slopes in zip(groups, pairs.g.split(positions), strict=True):
            products = (slopes @ g[window].T).split(pairs.sizes[group])
            for (_, first, end), token_product in zip(pairs.spans[group], products, strict=True):
                torch.sum(token_product.mul_(input_products[first:end]), 0, out=next(rows))
    return out


def _groups(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Slices of tokens in their order, with at most `most` positions together, or of one token alone."""
    begin, total = 0, 0
    for number, size in enumerate(sizes):
        if number > begin and total + size > most:
            yield slice(begin, number)
            begin, total = number, 0
        total += size
    yield slice(begin, len(sizes))


def token_products(
    model: LoadedModel,
    layers: Mapping[str, nn.Module],
    query: QueryGradient,
    u: int,
    rows: Sequence[Encoded],
    factors: Factors | Float32[Tensor, "l b"],
    *,
    basis: str,
    reduction: str,
    tokens_per_batch: int,
) -> list[Float32[Tensor, "u s"]]:
    """Token x token matrices of query tokens with training examples.

    Args:
        model: Frozen, in evaluation mode.
        layers: Traced layers by name, in the order of `factors`.
        query: Pairs of `u` query tokens.
        u: Number of query tokens.
        rows: Training examples.
        factors: How inner products become scores: computed in the same pass, or given for each layer and example.
        basis: "position": columns are all tokens of the example; "loss": its supervised tokens. Those of a rejected
            answer follow those of the answer.
        reduction: Reduction of a training example's loss, "mean" or "sum".
        tokens_per_batch: Budget of a backward pass.
    """
    out: list[Tensor] = [torch.zeros(0)] * len(rows)
    if basis == "position":
        for numbers, batch in batches(rows, tokens_per_batch):
            batch_factors = factors if isinstance(factors, Factors) else _by_layer(layers, factors[:, numbers])
            consume = TokenProducts(
                query, batch_factors, torch.zeros(u, len(batch), batch.ids[0].numel() * batch.sides)
            )
            backward(model, layers, batch, consume, reduction=reduction, whole=True)
            for matrix, number in zip(consume.result().unbind(1), numbers, strict=True):
                sides = zip(matrix.split(batch.ids.shape[1], 1), sequences_of(rows[number]), strict=False)
                out[number] = torch.cat([side[:, : len(sequence.encoded.ids)] for side, sequence in sides], 1)
        return out
    if isinstance(factors, Factors):  # norms are of whole examples, and a pass over single tokens does not give them
        empty: QueryGradient = {name: [] for name in layers}
        products = layer_products(model, layers, empty, rows, reduction=reduction, tokens_per_batch=tokens_per_batch)
        squares = torch.tensor([factors.query_squares[name] for name in layers])
        products = LayerProducts(products.dots, squares, products.squares)
        factors = products.factors(normalise=factors.normalise, cosine=factors.cosine)
    for number, row in enumerate(rows):
        tokens = tokens_of(sequences_of(row), reduction)
        single_tokens = token_rows(sequences_of(row), tokens)
        matrix = torch.zeros(u, len(tokens))
        for numbers, batch in batches(single_tokens, tokens_per_batch):
            weight = torch.tensor([tokens[place].weight for place in numbers])
            scaled = _by_layer(layers, factors[:, [number] * len(numbers)] * weight)
            consume = TokenProducts(query, scaled, torch.zeros(u, *batch.ids.shape))
            backward(model, layers, batch, consume, reduction="sum", whole=True)
            matrix[:, numbers] = consume.matrix.sum(2)
        out[number] = matrix
    return out


def _by_layer(layers: Mapping[str, nn.Module], factors: Tensor) -> Mapping[str, Tensor]:
    return dict(zip(layers, factors, strict=True))
