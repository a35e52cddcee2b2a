"""Products of stored rows with a few queries, in loops that numba compiles for this CPU (extra `fast`).

For one query a scan can be no faster than memory is read, and torch has no product of bfloat16, 8-bit or packed rows
that comes near that on every CPU. A plain loop does: it widens a row's codes to fp32 in registers and multiplies them
by the query,

    score[n, q] = scale[n] * sum over planes p and stored entries j of value(row[n, j], p) * query[q, p, j]

where an entry holds one code, or several side by side (`planes`: two of int4). Sums are in fp32, of
unrounded products. The loops run in one thread each and without Python's lock, a strip of the rows at a time.

Compiling takes a third of a second, and importing numba as much; `kernels.Fastest` waits until that can pay. Compiled
code is never cached on disk: numba's cache is a pickle.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from whence.indexing.addresses import checked_width
from whence.indexing.threads import run_together

_STRIP_BYTES = 1 << 22  # of rows that a thread takes at a time: 100 us of reading, well above the cost of a call
_CHUNK_BYTES = 1024  # of a row that all queries are multiplied with before the next chunk
_AHEAD_BYTES = {1: 1 << 14, 2: 1 << 13}
"""Distance of prefetching ahead of the products, by the bytes of an entry. fp32 rows, which are long, are slower with
it: 30 ms for 25."""
_LINE_BYTES = 64

PLANES = {"float32": 1, "bfloat16": 1, "float16": 1, "int8": 1, "int4": 2}
"""Codes in a stored entry of each codec that has a loop here; the first one in the lowest bits."""


class CompilingError(Exception):
    """numba is installed but cannot be imported or cannot compile. Scans go on without it."""


@cache
def is_available() -> bool:
    """Whether numba is installed (pip install 'whence[fast]')."""
    return find_spec("numba") is not None


Strip = tuple[slice, np.ndarray, np.ndarray]
"""Rows of a batch, with their codes [n, j] and their scales [n]."""


def strips_of(blocks: Sequence[np.ndarray], scales: np.ndarray) -> list[Strip]:
    """Split blocks of stored rows into strips for threads to take. bfloat16 and float16 come as int16.

    Raises:
        ValueError: See `addresses.checked_width`.
    """
    checked_width(blocks, scales)
    strips, first = [], 0
    for codes in blocks:
        step = max(1, _STRIP_BYTES // max(1, codes.strides[0]))
        for start in range(0, len(codes), step):
            strip_codes = codes[start : start + step]
            rows = slice(first, first + len(strip_codes))
            strips.append((rows, strip_codes, scales[rows]))
            first = rows.stop
    return strips


def products(
    codec: str, queries: Float32[Tensor, "q k"], columns: int
) -> Callable[[Sequence[Strip]], Float32[np.ndarray, "n q"]]:
    """A function from the strips of a batch to its rows' products with queries.

    Args:
        codec: A name in `PLANES`.
        queries: Queries on the CPU, in any unit.
        columns: Stored entries of a row.
    """
    planes = PLANES[codec]
    # both begin on a line of the cache, as torch's memory does; from another place the loop is a quarter slower
    by_plane = queries.contiguous()[:, None]
    if planes > 1:
        filled = torch.nn.functional.pad(queries, (0, planes * columns - queries.shape[1]))
        by_plane = filled.view(len(queries), columns, planes).transpose(1, 2).contiguous()
    factors = by_plane.numpy()

    def score(strips: Sequence[Strip]) -> np.ndarray:
        if strips and strips[0][1].shape[1] != columns:
            raise ValueError(f"Rows have {strips[0][1].shape[1]} stored entries; queries were laid out for {columns}")
        loop = _loop(codec)  # numba is imported by the first score, not by the first question
        out = np.empty((strips[-1][0].stop if strips else 0, len(queries)), np.float32)
        waiting = iter(strips)  # taking the next one is atomic; a future for each would cost more than it reads

        def work() -> None:
            for rows, codes, scale in waiting:
                loop(codes, scale, factors, out[rows])

        run_together(work, len(strips))
        return out

    return score


@cache
@no_type_check  # numba compiles the function as it is written, not as the tests' shape checks wrap it
def _loop(codec: str) -> Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]:
    """The compiled loop of a codec: (codes [n, j], scale [n], queries [q, p, j], out [n, q])."""
    try:
        import numba  # a third of a second, and optional

        prefetch = _prefetching()
    except (ImportError, OSError) as error:  # it does not fit this numpy, or its library does not load
        raise CompilingError(f"{type(error).__name__}: {error}") from error

    value: Callable = numba.njit(_VALUES[codec], inline="always")
    ahead = _AHEAD_BYTES.get(np.dtype(_CODES[codec]).itemsize, 0)

    # sums may be taken in any order; NaN and infinity keep their meaning
    @numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
    def loop(codes: np.ndarray, scale: np.ndarray, queries: np.ndarray, out: np.ndarray) -> None:
        step = _CHUNK_BYTES // codes.itemsize if ahead else max(1, codes.shape[1])
        out[:] = 0
        for n in range(codes.shape[0]):
            for first in range(0, codes.shape[1], step):
                chunk = codes[n, first : first + step]
                if ahead:
                    start = chunk.ctypes.data + ahead
                    for line in range(start, start + chunk.shape[0] * codes.itemsize, _LINE_BYTES):
                        prefetch(line)
                for q in range(queries.shape[0]):
                    total = np.float32(0)
                    for p in range(queries.shape[1]):
                        factors = queries[q, p, first : first + step]
                        for j in range(chunk.shape[0]):
                            total += value(chunk[j], p) * factors[j]
                    out[n, q] += total
            for q in range(queries.shape[0]):
                out[n, q] *= scale[n]

    scale, query = np.ones(1, np.float32), np.ones((1, PLANES[codec], 1), np.float32)
    try:
        loop(np.zeros((1, 1), _CODES[codec]), scale, query, scale[:, None])  # compiles
    except (numba.core.errors.NumbaError, RuntimeError, AttributeError) as error:  # RuntimeError: LLVM's, of `prefetch`
        raise CompilingError(f"{type(error).__name__}: {error}") from error
    return loop


@cache
@no_type_check
def unpacking(bits: int) -> Callable[[np.ndarray, np.ndarray], None]:
    """The compiled loop that unpacks bytes [n, j] to codes of so many bits [n, 8 / bits * j]: see `kernels.planes`."""
    try:
        import numba
    except (ImportError, OSError) as error:
        raise CompilingError(f"{type(error).__name__}: {error}") from error
    per_byte, mask = 8 // bits, np.uint8(2**bits - 1)

    @numba.njit(nogil=True)
    def unpack(stored: np.ndarray, out: np.ndarray) -> None:
        width = stored.shape[1]
        for n in range(stored.shape[0]):
            for place in range(per_byte):
                plane = out[n, place * width : (place + 1) * width]
                for j in range(width):
                    plane[j] = (stored[n, j] >> np.uint8(bits * place)) & mask

    try:
        unpack(np.zeros((1, 1), np.uint8), np.zeros((1, per_byte), np.uint8))  # compiles
    except (numba.core.errors.NumbaError, RuntimeError, AttributeError) as error:  # RuntimeError: LLVM's
        raise CompilingError(f"{type(error).__name__}: {error}") from error
    return unpack


@no_type_check
def _prefetching() -> Callable[[int], None]:
    """A function for compiled code that prefetches the line at an address, valid or not, past the shared cache.

    Processors prefetch by themselves within a page of 4 KB, which can be as short as a row.
    """
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def prefetch(typing: object, address: types.Type) -> tuple:
        def generate(context, builder, signature, arguments):
            pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            function = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
            read, once, data = (ir.Constant(number, value) for value in (0, 0, 1))
            builder.call(function, [builder.inttoptr(arguments[0], pointer), read, once, data])
            return context.get_dummy_value()

        return types.void(types.intp), generate

    return prefetch


_CODES = {
    "float32": np.float32,
    "bfloat16": np.int16,
    "float16": np.int16,
    "int8": np.int8,
    "int4": np.uint8,
}
_BITS = np.uint32(0x7FFF)  # of a float16, without its sign
_FROM_FLOAT16 = np.float32(2.0**112)  # its exponent moves from 5 bits to 8; of subnormals too this mends the bias

# What a code stands for in fp32, before its row's scale; bfloat16 and float16 come as int16.
_VALUES = {
    "float32": lambda code, plane: code,
    "bfloat16": lambda code, plane: np.uint32(np.uint32(np.uint16(code)) << np.uint32(16)).view(np.float32),
    "float16": lambda code, plane: (
        np.uint32((np.uint32(np.uint16(code)) & _BITS) << np.uint32(13)).view(np.float32)
        * (_FROM_FLOAT16 if code >= 0 else -_FROM_FLOAT16)
    ),
    "int8": lambda code, plane: np.float32(code),
    "int4": lambda code, plane: np.float32(np.int32((code >> (4 * plane)) & 15) - np.int32(8)),
}
