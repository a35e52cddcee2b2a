"""Exact top-k over stored vectors, in one pass for many queries, without the n x q matrix.

Rows stream past in blocks that fit the caches. A block's scores are compared with each query's k-th best so
far, and only the few that reach it are merged, so that ranking costs little beside the products. Where a
kernel's products are rounded (bfloat16), a row is kept if its score plus its slack reaches the k-th best, and
is then scored again from its decoded vector in fp32: what is returned is what fp32 over all rows would
return.

score[q, n] = sum over checkpoints c of weight_c * <query_cq, row_cn>, each divided by both norms for the
cosine (the row's before it was encoded, the query's before the scan; a zero norm scores 0). Larger is more
helpful. Rows whose status is not ok in any checkpoint are never ranked. Equal scores rank by the lower row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence.codecs import Codec
from whence.kernels import Kernel
from whence.shards import Shard

_BLOCK_BYTES = 1 << 27  # of stored rows: large enough to hide the cost of a call
_BLOCK_SCORES = 1 << 18  # of one block: larger ones fall out of cache before they are ranked
_WAITING_BYTES = 1 << 30  # of stored rows, which a remote index holds in memory until they are ranked
_GROUP = 64  # rows whose best stands for them
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
    """For the cosine, divided by their norms already: see `unit`."""
    weights: Float32[Tensor, " c"]
    cosine: bool
    """Rows are divided by their norms."""
    codec: Codec


Piece = tuple[int, list[Shard]]
"""Rows of the index: the number of the first one, and their shard under each checkpoint."""


def block_scores(question: Question, pieces: Iterable[Piece]) -> Iterator[tuple[int, Float32[Tensor, "q n"]]]:
    """Every score, a shard at a time: (number of its first row, scores). Where the status is not ok: -inf."""
    queries = question.queries
    for first, shards in pieces:
        total = torch.zeros(queries.shape[1], len(shards[0].norm))
        for c, shard in enumerate(shards):
            products = question.codec.scores(shard.vectors, shard.scale, queries[c])
            total += products * _row_factor(question, shard) * question.weights[c]
        total.masked_fill_(~_is_ok(shards), -torch.inf)
        yield first, total


def top_k(question: Question, pieces: Iterable[Piece], m: int) -> tuple[Ranking, Ranking]:
    """The m highest and the m lowest scores of each query: (helpful, opposing). Fewer if rows are."""
    queries = question.queries
    kernels = [question.codec.prepare(part) for part in queries]
    best = [_Best.empty(queries.shape[1], m), _Best.empty(queries.shape[1], m)]
    waiting: list[_Scored] = []
    for first, shards in pieces:
        for rows in _blocks(shards[0], queries.shape[1]):
            block = [_part(shard, rows) for shard in shards]
            waiting.append(_Scored(first + rows.start, block, *_approximate(question, kernels, block)))
            if _is_enough(waiting):
                best = _merged(question, queries, waiting, best)
                waiting = []
    if waiting:
        best = _merged(question, queries, waiting, best)
    return best[0].ranking(1.0), best[1].ranking(-1.0)


@dataclass(frozen=True)
class _Scored:
    """A block with its scores, to be ranked."""

    first: int
    shards: list[Shard]
    scores: Tensor  # [q, n]
    slack: Tensor | None  # [q, n]


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a query and a row of a waiting block, by query and then by row."""

    query: np.ndarray
    block: np.ndarray
    row: np.ndarray
    """Within the block."""

    def of(self, some: np.ndarray) -> "_Pairs":
        """Those that a mask tells."""
        return _Pairs(self.query[some], self.block[some], self.row[some])


def _is_enough(waiting: list[_Scored]) -> bool:
    """Few queries wait for several blocks: ranking each by itself costs more than its products."""
    scores = sum(block.scores.numel() for block in waiting)
    stored = sum(shard.vectors.numel() * shard.vectors.itemsize for block in waiting for shard in block.shards)
    return scores >= _BLOCK_SCORES or stored >= _WAITING_BYTES


def _merged(question: Question, queries: Tensor, waiting: list[_Scored], best: list["_Best"]) -> list["_Best"]:
    """The best (highest, lowest) with the waiting blocks."""
    scores = np.concatenate([block.scores.T.numpy() for block in waiting])  # [n, q], as products lie
    scores[~np.concatenate([_is_ok(block.shards).numpy() for block in waiting])] = np.nan  # neither high nor low
    slack = None
    if any(block.slack is not None for block in waiting):  # a first, small block may have had another kernel
        slack = np.concatenate([np.zeros_like(b.scores.T) if b.slack is None else b.slack.T for b in waiting])
    ends = np.cumsum([block.scores.shape[1] for block in waiting])
    out = []
    for sign, side in zip((1, -1), best, strict=True):
        query, place = _candidates(scores, slack, side.scores[:, -1].numpy(), sign, side.scores.shape[1])
        where, signed = np.searchsorted(ends, place, side="right"), sign * scores[place, query]
        found = _Pairs(query, where, place - (ends - [block.scores.shape[1] for block in waiting])[where])
        if slack is not None:
            # the best by approximate score first: their true scores raise what the others have to reach
            furthest, exact = signed + slack[place, query], np.full_like(signed, -np.inf)
            first = _rank_within(query, -signed) < 2 * side.scores.shape[1]
            exact[first] = sign * _rescored(question, queries, waiting, found.of(first))
            reached = side.merged(found.of(first), waiting, exact[first]).scores[:, -1].numpy()
            rest = ~first & (furthest >= reached[query])
            exact[rest] = sign * _rescored(question, queries, waiting, found.of(rest))
            found, signed = found.of(first | rest), exact[first | rest]
        out.append(side.merged(found, waiting, signed))
    return out


def unit(vectors: Float32[Tensor, "*any k"]) -> Float32[Tensor, "*any k"]:
    """Vectors divided by their norms; zeros stay zeros."""
    return vectors * _inverse(vectors.norm(dim=-1, keepdim=True))


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
        for slope, size in ((block.slack_per_norm, shard.norm), (block.slack_per_scale, shard.scale)):
            if slope is not None:
                per_row = slope[:, None] * size
                error = per_row if error is None else error + per_row
        if question.cosine or weight != 1:
            factor = _row_factor(question, shard) * weight
            scores, error = scores * factor, None if error is None else error * abs(factor)
        total = scores if total is None else total + scores
        slack = error if slack is None or error is None else slack + error
    assert total is not None, "an index has a checkpoint"
    return total, slack


def _rescored(question: Question, queries: Tensor, waiting: list[_Scored], pairs: _Pairs) -> np.ndarray:
    """The fp32 scores of pairs, from decoded rows."""
    total, step = torch.zeros(len(pairs.query)), max(1, _SERIAL_ENTRIES // max(1, queries.shape[2]))
    for number in np.unique(pairs.block):
        places = torch.from_numpy(np.flatnonzero(pairs.block == number))
        for c, shard in enumerate(waiting[number].shards):
            factor = _row_factor(question, shard) * question.weights[c]
            for some in places.split(step):
                query, row = torch.from_numpy(pairs.query)[some], torch.from_numpy(pairs.row)[some]
                vectors = question.codec.decode(shard.vectors[row], shard.scale[row], queries.shape[2])
                products = torch.linalg.vecdot(vectors, queries[c, query])
                total[some] += products * (factor[row] if factor.ndim else factor)
    return total.numpy()


def _rank_within(group: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Place of each entry among those of its group, by ascending key. Groups come in ascending order."""
    order, rank = np.lexsort((key, group)), np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.searchsorted(group, group)
    return rank


def _candidates(
    scores: np.ndarray, slack: np.ndarray | None, threshold: np.ndarray, sign: int, m: int
) -> tuple[np.ndarray, np.ndarray]:
    """(query, row) pairs of [n, q] whose signed score can pass the m-th best, rows ascending for each query.

    In numpy, which stays in this thread: waking torch's threads costs more than such a small step, and many
    milliseconds where another process has their core.
    """
    n, q = scores.shape
    furthest = scores if slack is None else scores + sign * slack
    hits = (
        None
        if m < n and np.isinf(threshold).any()
        else _true(furthest > threshold if sign > 0 else furthest < -threshold)
    )
    if hits is None or (m < n and len(hits) > 4 * m * q):
        # at the start of a scan, or where scores rise: only the best m of these rows can stay
        upper = sign * furthest
        lower = np.nan_to_num(upper if slack is None else upper - 2 * slack, nan=-np.inf)
        least = _mth_best_at_least(lower, m)
        hits = _true((upper >= least) & (upper > threshold))
    rows, queries = np.divmod(hits, max(1, q))
    order = np.argsort(queries, kind="stable")
    return queries[order], rows[order]


def _mth_best_at_least(scores: np.ndarray, m: int) -> np.ndarray:
    """A value [q] that the m-th best of scores [n, q] reaches: the m-th best of groups' bests, where there are enough.

    At least m entries are as good as it, and few more than m; an exact selection costs ten times as much.
    """
    groups = len(scores) // _GROUP
    if groups >= 4 * m:
        scores = scores[: groups * _GROUP].reshape(groups, _GROUP, -1).max(1)
    return np.partition(scores, len(scores) - m, axis=0)[len(scores) - m]


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

    def merged(self, pairs: _Pairs, waiting: list[_Scored], pair_scores: np.ndarray) -> "_Best":
        """With more rows, all later than those seen: a stable sort then ranks ties by the lower row."""
        if not len(pairs.row):
            return self
        first_rows = np.array([block.first for block in waiting])
        pair_queries, pair_rows = torch.from_numpy(pairs.query), torch.from_numpy(first_rows[pairs.block] + pairs.row)
        (q, m), counts = self.scores.shape, torch.bincount(pair_queries, minlength=len(self.scores))
        place = m + torch.arange(len(pair_rows)) - (counts.cumsum(0) - counts)[pair_queries]
        scores = torch.full((q, m + int(counts.max())), -torch.inf)
        rows = torch.full(scores.shape, -1, dtype=torch.int64)
        scores[:, :m], rows[:, :m] = self.scores, self.rows
        scores[pair_queries, place], rows[pair_queries, place] = torch.from_numpy(pair_scores), pair_rows
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return _Best(scores[:, :m].contiguous(), rows.gather(1, order[:, :m]))

    def ranking(self, sign: float) -> Ranking:
        """Without the unfilled places, of which every query has as many."""
        filled = int((self.rows >= 0).sum(1).max()) if len(self.rows) else 0
        return Ranking(sign * self.scores[:, :filled], self.rows[:, :filled])
