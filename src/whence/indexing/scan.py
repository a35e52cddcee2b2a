"""Exact top-k over stored vectors, in one pass for many queries, without the n x q matrix.

Rows stream past in batches of blocks. A batch's scores are compared with each query's m-th best so far, and only the
few that reach it are merged, so that ranking costs little beside the products. Where a kernel's products are rounded
(bfloat16), a row stays a candidate if its score plus its slack reaches the m-th best, and is then scored again from its
decoded vector in fp32: the result is that of fp32 over all rows.

score[q, n] = sum over checkpoints c of weight_c * <query_cq, row_cn>, each divided by both norms for the
cosine (the row's before it was encoded, the query's before the scan; a zero norm scores 0). Larger is more helpful. A
row whose status is not ok under some checkpoint is never ranked. Equal scores rank by the lower row number. (Products
of equal rows may be rounded differently at different places in a block.)
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
from whence.indexing.readahead import ahead
from whence.indexing.shards import Shard
from whence.numerics import inverse_or_zero

_BLOCK_BYTES = 1 << 27  # of stored rows: large enough to hide the cost of a call
_BLOCK_SCORES = 1 << 18  # of one batch: more would fall out of the cache before they are ranked
_BATCH_BYTES = 1 << 27  # of stored rows: so many are read ahead while as many are ranked
_WAITING_BYTES = 1 << 30  # of stored rows that a remote index holds in memory until they are ranked
_WAITING_PAIRS = 16  # for each query and place: more wait only where scores are too close to tell apart, such as ties
_GROUP = 64  # rows that are represented by their best
_LEAST_ROWS = 256  # of a block, whatever its bytes and queries
_DENSE = 8  # one pair of so many makes the products of all pairs cheaper than those of the pairs alone
_FORMED_ENTRIES = 1 << 22  # of decoded rows at a time
_SERIAL_ENTRIES = 1 << 15  # torch does not wake its threads for tensors of so few entries


@dataclass(frozen=True)
class Ranking:
    """The best rows of each query, best first. `rows` are numbers within the whole index."""

    scores: Float32[Tensor, "q m"]
    rows: Int64[Tensor, "q m"]


@dataclass(frozen=True, kw_only=True)
class ScanQuery:
    """The input of a scan: queries and a weight for each checkpoint."""

    queries: Float32[Tensor, "c q k"]
    """For the cosine they come divided by their norms: see `unit`."""
    weights: Float32[Tensor, " c"]
    cosine: bool
    """Divide rows by their norms."""
    codec: Codec


Piece = tuple[int, list[Shard]]
"""The rows of one part: the number of the first one, and their shard under each checkpoint."""


def block_scores(scan_query: ScanQuery, pieces: Iterable[Piece]) -> Iterator[tuple[int, Float32[Tensor, "q n"]]]:
    """Every score, a shard at a time: (number of its first row, scores). Where the status is not ok: -inf."""
    queries = scan_query.queries
    for first, shards in pieces:
        total = torch.zeros(queries.shape[1], len(shards[0].norm), dtype=torch.float32)
        for c, shard in enumerate(shards):
            products = scan_query.codec.scores(shard.vectors, shard.scale, queries[c])
            total += products * _row_factor(scan_query, shard) * scan_query.weights[c]
        total.masked_fill_(~_is_ok(shards), -torch.inf)
        yield first, total


def top_k(scan_query: ScanQuery, batches: Iterable["Batch"], m: int) -> tuple[Ranking, Ranking]:
    """The m highest and the m lowest scores of each query: (helpful, opposing). Fewer if rows are.

    Args:
        scan_query: Queries, weights and codec of the scan.
        batches: All rows, as `batches_of` groups them for this number of queries.
        m: Length of each ranking.
    """
    q = scan_query.queries.shape[1]
    if not q:
        nothing = Ranking(torch.zeros(0, 0, dtype=torch.float32), torch.zeros(0, 0, dtype=torch.int64))
        return nothing, nothing
    kernels = [scan_query.codec.prepare(queries) for queries in scan_query.queries]
    ends = [_End(sign, q, m) for sign in (1, -1)]
    waiting: list[Batch] = []
    for batch in ahead(batches, lambda batch: batch.mapped):
        _rank(ends, scan_query, kernels, batch)
        waiting.append(batch)
        is_full = sum(batch.bytes for batch in waiting) >= _WAITING_BYTES
        if is_full or sum(map(len, ends)) > _WAITING_PAIRS * q * m:
            _settle(ends, scan_query, waiting)
            waiting = []
    _settle(ends, scan_query, waiting)
    return ends[0].best.ranking(1.0), ends[1].best.ranking(-1.0)


@dataclass(frozen=True, eq=False)
class Batch:
    """Blocks that follow one another. Their joined arrays are cached, for an index is scanned many times."""

    firsts: list[int]
    """Row number within the index of each block's first row."""
    blocks: list[list[Shard]]
    """For each block, its shard under every checkpoint."""

    @cached_property
    def starts(self) -> np.ndarray:
        """Start of each block within the batch, and the end of the last."""
        return np.cumsum([0, *(block[0].norm.shape[0] for block in self.blocks)])

    @property
    def mapped(self) -> Iterator[Tensor]:
        """The stored rows, which may be on a disk still."""
        return (shard.vectors for block in self.blocks for shard in block)

    @cached_property
    def bytes(self) -> int:
        """Size of the stored rows."""
        return sum(shard.vectors.numel() * shard.vectors.itemsize for block in self.blocks for shard in block)

    @cached_property
    def rows(self) -> list[Stored]:
        """The rows under each checkpoint, as kernels take them."""
        by_checkpoint = zip(*self.blocks, strict=True)
        return [Stored([s.vectors for s in shards], [s.scale for s in shards]) for shards in by_checkpoint]

    @cached_property
    def norms(self) -> list[np.ndarray]:
        """Norms of the rows [n], under each checkpoint."""
        by_checkpoint = zip(*self.blocks, strict=True)
        return [np.concatenate([shard.norm.numpy() for shard in shards]) for shards in by_checkpoint]

    @cached_property
    def not_ok(self) -> np.ndarray | None:
        """Mask of rows [n] that are not ok under some checkpoint; None if all are ok."""
        by_checkpoint = zip(*self.blocks, strict=True)
        status = [np.concatenate([shard.status.numpy() for shard in shards]) for shards in by_checkpoint]
        not_ok = np.any(status, axis=0)
        return not_ok if not_ok.any() else None

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Row numbers within the index, from places within the batch."""
        block = np.searchsorted(self.starts, places, "right") - 1
        return places - self.starts[block] + np.array(self.firsts, np.int64)[block]

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Places within the batch, from row numbers within the index."""
        firsts = np.array(self.firsts, np.int64)
        block = np.searchsorted(firsts, numbers, "right") - 1
        return self.starts[block] + numbers - firsts[block]


def rows_at_once(q: int) -> int:
    """Least number of rows of a batch for q queries; the last batch may have fewer."""
    return -(-_BLOCK_SCORES // max(1, q))


def batches_of(pieces: Iterable[Piece], q: int) -> Iterator[Batch]:
    """All rows, in batches for q queries: few queries take more rows at a time."""
    firsts: list[int] = []
    blocks: list[list[Shard]] = []
    rows = stored_bytes = 0
    for first, shards in pieces:
        for block_rows in _block_slices(shards[0], q):
            blocks.append([_sliced(shard, block_rows) for shard in shards])
            firsts.append(first + block_rows.start)
            rows += blocks[-1][0].norm.shape[0]
            stored_bytes += sum(shard.vectors.numel() * shard.vectors.itemsize for shard in blocks[-1])
            if rows >= rows_at_once(q) or stored_bytes >= _BATCH_BYTES:
                yield Batch(firsts, blocks)
                firsts, blocks, rows, stored_bytes = [], [], 0, 0
    if rows:
        yield Batch(firsts, blocks)


def _rank(ends: list["_End"], scan_query: ScanQuery, kernels: list[Kernel], batch: Batch) -> None:
    scores, slack = _approximate(scan_query, kernels, batch)
    if batch.not_ok is not None:
        scores[batch.not_ok] = np.nan  # neither high nor low
    for end in ends:
        end.add(batch, scores, slack)


def _settle(ends: list["_End"], scan_query: ScanQuery, batches: list[Batch]) -> None:
    for end in ends:
        end.settle(scan_query, batches)


@dataclass(frozen=True)
class _Slack:
    """How far a batch's scores can be off: dense[n, q] + sum over terms of slope[q] * size[n].

    The sum is never computed for all pairs: for nearly all rows it is enough that not even the largest slack helps.
    """

    dense: np.ndarray | None
    terms: tuple[tuple[np.ndarray, np.ndarray], ...]

    def most(self) -> np.ndarray:
        """Upper bound over the rows [q]; infinite where a row's slack is undefined, as with an infinite norm."""
        total = np.zeros((), np.float32) if self.dense is None else self.dense.max(0, initial=0)
        return self._with_terms(total, [(slope, size.max(initial=0)) for slope, size in self.terms])

    def of(self, row: np.ndarray, query: np.ndarray) -> np.ndarray:
        """The slack of pairs of a row and a query."""
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
    """Pairs of a query and a row; for each query the rows ascend."""

    query: np.ndarray
    row: np.ndarray
    """Row number within the index."""
    score: np.ndarray
    """The score times the end's sign: larger is nearer to that end."""
    slack: np.ndarray

    @staticmethod
    def none() -> "_Pairs":
        whole, real = np.zeros(0, np.int64), np.zeros(0, np.float32)
        return _Pairs(whole, whole, real, real)

    def at(self, places: np.ndarray) -> "_Pairs":
        """The pairs at a mask or at an array of places, in its order."""
        return _Pairs(*(values[places] for values in vars(self).values()))

    def joined(self, others: "_Pairs") -> "_Pairs":
        """These pairs, followed by those of later rows."""
        both = zip(vars(self).values(), vars(others).values(), strict=True)
        return _Pairs(*(np.concatenate(pair) for pair in both))


class _End:
    """One end of the ranking: the best rows so far, and the pairs whose exact scores could change them."""

    def __init__(self, sign: int, q: int, m: int):
        self.sign, self.m, self.best = sign, m, _Best.empty(q, m)
        self._waiting = _Pairs.none()
        self._reached = np.full(q, -np.inf, np.float32)  # a lower bound of the m-th best [q]

    def __len__(self) -> int:
        return len(self._waiting.query)

    def add(self, batch: Batch, scores: np.ndarray, slack: _Slack) -> None:
        """Take a batch's scores [n, q]; pairs that could be among the best wait for their exact scores."""
        query, place = _candidates(scores, slack.most(), self._reached, self.sign, self.m)
        if not len(query):
            return
        pairs = _Pairs(query, batch.numbers(place), self.sign * scores[place, query], slack.of(place, query))
        waiting = self._waiting.joined(pairs.at(pairs.score + pairs.slack > self._reached[query]))
        self._reached = self._mth_best(waiting, waiting.score - waiting.slack)
        self._waiting = waiting.at(waiting.score + waiting.slack >= self._reached[waiting.query])

    def settle(self, scan_query: ScanQuery, batches: list[Batch]) -> None:
        """Give the waiting pairs exact scores and merge them; the batches are not needed afterwards."""
        pairs = self._waiting.at(np.argsort(self._waiting.query, kind="stable"))
        exact = np.where(pairs.slack == 0, pairs.score, -np.inf).astype(np.float32)
        if pairs.slack.any():
            # the best by approximate score first: their exact scores raise the bound for the others
            first = (pairs.slack > 0) & (_rank_within(pairs.query, -pairs.score) < 2 * self.m)
            exact[first] = self.sign * _rescored(scan_query, batches, pairs.at(first))
            reached = self._mth_best(pairs, exact)
            rest = (pairs.slack > 0) & ~first & (pairs.score + pairs.slack >= reached[pairs.query])
            exact[rest] = self.sign * _rescored(scan_query, batches, pairs.at(rest))
        known = exact > -np.inf
        self.best = self.best.merged(pairs.query[known], pairs.row[known], exact[known])
        self._waiting, self._reached = _Pairs.none(), self.best.scores[:, -1]

    def _mth_best(self, pairs: _Pairs, score: np.ndarray) -> np.ndarray:
        """The m-th best score [q] among the best so far and these pairs; -inf where there are fewer than m."""
        return self.best.merged(pairs.query, pairs.row, score).scores[:, -1]


def unit(vectors: Float32[Tensor, "*any k"]) -> Float32[Tensor, "*any k"]:
    """Vectors divided by their norms; zeros stay zeros."""
    return vectors * inverse_or_zero(vectors.norm(dim=-1, keepdim=True))


def _row_factor(scan_query: ScanQuery, shard: Shard) -> Tensor | float:
    return inverse_or_zero(shard.norm) if scan_query.cosine else 1.0


def _is_ok(shards: list[Shard]) -> Tensor:
    return torch.stack([shard.status == 0 for shard in shards]).all(0)


def _block_slices(shard: Shard, q: int) -> Iterator[slice]:
    row_bytes = max(1, shard.vectors.shape[1] * shard.vectors.itemsize)
    step = max(_LEAST_ROWS, min(_BLOCK_BYTES // row_bytes, _BLOCK_SCORES // max(1, q)))
    for first in range(0, shard.norm.shape[0], step):
        yield slice(first, first + step)


def _sliced(shard: Shard, rows: slice) -> Shard:
    if rows.start == 0 and rows.stop >= shard.norm.shape[0]:
        return shard
    return Shard(**{name: tensor[rows] for name, tensor in vars(shard).items()})


def _approximate(scan_query: ScanQuery, kernels: list[Kernel], batch: Batch) -> tuple[np.ndarray, _Slack]:
    """Scores [n, q] of a batch, and how far off they can be."""
    total, dense, terms = None, None, []
    for weight, kernel, rows, norm in zip(scan_query.weights.tolist(), kernels, batch.rows, batch.norms, strict=True):
        block = kernel(rows)
        scores, off = block.scores.T.numpy(), None if block.slack is None else block.slack.T.numpy()
        factor = np.float32(weight) * (
            inverse_or_zero(torch.from_numpy(norm)).numpy() if scan_query.cosine else np.ones(1, np.float32)
        )
        if scan_query.cosine or weight != 1:
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


def _rescored(scan_query: ScanQuery, batches: list[Batch], pairs: _Pairs) -> np.ndarray:
    """The exact scores of pairs; of codecs without `pair_products` those of fp32, from decoded rows."""
    if scan_query.codec.pair_products is not None:
        return _pair_scores(scan_query, batches, pairs)
    total = torch.zeros(len(pairs.row), dtype=torch.float32)
    if not len(total):
        return total.numpy()
    queries, query = scan_query.queries, torch.from_numpy(pairs.query)
    rows, place = (torch.from_numpy(x) for x in np.unique(pairs.row, return_inverse=True))
    firsts = torch.tensor([first for batch in batches for first in batch.firsts])
    all_blocks = [block for batch in batches for block in batch.blocks]
    blocks, sizes = torch.unique_consecutive(torch.searchsorted(firsts, rows, right=True) - 1, return_counts=True)
    local = [numbers - firsts[block] for block, numbers in zip(blocks, rows.split(sizes.tolist()), strict=True)]
    step = max(1, _SERIAL_ENTRIES // max(1, queries.shape[2]))
    for c, weight in enumerate(scan_query.weights):
        shards = [all_blocks[block][c] for block in blocks.tolist()]
        stored, scale, norm = (
            torch.cat([getattr(shard, name)[numbers] for shard, numbers in zip(shards, local, strict=True)])
            for name in ("vectors", "scale", "norm")
        )
        factor = weight * (inverse_or_zero(norm) if scan_query.cosine else torch.ones_like(norm))
        if _DENSE * len(total) > len(rows) * queries.shape[1]:  # nearly all pairs: a product of matrices gives them
            few = max(1, _FORMED_ENTRIES // queries.shape[2])
            chunks = zip(stored.split(few), scale.split(few), strict=True)
            products = [scan_query.codec.decode(*chunk, queries.shape[2]) @ queries[c].T for chunk in chunks]
            total += torch.cat(products)[place, query] * factor[place]
            continue
        for pair in torch.arange(len(total)).split(step):
            vectors = scan_query.codec.decode(stored[place[pair]], scale[place[pair]], queries.shape[2])
            total[pair] += torch.linalg.vecdot(vectors, queries[c, query[pair]]) * factor[place[pair]]
    return total.numpy()


def _pair_scores(scan_query: ScanQuery, batches: list[Batch], pairs: _Pairs) -> np.ndarray:
    """The exact scores of pairs, by the codec's products of pairs. In numpy, as `_candidates`."""
    multiply, total = scan_query.codec.pair_products, np.zeros(len(pairs.row), np.float32)
    assert multiply is not None
    ends = np.array([batch.firsts[-1] + batch.starts[-1] - batch.starts[-2] for batch in batches])
    of_batch = np.searchsorted(ends, pairs.row, "right")
    for number in np.unique(of_batch):
        batch, some = batches[number], np.flatnonzero(of_batch == number)
        place, query = batch.places(pairs.row[some]), pairs.query[some]
        for c, (weight, rows, norm) in enumerate(
            zip(scan_query.weights.tolist(), batch.rows, batch.norms, strict=True)
        ):
            products = multiply(rows, scan_query.queries[c], place, query) * rows.scales[place]
            factor = inverse_or_zero(torch.from_numpy(norm[place])).numpy() if scan_query.cosine else 1
            total[some] += products * (np.float32(weight) * factor)
    return total


def _rank_within(group: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Rank of each entry within its group, by ascending key. Groups come in ascending order."""
    order, rank = np.lexsort((key, group)), np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.searchsorted(group, group)
    return rank


def _candidates(
    scores: np.ndarray, slack: np.ndarray, threshold: np.ndarray, sign: int, m: int
) -> tuple[np.ndarray, np.ndarray]:
    """(query, row) pairs of [n, q] whose signed score, off by `slack` [q], can pass the threshold and the m-th best.

    Some may only equal the threshold. Rows ascend for each query. numpy is used because it stays in this thread: waking
    torch's threads costs more than such a small step, and many milliseconds where another process has their core.
    """
    (n, q), least = scores.shape, threshold - slack
    hits = None if m < n and np.isinf(least).any() else _true_places(scores > least if sign > 0 else scores < -least)
    if hits is None or (m < n and len(hits) > 4 * m * q):
        # at the start of a scan, or where scores rise: only the best m of these rows can stay
        reach = np.fmax(_mth_best_at_least(scores, sign, m) - 2 * slack, least)
        hits = _true_places(scores >= reach if sign > 0 else scores <= -reach)
    rows, queries = np.divmod(hits, max(1, q))
    order = np.argsort(queries, kind="stable")
    return queries[order], rows[order]


def _mth_best_at_least(scores: np.ndarray, sign: int, m: int) -> np.ndarray:
    """A value [q] that the m-th best signed score of [n, q] reaches: the m-th best of groups' bests, if they suffice.

    At least m entries reach it, and few more than m; an exact selection costs ten times as much. NaN never
    reaches it. A group's rows stand far apart, so that bests are taken a row of groups at a time.
    """
    groups = len(scores) // _GROUP
    if groups >= 4 * m:
        best = np.fmax if sign > 0 else np.fmin
        scores = best.reduce(scores[: groups * _GROUP].reshape(_GROUP, groups, -1), axis=0)
    signed = np.where(np.isnan(scores), -np.inf, sign * scores)
    return np.partition(signed, len(signed) - m, axis=0)[len(signed) - m]


def _true_places(mask: np.ndarray) -> np.ndarray:
    """Flat places of the true entries, ascending; fast where they are few, as it tests eight at a time."""
    flat = mask.ravel()
    full = len(flat) // 8 * 8
    eights = np.flatnonzero(flat[:full].view(np.uint64))
    places = (eights[:, None] * 8 + np.arange(8)).ravel()
    return np.concatenate([places[flat[places]], full + np.flatnonzero(flat[full:])])


@dataclass(frozen=True)
class _Best:
    """The best m rows of each query so far, by signed score (negated for the lowest). Unfilled places: -inf."""

    scores: np.ndarray  # [q, m]
    rows: np.ndarray  # [q, m]

    @staticmethod
    def empty(q: int, m: int) -> "_Best":
        return _Best(np.full((q, m), -np.inf, np.float32), np.full((q, m), -1, np.int64))

    def merged(self, query: np.ndarray, row: np.ndarray, score: np.ndarray) -> "_Best":
        """With more rows, all later than the present ones: a stable sort then ranks ties by the lower row."""
        if not len(query):
            return self
        queries = np.arange(len(self.rows))
        owner = np.concatenate([np.repeat(queries, self.rows.shape[1]), query])
        scores, rows = np.concatenate([self.scores.ravel(), score]), np.concatenate([self.rows.ravel(), row])
        order = np.lexsort((-scores, owner))
        best = order[np.searchsorted(owner[order], queries)[:, None] + np.arange(self.rows.shape[1])]
        return _Best(scores[best], rows[best])

    def ranking(self, sign: float) -> Ranking:
        """The ranking without unfilled places, whose number is the same for every query."""
        filled = int((self.rows >= 0).sum(1).max(initial=0))
        scores = np.float32(sign) * self.scores[:, :filled]
        return Ranking(torch.from_numpy(scores), torch.from_numpy(self.rows[:, :filled].copy()))
