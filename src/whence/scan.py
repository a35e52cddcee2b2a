"""Exact top-k over stored vectors, in one pass for many queries, without the n x q matrix.

Rows stream past in blocks that fit the caches. A block's scores are compared with each query's k-th best so
far, and only the few that reach it are merged, so that ranking costs little beside the products. Where a
kernel's products are rounded (bfloat16), a row is kept if its score plus its slack reaches the k-th best, and
is then scored again from its decoded vector in fp32: what is returned is what fp32 over all rows would
return.

score[q, n] = sum over checkpoints c of weight_c * <query_cq, row_cn>, each divided by both norms for the
cosine (the row's before it was encoded; a zero norm scores 0). Larger is more helpful. Rows whose status is
not ok in any checkpoint are never ranked. Equal scores rank by the lower row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence.codecs import Codec, Kernel
from whence.shards import Shard

_BLOCK_BYTES = 1 << 27  # of stored rows: large enough to hide the cost of a call
_BLOCK_SCORES = 1 << 18  # of one block: larger ones fall out of cache before they are ranked
_LEAST_ROWS = 256  # of a block, whatever its bytes and queries
_SERIAL_ENTRIES = 1 << 15  # torch does not wake its threads for tensors of so few entries


@dataclass(frozen=True)
class Ranking:
    """The best rows of each query, best first. `rows` are numbers within the whole index."""

    scores: Float32[Tensor, "q m"]
    rows: Int64[Tensor, "q m"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a scan looks for: one set of queries and one weight for each checkpoint."""

    queries: Float32[Tensor, "c q k"]
    weights: Float32[Tensor, " c"]
    cosine: bool
    codec: Codec


Piece = tuple[int, list[Shard]]
"""Rows of the index: the number of the first one, and their shard under each checkpoint."""


def block_scores(question: Question, pieces: Iterable[Piece]) -> Iterator[tuple[int, Float32[Tensor, "q n"]]]:
    """Every score, a shard at a time: (number of its first row, scores). Where the status is not ok: -inf."""
    queries = _units(question)
    for first, shards in pieces:
        total = torch.zeros(queries.shape[1], len(shards[0].norm))
        for c, shard in enumerate(shards):
            products = question.codec.scores(shard.vectors, shard.scale, queries[c])
            total += products * _row_factor(question, shard) * question.weights[c]
        total.masked_fill_(~_is_ok(shards), -torch.inf)
        yield first, total


def top_k(question: Question, pieces: Iterable[Piece], m: int) -> tuple[Ranking, Ranking]:
    """The m highest and the m lowest scores of each query: (helpful, opposing). Fewer if rows are."""
    queries = _units(question)
    kernels = [question.codec.prepare(part) for part in queries]
    best = [_Best.empty(queries.shape[1], m), _Best.empty(queries.shape[1], m)]
    for first, shards in pieces:
        for rows in _blocks(shards[0], queries.shape[1]):
            block = [_part(shard, rows) for shard in shards]
            scores, slack = _approximate(question, kernels, block)
            ok = _is_ok(block)
            if not bool(ok.all()):
                scores = torch.where(ok, scores, torch.nan)  # compares as neither higher nor lower
            for side, sign in enumerate((1, -1)):
                pairs = _candidates(scores, slack, best[side].scores[:, -1], sign, m)
                exact = scores[pairs] if slack is None else _rescored(question, queries, block, pairs)
                best[side] = best[side].merged(pairs[0], pairs[1] + first + rows.start, exact * sign)
    return best[0].ranking(1.0), best[1].ranking(-1.0)


def _units(question: Question) -> Tensor:
    """The queries, divided by their norms for the cosine."""
    if not question.cosine:
        return question.queries
    return question.queries * _inverse(question.queries.norm(dim=2))[:, :, None]


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm > torch.finfo(norm.dtype).tiny, 1 / norm, 0.0)


def _row_factor(question: Question, shard: Shard) -> Tensor | float:
    return _inverse(shard.norm) if question.cosine else 1.0


def _is_ok(shards: list[Shard]) -> Tensor:
    return torch.stack([shard.status == 0 for shard in shards]).all(0)


def _blocks(shard: Shard, q: int) -> Iterator[slice]:
    row_bytes = max(1, shard.vectors.shape[1] * shard.vectors.itemsize)
    step = max(_LEAST_ROWS, min(_BLOCK_BYTES // row_bytes, _BLOCK_SCORES // max(1, q)))
    for first in range(0, len(shard.norm), step):
        yield slice(first, first + step)


def _part(shard: Shard, rows: slice) -> Shard:
    return Shard(**{name: tensor[rows] for name, tensor in vars(shard).items()})


def _approximate(question: Question, kernels: list[Kernel], shards: list[Shard]) -> tuple[Tensor, Tensor | None]:
    """Scores of a block and how far off they can be."""
    total, slack = None, None
    for weight, kernel, shard in zip(question.weights.tolist(), kernels, shards, strict=True):
        block = kernel(shard.vectors, shard.scale)
        scores, error = block.scores, block.slack
        if error is not None and block.slack_per_norm is not None:
            error = error + block.slack_per_norm[:, None] * shard.norm
        if question.cosine or weight != 1:
            factor = _row_factor(question, shard) * weight
            scores, error = scores * factor, None if error is None else error * abs(factor)
        total = scores if total is None else total + scores
        slack = error if slack is None or error is None else slack + error
    assert total is not None, "an index has a checkpoint"
    return total, slack


def _rescored(question: Question, queries: Tensor, shards: list[Shard], pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The fp32 scores of (query, row of the block) pairs, from decoded rows."""
    total, step = torch.zeros(len(pairs[0])), max(1, _SERIAL_ENTRIES // max(1, queries.shape[2]))
    for c, shard in enumerate(shards):
        factor = _row_factor(question, shard) * question.weights[c]
        for some in torch.arange(len(total)).split(step):
            query, row = pairs[0][some], pairs[1][some]
            vectors = question.codec.decode(shard.vectors[row], shard.scale[row], queries.shape[2])
            products = torch.linalg.vecdot(vectors, queries[c, query])
            total[some] += products * (factor[row] if factor.ndim else factor)
    return total


def _candidates(scores: Tensor, slack: Tensor | None, threshold: Tensor, sign: int, m: int) -> tuple[Tensor, Tensor]:
    """(query, row) pairs whose signed score can pass the m-th best, rows ascending for each query.

    In numpy, which stays in this thread: waking torch's threads costs more than such a small step, and many
    milliseconds where another process has their core.
    """
    furthest = np.ascontiguousarray(scores.T.numpy())  # [n, q], as products lie
    if slack is not None:
        furthest = furthest + sign * slack.T.numpy()
    hits = _true(furthest > threshold.numpy() if sign > 0 else furthest < -threshold.numpy())
    n, q = furthest.shape
    if m < n and len(hits) > 4 * m * q:
        # as at the start of a scan: only the best m of this block can stay
        upper = sign * furthest
        lower = np.nan_to_num(upper if slack is None else upper - 2 * slack.T.numpy(), nan=-np.inf)
        least = np.partition(lower, n - m, axis=0)[n - m]
        hits = hits[upper.ravel()[hits] >= least[hits % q]]
    pair_rows, pair_queries = np.divmod(hits, max(1, q))
    order = np.argsort(pair_queries, kind="stable")
    return torch.from_numpy(pair_queries[order]), torch.from_numpy(pair_rows[order])


def _true(claims: np.ndarray) -> np.ndarray:
    """Flat places of the true entries, ascending; fast where they are few, by looking at eight at a time."""
    flat = claims.ravel()
    whole = len(flat) // 8 * 8
    eights = np.flatnonzero(flat[:whole].view(np.uint64))
    places = (eights[:, None] * 8 + np.arange(8)).ravel()
    return np.concatenate([places[flat[places]], whole + np.flatnonzero(flat[whole:])])


@dataclass(frozen=True)
class _Best:
    """The best m so far, by signed score (for the lowest: the score negated). Unfilled: -inf."""

    scores: Tensor  # [q, m]
    rows: Tensor  # [q, m]

    @staticmethod
    def empty(q: int, m: int) -> "_Best":
        return _Best(torch.full((q, m), -torch.inf), torch.full((q, m), -1, dtype=torch.int64))

    def merged(self, pair_queries: Tensor, pair_rows: Tensor, pair_scores: Tensor) -> "_Best":
        """With more rows, all later than those seen: a stable sort then ranks ties by the lower row."""
        if not len(pair_rows):
            return self
        (q, m), counts = self.scores.shape, torch.bincount(pair_queries, minlength=len(self.scores))
        place = m + torch.arange(len(pair_rows)) - (counts.cumsum(0) - counts)[pair_queries]
        scores = torch.full((q, m + int(counts.max())), -torch.inf)
        rows = torch.full(scores.shape, -1, dtype=torch.int64)
        scores[:, :m], rows[:, :m] = self.scores, self.rows
        scores[pair_queries, place], rows[pair_queries, place] = pair_scores, pair_rows
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return _Best(scores[:, :m].contiguous(), rows.gather(1, order[:, :m]))

    def ranking(self, sign: float) -> Ranking:
        """Without the unfilled places, of which every query has as many."""
        filled = int((self.rows >= 0).sum(1).max()) if len(self.rows) else 0
        return Ranking(sign * self.scores[:, :filled], self.rows[:, :filled])
