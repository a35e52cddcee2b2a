"""Products of one-bit rows with many queries in matrix units (AMX), in a loop that numba compiles (extra `fast`).

Queries are rounded to 8 bits (see `rounding`). With the bits u of a row, <s, q> = step (2 <u, whole> - sum of whole). A
tile holds 16 rows of 64 bytes, and an instruction multiplies one by another and adds to a third, in integers. Only the
bits must first become bytes: bit b of 64 bytes that follow one another is a row of a tile, which one shift and one mask
give, and the queries' tiles are laid out to match. While 32 rows are multiplied by 32 queries, their next bits are
unpacked; these and the queries' tiles stay in the nearest caches.

A library's product (oneDNN) wants all codes as bytes in memory first: for 64 queries it reaches two thirds of this
loop's speed, without the time for unpacking.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (AMX).
"""

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from whence.indexing.addresses import VECTOR, Addressed, vectors_of
from whence.indexing.compiled import CompilingError
from whence.indexing.rounding import rounded
from whence.indexing.threads import run_together

_BITS = 8
_TILE = 1024  # bytes: 16 rows of 64
_SIDE = 32  # rows, and queries, that are multiplied at a time: two tiles of each, with four of sums
_GROUP = 4  # bits of a row that are unpacked at a time
_RING = 2 * _GROUP * 2 * _TILE  # bytes: what is multiplied now, and what will be next
_BLOCK_VECTORS = 42  # of a row, whose tiles of 32 queries take 700 KB, so that the second cache holds them
_TASK_ROWS = 512  # that a thread takes at a time
_PAGE = 4096
_TOP = 127


def is_available() -> bool:
    """Whether this process may use such matrix units, and numba knows them."""
    return _init() and _compiler_knows()


@cache
def _init() -> bool:
    """Ask the system for the units, which must be done once in a process."""
    supported, init = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_init_amx"))
    return bool(supported and init and supported() and init())


@cache
def _compiler_knows() -> bool:
    try:
        from llvmlite import binding

        return bool(binding.get_host_cpu_features().get("amx-int8"))
    except (ImportError, OSError, RuntimeError):
        return False


def products(
    queries: Float32[Tensor, "q k"],
) -> tuple[Callable[[Addressed], Float32[np.ndarray, "n q"]], Float32[np.ndarray, " q"]]:
    """A function from one-bit rows to their products with queries, and its error.

    Args:
        queries: On the CPU, finite.

    Returns:
        The function; and the bound on the error of a product, for each unit of the row's scale [q].
    """
    whole, step, errors = rounded(queries, _TOP)
    factors = np.stack([2.0 * step, -step * whole.sum(1, dtype=np.int64)], 1).astype(np.float64)
    tiles, columns = tiles_of(whole), -(-queries.shape[1] // 8)

    def score(rows: Addressed) -> np.ndarray:
        if rows.width not in (None, columns):
            raise ValueError(f"Rows have {rows.width} stored entries; queries were laid out for {columns}")
        loop = _loop()
        out = np.empty((len(rows.addresses), len(whole)), np.float32)
        tasks = [slice(first, first + _TASK_ROWS) for first in range(0, len(out), _TASK_ROWS)]
        waiting = iter(tasks)  # taking the next one is atomic

        def work() -> None:
            for task in waiting:
                loop(rows.addresses[task], rows.scales[task], tiles, _CONFIGURATION, factors, out[task])

        run_together(work, len(tasks))
        return out

    return score, errors


def tiles_of(whole: np.ndarray) -> np.ndarray:
    """Queries [q, k] from -127 to 127 as tiles [32 queries, vector, bit, half of the queries, 16, 16, 4].

    The last three: of 64 bytes of a row, four that follow one another (16 of them), query (16), place (4).
    """
    q, k = whole.shape
    sides, vectors = -(-q // _SIDE), vectors_of(-(-k // 8))
    shape = (sides, vectors, _BITS, 2, 16, 16, 4)
    size = int(np.prod(shape))
    held = np.empty(size + _PAGE, np.int8)
    tiles = held[-held.ctypes.data % _PAGE :][:size].reshape(shape)
    sources = np.zeros((_SIDE, vectors * VECTOR * _BITS), np.int8)
    for side in range(sides):
        few = whole[side * _SIDE : (side + 1) * _SIDE]
        sources[:, :] = 0
        sources[: len(few), :k] = few
        # a column is bit b of byte 4 r + t of a vector
        split = sources.reshape(2, 16, vectors, 16, 4, _BITS)  # half, query, vector, r, t, b
        tiles[side] = split.transpose(2, 5, 0, 3, 1, 4)
    return tiles


def _configuration() -> np.ndarray:
    """Of all eight tiles: 16 rows of 64 bytes."""
    configuration = np.zeros(64, np.uint8)
    configuration[0] = 1  # the palette
    configuration[16:32].view(np.uint16)[:] = 64
    configuration[48:56] = 16
    return configuration


_CONFIGURATION = _configuration()


@cache
@no_type_check  # numba compiles the function as it is written, not as the tests' shape checks wrap it
def _loop() -> Callable[..., None]:
    """The compiled loop: (addresses [n], scale [n], tiles, configuration [64], factors [q, 2], out [n, q])."""
    if not is_available():
        raise CompilingError("this CPU, or this numba, has no matrix units")
    try:
        import numba

        multiply = _multiplying()
    except (ImportError, OSError) as error:  # it does not fit this numpy, or its library does not load
        raise CompilingError(f"{type(error).__name__}: {error}") from error

    @numba.njit(nogil=True)
    def loop(addresses, scale, tiles, configuration, factors, out) -> None:
        n, vectors = addresses.shape[0], tiles.shape[1]
        panels = (n + _SIDE - 1) // _SIDE
        width = tiles.shape[0] * _SIDE
        sums = np.zeros((panels * _SIDE, width), np.int32)
        rows = np.empty(panels * _SIDE, np.int64)
        for row in range(len(rows)):
            rows[row] = addresses[min(row, n - 1)]  # beyond the end the last row is multiplied again
        space = np.empty(_RING + _PAGE, np.uint8)
        ring = (space.ctypes.data + _PAGE - 1) // _PAGE * _PAGE
        for side in range(tiles.shape[0]):
            for first in range(0, vectors, _BLOCK_VECTORS):
                block = min(_BLOCK_VECTORS, vectors - first)
                for panel in range(panels):
                    multiply(
                        rows[panel * _SIDE :].ctypes.data,
                        rows[min(panel + 1, panels - 1) * _SIDE :].ctypes.data,
                        first,
                        block,
                        tiles[side, first].ctypes.data,
                        ring,
                        sums[panel * _SIDE :].ctypes.data + 4 * _SIDE * side,
                        4 * width,
                        configuration.ctypes.data,
                    )
        for row in range(n):
            for q in range(out.shape[1]):
                out[row, q] = (factors[q, 0] * sums[row, q] + factors[q, 1]) * scale[row]

    try:
        # no vectors: it is compiled, and multiplies nothing
        tiles = np.zeros((1, 0, _BITS, 2, 16, 16, 4), np.int8)
        real = np.zeros((1, 1), np.float32)
        loop(np.zeros(1, np.int64), real[0], tiles, _CONFIGURATION, np.zeros((1, 2)), real)
    except (numba.core.errors.NumbaError, RuntimeError, AttributeError) as error:  # RuntimeError: LLVM's
        raise CompilingError(f"{type(error).__name__}: {error}") from error
    return loop


@no_type_check
def _multiplying() -> Callable[..., None]:
    """A function for compiled code: (rows, rows to come, first, vectors, tiles, ring, sums, stride, configuration).

    All are addresses but for the numbers `first` vector, `vectors` (one or more) and `stride`, bytes of a row of sums;
    the first two are those of lists of 32 addresses. To 32 x 32 sums it adds the products of as many rows and queries,
    over so many vectors, and prefetches those of the rows to come.
    """
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def multiply(typing, rows, ahead, first, vectors, tiles, ring, sums, stride, configuration):
        def generate(context, builder, signature, arguments):
            rows, ahead, first, vectors, tiles, ring, sums, stride, configuration = arguments
            emitter = _Emitter(builder, ring)
            emitter.call("ldtilecfg", configuration)
            emitter.sums("tileloadd64", sums, stride)
            starts, next_starts = (emitter.starts(listed, first) for listed in (rows, ahead))
            emitter.unpack(starts, emitter.word(0), range(_SIDE), range(_GROUP))
            before, turn = builder.block, builder.append_basic_block("turn")
            after = builder.append_basic_block("after")
            builder.branch(turn)
            builder.position_at_end(turn)
            place = builder.phi(emitter.word)
            following = builder.add(place, emitter.word(1))
            is_last = builder.icmp_unsigned(">=", following, vectors)
            there = builder.select(is_last, place, following)
            emitter.vector(starts, next_starts, place, there, tiles)
            place.add_incoming(emitter.word(0), before)
            place.add_incoming(following, turn)
            builder.cbranch(is_last, after, turn)
            builder.position_at_end(after)
            emitter.sums("tilestored64", sums, stride)
            emitter.call("tilerelease")
            return context.get_dummy_value()

        return types.void(*(types.intp,) * 9), generate

    return multiply


@no_type_check
class _Emitter:
    """Writes instructions for tiles: 0 to 3 are sums, 4 and 5 of rows, 6 and 7 of queries. Places are addresses."""

    def __init__(self, builder, ring):
        from llvmlite import ir

        self.builder, self.ring = builder, ring
        self.word, self.number, self.byte, self.void = ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.VoidType()
        self.lanes = ir.VectorType(self.number, VECTOR // 4)
        self.pointer = self.byte.as_pointer()
        self.function = ir.FunctionType

    def call(self, name, *arguments):
        """An instruction of tiles: of their numbers, given as integers, addresses and other words."""
        kinds, values = [], []
        for number, argument in enumerate(arguments):
            if isinstance(argument, int):
                kinds.append(self.byte)
                values.append(self.byte(argument))
            elif number == 1 or len(arguments) == 1:  # the place, after a tile's number or alone
                kinds.append(self.pointer)
                values.append(self.builder.inttoptr(argument, self.pointer))
            else:
                kinds.append(self.word)
                values.append(argument)
        name = f"llvm.x86.{name}"
        self.builder.call(self.builder.module.globals.get(name) or self.declared(name, kinds), values)

    def declared(self, name, kinds):
        """A function of the compiler's own."""
        from llvmlite import ir

        return ir.Function(self.builder.module, self.function(self.void, kinds), name)

    def plus(self, place, offset):
        """A place so many bytes further."""
        return self.builder.add(place, self.word(offset))

    def sums(self, name, place, stride):
        """Load or store the four tiles of sums."""
        for half in range(2):
            for query in range(2):
                row = self.builder.mul(stride, self.word(16 * half))
                self.call(name, 2 * half + query, self.builder.add(self.plus(place, 64 * query), row), stride)

    def starts(self, listed, first):
        """Addresses of 32 rows, from a list, at their first vector."""
        offset = self.builder.mul(first, self.word(VECTOR))
        pointer = self.builder.inttoptr(listed, self.word.as_pointer())
        loaded = [self.builder.load(self.builder.gep(pointer, [self.word(row)])) for row in range(_SIDE)]
        return [self.builder.add(start, offset) for start in loaded]

    def slot(self, bit):
        """Where a bit of 32 rows is unpacked to."""
        return self.plus(self.ring, bit % (2 * _GROUP) * 2 * _TILE)

    def unpack(self, starts, offset, rows, bits):
        """Store bits of 64 bytes of rows."""
        for row in rows:
            place = self.builder.add(starts[row], offset)
            loaded = self.builder.load(self.builder.inttoptr(place, self.lanes.as_pointer()))
            loaded.align = 1
            for bit in bits:
                shifted = self.builder.lshr(loaded, self.lanes([bit] * (VECTOR // 4)))
                ones = self.builder.and_(shifted, self.lanes([0x01010101] * (VECTOR // 4)))
                place = self.builder.inttoptr(self.plus(self.slot(bit), row * VECTOR), self.lanes.as_pointer())
                self.builder.store(ones, place).align = VECTOR

    def prefetch(self, place):
        """Fetch a line into the second cache, valid or not."""
        kinds = [self.pointer, *[self.number] * 3]
        function = self.builder.module.declare_intrinsic(
            "llvm.prefetch", (self.pointer,), self.function(self.void, kinds)
        )
        read, second, data = (self.number(value) for value in (0, 2, 1))
        self.builder.call(function, [self.builder.inttoptr(place, self.pointer), read, second, data])

    def vector(self, starts, next_starts, place, there, tiles):
        """The products of one vector of 32 rows, the `place`-th; after it comes that at `there`."""
        here, there = (self.builder.mul(each, self.word(VECTOR)) for each in (place, there))
        tiles = self.builder.add(tiles, self.builder.mul(place, self.word(_BITS * 2 * _TILE)))
        line, share = self.word(VECTOR), _SIDE // _GROUP
        for bit in range(_BITS):
            # meanwhile a share of the rows is unpacked, to the group of bits that follows
            group, turn = bit // _GROUP * _GROUP + _GROUP, bit % _GROUP
            some, bits = range(turn * share, turn * share + share), range(group % _BITS, group % _BITS + _GROUP)
            self.unpack(starts, here if group < _BITS else there, some, bits)
            for row in range(bit * _SIDE // _BITS, (bit + 1) * _SIDE // _BITS):
                self.prefetch(self.builder.add(next_starts[row], here))
            for query in range(2):
                self.call("tileloadd64", 6 + query, self.plus(tiles, (2 * bit + query) * _TILE), line)
            for half in range(2):
                self.call("tileloadd64", 4 + half, self.plus(self.slot(bit), half * _TILE), line)
                for query in range(2):
                    self.call("tdpbssd", 2 * half + query, 4 + half, 6 + query)
