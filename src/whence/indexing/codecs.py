"""How a row of floats is stored: as float32, bfloat16, float16, int8, int4 or one bit an entry.

A codec stores each row v as a tensor of few bits and one fp32 scale, and states its worst error
(`Codec.bound`):

    float32   exact                                  float16  v / (absmax / 2^15): rows of 1e-30 survive
    bfloat16  rounded to nearest                     int8     round(v / (absmax / 127))
    int4      round(v / (absmax / 7)), two a byte    onebit   sign(v) * mean|v|, eight a byte

For `onebit`, mean|v| is the scale that minimises the squared error, which is then |v|^2 - k * mean|v|^2. A row that is
read from an index is scored by another, from the norm that stands beside it: |v|^2 / sum|v| (`Codec.unbiased`). Then
<v, decoded> = |v|^2, and if v points in a random direction, <q, decoded> has the mean <q, v> for any q. What it misses
that mean by has, for each unit of |q|, a standard deviation of sqrt((|decoded|^2 - |v|^2) / k) (`Codec.noise`).
Source: RaBitQ, Gao and Long 2024, https://arxiv.org/abs/2405.12497, theorem 3.2.

Scales and errors are in the unit of the vectors' entries. Each codec names the `kernels` that multiply its rows with
queries; `Codec.prepare` takes the fastest of them. Files, statuses and ranks are not known here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from whence import catalogue
from whence.indexing import signed_sums
from whence.indexing.kernels import (
    PACKED,
    TINY,
    Fastest,
    Kernel,
    Queries,
    Stored,
    bfloat16_kernel,
    compiled_kernel,
    decoded_kernel,
    float32_kernel,
    integer_kernel,
    lazily,
    planes,
)
from whence.numerics import inverse_or_zero

Rows = Shaped[Tensor, "n stored"]
Vectors = Float32[Tensor, "n k"]
PerRow = Float32[Tensor, " n"]
Products = Float32[Tensor, "q n"]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One way to store vectors."""

    name: str
    bits: int
    dtype: torch.dtype
    encoder: Callable[[Vectors], tuple[Tensor, Tensor]]
    decoder: Callable[[Tensor, int], Tensor]
    """Values that the codes of rows of width k stand for, before the rows' scales."""
    error: Callable[[Vectors], Tensor]
    kernels: tuple[Callable[[Queries], Kernel], ...]
    """The first one scores batches that are too small for a trial."""
    unbiased: Callable[[PerRow, PerRow, int], PerRow] = lambda scale, norm, k: scale
    """From rows' stored scales, their norms before they were encoded and k: scales of unbiased inner products."""
    noise: Callable[[PerRow, PerRow, int], PerRow] = lambda scale, norm, k: torch.zeros_like(norm)
    """From unbiased scales, norms and k: standard deviation of an inner product with a unit vector; 0 where small."""
    pair_products: Callable[[Stored, Queries, np.ndarray, np.ndarray], np.ndarray] | None = None
    """Exact products of pairs of stored rows and queries on the CPU, before the rows' scales: of (rows, queries [q, k],
    places of the pairs' rows, numbers of their queries). None: rows are decoded and multiplied in fp32."""

    def encode(self, vectors: Vectors) -> tuple[Rows, PerRow]:
        """Stored rows and scales of vectors. Rows that are not finite must come as zeros."""
        return self.encoder(vectors)

    def decode(self, stored: Rows, scale: PerRow, k: int) -> Vectors:
        """The vectors that the codes stand for."""
        return self.decoder(stored, k) * scale[:, None]

    def bound(self, vectors: Vectors) -> PerRow:
        """Largest error of any entry of `decode(encode(vectors))`, for each row."""
        return self.error(vectors)

    def columns(self, k: int) -> int:
        """Entries of `dtype` in a stored row of width k."""
        per_entry = max(1, 8 // self.bits)
        return -(-k // per_entry)

    def bytes_per_row(self, k: int) -> int:
        """Bytes of a stored row, without its scale (4 bytes)."""
        return self.columns(k) * self.dtype.itemsize

    def prepare(self, queries: Queries) -> Kernel:
        """A kernel for these queries, which scores any number of batches on the queries' device."""
        if queries.device.type != "cpu":
            return decoded_kernel(queries, self.decoder)
        kernels = [lazily(make, queries) for make in self.kernels]
        costly = compiled_kernel(self.name, queries, self.columns(queries.shape[1]))
        return kernels[0] if len(kernels) == 1 and not costly else Fastest(self.name, queries, kernels, costly)

    def scores(self, stored: Rows, scale: PerRow, queries: Queries) -> Products:
        """Inner products [q, n] with the decoded rows.

        They come from `decoded_kernel`: right on any device, the same for any number of queries, as slow as decoding.
        """
        return decoded_kernel(queries, self.decoder)(Stored([stored], [scale])).scores


def codec(name: str) -> Codec:
    """The codec of this name.

    >>> stored, scale = codec("int4").encode(torch.tensor([[7.0, -7.0, 1.0]]))
    >>> stored, scale
    (tensor([[31,  9]], dtype=torch.uint8), tensor([1.]))
    >>> codec("int4").decode(stored, scale, 3)
    tensor([[ 7., -7.,  1.]])
    """
    catalogue.check_codec(name)
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


def _unpacked(stored: Tensor, bits: int, k: int) -> Tensor:
    per_byte = 8 // bits
    n, bytes_ = stored.shape
    return planes(stored, bits).view(n, per_byte, bytes_).transpose(1, 2).reshape(n, per_byte * bytes_)[:, :k]


def _decode_plain(stored: Tensor, k: int) -> Tensor:
    return stored.float()


def _decode_int4(stored: Tensor, k: int) -> Tensor:
    return _unpacked(stored, 4, k).float().sub_(8)


def _decode_onebit(stored: Tensor, k: int) -> Tensor:
    return _unpacked(stored, 1, k).float().mul_(2).sub_(1)


def _onebit_unbiased(scale: PerRow, norm: PerRow, k: int) -> PerRow:
    unbiased = norm.double().square() * inverse_or_zero(scale.double() * k)  # squares of fp32 fit into fp64
    return torch.where(norm > 0, unbiased.float(), scale)  # a tiny row's norm may have vanished


def _onebit_noise(scale: PerRow, norm: PerRow, k: int) -> PerRow:
    return (scale.double().square() - norm.double().square() / max(1, k)).clamp(min=0).sqrt().float()


def _onebit_error(vectors: Tensor) -> Tensor:
    mean = _encode_onebit(vectors)[1]
    return torch.maximum(_absmax(vectors) - mean, mean) * (1 + 2**-20) + TINY


_decoded_plain = partial(decoded_kernel, decoder=_decode_plain)

CODECS: dict[str, Codec] = {
    "float32": Codec(
        name="float32",
        bits=32,
        dtype=torch.float32,
        encoder=_encode_float32,
        decoder=_decode_plain,
        error=lambda vectors: vectors.new_zeros(len(vectors)),
        kernels=(float32_kernel,),
    ),
    "bfloat16": Codec(
        name="bfloat16",
        bits=16,
        dtype=torch.bfloat16,
        encoder=_encode_bfloat16,
        decoder=_decode_plain,
        error=lambda vectors: _absmax(vectors) * 2**-8 + TINY,
        kernels=(bfloat16_kernel, _decoded_plain),
    ),
    "float16": Codec(
        name="float16",
        bits=16,
        dtype=torch.float16,
        encoder=_encode_float16,
        decoder=_decode_plain,
        error=lambda vectors: _absmax(vectors) * (2**-11 + 2**-20) + TINY,
        kernels=(_decoded_plain,),
    ),
    "int8": Codec(
        name="int8",
        bits=8,
        dtype=torch.int8,
        encoder=lambda vectors: _encode_integers(vectors, 127),
        decoder=_decode_plain,
        error=lambda vectors: _absmax(vectors) * (1 / 254 + 2**-20) + TINY,
        kernels=(partial(integer_kernel, bits=8), _decoded_plain),
    ),
    "int4": Codec(
        name="int4",
        bits=4,
        dtype=torch.uint8,
        encoder=_encode_int4,
        decoder=_decode_int4,
        error=lambda vectors: _absmax(vectors) * (1 / 14 + 2**-20) + TINY,
        kernels=(partial(integer_kernel, **PACKED["int4"]), partial(decoded_kernel, decoder=_decode_int4)),
    ),
    "onebit": Codec(
        name="onebit",
        bits=1,
        dtype=torch.uint8,
        encoder=_encode_onebit,
        decoder=_decode_onebit,
        error=_onebit_error,
        kernels=(
            partial(integer_kernel, **PACKED["onebit"]),
            partial(decoded_kernel, decoder=_decode_onebit, exactly=False),
        ),
        pair_products=signed_sums.products,
        unbiased=_onebit_unbiased,
        noise=_onebit_noise,
    ),
}
