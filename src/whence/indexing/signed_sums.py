"""Exact products of pairs of a one-bit row and a query, in fp64, for the few rows whose rounded products are too near.

    <s, q> = 2 * sum over the bits j that are set of q[j] - sum over all j of q[j]

The sums of k fp32 entries in fp64 are exact to 10^-11 of |q|_1, so that their rounding to fp32 does not depend on the
order of summing, but for ties closer than that: rows score the same wherever they lie, compiled (extra `fast`) or not.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numpy as np
from jaxtyping import Float32, Int64
from torch import Tensor

from whence.indexing import compiled
from whence.indexing.kernels import Stored
from whence.indexing.threads import run_together

logger = logging.getLogger(__name__)

_LANES = 8  # fp64 numbers in a vector: of so many bits at a time
_TASK_PAIRS = 64  # that a thread takes at a time
_ENTRIES = 1 << 22  # of signs at a time, where nothing is compiled
_PATIENCE = 0.2  # seconds of such products in a process before it compiles their loop, which takes about as long
_spent = 0.0  # seconds of products that were not compiled


def products(
    rows: Stored,
    queries: Float32[Tensor, "q k"],
    place: Int64[np.ndarray, " pairs"],
    query: Int64[np.ndarray, " pairs"],
) -> Float32[np.ndarray, " pairs"]:
    """Products of the signs of rows with queries, without the rows' scales.

    Args:
        rows: Of one bit an entry.
        queries: On the CPU.
        place: Of the pairs' rows among the rows.
        query: Numbers of the pairs' queries.
    """
    global _spent
    numbers = queries.contiguous().numpy()
    if _spent > _PATIENCE and compiled.is_available():
        try:
            return _compiled(rows.addressed.addresses[place], numbers, query)
        except compiled.CompilingError as error:
            logger.warning("products of one-bit rows are not compiled, and stay slower: %s", error)
            _spent = -math.inf
    start, out = time.perf_counter(), np.empty(len(place), np.float32)
    step = max(1, _ENTRIES // max(1, numbers.shape[1]))
    for first in range(0, len(place), step):
        some = slice(first, first + step)
        out[some] = _plain(rows.codes_at(place[some]), numbers[query[some]])
    _spent += time.perf_counter() - start
    return out


def _plain(codes: np.ndarray, queries: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(codes, axis=1, bitorder="little", count=queries.shape[1])
    signs = bits.astype(np.float64)
    signs *= 2
    signs -= 1
    return np.einsum("nk,nk->n", signs, queries.astype(np.float64))


def _compiled(addresses: np.ndarray, queries: np.ndarray, query: np.ndarray) -> np.ndarray:
    loop, out = _loop(), np.empty(len(query), np.float32)
    tasks = [slice(first, first + _TASK_PAIRS) for first in range(0, len(query), _TASK_PAIRS)]
    waiting = iter(tasks)  # taking the next one is atomic

    def work() -> None:
        for task in waiting:
            loop(addresses[task], queries, query[task], out[task])

    run_together(work, len(tasks))
    return out


@cache
@no_type_check  # numba compiles the function as it is written, not as the tests' shape checks wrap it
def _loop() -> Callable[..., None]:
    """The compiled loop: (addresses [pairs], queries [q, k], query [pairs], out [pairs])."""
    try:
        import numba

        add, copy = _adding()
    except (ImportError, OSError) as error:  # it does not fit this numpy, or its library does not load
        raise compiled.CompilingError(f"{type(error).__name__}: {error}") from error

    @numba.njit(nogil=True)
    def loop(addresses, queries, query, out) -> None:
        total, last = np.zeros(1), np.zeros(4, np.uint8)
        words, known, whole = queries.shape[1] // 32, -1, 0.0
        ones = np.full(4 * words + 1, 255, np.uint8)
        for pair in range(addresses.shape[0]):
            numbers = queries[query[pair]]
            if query[pair] != known:  # pairs of one query follow one another
                known = query[pair]
                add(ones.ctypes.data, numbers.ctypes.data, words, total.ctypes.data)
                whole = total[0]
            add(addresses[pair], numbers.ctypes.data, words, total.ctypes.data)
            rest = 2 * total[0] - whole
            if 32 * words < queries.shape[1]:  # an address can be read for whole vectors
                copy(addresses[pair] + 4 * words, last.ctypes.data)
                for place in range(32 * words, queries.shape[1]):
                    bit = place - 32 * words
                    is_set = (last[bit // 8] >> np.uint8(bit % 8)) & 1
                    rest += numbers[place] if is_set else -numbers[place]
            out[pair] = rest

    row, none = np.zeros(64, np.uint8), np.zeros(1, np.int64)
    try:
        loop(np.array([row.ctypes.data]), np.zeros((1, 40), np.float32), none, np.zeros(1, np.float32))  # compiles
    except (numba.core.errors.NumbaError, RuntimeError, AttributeError) as error:  # RuntimeError: LLVM's
        raise compiled.CompilingError(f"{type(error).__name__}: {error}") from error
    return loop


@no_type_check
def _adding() -> tuple[Callable[..., None], Callable[..., None]]:
    """Two functions for compiled code: (bits, numbers, words of 32 bits, total), and (from, to); all but one addresses.

    The first one stores the fp64 sum of the fp32 numbers whose bits are set, in 32 sums, each of every 32nd number. The
    other copies four bytes.
    """
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    word, number, real, parts = ir.IntType(64), ir.IntType(32), ir.DoubleType(), 32 // _LANES
    stored = ir.VectorType(ir.FloatType(), _LANES)
    vector, mask = ir.VectorType(real, _LANES), ir.VectorType(ir.IntType(1), _LANES)
    zero = vector([0.0] * _LANES)

    @intrinsic
    def add(typing, bits, numbers, words, total):
        def generate(context, builder, signature, arguments):
            bits, numbers, words, total = arguments
            before = builder.block
            turn, after = builder.append_basic_block("turn"), builder.append_basic_block("after")
            builder.cbranch(builder.icmp_unsigned("==", words, word(0)), after, turn)
            builder.position_at_end(turn)
            place = builder.phi(word)
            sums = [builder.phi(vector) for _ in range(parts)]
            following, added = builder.add(place, word(1)), []
            for part in range(parts):
                at = builder.add(bits, builder.add(builder.mul(place, word(4)), word(part)))
                signs = builder.bitcast(builder.load(builder.inttoptr(at, ir.IntType(8).as_pointer())), mask)
                at = builder.add(numbers, builder.add(builder.mul(place, word(128)), word(32 * part)))
                loaded = builder.load(builder.inttoptr(at, stored.as_pointer()))
                loaded.align = 4
                loaded = builder.fpext(loaded, vector)
                added.append(builder.fadd(sums[part], builder.select(signs, loaded, zero)))
            for value, value_after in zip([place, *sums], [following, *added], strict=True):
                value.add_incoming(word(0) if value is place else zero, before)
                value.add_incoming(value_after, turn)
            builder.cbranch(builder.icmp_unsigned("<", following, words), turn, after)
            builder.position_at_end(after)
            whole = zero
            for part in range(parts):
                counted = builder.phi(vector)
                counted.add_incoming(zero, before)
                counted.add_incoming(added[part], turn)
                sums[part] = counted
            for counted in sums:
                whole = builder.fadd(whole, counted)
            result = real(0.0)
            for lane in range(_LANES):
                result = builder.fadd(result, builder.extract_element(whole, number(lane)))
            builder.store(result, builder.inttoptr(total, real.as_pointer()))
            return context.get_dummy_value()

        return types.void(*(types.intp,) * 4), generate

    @intrinsic
    def copy(typing, source, to):
        def generate(context, builder, signature, arguments):
            source, to = (builder.inttoptr(place, number.as_pointer()) for place in arguments)
            loaded = builder.load(source)
            loaded.align = 1
            builder.store(loaded, to).align = 1
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return add, copy
