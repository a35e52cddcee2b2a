"""Products of stored rows with a few queries, by loops that numba compiles for this CPU (extra `fast`).

For one query a scan can be no faster than memory is read, and torch has no product of bfloat16, 8-bit or packed rows
that comes near that on every CPU. A plain loop does: it widens a row's codes to fp32 in registers and multiplies them
by the query,

    score[n, q] = scale[n] * sum over planes p and stored entries j of value(row[n, j], p) * query[q, p, j]

where an entry holds one code, or several side by side (`planes`: two of int4, eight of one bit). Sums are in fp32, and
nothing is rounded before. The loops run in one thread each and without Python's lock, a piece of the rows at a time.

Compiling takes a third of a second, and importing numba as much; `kernels.Fastest` waits until that can pay. What is
compiled is never cached on disk: numba's cache is a pickle.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

_PIECE_BYTES = 1 << 22  # of rows that a thread takes at a time: 100 us of reading, well above the cost of a call

PLANES = {"float32": 1, "bfloat16": 1, "float16": 1, "int8": 1, "int4": 2, "onebit": 8}
"""Codes in a stored entry of each codec that has a loop here; the first one in the lowest bits."""


class CompilingError(Exception):
    """numba is installed and does not work: it cannot be imported, or cannot compile. Scans do without."""


def is_available() -> bool:
    """Whether numba is installed (pip install 'whence[fast]')."""
    return find_spec("numba") is not None


def products(
    codec: str, queries: Float32[Tensor, "q k"], columns: int
) -> Callable[[Sequence[np.ndarray]], Float32[Tensor, "n q"]]:
    """Function from blocks of stored rows [., columns] to their products with queries, before the rows' scales.

    bfloat16 and float16 come as int16.

    Args:
        codec: A name in `PLANES`.
        queries: On the CPU, of any unit.
        columns: Stored entries of a row.
    """
    planes = PLANES[codec]
    filled = torch.nn.functional.pad(queries, (0, planes * columns - queries.shape[1]))
    by_plane = np.ascontiguousarray(filled.view(len(queries), columns, planes).transpose(1, 2).numpy())

    def score(blocks: Sequence[np.ndarray]) -> Tensor:
        loop = _loop(codec)  # numba is imported by the first score, not by the first question
        out = np.empty((sum(map(len, blocks)), len(queries)), np.float32)
        pieces, first = [], 0
        for codes in blocks:
            step = max(1, _PIECE_BYTES // max(1, codes.strides[0]))
            for start in range(0, len(codes), step):
                some = codes[start : start + step]
                pieces.append((some, out[first : first + len(some)]))
                first += len(some)
        waiting = iter(pieces)  # taking the next one is atomic; a future for each piece would cost more than it reads

        def work() -> None:
            for codes, into in waiting:
                loop(codes, by_plane, into)

        others = min(torch.get_num_threads(), len(pieces)) - 1
        with ThreadPoolExecutor(max(1, others)) as pool:  # of this call alone: it cannot outlive a fork
            helping = [pool.submit(work) for _ in range(others)]
            work()
            for done in helping:
                done.result()
        return torch.from_numpy(out)

    return score


@cache
@no_type_check  # numba compiles the function as it is written, not as the tests' shape checks wrap it
def _loop(codec: str) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    """The compiled loop of a codec: (codes [n, j], queries [q, p, j], out [n, q])."""
    try:
        import numba  # a third of a second, and optional
    except (ImportError, OSError) as error:  # it does not fit this numpy, or its library does not load
        raise CompilingError(f"{type(error).__name__}: {error}") from error

    value: Callable = numba.njit(_VALUES[codec], inline="always")

    # sums may be taken in any order; NaN and infinity keep their meaning
    @numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
    def loop(codes: np.ndarray, queries: np.ndarray, out: np.ndarray) -> None:
        for n in range(codes.shape[0]):
            for q in range(queries.shape[0]):
                total = np.float32(0)
                for p in range(queries.shape[1]):
                    for j in range(codes.shape[1]):
                        total += value(codes[n, j], p) * queries[q, p, j]
                out[n, q] = total

    nothing = np.zeros((1, 1), _CODES[codec]), np.zeros((1, PLANES[codec], 1), np.float32), np.zeros((1, 1), np.float32)
    try:
        loop(*nothing)  # compiles
    except numba.core.errors.NumbaError as error:
        raise CompilingError(f"{type(error).__name__}: {error}") from error
    return loop


_CODES = {
    "float32": np.float32,
    "bfloat16": np.int16,
    "float16": np.int16,
    "int8": np.int8,
    "int4": np.uint8,
    "onebit": np.uint8,
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
    "onebit": lambda code, plane: np.float32(np.int32((code >> plane) & 1) * np.int32(2) - np.int32(1)),
}
