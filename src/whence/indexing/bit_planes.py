"""Products of one-bit rows with a few queries, by counting bits, in loops that numba compiles (extra `fast`).

A query is rounded to whole multiples of a step and written in B bit planes P[b, j], in two's complement; its product
with a row's signs s = 2 u - 1 is then B counts of ones,

    q[j]   ~ step * sum over b of w_b P[b, j],     w_b = 2^b, but w_(B-1) = -2^(B-1)
    <s, q> ~ step * sum over b of w_b (2 |u & P_b| - |P_b|)

where |.| counts ones. A row's bytes are read once for all planes and queries, and a vector instruction counts 512 bits.

Each entry is rounded up or down at random, with the probability that leaves its mean as it was. Errors of entries are
then independent and within a step, so that Hoeffding's inequality bounds that of a product of k entries:

    P(|error| > step * sqrt(k ln(2 / RISK) / 2)) <= RISK

Source: the estimator of RaBitQ, Gao and Long 2024, arXiv 2405.12497, section 3.3 (theorem 3.3 has the bound). Its own
query has 4 bits; here it has as many as keep the bound well below what chance makes of a product.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import no_type_check

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from whence.indexing.compiled import CompilingError, Strip
from whence.indexing.threads import run_together

RISK = 1e-9
"""Probability that the error of one product is larger than its bound."""
LIMIT = 0.3
"""Largest bound on the error for which a query needs no more planes, of |q|: the standard deviation of its product with
random signs. So few rows are within the bound of the best ones even where all rows are noise."""
PLANES = (4, 6, 8, 10, 12)
"""Numbers of planes: each is a loop to compile."""
_VECTOR = 64
"""Bytes that are counted at a time."""
_SUMS = 24
"""Sums that stay in registers, of the 32 of AVX-512: planes times rows that are counted together."""
_TINY = 2.0**-119


def planes_of(queries: Float32[Tensor, "q k"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries in bit planes.

    Args:
        queries: On the CPU, finite.

    Returns:
        Planes [q, b, bytes], as the rows of `codecs` are packed and filled with zeros to whole vectors; the factor of
        each plane's count, 2 step w_b [q, b], with what is added to their sum, -step sum of w_b |P_b| [q], as the last
        column; the bound on the error of a product with signs [q].
    """
    values = queries.numpy().astype(np.float64)
    k, largest, norms = values.shape[1], np.abs(values).max(1, initial=0.0), np.linalg.norm(values, axis=1)
    largest = np.maximum(largest, _TINY)
    spread = math.sqrt(k * math.log(2 / RISK) / 2)
    limits = LIMIT * norms
    bits = next((b for b in PLANES if (spread * largest / (2 ** (b - 1) - 1) <= limits).all()), PLANES[-1])
    step = largest / (2 ** (bits - 1) - 1)
    noise = np.random.default_rng(0).random(values.shape)
    whole = np.floor(values / step[:, None] + noise).astype(np.int16)  # at most 2^(bits - 1) - 1: noise is below 1
    ones = np.stack([np.packbits((whole >> b) & 1, axis=1, bitorder="little") for b in range(bits)], 1)
    packed = np.zeros((len(values), bits, -(-ones.shape[2] // _VECTOR) * _VECTOR), np.uint8)
    packed[:, :, : ones.shape[2]] = ones
    weights = np.array([*(2.0**b for b in range(bits - 1)), -(2.0 ** (bits - 1))]) * step[:, None]
    constant = -(weights * np.bitwise_count(packed).sum(2)).sum(1, keepdims=True)
    return packed, np.concatenate([2 * weights, constant], 1), spread * step


def products(
    queries: Float32[Tensor, "q k"],
) -> tuple[Callable[[Sequence[Strip]], Float32[np.ndarray, "n q"]], Float32[np.ndarray, " q"]]:
    """A function from the strips of a batch of one-bit rows to their products with queries, and its error.

    Returns:
        The function; and the bound on the error of a product, for each unit of the row's scale [q].
    """
    packed, factors, errors = planes_of(queries)
    columns = -(-queries.shape[1] // 8)

    def score(strips: Sequence[Strip]) -> np.ndarray:
        if strips and strips[0][1].shape[1] != columns:
            raise ValueError(f"Rows have {strips[0][1].shape[1]} stored entries; queries were laid out for {columns}")
        loop = _loop(packed.shape[1])
        out = np.empty((strips[-1][0].stop if strips else 0, len(packed)), np.float32)
        waiting = iter(strips)

        def work() -> None:
            for rows, codes, scale in waiting:
                loop(codes, scale, packed, factors, out[rows])

        run_together(work, len(strips))
        return out

    return score, errors.astype(np.float32)


@cache
@no_type_check  # numba compiles the function as it is written, not as the tests' shape checks wrap it
def _loop(planes: int) -> Callable[..., None]:
    """The compiled loop: (codes [n, j], scale [n], planes [q, b, bytes], factors [q, b + 1], out [n, q])."""
    try:
        import numba

        together = max(1, _SUMS // planes)
        count = _counting(planes, together)
    except (ImportError, OSError) as error:  # it does not fit this numpy, or its library does not load
        raise CompilingError(f"{type(error).__name__}: {error}") from error

    @numba.njit(nogil=True)
    def loop(codes: np.ndarray, scale: np.ndarray, packed: np.ndarray, factors: np.ndarray, out: np.ndarray) -> None:
        width, stride = codes.shape[1], packed.shape[2]
        whole = width // _VECTOR
        end = whole * _VECTOR
        counts, rest = np.zeros((planes, together), np.int64), np.zeros((together, _VECTOR), np.uint8)
        n = 0
        while n < codes.shape[0]:
            rows = together if n + together <= codes.shape[0] else 1  # a last row is counted alone, several times
            apart = 1 if rows > 1 else 0
            for row in range(rows):
                rest[row, : width - end] = codes[n + row, end:]
            for q in range(packed.shape[0]):
                first = packed[q].ctypes.data
                counts[:] = 0
                count(codes[n].ctypes.data, apart * width, first, stride, whole, counts.ctypes.data)
                left = stride // _VECTOR - whole
                count(rest.ctypes.data, apart * _VECTOR, first + end, stride, left, counts.ctypes.data)
                for row in range(rows):
                    total = factors[q, planes]
                    for b in range(planes):
                        total += factors[q, b] * counts[b, row]
                    out[n + row, q] = total * scale[n + row]
            n += rows

    sample = np.zeros((1, 1), np.uint8), np.ones(1, np.float32), np.zeros((1, planes, _VECTOR), np.uint8)
    try:
        loop(*sample, np.zeros((1, planes + 1)), np.zeros((1, 1), np.float32))  # compiles
    except (numba.core.errors.NumbaError, RuntimeError, AttributeError) as error:  # RuntimeError: LLVM's
        raise CompilingError(f"{type(error).__name__}: {error}") from error
    return loop


@no_type_check
def _counting(planes: int, rows: int) -> Callable[..., None]:
    """A function for compiled code: (rows, bytes between them, planes, bytes between them, vectors, counts).

    Rows, planes and counts [planes, rows] are addresses. To each count it adds the ones of a plane's bits that a row
    has too, over so many vectors of 64 bytes. A plane is loaded once for several rows. numba's own loops are not used,
    for LLVM prefers vectors of half that length on some processors.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    word, lanes = ir.IntType(64), _VECTOR // 8
    vector = ir.VectorType(word, lanes)

    @intrinsic
    def count(typing, codes, apart, first, stride, vectors, counts):
        def generate(context, builder, signature, arguments):
            codes, apart, first, stride, vectors, counts = arguments
            kind = ir.FunctionType(vector, [vector])
            ones = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{lanes}i64")

            def load(start, offset, step, number):
                address = builder.add(builder.add(start, offset), builder.mul(step, word(number)))
                loaded = builder.load(builder.inttoptr(address, vector.as_pointer()))
                loaded.align = 1
                return loaded

            before = builder.block
            turn, end, after = (builder.append_basic_block(name) for name in ("turn", "end", "after"))
            builder.cbranch(builder.icmp_unsigned("==", vectors, word(0)), after, turn)
            builder.position_at_end(turn)
            place = builder.phi(word)
            sums = [builder.phi(vector) for _ in range(planes * rows)]
            offset, place_after = builder.mul(place, word(_VECTOR)), builder.add(place, word(1))
            bits = [load(codes, offset, apart, row) for row in range(rows)]
            added = []
            for plane in range(planes):
                loaded = load(first, offset, stride, plane)
                for row in range(rows):
                    shared = builder.call(ones, [builder.and_(bits[row], loaded)])
                    added.append(builder.add(sums[len(added)], shared))
            for total, total_after in zip([place, *sums], [place_after, *added], strict=True):
                total.add_incoming(word(0) if total is place else vector([word(0)] * lanes), before)
                total.add_incoming(total_after, turn)
            builder.cbranch(builder.icmp_unsigned("<", place_after, vectors), turn, end)
            builder.position_at_end(end)
            for number, total in enumerate(added):
                pointer = builder.inttoptr(builder.add(counts, word(8 * number)), word.as_pointer())
                whole = builder.load(pointer)
                for lane in range(lanes):
                    whole = builder.add(whole, builder.extract_element(total, ir.IntType(32)(lane)))
                builder.store(whole, pointer)
            builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        return types.void(*(types.intp,) * 6), generate

    return count
