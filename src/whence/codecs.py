"""Vectors as float32, bfloat16, float16, int8, int4 or one bit, and their inner products with queries.

A codec stores each row v as a tensor of few bits and one fp32 scale, and states its worst error
(`Codec.bound`):

    float32   exact                                  float16  v / (absmax / 2^15): rows of 1e-30 survive
    bfloat16  rounded to nearest                     int8     round(v / (absmax / 127))
    int4      round(v / (absmax / 7)), two a byte    onebit   sign(v) * mean|v|, eight a byte

For `onebit`, mean|v| is the scale that minimises the squared error, which is then |v|^2 - k * mean|v|^2.

`Codec.prepare(queries)` is done once for a scan; the `Kernel` that it returns scores one block of rows after
another. On a CPU it reads the codes as they lie on disk: int8, int4 and onebit by 8-bit matrix products,
exact in integers, with the query written as a sum of 8-bit vectors; bfloat16 by bfloat16 products, which sum
in fp32 but round the result, so that a block carries its `slack` and the scan recomputes what could reach the
top. On other devices rows are decoded and multiplied in fp32. Nothing here knows of files, statuses or ranks.
"""

import difflib
from collections.abc import Callable
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
_FEW = 16  # queries that a scan scores in the time of one, two parts each
_UPCAST_ROWS = 256  # rows decoded at a time: 4 MB at 4,096 columns, which stays in cache
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
    """None: the products are those of fp32 arithmetic, and need not be recomputed."""

    slack_per_norm: Float[Tensor, " q"] | None = None
    """More slack, for each unit of the row's norm."""


Kernel = Callable[[Tensor, Tensor], Block]
"""Scores a block: (stored rows, their scales) -> Block."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One way to store vectors."""

    name: str
    bits: int
    dtype: torch.dtype
    encoder: Callable[[Vectors], tuple[Tensor, Tensor]]
    decoder: Callable[[Tensor, Tensor, int], Tensor]
    error: Callable[[Vectors], Tensor]
    kernel: Callable[["Codec", Queries], Kernel]

    def encode(self, vectors: Vectors) -> tuple[Rows, PerRow]:
        """Stored rows and scales of finite vectors. Rows that are not finite must come as zeros."""
        return self.encoder(vectors)

    def decode(self, stored: Rows, scale: PerRow, k: int) -> Vectors:
        """The vectors that the codes stand for."""
        return self.decoder(stored, scale, k)

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
        return _decoded_kernel(self, queries) if queries.device.type != "cpu" else self.kernel(self, queries)

    def scores(self, stored: Rows, scale: PerRow, queries: Queries) -> Products:
        """Inner products [q, n] with the decoded rows.

        Error: that of fp32 arithmetic, and for int8, int4 and onebit also the query's rounding, at most
        absmax(q) * |row|_1 / 64516 in two 8-bit parts, or / 254 in one (see `_query_parts`).
        """
        block = self.prepare(queries)(stored, scale)
        return block.scores if block.slack is None else _decoded_kernel(self, queries)(stored, scale).scores


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


def _decode_plain(stored: Tensor, scale: Tensor, k: int) -> Tensor:
    return stored.float()


def _decode_scaled(stored: Tensor, scale: Tensor, k: int) -> Tensor:
    return stored.float() * scale[:, None]


def _decode_int4(stored: Tensor, scale: Tensor, k: int) -> Tensor:
    return (_unpacked(stored, 4, k).float() - 8) * scale[:, None]


def _decode_onebit(stored: Tensor, scale: Tensor, k: int) -> Tensor:
    return (_unpacked(stored, 1, k).float() * 2 - 1) * scale[:, None]


def _onebit_error(vectors: Tensor) -> Tensor:
    mean = _encode_onebit(vectors)[1]
    return torch.maximum(_absmax(vectors) - mean, mean) * (1 + 2**-20) + _TINY


def _decoded_kernel(codec: Codec, queries: Tensor) -> Kernel:
    """Decode a few rows at a time and multiply in fp32: right anywhere, and as slow as decoding is."""
    k = queries.shape[1]
    step = _UPCAST_ROWS if queries.device.type == "cpu" else 16_384

    def score(stored: Tensor, scale: Tensor) -> Block:
        out = queries.new_empty(len(queries), len(stored))
        for first in range(0, len(stored), step):
            rows = slice(first, first + step)
            out[:, rows] = queries @ codec.decode(stored[rows], scale[rows], k).T
        return Block(out)

    return score


def _float32_kernel(codec: Codec, queries: Tensor) -> Kernel:
    return lambda stored, scale: Block((stored @ queries.T).T)


def _bfloat16_kernel(codec: Codec, queries: Tensor) -> Kernel:
    """Two bfloat16 terms of the query in one product; each result is rounded to bfloat16, hence the slack.

    What the two terms miss of the query is below 2^-16 of it, and counted with the error of the sums.
    """
    high = queries.bfloat16()
    both = torch.cat([high, (queries - high.float()).bfloat16()])
    per_norm = queries.norm(dim=1) * _FP32_SUM

    def score(stored: Tensor, scale: Tensor) -> Block:
        parts = (stored @ both.T).float()
        out, slack = torch.empty(2, len(stored), len(queries))
        _sum_parts(parts, out=out)
        _sum_parts(np.abs(parts.numpy()) * _BF16_ROUND, out=slack)
        return Block(out.T, slack.T, per_norm)

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
    parts, part_scale = _query_parts(torch.cat([padded[:, place::per_byte] for place in range(per_byte)], 1))
    products = _byte_products(parts.flatten(0, 1), part_scale.flatten())
    shifts = (shift * parts.sum(2, dtype=torch.int64) * part_scale.double()).sum(0).float()
    step = 2**23 // max(1, width) + 1 if per_byte > 1 else 2**62  # unpacked rows should stay in cache

    def score(stored: Tensor, scale: Tensor) -> Block:
        out = torch.empty(len(stored), len(queries))
        for first in range(0, len(stored), step):
            rows = stored[first : first + step]
            sums = products(rows if per_byte == 1 else _planes(rows, codec.bits))
            _sum_parts(sums, out=out[first : first + step])
        if per_byte > 1:
            out.mul_(slope).add_(shifts)
        np.multiply(out.numpy(), scale.numpy()[:, None], out=out.numpy())
        return Block(out.T)

    return score


def _query_parts(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Queries as sums of int8 vectors [parts, q, k] times scales [parts, q].

    The second vector holds what the first one's rounding left: together 16 bits. It costs nothing for few
    queries, where a scan waits for memory, and little where the CPU has matrix units; elsewhere many queries
    have one.
    """
    count = 2 if len(queries) <= _FEW or _has_matrix_units() else 1
    rest, parts, scales = queries.numpy().astype(np.float64), [], []
    scale = np.maximum(np.abs(rest).max(1, initial=0.0), _TINY) / 127
    for _ in range(count):
        parts.append(np.rint(rest / scale[:, None]))
        scales.append(scale)
        rest = rest - parts[-1] * scale[:, None]
        scale = scale / 254
    return torch.from_numpy(np.stack(parts).astype(np.int8)), torch.from_numpy(np.stack(scales).astype(np.float32))


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
        kernel=_float32_kernel,
    ),
    "bfloat16": Codec(
        name="bfloat16",
        bits=16,
        dtype=torch.bfloat16,
        encoder=_encode_bfloat16,
        decoder=_decode_plain,
        error=lambda vectors: _absmax(vectors) * 2**-8 + _TINY,
        kernel=_bfloat16_kernel,
    ),
    "float16": Codec(
        name="float16",
        bits=16,
        dtype=torch.float16,
        encoder=_encode_float16,
        decoder=_decode_scaled,
        error=lambda vectors: _absmax(vectors) * (2**-11 + 2**-20) + _TINY,
        kernel=_decoded_kernel,
    ),
    "int8": Codec(
        name="int8",
        bits=8,
        dtype=torch.int8,
        encoder=lambda vectors: _encode_integers(vectors, 127),
        decoder=_decode_scaled,
        error=lambda vectors: _absmax(vectors) * (1 / 254 + 2**-20) + _TINY,
        kernel=_integer_kernel,
    ),
    "int4": Codec(
        name="int4",
        bits=4,
        dtype=torch.uint8,
        encoder=_encode_int4,
        decoder=_decode_int4,
        error=lambda vectors: _absmax(vectors) * (1 / 14 + 2**-20) + _TINY,
        kernel=_integer_kernel,
    ),
    "onebit": Codec(
        name="onebit",
        bits=1,
        dtype=torch.uint8,
        encoder=_encode_onebit,
        decoder=_decode_onebit,
        error=_onebit_error,
        kernel=_integer_kernel,
    ),
}
