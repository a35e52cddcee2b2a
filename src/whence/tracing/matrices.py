"""The examples shown, token by token: each query token's share in a score, and the token x token matrix.

A query token's share in the index' score is the inner product of its own sketched gradient with the example's stored
vector, so that the shares sum to that score. The matrix is of unprojected gradients (`tokenwise`) and sums to the exact
score. Both come from the same backward passes of the query.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.corpus.tokens import Encoded
from whence.gradients import tokenwise
from whence.gradients.capture import Captured, Consume, Sketches, inverse
from whence.gradients.exact import Held, held_whole
from whence.gradients.protocols import Projection
from whence.gradients.tokenwise import Factors, Token
from whence.indexing.build import Index
from whence.models.loading import LoadedModel
from whence.tracing.queries import Asked, last_first, token_text
from whence.tracing.results import TokenMatrix

ByToken = tuple[list[float], TokenMatrix]
"""Each query token's share in the index' score; and the matrix."""


@dataclass
class Sharing:
    """One query's scores for some rows, shared out among tokens, a checkpoint at a time."""

    index: Index
    asked: Asked
    vectors: Float32[Tensor, "c k"]
    """The query's, in the index' space."""
    rows: dict[int, Encoded]
    """By number within the index."""
    objective: str
    cosine: bool
    basis: str
    tokens: list[Token] = field(init=False)
    shares: Float32[Tensor, "u h"] = field(init=False)
    matrices: list[TokenMatrix] = field(init=False)

    def __post_init__(self):
        self.tokens = tokenwise.tokens_of(self.asked.parts, self.index.space.reduction)
        self.shares = torch.zeros(len(self.tokens), len(self.rows))
        self.matrices = [self._empty(row) for row in self.rows.values()]

    def _empty(self, row: Encoded) -> TokenMatrix:
        """Of zeros; the last checkpoint's model, which is loaded, says what its tokens are as text."""
        model = self.index.model()
        kept = [place for place, is_target in enumerate(row.supervised) if is_target or self.basis == "position"]
        return TokenMatrix(
            basis=self.basis,
            query=self.asked.answer.query_tokens(),
            train=[token_text(model, row.ids[place]) for place in kept],
            supervised=[row.supervised[place] for place in kept],
            matrix=torch.zeros(len(self.tokens), len(kept)),
        )

    def add(self, checkpoint: int, model: LoadedModel) -> None:
        """What one checkpoint adds."""
        index, parts, rows = self.index, self.asked.parts, list(self.rows.values())
        layers, weight = index.layers(model), index.weights[checkpoint]
        whole = held_whole(model, layers, parts, index.space, self.objective)
        factors = tokenwise.factors_of(whole, normalise=index.space.normalise, cosine=self.cosine)
        stored, norms = index.store.vectors(list(self.rows))
        rights = stored[checkpoint] * (inverse(norms[checkpoint])[:, None] if self.cosine else 1)
        scale = float(inverse(self.vectors[checkpoint].norm())) if self.cosine else 1.0
        for group in tokenwise.each_group_of_tokens(parts, self.tokens, layers):
            held, sketches = self._held(model, [self.tokens[number] for number in group], factors)
            self.shares[group] += weight * scale * sketches @ rights.T
            found = tokenwise.token_products(
                model,
                layers,
                held,
                len(group),
                rows,
                factors,
                basis=self.basis,
                reduction=index.space.reduction,
                tokens_per_batch=index.tokens_per_batch,
            )
            for whole_matrix, part in zip(self.matrices, found, strict=True):
                whole_matrix.matrix[group] += weight * part

    def _held(self, model: LoadedModel, tokens: list[Token], factors: Factors) -> tuple[Held, Float32[Tensor, "u k"]]:
        """Pairs of some query tokens, and their sketches from the same pass."""
        index, layers = self.index, self.index.layers(model)
        projection = index.projection(model)
        rows, weights = tokenwise.token_rows(self.asked.parts, tokens), [token.weight for token in tokens]
        scales = dict.fromkeys(layers, 1.0)
        if index.space.normalise == "layer":  # by the whole query's norms, so that tokens add up to it
            scales = {name: square**-0.5 if square > 0 else 0.0 for name, square in factors.query_squares.items()}
        made: list[tuple[list[int], Sketches]] = []
        held = tokenwise.held_tokens(
            model,
            layers,
            rows,
            weights,
            objective=self.objective,
            tokens_per_batch=index.tokens_per_batch,
            also=partial(_sketching, made, projection, model.device, scales),
        )
        sketches = torch.zeros(len(tokens), projection.width)
        for numbers, into in made:
            sketches[numbers] = into.rows.cpu() * torch.tensor(weights)[numbers, None]
        return held, sketches

    def by_row(self) -> dict[int, ByToken]:
        """What was found."""
        return {row: (self.shares[:, n].tolist(), self.matrices[n]) for n, row in enumerate(self.rows)}


def _sketching(
    made: list[tuple[list[int], Sketches]],
    projection: Projection,
    device: torch.device,
    scales: dict[str, float],
    numbers: list[int],
) -> Consume:
    """A consumer of one batch of tokens, and its sketches among those made."""
    made.append((numbers, Sketches(projection, len(numbers), device)))
    return partial(_sketch_scaled, made[-1][1], scales)


def _sketch_scaled(into: Sketches, scales: dict[str, float], seen: Captured) -> None:
    into(replace(seen, g=seen.g * scales[seen.layer]))


def share_out(index: Index, sharings: Sequence[Sharing]) -> list[dict[int, ByToken]]:
    """Matrices of all queries; each checkpoint is loaded once."""
    for checkpoint, model in last_first(index):
        for sharing in sharings:
            sharing.add(checkpoint, model)
    return [sharing.by_row() for sharing in sharings]
