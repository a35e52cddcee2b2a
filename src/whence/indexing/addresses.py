"""Stored rows by their addresses, for compiled loops that read whole vectors of 64 bytes; no kernels, no files.

An index's rows lie in many blocks (shards), each of which is contiguous. Loops that take a list of addresses do not
stop at the end of each. A vector may reach beyond a row's end into the next one, where queries must be zeros; the last
rows of a block, from which it would reach beyond the block, are copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VECTOR = 64
"""Bytes that are read at a time."""


@dataclass(frozen=True, eq=False)
class Addressed:
    """Rows of bytes, wherever they lie."""

    addresses: np.ndarray
    """Of each row [n]."""
    scales: np.ndarray
    """Of each row [n]."""
    width: int | None
    """Bytes of a row; None without blocks."""
    held: tuple[np.ndarray, ...]
    """The memory that is pointed to, which must not be freed."""


def checked_width(blocks: Sequence[np.ndarray], scales: np.ndarray) -> int | None:
    """Entries of a row of blocks [n, j]; None without blocks. Compiled loops check no bounds, so that it is done here.

    Raises:
        ValueError: The rows have not one scale each, or are not all of one width.
    """
    count, widths = sum(map(len, blocks)), sorted({block.shape[1] for block in blocks})
    if len(scales) != count or len(widths) > 1:
        raise ValueError(
            f"{count} rows of {widths} entries have {len(scales)} scales: expected one each, and one width"
        )
    return widths[0] if widths else None


def addressed(blocks: Sequence[np.ndarray], scales: np.ndarray) -> Addressed:
    """The rows of blocks [n, bytes] that are contiguous in memory.

    Raises:
        ValueError: See `checked_width`.
    """
    width = checked_width(blocks, scales)
    addresses, held = [np.zeros(0, np.int64)], []
    for block in blocks:
        assert block.dtype == np.uint8 and block.flags.c_contiguous, "blocks are contiguous bytes"
        held.append(block)
        addresses.append(block.ctypes.data + np.arange(len(block), dtype=np.int64) * block.shape[1])
        beyond = -block.shape[1] % VECTOR
        if beyond and len(block):
            last = min(len(block), -(-beyond // block.shape[1]))
            copy = np.zeros((last, block.shape[1] + beyond), np.uint8)
            copy[:, : block.shape[1]] = block[-last:]
            held.append(copy)
            addresses[-1][-last:] = copy.ctypes.data + np.arange(last, dtype=np.int64) * copy.shape[1]
    return Addressed(np.concatenate(addresses), scales, width, tuple(held))


def vectors_of(width: int) -> int:
    """Vectors that a row of so many bytes fills, the last one perhaps in part."""
    return -(-width // VECTOR)
