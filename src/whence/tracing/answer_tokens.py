"""Scores of every row for every token of an answer, so that any stretch of it is ranked without another pass.

An index of plain sketches is linear in a query's gradient, and the gradient of a stretch is the mean (or sum) of its
tokens' own. With v_u the vector of token u under a checkpoint c, r_n the stored one of row n, and a_u = 1 / |S| for the
tokens of a stretch S, else 0 (and -1 for the whole of a contrast):

    dot       score[n] = sum over c of weight_c * sum_u a_u <v_u, r_n>
    cosine    score[n] = sum over c of weight_c * sum_u a_u <v_u, r_n> / (|r_n| sqrt(a^T G_c a))
    G_c[u, w] = <v_u, v_w>

which is the score of a trace of that stretch. The products take one scan for all tokens; a stretch then takes u n
multiplications. Where layers are divided by their norms (`normalise` "layer") a stretch is not the sum of its tokens:
then each stretch is a pass of its own (`stretch_scores`).

Larger is more helpful. Source: TracIn, Pruthi et al. 2020, https://arxiv.org/abs/2002.08484, equation 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.gradients.exact import SignedSequence
from whence.indexing.opening import Index
from whence.numerics import inverse_or_zero
from whence.tracing.queries import EncodedQuery, query_vectors


@dataclass(frozen=True)
class AnswerTokens:
    """Products of an answer's tokens with every row of an index."""

    products: Float32[Tensor, "c u n"]
    """With rows divided by their norms, by checkpoint, token (the contrast after them) and row. 0 where a row cannot be
    ranked."""
    row_norms: Float32[Tensor, "c n"]
    grams: Float32[Tensor, "c u u"]
    """Inner products of the tokens' vectors."""
    weights: Float32[Tensor, " c"]
    tokens: int
    """Tokens of the answer."""
    is_rankable: Bool[Tensor, " n"]
    reduction: str
    """Of a stretch's tokens: "mean" or "sum"."""

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self.products.numel() * self.products.itemsize

    def coefficients(self, asked: Sequence[bool]) -> Float32[Tensor, " u"]:
        """What each token counts in a stretch.

        Raises:
            SettingError: No token is asked about, or other tokens than the answer's.
        """
        if len(asked) != self.tokens or not any(asked):
            raise SettingError(f"a stretch of an answer of {self.tokens} tokens is expected, with one of them or more")
        out = torch.zeros(self.grams.shape[1])
        out[: self.tokens] = torch.tensor(asked, dtype=torch.float32)
        if self.reduction == "mean":
            out[: self.tokens] /= sum(asked)
        out[self.tokens :] = -1.0
        return out

    def norms(self, asked: Sequence[bool]) -> Float32[Tensor, " c"]:
        """Norm of a stretch's vector under each checkpoint."""
        a = self.coefficients(asked)
        return torch.einsum("u,cuw,w->c", a, self.grams, a).clamp_(min=0).sqrt()

    def scores(self, asked: Sequence[bool], *, cosine: bool) -> Float32[Tensor, " n"]:
        """Scores of every row for a stretch, the mean (or sum) over its tokens; -inf where a row cannot be ranked.

        In nats^2 per squared unit of weight, or from -1 to 1 for the cosine. Larger is more helpful.
        """
        by_checkpoint = torch.einsum("u,cun->cn", self.coefficients(asked), self.products)
        scale = inverse_or_zero(self.norms(asked))[:, None] if cosine else self.row_norms
        by_checkpoint = by_checkpoint * scale
        return (self.weights @ by_checkpoint).masked_fill_(~self.is_rankable, -torch.inf)


def is_linear(index: Index) -> bool:
    """Whether a stretch's vector is the mean of its tokens' own."""
    return index.space.normalise == "none"


def product_bytes(index: Index, query: EncodedQuery) -> int:
    """Memory that `AnswerTokens` of an answer would take."""
    return 4 * len(index.weights) * (len(query.answer.tokens) + 1) * index.store.rows


def answer_tokens(index: Index, query: EncodedQuery, *, objective: str = "loss") -> AnswerTokens:
    """Products of every token of an answer with every row: a pass over the answer a token, and one scan.

    Args:
        index: A complete index.
        query: About the whole of its answer.
        objective: Name in `capture.OBJECTIVES`.

    Raises:
        SettingError: Tokens do not add up in this index (`is_linear`).
    """
    if not is_linear(index):
        raise SettingError(
            f"{index.store.place.root}: its layers are divided by their norms, so that the tokens of an answer do not "
            "add up to it. Ask about a stretch by itself."
        )
    answer = query.sequences[0].encoded
    places = range(len(query.answer.tokens))
    pieces = [[SignedSequence(asked_about(answer, [place == one for place in places]))] for one in places]
    others = [[replace(other, sign=1.0)] for other in query.sequences[1:]]
    return _scored(index, [*pieces, *others], len(places), objective)


def stretch_scores(
    index: Index, query: EncodedQuery, asked: Sequence[bool], *, objective: str = "loss"
) -> AnswerTokens:
    """The same for one stretch as a whole, in any index: `AnswerTokens` of one token, which is the stretch."""
    return _scored(index, [about(query, asked).sequences], 1, objective)


def about(query: EncodedQuery, asked: Sequence[bool]) -> EncodedQuery:
    """A query about the whole of its answer, about some of its tokens alone."""
    first, *others = query.sequences
    encoded = asked_about(first.encoded, asked)
    return replace(query, sequences=[replace(first, encoded=encoded), *others],
                   answer=replace(query.answer, asked=list(asked)))  # fmt: skip


def asked_about(answer: Encoded, asked: Sequence[bool]) -> Encoded:
    """A prompt and an answer of which all is supervised, supervised where its tokens are asked about.

    Raises:
        SettingError: The answer has another number of tokens.
    """
    if len(asked) != sum(answer.supervised):
        raise SettingError(f"{len(asked)} tokens are named of an answer that asks about {sum(answer.supervised)}")
    is_asked = iter(asked)
    return replace(answer, supervised=[is_target and next(is_asked) for is_target in answer.supervised])


def _scored(index: Index, pieces: list[list[SignedSequence]], tokens: int, objective: str) -> AnswerTokens:
    """Products of some vectors with every row: a scan a checkpoint."""
    store, vectors = index.store, query_vectors(index, pieces, objective=objective)
    weights = torch.tensor(index.weights, dtype=torch.float32)
    products = torch.zeros(len(weights), len(pieces), store.rows)
    is_rankable = torch.zeros(store.rows, dtype=torch.bool)
    for checkpoint in range(len(weights)):
        alone = torch.zeros(len(weights))
        alone[checkpoint] = 1.0
        for first, scores in store.scores(vectors, alone, cosine=True, is_unit_mean=True):
            end = first + scores.shape[1]
            products[checkpoint, :, first:end] = scores
            is_rankable[first:end] = scores.isfinite().all(0)
    products[:, :, ~is_rankable] = 0.0
    grams = torch.einsum("cuk,cwk->cuw", vectors, vectors)
    return AnswerTokens(products, store.norms(), grams, weights, tokens, is_rankable, index.space.reduction)
