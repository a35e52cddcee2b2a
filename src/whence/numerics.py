"""Seeded generators and the Hadamard transform.

Randomness comes from `generator(seed, *scope)` alone, on the CPU, and is moved to the device afterwards, so that
a projection is the same on any device, worker and batch size. torch's CPU generator ignores the high 32 bits of a
seed (`manual_seed(5)` and `manual_seed(5 + (1 << 32))` give the same numbers), so seed and scope are mixed into 32.
"""

import zlib

import torch
from jaxtyping import Float, Int8
from torch import Tensor


def mixed_seed(seed: int, *scope: str) -> int:
    """Mix a seed and the names of what it is for into 32 bits (crc32 of `seed/scope/...`).

    Two scopes share a stream with a chance of 2^-32: about 3e-5 that any two of 500 layers do.
    """
    return zlib.crc32("/".join((str(seed), *scope)).encode())


def generator(seed: int, *scope: str) -> torch.Generator:
    """CPU generator for one purpose, such as `generator(0, "sjlt", layer)`.

    >>> bool(torch.equal(signs(4, generator(0, "x")), signs(4, generator(0, "x"))))
    True
    """
    return torch.Generator().manual_seed(mixed_seed(seed, *scope))


def signs(count: int, rng: torch.Generator) -> Int8[Tensor, " count"]:
    """Independent signs, -1 or +1 with equal chance, as int8."""
    return torch.randint(2, (count,), generator=rng, dtype=torch.int8) * 2 - 1


def hadamard(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Walsh-Hadamard transform of the last axis, orthonormal (norms are kept; its own inverse).

    Done as products with small Hadamard matrices (radix 64), which a CPU and a GPU run far faster than the
    log2(d) butterfly passes: O(d * 64 * log64(d)) for a row. `d` must be a power of two.

    >>> hadamard(torch.tensor([1.0, 1.0, 1.0, 1.0])).tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    d = x.shape[-1]
    assert d & (d - 1) == 0, f"Hadamard transform of length {d}, which is not a power of two"
    out, inner = x, 1
    while inner < d:
        radix = min(64, d // inner)
        blocks = out.reshape(*x.shape[:-1], d // (inner * radix), radix, inner)
        out = torch.einsum("rs,...sn->...rn", _hadamard_matrix(radix).to(x), blocks).reshape(x.shape)
        inner *= radix
    return out


def _hadamard_matrix(d: int) -> Float[Tensor, "d d"]:
    matrix = torch.ones(1, 1)
    while len(matrix) < d:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix
