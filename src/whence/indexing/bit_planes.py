"""Products of one-bit rows with a few queries, by counting bits, in loops that numba compiles (extra `fast`).

A query is rounded to whole multiples of a step (see `rounding`) and written as signs and B bit planes M[b, j] of its
sizes. With the bits u of a row, and p those of the query where it is positive, an entry's sign is that of the query
where u and p are the same, so that

    q[j]   ~ step * sum over b of 2^b M[b, j], with the sign of p[j]
    <s, q> ~ step * sum over b of 2^b (|M_b| - 2 |(u xor p) & M_b|)         s = 2 u - 1

where |.| counts ones. A row's bytes are read once for all planes and queries, and a vector instruction counts 512 bits.

Few planes are enough, for products need only be so near that few rows could be among the best ones; of those the scan
takes exact products (`signed_sums`).

Source: the estimator of RaBitQ, Gao and Long 2024, arXiv 2405.12497, section 3.3.
"""

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from whence.indexing.addresses import VECTOR, Addressed, vectors_of
from whence.indexing.compiled import CompilingError
from whence.indexing.rounding import rounded
from whence.indexing.threads import run_together

LIMIT = 1.25
"""Largest bound on the error for which a query needs no more planes, of |q|: the standard deviation of its product with
random signs. Gradients' products with one-bit rows spread over 4 |q|, so that few rows are as near to the best ones;
where all rows are noise, one of a hundred is."""
PLANES = (3, 4, 5, 6, 8, 10)
"""Numbers of planes: each is a loop to compile."""
_SUMS = 20
"""Sums that stay in registers, of the 32 of AVX-512: planes times rows that are counted together."""
_TASK_BYTES = 1 << 22  # of rows that a thread takes at a time


def planes_of(queries: Float32[Tensor, "q k"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries in bit planes.

    Args:
        queries: On the CPU, finite.

    Returns:
        Planes [q, 1 + b, bytes], the first one of signs (1: positive), as the rows of `codecs` are packed and filled
        with zeros to whole vectors; the factor of the sum of counts, -2 step, and what is added, step times the sum of
        all sizes [q, 2]; the bound on the error of a product with signs [q].
    """
    limits = LIMIT * np.linalg.norm(queries.numpy(), axis=1)
    bits, (whole, step, errors) = PLANES[0], rounded(queries, 2 ** PLANES[0] - 1)
    for more in PLANES[1:]:
        if (errors <= limits).all():
            break
        bits, (whole, step, errors) = more, rounded(queries, 2**more - 1)
    sizes = np.abs(whole)
    planes = [whole > 0, *((sizes >> b) & 1 for b in range(bits))]
    ones = np.stack([np.packbits(plane, axis=1, bitorder="little") for plane in planes], 1)
    packed = np.zeros((*ones.shape[:2], vectors_of(ones.shape[2]) * VECTOR), np.uint8)
    packed[:, :, : ones.shape[2]] = ones
    factors = np.stack([-2.0 * step, step * sizes.sum(1, dtype=np.int64)], 1).astype(np.float64)
    return packed, factors, errors


def products(
    queries: Float32[Tensor, "q k"],
) -> tuple[Callable[[Addressed], Float32[np.ndarray, "n q"]], Float32[np.ndarray, " q"]]:
    """A function from one-bit rows to their products with queries, and its error.

    Returns:
        The function; and the bound on the error of a product, for each unit of the row's scale [q].
    """
    packed, factors, errors = planes_of(queries)
    columns = -(-queries.shape[1] // 8)

    def score(rows: Addressed) -> np.ndarray:
        if rows.width not in (None, columns):
            raise ValueError(f"Rows have {rows.width} stored entries; queries were laid out for {columns}")
        loop = _loop(packed.shape[1] - 1)
        out = np.empty((len(rows.addresses), len(packed)), np.float32)
        step = max(1, _TASK_BYTES // max(1, columns))
        tasks = [slice(first, first + step) for first in range(0, len(out), step)]
        waiting = iter(tasks)  # taking the next one is atomic

        def work() -> None:
            for task in waiting:
                loop(rows.addresses[task], rows.scales[task], packed, factors, out[task])

        run_together(work, len(tasks))
        return out

    return score, errors


@cache
@no_type_check  # numba compiles the function as it is written, not as the tests' shape checks wrap it
def _loop(planes: int) -> Callable[..., None]:
    """The compiled loop: (addresses [n], scale [n], planes [q, 1 + b, bytes], factors [q, 2], out [n, q])."""
    try:
        import numba

        together = max(1, _SUMS // planes)
        count = _counting(planes, together)
    except (ImportError, OSError) as error:  # it does not fit this numpy, or its library does not load
        raise CompilingError(f"{type(error).__name__}: {error}") from error

    @numba.njit(nogil=True)
    def loop(addresses, scale, packed, factors, out) -> None:
        counts = np.zeros(together, np.int64)
        here, ahead = np.zeros(together, np.int64), np.zeros(together, np.int64)
        vectors = packed.shape[2] // VECTOR
        last = addresses.shape[0] - 1
        for n in range(0, addresses.shape[0], together):
            for row in range(together):  # beyond the end the last row is counted again
                here[row] = addresses[min(n + row, last)]
                ahead[row] = addresses[min(n + together + row, last)]
            for q in range(packed.shape[0]):
                # rows to come are fetched once, with the first query
                first, next_rows = packed[q].ctypes.data, (ahead if q == 0 else here).ctypes.data
                count(here.ctypes.data, next_rows, first, packed.shape[2], vectors, counts.ctypes.data)
                for row in range(min(together, addresses.shape[0] - n)):
                    out[n + row, q] = (factors[q, 0] * counts[row] + factors[q, 1]) * scale[n + row]

    row, sample = np.zeros(VECTOR, np.uint8), np.zeros((1, 1 + planes, VECTOR), np.uint8)
    try:
        loop(
            np.array([row.ctypes.data]), np.ones(1, np.float32), sample, np.zeros((1, 2)), np.zeros((1, 1), np.float32)
        )
    except (numba.core.errors.NumbaError, RuntimeError, AttributeError) as error:  # RuntimeError: LLVM's
        raise CompilingError(f"{type(error).__name__}: {error}") from error
    return loop


@no_type_check
def _counting(planes: int, rows: int) -> Callable[..., None]:
    """A function for compiled code: (rows, rows to come, planes, bytes between them, vectors, counts).

    All are addresses but for the two numbers: the first two of lists of addresses, counts of a list of integers. It
    stores for each row the sum of 2^b times the ones that plane b shares with the row's bits xor the query's signs. A
    plane is loaded once for several rows. The rows to come are prefetched, for processors do that by themselves only
    within a page of 4 KB. numba's own loops are not used, for LLVM prefers vectors of half that length on some
    processors.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    word, number, lanes = ir.IntType(64), ir.IntType(32), VECTOR // 8
    vector, pointer = ir.VectorType(word, lanes), ir.IntType(8).as_pointer()

    @intrinsic
    def count(typing, here, ahead, first, stride, vectors, counts):
        def generate(context, builder, signature, arguments):
            here, ahead, first, stride, vectors, counts = arguments
            kind = ir.FunctionType(vector, [vector])
            ones = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{lanes}i64")
            kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            prefetch = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)

            def at(place, kind):
                return builder.inttoptr(place, kind.as_pointer())

            def load(place):
                loaded = builder.load(at(place, vector))
                loaded.align = 1
                return loaded

            starts, next_starts = (
                [builder.load(at(builder.add(places, word(8 * row)), word)) for row in range(rows)]
                for places in (here, ahead)
            )
            before, zero = builder.block, vector([word(0)] * lanes)
            turn, after = builder.append_basic_block("turn"), builder.append_basic_block("after")
            builder.cbranch(builder.icmp_unsigned("==", vectors, word(0)), after, turn)
            builder.position_at_end(turn)
            place = builder.phi(word)
            sums = [builder.phi(vector) for _ in range(planes * rows)]
            offset, place_after = builder.mul(place, word(VECTOR)), builder.add(place, word(1))
            for start in next_starts:
                read, second, data = (ir.Constant(number, value) for value in (0, 2, 1))
                builder.call(prefetch, [at(builder.add(start, offset), ir.IntType(8)), read, second, data])
            part = builder.add(first, offset)
            signs = load(part)
            bits = [builder.xor(load(builder.add(start, offset)), signs) for start in starts]
            added = []
            for plane in range(planes):
                loaded = load(builder.add(part, builder.mul(stride, word(plane + 1))))
                for row in range(rows):
                    shared = builder.call(ones, [builder.and_(bits[row], loaded)])
                    added.append(builder.add(sums[len(added)], shared))
            for total, total_after in zip([place, *sums], [place_after, *added], strict=True):
                total.add_incoming(word(0) if total is place else zero, before)
                total.add_incoming(total_after, turn)
            builder.cbranch(builder.icmp_unsigned("<", place_after, vectors), turn, after)
            builder.position_at_end(after)
            for row in range(rows):
                for plane in range(planes):
                    counted = builder.phi(vector)
                    counted.add_incoming(zero, before)
                    counted.add_incoming(added[plane * rows + row], turn)
                    sums[plane * rows + row] = counted
            for row in range(rows):
                total = zero
                for plane in range(planes):
                    weight = vector([word(1 << plane)] * lanes)
                    total = builder.add(total, builder.mul(sums[plane * rows + row], weight))
                whole = word(0)
                for lane in range(lanes):
                    whole = builder.add(whole, builder.extract_element(total, number(lane)))
                builder.store(whole, at(builder.add(counts, word(8 * row)), word))
            return context.get_dummy_value()

        return types.void(*(types.intp,) * 6), generate

    return count
