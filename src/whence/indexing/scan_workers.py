"""A scan of an index by workers: each ranks the rows of some parts, and the best of all are merged.

The result is the local scan's, but for the rounding of products where these are not exact. Workers open the index at
the same address; of an object store each reads, and keeps on its own disk, what it ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float32
from torch import Tensor

from whence import runner
from whence.checksums import digest
from whence.errors import ManifestMismatchError
from whence.indexing import scan
from whence.indexing.scan import Ranking, ScanQuery

if TYPE_CHECKING:
    from whence.indexing.store import Store

MOST_JOBS = 64
"""Stretches into which an index is cut: enough for workers of unequal speed, and few results to merge."""


@dataclass(frozen=True)
class Stretch:
    """Parts that follow one another."""

    first: int
    end: int
    rows: int

    def __str__(self):
        return f"the scan of parts {self.first} to {self.end - 1}"


def stretches(sizes: Sequence[int]) -> list[Stretch]:
    """All parts, in at most `MOST_JOBS` stretches of about as many.

    >>> [(each.first, each.end, each.rows) for each in stretches([5, 5, 2])]
    [(0, 1, 5), (1, 2, 5), (2, 3, 2)]
    """
    step = -(-len(sizes) // MOST_JOBS) or 1
    return [
        Stretch(first, min(first + step, len(sizes)), sum(sizes[first : first + step]))
        for first in range(0, len(sizes), step)
    ]


@dataclass
class ScanWork:
    """Ranks or scores the rows of a stretch."""

    place: str
    """The index."""
    digest: str
    """Of its manifest: what was made there since is another index."""
    queries: Float32[Tensor, "c q k"]
    weights: Float32[Tensor, " c"]
    cosine: bool
    m: int | None
    """Length of each ranking; None for all scores."""
    _opened: list["Store"] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": []}

    def __call__(self, stretch: Stretch, tick: runner.Tick) -> Any:
        """A pair of rankings; or (number of its first row, scores) of every part."""
        store = self._store()
        parts, checkpoints = store.manifest.parts, range(len(store.manifest.checkpoints))
        asked = ScanQuery(queries=self.queries, weights=self.weights, cosine=self.cosine, codec=store.codec)
        pieces: Iterator[scan.Piece] = (
            (parts[number].first_row, [store.shard(checkpoint, number) for checkpoint in checkpoints])
            for number in range(stretch.first, stretch.end)
        )
        if self.m is None:
            result: Any = [*scan.block_scores(asked, pieces)]
        else:
            batches = scan.batches_of(pieces, self.queries.shape[1])
            result = scan.top_k(asked, batches, min(self.m, max(stretch.rows, 1)))
        tick(stretch.rows, 0)
        return result

    def _store(self) -> "Store":
        from whence.indexing.store import Store

        if not self._opened:
            store = Store.open(self.place)
            if digest_of(store) != self.digest:
                raise ManifestMismatchError(
                    f"{self.place} is another index for a worker, or has changed since it was opened. Every machine "
                    "must find the same one at this address; then run the command again"
                )
            self._opened.append(store)
        return self._opened[0]


def digest_of(store: "Store") -> str:
    """Digest of an index' manifest."""
    return digest([store.manifest.to_json()])


def ranked_by_workers(store: "Store", asked: ScanQuery, m: int) -> tuple[Ranking, Ranking]:
    """`scan.top_k` of an index, on the engine that it is scanned on."""
    found = [result for _, result in _results(store, asked, m)]
    helpful, opposing = (merged([pair[end] for pair in found], m, sign) for end, sign in ((0, 1), (1, -1)))
    return helpful, opposing


def scored_by_workers(store: "Store", asked: ScanQuery) -> Iterator[tuple[int, Float32[Tensor, "q n"]]]:
    """`scan.block_scores` of an index, likewise: each part's as soon as those of all parts before it were given."""
    for _, blocks in _results(store, asked, None):
        yield from blocks


def _results(store: "Store", asked: ScanQuery, m: int | None) -> Iterator[tuple[Stretch, Any]]:
    """Results of every stretch, in order."""
    work = ScanWork(store.place.root, digest_of(store), asked.queries, asked.weights, asked.cosine, m)
    jobs = stretches([part.rows for part in store.manifest.parts])
    with runner.counting("Ranking", store.rows) as tick:
        yield from runner.map_in_order(work, jobs, engine=store.engine, on_tick=tick)


def merged(rankings: Sequence[Ranking], m: int, sign: int) -> Ranking:
    """The best m of several rankings: the highest scores, or with sign -1 the lowest; equal ones by the lower row."""
    if not rankings:
        return Ranking(torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64))
    scores, rows = (torch.cat([getattr(each, name) for each in rankings], 1) for name in ("scores", "rows"))
    key = torch.where(rows < 0, -torch.inf, sign * scores)
    by_row = rows.argsort(dim=1, stable=True)
    order = by_row.gather(1, key.gather(1, by_row).argsort(dim=1, descending=True, stable=True))
    filled = int((rows >= 0).sum(1).max()) if rows.shape[0] else 0
    order = order[:, : min(m, filled)]
    return Ranking(scores.gather(1, order).contiguous(), rows.gather(1, order).contiguous())
