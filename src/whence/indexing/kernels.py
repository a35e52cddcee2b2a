"""Inner products of queries with rows of few bits, and a bound on the error of each; no files, statuses or ranks.

A kernel is made once for its queries and then scores batches of stored rows,

    score[q, n] = scale[n] * <query_q, x_n>

where x_n are the values that row n's codes stand for. The unit is that of a query's entry times a row's. On a CPU there
are several kernels. Each states its slack, so that a scan can recompute the scores that could reach the top and return
the same result from any of them:

    |score - fp32's| <= slack[q, n] + slack_per_norm[q] * |v_n| + slack_per_scale[q] * scale[n]

    integer    8-bit products, exact in integers, with the query written as a sum of 8-bit vectors
    bfloat16   bfloat16 products, which sum in fp32 but round the result
    float32    fp32 products of the rows as they are
    decoded    rows decoded a few at a time and multiplied in fp32: the only one for other devices
    compiled   fp32 products of rows widened in registers, for few queries (see `compiled`); of one-bit rows the ones
               that a row shares with the query's bits are counted instead (see `bit_planes`), and for many queries
               bits become bytes between the caches and matrix units (see `matrix_units`)

where |v_n| is the row's norm before it was encoded. (Of one-bit rows the bound is one of probability: one product of
10^9 may break it, see `rounding`.) CPUs differ more than a rule could say: with matrix units (AMX)
integer products reach the memory's bandwidth; on AVX2 they take fifteen times as long as decoding. So the first large
batch of a process is a trial of all kernels that can score it (see `Fastest`).
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor

from whence.indexing import bit_planes, compiled, matrix_units
from whence.indexing.addresses import Addressed, addressed
from whence.indexing.rounding import rounded

logger = logging.getLogger(__name__)

TINY = 2.0**-119
"""Scales below fp32's normal range lose bits; this absolute error is far below that of any gradient."""

_INT32_COLUMNS = 131_072  # 127 * 127 * 131072 < 2^31: longer sums of 8-bit products could overflow
_LEAST_COLUMNS = 24  # narrower 8-bit products take a slower path of oneDNN
_ONE_TERM = 0.02  # share of a query's norm that one 8-bit vector may miss, where queries are at most
_ONE_TERM_QUERIES = 4  # so many: with more, rescoring takes longer than a second vector
_DECODED_ROWS = 256  # at a time on a CPU: 4 MB at 4,096 columns, which stays in cache
_DECODED_ROWS_ELSEWHERE = 16_384  # at a time on other devices
_COMPILED_QUERIES = 8  # beyond, a matrix product makes more of a row that is in cache
_TRIAL_ROWS = (256, 8192)  # of the first trial, of every kernel, and of the second, of those that came near
_TRIAL_NEAR = 3.0
_TRIAL_SECONDS = 0.2  # of one kernel, which then runs no more
_COSTLY_TRIAL_BYTES = 1 << 26  # of rows in the trial of a compiled kernel: more than fits a cache
_RESCORING = 1.5  # a kernel whose scores have a slack must be so much faster, as rows are scored again
_PATIENCE = 1.0  # seconds of scanning in a process before it compiles a kernel, which takes about as long
_BF16_ROUND = 2.0**-8 * 1.01
_FP32_SUM = 2.0**-15  # assumed error of fp32 sums, relative to |x| |q|: far above that of long rows

PACKED = {"int4": {"bits": 4, "shift": -8}, "onebit": {"bits": 1, "slope": 2, "shift": -1}}
"""How the packed codecs' codes are unpacked, for `integer_kernel`."""

Queries = Float32[Tensor, "q k"]


@dataclass(frozen=True)
class Block:
    """Inner products of every query with a batch of rows; the true ones are within `slack` of them."""

    scores: Float[Tensor, "q n"]
    slack: Float[Tensor, "q n"] | None = None
    """Error by rounding of a product; None: products are not rounded."""

    slack_per_norm: Float[Tensor, " q"] | None = None
    """Further slack for each unit of the row's norm. Without any slack the products are those of fp32 arithmetic."""

    slack_per_scale: Float[Tensor, " q"] | None = None
    """Further slack for each unit of the row's stored scale."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A batch: blocks of stored rows that follow one another, with their scales. Derived arrays are cached."""

    stored: Sequence[Tensor]
    scale: Sequence[Tensor]

    @cached_property
    def count(self) -> int:
        """Number of rows."""
        return sum(block.shape[0] for block in self.stored)  # len() of a tensor takes ten times as long

    @cached_property
    def codes(self) -> list[np.ndarray]:
        """The blocks, contiguous in memory; 16-bit floats as integers."""
        blocks = [block.contiguous() for block in self.stored]
        return [(block.view(torch.int16) if block.dtype.itemsize == 2 else block).numpy() for block in blocks]

    @cached_property
    def scales(self) -> np.ndarray:
        """Scales of all rows [n]."""
        return np.concatenate([factors.numpy() for factors in self.scale] or [np.zeros(0, np.float32)])

    @cached_property
    def strips(self) -> list[compiled.Strip]:
        """The rows in strips, as compiled kernels take them."""
        return compiled.strips_of(self.codes, self.scales)

    @cached_property
    def addressed(self) -> Addressed:
        """The rows of bytes, as loops over bits take them."""
        return addressed(self.codes, self.scales)

    def codes_at(self, places: np.ndarray) -> np.ndarray:
        """Copies of the codes of some rows."""
        starts = np.cumsum([0, *map(len, self.codes)])
        block = np.searchsorted(starts, places, "right") - 1
        return np.stack([self.codes[b][place - starts[b]] for b, place in zip(block, places, strict=True)])

    def first(self, rows: int) -> "Stored":
        """The first rows of the batch."""
        return Stored(_first_rows(self.stored, rows), _first_rows(self.scale, rows))


Kernel = Callable[[Stored], Block]
"""A function that scores a batch."""


class Fastest:
    """The fastest of several kernels on this CPU, found by timing them on the first large batch.

    The choice holds for the process, by the rows' kind (a codec's name), width and number of queries. A kernel that
    must be compiled joins once the process has spent as long on such scans as compiling takes, so that few or small
    scans never wait for it. If it fails (a numba that does not fit this numpy, say), scans go on without it.
    """

    _chosen: ClassVar[dict[tuple[str, int, int, int], int]] = {}
    _spent: ClassVar[dict[tuple[str, int, int, int], float]] = {}

    def __init__(self, kind: str, queries: Queries, kernels: Sequence[Kernel], costly: Kernel | None = None):
        magnitude = (len(queries) - 1).bit_length()  # 1, 2, 3-4, 5-8 ...
        self._key = (kind, queries.shape[1], magnitude, torch.get_num_threads())
        self._kernels = [*kernels, *([costly] if costly else [])]
        self._costly = len(kernels) if costly else None

    def __call__(self, rows: Stored) -> Block:
        """Score a batch by the chosen kernel, or by the first one before there is a choice."""
        key, start = self._key, time.perf_counter()
        if rows.count >= _TRIAL_ROWS[0]:
            if key not in self._chosen:
                cheap = [number for number in range(len(self._kernels)) if number != self._costly]
                chosen = self._trial(cheap, rows, _TRIAL_ROWS)
                self._spent[key], self._chosen[key] = 0.0, chosen  # in this order: other threads scan meanwhile
            elif self._costly is not None and self._spent[key] > _PATIENCE:
                self._spent[key] = -np.inf
                self._chosen[key] = self._with_costly(self._costly, self._chosen[key], rows)
        block = self._kernels[self._chosen.get(key, 0)](rows)
        if key in self._spent:
            self._spent[key] += time.perf_counter() - start
        return block

    def _with_costly(self, costly: int, chosen: int, rows: Stored) -> int:
        row_bytes = max(1, rows.stored[0][:1].numel() * rows.stored[0].itemsize)
        try:
            # the costly one first: workers of torch's products stay awake for a while, and would slow its own threads
            return self._trial([costly, chosen], rows, [max(_TRIAL_ROWS[-1], _COSTLY_TRIAL_BYTES // row_bytes)])
        except compiled.CompilingError as error:
            logger.warning("scans are not compiled, and stay slower: %s", error)
            return chosen

    def _trial(self, near: list[int], rows: Stored, sizes: Sequence[int]) -> int:
        """Number of the fastest kernel, in trials of growing size; a kernel that is far behind leaves the trials."""
        seconds = []
        for size in sizes:
            sample = rows.first(size)
            seconds = [self._seconds(self._kernels[number], sample) for number in near]
            best = min(seconds)
            if size != sizes[-1]:
                near = [number for number, took in zip(near, seconds, strict=True) if took <= _TRIAL_NEAR * best]
        return near[seconds.index(min(seconds))]

    def _seconds(self, kernel: Kernel, rows: Stored) -> float:
        """Least seconds of four calls, after one that warms up; scores with a slack count for more."""
        block, took = kernel(rows), []
        while len(took) < 4 and sum(took) < _TRIAL_SECONDS:
            start = time.perf_counter()
            kernel(rows)
            took.append(time.perf_counter() - start)
        slacks = (block.slack, block.slack_per_norm, block.slack_per_scale)
        return min(took) * (1 if all(slack is None for slack in slacks) else _RESCORING)


def _first_rows(blocks: Sequence[Tensor], rows: int) -> list[Tensor]:
    first = []
    for block in blocks:
        if rows <= 0:
            break
        first.append(block[:rows])
        rows -= len(block)
    return first


def _with_places(blocks: Sequence[Tensor], out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each block, with its rows of an output [n, .]."""
    first = 0
    for block in blocks:
        yield block, out[first : first + block.shape[0]]
        first += block.shape[0]


def _scaled(out: Tensor, rows: Stored) -> Tensor:
    """Products [n, q] times the rows' scales, in place.

    numpy is used because it stays in this thread: waking torch's threads costs more than such a small step, and many
    milliseconds where another process has their core.
    """
    np.multiply(out.numpy(), rows.scales[:, None], out=out.numpy())
    return out


def lazily(make: Callable[[Queries], Kernel], queries: Queries) -> Kernel:
    """A kernel that is made when it first scores, so that one that is never tried costs nothing."""
    kernel = cache(lambda: make(queries))
    return lambda rows: kernel()(rows)


def decoded_kernel(queries: Queries, decoder: Callable[[Tensor, int], Tensor], *, exactly: bool = True) -> Kernel:
    """Decode a few rows at a time and multiply in fp32: right on any device, and as slow as decoding is.

    `decoder` gives, for stored rows and their width, the values of the codes before the rows' scales. These sums in
    fp32 count as exact, unless they are not to: then, for signs, what they lose is a slack.
    """
    k = queries.shape[1]
    step = _DECODED_ROWS if queries.device.type == "cpu" else _DECODED_ROWS_ELSEWHERE

    def score(rows: Stored) -> Block:
        out = queries.new_empty(rows.count, len(queries))
        for (block, into), factors in zip(_with_places(rows.stored, out), rows.scale, strict=True):
            for first in range(0, len(block), step):
                torch.mm(decoder(block[first : first + step], k), queries.T, out=into[first : first + step])
            into.mul_(factors[:, None])
        return Block(out.T, slack_per_scale=None if exactly else queries.norm(dim=1) * (k**0.5 * _FP32_SUM))

    return score


def compiled_kernel(codec: str, queries: Queries, columns: int) -> Kernel | None:
    """Products of rows in a compiled loop, or of rows that one unpacks; None where neither helps, and without numba."""
    if not len(queries) or not compiled.is_available():
        return None
    if codec == "onebit" and (len(queries) <= _COMPILED_QUERIES or matrix_units.is_available()):
        return _bits_kernel(queries)
    if len(queries) > _COMPILED_QUERIES:
        return integer_kernel(queries, **PACKED[codec], unpack=_compiled_planes) if codec in PACKED else None
    if codec not in compiled.PLANES:
        return None
    products = compiled.products(codec, queries, columns)
    return lambda rows: Block(torch.from_numpy(products(rows.strips).T))


def _bits_kernel(queries: Queries) -> Kernel:
    """Products of one-bit rows, from their bits as they are; made when it first scores, which takes some time."""
    module = bit_planes if len(queries) <= _COMPILED_QUERIES else matrix_units
    made = cache(lambda: module.products(queries))

    def score(rows: Stored) -> Block:
        products, errors = made()
        return Block(torch.from_numpy(products(rows.addressed).T), slack_per_scale=torch.from_numpy(errors))

    return score


def float32_kernel(queries: Queries) -> Kernel:
    """The plain product with rows stored in fp32, whose scales are 1."""

    def score(rows: Stored) -> Block:
        out = torch.empty(rows.count, len(queries), dtype=torch.float32)
        for block, into in _with_places(rows.stored, out):
            torch.mm(block, queries.T, out=into)
        return Block(out.T)

    return score


def bfloat16_kernel(queries: Queries) -> Kernel:
    """Two bfloat16 terms of the query in one product; each result is rounded to bfloat16, hence the slack.

    The two terms miss less than 2^-16 of the query, which counts with the error of the sums.
    """
    high = queries.bfloat16()
    both, per_norm = torch.cat([high, (queries - high.float()).bfloat16()]), queries.norm(dim=1) * _FP32_SUM

    def score(rows: Stored) -> Block:
        out, slack = torch.empty(2, rows.count, len(queries), dtype=torch.float32)
        places = zip(_with_places(rows.stored, out), _with_places(rows.stored, slack), strict=True)
        for (block, into), (_, off) in places:
            products = (block @ both.T).float()
            _sum_terms(products, out=into)
            _sum_terms(np.abs(products.numpy()) * _BF16_ROUND, out=off)
        return Block(out.T, slack.T, per_norm)

    return score


def _sum_terms(sums: Tensor | np.ndarray, *, out: Tensor) -> None:
    """Add the columns of the queries' terms: [n, terms * q] -> [n, q]. In numpy, as `_scaled`."""
    columns, total, q = np.asarray(sums), out.numpy(), out.shape[1]
    total[:] = columns[:, :q]
    for first in range(q, columns.shape[1], q):
        total += columns[:, first : first + q]


def integer_kernel(
    queries: Queries,
    *,
    bits: int,
    slope: int = 1,
    shift: int = 0,
    unpack: Callable[[Tensor, int], Tensor] | None = None,
) -> Kernel:
    """8-bit products: x = slope * u + shift for the stored code u, the query as a sum of 8-bit vectors.

    Codes of fewer than 8 bits are unpacked by `planes`, or by another function of the same rows and bits.

    >>> kernel = integer_kernel(torch.tensor([[127.0, 0.0]]), bits=8)
    >>> kernel(Stored([torch.tensor([[2, 5], [-4, 0]], dtype=torch.int8)], [torch.tensor([0.5, 1.0])])).scores
    tensor([[ 127., -508.]])
    """
    per_byte = 8 // bits
    width = -(-queries.shape[1] // per_byte) * per_byte
    padded = torch.nn.functional.pad(queries, (0, width - queries.shape[1]))
    by_plane = torch.cat([padded[:, place::per_byte] for place in range(per_byte)], 1)
    terms, term_scale, missed = _query_terms(by_plane) if bits > 1 else _query_term(by_plane)
    products = _byte_products(terms.flatten(0, 1), term_scale.flatten())
    shifts = (shift * terms.sum(2, dtype=torch.int64) * term_scale.double()).sum(0).float()
    step = 2**23 // max(1, width) + 1 if per_byte > 1 else 2**62  # unpacked rows should stay in cache
    # |<missed, row>| <= |missed| |row|, where the decoded row's norm is at most the row's own, plus half a scale for
    # each entry; one bit is decoded to a whole scale for each entry
    of_sums, entries = queries.norm(dim=1) * _FP32_SUM, queries.shape[1] ** 0.5
    per_norm = missed + of_sums if bits > 1 else torch.zeros_like(of_sums)
    per_scale = per_norm * (entries / 2) if bits > 1 else missed + of_sums * entries

    def score(rows: Stored) -> Block:
        out = torch.empty(rows.count, len(queries), dtype=torch.float32)
        for block, into in _with_places(rows.stored, out):
            for first in range(0, len(block), step):
                stored = block[first : first + step]
                sums = products(stored if per_byte == 1 else (unpack or planes)(stored, bits))
                _sum_terms(sums, out=into[first : first + step])
        if (slope, shift) != (1, 0):
            out.mul_(slope).add_(shifts)
        return Block(_scaled(out, rows).T, slack_per_norm=per_norm, slack_per_scale=per_scale)

    return score


def planes(stored: UInt8[Tensor, "n stored"], bits: int) -> Int8[Tensor, "n codes"]:
    """The codes of packed bytes as int8, all first ones, then all second ones and so on: no interleaving."""
    per_byte, width = 8 // bits, stored.shape[1]
    out = stored.new_empty(len(stored), per_byte * width)
    for place in range(per_byte):
        plane = out[:, place * width : (place + 1) * width]
        torch.bitwise_right_shift(stored, bits * place, out=plane)
    return out.bitwise_and_(2**bits - 1).view(torch.int8)


def _compiled_planes(stored: UInt8[Tensor, "n stored"], bits: int) -> Int8[Tensor, "n codes"]:
    """What `planes` gives, in one pass."""
    out = stored.new_empty(len(stored), 8 // bits * stored.shape[1])
    compiled.unpacking(bits)(stored.numpy(), out.numpy())
    return out.view(torch.int8)


def _query_terms(queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as sums of int8 vectors [terms, q, k] times scales [terms, q], and the norm of the remainder [q].

    A second vector holds what the first one's rounding misses: together 16 bits. For few queries, where a scan waits
    for memory, it is omitted if the first one is near enough; but not where matrix units make it free.
    """
    rest, terms, scales = queries.numpy().astype(np.float64), [], []
    scale = np.maximum(np.abs(rest).max(1, initial=0.0), TINY) / 127
    limit = np.linalg.norm(rest, axis=1) * (len(rest) <= _ONE_TERM_QUERIES and not _has_matrix_units()) * _ONE_TERM
    while not terms or (len(terms) < 2 and (np.linalg.norm(rest, axis=1) > limit).any()):
        terms.append(np.rint(rest / scale[:, None]))
        scales.append(scale)
        rest = rest - terms[-1] * scale[:, None]
        scale = scale / 254
    missed = np.linalg.norm(rest, axis=1).astype(np.float32)
    integers, scales = np.stack(terms).astype(np.int8), np.stack(scales).astype(np.float32)
    return torch.from_numpy(integers), torch.from_numpy(scales), torch.from_numpy(missed)


def _query_term(queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as int8 vectors [1, q, k] times scales [1, q], and the bound on a product's error with signs [q].

    Rounded at random, one vector is near enough for rows of one bit, all of whose entries count alike.
    """
    whole, step, errors = rounded(queries, 127)
    return torch.from_numpy(whole.astype(np.int8))[None], torch.from_numpy(step)[None], torch.from_numpy(errors)


def _byte_products(queries: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Function from int8 rows [n, k] to their products [n, q] with int8 queries times scales.

    The integer sums are exact.
    """
    r, k = queries.shape
    if k > _INT32_COLUMNS:
        blocks = [_byte_products(columns, scale) for columns in queries.split(_INT32_COLUMNS, 1)]
        none = torch.zeros((), dtype=torch.float32)
        return lambda x: sum(
            (f(columns) for f, columns in zip(blocks, x.split(_INT32_COLUMNS, 1), strict=True)), start=none
        )
    if (
        k <= 1
    ):  # torch 2.13: _int_mm gives wrong numbers for rows of one entry; onednn's ends the process for empty rows
        return lambda x: x.float() @ queries.float().T * scale
    if not _has_matrix_units():
        return lambda x: torch._int_mm(x, queries.T) * scale  # pyright: ignore[reportPrivateImportUsage]
    # with matrix units _int_mm stays at half of the memory's bandwidth
    filled = torch.nn.functional.pad(queries, (0, 0, 0, max(0, _LEAST_COLUMNS - r)))
    product = _matrix_unit_products(filled, torch.nn.functional.pad(scale, (0, len(filled) - r)))
    return lambda x: product(x.contiguous())[:, :r]


def _matrix_unit_products(queries: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    packed, zeros = torch.ops.onednn.qlinear_prepack(queries, None), torch.zeros(len(queries), dtype=torch.int64)
    linear = torch.ops.onednn.qlinear_pointwise
    return lambda x: linear(x, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "none")


@cache
def _has_matrix_units() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported() and hasattr(torch.ops.onednn, "qlinear_pointwise"))
