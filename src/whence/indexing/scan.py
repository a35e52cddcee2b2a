"""Exact top-k over stored vectors, in one pass for many queries, without the n x q matrix.

Rows stream past in batches of blocks. A batch's scores are compared with each query's k-th best so
far, and only the few that reach it are merged, so that ranking costs little beside the products. Where a
kernel's products are rounded (bfloat16), a row is kept if its score plus its slack reaches the k-th best, and
is then scored again from its decoded vector in fp32: what is returned is what fp32 over all rows would
return.

score[q, n] = sum over checkpoints c of weight_c * <query_cq, row_cn>, each divided by both norms for the
cosine (the row's before it was encoded, the query's before the scan; a zero norm scores 0). Larger is more
helpful. Rows whose status is not ok in any checkpoint are never ranked. Equal scores rank by the lower row (of
equal rows a product may round them apart by its place in a block).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence.indexing.codecs import Codec
from whence.indexing.kernels import Kernel, Stored
from whence.indexing.shards import Shard

_BLOCK_BYTES = 1 << 27  # of stored rows: large enough to hide the cost of a call
_BLOCK_SCORES = 1 << 18  # of one batch of blocks: more fall out of cache before they are ranked
_WAITING_BYTES = 1 << 30  # of stored rows, which a remote index holds in memory until they are ranked
_WAITING_PAIRS = 16  # for each query and each of its best: more wait only where nothing tells them apart, such as ties
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


def top_k(question: Question, batches: Iterable["Batch"], m: int) -> tuple[Ranking, Ranking]:
    """The m highest and the m lowest scores of each query: (helpful, opposing). Fewer if rows are.

    Args:
        question: What is looked for.
        batches: All rows, as `batches_of` lays them out for so many queries.
        m: Places of each ranking.
    """
    q = question.queries.shape[1]
    if not q:
        nothing = Ranking(torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64))
        return nothing, nothing
    kernels = [question.codec.prepare(part) for part in question.queries]
    ends = [_End(sign, q, m) for sign in (1, -1)]
    held: list[Batch] = []
    for batch in batches:
        _rank(ends, question, kernels, batch)
        held.append(batch)
        is_full = sum(each.bytes for each in held) >= _WAITING_BYTES
        if is_full or sum(map(len, ends)) > _WAITING_PAIRS * q * m:
            _settle(ends, question, held)
            held = []
    _settle(ends, question, held)
    return ends[0].best.ranking(1.0), ends[1].best.ranking(-1.0)


@dataclass(frozen=True, eq=False)
class Batch:
    """Blocks that follow one another. What is joined of them is joined once: an index is asked many times."""

    firsts: list[int]
    """Number of each block's first row within the index."""
    blocks: list[list[Shard]]
    """Each under every checkpoint."""

    @cached_property
    def starts(self) -> np.ndarray:
        """Of each block within the batch, and where the last one ends."""
        return np.cumsum([0, *(block[0].norm.shape[0] for block in self.blocks)])

    @cached_property
    def bytes(self) -> int:
        """Of the stored rows."""
        return sum(shard.vectors.numel() * shard.vectors.itemsize for block in self.blocks for shard in block)

    @cached_property
    def rows(self) -> list[Stored]:
        """Under each checkpoint, as kernels take them."""
        by_checkpoint = zip(*self.blocks, strict=True)
        return [Stored([shard.vectors for shard in some], [shard.scale for shard in some]) for some in by_checkpoint]

    @cached_property
    def norms(self) -> list[np.ndarray]:
        """Of the rows [n], under each checkpoint."""
        return [np.concatenate([shard.norm.numpy() for shard in some]) for some in zip(*self.blocks, strict=True)]

    @cached_property
    def not_ok(self) -> np.ndarray | None:
        """Which rows [n] are not ok under some checkpoint; None if all are."""
        status = [np.concatenate([shard.status.numpy() for shard in some]) for some in zip(*self.blocks, strict=True)]
        claims = np.any(status, axis=0)
        return claims if claims.any() else None

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Rows' numbers within the index, of their places within the batch."""
        block = np.searchsorted(self.starts, places, "right") - 1
        return places - self.starts[block] + np.array(self.firsts, np.int64)[block]


def rows_at_once(q: int) -> int:
    """Rows that a batch has at least, but for the last, for so many queries."""
    return -(-_BLOCK_SCORES // max(1, q))


def batches_of(pieces: Iterable[Piece], q: int) -> Iterator[Batch]:
    """All rows, in batches for q queries: few queries take more rows at a time."""
    firsts: list[int] = []
    blocks: list[list[Shard]] = []
    rows = taken = 0
    for first, shards in pieces:
        for some in _blocks(shards[0], q):
            blocks.append([_part(shard, some) for shard in shards])
            firsts.append(first + some.start)
            rows += blocks[-1][0].norm.shape[0]
            taken += sum(shard.vectors.numel() * shard.vectors.itemsize for shard in blocks[-1])
            if rows >= rows_at_once(q) or taken >= _WAITING_BYTES:
                yield Batch(firsts, blocks)
                firsts, blocks, rows, taken = [], [], 0, 0
    if rows:
        yield Batch(firsts, blocks)


def _rank(ends: list["_End"], question: Question, kernels: list[Kernel], batch: Batch) -> None:
    scores, slack = _approximate(question, kernels, batch)
    if batch.not_ok is not None:
        scores[batch.not_ok] = np.nan  # neither high nor low
    for end in ends:
        end.add(batch, scores, slack)


def _settle(ends: list["_End"], question: Question, held: list[Batch]) -> None:
    for end in ends:
        end.settle(question, held)


@dataclass(frozen=True)
class _Slack:
    """How far a batch's scores can be off: dense[n, q] + sum over terms of slope[q] * size[n].

    The sum is never laid out: of nearly all rows it is enough to know that not even the largest helps them.
    """

    dense: np.ndarray | None
    terms: tuple[tuple[np.ndarray, np.ndarray], ...]

    def most(self) -> np.ndarray:
        """No row's is larger [q]; infinite where a row's cannot be told, such as that of an infinite norm."""
        total = np.zeros((), np.float32) if self.dense is None else self.dense.max(0, initial=0)
        return self._with_terms(total, [(slope, size.max(initial=0)) for slope, size in self.terms])

    def of(self, row: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Of some pairs."""
        total = np.zeros(len(row), np.float32) if self.dense is None else self.dense[row, query]
        return self._with_terms(total, [(slope[query], size[row]) for slope, size in self.terms])

    @staticmethod
    def _with_terms(total: np.ndarray, terms: Sequence[tuple[np.ndarray, np.ndarray | np.floating]]) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            for slope, size in terms:
                total = total + slope * size
        return np.where(np.isnan(total), np.float32(np.inf), total)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a query and a row; of each query the rows ascend."""

    query: np.ndarray
    row: np.ndarray
    """Within the index."""
    score: np.ndarray
    """Times the end's sign: larger is nearer to it."""
    slack: np.ndarray

    @staticmethod
    def none() -> "_Pairs":
        whole, real = np.zeros(0, np.int64), np.zeros(0, np.float32)
        return _Pairs(whole, whole, real, real)

    def of(self, some: np.ndarray) -> "_Pairs":
        """Those that a mask tells, or in the order of some places."""
        return _Pairs(*(values[some] for values in vars(self).values()))

    def and_more(self, others: "_Pairs") -> "_Pairs":
        """With those of later rows."""
        both = zip(vars(self).values(), vars(others).values(), strict=True)
        return _Pairs(*(np.concatenate(pair) for pair in both))


class _End:
    """One end of the ranking: the best so far, and the pairs whose exact scores could change them."""

    def __init__(self, sign: int, q: int, m: int):
        self.sign, self.m, self.best = sign, m, _Best.empty(q, m)
        self._waiting = _Pairs.none()
        self._reached = np.full(q, -np.inf, np.float32)  # the m-th best is no lower [q]

    def __len__(self) -> int:
        return len(self._waiting.query)

    def add(self, batch: Batch, scores: np.ndarray, slack: _Slack) -> None:
        """A batch's scores [n, q]. What could be among the best waits."""
        query, place = _candidates(scores, slack.most(), self._reached, self.sign, self.m)
        if not len(query):
            return
        found = _Pairs(query, batch.numbers(place), self.sign * scores[place, query], slack.of(place, query))
        waiting = self._waiting.and_more(found.of(found.score + found.slack > self._reached[query]))
        self._reached = self._mth_best(waiting, waiting.score - waiting.slack)
        self._waiting = waiting.of(waiting.score + waiting.slack >= self._reached[waiting.query])

    def settle(self, question: Question, held: list[Batch]) -> None:
        """Exact scores for those that wait; nothing waits afterwards, and the held blocks can go."""
        found = self._waiting.of(np.argsort(self._waiting.query, kind="stable"))
        exact = np.where(found.slack == 0, found.score, -np.inf).astype(np.float32)
        if found.slack.any():
            # the best by approximate score first: their true scores raise what the others have to reach
            first = (found.slack > 0) & (_rank_within(found.query, -found.score) < 2 * self.m)
            exact[first] = self.sign * _rescored(question, held, found.of(first))
            reached = self._mth_best(found, exact)
            rest = (found.slack > 0) & ~first & (found.score + found.slack >= reached[found.query])
            exact[rest] = self.sign * _rescored(question, held, found.of(rest))
        known = exact > -np.inf
        self.best = self.best.merged(found.query[known], found.row[known], exact[known])
        self._waiting, self._reached = _Pairs.none(), self.best.scores[:, -1]

    def _mth_best(self, pairs: _Pairs, score: np.ndarray) -> np.ndarray:
        """The m-th best [q] of some pairs, by these scores, and of the best so far; -inf where they are fewer."""
        return self.best.merged(pairs.query, pairs.row, score).scores[:, -1]


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
    for first in range(0, shard.norm.shape[0], step):
        yield slice(first, first + step)


def _part(shard: Shard, rows: slice) -> Shard:
    if rows.start == 0 and rows.stop >= shard.norm.shape[0]:
        return shard
    return Shard(**{name: tensor[rows] for name, tensor in vars(shard).items()})


def _approximate(question: Question, kernels: list[Kernel], batch: Batch) -> tuple[np.ndarray, _Slack]:
    """Scores [n, q] of a batch, and how far off they can be."""
    total, dense, terms = None, None, []
    for weight, kernel, rows, norm in zip(question.weights.tolist(), kernels, batch.rows, batch.norms, strict=True):
        block = kernel(rows)
        scores, off = block.scores.T.numpy(), None if block.slack is None else block.slack.T.numpy()
        factor = np.float32(weight) * (
            _inverse(torch.from_numpy(norm)).numpy() if question.cosine else np.ones(1, np.float32)
        )
        if question.cosine or weight != 1:
            scores, off = scores * factor[..., None], None if off is None else off * abs(factor)[..., None]
        total = scores if total is None else total + scores
        dense = off if dense is None else dense if off is None else dense + off
        with np.errstate(invalid="ignore"):  # an infinite norm times its inverse: no bound, see `_Slack`
            if block.slack_per_norm is not None:
                terms.append((block.slack_per_norm.numpy(), norm * abs(factor)))
            if block.slack_per_scale is not None:
                terms.append((block.slack_per_scale.numpy(), rows.scales * abs(factor)))
    assert total is not None, "an index has a checkpoint"
    return total, _Slack(dense, tuple(terms))


def _rescored(question: Question, held: list[Batch], pairs: _Pairs) -> np.ndarray:
    """The fp32 scores of pairs, from decoded rows."""
    total = torch.zeros(len(pairs.row))
    if not len(total):
        return total.numpy()
    queries, asked = question.queries, torch.from_numpy(pairs.query)
    rows, place = (torch.from_numpy(x) for x in np.unique(pairs.row, return_inverse=True))
    firsts = torch.tensor([first for batch in held for first in batch.firsts])
    all_blocks = [block for batch in held for block in batch.blocks]
    blocks, sizes = torch.unique_consecutive(torch.searchsorted(firsts, rows, right=True) - 1, return_counts=True)
    local = [part - firsts[block] for block, part in zip(blocks, rows.split(sizes.tolist()), strict=True)]
    step = max(1, _SERIAL_ENTRIES // max(1, queries.shape[2]))
    for c, weight in enumerate(question.weights):
        shards = [all_blocks[block][c] for block in blocks.tolist()]
        stored, scale, norm = (
            torch.cat([getattr(shard, name)[some] for shard, some in zip(shards, local, strict=True)])
            for name in ("vectors", "scale", "norm")
        )
        factor = weight * (_inverse(norm) if question.cosine else torch.ones_like(norm))
        for some in torch.arange(len(total)).split(step):
            vectors = question.codec.decode(stored[place[some]], scale[place[some]], queries.shape[2])
            total[some] += torch.linalg.vecdot(vectors, queries[c, asked[some]]) * factor[place[some]]
    return total.numpy()


def _rank_within(group: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Place of each entry among those of its group, by ascending key. Groups come in ascending order."""
    order, rank = np.lexsort((key, group)), np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.searchsorted(group, group)
    return rank


def _candidates(
    scores: np.ndarray, most: np.ndarray, threshold: np.ndarray, sign: int, m: int
) -> tuple[np.ndarray, np.ndarray]:
    """(query, row) pairs of [n, q] whose signed score, off by `most` [q], can pass the threshold and the m-th best.

    Some may only equal the threshold. Rows ascend for each query. In numpy, which stays in this thread: waking torch's
    threads costs more than such a small step, and many milliseconds where another process has their core.
    """
    (n, q), far = scores.shape, threshold - most
    hits = None if m < n and np.isinf(far).any() else _true(scores > far if sign > 0 else scores < -far)
    if hits is None or (m < n and len(hits) > 4 * m * q):
        # at the start of a scan, or where scores rise: only the best m of these rows can stay
        reach = np.fmax(_mth_best_at_least(scores, sign, m) - 2 * most, far)
        hits = _true(scores >= reach if sign > 0 else scores <= -reach)
    rows, queries = np.divmod(hits, max(1, q))
    order = np.argsort(queries, kind="stable")
    return queries[order], rows[order]


def _mth_best_at_least(scores: np.ndarray, sign: int, m: int) -> np.ndarray:
    """A value [q] that the m-th best signed score of [n, q] reaches: the m-th best of groups' bests, if they suffice.

    At least m entries are as good as it, and few more than m; an exact selection costs ten times as much. NaN is never
    good. A group's rows stand far apart, which lets their bests be taken a row of groups at a time.
    """
    groups = len(scores) // _GROUP
    if groups >= 4 * m:
        best = np.fmax if sign > 0 else np.fmin
        scores = best.reduce(scores[: groups * _GROUP].reshape(_GROUP, groups, -1), axis=0)
    signed = np.where(np.isnan(scores), -np.inf, sign * scores)
    return np.partition(signed, len(signed) - m, axis=0)[len(signed) - m]


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

    scores: np.ndarray  # [q, m]
    rows: np.ndarray  # [q, m]

    @staticmethod
    def empty(q: int, m: int) -> "_Best":
        return _Best(np.full((q, m), -np.inf, np.float32), np.full((q, m), -1, np.int64))

    def merged(self, query: np.ndarray, row: np.ndarray, score: np.ndarray) -> "_Best":
        """With more rows, all later than those seen: a stable sort then ranks ties by the lower row."""
        if not len(query):
            return self
        queries = np.arange(len(self.rows))
        of = np.concatenate([np.repeat(queries, self.rows.shape[1]), query])
        scores, rows = np.concatenate([self.scores.ravel(), score]), np.concatenate([self.rows.ravel(), row])
        order = np.lexsort((-scores, of))
        best = order[np.searchsorted(of[order], queries)[:, None] + np.arange(self.rows.shape[1])]
        return _Best(scores[best], rows[best])

    def ranking(self, sign: float) -> Ranking:
        """Without the unfilled places, of which every query has as many."""
        filled = int((self.rows >= 0).sum(1).max(initial=0))
        scores = np.float32(sign) * self.scores[:, :filled]
        return Ranking(torch.from_numpy(scores), torch.from_numpy(self.rows[:, :filled].copy()))
