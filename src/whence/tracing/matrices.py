"""The examples shown, token by token: each query token's share in a score, and the token x token matrix.

A query token's share in the index' score is the inner product of its own sketched gradient with the example's stored
vector, so that the shares sum to that score. The matrix comes from unprojected gradients (`gradients.tokenwise`) and
sums to the exact score. The same backward passes of the query give both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.corpus.tokens import Encoded
from whence.gradients import tokenwise
from whence.gradients.capture import Captured, Consume, Sketches
from whence.gradients.exact import QueryGradient, query_gradient, sequences_of
from whence.gradients.protocols import Projection
from whence.gradients.tokenwise import Factors, Token
from whence.indexing.opening import Index
from whence.models.loading import LoadedModel
from whence.numerics import inverse_or_zero
from whence.tracing.queries import EncodedQuery, last_first, token_texts
from whence.tracing.results import TokenMatrix

ByToken = tuple[list[float], TokenMatrix]
"""Each query token's share in the index' score, and the matrix."""


@dataclass
class TokenShares:
    """One query's scores for some rows, divided among tokens, a checkpoint at a time."""

    index: Index
    query: EncodedQuery
    vectors: Float32[Tensor, "c k"]
    """The query's vectors, in the index' space."""
    rows: dict[int, Encoded]
    """Rows by number within the index."""
    objective: str
    cosine: bool
    basis: str
    tokens: list[Token] = field(init=False)
    shares: Float32[Tensor, "u h"] = field(init=False)
    matrices: list[TokenMatrix] = field(init=False)

    def __post_init__(self):
        self.tokens = tokenwise.tokens_of(self.query.sequences, self.index.space.reduction)
        self.shares = torch.zeros(len(self.tokens), len(self.rows))
        self.matrices = [self._zero_matrix(row) for row in self.rows.values()]

    def _zero_matrix(self, row: Encoded) -> TokenMatrix:
        """A row's matrix of zeros; the last checkpoint's tokenizer, which is loaded, turns its tokens into text."""
        model = self.index.model()
        texts: list[str] = []
        supervised: list[bool] = []
        starts: list[int] = []
        for sequence in sequences_of(row):
            starts.append(len(texts))
            targets = sequence.encoded.supervised
            places = [place for place, is_target in enumerate(targets) if is_target or self.basis == "position"]
            texts += token_texts(model, sequence.encoded.ids, places)
            supervised += [targets[place] for place in places]
        return TokenMatrix(
            basis=self.basis,
            query=self.query.answer.query_tokens(),
            train=texts,
            supervised=supervised,
            matrix=torch.zeros(len(self.tokens), len(texts)),
            rejected_from=dict(enumerate(starts)).get(1),
        )

    def add(self, checkpoint: int, model: LoadedModel) -> None:
        """Add one checkpoint's shares and products."""
        index, sequences, rows = self.index, self.query.sequences, list(self.rows.values())
        layers, weight = index.layers(model), index.weights[checkpoint]
        whole = query_gradient(model, layers, sequences, index.space, self.objective)
        factors = tokenwise.factors_of(whole, normalise=index.space.normalise, cosine=self.cosine)
        stored, norms = index.store.vectors(list(self.rows))
        examples = stored[checkpoint] * (inverse_or_zero(norms[checkpoint])[:, None] if self.cosine else 1)
        scale = float(inverse_or_zero(self.vectors[checkpoint].norm())) if self.cosine else 1.0
        for group in tokenwise.token_groups(sequences, self.tokens, layers):
            pairs, sketches = self._token_pairs(model, [self.tokens[number] for number in group], factors)
            self.shares[group] += weight * scale * sketches @ examples.T
            products = tokenwise.token_products(
                model,
                layers,
                pairs,
                len(group),
                rows,
                factors,
                basis=self.basis,
                reduction=index.space.reduction,
                tokens_per_batch=index.tokens_per_batch,
            )
            for token_matrix, product in zip(self.matrices, products, strict=True):
                token_matrix.matrix[group] += weight * product

    def _token_pairs(
        self, model: LoadedModel, tokens: list[Token], factors: Factors
    ) -> tuple[QueryGradient, Float32[Tensor, "u k"]]:
        """Pairs of some of the query's tokens, and their sketches, from one pass."""
        index, layers = self.index, self.index.layers(model)
        projection = index.projection(model)
        rows, weights = tokenwise.token_rows(self.query.sequences, tokens), [token.weight for token in tokens]
        scales = dict.fromkeys(layers, 1.0)
        if index.space.normalise == "layer":  # by the whole query's norms, so that tokens add up to it
            scales = {name: square**-0.5 if square > 0 else 0.0 for name, square in factors.query_squares.items()}
        batches: list[tuple[list[int], Sketches]] = []
        pairs = tokenwise.token_gradients(
            model,
            layers,
            rows,
            weights,
            objective=self.objective,
            tokens_per_batch=index.tokens_per_batch,
            also=partial(_sketching, batches, projection, model.device, scales),
        )
        sketches = torch.zeros(len(tokens), projection.width)
        for numbers, batch in batches:
            sketches[numbers] = batch.rows.cpu() * torch.tensor(weights)[numbers, None]
        return pairs, sketches

    def by_row(self) -> dict[int, ByToken]:
        """Shares and matrix of each row, by its number."""
        return {row: (self.shares[:, n].tolist(), self.matrices[n]) for n, row in enumerate(self.rows)}


def _sketching(
    batches: list[tuple[list[int], Sketches]],
    projection: Projection,
    device: torch.device,
    scales: dict[str, float],
    numbers: list[int],
) -> Consume:
    """A consumer of one batch of tokens, whose sketches are added to `batches`."""
    batches.append((numbers, Sketches(projection, len(numbers), device)))
    return partial(_sketch_scaled, batches[-1][1], scales)


def _sketch_scaled(sketches: Sketches, scales: dict[str, float], captured: Captured) -> None:
    sketches(replace(captured, g=captured.g * scales[captured.layer]))


def shares_by_row(index: Index, shares: Sequence[TokenShares]) -> list[dict[int, ByToken]]:
    """Shares and matrices of all queries; each checkpoint is loaded once."""
    for checkpoint, model in last_first(index):
        for query_shares in shares:
            query_shares.add(checkpoint, model)
    return [query_shares.by_row() for query_shares in shares]
