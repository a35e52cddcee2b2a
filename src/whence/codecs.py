"""Vectors as float32, bfloat16, float16, int8, int4 or one bit, and their inner products with queries.

A codec stores each row v as a tensor of few bits and one fp32 scale, and states its worst error
(`Codec.bound`):

    float32   exact                                  float16  v / (absmax / 2^15): rows of 1e-30 survive
    bfloat16  rounded to nearest                     int8     round(v / (absmax / 127))
    int4      round(v / (absmax / 7)), two a byte    onebit   sign(v) * mean|v|, eight a byte

For `onebit`, mean|v| is the scale that minimises the squared error, which is then |v|^2 - k * mean|v|^2.

`Codec.prepare(queries)` is done once for a scan; the `Kernel` that it returns scores one block of rows after
another. On a CPU there are several kernels, all within their stated `slack` of fp32, so that the scan can
recompute what could reach the top and return the same from each:

    integer    8-bit products, exact in integers, with the query written as a sum of 8-bit vectors
    widened    8-bit rows widened to fp32 in registers, times a query in bfloat16 terms; the result is rounded
    product    bfloat16 products, which sum in fp32 but round the result
    decoded    rows decoded a few at a time and multiplied in fp32

CPUs differ more than a rule could say: with matrix units (AMX) integer products reach the memory's bandwidth,
on AVX2 they take fifteen times as long as widening. So the first large block of a process is a trial of all of
them (see `_Fastest`). On other devices rows are decoded. Nothing here knows of files, statuses or ranks.
"""

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from whence.errors import UnknownNameError

_TINY = 2.0**-119  # scales below fp32's normal range lose bits: an absolute error no gradient can notice
_INT32_COLUMNS = 131_072  # 127 * 127 * 131072 < 2^31: longer sums of 8-bit products could overflow
_LEAST_COLUMNS = 24  # narrower 8-bit products take a slower path of oneDNN
_FEW = 16  # queries that matrix units score in the time of one, two parts each
_ONE_PART = 0.02  # of a query's norm may be lost by writing it as one 8-bit vector, and for so few queries:
_ONE_PART_QUERIES = 4  # else rescoring takes longer than a second vector
_UPCAST_ROWS = 256  # rows decoded at a time: 4 MB at 4,096 columns, which stays in cache
_WIDENED_COLUMNS = 64  # torch's widening product reads whole registers: other widths would be read past their end
_WIDENED_QUERIES = 8  # past so many the widening is done again for each few of them
_TRIAL_ROWS = (256, 2048)  # of the first trial of every kernel, and of the second of those that came near
_TRIAL_NEAR = 3.0
_BF16_ROUND = 2.0**-8 * 1.01
_FP32_SUM = 2.0**-15  # taken for the error of fp32 sums, relative to |x| |q|: far above what long rows show

Rows = Shaped[Tensor, "n stored"]
Vectors = Float32[Tensor, "n k"]
PerRow = Float32[Tensor, " n"]
Queries = Float32[Tensor, "q k"]
Products = Float32[Tensor, "q n"]


@dataclass(frozen=True)
class Block:
    """Inner products of every query with a block of rows; the true ones are within `slack` of them."""

    scores: Float[Tensor, "q n"]
    slack: Float[Tensor, "q n"] | None = None
    """How far a product was rounded; None: it was not."""

    slack_per_norm: Float[Tensor, " q"] | None = None
    """More slack, for each unit of the row's norm. No slack of any kind: the products are those of fp32 arithmetic."""

    slack_per_scale: Float[Tensor, " q"] | None = None
    """More slack, for each unit of the row's stored scale."""


Kernel = Callable[[Tensor, Tensor], Block]
"""Scores a block: (stored rows, their scales) -> Block."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One way to store vectors."""

    name: str
    bits: int
    dtype: torch.dtype
    encoder: Callable[[Vectors], tuple[Tensor, Tensor]]
    decoder: Callable[[Tensor, int], Tensor]
    """What the codes of rows of width k stand for, before the rows' scales."""
    error: Callable[[Vectors], Tensor]
    kernels: tuple[Callable[["Codec", Queries], Kernel | None], ...]
    """Each gives None for queries that it cannot do. The first that can is taken for blocks too small for a trial."""

    def encode(self, vectors: Vectors) -> tuple[Rows, PerRow]:
        """Stored rows and scales of finite vectors. Rows that are not finite must come as zeros."""
        return self.encoder(vectors)

    def decode(self, stored: Rows, scale: PerRow, k: int) -> Vectors:
        """The vectors that the codes stand for."""
        return self.decoder(stored, k) * scale[:, None]

    def bound(self, vectors: Vectors) -> PerRow:
        """Largest error of any entry of `decode(encode(vectors))`, a row each."""
        return self.error(vectors)

    def columns(self, k: int) -> int:
        """Entries of `dtype` in a stored row of width k."""
        per_entry = max(1, 8 // self.bits)
        return -(-k // per_entry)

    def bytes_per_row(self, k: int) -> int:
        """Bytes of a stored row, without its scale (4 bytes)."""
        return self.columns(k) * self.dtype.itemsize

    def prepare(self, queries: Queries) -> Kernel:
        """A kernel for these queries, to be used for any number of blocks on the queries' device."""
        if queries.device.type != "cpu":
            return _decoded_kernel(self, queries)
        made = [kernel for make in self.kernels if (kernel := make(self, queries)) is not None]
        return made[0] if len(made) == 1 else _Fastest(self.name, queries, made)

    def scores(self, stored: Rows, scale: PerRow, queries: Queries) -> Products:
        """Inner products [q, n] with the decoded rows.

        By the `decoded` kernel: right anywhere, the same for any number of queries, as slow as decoding is.
        """
        return _decoded_kernel(self, queries)(stored, scale).scores


def codec(name: str) -> Codec:
    """The codec of this name."""
    if name not in CODECS:
        near = difflib.get_close_matches(name, CODECS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UnknownNameError(f"--codec {name!r}: no such codec.{hint} There are {', '.join(CODECS)}.")
    return CODECS[name]


def _absmax(vectors: Tensor) -> Tensor:
    return vectors.abs().amax(1) if vectors.shape[1] else vectors.new_zeros(len(vectors))


def _divided(vectors: Tensor, scale: Tensor) -> Tensor:
    return vectors / torch.where(scale > 0, scale, 1.0)[:, None]


def _encode_float32(vectors: Tensor) -> tuple[Tensor, Tensor]:
    return vectors, vectors.new_ones(len(vectors))


def _encode_bfloat16(vectors: Tensor) -> tuple[Tensor, Tensor]:
    limit = torch.finfo(torch.bfloat16).max  # fp32 goes a little further, and would round to infinity
    return vectors.clamp(-limit, limit).bfloat16(), vectors.new_ones(len(vectors))


def _encode_float16(vectors: Tensor) -> tuple[Tensor, Tensor]:
    scale = _absmax(vectors) / 2**15
    return _divided(vectors, scale).clamp(-65504, 65504).half(), scale


def _encode_integers(vectors: Tensor, top: int) -> tuple[Tensor, Tensor]:
    scale = _absmax(vectors) / top
    return _divided(vectors, scale).round_().clamp_(-top, top).to(torch.int8), scale


def _encode_int4(vectors: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = _encode_integers(vectors, 7)
    return _packed((codes + 8).view(torch.uint8), 4), scale


def _encode_onebit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    scale = vectors.abs().mean(1, dtype=torch.float64).float() if vectors.shape[1] else _absmax(vectors)
    return _packed((vectors >= 0).view(torch.uint8), 1), scale


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes side by side in bytes, the first one in the lowest bits; a short row is filled with zeros."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte))
    out = torch.zeros_like(padded[:, ::per_byte])
    for place in range(per_byte):
        out |= padded[:, place::per_byte] << (bits * place)
    return out


def _planes(stored: Tensor, bits: int) -> Tensor:
    """The codes of packed bytes as int8, all first ones, then all second ones and so on: no interleaving."""
    per_byte, width = 8 // bits, stored.shape[1]
    out = stored.new_empty(len(stored), per_byte * width)
    for place in range(per_byte):
        plane = out[:, place * width : (place + 1) * width]
        torch.bitwise_right_shift(stored, bits * place, out=plane)
    return out.bitwise_and_(2**bits - 1).view(torch.int8)


def _unpacked(stored: Tensor, bits: int, k: int) -> Tensor:
    per_byte = 8 // bits
    return _planes(stored, bits).view(len(stored), per_byte, -1).transpose(1, 2).reshape(len(stored), -1)[:, :k]


def _decode_plain(stored: Tensor, k: int) -> Tensor:
    return stored.float()


def _decode_int4(stored: Tensor, k: int) -> Tensor:
    return _unpacked(stored, 4, k).float().sub_(8)


def _decode_onebit(stored: Tensor, k: int) -> Tensor:
    return _unpacked(stored, 1, k).float().mul_(2).sub_(1)


def _onebit_error(vectors: Tensor) -> Tensor:
    mean = _encode_onebit(vectors)[1]
    return torch.maximum(_absmax(vectors) - mean, mean) * (1 + 2**-20) + _TINY


def _decoded_kernel(codec: Codec, queries: Tensor) -> Kernel:
    """Decode a few rows at a time and multiply in fp32: right anywhere, and as slow as decoding is."""
    k = queries.shape[1]
    step = _UPCAST_ROWS if queries.device.type == "cpu" else 16_384

    def score(stored: Tensor, scale: Tensor) -> Block:
        out = queries.new_empty(len(stored), len(queries))
        for first in range(0, len(stored), step):
            torch.mm(codec.decoder(stored[first : first + step], k), queries.T, out=out[first : first + step])
        return Block(out.mul_(scale[:, None]).T)

    return score


class _Fastest:
    """Kernel that is the fastest of several on this CPU, found by timing them on the first large block.

    The choice is kept for the process, by codec, width and number of queries.
    """

    _chosen: dict[tuple[str, int, int, int], int] = {}  # noqa: RUF012

    def __init__(self, name: str, queries: Tensor, kernels: Sequence[Kernel]):
        many = (len(queries) - 1).bit_length()  # 1, 2, 3-4, 5-8 ...
        self._key = (name, queries.shape[1], many, torch.get_num_threads())
        self._kernels = kernels

    def __call__(self, stored: Tensor, scale: Tensor) -> Block:
        if self._key not in self._chosen and len(stored) >= _TRIAL_ROWS[0]:
            self._chosen[self._key] = self._trial(stored, scale)
        return self._kernels[self._chosen.get(self._key, 0)](stored, scale)

    def _trial(self, stored: Tensor, scale: Tensor) -> int:
        """Number of the fastest."""
        near, seconds = list(range(len(self._kernels))), []
        for rows in _TRIAL_ROWS:
            seconds = [self._seconds(self._kernels[number], stored[:rows], scale[:rows]) for number in near]
            best = min(seconds)
            if rows != _TRIAL_ROWS[-1]:
                near = [number for number, took in zip(near, seconds, strict=True) if took <= _TRIAL_NEAR * best]
        return near[seconds.index(min(seconds))]

    def _seconds(self, kernel: Kernel, stored: Tensor, scale: Tensor) -> float:
        """The better of two runs, after one that warms up."""
        took = []
        for _ in range(3):
            start = time.perf_counter()
            kernel(stored, scale)
            took.append(time.perf_counter() - start)
        return min(took[1:])


def _float32_kernel(codec: Codec, queries: Tensor) -> Kernel:
    return lambda stored, scale: Block((stored @ queries.T).T)


def _bfloat16_kernel(codec: Codec, queries: Tensor) -> Kernel:
    """Two bfloat16 terms of the query in one product; each result is rounded to bfloat16, hence the slack."""
    both, per_norm = _bfloat16_terms(queries)

    def score(stored: Tensor, scale: Tensor) -> Block:
        return _rounded_block((stored @ both.T).float(), per_norm)

    return score


def _bfloat16_queries_first_kernel(codec: Codec, queries: Tensor) -> Kernel | None:
    """As `_bfloat16_kernel`, with the product the other way round: for few queries some CPUs take half the time."""
    if len(queries) > _FEW:
        return None
    both, per_norm = _bfloat16_terms(queries)

    def score(stored: Tensor, scale: Tensor) -> Block:
        return _rounded_block(torch.nn.functional.linear(both, stored).T.float(), per_norm)

    return score


def _bfloat16_one_term_kernel(codec: Codec, queries: Tensor) -> Kernel | None:
    """The first bfloat16 term alone: a matrix times one vector, which every CPU does at its memory's speed.

    What the term misses of the query, at most 2^-9 of each entry, is slack for each unit of the row's norm.
    """
    if len(queries) > 1:
        return None
    term = queries.bfloat16()
    per_norm = (queries - term.float()).norm(dim=1) + queries.norm(dim=1) * _FP32_SUM

    def score(stored: Tensor, scale: Tensor) -> Block:
        return _rounded_block((stored @ term.T).float(), per_norm)

    return score


def _bfloat16_terms(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Queries as two bfloat16 vectors to be added [2q k], and slack for each unit of a row's norm [q].

    What the two miss of the query is below 2^-16 of it, and counted with the error of the sums.
    """
    high = queries.bfloat16()
    return torch.cat([high, (queries - high.float()).bfloat16()]), queries.norm(dim=1) * _FP32_SUM


def _rounded_block(parts: Tensor, per_norm: Tensor, scale: Tensor | None = None) -> Block:
    """Sums [n, parts * q], each rounded to bfloat16, as a block; times the rows' scales."""
    out, slack = torch.empty(2, len(parts), len(per_norm))
    _sum_parts(parts, out=out)
    _sum_parts(np.abs(parts.numpy()) * _BF16_ROUND, out=slack)
    if scale is not None:
        for sums in (out.numpy(), slack.numpy()):
            np.multiply(sums, scale.numpy()[:, None], out=sums)
    return Block(out.T, slack.T, per_norm)


def _widened_kernel(codec: Codec, queries: Tensor) -> Kernel | None:
    """8-bit rows widened to fp32 in registers, times two bfloat16 terms of the query; results are rounded."""
    if queries.shape[1] % _WIDENED_COLUMNS or len(queries) > _WIDENED_QUERIES or not queries.shape[1]:
        return None
    both, per_norm = _bfloat16_terms(queries)

    def score(stored: Tensor, scale: Tensor) -> Block:
        ones = torch.ones(len(stored), dtype=torch.bfloat16)  # the rows' own scales would be rounded
        sums = torch._weight_int8pack_mm(both, stored.contiguous(), ones)  # pyright: ignore[reportPrivateImportUsage]
        return _rounded_block(sums.T.float(), 2 * per_norm, scale)

    return score


def _sum_parts(sums: Tensor | np.ndarray, *, out: Tensor) -> None:
    """Add the columns of each part of the queries: [n, parts * q] -> [n, q].

    In numpy, which stays in this thread: waking torch's threads costs more than such a small step, and many
    milliseconds where another process has their core.
    """
    columns, total, q = np.asarray(sums), out.numpy(), out.shape[1]
    total[:] = columns[:, :q]
    for first in range(q, columns.shape[1], q):
        total += columns[:, first : first + q]


def _integer_kernel(codec: Codec, queries: Tensor) -> Kernel:
    """8-bit products: x = slope * u + shift for the stored code u, the query as a sum of 8-bit vectors."""
    per_byte = max(1, 8 // codec.bits)
    slope, shift = {8: (1, 0), 4: (1, -8), 1: (2, -1)}[codec.bits]
    width = -(-queries.shape[1] // per_byte) * per_byte
    padded = torch.nn.functional.pad(queries, (0, width - queries.shape[1]))
    parts, part_scale, missed = _query_parts(torch.cat([padded[:, place::per_byte] for place in range(per_byte)], 1))
    products = _byte_products(parts.flatten(0, 1), part_scale.flatten())
    shifts = (shift * parts.sum(2, dtype=torch.int64) * part_scale.double()).sum(0).float()
    step = 2**23 // max(1, width) + 1 if per_byte > 1 else 2**62  # unpacked rows should stay in cache
    # |<missed, row>| <= |missed| |row|, where the decoded row's norm is at most the row's own, plus half a scale for
    # each entry; one bit is decoded to a norm of at most the row's
    missed = missed + queries.norm(dim=1) * _FP32_SUM
    per_scale = missed * (queries.shape[1] ** 0.5 / 2) if codec.bits > 1 else None

    def score(stored: Tensor, scale: Tensor) -> Block:
        out = torch.empty(len(stored), len(queries))
        for first in range(0, len(stored), step):
            rows = stored[first : first + step]
            sums = products(rows if per_byte == 1 else _planes(rows, codec.bits))
            _sum_parts(sums, out=out[first : first + step])
        if per_byte > 1:
            out.mul_(slope).add_(shifts)
        np.multiply(out.numpy(), scale.numpy()[:, None], out=out.numpy())
        return Block(out.T, slack_per_norm=missed, slack_per_scale=per_scale)

    return score


def _query_parts(queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as sums of int8 vectors [parts, q, k] times scales [parts, q], and the norm of what they miss [q].

    A second vector holds what the first one's rounding left: together 16 bits. It is left out for few queries,
    where a scan waits for memory, if the first one is near enough; not where matrix units make it free.
    """
    rest, parts, scales = queries.numpy().astype(np.float64), [], []
    scale = np.maximum(np.abs(rest).max(1, initial=0.0), _TINY) / 127
    most = np.linalg.norm(rest, axis=1) * (len(rest) <= _ONE_PART_QUERIES and not _has_matrix_units()) * _ONE_PART
    while not parts or (len(parts) < 2 and (np.linalg.norm(rest, axis=1) > most).any()):
        parts.append(np.rint(rest / scale[:, None]))
        scales.append(scale)
        rest = rest - parts[-1] * scale[:, None]
        scale = scale / 254
    missed = np.linalg.norm(rest, axis=1).astype(np.float32)
    whole, scales = np.stack(parts).astype(np.int8), np.stack(scales).astype(np.float32)
    return torch.from_numpy(whole), torch.from_numpy(scales), torch.from_numpy(missed)


def _byte_products(queries: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Function from int8 rows [n, k] to their products [n, q] with int8 queries times scales.

    The integer sums are exact.
    """
    r, k = queries.shape
    if k > _INT32_COLUMNS:
        blocks = [_byte_products(part, scale) for part in queries.split(_INT32_COLUMNS, 1)]
        return lambda x: sum(
            (f(part) for f, part in zip(blocks, x.split(_INT32_COLUMNS, 1), strict=True)), start=torch.zeros(())
        )
    if k == 1:  # torch 2.13's _int_mm gives wrong numbers for rows of one
        return lambda x: x.float() @ queries.float().T * scale
    if not _has_matrix_units():
        return lambda x: torch._int_mm(x, queries.T) * scale  # pyright: ignore[reportPrivateImportUsage]
    # with matrix units _int_mm stays at half of the memory's bandwidth, and long rows times few queries too: there,
    # each half of a row is multiplied by both halves of the queries, and two of the four products are used
    if r > _FEW or k % 2:
        filled = torch.nn.functional.pad(queries, (0, 0, 0, max(0, _LEAST_COLUMNS - r)))
        product = _matrix_unit_products(filled, torch.nn.functional.pad(scale, (0, len(filled) - r)))
        return lambda x: product(x.contiguous())[:, :r]
    halves = _matrix_unit_products(queries.view(r, 2, k // 2).transpose(0, 1).reshape(2 * r, k // 2), scale.repeat(2))

    def products(x: Tensor) -> Tensor:
        both = halves(x.reshape(-1, k // 2)).view(len(x), 2, 2, r).numpy()
        return torch.from_numpy(both[:, 0, 0] + both[:, 1, 1])

    return products


def _matrix_unit_products(queries: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    packed, zeros = torch.ops.onednn.qlinear_prepack(queries, None), torch.zeros(len(queries), dtype=torch.int64)
    linear = torch.ops.onednn.qlinear_pointwise
    return lambda x: linear(x, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "none")


@cache
def _has_matrix_units() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported() and hasattr(torch.ops.onednn, "qlinear_pointwise"))


CODECS: dict[str, Codec] = {
    "float32": Codec(
        name="float32",
        bits=32,
        dtype=torch.float32,
        encoder=_encode_float32,
        decoder=_decode_plain,
        error=lambda vectors: torch.zeros(len(vectors)),
        kernels=(_float32_kernel,),
    ),
    "bfloat16": Codec(
        name="bfloat16",
        bits=16,
        dtype=torch.bfloat16,
        encoder=_encode_bfloat16,
        decoder=_decode_plain,
        error=lambda vectors: _absmax(vectors) * 2**-8 + _TINY,
        kernels=(_bfloat16_kernel, _bfloat16_queries_first_kernel, _bfloat16_one_term_kernel, _decoded_kernel),
    ),
    "float16": Codec(
        name="float16",
        bits=16,
        dtype=torch.float16,
        encoder=_encode_float16,
        decoder=_decode_plain,
        error=lambda vectors: _absmax(vectors) * (2**-11 + 2**-20) + _TINY,
        kernels=(_decoded_kernel,),
    ),
    "int8": Codec(
        name="int8",
        bits=8,
        dtype=torch.int8,
        encoder=lambda vectors: _encode_integers(vectors, 127),
        decoder=_decode_plain,
        error=lambda vectors: _absmax(vectors) * (1 / 254 + 2**-20) + _TINY,
        kernels=(_integer_kernel, _widened_kernel, _decoded_kernel),
    ),
    "int4": Codec(
        name="int4",
        bits=4,
        dtype=torch.uint8,
        encoder=_encode_int4,
        decoder=_decode_int4,
        error=lambda vectors: _absmax(vectors) * (1 / 14 + 2**-20) + _TINY,
        kernels=(_integer_kernel, _decoded_kernel),
    ),
    "onebit": Codec(
        name="onebit",
        bits=1,
        dtype=torch.uint8,
        encoder=_encode_onebit,
        decoder=_decode_onebit,
        error=_onebit_error,
        kernels=(_integer_kernel, _decoded_kernel),
    ),
}
